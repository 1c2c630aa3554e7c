"""Facts about a job's log: what is asked for, what its lines hold, and what they never hold."""

import json
import logging
from dataclasses import replace

import pytest

from ditflow.errors import SettingsError
from ditflow.settings import MethodSettings, ModelDefaults
from pipeline import logs
from pipeline.faults import Policy
from pipeline.job import Job, Output
from pipeline.lease import Lease
from pipeline.logs import DEBUG, LogSettings, begin, chosen, event
from pipeline.run import sole_run
from pipeline.stages.attempt import Desk
from pipeline.store import Store, StoreError

LOST = ConnectionResetError("the connection was lost")


@pytest.fixture(autouse=True)
def _silent_afterwards():
    yield
    begin(None, "")


def written(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def desk_of(tmp_path, log: str, stage: str = "generate") -> Desk:
    faults = Policy(attempts=2, base_seconds=0, max_seconds=0)
    return Desk(Job("synthesize", "dogs", Output(str(tmp_path / "out")), faults=faults, log=log), stage)


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("text", "form", "level"),
    [("json", "json", logging.INFO), ("text:debug", "text", logging.DEBUG), ("json:error", "json", logging.ERROR)],
)
def test_a_format_and_a_level_are_asked_for_in_one_word(text, form, level):
    assert LogSettings.parse(text, "log") == LogSettings(form, level)


@pytest.mark.parametrize("text", [None, False, "", "off"])
def test_nothing_is_asked_for_by_default(text):
    assert not LogSettings.parse(text, "log").asked


@pytest.mark.parametrize("text", ["xml", "json:loud", "debug", "json:debug:x"])
def test_another_word_is_refused_with_what_is_valid(text):
    with pytest.raises(SettingsError, match="log: .* is not valid: expected json, text or off"):
        Job("synthesize", "dogs", Output("out"), log=text)


def test_the_environment_comes_before_the_spec_and_may_silence_it(monkeypatch):
    monkeypatch.delenv("DITFLOW_LOG", raising=False)
    assert chosen("json") == "json"
    monkeypatch.setenv("DITFLOW_LOG", "text:debug")
    assert chosen("json") == "text:debug"
    monkeypatch.setenv("DITFLOW_LOG", "off")
    assert chosen("json") == "off"


def test_a_wrong_variable_is_refused_by_its_name(monkeypatch):
    monkeypatch.setenv("DITFLOW_LOG", "yes")
    with pytest.raises(SettingsError, match="DITFLOW_LOG: 'yes'"):
        chosen(None)


# --------------------------------------------------------------------------------------------------------- lines


def test_a_line_of_json_has_time_level_event_job_node_process_and_its_facts(capsys):
    begin("json", "dogs")
    event("row_ended", row_id="a", loss_final=float("nan"), seconds={"total": 1.5}, message=None)
    (line,) = written(capsys)
    assert line["time"].endswith("+00:00")
    assert {key: line[key] for key in ("level", "event", "job", "row_id", "loss_final", "seconds")} == {
        "level": "info",
        "event": "row_ended",
        "job": "dogs",
        "row_id": "a",
        "loss_final": "nan",
        "seconds": {"total": 1.5},
    }
    assert "message" not in line
    assert line["pid"] > 0
    assert line["node"]


def test_a_line_of_text_is_for_people(capsys):
    begin("text", "dogs")
    event("row_ended", row_id="a", seconds={"total": 1.5}, message="two\nlines")
    (line,) = capsys.readouterr().err.splitlines()
    assert 'row_ended job="dogs"' in line
    assert line.endswith('row_id="a" seconds.total=1.5 message="two\\nlines"')


def test_nothing_is_written_before_a_log_is_begun_when_it_is_off_and_below_its_level(capsys):
    event("one")
    begin("off", "dogs")
    event("two")
    begin("json:warning", "dogs")
    event("three")
    assert capsys.readouterr().err == ""


def test_each_line_is_forwarded_once_also_when_the_log_is_begun_again(capsys):
    forwarded: list[str] = []
    for _ in range(3):
        begin("json", "dogs", forwarded.append)
    event("one")
    assert [json.loads(line) for line in forwarded] == written(capsys)
    assert len(forwarded) == 1


def test_a_line_that_cannot_be_written_fails_no_row(monkeypatch):
    def broken(line: str) -> None:
        raise OSError("no way")

    monkeypatch.setattr(logging, "raiseExceptions", False)
    begin("json", "dogs", broken)
    event("one")


