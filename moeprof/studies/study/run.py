"""study: a plan, then part after part, and a report of what there is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...files import as_csv, write_whole
from ...measure import machine
from ...models.quantized import described_dtype
from ...null.fitting import Form
from ..comparison.contenders import FORMS
from ..engine.engine import announce_store
from ..engine.serial import Serial
from ..grid import grid_frame, run_grid
from ..store.store import Store
from .calibration import read_nulls
from .costs import Costs
from .parts import MAKERS, Ground
from .plan import StudyPlan, in_words, plan
from .report import Results, write_report
from .settings import PARTS

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.engine import Engine
    from ..grid.settings import Grid
    from ..source import Source
    from .files import StudyFiles


def plan_study(ground: Ground, store: Store, console: Console) -> StudyPlan:
    """A StudyPlan, from a short measurement; nothing of the study is run.

    Before nulls are fitted, those of the measurement stand for them.
    """
    forms = [Form(*form) for form in FORMS.values()]
    costs = Costs(ground.model, ground.tokenizer, ground.heldout, forms, console)
    first = MAKERS["calibrate"](ground)
    with suppress(OSError, ValueError):
        if all(store.find(cell, first.work.subject) for cell in first.work.cells):
            ground.nulls = read_nulls(ground.files.of("nulls"))
    nulls = ground.nulls or dict(zip(FORMS, costs.nulls, strict=True))
    ground.nulls = nulls
    try:
        return plan([MAKERS[name](ground) for name in _parts(ground)], costs, store)
    finally:
        ground.nulls = {}


def study(ground: Ground, store: Store, engine: Engine | None, console: Console) -> Results:
    """Run the parts of a Ground, each into its folder, and write the report.

    What is finished stays in the store, where the same call finds it. A part that can't be run is
    said, and the others are run: ValueError at the end. When it is interrupted, the report is of
    what is finished, and KeyboardInterrupt goes on.
    """
    announce_store(console, store)
    planned = plan_study(ground, store, console)
    console.print(str(planned))
    run = _Run(ground, store, engine or Serial(), console, planned)
    try:
        for name in _parts(ground):
            run.part(name)
    finally:
        results = run.results()
        for path in write_report(results, ground.files.folder, console):
            console.print(f"Written: {path}")
    if failed := run.failed:
        raise ValueError(
            "; ".join(f"{name}: {why}" for name, why in failed.items())
            + "; the report has the other parts"
        )
    return results


def study_grid(
    grid: Grid,
    files: StudyFiles,
    store: Store,
    console: Console,
    *,
    engine: Callable[[Source], Engine] | None = None,
    command: str = "moeprof study",
    **source: Any,
) -> Results:
    """Run a grid on its own models, and write its table and the report.

    engine: as `run_grid` takes it; source: device and trust_remote_code, as Source has them.
    """
    begun = time.perf_counter()
    rows = run_grid(grid, store, engine, console, **source)
    path = files.of("grid") / "grid.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_csv(grid_frame(rows)))
    said = {"part": "grid", "words": grid.name, "cells": len(rows), "failed": None}
    said |= {"planned_seconds": None, "seconds": round(time.perf_counter() - begun, 1)}
    about: dict[str, Any] = {"model": ", ".join(grid.models), "bits": None, "dtype": grid.dtype}
    about |= {"seed": ", ".join(map(str, grid.seeds)), "command": command, "parts": [said]}
    results = Results(about | _where(store), grid=rows)
    for written in (path, *write_report(results, files.folder, console)):
        console.print(f"Written: {written}")
    return results


def _where(store: Store) -> dict[str, Any]:
    """The facts that are the same for all studies of this process."""
    about = machine.describe()
    return {
        "machine": about,
        "versions": about["versions"],
        "store": str(store.path),
        "peak_gb": machine.peak_memory() / 1e9,
    }


def _parts(ground: Ground) -> list[str]:
    """In the order in which they are run."""
    return [name for name in PARTS if name == "calibrate" or name in ground.settings.parts]


class _Run:
    """A study that is under way."""

    def __init__(
        self, ground: Ground, store: Store, engine: Engine, console: Console, planned: StudyPlan
    ) -> None:
        self.ground, self.store, self.engine, self.console = ground, store, engine, console
        self.planned = {part.name: part for part in planned.parts}
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.parts: list[dict[str, Any]] = []

    def part(self, name: str) -> None:
        planned, begun = self.planned[name], time.perf_counter()
        left = sum(one.seconds for at, one in self.planned.items() if at not in self._begun())
        number = f"{len(self.parts) + 1} of {len(self.planned)}"
        about = f"about {in_words(planned.seconds)}, and with all that follows {in_words(left)}"
        self.console.print(f"\n{name} (part {number}): {about}")
        said = {"part": name, "planned_seconds": planned.seconds, "failed": None}
        said |= {"cells": planned.cells, "finished_before": planned.finished}
        self.parts.append(said)
        try:
            part = MAKERS[name](self.ground)
            said["words"] = part.words
            self.found[name] = part.run(self.store, self.engine, self.console)
        except ValueError as error:
            if name == "calibrate":
                raise
            said["failed"] = self.failed[name] = str(error)
            self.console.print(f"{name} can't be run: {error}")
        finally:
            said["seconds"] = round(time.perf_counter() - begun, 1)

    def _begun(self) -> list[str]:
        return [part["part"] for part in self.parts]

    def results(self) -> Results:
        ground, found = self.ground, self.found
        facts = {
            "model": ground.name,
            "bits": ground.bits,
            "dtype": described_dtype(ground.model),
            "command": ground.command,
            "seed": ground.settings.seed,
            "parts": self.parts,
        } | _where(self.store)
        parts: Mapping[str, Any] = {name: found.get(name) for name in PARTS[1:]}
        return Results(facts, dict(ground.nulls), **parts)
