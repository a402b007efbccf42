"""A profile as a page that needs nothing but itself, and as what a notebook shows of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from .findings import findings, heading
from .glossary import HEADINGS, INTRODUCTION, METRICS
from .pictures import picture, png
from .plots import instead
from .tables import from_frame, layers, tables
from .wording import PLAIN

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from .tables import Table
    from .types import Profiled


# {figure: (heading, caption)}, in the order of the page.
FIGURES = {
    "load": (
        "Load of the experts",
        "Each expert's selections over those of an even choice: red does more than its part, "
        "blue less, grey nothing.",
    ),
    "k": (
        "Experts per token",
        "How many experts the tokens use, over all layers and by layer. A token whose slots "
        "were all skipped uses 0.",
    ),
    "confidence": (
        "Confidence of the router",
        "1 − H(p)/ln E of the router's softmax p, and the distance of its two largest values.",
    ),
    "latency": (
        "Time of a step",
        "The time of the layers' calls, router and experts; steps may differ in tokens.",
    ),
    "roofline": (
        "Roofline",
        "Under the slope the reading of weights limits, under the flat part the matrix "
        "products do. Both were measured on this machine.",
    ),
    "union": (
        "Distinct experts of a step",
        "All distinct experts of a step must be read once: what decoding with a batch costs.",
    ),
    "cache": (
        "Cache of experts",
        "Of the accesses to experts, step by step, the share that a cache of the most lately "
        "used experts of each layer would have served.",
    ),
    "coactivation": (
        "Experts selected together",
        "Of the tokens that select expert j, the share that selects i too.",
    ),
    "moves": (
        "From expert to expert",
        "Of the tokens of an expert, the share that goes to each expert of the MoE layer after it.",
    ),
    "domains": (
        "Domains",
        "Experts that a kind of text selects more than an even choice would (red) or less (blue).",
    ),
}
ANCHOR = "metric-"  # before a metric's name, the place of its entry in the glossary
MOST_COLUMNS = 18  # of a table on a sheet of paper

# Light and dark by the reader's setting, on paper light. On a narrow screen tables and figures
# scroll inside their boxes, and say so; on paper nothing scrolls, so that nothing is cut off there.
_STYLE = """
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

# In a notebook nothing but what is inside the div is touched, and its colours are inherited.
SCOPED = """
.moeprof-profile { max-width: 75rem; }
.moeprof-profile .table { overflow: auto; max-height: 24rem; }
.moeprof-profile table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  color: inherit; background: transparent; margin: 0; border: none; }
.moeprof-profile tr, .moeprof-profile td, .moeprof-profile th { background: transparent;
  color: inherit; text-align: right; padding: .15rem .5rem; border: none; }
.moeprof-profile td { border-top: 1px solid #8884; }
.moeprof-profile th.group { text-align: center; border-bottom: 1px solid #8886; }
.moeprof-profile .word { text-align: left; }
.moeprof-profile .first { padding-left: 1.6rem; }
.moeprof-profile .note { opacity: .75; }
.moeprof-profile img { max-width: 100%; height: auto; background: #fff; border-radius: 6px;
  margin-top: .8rem; }
"""


class Section(NamedTuple):
    """More to show on the page: a pandas table, and a matplotlib Figure or None."""

    title: str
    note: str
    frame: pandas.DataFrame
    figure: Figure | None = None


