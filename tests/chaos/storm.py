"""A job that is killed in every way, again and again, until it is done; and what became of its rows.

The job runs on a Ray cluster of several nodes on this machine and writes to a real S3 server. Which kill comes when is
drawn from a seed; a kill comes when so many rows have ended, so that it meets a job at work on any machine.

Two kinds are no kills but what people and machines do to an output: it is moved to another folder under the run and put
back when the run has stopped, and files that no run wrote appear among the leases, upon which a second run is started.
"""

from __future__ import annotations

import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ray.cluster_utils import Cluster
from swift.server import SwiftServer

from chaos.driver import KILLS, NEVER_ENDS, hold, two_drivers
from jobs.clips import render_clips
from jobs.spec import load_spec
from pipeline.faults import Ledger
from pipeline.manifest import Manifest
from pipeline.plan import make_plan
from pipeline.store import Store, StoreMissingError, open_fs

PROMPTS = ("a red ball moving over grass", "a blue star moving over sand", "a white ring moving on water")
KINDS = ("driver", "actor", "node", "object server", "503 burst", "output moved", "foreign lease files")
POISON = {KILLS: "quarantined", NEVER_ENDS: "failed"}
BURST = {"status": 503, "rate": 0.5}
BURST_S, OUTAGE_S, SETTLED_S = 5.0, 3.0, 5.0
PATIENCE_S, DEADLINE_S = 300.0, 40.0
_STRUCK_SHARE = 0.8
"""Of the rows during which kills come: the last ones shall not meet a job that is over."""
NOTICED_S = 120.0
FOREIGN = ("lease/.nfs00000000004c0f2a00000001", "lease/.DS_Store", "lease/000001.json~", "lease/note.txt")
NODE = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
ACTOR = b"ray::MapWorker(Map(GenerateVideo"


@dataclass(frozen=True)
class Kill:
    """One fault: it strikes when so many rows have ended."""

    rows: int
    kind: str


def draw_kills(count: int, rows: int, seed: int, kinds: tuple[str, ...] = KINDS) -> list[Kill]:
    """Draw kills over the length of a job: every kind about equally often, in an order of the seed's."""
    random_ = random.Random(seed)
    order = [kinds[number % len(kinds)] for number in range(count)]
    random_.shuffle(order)
    moments = sorted(random_.randrange(1, max(2, round(_STRUCK_SHARE * rows))) for _ in range(count))
    return [Kill(moment, kind) for moment, kind in zip(moments, order, strict=True)]


@dataclass
class Report:
    """What was done to a job, and what became of its rows."""

    rows: int
    kills: Counter[str] = field(default_factory=Counter)
    in_flight: list[int] = field(default_factory=list)
    """Rows begun and not ended at each kill of a driver."""
    redone: list[int] = field(default_factory=list)
    """Rows that such a kill made somebody begin again."""
    remade: int = 0
    """Rows that were made again although they had ended."""
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    poison: dict[str, dict[str, Any]] = field(default_factory=dict)
    innocents_lost: int = 0
    lost: int = 0
    duplicates: int = 0
    two_drivers: bool = False
    """Whether two drivers were ever at work at once."""
    orphans_before_cleaning: int = 0
    problems_after_cleaning: int = 0
    outputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each output that is ok, by its row's id."""


