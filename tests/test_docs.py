"""Every block of code in README and docs runs, page by page, from top to bottom, or is looked at.

A comment above a block says where that isn't so:

    <!-- not yet: X -->         X does not exist yet, the block is skipped
    <!-- not run: the reason --> it is only looked at: Python has to compile, and what commands
                               name has to exist
    <!-- transformers 5 -->     it is skipped on 4.57
    <!-- slow -->               Python that takes more than ten seconds with its page
    <!-- the main command -->, <!-- the test command -->: README's, which install; looked at

The demo model stands in for a model of the hub. What would take minutes runs on fewer tokens, see
QUICK, FEWER and `in_folder`; all else is as on the page. A fifth of the shipped calibration text
does here, and pictures are not drawn.
"""

import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from matplotlib.figure import Figure
from models import V5

import moeprof
from moeprof import cli, demo
from moeprof.profile import page as profile_page
from moeprof.studies.budget import report
from moeprof.studies.comparison.speed import decode_speeds
from moeprof.studies.diagnosis.run import diagnose

if sys.version_info >= (3, 11):
    import tomllib
else:  # what pytest itself reads pyproject.toml with
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB = "allenai/OLMoE-1B-7B-0924"
QUICK = {
    "sweep": "--alphas 0.1 --max-k 8 --static 4,8 --tokens 256 --budget-tokens 256 "
    "--prompts prompts.txt",
    "profile": "--tokens 256 --continuations 1 --new-tokens 2",
    "diagnose": "--positions 2 --tokens 256",
    "evaluate": "--tokens 400 --budget-tokens 512",
    "compare": "--tokens 256 --budget-tokens 256 --tables reduction --budgets 4 --quantized 8",
}
FEWER = {
    "tokens=4096": "tokens=1024",  # routing.md
    "tokens=2048": "tokens=512",  # results.md, statistics.md, studies.md
    "positions=20": "positions=4",  # statistics.md
    "calibration_texts()[:16]": "calibration_texts()[:4]",  # routing.md
}
BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    text: str
    note: str  # of the comment above it

    @property
    def is_run(self) -> bool:
        """Or only looked at."""
        return not self.note.startswith("not run: ") and not self.note.endswith(" command")

    @property
    def missing(self) -> str:
        """What there is not, here and now, to run it."""
        if self.note.startswith("not yet: "):
            return f"{self.note.removeprefix('not yet: ')} does not exist yet"
        if self.note == "transformers 5" and not V5:
            return "it needs transformers 5"
        return ""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(page, line, match[2], match[3], match[1] or ""))
    return found


def of(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language and not block.missing]


def in_folder(folder: Path):
    """The working folder of what runs inside, with the files that the pages speak of."""
    text = "\n\n".join(document.text for document in demo.heldout_texts()[::32])
    (folder / "my_text.txt").write_text(text, encoding="utf-8")
    (folder / "more_text.txt").write_text(text[:-6000:-1], encoding="utf-8")
    (folder / "prompts.txt").write_text("simple\tThe list is\n", encoding="utf-8")
    patched = pytest.MonkeyPatch()
    patched.chdir(folder)
    fewer = demo.calibration_texts()[::5]  # a diagnosis fits a null to each domain of them
    patched.setattr(demo, "calibration_texts", lambda: fewer)
    heldout = demo.heldout_texts()[::4]  # one setting of the sweep reads all of them
    patched.setattr(demo, "heldout_texts", lambda: heldout)
    patched.setitem(decode_speeds.__kwdefaults__, "new_tokens", 2)
    patched.setitem(diagnose.__kwdefaults__, "draws", 200)
    patched.setitem(diagnose.__kwdefaults__, "budget_tokens", 1024)
    patched.setattr(report, "SENSITIVITY_TOKENS", 256)
    patched.setattr(Figure, "savefig", lambda *_, **__: None)
    patched.setattr(profile_page, "_figures", lambda *_: ())
    stack = contextlib.ExitStack()
    stack.callback(patched.undo)
    return stack


# ---- Python ----


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """page -> (its variables, what it printed) after all its Python has run; once a page."""

    @cache
    def run(page: Path) -> tuple[dict, str]:
        scope, printed = {"__name__": "__main__"}, io.StringIO()
        with in_folder(tmp_path_factory.mktemp("page")), contextlib.redirect_stdout(printed):
            for block in PYTHON[page]:
                text = block.text.replace(HUB, demo.PATH.as_posix())
                for written, here in FEWER.items():
                    text = text.replace(written, here)
                # Empty lines before it: a traceback then shows the line of the page.
                exec(compile("\n" * (block.line - 1) + text, page, "exec"), scope)
        return scope, printed.getvalue()

    return run


RUN_PYTHON = [block for block in of("python") if block.is_run]
PYTHON = {b.page: [c for c in RUN_PYTHON if c.page == b.page] for b in RUN_PYTHON}


# In a diagnosis of so few documents a bootstrap draw can leave out all of a domain: 0 / 0.
zero_by_zero = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in divide:RuntimeWarning"
)


def marks_of(page: Path) -> list:
    slow = any(block.note == "slow" for block in PYTHON[page])
    diagnoses = any(".diagnose(" in block.text for block in PYTHON[page])
    return [pytest.mark.slow] * slow + [zero_by_zero] * diagnoses


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem, marks=marks_of(p)) for p in PYTHON])
def test_the_python_of_a_page_runs(ran, page):
    scope, _ = ran(page)
    assert "moeprof" in scope  # each page imports what it uses, so that one can begin with any


