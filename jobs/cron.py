"""Schedules as Kubernetes takes them: five fields, or a name such as @daily."""

from __future__ import annotations

import re

from ditflow.errors import SettingsError

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_FIELDS: dict[str, tuple[int, int, list[str]]] = {
    "minute": (0, 59, []),
    "hour": (0, 23, []),
    "day of the month": (1, 31, []),
    "month": (1, 12, _MONTHS),
    "day of the week": (0, 6, _DAYS),
}
_NAMED = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_PART = re.compile(r"(?P<first>\*|\?|\w+)(-(?P<last>\w+))?(/(?P<step>[0-9]+))?")


def check_cron(schedule: str) -> None:
    """Raise SettingsError for a schedule that Kubernetes would refuse."""
    fields = schedule.split()
    if schedule in _NAMED:
        return
    if len(fields) != len(_FIELDS):
        expected = f"five fields ({', '.join(_FIELDS)}), such as '0 2 * * *' for two o'clock every night"
        raise SettingsError("--schedule", schedule, f"{expected}, or one of {', '.join(_NAMED)}")
    for text, (name, (least, most, words)) in zip(fields, _FIELDS.items(), strict=True):
        for part in text.split(","):
            if not _is_valid(part, least, most, words):
                names = f", or {words[0]} to {words[-1]}" if words else ""
                expected = f"for the {name} *, or numbers from {least} to {most}{names}, with ranges (1-5), steps (*/2)"
                raise SettingsError("--schedule", text, expected)


def _is_valid(part: str, least: int, most: int, words: list[str]) -> bool:
    found = _PART.fullmatch(part)
    if found is None or (found["step"] is not None and int(found["step"]) == 0):
        return False
    if found["first"] in ("*", "?"):
        return found["last"] is None
    first, last = (_number(text, words, least) for text in (found["first"], found["last"] or found["first"]))
    return first is not None and last is not None and least <= first <= last <= most


def _number(text: str, words: list[str], least: int) -> int | None:
    if text.lower() in words:
        return words.index(text.lower()) + least
    return int(text) if text.isascii() and text.isdigit() else None
