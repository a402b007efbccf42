"""study: a plan, then part after part, and a report of what there is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...checks import check_model, check_tokenizer, check_type, described, nearest
from ...files import as_csv, write_whole
from ...measure import machine
from ...measure.fitting import Form
from ...models.identity import model_name
from ...models.quantized import described_dtype
from ...patching.state import is_patched
from ...show.console import make_console
from ...texts.documents import read_texts
from ..comparison.contenders import FORMS, choose_contenders
from ..engine.engine import announce_store
from ..engine.serial import Serial
from ..grid import grid_frame, run_grid
from ..store.store import Store
from ..store.subject import unchanged
from .costs import Costs
from .files import StudyFiles, finished
from .parts import MAKERS, Ground, calibration_of
from .plan import PlannedPart, StudyPlan, in_words, plan_part
from .report import Results, write_report
from .report.verdict import section
from .settings import PARTS, Settings

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ...checks import Tokenizer
    from ...null.model import Null
    from ..engine.engine import Engine
    from ..grid.settings import Grid
    from ..source import Source


def plan_study(ground: Ground, store: Store, console: Console) -> StudyPlan:
    """A StudyPlan of what was asked for, and of what is finished; nothing of the study is run.

    Times are of a short measurement; before nulls are fitted, those of it stand for them.
    ValueError for budgets that the model can't have.
    """
    _ = ground.budgets
    with unchanged(ground.model), _nulls_kept(ground):
        try:
            forms = [Form(*form) for form in FORMS.values()]
            windows = [*ground.heldout.windows, *ground.calibration.windows]
            read = windows, ground.passages
            costs = Costs(ground.model, ground.tokenizer, *read, forms, console)
            ground.nulls = _fitted(ground, store) or dict(zip(FORMS, costs.nulls, strict=True))
        except ValueError as error:
            return StudyPlan([PlannedPart(name, failed=str(error)) for name in asked(ground)])
        parts = [_planned(name, ground, costs, store) for name in PARTS]
        return StudyPlan([p for p in parts if p.name in asked(ground) or p.is_done])


@contextmanager
def _nulls_kept(ground: Ground) -> Iterator[None]:
    """The nulls of a Ground are afterwards as they were."""
    before = ground.nulls
    try:
        yield
    finally:
        ground.nulls = before


def _fitted(ground: Ground, store: Store) -> dict[str, Null] | None:
    """The nulls, where they are fitted already."""
    work = calibration_of(ground)
    return None if finished(work, store) is None else work.read()


def _planned(name: str, ground: Ground, costs: Costs, store: Store) -> PlannedPart:
    try:
        return plan_part(MAKERS[name](ground), costs, store)
    except ValueError as error:
        return PlannedPart(name, failed=str(error))


def asked(ground: Ground) -> list[str]:
    """The parts in the order in which they are run; others need the nulls of calibrate."""
    return [name for name in PARTS if name == "calibrate" or name in ground.settings.parts]


def run_study(
    model: nn.Module,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str] = "study",
    *,
    texts: Iterable[Any] | None = None,
    **settings: Any,
) -> Results:
    """Run `moeprof study`, or some of its parts, on a model and write its report.

    What is finished stays in the folder's store, where the same call finds it.

    Parameters
    ----------
    model : torch.nn.Module
        It is afterwards as it was.
    tokenizer : callable
        As transformers has them.
    folder : str or path
        A folder for each part, the report, the store.
    texts : list of str, or of objects with .text and .domain, optional
        The held-out documents; the shipped ones unless given.
    **settings
        Fields of `moeprof.studies.study.settings.Settings`: ``parts`` ("profile", "sweep",
        "compare", "diagnose", "evaluate"; all unless given), ``routers``, ``budgets``,
        ``tokens``, ``seed`` and so on.

    Returns
    -------
    Results
        What each part measured: ``sweep`` and ``compare`` dicts as in their JSON files,
        ``diagnose``, ``evaluate``, ``profile``; None for a part that was not run.

    Raises
    ------
    TypeError
        A setting that isn't one, or a list or a number that isn't.
    ValueError
        A part or router that isn't one; a model that is patched; a part that can't be run on the
        model, once the others are finished: they are in the report and the store.
    """
    check_model("run_study", model)
    check_tokenizer("run_study", tokenizer)
    if any(map(is_patched, model.modules())):
        raise ValueError(
            "run_study: the model is patched; expected it with its own routing, which all is "
            "compared with: moeprof.unpatch(model) first"
        )
    documents = None if texts is None else read_texts(texts, "texts")
    _check_settings(settings)
    asked_for = Settings(documents=documents, **settings)
    choose_contenders(asked_for.routers)  # raises for an unknown one
    files, name = StudyFiles(folder), model_name(model)
    ground = Ground(model, tokenizer, asked_for, files, name, command="moeprof.studies.run_study")
    with Store(files.store) as store:
        return study(ground, store, None, make_console())


def _check_settings(settings: Mapping[str, Any]) -> None:
    """TypeError for a name, a list or a whole number that isn't one."""
    known: dict[str, Any] = {each.name: each.default for each in fields(Settings)}
    for name in ("documents", "sources"):  # `texts`
        del known[name]
    for name, value in settings.items():
        if name not in known:
            raise TypeError(f"run_study: there is no setting {name!r}; {nearest(name, known)}")
        expected = f"run_study: {name}: expected"
        if isinstance(known[name], int):
            least = 0 if name == "seed" else 2
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise TypeError(f"{expected} a whole number from {least} on, got {value!r}")
        elif value is not None or known[name] is not None:
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise TypeError(f"{expected} a list, got {described(value)}")
            kind, word = (int, "whole numbers") if name == "budgets" else (str, "names")
            for one in value:
                check_type(f"run_study: {name}", one, kind, word)


