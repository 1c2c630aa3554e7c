"""Measurements and what they say of methods: storage, resume, intervals, paired differences, tables."""

import csv
import io
import json
from dataclasses import asdict
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from ditflow.errors import SettingsError
from ditflow.metrics import METRICS
from ditflow.metrics.base import MetricSettings
from jobs.display import print_comparison
from pipeline.comparison import ComparisonError, compare
from pipeline.manifest import Manifest, parquet_bytes
from pipeline.measurements import Figure, Measurements
from pipeline.store import Store, StoreDamagedError

SETTINGS = MetricSettings()
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def row_id(variant: str, number: int) -> str:
    return f"{variant}{number}".encode().hex().zfill(24)[-24:]


def spec(start: int = 0, **method) -> str:
    video = {"frames": 17, "height": 64, "width": 64, "start": start, "stride": 1, "fit": "crop"}
    return json.dumps({"method": method, "video": video})


def finish(store: Store, variant: str, number: int, **columns) -> str:
    """Record a finished video without making it."""
    name = row_id(variant, number)
    values = {
        "row_id": name,
        "status": "ok",
        "variant": variant,
        "method": "none" if variant == "plain" else "ditflow",
        "reference_sha256": f"{number:x}",
        "prompt": "a ball",
        "seed": 1,
        "model_revision": "r1",
        "spec_json": spec(),
        "output_uri": store.uri_of(f"videos/{name}.mp4"),
        "output_sha256": "0" * 64,
        "output_bytes": 1,
        "started_at": NOW,
        "finished_at": NOW,
    }
    Manifest(store).commit({**values, **columns})
    return name


def measure(store: Store, name: str, value: float | None, settings: MetricSettings = SETTINGS) -> None:
    reason = None if value is not None else "it does not move"
    figures = [Figure("motion_fidelity", "motion_fidelity", value, reason), Figure("warp_error", "warp_error", 2.0)]
    Measurements(store).write(name, settings, figures)


