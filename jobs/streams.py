"""Standard output and standard error that cannot end a job."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def prepare() -> None:
    """Make the standard streams safe to write to, whatever started this process.

    A terminal that has no letter for a character gets its escape. Streams that were closed are opened on nothing:
    their numbers would otherwise go to the next files that are opened, and native code writes its messages there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = _outliving(sys.stderr)  # messages are for people, and nothing depends on them


def set_aside_no_width() -> None:
    """Take COLUMNS=0, which editors and schedulers set where they know none, for no width: nothing would be shown."""
    if os.environ.get("COLUMNS", "").strip("0 ") == "":
        os.environ.pop("COLUMNS", None)


_UNWRITABLE = frozenset({errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


def is_of_output(error: BaseException) -> bool:
    """Return whether an error says that standard output cannot be written to: it is of writing, and of no file."""
    return isinstance(error, OSError) and error.errno in _UNWRITABLE and error.filename is None


@contextmanager
def ending_with_output() -> Iterator[None]:
    """End the command, for the length of a `with` block, when standard output cannot be written to.

    Without a word when nobody reads it any more (`| head`); 1 is the exit status.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if not is_of_output(error):
            raise
        with open(os.devnull, "wb") as nothing:  # what is left is written when Python ends
            os.dup2(nothing.fileno(), 1)
        if error.errno != errno.EPIPE:
            print(f"error: standard output cannot be written to: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


@contextmanager
def outlived() -> Iterator[None]:
    """Go on when standard output or error can no longer be written to, for the length of a `with` block.

    A reader that ended (`| head`), a terminal that was closed and a full disk stop the output, not the work.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_outliving(stream) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = streams


def _outliving(stream: TextIO) -> TextIO:
    """Return the same stream, written by `_Outliving`. A stream without a file, or none at all, is left as it is."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Outliving(number)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )


def is_lost(stream: Any) -> bool:
    """Return whether an outliving stream has gone on without what it was written to."""
    return getattr(getattr(getattr(stream, "buffer", None), "raw", None), "lost", False)


class _Outliving(io.FileIO):
    """Writes to a file descriptor and, from the first error on, to nothing."""

    def __init__(self, number: int):
        super().__init__(number, "w", closefd=False)
        self.lost = False

    def write(self, data: Any, /) -> int:
        """Write a part of the data, and return how much."""
        try:
            while (written := super().write(data)) is None:  # somebody made it non-blocking, and it is full
                select.select([], [self], [])
        except OSError as error:
            self.lost = True
            with open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), self.fileno())
            if self.fileno() == 1:
                print(f"standard output cannot be written to ({error.strerror}): going on without it", file=sys.stderr)
            return len(data)
        return written
