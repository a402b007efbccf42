"""Parts of the command line that several commands share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..bench.settings import DTYPES
from ..studies.engine.serial import Serial
from ..studies.source import Source, source_name
from ..texts.documents import EXPECTED, read_documents

if TYPE_CHECKING:
    from ..null.resolve import AnyNull
    from ..studies.engine.engine import Engine
    from ..texts.documents import Document

DOCUMENTS = EXPECTED.removeprefix("--text: ")
# {name: default} of the options that say which model is loaded, and how, as `command_of` takes it.
OF_MODEL = {
    "model": None,
    "trust_remote_code": False,
    "dtype": "float32",
    "bits": None,
    "device": "cpu",
    "threads": None,
}
DEMO = "the demo model of moeprof"
MOST_THREADS = 1024  # far above the CPUs there are; torch would take memory for each


def integer(low: int, high: int = 10**6) -> Callable[[str], int]:
    """A parser of integers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, got {text}")
        return value

    return parse


def integers(text: str) -> tuple[int, ...]:
    """Those of "4,8", at least 1 each: ascending, each once."""
    return tuple(sorted({integer(1)(part) for part in text.split(",")}))


def names(text: str) -> tuple[str, ...]:
    """Those of "bh,top_p", in their order."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def level(text: str) -> float | None:
    """A number in (0, 1), or None for a text that is none."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < 1 else None


def add_number(
    parser: argparse.ArgumentParser, name: str, default: int, text: str, low: int, high: int
) -> None:
    """An option of one integer from low to high; the help ends in its default."""
    help = f"{text}; default: %(default)s"
    parser.add_argument(name, type=integer(low, high), default=default, metavar="N", help=help)


def add_integers(parser: argparse.ArgumentParser, name: str, letter: str, text: str) -> None:
    """An option of one or several integers: B,B,... of the letter B."""
    parser.add_argument(name, type=integers, metavar=f"{letter},{letter},...", help=text)


def add_names(
    parser: argparse.ArgumentParser,
    name: str,
    text: str,
    default: tuple[str, ...] | None = None,
    metavar: str = "NAME,NAME,...",
) -> None:
    """An option of one or several names."""
    parser.add_argument(name, type=names, default=default, metavar=metavar, help=text)


def add_null(parser: argparse.ArgumentParser, text: str) -> None:
    """--null, a file of `moeprof calibrate` or a word."""
    parser.add_argument("--null", metavar="FILE", help=text)


def add_null_of_routers(parser: argparse.ArgumentParser) -> None:
    """--null, where several routers may be given."""
    add_null(
        parser,
        'for routers on p-values: a null of `moeprof calibrate`, "normal" or "softmax"; default: '
        "on logprob, of the kind that each router needs, the demo model's own or fitted first",
    )


def add_documents(parser: argparse.ArgumentParser, text: str) -> None:
    """--text, whatever `read_documents` takes; text: what the documents are for."""
    parser.add_argument("--text", metavar="TEXT", nargs="+", help=f"{text}; {DOCUMENTS}")


def add_seed(parser: argparse.ArgumentParser, text: str) -> None:
    """--seed; text: what it chooses."""
    add_number(parser, "--seed", 0, text, 0, 2**32 - 1)


def add_budget_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """--budget-tokens."""
    add_number(parser, "--budget-tokens", default, "tokens that budgets are set on", 256, 10**6)


def add_heldout_text(parser: argparse.ArgumentParser) -> None:
    """--text, documents in place of the shipped held-out ones."""
    add_documents(parser, "your own held-out text in place of the shipped one")


def folder(text: str) -> str:
    """A folder's name: an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a folder, got an empty name")
    return text


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """--out, the folder that files are written to."""
    parser.add_argument(
        "--out", type=folder, default=default, metavar="DIR", help="default: %(default)s"
    )


def add_store(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """--store, where finished cells are kept; otherwise: what is done where --out is not given."""
    parser.add_argument(
        "--store",
        metavar="FILE",
        help="where finished parts are kept (SQLite): the same command goes on there after it was "
        "interrupted, and several commands may share it; default: moeprof.sqlite in --out"
        + otherwise,
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model, --trust-remote-code, --dtype, --bits, --device and --threads, which `load` reads."""
    parser.add_argument(
        "--model",
        type=source_name,
        metavar="PATH_OR_HUB_ID",
        help=f'default: "demo", which is {DEMO}; a folder of that name is ./demo',
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that comes with the model or its tokenizer, where it needs that; "
        "never done otherwise",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--bits",
        type=int,
        choices=(8, 4),
        help="keep the experts in 8 or 4 bits, quantised as they are read; default: as the model "
        "has them",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the model runs, as torch names it: cuda, cuda:1, mps, xpu; default: cpu",
    )
    add_threads(parser)


