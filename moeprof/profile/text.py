"""A profile, and a comparison, as plain text of at most 100 columns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..files import printable
from ..show.console import MOST_COLUMNS, fill, printed, width
from ..show.tables import rich_table
from .findings import findings, heading
from .tables import tables

if TYPE_CHECKING:
    from ..show.tables import Table
    from .types import Profiled


class Compared(Protocol):
    """What the text of a ProfileComparison is made of."""

    def findings(self) -> list[str]: ...

    def table(self) -> Table: ...


def as_text(profile: Profiled) -> str:
    """What was profiled, the findings, the tables."""
    lines = [fill(f"{what}: {text}", rest="  ") for what, text in heading(profile)]
    lines += ["", *(fill(f"- {line}", rest="  ") for line in findings(profile))]
    for table in tables(profile):
        lines += ["", *_of_table(table)]
    return printable("\n".join(lines) + "\n")


def table_as_text(table: Table) -> str:
    """Title, note and rows."""
    return printable("\n".join(_of_table(table)) + "\n")


def comparison_as_text(comparison: Compared) -> str:
    """The findings and the table of a ProfileComparison."""
    lines = [fill(f"- {line}", rest="  ") for line in comparison.findings()]
    table = comparison.table()
    if table.rows:
        lines += ["", *_of_table(table)]
    return printable("\n".join(lines) + "\n")


def _of_table(table: Table) -> tuple[str, str, str]:
    return table.title, fill(table.note, rest="  "), in_lines(table)


def in_lines(table: Table) -> str:
    """A Table by rich, the groups' names above it, without trailing blanks.

    Where the screen is too narrow for it, its groups stand one below the other.
    """
    groups = dict.fromkeys(group for group, _ in table.columns if group)
    lines = _in_lines(table, MOST_COLUMNS)
    if len(groups) > 1 and max(map(len, lines)) > width():
        lines = [line for group in groups for line in _in_lines(_of_group(table, group), width())]
    elif max(map(len, lines)) > width():
        lines = _in_lines(table, width())
    return "\n".join(lines)


def _of_group(table: Table, group: str) -> Table:
    """The columns that belong to no group, and those of this one."""
    kept = [i for i, (of, _) in enumerate(table.columns) if of in ("", group)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return table._replace(columns=[table.columns[i] for i in kept], rows=rows)


def _in_lines(table: Table, columns: int) -> list[str]:
    # The box itself has a blank between columns: enough for many narrow ones.
    apart = 1 if len(table.columns) < 12 else 0
    made = rich_table([name for _, name in table.columns], table.rows, table.words, apart)
    lines = [line for line in printed([made], columns).split("\n") if line]
    return [*_groups(table.columns, lines[0]), *lines]


def _groups(columns: Sequence[tuple[str, str]], head: str) -> list[str]:
    """A line with each group's name, and a rule, above its columns' heads; the names alone where
    heads are broken over lines."""
    ends = [match.end() for match in re.finditer(r"\S+", head)]  # heads are aligned right
    groups = dict.fromkeys(group for group, _ in columns if group)
    if len(ends) < len(columns):
        return [f"── {group}" for group in groups]
    line = ""
    for group in groups:
        places = [i for i, (of, _) in enumerate(columns) if of == group]
        start = ends[places[0] - 1] + 2
        line = line.ljust(start) + f"── {group} ".ljust(ends[places[-1]] - start, "─")
    return [line] if line else []
