"""An HTML page that needs nothing but itself: its style, its contents, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from .pictures import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tables import Table


SHEET, LETTER, BETWEEN = 527, 4.8, 6.8  # points of A4's width, of a letter, between columns
WORDS = 9 * 7.5  # points that a column of words takes at least; it breaks what is longer

# Light and dark by the reader's setting, on paper light. On a narrow screen tables and figures
# scroll inside their boxes, and say so; on paper nothing scrolls, so that nothing is cut off there.
# A shadow at the foot of a box says that its table goes on; at the table's end it is covered.
# A caption is as wide as its table (100%): where the box (100cqw) is narrower it gets the height of
# a line, else none.
STYLE = """
:root { color-scheme: light dark; --ground: #fff; --line: #8884; --soft: #8882; --faint: #666; }
@media screen and (prefers-color-scheme: dark) { :root { --ground: #121212; --faint: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  background: var(--ground); color: CanvasText; }
h1 { font-size: 1.6rem; margin-bottom: .4rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h1, .note, li { overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
nav ul { columns: 14rem; padding-left: 1.2rem; }
a { color: inherit; text-decoration-color: var(--faint); text-underline-offset: .2em; }
.note { color: var(--faint); }
.table { overflow: auto; max-height: 40rem; margin-bottom: 1rem; container-type: inline-size;
  background: linear-gradient(var(--ground) 0 0) bottom / 100% 2rem no-repeat local,
    linear-gradient(#0000, var(--line)) bottom / 100% 1.5rem no-repeat; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; } td { border-top: 1px solid var(--soft); }
thead { position: sticky; top: 0; background: var(--ground); }
thead tr:first-child th.group { text-align: center; border-bottom: 1px solid var(--line); }
.word { text-align: left; white-space: pre-wrap; } .first { padding-left: 1.8rem; }
figure { margin: 1.5rem 0; } figcaption { color: var(--faint); }
.picture::before, caption::before { color: var(--faint); font-size: .85rem; position: sticky;
  left: 0; content: "Wider than the screen: scroll to the side."; }
caption { height: 0; padding-bottom: clamp(0px, (100% - 100cqw) * 99, 1.5rem); overflow: hidden;
  text-align: left; white-space: nowrap; }
.picture { overflow-x: auto; } .picture::before { display: none; }
.picture img { width: var(--width); max-width: 100%; height: auto; display: block; }
@media screen and (prefers-color-scheme: dark) {
  .paper { background: #fff; --faint: #666; padding: .8rem; border-radius: .5rem;
    margin-bottom: .6rem; }
}
.glossary { grid-template-columns: minmax(8rem, max-content) 1fr; font-size: .9rem; }
.glossary dt { overflow-wrap: anywhere; } .unit { color: var(--faint); }
@media screen and (max-width: 50rem) {
  dl, .glossary { display: block; } dd { margin-bottom: .4rem; }
}
@media screen and (max-width: 33rem) {
  .table { max-height: none; } th, td { padding: .2rem .4rem; } th { white-space: normal; }
  .picture img { max-width: none; min-width: calc(.85 * var(--width)); }
  .picture::before { display: block; }
}
@media print {
  :root { color-scheme: light; }
  @page { margin: 12mm; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  .table, .picture { overflow: visible; max-height: none; background: none; }
  caption { display: none; }
  table { font-size: 7.5pt; line-height: 1.25; }
  th, td { padding: .1rem .28rem; white-space: normal; }
  .word { overflow-wrap: anywhere; min-width: 9em; }
  .first { padding-left: .8rem; }
  .glossary { display: block; font-size: 8.5pt; } .glossary dd { margin: 0 0 .3rem 1rem; }
  thead { display: table-header-group; position: static; }
  tr, figure, dd, .note { break-inside: avoid; } h1, h2, .note, dt { break-after: avoid; }
  .note + .table { break-before: avoid; }
  .picture img { max-height: 21cm; width: auto; }
}
"""


def document(title: str, top: str, parts: Iterable[tuple[str, str]], style: str = "") -> str:
    """A whole HTML document with a list of its contents.

    top : HTML below the title; parts : (heading, HTML) each; style : rules besides STYLE
    """
    places = [(f"part-{number}", *part) for number, part in enumerate(parts, 1)]
    contents = "".join(f'<li><a href="#{at}">{escape(of)}</a></li>' for at, of, _ in places)
    body = [
        f"<h1>{escape(title)}</h1>",
        top,
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
        *(f'<h2 id="{at}">{escape(of)}</h2>\n{text}' for at, of, text in places),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def figure_block(figure: Figure, title: str, caption: str = "", *, paper: bool = False) -> str:
    """paper : as `picture` has it"""
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = picture(figure, f"{title}. {caption}".strip(), paper=paper)
    return f"<figure>{image}{said}</figure>"


def table_block(table: Table, links: Mapping[str, str] | None = None) -> str:
    """The note and the table, in several where a sheet of paper is too narrow for it.

    links : as in `html_table`
    """
    parts = "\n".join(html_table(part, links) for part in divided(table))
    return f'<p class="note">{escape(table.note)}</p>\n{parts}'


def divided(table: Table) -> list[Table]:
    """Tables that a sheet of paper holds; groups stay together.

    Each begins with the columns that are of no group, or with the first one.
    """
    widths = [_width(table, i) for i in range(len(table.columns))]
    if sum(widths) <= SHEET:
        return [table]
    groups = [group for group, _ in table.columns]
    keys = [i for i, group in enumerate(groups) if not group] if any(groups) else [0]
    room = SHEET - sum(widths[i] for i in keys)
    blocks: list[list[int]] = [[]]
    for _, group in groupby((i for i in range(len(groups)) if i not in keys), groups.__getitem__):
        of = list(group)
        if groups[of[0]] and sum(widths[i] for i in blocks[-1] + of) > room and blocks[-1]:
            blocks.append([])
        for i in of:
            if sum(widths[j] for j in [*blocks[-1], i]) > room and blocks[-1]:
                blocks.append([])
            blocks[-1].append(i)
    return [_columns(table, keys + block) for block in blocks]


def _width(table: Table, column: int) -> float:
    """Points that a column needs on paper at least, where letters are small."""
    name = table.columns[column][1]
    if name in table.words:
        return WORDS + BETWEEN
    whole = [part for row in table.rows for part in _unbroken(row[column]).split(" ")]
    return LETTER * max(map(len, [*name.split(" "), *whole])) + BETWEEN


def _columns(table: Table, places: list[int]) -> Table:
    pick = [table.columns[i] for i in places]
    return table._replace(columns=pick, rows=[[row[i] for i in places] for row in table.rows])


def html_table(table: Table, links: Mapping[str, str] | None = None) -> str:
    """A Table; its groups, if it has any, in a row of their own.

    links : {name of a column in a group: the id on this page that its heading leads to}
    """
    heads = []
    if any(group for group, _ in table.columns):
        cells = [
            f"<th{f' class=group colspan={len(list(of))}' if group else ''}>{escape(group)}</th>"
            for group, of in groupby(table.columns, key=lambda column: column[0])
        ]
        heads.append("".join(cells))
    kinds = _kinds(table)
    names = [_head(name, (links or {}) if group else {}) for group, name in table.columns]
    heads.append(_cells("th", names, kinds))
    head = "".join(f"<tr>{cells}</tr>" for cells in heads)
    words = [name in table.words for _, name in table.columns]
    lines = (_cells("td", map(_cell, row, words), kinds) for row in table.rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="table"><table><caption></caption><thead>{head}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(text: str, of_words: bool) -> str:
    """ "%" stays with its number."""
    return escape(text.replace(" %", "\u00a0%") if of_words else _unbroken(text))


def _unbroken(number: str) -> str:
    """Its only break is before the bracket of its interval."""
    return re.sub(r" (?![(\[])", "\u00a0", number)


def _head(name: str, links: Mapping[str, str]) -> str:
    return f'<a href="#{links[name]}">{escape(name)}</a>' if name in links else escape(name)


def _kinds(table: Table) -> list[str]:
    """The class of each column: of words, or the first of a group."""
    before = ["", *(group for group, _ in table.columns)]
    return [
        "word" if name in table.words else "first" if group != last else ""
        for (group, name), last in zip(table.columns, before, strict=False)
    ]


def _cells(tag: str, parts: Iterable[str], kinds: Iterable[str]) -> str:
    """Cells of HTML that is escaped already."""
    return "".join(
        f"<{tag}{f' class={kind}' if kind else ''}>{part}</{tag}>"
        for part, kind in zip(parts, kinds, strict=True)
    )
