"""What a report consists of; the Markdown and the page are both made from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ....show.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Sentence(NamedTuple):
    """to : the key of the table or figure that it is from"""

    text: str
    to: str = ""


class Shown(NamedTuple):
    """A table; key : its name in links and on the page"""

    key: str
    table: Table


class Drawn(NamedTuple):
    """A figure, about the table with the key `of`.

    paper : it is drawn for white paper, and doesn't follow a reader's dark mode
    """

    key: str
    title: str
    caption: str
    figure: Figure
    of: str = ""
    paper: bool = False


class Section(NamedTuple):
    """links : (text, relative path) of files; note : how to read it"""

    title: str
    sentences: list[Sentence]
    tables: list[Shown] = []  # never changed
    figures: list[Drawn] = []
    links: list[tuple[str, str]] = []
    note: str = ""


class Report(NamedTuple):
    title: str
    sections: list[Section]

    def names(self) -> dict[str, str]:
        """{key: "Table 3"}, in the order in which they are shown."""
        tables = (shown.key for section in self.sections for shown in section.tables)
        figures = (drawn.key for section in self.sections for drawn in section.figures)
        kinds = {"Table": tables, "Figure": figures}
        return {
            key: f"{kind} {number}"
            for kind, keys in kinds.items()
            for number, key in enumerate(keys, 1)
        }

    def partners(self) -> dict[str, str]:
        """{key of a table or figure: that of the one which shows the same}."""
        found: dict[str, str] = {}
        for drawn in self.drawn():
            if drawn.of:
                found[drawn.key] = drawn.of
                found.setdefault(drawn.of, drawn.key)
        there = self.names()
        return {key: other for key, other in found.items() if key in there and other in there}

    def drawn(self) -> Iterator[Drawn]:
        """All figures."""
        for section in self.sections:
            yield from section.figures


def plain_table(
    title: str, note: str, head: list[str], rows: list[list[str]], words: int = 1
) -> Table:
    """A Table without groups of columns, the first `words` of which are of words."""
    return Table(title, note, [("", name) for name in head], rows, tuple(head[:words]))
