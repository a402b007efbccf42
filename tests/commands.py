"""Commands that end in an error, and processes of their own that share their imports."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from moeprof.cli import main


def fails(capsys, *arguments, silent=True):
    """The one line that `moeprof …` says on stderr before it exits with code 2.

    silent: nothing is on stdout then
    """
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse
        code = stopped.code
    stdout, stderr = capsys.readouterr()
    assert code == 2
    assert not silent or stdout == ""
    assert re.fullmatch(r"moeprof: error: [^\n]+\n", stderr)
    return stderr.removeprefix("moeprof: error: ").rstrip()


# The last lines run in the fork alone, which then ends as Python does. It doesn't look through what
# was imported for what nobody holds any more: that takes seconds.
FORKED = """
import gc, json, os, sys
exec(sys.argv[1])
gc.freeze()
for line in sys.stdin:
    code, arguments, folder, stdout, stderr = json.loads(line)
    if child := os.fork():
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        break
else:
    sys.exit()
os.chdir(folder)
for number, name in enumerate((os.devnull, stdout, stderr)):
    os.dup2(os.open(name, os.O_RDWR), number)
sys.argv = ["-c", *arguments]
exec(code)
"""


class Forks:
    """A process that has run `imports`; what it is told to run, runs in a fork of it."""

    def __init__(self, imports, **environment):
        self._process = subprocess.Popen(
            [sys.executable, "-c", FORKED, imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            # Ctrl-C reaches it also where the tests run in the background of a shell, which
            # ignores it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def close(self):
        self._process.communicate(timeout=60)

    def run(self, code, *arguments, folder=None, until=None):
        """A finished process, as of `subprocess.run`.

        until: Ctrl-C is pressed a moment after this stands on its stdout, or is true when called
        """
        with tempfile.TemporaryDirectory() as place:
            files = [Path(place) / name for name in ("stdout", "stderr")]
            for file in files:
                file.touch()
            given = [code, list(map(str, arguments)), str(folder or os.getcwd())]
            print(json.dumps([*given, *map(str, files)]), file=self._process.stdin, flush=True)
            child = int(self._process.stdout.readline())
            if until is not None:
                _wait_for(
                    until if callable(until) else lambda: until in files[0].read_text("utf-8")
                )
                os.kill(child, signal.SIGINT)
            ended = int(self._process.stdout.readline())
            said = [file.read_text(encoding="utf-8") for file in files]
        return subprocess.CompletedProcess(arguments, ended, *said)


MAIN = "import sys; from moeprof.cli import main; sys.exit(main(sys.argv[1:]))"
IMPORTED = f"""
import sys; sys.path.append({str(Path(__file__).parent)!r}); import kept; kept.keep(now=True)
import matplotlib.pyplot, transformers.generation, moeprof.studies.sweep
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM
"""


@contextmanager
def forks(imports):
    started = Forks(imports)
    yield started
    started.close()


def _wait_for(seen):
    end = time.monotonic() + 120
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.1)
