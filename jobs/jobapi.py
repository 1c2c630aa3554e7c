"""A job on a Ray cluster that runs, by Ray's job API.

The job runs on the cluster: whoever follows it may go, and come back with its id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from jobs.shipping import SPEC_FILE, LaunchError, pack
from pipeline.store import redact
from pipeline.waits import waiting

SECONDS_BETWEEN_LOOKS = 2.0
_PATIENCE_S = 300.0
_STOPPED = 1
_LOG_LOST = "The end of its log could not be read."


def submit(client: Any, job: Path, overrides: Sequence[str]) -> str:
    """Start a job on a client's cluster; return its id.

    The spec is sent along; all that it names, the cluster has to reach. Raises SpecError and LaunchError.
    """
    shipment = pack(job, overrides, shared=["/"], gpus=False)
    with TemporaryDirectory() as folder:
        (Path(folder) / SPEC_FILE).write_text(shipment.text, encoding="utf-8")
        try:
            return client.submit_job(
                entrypoint=f"ditflow run {SPEC_FILE}",
                runtime_env={"working_dir": folder},
                metadata={"job": shipment.job.name},
            )
        except (RuntimeError, OSError) as error:
            raise LaunchError(f"the cluster did not take the job: {error}") from error


def connect(address: str | None) -> Any:
    """Return a client of the job API at http://head:8265. Raises ValueError and LaunchError."""
    if address is None or not address.startswith(("http://", "https://")):
        raise ValueError(
            f"--address: {address!r} is not valid: expected the address of Ray's dashboard, such as http://head:8265, "
            "there or in RAY_ADDRESS (that of `ditflow run` has another port, and no http://)"
        )
    try:
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise LaunchError(f"Ray's job API is not installed ({error}): pip install 'ditflow[cluster]'") from error
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        with waiting(lambda: redact(f"the cluster at {address} to answer")):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise LaunchError(
            f"{address}: the cluster asks for a token, and did not get its own: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise LaunchError(
            f"{address}: there is no Ray cluster that answers: {error}. Start one (ray up infra/aws/cluster.yaml), "
            "and make its dashboard reachable (ray dashboard)"
        ) from error


def follow(client: Any, job_id: str, show: Callable[[str], None], say: Callable[[str], None]) -> int:
    """Show a job's log from its beginning until it ends; return its exit status.

    A connection that breaks is made again, and what was shown is not shown twice. Raises LaunchError when the cluster
    does not answer for minutes, and for an id that it does not know.
    """
    log, silent_since, ended_at = _Log(show), None, None
    while True:
        try:
            info = client.get_job_info(job_id)
        except (RuntimeError, OSError) as error:
            if "does not exist" in str(error):
                raise LaunchError(f"the cluster knows no job {job_id}: {error}".strip()) from error
            if silent_since is not None and time.monotonic() - silent_since > _PATIENCE_S:
                raise LaunchError(f"the cluster has not answered for {_PATIENCE_S:.0f} s: {error}") from error
            silent_since = silent_since or time.monotonic()
        else:
            silent_since = None
            whole = asyncio.run(log.read(client, job_id))
            if info.status.is_terminal():
                ended_at = ended_at or time.monotonic()
                if whole or time.monotonic() - ended_at > _PATIENCE_S:
                    return _exit_status(info, job_id, say if whole else lambda text: say(f"{text} {_LOG_LOST}"))
        time.sleep(SECONDS_BETWEEN_LOOKS)


class _Log:
    """What a job writes, shown once, however often it is read from its beginning."""

    def __init__(self, show: Callable[[str], None]):
        self._show, self._shown = show, 0

    async def read(self, client: Any, job_id: str) -> bool:
        """Show what is new until the job has ended; return whether it did so before the connection broke."""
        seen = 0
        try:
            async for piece in client.tail_job_logs(job_id):
                new = piece[max(0, self._shown - seen) :]
                seen += len(piece)
                if new:
                    self._show(new)
                    self._shown = seen
        except (RuntimeError, OSError, aiohttp.ClientError):
            return False
        return True


def _exit_status(info: Any, job_id: str, say: Callable[[str], None]) -> int:
    """Return that of `ditflow run` on the cluster, or that of an error if it has none."""
    message = (info.message or "").split(", last available logs")[0]  # which were shown
    say(f"{job_id}: {info.status.value}. {message}".rstrip())
    if info.status.value == "SUCCEEDED":
        return 0
    return info.driver_exit_code or _STOPPED