# ---- the metrics


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_found_by_its_own_name_and_names_its_settings(name):
    metric = METRICS[name]
    assert metric.name == name
    assert set(metric.needs) <= {"reference", "prompt"}
    assert set(metric.settings) <= set(MetricSettings.__dataclass_fields__)
    assert all(callable(getattr(metric, method)) for method in ("from_settings", "__call__"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"names": ("beauty",)}, "names"),
        ({"names": ()}, "names"),
        ({"tracker": "eye"}, "tracker"),
        ({"tracker": "cotracker3"}, "tracker_weights"),
        ({"tracker_weights": "w.pt"}, "tracker_weights"),
        ({"least_common": 1.5}, "least_common"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_key(change, key):
    with pytest.raises(SettingsError) as refused:
        MetricSettings(**change)
    assert refused.value.key == key


# ---- the measurements


def test_what_is_measured_is_not_measured_again(store):
    names = [finish(store, "flow", number) for number in range(3)]
    assert [task.metrics for task in Measurements(store).todo(SETTINGS)] == [("motion_fidelity", "warp_error")] * 3
    measure(store, names[1], 0.5)
    assert {task.row["row_id"] for task in Measurements(store).todo(SETTINGS)} == {names[0], names[2]}


def test_only_settings_that_matter_to_a_metric_have_it_measured_again(store):
    measure(store, finish(store, "flow", 0), 0.5)
    (task,) = Measurements(store).todo(MetricSettings(tracker="lucas-kanade"))
    assert task.metrics == ("motion_fidelity",)
    assert Measurements(store).todo(MetricSettings(clip="/elsewhere")) == []


def test_failed_rows_and_banks_are_not_measured(store):
    failed = {"error_kind": "permanent", "error_class": "E", "error_message": "no", "output_uri": None}
    finish(store, "flow", 0, status="failed", output_sha256=None, output_bytes=None, **failed)
    finish(store, "flow", 1, output_uri=store.uri_of(f"banks/{row_id('flow', 1)}.safetensors"))
    assert Measurements(store).todo(SETTINGS) == []


def test_measurements_of_other_settings_stand_beside_each_other(store):
    name = finish(store, "flow", 0)
    other = MetricSettings(tracker="lucas-kanade")
    measure(store, name, 0.5)
    measure(store, name, 0.7, other)
    assert Measurements(store).values(SETTINGS)[name]["motion_fidelity"] == 0.5
    assert Measurements(store).values(other)[name]["motion_fidelity"] == 0.7


# ---- the comparison


def test_means_and_paired_differences_in_closed_form(store):
    for number in range(4):
        measure(store, finish(store, "plain", number), 0.1 * number)
        measure(store, finish(store, "flow", number), 0.1 * number + 0.5)
    comparison = compare(store, SETTINGS)
    assert comparison.baseline == "plain"
    flow, plain = (comparison.at(name, "motion_fidelity") for name in ("flow", "plain"))
    assert (flow.interval.mean, plain.interval.mean) == (pytest.approx(0.65), pytest.approx(0.15))
    assert flow.difference.low == flow.difference.high == pytest.approx(0.5), "every pair gains the same"
    assert flow.interval.low < flow.interval.mean < flow.interval.high
    assert plain.difference is None


def test_differences_are_of_the_pairs_that_both_methods_made(store):
    for number, value in enumerate([0.0, 1.0]):
        measure(store, finish(store, "plain", number), value)
    for number, value in enumerate([0.2, None, 0.9]):
        measure(store, finish(store, "flow", number), value)
    flow = compare(store, SETTINGS).at("flow", "motion_fidelity")
    assert (flow.interval.count, flow.without) == (2, 1)
    assert (flow.difference.mean, flow.difference.count) == (pytest.approx(0.2), 1)


def test_classes_of_prompts_are_compared_apart_and_together(store):
    for number, category in enumerate(["scene", "caption", "scene", None]):
        measure(store, finish(store, "plain", number, category=category), 0.0)
        measure(store, finish(store, "flow", number, category=category), float(number))
    comparison = compare(store, SETTINGS)
    assert comparison.categories == [None, "caption", "scene"]
    flow = {c: comparison.at("flow", "motion_fidelity", c) for c in comparison.categories}
    assert {c: (entry.interval.mean, entry.interval.count) for c, entry in flow.items()} == {
        None: (1.5, 4),
        "caption": (1.0, 1),
        "scene": (1.0, 2),
    }
    assert flow["scene"].difference.mean == 1.0
    assert [line["category"] for line in csv.DictReader(io.StringIO(comparison.to_csv()))][:4] == [""] * 4
    assert r"\multicolumn{3}{l}{\emph{caption}}" in comparison.to_latex()


def test_a_pair_is_the_same_frames_of_a_reference(store):
    measure(store, finish(store, "plain", 0), 0.0)
    measure(store, finish(store, "flow", 0, spec_json=spec(start=5)), 1.0)
    assert compare(store, SETTINGS).at("flow", "motion_fidelity").difference is None


def test_rows_of_one_method_with_other_settings_stand_apart(store):
    later = NOW.replace(year=2027)
    measure(store, finish(store, "flow", 0, spec_json=spec(start=1, iterations=5, learn_with="x")), 0.2)
    measure(store, finish(store, "flow", 1, spec_json=spec(start=2, iterations=5, learn_with="y")), 0.4)
    measure(store, finish(store, "flow", 2, spec_json=spec(iterations=9), started_at=later), 0.9)
    measure(store, finish(store, "flow", 3, model_revision="r2", started_at=later), 0.8)
    comparison = compare(store, SETTINGS)
    means = {name: comparison.at(name, "motion_fidelity").interval.mean for name in comparison.variants}
    assert means == {"flow": pytest.approx(0.3), "flow (2)": 0.9, "flow (3)": 0.8}
    assert comparison.settings["flow (2)"]["method"] == {"iterations": 9}


def test_tables_hold_every_method_and_figure(store):
    for variant in ("plain", "flow_1"):
        measure(store, finish(store, variant, 0), 0.25)
    comparison = compare(store, SETTINGS)
    lines = list(csv.DictReader(io.StringIO(comparison.to_csv())))
    assert {(line["variant"], line["figure"]) for line in lines} == {
        (variant, figure) for variant in ("plain", "flow_1") for figure in ("motion_fidelity", "warp_error")
    }
    assert {line["mean"] for line in lines if line["figure"] == "motion_fidelity"} == {"0.25"}
    latex = comparison.to_latex()
    assert r"flow\_1 & 0.250" in latex
    assert latex.count(r"\\") == 3
    assert json.loads(json.dumps(comparison.to_dict()))["baseline"] == "plain"


def test_nothing_measured_and_an_unknown_baseline_are_refused(store):
    name = finish(store, "flow", 0)
    with pytest.raises(ComparisonError, match="no row is measured"):
        compare(store, SETTINGS)
    measure(store, name, 0.5)
    with pytest.raises(ComparisonError, match="'best' is none of the job's methods: flow"):
        compare(store, SETTINGS, baseline="best")


def test_rows_without_a_value_are_listed_by_method_metric_and_reason(store, capsys):
    for number in range(3):
        measure(store, finish(store, "plain", number), 0.5 if number == 0 else None)
    comparison = compare(store, SETTINGS)
    (why,) = comparison.unmeasured
    assert (why.variant, why.metric, why.reason, why.rows) == ("plain", "motion_fidelity", "it does not move", 2)
    assert comparison.to_dict()["unmeasured"] == [asdict(why)]
    print_comparison(comparison)
    assert "plain: 2 rows without motion_fidelity: it does not move" in capsys.readouterr().out


def test_a_comparison_without_any_value_says_so_and_why(store, capsys):
    settings = MetricSettings(names=("motion_fidelity",))
    name = finish(store, "plain", 0)
    nothing = Figure("motion_fidelity", "motion_fidelity", None, "the row has no reference")
    Measurements(store).write(name, settings, [nothing])
    print_comparison(compare(store, settings))
    assert capsys.readouterr().out.splitlines() == [
        "no row has a value of any figure",
        "plain: 1 rows without motion_fidelity: the row has no reference",
    ]


@pytest.mark.parametrize("data", [b"", b"PAR1 but no more", parquet_bytes(pa.table({"row_id": ["r"]}))])
def test_measurements_that_cannot_be_read_are_named_by_their_file(store, data):
    store.put("metrics/r-1.parquet", data)
    with pytest.raises(StoreDamagedError, match=r"metrics/r-1\.parquet \([0-9]+ bytes\) has no measurements"):
        Measurements(store).read()
