"""What all tests keep to: tests/README.md says why."""

import ast
from pathlib import Path

import mutations
import pytest
from wording import says

pytestmark = pytest.mark.once

TESTS = Path(__file__).parent
# Helpers that make models, and the library itself.
OF_TRANSFORMERS = {"transformers", "models", "zoo", "every", "listed", "captured", "peft"}


def imported(tree):
    """The names of the modules that this code imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def test_what_runs_once_has_nothing_to_do_with_transformers():
    """Else a break on one of its versions would not be seen."""
    marked = []
    for path in TESTS.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        of_file = [
            n for n in tree.body if isinstance(n, ast.Assign) and "pytestmark" in ast.dump(n)
        ]
        if any("mark.once" in ast.unparse(node) for node in of_file):
            marked.append(path.name)
            assert not OF_TRANSFORMERS & set(imported(tree)), path.name
    assert "test_kernels.py" in marked and "test_routers.py" in marked


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda m: m.file)
def test_each_mutation_fits_the_code(mutation):
    """Its old text stands once in its file, and the tests it names are there."""
    assert (TESTS.parent / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    for name in mutation.tests.partition(" -k ")[0].split():
        assert (TESTS / name).is_file(), name


def test_says_looks_at_one_sentence():
    text = "Two of 9 are done. The rest\nis not: layer 1.5 failed.\n\n- layer 2: fine\n- layer 3"
    assert says(text, "rest is not", "layer 1.5") and says(text, "layer 2", "fine")
    assert not says(text, "Two of 9", "layer 1.5") and not says(text, "fine", "layer 3")
