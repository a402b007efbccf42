"""The sweep as cells: a configuration, a static k, or a router at a budget each."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ...models.blocks import own_top_k
from ...routers import TopK
from ..budget.stock import pass_bytes
from ..engine.measured import Measured
from ..store.cells import described
from ..store.subject import subject, text_digest
from .beside import Budgets, budgets, routers_by_budget
from .runner import Experiment

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...texts.windows import HeldOut
    from ..engine.work import Make
    from ..store.cells import Cell, Subject
    from .grid import Configuration


class SweepWork(Measured):
    """A sweep as `Work`: its cells are `grid`, `static` and `budgets` in turn.

    experiment: Experiment; configurations: [Configuration]; static: [k]; calibration: HeldOut,
    the text that budgets are set on.
    """

    kind = "sweep"

    def __init__(
        self,
        experiment: Experiment,
        configurations: Sequence[Configuration],
        static: Sequence[int],
        calibration: HeldOut,
    ) -> None:
        super().__init__()
        self.experiment, self.calibration = experiment, calibration
        self.configurations, self.ks = configurations, static
        top_k = own_top_k(experiment.model)
        setter = Budgets(experiment, calibration)
        shared = iter(setter.shared_load)  # of the first one
        self.grid = [
            self.cell(
                one.name,
                partial(experiment.run, one.router(top_k)),
                experiment.steps,
                experiment.load(one.router(top_k)),
                router=described(one.router(top_k)),
                new_tokens=experiment.new_tokens,
            )
            for one in configurations
        ]
        self.static = [
            self.cell(
                f"topk_{k}",
                partial(experiment.quality, TopK(k)),
                len(experiment.heldout.windows),
                experiment.quality_load(k),
                router=described(TopK(k)),
            )
            for k in static
        ]
        self.budgets = [
            self.cell(
                f"{router.name} set to {budget:g}",
                partial(setter.run, router, budget),
                setter.steps,
                [*shared, *setter.load(budget)],
                router=described(router),
                budget=budget,
            )
            for budget in budgets(top_k)
            for router in routers_by_budget(top_k)
        ]

    @property
    def cells(self) -> list[Cell]:
        return [*self.grid, *self.static, *self.budgets]

    def planned(self) -> list[Cell]:
        return self.cells

    @property
    def kept_bytes(self) -> int:
        return pass_bytes(self.experiment.model, self.calibration)

    @cached_property
    def subject(self) -> Subject:
        experiment = self.experiment
        text = text_digest(experiment.heldout, self.calibration, prompts=experiment.prompt_ids())
        return subject(experiment.model, text, experiment.null)

    @property
    def make(self) -> Make:
        return partial(
            make_work,
            **self.experiment.shared,
            configurations=self.configurations,
            static=self.ks,
            calibration=self.calibration,
        )


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
