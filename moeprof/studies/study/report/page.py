"""A report as one HTML page that asks for nothing: figures are inside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING

from ....files import printable
from ....show.page import document, figure_block, table_block

if TYPE_CHECKING:
    from .content import Drawn, Report, Section, Shown


# Links to tables and figures are quieter than what is said; names keep together on a phone.
STYLE = """
h3 { font-size: 1.05rem; margin-top: 1.8rem; }
.to { color: var(--faint); font-weight: normal; font-size: .85em; white-space: nowrap; }
.to::before { content: "→ "; }
@media screen and (max-width: 50rem) { .word { min-width: 8rem; } }
@media print { h3 { break-after: avoid; } .to { font-size: 1em; } }
"""


def as_page(report: Report, step: Callable[[], object] = lambda: None) -> str:
    """Links lead to the parts' files by relative paths: the page is read in the study's folder.

    step : called after each figure
    """
    names, partners = report.names(), report.partners()
    parts = [
        (section.title, _section(section, names, partners, step)) for section in report.sections
    ]
    return printable(document(report.title, "", parts, STYLE))


def _section(
    section: Section,
    names: Mapping[str, str],
    partners: Mapping[str, str],
    step: Callable[[], object],
) -> str:
    lines = "".join(
        f"<li>{_text(sentence.text)}{_link(names, sentence.to)}</li>"
        for sentence in section.sentences
    )
    parts = [f"<ul>{lines}</ul>"]
    if section.note:
        parts.append(f'<p class="note">{_text(section.note)}</p>')
    if section.links:
        files = ", ".join(
            f'<a href="{escape(path)}">{escape(text)}</a>' for text, path in section.links
        )
        parts.append(f'<p class="note">Files: {files}</p>')
    for drawn in section.figures:
        parts.append(_figure(drawn, names, partners))
        step()
    parts += [_table(shown, names, partners) for shown in section.tables]
    return "\n".join(parts)


def _figure(drawn: Drawn, names: Mapping[str, str], partners: Mapping[str, str]) -> str:
    head = _head(drawn.key, drawn.title, names, partners)
    return head + figure_block(drawn.figure, drawn.title, drawn.caption, paper=drawn.paper)


def _table(shown: Shown, names: Mapping[str, str], partners: Mapping[str, str]) -> str:
    table = shown.table._replace(note=shown.table.note.replace("`", ""))
    return _head(shown.key, table.title, names, partners) + table_block(table)


def _head(key: str, title: str, names: Mapping[str, str], partners: Mapping[str, str]) -> str:
    link = _link(names, partners.get(key, ""))
    return f'<h3 id="{key}">{names[key]}. {escape(title)}{link}</h3>\n'


def _link(names: Mapping[str, str], key: str) -> str:
    return f' <a class="to" href="#{key}">{names[key]}</a>' if key in names else ""


def _text(text: str) -> str:
    """Escaped; what stands in backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
