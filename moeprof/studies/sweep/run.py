"""The sweep: every configuration in turn, with what is finished kept on disk."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ...backends.cpu import cpu_info
from ...checks import check_type
from ...models.blocks import experts_of, model_sizes, own_top_k
from ...models.quantized import described_dtype
from ...show.console import fill, make_console, progress, width
from ...show.tables import fine, table
from ...version import __version__
from ..budget.stock import budget_text
from ..engine.engine import Listener, announce
from ..engine.serial import Serial
from ..store.store import Store
from .advice import advice, caution
from .compared import compared
from .files import SweepFiles
from .grid import ALPHAS, MAX_KS, configurations, dropped_max_ks
from .merged import merged, same_results
from .plots import figure
from .report import report
from .runner import Experiment, row_of
from .work import SweepWork

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ...show.console import Bar
    from ...texts.windows import HeldOut
    from ..engine.engine import Engine
    from ..store.cells import Cell
    from .grid import Configuration


def sweep(
    experiment: Experiment,
    files: SweepFiles | str | os.PathLike[str],
    facts: dict[str, Any],
    console: Console | None = None,
    *,
    alphas: Sequence[float] = ALPHAS,
    max_ks: Sequence[int] = MAX_KS,
    static: Iterable[int] | None = None,
    calibration: HeldOut | None = None,
    store: Store | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Run all configurations that fit the model and write `SweepFiles`.

    experiment: Experiment; files: SweepFiles, or the path of a folder; facts: a dict that goes
    into the JSON as it is: model, seed, null, null_source (both in words) and null_code (what to
    give to `moeprof.patch`); console: a rich Console; alphas, max_ks: the grid; static: the values
    of k that static top-k is run with, 1 to the model's own when not given; calibration: HeldOut,
    the text that budgets are set on, shipped calibration text when not given; store: a Store,
    `files.store` when not given; engine: what runs the cells, this process when not given.
    Returns the run: a dict as in the JSON. When it is interrupted, what is finished stays in the
    store, where the same call finds it, and KeyboardInterrupt goes on to the caller. The model is
    unpatched in every case.
    ValueError for a k that the model hasn't as many experts for, or a grid without BH.
    """
    check_type("sweep: experiment", experiment, Experiment, "an Experiment")
    files = files if isinstance(files, SweepFiles) else SweepFiles(files)
    console = console or make_console()
    num_experts = experts_of(experiment.model)[0]
    if calibration is None:
        calibration = budget_text(experiment.tokenizer, facts["seed"])
    work = sweep_work(experiment, calibration, alphas, max_ks, static)
    planned = work.configurations
    run = describe(experiment, planned, dropped_max_ks(num_experts, max_ks)) | facts
    run["dropped_configurations"] = len(run["dropped_max_k"]) * len(alphas)
    run |= {"budget_tokens": calibration.tokens, "finished": False}
    run |= {"results": [], "static": [], "budgets": [], "from_store": 0}
    console.print(f"Total configurations: {len(planned)}")
    for max_k in run["dropped_max_k"]:
        console.print(f"Left out: max_k {max_k}, the model has {num_experts} experts")
    try:
        with (
            Store(files.store) if store is None else nullcontext(store) as store,
            progress(console, sum(map(work.steps, work.cells)), "sweep", "texts") as bar,
        ):
            announce(console, store, work)
            said = _Said(run, work, files, console, bar)
            (engine or Serial()).run(work, work.cells, store, said.listener())
            run["finished"] = True
    except KeyboardInterrupt:
        console.print(f"Interrupted: {len(run['results'])} of {len(planned)} are finished")
        if run["results"]:
            _finish(run, files, console)  # saves too: it may be saving that was interrupted
        raise
    console.print("ALL EXPERIMENTS COMPLETE!")
    return _finish(run, files, console)


def sweep_work(
    experiment: Experiment,
    calibration: HeldOut,
    alphas: Sequence[float] = ALPHAS,
    max_ks: Sequence[int] = MAX_KS,
    static: Iterable[int] | None = None,
) -> SweepWork:
    """What `sweep` runs, of its arguments."""
    num_experts, top_k = experts_of(experiment.model)
    planned = configurations(num_experts, top_k, alphas, max_ks)
    return SweepWork(experiment, planned, _static(static, num_experts, top_k), calibration)


def _static(ks: Iterable[int] | None, num_experts: int, top_k: int) -> list[int]:
    """Ascending; the model's own k is the baseline already, so it isn't run again."""
    ks = range(1, top_k + 1) if ks is None else ks
    for k in ks:
        if not 1 <= k <= num_experts:
            raise ValueError(f"static: expected k from 1 to the {num_experts} experts, got {k}")
    return sorted(set(ks) - {top_k})


