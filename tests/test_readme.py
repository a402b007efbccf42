"""What the README shows can be pasted, and it is short. The code in docs/: test_docs.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def blocks():
    """(language, text) of each block of code."""
    return re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.slow  # test_docs runs it on both versions
def test_the_example_runs_as_pasted(blocks, capsys):
    (example,) = [text for language, text in blocks if language == "python"]
    assert len([line for line in example.splitlines() if line]) <= 12
    scope = {}
    exec(example, scope)
    shown = capsys.readouterr().out.splitlines()
    assert any("decode 19 tokens in 19 steps" in line for line in shown)  # of the profile
    printed = [line for line in shown if re.match(r"\d+ \[", line)]
    tokens = scope["inputs"]["input_ids"].shape[1]
    assert [line.split()[0] for line in printed] == ["0", "1", "2", "3"]  # layers
    for line in printed:
        counts = eval(line.split(" ", 1)[1])
        assert len(counts) == tokens and all(1 <= count <= 8 for count in counts)


def test_it_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 900  # as wc -w counts


def test_ci_runs_the_command_of_the_readme(blocks):
    """.ci/run takes what stands between its marker and the end of the block."""
    commands = [text for language, text in blocks if language == "sh"]
    assert len(commands) == 2
    readme, script = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert "<!-- the test command -->" in readme and "<!-- the test command -->" in script
    assert "pytest" in commands[1] and ".venv/bin/moeprof sweep" in commands[0]
