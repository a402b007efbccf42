"""The arguments of `moeprof compare`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..studies.comparison.plan import TABLES
from ..studies.comparison.splits import TEST_TOKENS
from ..texts.windows import BUDGET_TOKENS
from . import options

if TYPE_CHECKING:
    from ..null.model import Null
    from ..studies.comparison.contenders import Contender
    from ..studies.comparison.work import Comparison
    from ..texts.documents import Text


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof compare`."""
    options.add_study_options(parser)
    options.add_names(
        parser,
        "--routers",
        "these only, as the tables name them: bh, bh (trimmed), hc (p), ...; the name of a router "
        "with several options, such as higher_criticism, stands for all of them; default: all",
    )
    options.add_integers(
        parser,
        "--budgets",
        "B",
        "experts per token; default: 2 to k - 1 (table reduction) and 2 to k (table wide)",
    )
    options.add_names(
        parser,
        "--tables",
        "reduction (a token gets k experts at most), wide (2 k); default: both",
        TABLES,
        "NAME,NAME",
    )
    parser.add_argument(
        "--quantized",
        type=_bits,
        metavar="BITS,BITS",
        help="beside them the model's own top-k with experts in 8 and 4 bits, by bytes that a "
        "token reads; 8 or 4 for one of them, none to leave this out; default: 8,4, and none "
        "with --bits",
    )
    options.add_documents(
        parser,
        "your own text in place of the shipped one, split by document into what fits the nulls, "
        "sets the budgets and tests",
    )
    held_out = "held-out tokens of the test; shipped are 128 documents, a window of 128 from each"
    options.add_number(parser, "--tokens", TEST_TOKENS, held_out, 256, 10**6)
    options.add_budget_tokens(parser, BUDGET_TOKENS)
    options.add_null(
        parser,
        "a null of `moeprof calibrate` (efron, on logprob, one per layer: what the tables "
        "call efron); it must not have seen the other texts; default: the demo model's own, else "
        "fitted first",
    )
    options.add_seed(parser, "of the windows, the controls and the bootstrap")
    parser.set_defaults(run=_run)


BITS = (4, 8)
# Of the options that the result depends on.
DEFAULTS = {
    **options.OF_MODEL,
    "routers": None,
    "budgets": None,
    "tables": TABLES,
    "quantized": None,
    "text": None,
    "tokens": TEST_TOKENS,
    "budget_tokens": BUDGET_TOKENS,
    "null": None,
    "seed": 0,
}


def _bits(text: str) -> tuple[int, ...]:
    """Those of "8,4", ascending; () for "none"."""
    bits = () if text.strip() == "none" else options.integers(text)
    if not set(bits) <= set(BITS):
        raise argparse.ArgumentTypeError(f"expected 8, 4, both or none, got {text!r}")
    return bits


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..null import Null
    from ..show.console import make_console
    from ..studies.comparison.compare import compare
    from ..studies.comparison.contenders import choose_contenders
    from ..studies.comparison.files import ComparisonFiles
    from ..studies.comparison.splits import demo_documents, split_documents
    from ..texts.documents import read_documents

    for name in arguments.tables or [""]:
        if name not in TABLES:
            raise ValueError(f"--tables: expected some of {', '.join(TABLES)}, got {name!r}")
    _quantized(arguments)
    contenders = choose_contenders(arguments.routers)
    documents: Mapping[str, Sequence[Text]]
    if arguments.text is None:
        documents = demo_documents()
    else:
        documents = split_documents(read_documents(arguments.text))
    null = None if arguments.null is None else _efron(Null.load(arguments.null))
    options.check_named_model(arguments)
    files = ComparisonFiles(arguments.out, arguments.store)
    engine = options.engine_of(arguments)
    model, tokenizer = options.load(arguments)
    comparison = _comparison(arguments, model, tokenizer, contenders, documents, null)
    console = make_console()
    compare(comparison, files, _facts(arguments, model), console, engine=engine)


def _efron(null: Null) -> Null:
    """The null, if it is what all tables and sentences say of it."""
    if (null.kind, null.score, null.alpha_min) != ("efron", "logprob", None):
        each = " per expert" if null.alpha_min is not None else ""
        raise ValueError(
            "--null: expected an efron null on logprob, one per layer, as the tables name it; "
            f"got {null.kind} on {null.score}{each}"
        )
    return null


def _comparison(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    contenders: list[Contender],
    documents: Mapping[str, Sequence[Text]],
    null: Null | None,
) -> Comparison:
    from .. import demo
    from ..models.blocks import experts_of
    from ..models.tokens import prompt_ids
    from ..studies.comparison.contenders import EFRON, Nulls
    from ..studies.comparison.plan import plan_tables
    from ..studies.comparison.splits import make_splits
    from ..studies.comparison.work import Comparison

    num_experts, top_k = experts_of(model)
    plans = plan_tables(top_k, num_experts, arguments.tables, arguments.budgets)
    splits = make_splits(
        tokenizer,
        documents,
        budget_tokens=arguments.budget_tokens,
        tokens=arguments.tokens,
        seed=arguments.seed,
    )
    if null is None and arguments.model is None and arguments.text is None:
        null = demo.null("efron")
    if null is not None:
        null.check(model)
    given = {} if null is None else {EFRON: null}
    nulls = Nulls(model, tokenizer, documents["null"], given)
    prompts = [prompt_ids(tokenizer, text) for _, text in demo.prompts()]
    # One of each kind: simple, medium, complex, technical.
    few = prompts[::3]
    seed, bits = arguments.seed, _quantized(arguments)
    return Comparison(model, splits, nulls, contenders, plans, few, seed, bits)


def _quantized(arguments: argparse.Namespace) -> tuple[int, ...]:
    if arguments.bits is None:
        return BITS if arguments.quantized is None else arguments.quantized
    if arguments.quantized:
        raise ValueError("--quantized: with --bits the model's experts are quantised already")
    return ()


def _facts(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """What the JSON says of machine, model and command."""
    from ..measure import machine
    from ..models.blocks import model_sizes
    from ..models.quantized import described_dtype

    return {
        "command": options.command_of(arguments, DEFAULTS),
        "machine": machine.describe(),
        "model": options.model_name(arguments),
        "dtype": described_dtype(model),
        "model_config": model_sizes(model),
        "test_tokens": arguments.tokens,
        "budget_tokens": arguments.budget_tokens,
    }
