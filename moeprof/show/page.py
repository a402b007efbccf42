"""An HTML page that needs nothing but itself: its style, its contents, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from .pictures import picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tables import Table


MOST_COLUMNS = 18  # of a table on a sheet of paper

# Light and dark by the reader's setting, on paper light. On a narrow screen tables and figures
# scroll inside their boxes, and say so; on paper nothing scrolls, so that nothing is cut off there.
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
.table { overflow: auto; max-height: 40rem; margin-bottom: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap; }
th { font-weight: 600; } td { border-top: 1px solid var(--soft); }
thead { position: sticky; top: 0; background: var(--ground); }
thead tr:first-child th.group { text-align: center; border-bottom: 1px solid var(--line); }
.word { text-align: left; white-space: normal; } .first { padding-left: 1.8rem; }
figure { margin: 1.5rem 0; } figcaption { color: var(--faint); }
.picture { overflow-x: auto; }
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
  .picture img { max-width: none; min-width: calc(.85 * var(--width)); }
  .picture::before { content: "Wider than the screen: scroll to the side."; color: var(--faint);
    display: block; position: sticky; left: 0; font-size: .85rem; }
}
@media print {
  :root { color-scheme: light; }
  @page { margin: 12mm; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  .table, .picture { overflow: visible; max-height: none; }
  table { font-size: 7.5pt; line-height: 1.25; }
  th, td { padding: .1rem .28rem; white-space: normal; overflow-wrap: anywhere; }
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
    """The note and the table, in several of at most MOST_COLUMNS where it has more.

    links : as in `html_table`
    """
    parts = "\n".join(html_table(part, links) for part in divided(table))
    return f'<p class="note">{escape(table.note)}</p>\n{parts}'


def divided(table: Table, most: int = MOST_COLUMNS) -> list[Table]:
    """Tables of at most `most` columns, which a sheet of paper holds; groups stay together.

    Each begins with the columns that are of no group, or with the first one.
    """
    if len(table.columns) <= most:
        return [table]
    groups = [group for group, _ in table.columns]
    keys = [i for i, group in enumerate(groups) if not group] if any(groups) else [0]
    room = max(most - len(keys), 1)
    blocks: list[list[int]] = [[]]
    for _, group in groupby((i for i in range(len(groups)) if i not in keys), groups.__getitem__):
        of = list(group)
        if len(blocks[-1]) + len(of) > room and blocks[-1] and groups[of[0]]:
            blocks.append([])
        for i in of:
            if len(blocks[-1]) == room:
                blocks.append([])
            blocks[-1].append(i)
    return [_columns(table, keys + block) for block in blocks]


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
    body = "\n".join(f"<tr>{_cells('td', map(escape, row), kinds)}</tr>" for row in table.rows)
    return f'<div class="table"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


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
