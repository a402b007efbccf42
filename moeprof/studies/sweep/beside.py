"""What the grid is set against: static top-k, and routers whose parameter a budget sets."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ...routers import BH, FixedP
from ..budget.setting import BudgetError
from ..budget.stock import Setter
from ..engine.load import COLLECT, USUAL_PASSES, Load
from ..engine.steps import steps_of

if TYPE_CHECKING:
    from ...routers.base import Router
    from ...texts.windows import HeldOut
    from .runner import Experiment


def budgets(top_k: int) -> list[float]:
    """The experts per token that a run gives advice for: half and three quarters of top_k."""
    return [float(top_k * share) for share in (Fraction(1, 2), Fraction(3, 4)) if top_k > 1]


def routers_by_budget(top_k: int) -> list[FixedP | BH]:
    """The routers that a budget is set for; a token gets the model's own top_k at most."""
    return [FixedP(max_k=top_k), BH(max_k=top_k)]


class Budgets:
    """Sets routers to budgets on `text` and runs them on the held-out text of an Experiment.

    `steps` is how often a `run` calls `step`.
    """

    def __init__(self, experiment: Experiment, text: HeldOut) -> None:
        self.experiment, self.text = experiment, text
        self._setter = Setter(experiment.model, text)
        self.steps = self._setter.steps + len(experiment.heldout.windows)

    def load(self, budget: float) -> list[Load]:
        """What a `run` takes, without the stock model's pass that all share."""
        passes = Load(COLLECT, USUAL_PASSES * self.text.tokens, budget)
        return [passes, *self.experiment.quality_load(budget)]

    @property
    def shared_load(self) -> list[Load]:
        """The stock model's pass."""
        return [Load(COLLECT, self.text.tokens)]

    def run(
        self, router: Router, budget: float, step: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        """The router at a budget, on the held-out text: a dict of plain values.

        Where the budget is out of the router's reach, the dict says so as "error".
        """
        begun = time.perf_counter()
        result = {
            "router": router.name,
            "class": type(router).__name__,
            "budget": budget,
            "parameter": router.main,
            "value": None,
            "max_k": router.max_k,
            "error": None,
        }
        with steps_of(self.steps, step) as step:
            try:
                found = self._setter.run(router, budget, self.experiment.null, step)
            except BudgetError as error:
                result["error"] = str(error).removeprefix("average_k: ")
            else:
                result |= {"value": found.value, "note": found.note}
                result["avg_experts_calibration"] = found.average_k
                result |= self.experiment.quality(found.router, step)
        return result | {"seconds": time.perf_counter() - begun}
