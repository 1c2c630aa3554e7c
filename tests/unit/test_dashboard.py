"""Facts about the dashboard: its queries parse, and ask for what is told, under labels that are there."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import promql_parser as promql
import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import GPU_TAG_KEYS, METRICS_GAUGES

from jobs.spec import PRESETS
from pipeline.telemetry import METRICS

DASHBOARD = PRESETS.parent / "infra/grafana/ditflow.json"
POD_MONITOR = PRESETS.parent / "infra/prometheus/podmonitor.yaml"
RAYS_LABELS = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}  # of every metric of a process
SCRAPERS_LABELS = {"instance"}
VARIABLES = {"$__range": "6h", "$job_name": "nightly"}

ours = {series: metric for metric in METRICS for series in metric.series}


def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text())


def panels(board: dict) -> list[dict]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(board: dict) -> list[str]:
    return [target["expr"] for panel in panels(board) for target in panel["targets"]]


@dataclass
class Asked:
    """What a query asks for: each series with the labels that are named on it, and the functions on its way."""

    series: str
    labels: set[str] = field(default_factory=set)
    functions: tuple[str, ...] = ()


def asked(query: str) -> list[Asked]:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, f"a variable that the dashboard does not have: {query}"
    return list(selectors(promql.parse(query)))


def selectors(node: promql.Expr, labels: frozenset = frozenset(), functions: tuple[str, ...] = ()) -> Iterator[Asked]:
    """Every selector of an expression, with the labels by which it is grouped and matched."""
    if isinstance(node, promql.MatrixSelector):
        node = node.vector_selector
    if isinstance(node, promql.VectorSelector):
        yield Asked(node.name, {*labels, *(matcher.name for matcher in node.matchers.matchers)}, functions)
    elif isinstance(node, promql.AggregateExpr):
        grouped = node.modifier.labels if node.modifier else []
        yield from selectors(node.expr, labels | set(grouped), functions)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from selectors(argument, labels, (*functions, node.func.name))
    elif isinstance(node, promql.BinaryExpr):
        yield from selectors(node.lhs, labels, functions)
        yield from selectors(node.rhs, labels, functions)
    elif not isinstance(node, promql.NumberLiteral | promql.StringLiteral):
        yield from selectors(node.expr, labels, functions)


def problems(board: dict) -> list[str]:
    """What a query asks for that is not told."""
    return [problem for query in queries(board) for one in asked(query) for problem in wrong_with(one)]


def wrong_with(one: Asked) -> list[str]:
    rays = METRICS_GAUGES.get(one.series.removeprefix("ray_")) if one.series.startswith("ray_node_gpu") else None
    metric = ours.get(one.series)
    if metric is None and rays is None:
        return [f"{one.series} is no metric"]
    known = set(GPU_TAG_KEYS) if metric is None else {*metric.labels, *RAYS_LABELS}
    known |= SCRAPERS_LABELS | ({"le"} if one.series.endswith("_bucket") else set())
    found = [f"{one.series} has no label {label}" for label in sorted(one.labels - known)]
    if metric is not None and metric.kind == "gauge" and {"rate", "increase", "irate"} & set(one.functions):
        found.append(f"{one.series} is a gauge: it has no rate")
    if "histogram_quantile" in one.functions and "le" not in one.labels:
        found.append(f"{one.series}: quantiles need le")
    if one.series.endswith("_sum"):
        found.append(f"{one.series} is made of the middles of buckets: take the counter")
    return found


def test_every_query_parses_and_asks_for_what_is_told():
    assert problems(dashboard()) == []


def test_every_metric_is_shown():
    shown = {one.series for query in queries(dashboard()) for one in asked(query)}
    assert [metric.name for metric in METRICS if not shown & set(metric.series)] == []


def test_every_query_of_ours_looks_at_the_chosen_jobs_only():
    for query in queries(dashboard()):
        for one in asked(query):
            assert "job_name" in one.labels or one.series not in ours, query


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("ray_ditflow_rows_total{", "ray_ditflow_rows{", "ray_ditflow_rows is no metric"),
        ("ray_ditflow_rows_in_flight{", "ditflow_rows_in_flight{", "ditflow_rows_in_flight is no metric"),
        ("by (error_kind)", "by (error_class)", "has no label error_class"),
        ('status!="ok"', 'state!="ok"', "has no label state"),
        ("by (le, phase)", "by (phase)", "quantiles need le"),
        ("ray_node_gpus_utilization", "ray_node_gpu_utilization", "ray_node_gpu_utilization is no metric"),
        ("sum(ray_ditflow_rows_left{", "sum(rate(ray_ditflow_rows_left{", None),
    ],
)
def test_a_mistake_in_a_query_is_seen(right, wrong, says):
    text = DASHBOARD.read_text()
    changed = json.loads(text.replace(json.dumps(right)[1:-1], json.dumps(wrong)[1:-1]))
    assert changed != json.loads(text), "nothing was changed"
    if says is None:
        with pytest.raises(ValueError, match="parenthesis"):
            problems(changed)
    else:
        assert any(says in problem for problem in problems(changed))


def test_data_source_and_job_are_chosen_in_the_dashboard_and_named_by_no_panel():
    board = dashboard()
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    [wanted] = re.findall(r"label_values\((\w+), (\w+)\)", variables["job_name"]["query"]["query"])
    assert wanted[0] in ours and wanted[1] in ours[wanted[0]].labels
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for part in [*panels(board), variables["job_name"], *(t for panel in panels(board) for t in panel["targets"])]:
        assert part["datasource"] == chosen


def test_labels_in_legends_are_those_that_the_query_leaves():
    for panel in panels(dashboard()):
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert named <= set.union(*(one.labels for one in asked(target["expr"]))), panel["title"]


def test_panels_have_a_title_and_an_explanation_and_do_not_overlap():
    board, taken = dashboard(), set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert panel["title"] and (panel["type"] == "row" or panel["description"])
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_pod_monitor_asks_at_the_port_that_the_operator_names():
    monitor = yaml.safe_load(POD_MONITOR.read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    assert monitor["spec"]["selector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
