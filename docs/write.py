"""Writes what the pages have from the code: the commands' options, the names of the reference.

`python docs/write.py` does it anew; a test compares the pages with what it would write. What it
writes stands between two comments, `<!-- made by docs/write.py -->` and `<!-- end -->`.
"""

import argparse
import inspect
import pydoc
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = [DOCS / "command_line.md", *sorted((DOCS / "api").glob("*.md"))]
MADE = re.compile(r"(?<=<!-- made by docs/write\.py -->\n).*(?=<!-- end -->)", re.DOTALL)


def written(page: Path) -> str:
    """The page's text as the code has it now."""
    text = page.read_text(encoding="utf-8")
    made = commands() if page.name == "command_line.md" else reference(text)
    return MADE.sub(lambda _: f"\n{made}\n\n", text, count=1)


# ---- the reference ----


def reference(text: str) -> str:
    """A table of the names of a page of the reference, each with what its docstring says first."""
    names = re.findall(r"^::: (\S+)$", text, re.M)
    rows = [f"| `{name}` | {_first_sentence(name)} |" for name in names]
    more = (
        f"`help({names[0]})` in Python, and this page as `mkdocs serve` makes it "
        '(`pip install -e ".[docs]"`), have the parameters and examples.'
    )
    return "\n".join(["| name | what it is |", "|---|---|", *rows, "", more])


def _first_sentence(name: str) -> str:
    paragraph = inspect.getdoc(pydoc.locate(name)).split("\n\n")[0]
    plain = re.sub(r":\w+:`([^`]+)`|``([^`]+)``", r"`\1\2`", " ".join(paragraph.split()))
    return plain.replace("|", "\\|").replace("<", "&lt;")


# ---- the command line ----


def commands() -> str:
    """Markdown: a section with a table of options for each command of `moeprof`."""
    from moeprof import cli

    return "\n".join(_sections(cli._parser(), "")).strip()


def _sections(parser, summary):
    """The lines of one command, and of the commands below it."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if summary:
        text = parser.description or f"{summary[0].upper()}{summary[1:]}."
        yield from (f"## {parser.prog}", "", text, "")
        if rows := [_row(parser, action) for action in _options(parser)]:
            yield from ("| option | meaning |", "|---|---|", *rows, "")
    for action in below:
        summaries = {choice.dest: choice.help for choice in action._choices_actions}
        for name, command in action.choices.items():
            yield from _sections(command, summaries.get(name) or command.description or name)


def _options(parser):
    """And what stands without an option: FILE of `moeprof store`."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
    return [a for a in actions if a.dest not in ("help", "version")]


def _row(parser, action):
    value = "" if action.nargs == 0 else parser._get_formatter()._format_args(action, _name(action))
    said = parser._get_formatter()._expand_help(action) if action.help else ""
    needed = " **needed**" if action.required else ""
    option = " ".join(filter(None, [", ".join(action.option_strings), value]))
    cells = f"`{option}`{needed}", said.replace("{", "&#123;").replace("<", "&lt;")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _name(action):
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


if __name__ == "__main__":
    for one in PAGES:
        one.write_text(written(one), encoding="utf-8")
