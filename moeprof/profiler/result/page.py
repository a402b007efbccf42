"""A profile as a page that needs nothing but itself, and as what a notebook shows of it."""

import base64
import io
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from .findings import findings, heading
from .tables import from_frame, layers, tables
from .wording import PLAIN

CAPTIONS = {
    "load": "Each expert's selections over those of an even choice: red does more than its part, "
    "blue less, grey nothing.",
    "k": "How many experts the tokens use, over all layers and by layer. A token whose slots were "
    "all skipped uses 0.",
    "confidence": "1 − H(p)/ln E of the router's softmax p, and the distance of its two largest "
    "values.",
    "latency": "The time of the layers' calls, router and experts; steps may differ in tokens.",
    "roofline": "Under the slope the reading of weights limits, under the flat part the matrix "
    "products do. Both were measured on this machine.",
    "union": "All distinct experts of a step must be read once: what decoding with a batch costs.",
    "cache": "Of the accesses to experts, step by step, the share that a cache of the most "
    "lately used experts of each layer would have served.",
    "coactivation": "Of the tokens that select expert j, the share that selects i too.",
    "moves": "Of the tokens of an expert, the share that goes to each expert of the MoE layer "
    "after it.",
    "domains": "Experts that a kind of text selects more than an even choice would (red) or less "
    "(blue).",
}

# Light and dark by the reader's setting; figures keep their white ground.
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --faint: #666; }
@media (prefers-color-scheme: dark) { :root { --faint: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.6rem; margin-bottom: .4rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.note { color: var(--faint); }
.table { overflow: auto; max-height: 40rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .6rem; text-align: right; }
th { font-weight: 600; } td { border-top: 1px solid var(--soft); }
thead tr:first-child th.group { text-align: center; border-bottom: 1px solid var(--line); }
.word { text-align: left; } .first { padding-left: 1.8rem; }
figure { margin: 1.5rem 0; } figcaption { color: var(--faint); }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
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
    frame: Any
    figure: Any = None


def page(profile, sections=()) -> str:
    """A whole HTML document: findings, tables, figures. No script, no request."""
    title = f"Profile of {profile.facts.get('model') or PLAIN}"
    parts = [f"<h1>{escape(title)}</h1>", _heading(profile), "<h2>Findings</h2>", _list(profile)]
    parts += [_section(table) for table in tables(profile)]
    for name in profile.figures:
        parts.append(f"<figure>{_image(profile, name, 110)}"
                     f"<figcaption>{escape(CAPTIONS[name])}</figcaption></figure>")  # fmt: skip
    for section in sections:
        parts.append(_section(from_frame(section.title, section.note, section.frame)))
        if section.figure is not None:
            parts.append(f"<figure>{_png(section.figure, 110, section.title)}</figure>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def fragment(profile) -> str:
    """For a notebook: findings, the layers, the load map."""
    model, router = (escape(str(profile.facts.get(name) or PLAIN)) for name in ("model", "router"))
    parts = [f"<p><b>Profile of {model}</b>, router: {router}</p>", _list(profile)]
    if profile.phases:
        parts.append(html_table(layers(profile)))
    if "load" in profile.figures:
        parts.append(_image(profile, "load", 80))
    body = "\n".join(parts)
    return f'<div class="moeprof-profile"><style>{SCOPED}</style>\n{body}\n</div>'


def _heading(profile):
    lines = "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in heading(profile))
    started = (profile.facts.get("machine") or {}).get("started")
    when = f"<dt>Made</dt><dd>{escape(str(started))}</dd>" if started else ""
    return f"<dl>{lines}{when}</dl>"


def _list(profile):
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in findings(profile)) + "</ul>"


def _section(table):
    title, note = escape(table.title), escape(table.note)
    return f'<h2>{title}</h2>\n<p class="note">{note}</p>\n{html_table(table)}'


def html_table(table) -> str:
    """A Table; its groups, if it has any, in a row of their own."""
    heads = []
    if any(group for group, _ in table.columns):
        cells = [
            f'<th{f" class=group colspan={len(list(of))}" if group else ""}>{escape(group)}</th>'
            for group, of in groupby(table.columns, key=lambda column: column[0])
        ]
        heads.append("".join(cells))
    kinds = _kinds(table)
    heads.append(_cells("th", (name for _, name in table.columns), kinds))
    head = "".join(f"<tr>{cells}</tr>" for cells in heads)
    body = "\n".join(f"<tr>{_cells('td', row, kinds)}</tr>" for row in table.rows)
    return (
        f'<div class="table"><table><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>'
    )


def _kinds(table):
    """The class of each column: of words, or the first of a group."""
    before = ["", *(group for group, _ in table.columns)]
    return [
        "word" if name in table.words else "first" if group != last else ""
        for (group, name), last in zip(table.columns, before, strict=False)
    ]


def _cells(tag, texts, kinds):
    return "".join(
        f"<{tag}{f' class={kind}' if kind else ''}>{escape(text)}</{tag}>"
        for text, kind in zip(texts, kinds, strict=True)
    )


def _image(profile, name, dpi):
    return _png(profile.plot(name), dpi, CAPTIONS[name])


def _png(figure, dpi, text):
    """The figure as a PNG inside the page."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{escape(text)}">'
