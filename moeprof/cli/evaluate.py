"""The arguments of `moeprof evaluate`, and the command itself."""

from __future__ import annotations

import argparse
import shlex

from ..files import check_folder
from ..routers import REGISTRY
from ..routers.written import FORM, written_router
from ..texts.windows import BUDGET_TOKENS, HELDOUT_TOKENS
from . import options

# Of the options that the result depends on; --router may be there several times.
DEFAULTS = {
    **options.OF_MODEL,
    "null": None,
    "text": None,
    "tokens": HELDOUT_TOKENS,
    "context": None,
    "stride": None,
    "budget_tokens": BUDGET_TOKENS,
    "seed": 0,
}


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof evaluate`."""
    parser.description = (
        "Perplexity, bits per byte, and KL and agreement with the model's own routing, "
        "on any text, by domain and complexity, with intervals and paired tests."
    )
    options.add_study_options(parser)
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        type=_router,
        metavar="ROUTER",
        dest="routers",
        help=f"{FORM}; one of {', '.join(sorted(REGISTRY))}; may be given several times, and the "
        "model's own routing always comes first",
    )
    options.add_null_of_routers(parser)
    options.add_heldout_text(parser)
    options.add_number(parser, "--tokens", HELDOUT_TOKENS, "about so many are scored", 1, 10**8)
    parser.add_argument(
        "--context",
        type=options.integer(2, 10**7),
        metavar="N",
        help="tokens of a window; default: 2048, or as many positions as the model has",
    )
    parser.add_argument(
        "--stride",
        type=options.integer(1, 10**7),
        metavar="N",
        help="tokens from the start of a window to that of the next; with fewer than --context "
        "every token has more before it, and more is computed; default: --context",
    )
    options.add_budget_tokens(parser, BUDGET_TOKENS)
    options.add_seed(parser, "chooses the windows, the bootstrap draws and the sign flips")
    parser.set_defaults(run=_run)


def _router(text: str) -> str:
    try:
        written_router(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..show.console import make_console
    from ..studies.evaluation import evaluate
    from ..studies.store.store import store_path

    null = options.given_null(arguments)
    texts = options.given_documents(arguments)
    options.check_named_model(arguments)
    check_folder(arguments.out)
    engine = options.engine_of(arguments)
    model, tokenizer = options.load(arguments)
    found = evaluate(
        model,
        tokenizer,
        arguments.routers,
        texts=texts,
        null=null,
        context=arguments.context,
        stride=arguments.stride,
        tokens=arguments.tokens,
        budget_tokens=arguments.budget_tokens,
        seed=arguments.seed,
        store=store_path(arguments.out, arguments.store),
        engine=engine,
    )
    routers = [word for router in arguments.routers for word in ("--router", router)]
    command = options.command_of(arguments, DEFAULTS)
    found.facts["command"] = " ".join([command, shlex.join(routers)]).rstrip()
    paths = found.save(arguments.out)
    console = make_console()
    console.print(found.summary())
    for path in paths:
        console.print(f"Written: {path}")
