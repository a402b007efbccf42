"""What type checkers see: the stub of the face is whole, and gives real signatures.

That mypy finds wrong calls by it is in wrong_calls.py.
"""

import ast
import inspect

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
