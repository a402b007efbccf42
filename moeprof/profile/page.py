"""A profile as a page that needs nothing but itself, and as what a notebook shows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from html import escape
from typing import TYPE_CHECKING, NamedTuple

from ..show.page import document, figure_block, html_table, table_block
from ..show.pictures import png
from .findings import findings, heading
from .glossary import HEADINGS, INTRODUCTION, METRICS
from .plots import instead
from .tables import layers, tables
from .wording import PLAIN

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from ..show.tables import Table
    from .types import Profiled


# {figure: (heading, caption)}, in the order of the page.
FIGURES = {
    "load": (
        "Load of the experts",
        "Each expert's selections over those of an even choice: red does more than its part, "
        "blue less, a crossed one nothing.",
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
        "Experts that a kind of text selects more often than the other kinds do (red), or less "
        "often (blue).",
    ),
}
ANCHOR = "metric-"  # before a metric's name, the place of its entry in the glossary
_LINKS = {heading_: f"{ANCHOR}{metric}" for heading_, metric in HEADINGS.items()}

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
    """More to show on the page: a table, what it is of, and a matplotlib Figure or None."""

    table: Table
    frame: pandas.DataFrame
    figure: Figure | None = None


def page(
    profile: Profiled,
    sections: Iterable[Section] = (),
    drawn: Callable[[], None] = lambda: None,
) -> str:
    """A whole HTML document: findings, tables, figures, a glossary. No script, no request.

    drawn: called after each of the profile's figures, which take a second or two
    """
    title = f"Profile of {profile.facts.get('model') or PLAIN}"
    body = [
        ("Findings", _list(profile)),
        *((table.title, _table(table)) for table in tables(profile)),
        *_figures(profile, drawn),
        *((section.table.title, _more(section)) for section in sections),
        *([("Glossary", _glossary())] if profile.phases else []),
    ]
    return document(title, _heading(profile), body)


def _figures(profile: Profiled, drawn: Callable[[], None]) -> Iterator[tuple[str, str]]:
    """(heading, HTML) of each figure, or of the sentence that stands in its place."""
    sentences = instead(profile)
    for name in profile.figures:
        heading_, caption = FIGURES[name]
        if name in sentences:
            yield heading_, f"<p>{escape(sentences[name])}</p>"
        else:
            yield heading_, figure_block(profile.plot(name), heading_, caption)
        drawn()


def _more(section: Section) -> str:
    html = _table(section.table)
    if section.figure is None:
        return html
    return html + figure_block(section.figure, section.table.title)


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
    when = f"<dt>Made</dt><dd>{escape(_in_words(started))}</dd>" if started else ""
    return f"<dl>{lines}{when}</dl>"


def _in_words(time: str) -> str:
    """ "30 November 2026, 03:24 UTC" of a time in ISO 8601; what else a file holds, as it is."""
    try:
        made = datetime.fromisoformat(time)
    except (TypeError, ValueError):
        return str(time)
    return f"{made.day} {made:%B %Y, %H:%M %Z}".rstrip()


def _list(profile: Profiled) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in findings(profile)) + "</ul>"


def _table(table: Table) -> str:
    return table_block(table, _LINKS)
