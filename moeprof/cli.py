"""The command line: `moeprof sweep`, `profile`, `calibrate`, `compare`, `bench` ….

Whatever is wrong with the input is one line on stderr and exit code 2; Ctrl-C is exit code 130.
"""

import argparse
import sys
from pathlib import Path

import moeprof
from moeprof import demo
from moeprof.arguments import DTYPES, integer
from moeprof.bench.arguments import add_bench
from moeprof.comparison.arguments import add_compare
from moeprof.console import make_console
from moeprof.diagnosis.arguments import add_diagnose
from moeprof.experiment import Experiment, Store, sweep
from moeprof.experiment.heldout import HELDOUT_TOKENS, heldout_windows
from moeprof.experiment.inputs import check_model, load_model, read_document, read_prompts
from moeprof.experiment.runner import default_null, experts_of, shipped_null
from moeprof.files import check_folder
from moeprof.null import KINDS, SCORES
from moeprof.profiler.arguments import add_profile
from moeprof.textfiles import TextFiles

DEMO = "the demo model of moeprof"
NORMAL = (
    "normal, each token's logits against their own median and spread, without calibration (on "
    "pure noise at alpha 0.05 it rejects something for 11 % of the tokens with 64 experts)"
)


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments, without the usage around it."""

    def error(self, message):
        self.exit(2, f"moeprof: error: {message} (see {self.prog} --help)\n")


def _parser():
    parser = _Parser(prog="moeprof", description="Mixture-of-experts routing, on the CPU.")
    parser.add_argument("--version", action="version", version=f"moeprof {moeprof.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_sweep(commands)
    _add_calibrate(commands)
    add_profile(commands, _add_model, _load)
    add_bench(commands)
    add_diagnose(commands, _add_model, _load)
    add_compare(commands, _add_model, _load, DEMO)
    cpu = commands.add_parser("cpu", help="show the CPU's features and the chosen kernels")
    cpu.set_defaults(run=_cpu)
    return parser


def _add_model(parser):
    parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help=f"default: {DEMO}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--threads", type=integer(1), metavar="N", help="default: as torch chooses"
    )


def _add_sweep(commands):
    parser = commands.add_parser(
        "sweep", help="compare the model's own top-k with 20 settings of BH routing"
    )
    _add_model(parser)
    parser.add_argument("--out", default="results", metavar="DIR", help="default: results")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="a prompt a line, after a label (simple, medium, complex, technical) and a TAB or "
        "not; default: twelve that ship with the demo model",
    )
    parser.add_argument(
        "--null", metavar="FILE",
        help='a null of `moeprof calibrate`, or "normal" for one without calibration; default: '
        "an efron null on logprob: the demo model's own, or fitted first",
    )
    parser.add_argument(
        "--null-text", metavar="FILE",
        help="text to fit the default null to; default: the shipped calibration text",
    )
    parser.add_argument(
        "--heldout-tokens", type=integer(1), metavar="N", default=HELDOUT_TOKENS,
        help="held-out tokens a configuration for perplexity, a matter of time for large "
        "models; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=integer(0, 2**32 - 1), default=0,
        help="chooses the passages of the shipped text, and the bootstrap draws; default: 0",
    )
    parser.set_defaults(run=_sweep)


def _add_calibrate(commands):
    parser = commands.add_parser(
        "calibrate",
        help="fit null distributions to a model's routers",
        description="Fit null distributions to a model's routers, or add fitted ones up.",
    )
    _add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text", metavar="FILE", nargs="+",
        help="the text to fit to, UTF-8, read piece by piece: any size",
    )
    source.add_argument(
        "--merge", metavar="NULL", nargs="+",
        help="nulls fitted to different texts: writes the one fitted to all of them, exactly",
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE",
        help="written there: .safetensors, or .npz, which is compressed",
    )
    parser.add_argument("--kind", choices=KINDS, help="default: efron")
    parser.add_argument("--score", choices=SCORES, help="default: logprob")
    parser.set_defaults(run=_calibrate)


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


def _load(arguments):
    """(model, tokenizer) as --model, --dtype and --threads say."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    return demo.load(dtype) if arguments.model is None else load_model(arguments.model, dtype)


def _sweep(arguments):
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    prompts = demo.prompts() if arguments.prompts is None else read_prompts(arguments.prompts)
    if arguments.null is not None and arguments.null_text is not None:
        raise ValueError("--null-text is what a null is fitted to, and --null brings one already")
    text = arguments.null_text
    null_text = None if text is None else read_document(text, "null text")
    null = _given_null(arguments.null)
    if arguments.model is not None:
        check_model(arguments.model)
    store = Store(arguments.out)
    model, tokenizer = _load(arguments)
    experts_of(model)  # raises where the model can't be patched
    seed = arguments.seed
    null, facts = _null_for(model, tokenizer, null, null_text, seed)
    experiment = Experiment(
        model,
        tokenizer,
        tuple(text for _, text in prompts),
        tuple(complexity for complexity, _ in prompts),
        heldout_windows(tokenizer, demo.heldout_documents(), arguments.heldout_tokens, seed),
        null,
    )
    facts |= {"model": DEMO if arguments.model is None else arguments.model, "seed": seed}
    sweep(experiment, store, facts)


def _given_null(name):
    """What --null names: a Null, "normal" or None."""
    return name if name in (None, "normal") else moeprof.Null.load(name)


def _null_for(model, tokenizer, given, text, seed):
    """(null, {"null": its description, "null_source": where it is from}) for the sweep."""
    if given == "normal":
        return given, {"null": NORMAL, "null_source": ""}
    if given is not None:
        given.check(model)
        return given, {"null": given.describe(), "null_source": "It was read from a file."}
    if text is not None:
        null = moeprof.fit_null(model, tokenizer, [text], progress=sys.stderr.isatty())
        source = "It was fitted to the text given with --null-text."
    elif (null := shipped_null(model)) is not None:
        source = (
            "It ships with the demo model, fitted to half of the calibration documents; no "
            "evaluation uses them."
        )
    else:
        null = default_null(model, tokenizer, sys.stderr.isatty(), seed)
        source = (
            "It was fitted to passages of the calibration text that ships with moeprof, from "
            "documents that no evaluation uses."
        )
    return null, {"null": null.describe(), "null_source": source}


def _calibrate(arguments):
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    out = Path(arguments.out)
    if out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out {out}: a null file ends in .safetensors or .npz")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: no such folder {out.parent}")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out}: expected a file, this is a folder")
    check_folder(out.parent)
    null = _fitted(arguments) if arguments.merge is None else _merged(arguments)
    null.save(out)
    print(null.describe())
    print(f"Written: {out}")


def _fitted(arguments):
    texts = TextFiles(arguments.text)
    if arguments.model is not None:
        check_model(arguments.model)
    model, tokenizer = _load(arguments)
    return moeprof.fit_null(
        model, tokenizer, texts, kind=arguments.kind or "efron",
        score=arguments.score or "logprob", progress=sys.stderr.isatty(),
    )


def _merged(arguments):
    for name in ("model", "threads", "kind", "score"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--merge adds up fitted nulls: it takes no --{name}")
    if len(arguments.merge) < 2:
        raise ValueError("--merge: expected at least two nulls, got one")
    total, seen = None, {}
    for path in arguments.merge:
        null = moeprof.Null.load(path)
        if null.text_digest in seen:
            raise ValueError(
                f"--merge: {path} was fitted to the same text as {seen[null.text_digest]}, which "
                "would count twice"
            )
        seen[null.text_digest] = path
        try:
            total = null if total is None else total.merge(null)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return total


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
