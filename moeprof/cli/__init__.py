"""The command line: `moeprof sweep`, `profile`, `calibrate`, `compare`, `bench` ….

Whatever is wrong with the input is one line on stderr and exit code 2; Ctrl-C is exit code 130,
a reader of stdout that has gone 141.
What is wrong becomes a ValueError, TypeError, OSError or ImportError with words for the user where
it is met: reading a file, loading a model, tokenising, writing. Any other exception is a fault
of moeprof, and its traceback is shown.

A command's arguments are declared beside its code, or here where that imports torch: declaring
them imports nothing that is slow to import. A command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from .. import checks
from ..version import __version__
from .streams import streams

# In the order of `moeprof --help`. Each is a module here, whose `declare` adds its options.
COMMANDS = {
    "sweep": "compare the model's own top-k with 20 settings of BH routing",
    "study": "all of it on one model: calibrate, profile, sweep, compare, diagnose, evaluate",
    "calibrate": "learn from text which scores are usual, as routers on p-values need (a null)",
    "profile": "what the experts of a model do on a text: load, cost, time, figures",
    "bench": "time kernels, layers, blocks, routers and models",
    "diagnose": "check whether p-values are what they say, and what BH routing on them selects",
    "compare": "compare routers at an equal budget of experts, and with static top-k",
    "evaluate": "how well a model predicts a text, as it is and under other routers",
    "eval-harness": "tasks of lm-evaluation-harness with the model's own router and with others",
    "inspect": "show a model's MoE layers, and which of them moeprof can run",
    "store": "show what a store of finished cells holds, and export it as a table",
    "cpu": "show the CPU's features and the chosen kernels",
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moeprof: error: {_one_line(message)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moeprof",
        description="Look into, change and run the mixture-of-experts layers of Hugging Face "
        "models, on a CPU in C, elsewhere in torch.",
        epilog="The commands run on a small demo model unless you name one. `moeprof sweep` is "
        "the one to begin with; `moeprof COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"moeprof {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, words in COMMANDS.items():
        # Imported here, so that `main` answers Ctrl-C meanwhile.
        module = import_module(f".{name.replace('-', '_')}", __package__)
        module.declare(commands.add_parser(name, help=words))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C, and 141,
    which a shell has for SIGPIPE, where nobody reads stdout any more."""
    with streams() as stdout:
        try:
            code = _run(argv)
        except SystemExit as stopped:
            if stopped.code:
                raise
            code = 0  # --help, --version
        stdout.flush()
        if code or stdout.error is None:
            return code
        if isinstance(stdout.error, BrokenPipeError):
            return 141
        return _fail(f"standard output can't be written: {stdout.error.strerror}")


def _run(argv: Sequence[str] | None) -> int:
    """The exit code of the command itself."""
    arguments = argparse.Namespace()
    try:
        arguments = _parser().parse_args(argv)
        needed = _needed(arguments)
        checks.check_installed(f"moeprof {arguments.command}", needed)
        _say_what_takes_long(needed)
        with _plain_warnings():
            return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        # Interrupted inside an exec() of a text, as dataclasses are made, Python would end by the
        # signal in spite of this handler; the next exec() takes that back.
        exec("")
        print(f"moeprof: interrupted{_kept(arguments)}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("moeprof"):
            raise  # a file of moeprof itself
        return _fail(checks.missing("this", error.name) if error.name else error)
    except (ImportError, ValueError, TypeError, OSError) as error:
        return _fail(error)


def _kept(arguments: argparse.Namespace) -> str:
    """What is said after an interruption of a command that has a store for what is finished."""
    if hasattr(arguments, "store") and (arguments.store, arguments.out) != (None, None):
        return "; what was finished is kept: the same command goes on there"
    return ""


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings in one line as errors are: where in the source they arise helps no user here."""
    usual = warnings.formatwarning

    def plain(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if category is not UserWarning:
            return usual(message, category, filename, lineno, line)
        return f"moeprof: warning: {_one_line(message)}\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _needed(arguments: argparse.Namespace) -> Sequence[str]:
    """The packages that the command will import, asked for before it does anything."""
    if getattr(arguments, "engine", None) == "ray":
        return (*checks.ALL, "ray")
    if arguments.command == "store":
        return ("pandas", "rich")
    if arguments.command == "cpu" or getattr(arguments, "merge", None) is not None:
        return ()
    if arguments.command == "calibrate":
        return checks.MODELS
    if arguments.command == "bench":
        return (*checks.MODELS, *(["matplotlib"] if arguments.plot else []))
    if arguments.command == "eval-harness":
        return (*checks.ALL, "lm_eval")
    return checks.ALL


def _say_what_takes_long(needed: Sequence[str]) -> None:
    """For a person who waits: the first imports take seconds, and no bar can be shown before."""
    if "torch" in needed and "torch" not in sys.modules and sys.stderr.isatty():
        print("moeprof: importing torch and transformers", file=sys.stderr, flush=True)


def _one_line(text: object) -> str:
    from ..files import printable

    return printable(" ".join(str(text).split()))


def _fail(error: object) -> int:
    """One line on stderr."""
    print(f"moeprof: error: {_one_line(error)}", file=sys.stderr)
    return 2
