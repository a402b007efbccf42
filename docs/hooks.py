"""What MkDocs adds to the pages when it builds them: the command line, and a figure.

docs/command_line.md holds the comment `<!-- commands -->`. In its place come the options of
every command, taken from the parsers themselves, so that the page can't say anything else.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ["moeprof/demo/comparison/comparison.png"]
PLACE = "<!-- commands -->"


def on_files(files, config):
    """Figures that lie elsewhere in the repository are parts of the site, too."""
    from mkdocs.structure.files import File

    for path in FIGURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, config, files):
    for path in FIGURES:
        markdown = markdown.replace(f"../{path}", path)
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def commands() -> str:
    """Markdown: a section with a table of options for each command of `moeprof`."""
    from moeprof import cli

    return "\n".join(_sections(cli._parser(), ""))


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
