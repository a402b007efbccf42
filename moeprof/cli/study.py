"""The arguments of `moeprof study`, and the command itself."""

from __future__ import annotations

import argparse

from ..show.console import make_console
from ..studies.comparison.plan import REDUCTION, TABLES
from ..studies.comparison.splits import TEST_TOKENS
from ..studies.study.settings import PARTS, POSITIONS, Settings
from ..texts.windows import BUDGET_TOKENS, CALIBRATION_CHARACTERS
from . import options

# Of the options that the result depends on.
DEFAULTS = {
    "model": None,
    "bits": None,
    "dtype": "float32",
    "device": "cpu",
    "trust_remote_code": False,
    "threads": None,
    "grid": None,
    "parts": PARTS,
    "budgets": None,
    "routers": None,
    "tables": (REDUCTION,),
    "text": None,
    "tokens": TEST_TOKENS,
    "budget_tokens": BUDGET_TOKENS,
    "null_characters": CALIBRATION_CHARACTERS,
    "positions": POSITIONS,
    "seed": 0,
}
BESIDE_GRID = ("grid", "device", "trust_remote_code", "threads")


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof study`."""
    parser.description = (
        "The whole experiment on one model, into one store and one report. It tells "
        "first how long it will take, and goes on where it was stopped."
    )
    options.add_study_options(parser, "study")
    parser.add_argument(
        "--grid",
        metavar="FILE",
        help="run a grid in place of the parts, on the models, texts and seeds that it names: a "
        "TOML file, or one that ships, bh-21, bh-20-later or equal-budget",
    )
    parser.add_argument(
        "--plan",
        action="store_true",
        help="only say what it takes: cells, tokens, time, memory, from a short measurement",
    )
    options.add_names(
        parser,
        "--parts",
        f"some of {', '.join(PARTS)}; calibrate is always run; default: all",
        PARTS,
        "PART,PART,...",
    )
    options.add_integers(
        parser,
        "--budgets",
        "B",
        "experts per token that routers are compared at; default: half and three quarters of "
        "the model's own k, which is 4 and 6 of 8",
    )
    options.add_names(
        parser,
        "--routers",
        "the part compare has these only, named as `moeprof compare` takes them; default: all",
    )
    options.add_names(
        parser,
        "--tables",
        f"of the comparison, {', '.join(TABLES)}: a token gets the model's own k at most, or "
        "twice that; default: reduction",
        (REDUCTION,),
        "NAME,NAME",
    )
    options.add_heldout_text(parser)
    options.add_number(
        parser, "--tokens", TEST_TOKENS, "of the held-out text, that a part reads", 2, 10**8
    )
    options.add_budget_tokens(parser, BUDGET_TOKENS)
    options.add_number(
        parser,
        "--null-characters",
        CALIBRATION_CHARACTERS,
        "of the shipped calibration text, that nulls are fitted to",
        1000,
        10**9,
    )
    options.add_number(
        parser,
        "--positions",
        POSITIONS,
        "at most where experts are ablated, 0 for none",
        0,
        10**6,
    )
    options.add_seed(parser, "of the windows, the controls and the bootstrap")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..studies.comparison.contenders import choose_contenders
    from ..studies.store.store import Store
    from ..studies.study.files import StudyFiles
    from ..studies.study.parts import Ground
    from ..studies.study.run import plan_study, study

    if arguments.grid is not None:
        return _run_grid(arguments)
    settings = Settings(
        parts=arguments.parts,
        documents=options.given_documents(arguments),
        sources=arguments.text or (),
        tokens=arguments.tokens,
        budgets=arguments.budgets,
        budget_tokens=arguments.budget_tokens,
        null_characters=arguments.null_characters,
        routers=arguments.routers,
        tables=arguments.tables,
        positions=arguments.positions,
        seed=arguments.seed,
    )
    choose_contenders(settings.routers)  # raises for an unknown one
    options.check_named_model(arguments)
    files = StudyFiles(arguments.out, arguments.store)
    engine = options.engine_of(arguments)
    model, tokenizer = options.load(arguments)
    ground = Ground(
        model,
        tokenizer,
        settings,
        files,
        options.model_name(arguments),
        arguments.bits,
        command=options.command_of(arguments, DEFAULTS),
    )
    console = make_console()
    with Store(files.store) as store:
        if arguments.plan:
            console.print(str(plan_study(ground, store, console)))
        else:
            study(ground, store, engine, console)


def _run_grid(arguments: argparse.Namespace) -> None:
    from ..studies.grid import Grid
    from ..studies.store.store import Store
    from ..studies.study.files import StudyFiles
    from ..studies.study.run import study_grid

    if arguments.plan:
        raise ValueError("--plan tells of the parts; a grid says what it runs as it begins")
    for name, default in DEFAULTS.items():
        if name not in BESIDE_GRID and getattr(arguments, name) != default:
            raise ValueError(f"--{name.replace('_', '-')}: with --grid the file says that")
    grid = Grid.read(arguments.grid)
    options.set_threads(arguments)
    files = StudyFiles(arguments.out, arguments.store)
    options.engine_of(arguments)  # raises for options that belong to another
    with Store(files.store) as store:
        study_grid(
            grid,
            files,
            store,
            make_console(),
            engine=lambda source: options.engine_of(arguments, source),
            command=options.command_of(arguments, DEFAULTS),
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
        )