def page(profile: Profiled, sections: Iterable[Section] = ()) -> str:
    """A whole HTML document: findings, tables, figures, a glossary. No script, no request."""
    title = f"Profile of {profile.facts.get('model') or PLAIN}"
    body = [
        ("Findings", _list(profile)),
        *((table.title, _table(table)) for table in tables(profile)),
        *_figures(profile),
        *((section.title, _more(section)) for section in sections),
        *([("Glossary", _glossary())] if profile.phases else []),
    ]
    places = [(f"part-{number}", *part) for number, part in enumerate(body, 1)]
    contents = "".join(f'<li><a href="#{at}">{escape(of)}</a></li>' for at, of, _ in places)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _heading(profile),
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
        *(f'<h2 id="{at}">{escape(of)}</h2>\n{text}' for at, of, text in places),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _figures(profile: Profiled) -> Iterator[tuple[str, str]]:
    """(heading, HTML) of each figure, or of the sentence that stands in its place."""
    sentences = instead(profile)
    for name in profile.figures:
        heading_, caption = FIGURES[name]
        if name in sentences:
            yield heading_, f"<p>{escape(sentences[name])}</p>"
        else:
            yield heading_, _figure(profile.plot(name), heading_, caption)


def _figure(figure: Figure, title: str, caption: str = "") -> str:
    said = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{picture(figure, f'{title}. {caption}'.strip())}{said}</figure>"


def _more(section: Section) -> str:
    html = _table(from_frame(section.title, section.note, section.frame))
    return html if section.figure is None else html + _figure(section.figure, section.title)


def _glossary() -> str:
    """Every metric; the headings of the tables lead here."""
    short = {name: heading_ for heading_, name in HEADINGS.items()}
    rows = []
    for name, (unit, text) in METRICS.items():
        named = f"{name} ({short[name]})" if name in short else name
        rows.append(
            f'<dt id="{ANCHOR}{name}">{escape(named)}</dt>'
            f'<dd>{escape(text)} <span class="unit">[{escape(unit)}]</span></dd>'
        )
    return f'<p class="note">{escape(INTRODUCTION)}</p>\n<dl class="glossary">{"".join(rows)}</dl>'


def fragment(profile: Profiled) -> str:
    """For a notebook: findings, the layers, the load map."""
    model, router = (escape(str(profile.facts.get(name) or PLAIN)) for name in ("model", "router"))
    parts = [f"<p><b>Profile of {model}</b>, router: {router}</p>", _list(profile)]
    if profile.phases:
        parts += [html_table(layers(profile, [phase])) for phase in profile.phases]
    if "load" in profile.figures:
        parts.append(png(profile.plot("load"), 80, FIGURES["load"][1]))
    body = "\n".join(parts)
    return f'<div class="moeprof-profile"><style>{SCOPED}</style>\n{body}\n</div>'


def _heading(profile: Profiled) -> str:
    lines = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in heading(profile))
    started = (profile.facts.get("machine") or {}).get("started")
    when = f"<dt>Made</dt><dd>{escape(str(started))}</dd>" if started else ""
    return f"<dl>{lines}{when}</dl>"


def _list(profile: Profiled) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in findings(profile)) + "</ul>"


def _table(table: Table) -> str:
    """The note and the table, in several of at most MOST_COLUMNS where it has more."""
    parts = "\n".join(html_table(part, linked=True) for part in divided(table))
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


def html_table(table: Table, linked: bool = False) -> str:
    """A Table; its groups, if it has any, in a row of their own.

    linked : the headings lead to the page's glossary
    """
    heads = []
    if any(group for group, _ in table.columns):
        cells = [
            f"<th{f' class=group colspan={len(list(of))}' if group else ''}>{escape(group)}</th>"
            for group, of in groupby(table.columns, key=lambda column: column[0])
        ]
        heads.append("".join(cells))
    kinds = _kinds(table)
    names = [_head(name, linked and bool(group)) for group, name in table.columns]
    heads.append(_cells("th", names, kinds))
    head = "".join(f"<tr>{cells}</tr>" for cells in heads)
    body = "\n".join(f"<tr>{_cells('td', map(escape, row), kinds)}</tr>" for row in table.rows)
    return f'<div class="table"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'


def _head(name: str, linked: bool) -> str:
    of = HEADINGS.get(name) if linked else None
    return f'<a href="#{ANCHOR}{of}">{escape(name)}</a>' if of else escape(name)


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
