"""The floors of the package: imports run down only, and no file can reach itself by them."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

PACKAGE = Path(__file__).resolve().parents[1] / "moeprof"

# From the top to the bottom; a line is a floor. docs/contributing says what lives on each.
FLOORS = """
__main__
cli
bench
studies
demo
profile
profiler
measure
texts
quantizing
patching
routers
null
models
backends
show
files
checks
late
version
""".split()
PROGRAMS = "moeprof.demo.make"  # how the demo was made: run as scripts, no part of the wheel


def _name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imported(name, path):
    """The modules of moeprof that this one imports, also inside functions and for types only."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "moeprof":
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            if module.split(".")[0] != "moeprof":
                continue
            for alias in node.names:
                full = f"{module}.{alias.name}"
                if full in MODULES:
                    yield full
                elif alias.name not in ("_C", "_kernels"):
                    yield module


@pytest.fixture(scope="module")
def imports():
    return {name: sorted(set(_imported(name, path))) for name, path in MODULES.items()}


def _floor(name):
    return FLOORS.index(name.split(".")[1])


def test_every_module_stands_on_a_floor():
    rooms = {name.split(".")[1] for name in MODULES if "." in name}
    assert rooms == set(FLOORS)


def test_imports_run_down_and_never_to_the_face(imports):
    pairs = [
        (name, target)
        for name, targets in imports.items()
        if name != "moeprof" and not name.startswith(PROGRAMS)
        for target in targets
    ]
    assert not [pair for pair in pairs if pair[1] == "moeprof"], (
        "modules import the package's own face"
    )
    assert not [pair for pair in pairs if pair[1].startswith(PROGRAMS)], "modules import a program"
    up = [(name, target) for name, target in pairs if _floor(name) > _floor(target)]
    assert not up, "modules import from a floor above"


def test_there_is_no_circle_of_files(imports):
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in imports.get(name, ()):
            if target != name:
                visit(target)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


def test_the_reader_of_imports_sees_all_kinds(tmp_path):
    """Relative and absolute ones, of modules and of names, at the top and inside a function."""
    file = tmp_path / "reader.py"
    file.write_text(
        "import moeprof.files\nfrom .. import _C\nfrom ..null import model\n"
        "def f():\n    from ..null.scores import BINS\n    from moeprof import patch\n"
    )
    seen = list(_imported("moeprof.bench.reader", file))
    assert seen == ["moeprof.files", "moeprof.null.model", "moeprof.null.scores", "moeprof"]