def test_python_that_is_not_run_compiles():
    looked_at = [block for block in of("python") if not block.is_run]
    assert looked_at
    for block in looked_at:
        compile(block.text, str(block), "exec")


@pytest.mark.slow
def test_the_budget_of_the_page_is_met(ran):
    scope, printed = ran(ROOT / "docs" / "routing.md")
    shown = str(scope["router"].budget.heldout)
    average = float(shown.split()[0])
    assert shown in printed.splitlines()
    assert shown.startswith(f"{average:.4g} ± ") and 3.5 < average < 4.5
    assert scope["router"].budget.calibration.average_k == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("block", [b for b in blocks() if b.missing], ids=str)
def test_blocks_that_can_not_run_here(block):
    pytest.skip(block.missing)


# ---- shell ----


def commands(block: Block) -> list[list[str]]:
    """The words of each command, without settings of the environment before it."""
    lines = block.text.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [[w for w in line if not re.match(r"[A-Z_]+=", w)] for line in words if line]


def is_ours(words: list[str]) -> bool:
    return Path(words[0]).name == "moeprof"


CODES: dict[str, int] = {}


def ended(arguments: list[str]) -> int:
    """The exit code. A command that several blocks show, but for its folder, runs once."""
    options = vars(cli._parser().parse_args(arguments)) | {"out": None}
    same = repr(sorted(options.items()))
    if same not in CODES:
        CODES[same] = cli.main(arguments)
    return CODES[same]


RUN = [pytest.param(block, id=str(block)) for block in of("sh") if block.is_run]


@zero_by_zero
@pytest.mark.slow  # test_cli and test_profiler_cli run the commands on both versions
@pytest.mark.parametrize("block", RUN)
def test_the_commands_of_a_block_run(block, tmp_path, capsys):
    with in_folder(tmp_path):
        for words in commands(block):
            assert is_ours(words), f"{block}: {words[0]}: what is not run needs a comment and why"
            arguments = [demo.PATH.as_posix() if word == HUB else word for word in words[1:]]
            quick = shlex.split(QUICK.get(arguments[0], ""))
            code = ended(arguments + quick)
            assert code == 0, f"{block}: {capsys.readouterr().err}"


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_what_a_command_names_exists(block):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for words in commands(block):
        if is_ours(words):
            cli._parser().parse_args(words[1:])  # exits where an option is none
        for extra in re.findall(r"\[(\w+)\]", " ".join(words)):
            assert extra in project["optional-dependencies"]
        for word in words:
            if word.startswith(("tests/", "notebooks/", "docs/")):
                assert any(ROOT.glob(word)), f"{block}: {word}"  # may have a *


# ---- what the pages are made of ----


def test_files_in_toml_are_grids():
    files = [block for block in blocks() if block.language == "toml"]
    assert files
    for block in files:
        assert moeprof.studies.Grid(**tomllib.loads(block.text)).routers, block


def test_every_block_says_its_language():
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.M)
        assert len(fences) % 2 == 0, page
        assert set(fences[::2]) <= {"python", "sh", "text", "toml"} and set(fences[1::2]) <= {""}, (
            page
        )


def test_every_comment_is_one_that_is_known():
    known = re.compile(r"slow|transformers 5|not yet: .+|not run: .+|the (main|test) command|")
    for block in blocks():
        assert known.fullmatch(block.note), f"{block}: {block.note}"


def test_links_to_files_lead_somewhere():
    """mkdocs looks at the links of docs/; README it doesn't know."""
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: moeprof\.(\w+)$", text, re.M))
    told = {name for name in moeprof.__all__ if name.endswith("_routing")}  # of all at once
    told.add("__version__")
    assert set(moeprof.__all__) - told <= shown and "moeprof.<name>_routing" in text


def test_the_reference_shows_the_defaults_of_the_signature():
    """Not the first of the words that a parameter takes."""
    griffe = pytest.importorskip("griffe")  # of the extra docs
    extensions = griffe.load_extensions(ROOT / "docs" / "docstrings.py")
    backend = 'backend : {"c", "torch"} or None\n        What runs it.'
    code = f'def f(backend=None):\n    """F.\n\n    Parameters\n    ---\n    {backend}\n    """'
    f = griffe.visit("module", Path("module.py"), code, docstring_parser="numpy")["f"]
    extensions.call("on_object", obj=f, loader=None)
    (parameter,) = f.docstring.parsed[1].value
    assert parameter.default == "None"
    assert str(parameter.annotation) == 'one of "c", "torch" or None'


@pytest.fixture
def write(monkeypatch):
    """The program docs/write.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("write")


def test_what_the_pages_have_from_the_code_is_as_the_code_has_it(write):
    for page in write.PAGES:
        text = page.read_text(encoding="utf-8")
        assert write.MADE.search(text) and text == write.written(page), "python docs/write.py"


def test_the_command_line_page_is_made_from_the_parsers(write):
    made = write.commands()
    headings = re.findall(r"^## moeprof (.+)$", made, re.M)
    assert {"sweep", "profile", "calibrate", "compare", "diagnose", "bench layer"} <= set(headings)
    assert all(command in headings for command in ["cpu", "bench kernels", "bench model"])
    assert "| `--tokens N` |" in made and "%(default)s" not in made
    assert "| `--out FILE` **needed** |" in made  # of calibrate
    rows = [line for line in made.splitlines() if line.startswith("| `--")]
    assert len(rows) > 60 and all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
