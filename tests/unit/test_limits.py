"""Facts about when a run stops because of the rows that fail."""

import pytest

from pipeline.faults import JobStoppedError, Policy, TooManyFailuresError
from pipeline.job import Job, Output
from pipeline.run import _check_goes_on, _Limits
from pipeline.stages.attempt import shown, stopped
from pipeline.store import StoreError


def limits(planned: int = 1000, **policy) -> _Limits:
    return _Limits(Job("synthesize", "test", Output("/nowhere"), faults=Policy(**policy)), planned)


def ended(number: int, status: str = "failed", blamed: str | None = None) -> dict:
    return shown({"row_id": f"row-{number}", "status": status, "error_message": "no luck"}, blamed)


def test_so_many_failures_in_a_row_stop_the_run_and_one_less_does_not():
    watched = limits(max_failures_in_a_row=5)
    for number in range(4):
        watched.check(ended(number))
    watched.check(ended(4, "ok"))
    for number in range(5, 9):
        watched.check(ended(number))
    with pytest.raises(TooManyFailuresError, match="5 rows failed one after the other.*no luck"):
        watched.check(ended(9, "quarantined"))


def test_the_rows_of_one_bad_reference_count_once():
    watched = limits(max_failures_in_a_row=2)
    for number in range(50):
        watched.check(ended(number, blamed="motion-1"))
    with pytest.raises(TooManyFailuresError):
        watched.check(ended(50, blamed="motion-2"))


def test_more_failures_in_all_than_the_fraction_allows_stop_the_run():
    watched = limits(planned=10, max_failed_fraction=0.2)
    watched.check(ended(0))
    watched.check(ended(1, "ok"))
    watched.check(ended(2))
    with pytest.raises(TooManyFailuresError, match="3 of 10 rows failed"):
        watched.check(ended(3))


def test_a_row_that_nobody_is_to_blame_for_stops_the_run_with_its_message():
    _check_goes_on(ended(0))
    with pytest.raises(JobStoppedError, match="the model folder is gone"):
        _check_goes_on(stopped("row-1", StoreError("the model folder is gone")))
