"""The arguments of `moeprof sweep`, and the command itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import demo
from ..demo.defaults import default_null, shipped_null
from ..null import Null
from ..studies.sweep.grid import ALPHAS, MAX_KS
from ..texts.documents import read_documents
from ..texts.prompts import read_prompts
from ..texts.windows import BUDGET_TOKENS, HELDOUT_TOKENS, heldout_windows
from . import options

if TYPE_CHECKING:
    from ..studies.sweep.files import SweepFiles
    from ..texts.documents import Document


NORMAL = (
    "normal, each token's logits against their own median and spread, without calibration (on "
    "pure noise at alpha 0.05 it rejects something for 11 % of the tokens with 64 experts)"
)


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof sweep`."""
    options.add_study_options(parser)
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, after a label (simple, medium, complex, technical) and a TAB or "
        "not; default: twelve that ship with the demo model",
    )
    options.add_null(
        parser,
        'a null of `moeprof calibrate`, or "normal" for one without calibration; default: '
        "a trimmed null on logprob: the demo model's own, or fitted first",
    )
    parser.add_argument(
        "--alphas",
        type=_alphas,
        default=ALPHAS,
        metavar="A,A,...",
        help="of BH, each in (0, 1); default: 0.01,0.05,0.1,0.2",
    )
    parser.add_argument(
        "--max-k",
        type=options.integers,
        metavar="K,K,...",
        dest="max_ks",
        help="most experts that BH gives a token; default: 4,8,16,32,64, of which those above "
        "the model's number of experts are left out, or that number where all of them are",
    )
    options.add_integers(
        parser,
        "--static",
        "K",
        "run static top-k with these k on the held-out text, the line that BH has to beat; "
        "default: 1 to the model's own k",
    )
    options.add_heldout_text(parser)
    parser.add_argument(
        "--null-text",
        metavar="FILE",
        help="text to fit the default null to; default: the shipped calibration text",
    )
    options.add_number(
        parser,
        "--tokens",
        HELDOUT_TOKENS,
        "held-out tokens a configuration for perplexity, a matter of time for large models",
        1,
        10**6,
    )
    options.add_budget_tokens(parser, BUDGET_TOKENS)
    options.add_seed(parser, "chooses the passages of the shipped text, and the bootstrap draws")
    parser.set_defaults(run=_run)


def _alphas(text: str) -> tuple[float, ...]:
    values = []
    for part in text.split(","):
        if (value := options.level(part)) is None:
            raise argparse.ArgumentTypeError(f"expected numbers in (0, 1), got {part.strip()!r}")
        values.append(value)
    return tuple(sorted(set(values)))


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..models.blocks import experts_of
    from ..studies.budget.stock import budget_text
    from ..studies.sweep import Experiment, SweepFiles, sweep

    prompts = demo.prompts() if arguments.prompts is None else read_prompts(arguments.prompts)
    if arguments.null is not None and arguments.null_text is not None:
        raise ValueError("--null-text is what a null is fitted to, and --null brings one already")
    given = arguments.null_text
    null_texts = None if given is None else [one.text for one in read_documents([given])]
    null = _given_null(arguments.null)
    documents = _heldout_documents(arguments.text)
    options.check_named_model(arguments)
    engine = options.engine_of(arguments)
    files = SweepFiles(arguments.out, arguments.store)
    model, tokenizer = options.load(arguments)
    seed = arguments.seed
    num_experts = experts_of(model)[0]  # raises where the model can't be patched
    max_ks = arguments.max_ks or (MAX_KS if num_experts >= min(MAX_KS) else (num_experts,))
    _check_grid(max_ks, arguments.static, num_experts)
    heldout = heldout_windows(tokenizer, documents, arguments.tokens, seed)
    experiment = Experiment(  # raises where the model can't read a prompt: before a null is fitted
        model,
        tokenizer,
        tuple(text for _, text in prompts),
        tuple(complexity for complexity, _ in prompts),
        heldout,
        None,
    )
    null, facts = _null_for(model, tokenizer, null, null_texts, seed, files)
    facts |= {"model": options.model_name(arguments), "seed": seed}
    facts["heldout_source"] = "shipped" if arguments.text is None else arguments.text
    facts["null_code"] = repr(arguments.null) if arguments.null else facts["null_code"]
    sweep(
        replace(experiment, null=null),
        files,
        facts,
        alphas=arguments.alphas,
        max_ks=max_ks,
        static=arguments.static,
        calibration=budget_text(tokenizer, seed, arguments.budget_tokens),
        engine=engine,
    )


def _heldout_documents(paths: list[str] | None) -> list[Document]:
    """The documents of --text, the shipped ones without it."""
    return demo.heldout_texts() if paths is None else read_documents(paths)


def _check_grid(max_ks: Sequence[int], static: Sequence[int] | None, num_experts: int) -> None:
    """What only the model can tell of the lists: said before a null is fitted."""
    if min(max_ks) > num_experts:
        raise ValueError(
            f"--max-k: expected one of at most {num_experts}, the model's experts, "
            f"got {', '.join(map(str, max_ks))}"
        )
    if static and max(static) > num_experts:
        raise ValueError(
            f"--static: expected at most {num_experts}, the model's experts, got {max(static)}"
        )


def _given_null(name: str | None) -> Null | str | None:
    """What --null names: a Null, "normal" or None."""
    return name if name in (None, "normal") else Null.load(name)


def _null_for(
    model: Any, tokenizer: Any, given: Any, texts: list[str] | None, seed: int, files: SweepFiles
) -> tuple[Null | str, dict[str, Any]]:
    """(null, facts) for the sweep; a null that was fitted is one of the files.

    facts: null, its description; null_source, where it is from; null_code, what to give to
    `moeprof.patch` to have the same one.
    """
    if given == "normal":
        return given, {"null": NORMAL, "null_source": "", "null_code": '"normal"'}
    if given is not None:
        given.check(model)
        source = "It was read from a file."
        return given, {"null": given.describe(), "null_source": source, "null_code": ""}
    code = "moeprof.demo.null()"
    if texts is not None:
        from ..measure.fitting import fit_null
        from ..measure.passes import quick

        with quick(model):
            null = fit_null(model, tokenizer, texts, progress=sys.stderr.isatty())
        source = "It was fitted to the text given with --null-text."
    elif (shipped := shipped_null(model)) is not None:
        null = shipped
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
    if texts is not None or shipped_null(model) is None:
        files.null.parent.mkdir(parents=True, exist_ok=True)
        null.save(files.null)
        code = repr(str(files.null))
    return null, {"null": null.describe(), "null_source": source, "null_code": code}
