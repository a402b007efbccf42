"""The arguments of `moeprof eval-harness`, and the command itself."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from ..studies.harness.tasks import Tasks


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof eval-harness`."""
    options.add_model(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="names that lm-evaluation-harness knows, also with commas between, YAML files of "
        "tasks, or folders of these",
    )
    parser.add_argument(
        "--router",
        action="append",
        default=[],
        dest="routers",
        metavar="ROUTER",
        help="run the tasks with this router too: bh:alpha=0.3,max_k=16, or bh@6 for 6 experts per "
        "token on average; may be given several times. The model's own always runs first",
    )
    options.add_null_of_routers(parser)
    parser.add_argument(
        "--limit",
        type=options.integer(1),
        metavar="N",
        help="first documents of each task; default: all",
    )
    parser.add_argument(
        "--num-fewshot",
        type=options.integer(0, 1000),
        metavar="N",
        help="examples before each question; default: as the task says. A task that says 0 keeps "
        "it",
    )
    requests = "requests in one call of the model; it doesn't change the results"
    options.add_number(parser, "--batch-size", 8, requests, 1, 4096)
    options.add_out(parser, "results")
    options.add_store(parser)
    options.add_engine(parser)
    options.add_seed(parser, "chooses the examples before the questions, and the bootstrap draws")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..routers.written import written_router
    from ..show.console import make_console
    from ..studies.configuration import Configuration, null_for
    from ..studies.harness.report import HarnessFiles
    from ..studies.harness.run import run_harness
    from ..studies.harness.tasks import Tasks
    from ..studies.harness.work import HarnessWork
    from ..studies.store.store import Store, store_path

    written = {text: written_router(text) for text in arguments.routers}
    null = options.given_null(arguments)
    options.check_named_model(arguments)
    files = HarnessFiles(arguments.out)
    engine = options.engine_of(arguments)
    tasks = Tasks(_specs(arguments.tasks), arguments.num_fewshot, arguments.seed)
    model, tokenizer = options.load(arguments)
    configurations = [
        Configuration(
            text, router, budget, null_for(router, model, tokenizer, null, seed=arguments.seed)
        )
        for text, (router, budget) in written.items()
    ]
    asked = {"limit": arguments.limit, "batch_size": arguments.batch_size}
    work = HarnessWork(model, tokenizer, tasks, configurations, **asked)
    with Store(store_path(arguments.out, arguments.store)) as store:
        run_harness(work, store, files, _facts(arguments, model, tasks), make_console(), engine)


def _specs(words: list[str]) -> list[str]:
    """Names and paths; commas separate names, but a path may have them."""
    return [s for w in words for s in ([w] if Path(w).exists() else w.split(",")) if s.strip()]


def _facts(arguments: argparse.Namespace, model: Any, tasks: Tasks) -> dict[str, Any]:
    """What the files say of model, machine and settings."""
    from importlib.metadata import version

    from ..measure import machine
    from ..models.quantized import described_dtype

    return {
        "model": options.model_name(arguments),
        "weights": described_dtype(model),
        "tasks": list(tasks.loaded),
        "limit": arguments.limit or "all documents",
        "null": arguments.null or "the default of each router",
        "seed": arguments.seed,
        "machine": machine.describe(),
        "lm_eval": version("lm_eval"),
    }