class Storm:
    """Runs a job under kills. `folder` is for its inputs and logs."""

    def __init__(self, folder: Path, swift: SwiftServer, rows: int, seed: int):
        self._folder, self._swift, self._seed = folder, swift, seed
        self._log = folder / "driver.log"
        self._bucket = f"s3://{swift.new_bucket()}"
        self.references = self._upload(rows)
        self.pairs = [
            {"reference": self.references[n % len(self.references)], "prompt": PROMPTS[n % len(PROMPTS)], "seed": n}
            for n in range(rows - len(POISON))
        ]
        poison = [{"reference": self.references[0], "prompt": prompt, "seed": 0} for prompt in POISON]
        at = random.Random(seed).sample(range(rows // 2), len(poison))
        mixed = [*self.pairs]
        for place, row in zip(sorted(at), poison, strict=True):
            mixed.insert(place, row)
        self.spec = self._write_spec("chaos", mixed, self._bucket, row_deadline_s=DEADLINE_S)
        self.store = Store(f"{self._bucket}/out", patience_s=PATIENCE_S)
        self.manifest, self.ledger = Manifest(self.store), Ledger(self.store)
        self.report = Report(rows)

    # ------------------------------------------------------------------ the job

    def _upload(self, rows: int) -> list[str]:
        """Store a reference for every ten rows or so; return their names."""
        folder = self._folder / "references"
        render_clips(folder, count=max(2, rows // 10), seed=self._seed)
        files, store = sorted(folder.glob("*.mp4")), Store(f"{self._bucket}/references")
        for file in files:
            store.put(file.name, file)
        return [file.name for file in files]

    def _write_spec(self, name: str, pairs: list[dict[str, Any]], root: str, **faults: Any) -> Path:
        """Write a job whose references and output lie below `root`."""
        text = io.StringIO()
        table = csv.DictWriter(text, ["reference", "prompt", "seed"])
        table.writeheader()
        table.writerows(pairs)
        stored = Store(f"{root}/tables").put(f"{name}.csv", text.getvalue().encode())
        spec = {
            "kind": "synthesize",
            "name": name,
            "references": {"uri": f"{root}/references", "frames": 9, "height": 32, "width": 32, "stride": 2},
            "pairing": {"uri": stored.uri},
            "method": {"name": "ditflow", "optimize": "latent", "guided_steps": 2, "iterations": 2},
            "sampling": {"steps": 3},
            "output": {"uri": f"{root}/out"},
            "resources": {"generate": {"actors": 2}, "threads": 1},
            "faults": {"storage_patience_s": PATIENCE_S, **faults},
        }
        file = self._folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(spec))
        return file

    def undisturbed(self) -> dict[str, str]:
        """Make the innocent rows in peace, on this process's Ray, and return their outputs' hashes by row."""
        from running import run

        run(self._write_spec("calm", self.pairs, str(self._folder)))
        return _outputs(Manifest(Store(str(self._folder / "out"))).read().to_pylist())

    # ------------------------------------------------------------------ the kills

    def run(self, kills: list[Kill]) -> Report:
        """Start the job, kill as told, start it again whenever its driver is gone, and report when it is done."""
        started, left, struck_at = time.monotonic(), [*kills], 0
        with self._cluster() as self._nodes:
            driver = self._start_driver()
            while driver.poll() is None or left or driver.returncode not in (0, 3):
                if driver.poll() is not None:
                    driver = self._next_driver(driver)
                elif left and self._ended() >= min(max(left[0].rows, struck_at + 1), self.report.rows):
                    kind = left.pop(0).kind
                    self.report.kills[kind] += driver.poll() is None and self._strike(kind, driver)
                    struck_at = self._ended()
                time.sleep(0.1)
        self.report.seconds = round(time.monotonic() - started, 1)
        self._take_stock()
        return self.report

    def _next_driver(self, driver: subprocess.Popen) -> subprocess.Popen:
        """Start the job again; only a kill, a stop for want of storage or its end may have ended the driver before."""
        if driver.returncode not in (0, 1, 3, -signal.SIGKILL):
            raise AssertionError(f"the driver ended with {driver.returncode}:\n{self._log.read_text()[-4000:]}")
        return self._start_driver()

    def _start_driver(self, log: Path | None = None) -> subprocess.Popen:
        with (log or self._log).open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "chaos.driver", "run", str(self.spec)],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "RAY_ADDRESS": self._address},
                stdout=log,
                stderr=log,
            )

    def _ended(self) -> int:
        return len(self.store.list("manifest"))

    def _strike(self, kind: str, driver: subprocess.Popen) -> bool:
        """Return whether it struck: there may be no actor any more."""
        struck = {
            "driver": lambda: self._kill_driver(driver),
            "actor": lambda: self._kill_actor(driver),
            "node": self._kill_node,
            "object server": self._kill_object_server,
            "503 burst": self._burst,
            "output moved": lambda: self._move_output(driver),
            "foreign lease files": lambda: self._leave_foreign_files(driver),
        }[kind]()
        return struck is not False

    def _kill_driver(self, driver: subprocess.Popen) -> None:
        """Kill the driver, and see what becomes of the rows in flight."""
        driver.kill()
        driver.wait()
        in_flight = len(self._rows_in_flight())
        time.sleep(SETTLED_S)  # its actors die with it; a row in flight may still end before
        self.report.in_flight.append(in_flight)
        self.report.redone.append(len(self._rows_in_flight() - {*self.manifest.statuses()}))

    def _rows_in_flight(self) -> set[str]:
        return {work for work in self.ledger.unfinished() if work in self._row_ids}

    def _kill_actor(self, driver: subprocess.Popen) -> bool:
        """Kill a process that makes rows; wait for one as long as the driver runs. Return whether there was one."""
        deadline = time.monotonic() + 120
        while not (actors := _children(self._raylets(), ACTOR)):
            if driver.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        os.kill(random.Random(self._seed).choice(actors), signal.SIGKILL)
        return True

    def _raylets(self) -> set[int]:
        return {info.process.pid for node in self._nodes.list_all_nodes() for info in node.all_processes["raylet"]}

    def _kill_node(self) -> None:
        """Take a machine away, with all that runs on it, and give another."""
        self._nodes.remove_node(sorted(self._nodes.worker_nodes, key=str)[0], allow_graceful=False)
        self._nodes.add_node(**NODE)

    def _kill_object_server(self) -> None:
        self._swift.kill_object_server()
        time.sleep(OUTAGE_S)
        self._swift.start_object_server()

    def _burst(self) -> None:
        self._swift.faults.set([{**BURST, "seed": self._seed}])
        time.sleep(BURST_S)
        self._swift.faults.clear()

    def _move_output(self, driver: subprocess.Popen) -> None:
        """Move the output away until the run has noticed and ended by itself, then put it back beside what it wrote."""
        away = Store(f"{self._bucket}/away", patience_s=PATIENCE_S)
        _move(self.store, away)
        driver.wait(NOTICED_S)
        _move(away, self.store)

    def _leave_foreign_files(self, driver: subprocess.Popen) -> bool:
        """Leave files among the leases that no run wrote, and start a second run: it must be refused.

        The job is held meanwhile, or it might be over before the second run has started.
        """
        for key in FOREIGN:
            self.store.put(key, b"\0")
        log, held = self._folder / "rival.log", hold(self.store.uri)
        log.unlink(missing_ok=True)
        held.touch()
        try:
            refused = self._start_driver(log).wait() == 1 and "another run is working on this output" in log.read_text()
        finally:
            held.unlink()
        if driver.poll() is None and not refused:
            raise AssertionError(f"the second run was not refused:\n{log.read_text()[-4000:]}")
        return refused

    @contextmanager
    def _cluster(self) -> Iterator[Cluster]:
        """Lend a cluster: a head without room for actors, and two machines with."""
        spec = load_spec(self.spec)
        self._row_ids = {row.row_id for row in make_plan(spec.job, spec.model.revision).todo}
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(2):
                cluster.add_node(**NODE)
            self._address = cluster.address
            yield cluster
        finally:
            cluster.shutdown()

    # ------------------------------------------------------------------ the end

    def _take_stock(self) -> None:
        """Compare what was planned with what is recorded and stored."""
        report, rows = self.report, self.manifest.read().to_pylist()
        report.statuses = dict(Counter(row["status"] for row in rows))
        report.lost = len(self._row_ids - {row["row_id"] for row in rows})
        report.duplicates = sum(problem.kind == "row_duplicate" for problem in self.manifest.verify(check_hashes=False))
        for row in rows:
            if row["prompt"] in POISON:
                report.poison[row["prompt"]] = {key: row[key] for key in ("status", "error_kind", "attempts")}
            elif row["status"] != "ok":
                report.innocents_lost += 1
        report.two_drivers = two_drivers(self.spec).exists()
        report.orphans_before_cleaning = sum(problem.kind == "orphan" for problem in self.manifest.verify(False))
        report.remade = sum(self._is_remade(row) for row in rows if _ok(row))
        command = [sys.executable, "-m", "jobs", "manifest", "verify", "--clean", "--yes", self.store.uri]
        subprocess.run(command, check=False, capture_output=True)
        report.problems_after_cleaning = len(self.manifest.verify())
        report.outputs = _outputs(rows)

    def _is_remade(self, row: dict[str, Any]) -> bool:
        """Whether a row's output is newer than its record."""
        record = self.store.uri_of(f"manifest/{row['row_id']}.parquet")
        written, recorded = (open_fs(uri)[0].info(uri)["LastModified"] for uri in (row["output_uri"], record))
        return written > recorded


def _move(source: Store, target: Store) -> None:
    """Move all objects; records come last, as a run writes them, so that none is older than its output."""
    for key in sorted(source.list(), key=lambda key: key.startswith("manifest/")):
        with suppress(StoreMissingError):  # the run removes files too
            target.put(key, source.read(key))
            source.delete(key)


def _ok(row: dict[str, Any]) -> bool:
    return row["status"] == "ok"


def _outputs(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["row_id"]: row["output_sha256"] for row in rows if _ok(row)}


def _children(parents: set[int], title: bytes) -> list[int]:
    """Return the processes whose parent is one of these and whose title begins so, in order."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):  # no process, or one that has just ended
            pid = int(folder.name)
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in parents and (folder / "cmdline").read_bytes().startswith(title):
                found.append(pid)
    return sorted(found)