def add_threads(parser: argparse.ArgumentParser) -> None:
    """--threads, None where it isn't given."""
    parser.add_argument(
        "--threads", type=integer(1, MOST_THREADS), metavar="N", help="default: as torch chooses"
    )


def source_of(arguments: argparse.Namespace) -> Source:
    """The model that the options of `add_model` name."""
    return Source(
        arguments.model,
        arguments.dtype,
        arguments.bits,
        arguments.device,
        arguments.trust_remote_code,
    )


def check_named_model(arguments: argparse.Namespace) -> None:
    """Raises where --model names none, before anything is loaded."""
    if arguments.model is not None:
        from ..models.load import check_model

        check_model(arguments.model)


def model_name(arguments: argparse.Namespace) -> str:
    """What files call the model."""
    return DEMO if arguments.model is None else str(arguments.model)


def given_null(arguments: argparse.Namespace) -> AnyNull | None:
    """That of --null, None where it isn't given."""
    from ..null import resolve_null

    return None if arguments.null is None else resolve_null(arguments.null)


def given_documents(arguments: argparse.Namespace) -> list[Document] | None:
    """Those of --text, None where it isn't given."""
    return None if arguments.text is None else read_documents(arguments.text)


def set_threads(arguments: argparse.Namespace) -> None:
    """Those of --threads, where it is given."""
    if arguments.threads:
        import torch

        torch.set_num_threads(arguments.threads)


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(model, tokenizer) as the options of `add_model` say."""
    from ..show.console import make_console, progress

    set_threads(arguments)
    with progress(make_console(), None, f"loading {model_name(arguments)}"):
        return source_of(arguments).load()


def command_of(arguments: argparse.Namespace, defaults: Mapping[str, Any]) -> str:
    """The command that does the same again; defaults: {name: default} of its options in order."""
    words = ["moeprof", arguments.command]
    for name, default in defaults.items():
        value = getattr(arguments, name)
        if value == default:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if name == "text":
            words += value
        elif isinstance(value, list | tuple):
            words.append(",".join(map(str, value)) or "none")
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def add_engine(parser: argparse.ArgumentParser) -> None:
    """--engine, --workers and --ray-address, which `engine_of` reads."""
    parser.add_argument(
        "--engine",
        choices=("serial", "process", "ray"),
        default="serial",
        help="what runs the parts: this process, several on this machine, or a Ray cluster; each "
        "worker has the model in memory; default: serial",
    )
    parser.add_argument(
        "--workers",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="processes with --engine process (default: 2), which share the threads out, or "
        "workers of the Ray cluster (default: as many as it has room for)",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a Ray cluster, auto for the one that this machine belongs to; default: one is "
        "started here",
    )


def add_study_options(parser: argparse.ArgumentParser, out: str = "results") -> None:
    """Those of every study: of its model, --out, of its store and of its engine."""
    add_model(parser)
    add_out(parser, out)
    add_store(parser)
    add_engine(parser)


def engine_of(arguments: argparse.Namespace, source: Source | None = None) -> Engine:
    """What runs the cells, as the options of `add_engine` say; source: the model that isn't named
    by those of `add_model`."""
    if arguments.engine != "ray" and arguments.ray_address is not None:
        raise ValueError("--ray-address belongs to --engine ray")
    if arguments.engine == "serial":
        if arguments.workers is not None:
            raise ValueError("--workers belongs to --engine process or ray")
        return Serial()
    source = source or source_of(arguments)
    if arguments.engine == "process":
        from ..studies.engine.process import Processes

        return Processes(source, arguments.workers or 2)
    from ..studies.engine.ray import OnRay

    return OnRay(source, arguments.workers, arguments.ray_address, arguments.threads)
