"""The sweep as cells: a configuration, a static k, or a router at a budget each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ...models.blocks import own_top_k
from ...routers import TopK
from ..store.cells import Cell, Subject, described
from ..store.subject import subject, text_digest
from .beside import Budgets, budgets, routers_by_budget
from .runner import Experiment

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...routers.base import Router
    from ...texts.windows import HeldOut
    from ..engine.work import Make
    from .grid import Configuration


class _Run(NamedTuple):
    """How a cell is run: a function of `step`, and how often it calls that."""

    measure: Callable[[Callable[[], object]], dict[str, Any]]
    steps: int


class SweepWork:
    """A sweep as `Work`: its cells are `grid`, `static` and `budgets` in turn.

    experiment: Experiment; configurations: [Configuration]; static: [k]; calibration: HeldOut,
    the text that budgets are set on.
    """

    def __init__(
        self,
        experiment: Experiment,
        configurations: Sequence[Configuration],
        static: Sequence[int],
        calibration: HeldOut,
    ) -> None:
        self.experiment, self.calibration = experiment, calibration
        self.configurations, self.ks = configurations, static
        top_k = own_top_k(experiment.model)
        setter = Budgets(experiment, calibration)
        windows = len(experiment.heldout.windows)
        self._runs: dict[str, _Run] = {}

        def cell(name: str, run: _Run, router: Router | None, **more: Any) -> Cell:
            self._runs[name] = run
            return Cell("sweep", name, {"router": described(router), **more})

        self.grid = [
            cell(
                one.name,
                _Run(partial(experiment.run, one.router(top_k)), experiment.steps),
                one.router(top_k),
                new_tokens=experiment.new_tokens,
            )
            for one in configurations
        ]
        self.static = [
            cell(f"topk_{k}", _Run(partial(experiment.quality, TopK(k)), windows), TopK(k))
            for k in static
        ]
        self.budgets = [
            cell(
                f"{router.name} set to {budget:g}",
                _Run(partial(setter.run, router, budget), setter.steps),
                router,
                budget=budget,
            )
            for budget in budgets(top_k)
            for router in routers_by_budget(top_k)
        ]

    @property
    def cells(self) -> list[Cell]:
        return [*self.grid, *self.static, *self.budgets]

    @cached_property
    def subject(self) -> Subject:
        experiment = self.experiment
        text = text_digest(experiment.heldout, self.calibration, prompts=experiment.prompt_ids())
        return subject(experiment.model, text, experiment.null)

    @property
    def make(self) -> Make:
        experiment = self.experiment
        return partial(
            make_work,
            prompts=experiment.prompts,
            complexities=experiment.complexities,
            heldout=experiment.heldout,
            null=experiment.null,
            new_tokens=experiment.new_tokens,
            configurations=self.configurations,
            static=self.ks,
            calibration=self.calibration,
        )

    def steps(self, cell: Cell) -> int:
        return self._runs[cell.name].steps

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        return self._runs[cell.name].measure(step)


def make_work(
    model: nn.Module,
    tokenizer: Tokenizer,
    *,
    configurations: Sequence[Configuration],
    static: Sequence[int],
    calibration: HeldOut,
    **shared: Any,
) -> SweepWork:
    """The same sweep on a model that was loaded again; shared: the other fields of Experiment."""
    return SweepWork(Experiment(model, tokenizer, **shared), configurations, static, calibration)
