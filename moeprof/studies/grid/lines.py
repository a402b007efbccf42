"""A TOML file, and on which of its lines something stands."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...texts.documents import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What may end the lines before a value that is still open: nothing, an array, a text.
ENDS = ("", "\n]", "\n]]", '\n"""', "\n'''")


class Lines(NamedTuple):
    """The text of a file, and the path that errors name."""

    path: str
    text: str

    @classmethod
    def read(cls, path: str) -> tuple[Lines, dict[str, Any]]:
        """(Lines, what stands there); ValueError with the line for what is no TOML."""
        lines = cls(path, read_text(path, "grid"))
        try:
            return lines, tomllib.loads(lines.text)
        except tomllib.TOMLDecodeError as error:
            reason, _, at = str(error).partition(" (at ")
            found = re.match(r"line (\d+)", at)
            line = int(found[1]) if found else lines.text.rstrip().count("\n") + 1
            raise ValueError(f"{path}:{line}: no TOML: {reason}") from None

    def place(self, keys: Sequence[str | int]) -> str:
        """ "grid.toml:12", where the value under these keys and places in lists stands."""
        return f"{self.path}:{self._line(tuple(keys))}"

    def _line(self, keys: tuple[str | int, ...]) -> int:
        """The first line up to which the file has the value; that of the table without it.

        The parser says so itself: the lines up to there are parsed, with a value closed that is
        still open.
        """
        lines = self.text.split("\n")
        for number in range(1, len(lines) + 1):
            start = "\n".join(lines[:number])
            if any(_has(start + end, keys) for end in ENDS):
                return number
        return self._line(keys[:-1]) if keys else 1


def _has(text: str, keys: tuple[str | int, ...]) -> bool:
    try:
        value: Any = tomllib.loads(text)
        for key in keys:
            value = value[key]
    except (tomllib.TOMLDecodeError, LookupError, TypeError):
        return False
    return True
