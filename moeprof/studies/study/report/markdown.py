"""A report in Markdown; figures are files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ....files import printable
from ....show.tables import markdown

if TYPE_CHECKING:
    from ....show.tables import Table
    from .content import Drawn, Report, Section


def as_markdown(report: Report, figures: Mapping[str, str]) -> str:
    """figures : {key of a figure: relative path of its file}"""
    names, partners = report.names(), report.partners()
    parts = [f"# {report.title}"]
    for section in report.sections:
        parts += _section(section, names, partners, figures)
    return printable("\n\n".join(part for part in parts if part) + "\n")


def _section(
    section: Section,
    names: Mapping[str, str],
    partners: Mapping[str, str],
    figures: Mapping[str, str],
) -> Iterator[str]:
    yield f"## {section.title}"
    yield "\n".join(
        f"- {sentence.text}{_link(names, sentence.to)}" for sentence in section.sentences
    )
    yield section.note
    if section.links:
        yield "Files: " + ", ".join(f"[{text}]({path})" for text, path in section.links)
    for drawn in section.figures:
        yield _figure(drawn, names, figures[drawn.key]) + _link(names, partners.get(drawn.key, ""))
    for shown in section.tables:
        yield f'<a id="{shown.key}"></a>\n\n### {names[shown.key]}. {shown.table.title}'
        yield f"{shown.table.note}{_link(names, partners.get(shown.key, ''))}".strip()
        yield _table(shown.table)


def _figure(drawn: Drawn, names: Mapping[str, str], path: str) -> str:
    text = f"{names[drawn.key]}. {drawn.title}."
    return f'<a id="{drawn.key}"></a>\n\n![{text}]({path})\n\n*{text}* {drawn.caption}'.rstrip()


def _link(names: Mapping[str, str], key: str) -> str:
    return f" ([{names[key]}](#{key}))" if key in names else ""


def _table(table: Table) -> str:
    head = [f"{group} {name}".strip() for group, name in table.columns]
    left = 1
    while left < len(table.columns) and table.columns[left][1] in table.words:
        left += 1
    return markdown(head, table.rows, left)