class _Said:
    """What is printed and saved as the cells are finished, in whatever order they are."""

    def __init__(
        self,
        run: dict[str, Any],
        work: SweepWork,
        files: SweepFiles,
        console: Console,
        bar: Bar,
    ) -> None:
        self.run, self.work, self.files = run, work, files
        self.console, self.bar = console, bar
        self.found: dict[str, dict[str, Any]] = {}
        self.places = {cell.name: number for number, cell in enumerate(work.grid, start=1)}

    def listener(self) -> Listener:
        return Listener(self.begin, self.done, self.bar.step, self.console.print)

    def begin(self, cell: Cell) -> None:
        self.bar.note(cell.name)
        if cell.name in self.places:
            self.console.print(f"{self._place(cell)} Running: {cell.name}")

    def done(self, cell: Cell, result: dict[str, Any], ran: bool) -> None:
        self.found[cell.name] = result
        self.run["from_store"] += not ran
        rows_of(self.run, self.work, self.found)
        if cell.name not in self.places:
            return
        if ran:
            self.console.print(f"Completed in {result['seconds']:.1f}s")
        else:
            self.console.print(f"{self._place(cell)} In the store: {cell.name}")
        self.console.print(f"Avg experts: {result['avg_experts']:.2f}")
        if self.run["results"]:
            self.files.save_results(self.run)

    def _place(self, cell: Cell) -> str:
        return f"[{self.places[cell.name]}/{len(self.places)}]"


def rows_of(run: dict[str, Any], work: SweepWork, found: Mapping[str, dict[str, Any]]) -> None:
    """Write into `run` what is `found` of the cells, in their order: nothing before the baseline,
    which all rows of the grid are compared with."""
    top_k = own_top_k(work.experiment.model)
    baseline = found.get(work.grid[0].name)
    pairs = list(zip(work.configurations, work.grid, strict=True))
    run["results"] = [
        row_of(configuration, found[cell.name], baseline, top_k)
        for configuration, cell in pairs
        if cell.name in found and baseline is not None
    ]
    run["static"] = [
        {"config": cell.name, "k": k, **found[cell.name]}
        for k, cell in zip(work.ks, work.static, strict=True)
        if cell.name in found
    ]
    run["budgets"] = [
        {"config": cell.name, **found[cell.name]} for cell in work.budgets if cell.name in found
    ]


def _finish(run: dict[str, Any], files: SweepFiles, console: Console) -> dict[str, Any]:
    """Intervals, advice, report and figure from what is there, and the tables on the console."""
    run = compared(run)
    run = run | {"advice": advice(run)}
    files.save_results(run)
    files.save_report(report(run), figure(run["results"], run))
    if words := caution(run):
        console.print("")
        console.print(fill(words))
    for item in run["advice"]:
        console.print("")
        console.print(fill(item["head"]))
        if item["code"]:
            console.print(f"    {item['code']}")
        for other in item["others"]:
            console.print(fill(other, "  - ", "    "))
    console.print("")
    groups = merged(run["results"])
    console.print(_table(groups), width=width(console))
    console.print(fill(COLUMNS))
    for line in same_results(groups):
        console.print(fill(line))
    for path in (files.json, files.csv, files.quality, files.report, files.figure):
        console.print(f"Written: {path}")
    return run


COLUMNS = (
    "Experts: per token and layer on the held-out text; prompts: while it answers the prompts. "
    "Perpl., bits/B: perplexity per token, and bits per byte, of the held-out text; Δ static: bits "
    "per byte above static top-k with as many experts. Bands: 95 %, all settings together; better "
    "and worse go by them. Agree: share of the answers' tokens that are those of the model's own "
    "routing. Tok/s: decoding, one run each."
)


def _table(groups: list[tuple[str, list[dict[str, Any]]]]) -> Table:
    """The main columns, 80 wide with the usual names; equal results share a row."""
    beside = [row["bits_above_static"] for _, (row, *_) in groups]
    form = fine(*(value for value in beside if value is not None))
    columns = {
        "experts": ("avg_experts_heldout", "{:.2f}"),
        "prompts": ("avg_experts", "{:.2f}"),
        "perpl.": ("perplexity", "{:.2f}"),
        "bits/B": ("bits_per_byte", "{:.4f}"),
        "Δ static": ("bits_above_static", f"{{:{form}}}"),
        "agree": ("token_agreement", "{:.2f}"),
        "tok/s": ("tokens_per_s", "{:.1f}"),
    }
    forms = {name: form for name, (_, form) in columns.items()}
    rows = ((name, *(group[0][key] for key, _ in columns.values())) for name, group in groups)
    return table({"config": "{}"} | forms, rows)


def describe(
    experiment: Experiment, planned: Sequence[Configuration], dropped: list[int]
) -> dict[str, Any]:
    """What was run, on what and how: everything in the JSON but the results."""
    import torch

    model = experiment.model
    packages = ("torch", "transformers", "numpy")
    prompts = zip(experiment.complexities, experiment.prompts, strict=True)
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "planned": [configuration.name for configuration in planned],
        "dropped_max_k": dropped,
        "versions": {
            "moeprof": __version__,
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
        },
        "model_config": model_sizes(model),
        "dtype": described_dtype(model),
        "cpu": cpu_info(),
        "threads": torch.get_num_threads(),
        "new_tokens": experiment.new_tokens,
        "prompts": [{"complexity": label, "text": text} for label, text in prompts],
        "heldout_tokens": experiment.heldout.tokens,
        "heldout_documents": experiment.heldout.documents,
    }
