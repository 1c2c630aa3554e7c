"""Facts about the lines that wait for the driver."""

import pipeline.relay
from pipeline.relay import Lines, forward


def test_lines_are_kept_in_order_until_they_are_known_to_be_shown():
    lines = Lines()
    for line in "abc":
        lines.add(line)
    assert lines.since(0) == (0, ["a", "b", "c"])
    assert lines.since(0) == (0, ["a", "b", "c"]), "an answer that was lost is given again"
    assert lines.since(2) == (2, ["c"])
    assert lines.since(1) == (2, ["c"]), "a question that comes late changes nothing"
    assert lines.since(3) == (3, [])
    lines.add("d")
    assert lines.since(3) == (3, ["d"])


def test_a_driver_that_is_away_costs_the_oldest_lines_and_no_memory(monkeypatch):
    monkeypatch.setattr(pipeline.relay, "_MOST_LINES", 2)
    lines = Lines()
    for line in "abcd":
        lines.add(line)
    assert lines.since(0) == (2, ["c", "d"])
    assert lines.since(4) == (4, [])


def test_a_line_goes_nowhere_without_ray():
    forward("a line")