def study(ground: Ground, store: Store, engine: Engine | None, console: Console) -> Results:
    """Run the parts of a Ground, each into its folder, and write the report.

    What is finished stays in the store, where the same call finds it; parts that weren't asked for
    are in the report, too, where all of their cells are finished. A part that can't be run is
    said, and the others are run: ValueError at the end. When it is interrupted, the report is of
    the parts that are finished, and KeyboardInterrupt goes on.
    """
    begun = machine.describe()
    announce_store(console, store)
    with unchanged(ground.model):
        planned = plan_study(ground, store, console)
        console.print(str(planned))
        run = _Run(ground, store, engine or Serial(), console, planned, begun)
        try:
            for part in planned.parts:
                run.part(part)
        finally:
            results = run.results()
            paths = write_report(results, ground.files.folder, console)
            console.print("\nThe verdict, which begins the report:")
            for sentence in section(results).sentences:
                console.print(f"- {sentence.text}")
            for path in paths:
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
    about_machine, begun = machine.describe(), time.perf_counter()
    rows = run_grid(grid, store, engine, console, **source)
    path = files.of("grid") / "grid.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, as_csv(grid_frame(rows)))
    said = {"part": "grid", "words": grid.name, "cells": len(rows), "failed": None}
    said |= {"planned_seconds": None, "seconds": round(time.perf_counter() - begun, 1)}
    about: dict[str, Any] = {"model": ", ".join(grid.models), "dtype": grid.dtype}
    about |= {"seed": ", ".join(map(str, grid.seeds)), "command": command, "parts": [said]}
    results = Results(about | _where(store, about_machine), grid=rows)
    for written in (path, *write_report(results, files.folder, console)):
        console.print(f"Written: {written}")
    return results


def _where(store: Store, about: dict[str, Any]) -> dict[str, Any]:
    """Where a study ran; about: `machine.describe()` as it began."""
    return {
        "machine": about,
        "versions": about["versions"],
        "store": str(store.path),
        "peak_gb": machine.peak_memory() / 1e9,
    }


class _Run:
    """A study that is under way."""

    def __init__(
        self,
        ground: Ground,
        store: Store,
        engine: Engine,
        console: Console,
        planned: StudyPlan,
        begun: dict[str, Any],
    ) -> None:
        self.ground, self.store, self.engine, self.console = ground, store, engine, console
        self.begun, self.left = begun, planned.seconds
        self.planned = [part.name for part in planned.parts]
        self.found: dict[str, Any] = {}
        self.failed: dict[str, str] = {}
        self.parts: list[dict[str, Any]] = []

    def part(self, planned: PlannedPart) -> None:
        name, begun = planned.name, time.perf_counter()
        number = f"{len(self.parts) + 1} of {len(self.planned)}"
        about = ""
        if planned.failed is None:
            left = in_words(self.left)
            about = f": about {in_words(planned.seconds)}, and with all that follows {left}"
        self.console.print(f"\n{name} (part {number}){about}")
        self.left -= planned.seconds
        said = {"part": name, "planned_seconds": planned.seconds, "failed": None}
        said |= {"cells": planned.cells, "finished_before": planned.finished}
        self.parts.append(said)
        try:
            part = MAKERS[name](self.ground)
            said["words"] = part.words
            self.found[name] = part.run(self.store, self.engine, self.console)
        except (ValueError, OSError) as error:
            said["failed"] = self.failed[name] = str(error)
            self.console.print(f"{name} can't be run: {error}")
        finally:
            said["seconds"] = round(time.perf_counter() - begun, 1)

    def results(self) -> Results:
        ground, found = self.ground, self.found
        others = [name for name in PARTS if name not in self.planned]
        facts = {
            "model": ground.name,
            "dtype": described_dtype(ground.model),
            "devices": machine.devices_under(ground.model),
            "command": ground.command,
            "seed": ground.settings.seed,
            "parts": self.parts,
            "beside": [name for name in others if ground.files.of(name).is_dir()],
        } | _where(self.store, self.begun)
        parts: Mapping[str, Any] = {name: found.get(name) for name in PARTS[1:]}
        return Results(facts, dict(ground.nulls), **parts)
