"""The arguments of `moeprof diagnose`, and the command itself."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from ..demo.defaults import default_null
from ..files import check_folder
from ..show.console import make_console
from ..texts.windows import HELDOUT_TOKENS
from . import options

ALPHA, POSITIONS = 0.3, 1000


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof diagnose`."""
    options.add_model(parser)
    options.add_null(
        parser,
        'a null of `moeprof calibrate`, "normal" or "softmax"; default: an efron null on '
        "logprob, the demo model's own or fitted first",
    )
    parser.add_argument(
        "--alpha", type=_alpha, default=ALPHA, metavar="A", help="of BH, in (0, 1); default: 0.3"
    )
    parser.add_argument(
        "--min-k", type=options.integer(1, 1024), default=1, metavar="K", help="default: 1"
    )
    parser.add_argument(
        "--max-k",
        type=options.integer(1, 1024),
        metavar="K",
        help="default: 16, or all experts if fewer",
    )
    options.add_number(
        parser,
        "--positions",
        POSITIONS,
        "positions at which experts are ablated, 0 for none",
        0,
        10**6,
    )
    options.add_number(parser, "--tokens", HELDOUT_TOKENS, "of the held-out text", 1, 10**6)
    options.add_heldout_text(parser)
    parser.add_argument(
        "--out",
        type=options.folder,
        metavar="DIR",
        help="write diagnosis.json, .csv, .md and figures there",
    )
    options.add_store(parser, ", and nothing is kept without --out")
    options.add_seed(parser, "chooses the windows, the positions and the experts that are added")
    parser.set_defaults(run=_run)


def _alpha(text: str) -> float:
    if (value := options.level(text)) is None:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1), got {text}")
    return value


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..models.blocks import fewest_experts, runnable_blocks
    from ..routers import BH
    from ..studies.diagnosis import diagnose
    from ..studies.store.store import Store, store_path

    null = options.given_null(arguments)
    texts = options.given_documents(arguments)
    options.check_named_model(arguments)
    if arguments.out is not None:
        check_folder(arguments.out)
    router = BH(arguments.alpha, min_k=arguments.min_k, max_k=arguments.max_k)
    model, tokenizer = options.load(arguments)
    runnable_blocks(model)  # raises where the model can't be patched
    router.limits(fewest_experts(model))  # raises where the router doesn't fit the model
    if null is None:
        null = default_null(model, tokenizer, seed=arguments.seed, kind="efron")
    with ExitStack() as stack:
        store = None
        if arguments.out is not None or arguments.store is not None:
            store = stack.enter_context(Store(store_path(arguments.out or "", arguments.store)))
        found = diagnose(
            null,
            model,
            tokenizer,
            router=router,
            positions=arguments.positions,
            tokens=arguments.tokens,
            seed=arguments.seed,
            texts=texts,
            store=store,
        )
    paths = [] if arguments.out is None else found.save(arguments.out)
    console = make_console()
    console.print(found.summary())
    console.print(f"{found.facts['seconds']:.0f} s on {found.facts['machine']['cpu']}")
    for path in paths:
        console.print(f"Written: {path}")
