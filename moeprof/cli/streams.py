"""Stdout and stderr of a command: whatever becomes of them, it runs on and writes its files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO


class Stream:
    """A stream that may end before the command does.

    error : what kept something from being written, if anything did; all after it is dropped
    """

    def __init__(self, stream: TextIO | None) -> None:
        # Python has None for a stream that was closed before it began.
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.error: OSError | None = None
        if isinstance(self._stream, TextIOWrapper):
            self._stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[..., object], *given: str) -> None:
        try:
            call(*given)
        except OSError as error:
            self.error = error
            # What the stream still holds would be tried again when Python ends.
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def streams() -> Iterator[Stream]:
    """`sys.stdout` and `sys.stderr` are Streams in here; yields the first."""
    found = sys.stdout, sys.stderr
    stdout, stderr = map(Stream, found)
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield stdout
    finally:
        sys.stdout, sys.stderr = found
