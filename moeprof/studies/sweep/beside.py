"""What the grid is set against: static top-k, and routers whose parameter a budget sets."""

from __future__ import annotations

import time
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ... import demo
from ...routers import BH, FixedP
from ...texts.windows import heldout_windows
from ..engine.steps import steps_of

if TYPE_CHECKING:
    from ...checks import Tokenizer
    from ...measure.passes import Pass
    from ...texts.windows import HeldOut
    from .runner import Experiment


BUDGET_TOKENS = 8192  # of the shipped calibration text, which no evaluation uses
DIGITS = 5  # of the parameter that is found, run and shown


def budgets(top_k: int) -> list[float]:
    """The experts per token that a run gives advice for: half and three quarters of top_k."""
    return [float(top_k * share) for share in (Fraction(1, 2), Fraction(3, 4)) if top_k > 1]


def budget_text(tokenizer: Tokenizer, seed: int = 0) -> HeldOut:
    """HeldOut: the text that budgets are set on, of the second half of the calibration text."""
    return heldout_windows(tokenizer, demo.calibration_halves()[1], BUDGET_TOKENS, seed)


def routers_by_budget(top_k: int) -> list[FixedP | BH]:
    """The routers that a budget is set for; a token gets the model's own top_k at most."""
    return [FixedP(max_k=top_k), BH(max_k=top_k)]


class Budgets:
    """Sets routers to budgets on `text`; the stock model's pass over it is made once.

    experiment: Experiment; text: HeldOut. `steps` is how often a `run` calls `step`.
    """

    def __init__(self, experiment: Experiment, text: HeldOut) -> None:
        from ..budget.setting import MAX_PASSES

        self.experiment, self.text = experiment, text
        self._passed: Pass | None = None
        passes = MAX_PASSES + 1  # the stock model's
        self.steps = passes * len(text.windows) + len(experiment.heldout.windows)

    def run(
        self, router: FixedP | BH, budget: float, step: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        """The router at a budget, on the held-out text: a dict of plain values.

        Where the budget is out of the router's reach, the dict says so as "error". The parameter
        is rounded before it is evaluated, so that what is shown is what was run.
        """
        from ..budget.setting import BudgetError, find, main_of, resolve, with_main

        begun, model, name = time.perf_counter(), self.experiment.model, main_of(router)[0]
        result = {
            "router": router.name,
            "class": type(router).__name__,
            "budget": budget,
            "parameter": name,
            "value": None,
            "max_k": router.max_k,
            "error": None,
        }
        null = resolve(router, self.experiment.null)
        with steps_of(self.steps, step) as step:
            try:
                passed = self._stock(step)
                setting, short = find(
                    router, model, self.text, budget, null, passed=passed, step=step
                )
            except BudgetError as error:
                result["error"] = str(error).removeprefix("average_k: ")
            else:
                value = float(f"{setting.parameter:.{DIGITS}g}")
                average = setting.average_k
                result |= {"value": value, "note": short, "avg_experts_calibration": average}
                result |= self.experiment.quality(with_main(router, value), step)
        return result | {"seconds": time.perf_counter() - begun}

    def _stock(self, step: Callable[[], object]) -> Pass:
        if self._passed is None:
            from ...measure.passes import collect, evaluating

            with evaluating(self.experiment.model):
                self._passed = collect(self.experiment.model, self.text, step=step)
        return self._passed
