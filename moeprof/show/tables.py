"""Tables of results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .console import width

if TYPE_CHECKING:
    from rich.table import Table as RichTable


class Table(NamedTuple):
    """columns: (group, name), a group's columns beside each other; rows: lists of texts.

    words: the columns of words, which are aligned left; the others are of numbers.
    """

    title: str
    note: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]
    words: tuple[str, ...] = ()


def table(columns: Mapping[str, str], rows: Iterable[Sequence[Any]]) -> RichTable:
    """A rich table: columns {header: format}, rows of values, None for an empty cell."""
    from rich import box
    from rich.table import Table as RichTable

    made = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for header, form in columns.items():
        made.add_column(header, justify="left" if form == "{}" else "right")
    for row in rows:
        cells = zip(columns.values(), row, strict=True)
        made.add_row(*("" if value is None else form.format(value) for form, value in cells))
    return made


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> RichTable:
    """A rich table of texts, the first column aligned left, for a screen of `width()` columns.

    Where it is wider, intervals stand below what they are of, and columns closer together.
    """
    from rich.cells import cell_len

    rows = list(rows)
    widest = [max(map(cell_len, column)) for column in zip(head, *rows, strict=True)]
    wide = sum(widest) + 2 * len(head) > width()
    if wide:
        rows = [[re.sub(r" (?=[\[(][-+]?\d)", "\n", cell) for cell in row] for row in rows]
    made = table(dict.fromkeys(head, "{:>}") | {head[0]: "{}"}, rows)
    for column in made.columns:
        column.overflow = "fold"
    if wide:
        made.padding = (0, 0, 0, 0)
    return made


def milliseconds(times: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    """A contender's median, None where it took no part."""
    return times[name]["median_ms"] if name in times else None


def fine(*values: float, form: str = "+.4f") -> str:
    """`form` with as many more places as the largest of the values needs to have two digits, and
    in powers of ten where these are more than 7: a format for all of them. 0 is "0"."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=math.inf)
    sign, places = form[:-1].split(".")
    if math.isinf(largest):
        return form
    if largest == 0:
        return f"{sign}.0f"
    needed = max(int(places), 1 - math.floor(math.log10(largest)))
    return f"{sign}.{needed}f" if needed <= 7 else f"{sign}.1e"


def with_interval(estimate: float, low: float, high: float, form: str, apart: str = " ") -> str:
    """ "0.61 [0.58, 0.64]"; the estimate alone where an end is NaN, "–" where it is NaN itself."""
    if math.isnan(estimate):
        return "–"
    if math.isnan(low) or math.isnan(high):
        return format(estimate, form)
    return f"{estimate:{form}}{apart}[{low:{form}}, {high:{form}}]"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown. left : so many columns are aligned left, the others right"""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return "\n".join([_row(head), rule, *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
