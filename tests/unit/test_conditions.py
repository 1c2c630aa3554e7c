"""Facts about conditions on a table: what they choose, and that they can do nothing else."""

import pyarrow as pa
import pytest

from pipeline.conditions import ConditionError, rows_sorted, rows_where

TABLE = pa.table({
    "id": ["a", "b", "c"],
    "loss": [0.1, None, 0.3],
    "tags": [["walk"], [], ["run", "walk"]],
    "created": pa.array([1, 2, 3], pa.timestamp("us", "UTC")),
})  # fmt: skip


def chosen(condition: str) -> list[str]:
    return rows_where(TABLE, condition, "where")["id"].to_pylist()


@pytest.mark.parametrize(
    ("condition", "ids"),
    [
        ("loss > 0.2", ["c"]),
        ("loss > 0.05 AND list_contains(tags, 'walk')", ["a", "c"]),
        ("loss IS NULL OR id = 'a'", ["a", "b"]),
        ("id IN ('c', 'a')", ["a", "c"]),
        ("id LIKE 'b%' -- a remark", ["b"]),
        ("len(tags) = 2", ["c"]),
        ("created < '2026-01-01' AND created < now() - INTERVAL 1 DAY", ["a", "b", "c"]),
        ("loss::INT = 0 AND abs(loss - 0.1) < 0.01", ["a"]),
        ("tags && ['run'] OR 'walk' IN tags AND id NOT ILIKE 'C'", ["a", "c"]),
        ("false", []),
    ],
)
def test_a_condition_chooses_the_rows_for_which_it_is_true_in_their_order(condition, ids):
    assert chosen(condition) == ids


@pytest.mark.parametrize(
    "condition",
    [
        "1=1) OR (2=2",
        "true) UNION (SELECT 1",
        "true) LIMIT (1",
        "true; DROP TABLE rows",
        "true; SELECT true",
        "true;",
        "true FROM rows",
        "true, false",
        "true AS chosen",
        "DISTINCT true",
        "loss > 0 ORDER BY 1",
        "true /*",
        "SELECT true",
        "ATTACH '/tmp/other.db'",
        "SET threads = 2",
        "COPY rows TO '/tmp/rows.csv'",
        "INSTALL httpfs",
        "",
        "*",
        "COLUMNS(*) IS NOT NULL",
        "loss",
        "count(*) > 1",
        "row_number() OVER () > 1",
        "loss > 'abc'",
        "id = ?",
        "(" * 500,
    ],
)
def test_what_is_not_one_expression_that_is_true_or_false_is_refused_in_one_line(condition):
    with pytest.raises(ConditionError, match="^where: .*is not valid: .*Expected one SQL expression over") as caught:
        chosen(condition)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "condition",
    [
        "id IN (SELECT content FROM read_text('{file}'))",
        "id = (SELECT content FROM '{file}')",
        "EXISTS (FROM read_csv('{file}'))",
        "EXISTS (SELECT 1 FROM duckdb_settings())",
        "(WITH x AS (SELECT true AS y) SELECT y FROM x)",
        "id IN (SELECT id FROM rows)",
    ],
)
def test_a_condition_has_no_query_and_reads_no_file(tmp_path, condition):
    file = tmp_path / "secret.csv"
    file.write_text("a")
    with pytest.raises(ConditionError, match="it has a query of its own"):
        chosen(condition.format(file=file))


def test_the_database_itself_reads_no_file_and_unlocks_nothing(tmp_path, monkeypatch):
    """What would happen if the check of the expression let a query through."""
    monkeypatch.setattr("pipeline.conditions._check_expression", lambda *_: None)
    file = tmp_path / "secret.csv"
    file.write_text("a")
    refused = {
        f"id IN (SELECT content FROM read_text('{file}'))": "disabled by configuration",
        f"EXISTS (FROM '{file}')": "disabled by configuration",
        "EXISTS (FROM numbered)": "numbered does not exist",  # a variable of who asks the database
    }
    for condition, said in refused.items():
        with pytest.raises(ConditionError, match=said):
            chosen(condition)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def test_an_unknown_column_is_answered_with_the_valid_ones():
    with pytest.raises(ConditionError, match='"los".*not found.*Expected .* the columns id, loss, tags, created$'):
        chosen("los > 1")


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("len(range(10000000000)) > 1", "it calls range, expected signs and the functions list_contains"),
        ("system.main.repeat('x', 10000000000) = 'x'", "it calls repeat"),
        ("[x FOR x IN tags IF x = 'walk'] = ['walk']", "it calls list_"),
        ("NULL::INT[100000][100000] IS NULL", "it has a type made of others"),
        ("id = '" + 4_000 * "x" + "'", "it has 4007 characters, expected at most 4000"),
        ("NOT " * 900 + "true", "maximum recursion depth"),
    ],
)
def test_what_could_take_all_memory_or_time_is_refused_unread(condition, said):
    with pytest.raises(ConditionError, match=said):
        chosen(condition)


@pytest.mark.parametrize(("column", "ids"), [("loss", "acb"), ("-loss", "cab"), ("-id", "cba"), ("created", "abc")])
def test_rows_are_sorted_by_a_column_and_those_without_a_value_come_last(column, ids):
    assert "".join(rows_sorted(TABLE, column, "--sort")["id"].to_pylist()) == ids


@pytest.mark.parametrize("column", ["los", "tags", "", "--loss"])
def test_an_order_that_is_none_is_answered_with_the_valid_ones(column):
    with pytest.raises(ConditionError, match="^--sort: .* is not valid: expected one of id, loss, created, with a '-'"):
        rows_sorted(TABLE, column, "--sort")
