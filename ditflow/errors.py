"""The base of every error that a caller may want to tell apart."""

from __future__ import annotations

import copyreg
from typing import Any, ClassVar


class DitflowError(Exception):
    """An error with a stable code, and the key of the setting that it is about, where there is one.

    code: the class's own, or a more specific one given at the raise; kebab-case, and never changed once released.
    key: dotted, as in the job spec (`method.learning_rate`).
    The message says what came, what was expected, the likely cause and what to do.
    """

    default_code: ClassVar[str]

    def __init__(self, message: str, *, code: str | None = None, key: str | None = None):
        super().__init__(message)
        self.code = code or self.default_code
        self.key = key

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without calling `__init__`, whose arguments a subclass may change."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class SettingsError(DitflowError, ValueError):
    """A setting has a value that it cannot have; `key` names it."""

    default_code = "invalid-setting"
    key: str

    def __init__(self, key: str, came: object, expected: str, code: str | None = None):
        super().__init__(f"{key}: {came!r} is not valid: expected {expected}", code=code, key=key)
        self.came, self.expected = came, expected

    def below(self, section: str) -> SettingsError:
        """Return the error with its key in a section of the settings."""
        return SettingsError(f"{section}.{self.key}", self.came, self.expected, self.code)
