"""Commands that end in an error."""

import re

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