SECRETS = {
    "in an address": ("s3://key:hunter2hunter2@bucket/a.mp4", "hunter2hunter2"),
    "in a signed address": ("https://b/a.mp4?X-Amz-Signature=0123456789abcdef", "0123456789abcdef"),
    "in a message with quotes": (
        'authorization: "Bearer abcdefgh12345" in {"secret": "abcdefgh12345"}',
        "abcdefgh12345",
    ),
    "of the environment": ("it said of-the-environment-9", "of-the-environment-9"),
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS)
@pytest.mark.parametrize("form", ["json", "text"])
def test_credentials_are_replaced_and_the_line_stays_whole(capsys, monkeypatch, text, secret, form):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-environment-9")
    begin(form, "dogs")
    event("attempt_failed", message=text, inner={"uri": text})
    (line,) = capsys.readouterr().err.splitlines()
    assert secret not in line
    assert line.count("***") >= 2
    if form == "json":
        assert json.loads(line)["event"] == "attempt_failed"


def test_a_spec_with_credentials_is_refused_without_showing_them(tmp_path, capsys):
    options = {"client_kwargs": {"aws_secret_access_key": "hunter2hunter2"}}
    job = Job("synthesize", "dogs", Output("s3://bucket/out"), storage_options=options, log="json:debug")
    with pytest.raises(StoreError) as refused, sole_run(job, print):
        pass
    assert "hunter2" not in str(refused.value) + capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- events


def test_a_failed_attempt_says_its_kind_and_whether_it_is_tried_again(tmp_path, capsys):
    def work() -> None:
        raise LOST

    desk_of(tmp_path, "json").attempt("0a", work, lambda _: None)
    told = [
        (line["event"], line["row_id"], line["attempt"], line["error_kind"], line["again"]) for line in written(capsys)
    ]
    assert told == [("attempt_failed", "0a", 1, "transient", True), ("attempt_failed", "0a", 2, "transient", False)]


def test_a_lowered_rung_is_told(tmp_path, capsys):
    from contextlib import nullcontext

    errors = iter([MemoryError("full")])

    def work() -> None:
        for error in errors:
            raise error

    desk_of(tmp_path, "json", "read").attempt("read-0a", work, lambda _: None, lighter=nullcontext)
    failed, lowered = written(capsys)
    assert (failed["event"], failed["motion_id"], failed["again"]) == ("attempt_failed", "0a", True)
    assert (lowered["event"], lowered["level"]) == ("rung_lowered", "warning")


def test_the_end_of_a_reference_is_told_with_its_fault(tmp_path, capsys):
    def work() -> None:
        raise ValueError("the clip is too short")

    desk = desk_of(tmp_path, "json:warning", "read")
    desk.tell_of_end("reference_read", "read-0a", desk.attempt("read-0a", work), 1.0)
    _, ended = written(capsys)
    assert {key: ended[key] for key in ("event", "motion_id", "status", "error_kind", "message")} == {
        "event": "reference_read",
        "motion_id": "0a",
        "status": "failed",
        "error_kind": "permanent",
        "message": "the clip is too short",
    }


def test_an_attempt_without_a_log_writes_nothing(tmp_path, capsys):
    desk_of(tmp_path, "off").attempt("0a", lambda: None)
    assert capsys.readouterr().err == ""


def test_a_lease_is_told_when_it_is_taken_given_back_and_lost(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.lease.signal.pthread_kill", lambda thread, number: None)
    begin("json", "dogs")
    lease = Lease(Store(str(tmp_path)))
    with lease:
        lease._lose("another run took this output over")
    told = [(line["event"], line.get("reason")) for line in written(capsys)]
    assert told == [
        ("lease_taken", None),
        ("lease_lost", "another run took this output over"),
        ("lease_given_back", None),
    ]


def test_prompts_are_for_debugging_alone():
    begin("json", "dogs")
    assert not logs.is_debug()
    begin(f"json:{logging.getLevelName(DEBUG).lower()}", "dogs")
    assert logs.is_debug()


def test_the_log_decides_no_row(tmp_path):
    method = MethodSettings().resolve(ModelDefaults(blocks=(1,)))
    job = Job("synthesize", "dogs", Output(str(tmp_path)), method=method)
    assert replace(job, log="json:debug").row_settings() == job.row_settings()
