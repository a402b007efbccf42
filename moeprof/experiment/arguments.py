"""The arguments of `moeprof sweep`, and the command itself."""

import sys

import moeprof

from .. import demo
from ..arguments import DEMO, add_model, integer, load
from .heldout import HELDOUT_TOKENS, heldout_windows
from .inputs import check_model, read_document, read_prompts
from .runner import Experiment, default_null, experts_of, shipped_null
from .store import Store
from .sweep import sweep

NORMAL = (
    "normal, each token's logits against their own median and spread, without calibration (on "
    "pure noise at alpha 0.05 it rejects something for 11 % of the tokens with 64 experts)"
)


def add_sweep(commands):
    """Add `sweep` to the commands of `moeprof`."""
    parser = commands.add_parser(
        "sweep", help="compare the model's own top-k with 20 settings of BH routing"
    )
    add_model(parser)
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
    parser.set_defaults(run=_run)


def _run(arguments):
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
    model, tokenizer = load(arguments)
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
