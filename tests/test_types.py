"""What type checkers see: the stub of the face is whole, and gives real signatures."""

import ast
import inspect
import subprocess
import sys

import pytest
import stub

import moeprof

pytestmark = pytest.mark.once


def test_the_stubs_are_what_the_packages_give():
    for path, text in stub.texts().items():
        assert path.read_text() == text, "python tests/stub.py --write makes it anew"


def test_every_public_name_is_in_the_stub():
    names = set()
    for node in ast.parse(stub.FACE.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    assert set(moeprof.__all__) <= names
    for name in moeprof.__all__:
        assert getattr(moeprof, name) is not None


def test_what_completion_shows_of_patch():
    assert list(inspect.signature(moeprof.patch).parameters)[:3] == ["model", "router", "null"]


@pytest.mark.slow  # it reads torch's types too, unless `mypy` has just run here
def test_a_type_checker_finds_wrong_calls(tmp_path):
    pytest.importorskip("mypy", reason="needs mypy, of moeprof[test]")
    program = tmp_path / "program.py"
    program.write_text(
        "import moeprof\n"
        "moeprof.top_p_routing([], P='much')\n"  # a number
        "moeprof.patch(3)\n"  # a model
        "moeprof.no_such_name\n"
        "x: int = moeprof.__version__\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", program],
        capture_output=True,
        text=True,
        cwd=stub.FACE.parents[1],
    )
    lines = [line for line in ended.stdout.splitlines() if "program.py" in line]
    assert {int(line.split(":")[1]) for line in lines} == {2, 3, 4, 5}, ended.stdout
