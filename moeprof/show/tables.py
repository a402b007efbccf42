"""Tables of results."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from .console import width

if TYPE_CHECKING:
    from rich.table import Table as RichTable


RIGHT = "{:>}"  # the format of a column of texts that are aligned right, as numbers are


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
    words = [name for name, form in columns.items() if form == "{}"]
    texts = [
        ["" if v is None else form.format(v) for form, v in zip(columns.values(), row, strict=True)]
        for row in rows
    ]
    return text_table(list(columns), texts, words)


def text_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str] | None = None
) -> RichTable:
    """A rich table of texts for a screen of `width()` columns.

    words : the columns of words, aligned left; None for the first one

    Where it is wider, intervals stand below what they are of, and columns closer together.
    """
    rows = list(rows)
    wide = sum(map(_widest, zip(head, *rows, strict=True))) + 2 * len(head) > width()
    if wide:
        rows = [[re.sub(r" (?=[\[(][-+]?\d)", "\n", cell) for cell in row] for row in rows]
    return rich_table(head, rows, head[:1] if words is None else words, 0 if wide else 1)


def _widest(column: Iterable[str]) -> int:
    from rich.cells import cell_len

    return max(cell_len(line) for cell in column for line in cell.split("\n"))


def rich_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], words: Collection[str], apart: int
) -> RichTable:
    """The same as it is; apart: blanks between columns, besides the one that the box has."""
    from rich import box
    from rich.table import Table as RichTable

    made = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, apart, 0, 0))
    for name in head:
        made.add_column(name, justify="left" if name in words else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def notebook_table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """A table of texts in HTML, for a notebook, which gives it its style."""
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "".join(_html_row("td", row) for row in rows)
    return f"<table>{title}{_html_row('th', head)}{body}</table>"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def milliseconds(times: Mapping[str, Mapping[str, float]], name: str) -> float | None:
    """A contender's median, None where it took no part."""
    return times[name]["median_ms"] if name in times else None


def fine(*values: float, form: str = "+.4f") -> str:
    """`form` with as many more places as the largest of the values needs to have two digits, and
    in powers of ten where these are more than 7: a format for all of them. 0 is "+0"."""
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
    """One line, whatever is in a cell."""
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
