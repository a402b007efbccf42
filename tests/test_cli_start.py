"""How the command line starts: what it imports, what it says where that fails or is interrupted."""

import os
import subprocess
import sys

import pytest
from commands import MAIN, forks

import moeprof
from moeprof import checks, cli, demo

pytestmark = pytest.mark.slow  # many processes, which import all; little depends on the version

SLOW = (*checks.ALL,)
COMMANDS = {
    "sweep": ["--out", "out"],
    "profile": ["--text", "text.txt", "--out", "out"],
    "compare": ["--out", "out"],
    "diagnose": ["--out", "out"],
    "evaluate": ["--out", "out"],
    "calibrate": ["--text", "text.txt", "--out", "out.npz"],
    "bench": ["layer", "--json", "out.json", "--plot", "out.png"],
}


@pytest.fixture(scope="module")
def bare():
    """Forks of a process that has imported the command line, and nothing that is slow."""
    with forks("import moeprof.cli") as started:
        yield started


def python(code, *arguments, folder=None, path=None):
    """A process of its own, in `folder`; path: looked through for modules before all others."""
    found = [str(path)] if path else []
    found += [p for p in (os.getcwd(), os.environ.get("PYTHONPATH")) if p]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
    )


@pytest.fixture
def folder(tmp_path):
    """The folder that a command runs in, with a text."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "text.txt").write_text(demo.heldout_texts()[0].text[:3000])
    return folder


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--help"], 0),
        (["--version"], 0),
        (["cpu"], 0),
        (["sweep", "--threads", "0"], 2),
        (["profile", "--router", "bh:alpha=7"], 2),
        (["nothing"], 2),
        ([], 2),
        *(([command, "--help"], 0) for command in COMMANDS),
        (["bench", "layer", "--help"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_slow_is_imported_for_help_and_wrong_arguments(bare, arguments, code):
    program = f"""
import sys
import moeprof.cli
slow = {SLOW!r}
assert not [name for name in slow if name in sys.modules], "by the import"
try:
    code = moeprof.cli.main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
found = [name for name in slow if name in sys.modules]
assert not found, found
sys.exit(code)
"""
    ended = bare.run(program, *arguments)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr


def test_cpu_says_what_is_known_without_torch(bare):
    shown = bare.run(MAIN, "cpu").stdout
    for kernel, variant in moeprof.cpu_info()["kernels"].items():
        assert f"{kernel} " in shown and f" {variant}\n" in shown
    for feature in moeprof.cpu_info()["features"]:
        assert feature in shown
    assert "torch.get_num_threads()" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    "command, missing",
    [
        *(("sweep", name) for name in checks.ALL),
        *((command, "torch") for command in COMMANDS if command != "sweep"),
        ("profile", "matplotlib"),
        ("compare", "rich"),
        ("diagnose", "pandas"),
        ("calibrate", "rich"),
        ("bench", "matplotlib"),
    ],
)
def test_without_the_extra(bare, command, missing, folder):
    """One line that says what to install, before anything runs or is written."""
    program = f"import sys; sys.modules[{missing!r}] = None; {MAIN}"
    ended = bare.run(program, command, *COMMANDS[command], folder=folder)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"moeprof: error: moeprof {command} needs {missing}, which isn't installed: "
        "pip install 'moeprof[hf]'\n"
    )
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


def test_a_package_that_is_found_but_whose_own_parts_are_missing(folder, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import a_part_of_torch")
    ended = python(MAIN, "profile", "--out", "out", folder=folder, path=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == (
        "moeprof: error: this needs a_part_of_torch, which isn't installed: "
        "pip install 'moeprof[hf]'\n"
    )


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_ctrl_c_while_packages_are_imported(name, folder, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise KeyboardInterrupt")
    ended = python(
        MAIN, "profile", "--text", "text.txt", "--out", "out", folder=folder, path=tmp_path
    )
    assert (ended.returncode, ended.stderr) == (130, "moeprof: interrupted\n")
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


def test_a_terminal_is_told_what_the_first_seconds_are_for(folder, tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise KeyboardInterrupt")
    for terminal in (True, False):
        program = f"import sys; sys.stderr.isatty = lambda: {terminal}; {MAIN}"
        ended = python(program, "profile", "--out", "out", folder=folder, path=tmp_path)
        said = "moeprof: importing torch and transformers\n" if terminal else ""
        assert ended.stderr == f"{said}moeprof: interrupted\n"
    program = f"import sys; sys.stderr.isatty = lambda: True; {MAIN}"
    assert python(program, "cpu", folder=folder).stderr == ""  # imports neither


def test_ctrl_c_inside_an_exec(folder, tmp_path):
    """Python ends by the signal then, unless it is told that the interrupt was handled."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("exec('raise KeyboardInterrupt')")
    ended = python(MAIN, "profile", "--out", "out", folder=folder, path=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "moeprof: interrupted\n")


def test_a_fault_of_moeprof_keeps_its_traceback(forked, folder):
    program = "import moeprof.models.load as m; m.check_model = lambda n: {}[n]; " + MAIN
    ended = forked.run(program, "profile", "--model", "m", folder=folder)
    assert ended.returncode == 1 and "KeyError: 'm'" in ended.stderr


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys):
    assert cli.main(["calibrate", "--text", "a\x1b[31mb", "--out", "null.npz"]) == 2
    error = capsys.readouterr().err
    assert "a\ufffd[31mb" in error and "\x1b" not in error


FULL = "moeprof: error: standard output can't be written: No space left on device\n"


@pytest.mark.parametrize(
    "redirected, code, error",
    [
        (">/dev/full", 2, FULL),
        ("| true", 141, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("2>/dev/full", 0, ""),
    ],
)
@pytest.mark.parametrize("command", ["cpu", "--help"])
def test_output_that_is_not_read_or_written(command, redirected, code, error):
    """The pipe's reader has gone before anything is written."""
    if "full" in redirected and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    program = f'(sleep 0.2; "$0" -m moeprof {command}; echo $? >&3) {redirected}'
    ended = subprocess.run(
        ["sh", "-c", f"exec 3>&1 >/dev/null; {program}", sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.stdout, ended.stderr) == (f"{code}\n", error)


def test_an_error_where_stderr_is_closed(bare):
    program = f"import os, sys; os.close(2); sys.stderr = None; {MAIN}"
    ended = bare.run(program, "calibrate", "--merge", "a.npz", "b.npz", "--out", "null.npz")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "")


@pytest.mark.parametrize(
    "name", ["patch", "fit_null", "MoEProfiler", "BudgetError", "SimpleBenchmark"]
)
def test_attributes_that_need_the_extra(bare, name):
    program = f"""
import sys
sys.modules["torch"] = None
import moeprof
try:
    getattr(moeprof, {name!r})({{}}, {{}}, [])
except ImportError as error:
    assert type(error) is ImportError
    print(error)
"""
    ended = bare.run(program)
    assert ended.returncode == 0, ended.stderr
    assert "needs torch, which isn't installed: pip install 'moeprof[hf]'" in ended.stdout
