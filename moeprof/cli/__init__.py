"""The command line: `moeprof sweep`, `profile`, `calibrate`, `compare`, `bench` ….

Whatever is wrong with the input is one line on stderr and exit code 2; Ctrl-C is exit code 130.
A command's arguments are declared beside its code, or here where that imports torch: declaring
them imports nothing that is slow to import. A command imports what it needs when it runs.
"""

import argparse
import sys

import moeprof
from moeprof.bench.arguments import add_bench
from moeprof.cli.calibrate import add_calibrate
from moeprof.cli.diagnose import add_diagnose
from moeprof.cli.profile import add_profile
from moeprof.comparison.arguments import add_compare
from moeprof.console import make_console
from moeprof.experiment.arguments import add_sweep


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, without the usage around it."""

    def error(self, message):
        self.exit(2, f"moeprof: error: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(prog="moeprof", description="Mixture-of-experts routing, on the CPU.")
    parser.add_argument("--version", action="version", version=f"moeprof {moeprof.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_sweep(commands)
    add_calibrate(commands)
    add_profile(commands)
    add_bench(commands)
    add_diagnose(commands)
    add_compare(commands)
    cpu = commands.add_parser("cpu", help="show the CPU's features and the chosen kernels")
    cpu.set_defaults(run=_cpu)
    return parser


def main(argv=None):
    """Run the command line; returns the exit code: 0, 2 for bad input, 130 for Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        print("moeprof: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        return _fail(f"{error}; `pip install 'moeprof[hf]'` brings what models need")
    except (ImportError, ValueError, TypeError, OSError) as error:
        return _fail(error)


def _fail(error):
    """One line on stderr."""
    print(f"moeprof: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _cpu(arguments):
    """Print moeprof.cpu_info() as a table, as it is for models: with torch's threads."""
    import torch  # noqa: F401
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    for name, value in moeprof.cpu_info().items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for number, (key, item) in enumerate(rows):
            text = ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)
            table.add_row("" if number else name, str(key), text)
    make_console().print(table)
