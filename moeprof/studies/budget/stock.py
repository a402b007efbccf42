"""Budgets on the calibration text that ships with the demo model, for any number of routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import demo
from ...measure.passes import collect, evaluating
from ...models.blocks import find_blocks
from ...texts.windows import BUDGET_TOKENS, heldout_windows
from .setting import MAX_PASSES, find, main_of, resolve, with_main

if TYPE_CHECKING:
    import os

    from torch import nn

    from ...checks import Tokenizer
    from ...measure.passes import Pass
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ...texts.windows import HeldOut


DIGITS = 5  # of the parameter that is found, run and shown


def budget_text(tokenizer: Tokenizer, seed: int = 0, tokens: int = BUDGET_TOKENS) -> HeldOut:
    """HeldOut: the text that budgets are set on, of the second half of the calibration text.

    No evaluation uses that half.
    """
    return heldout_windows(tokenizer, demo.calibration_halves()[1], tokens, seed)


def pass_bytes(model: nn.Module, text: HeldOut) -> int:
    """Of memory that setting a budget takes: the logits of the stock model's pass over the text,
    of the one before and of the one that is made."""
    num_experts = max(block.num_experts for block in find_blocks(model))
    return 3 * 4 * len(find_blocks(model)) * num_experts * text.tokens


class Found(NamedTuple):
    """A router at its budget: as it is run, its parameter rounded to `DIGITS`.

    average_k : experts per token on the text that it was set on
    note : what it falls short by, or ""
    """

    router: Router
    value: Any
    average_k: float
    note: str


class Setter:
    """Sets routers to budgets on `text`; the stock model's pass over it is made once.

    `steps` is how often a `run` calls `step` at most.
    """

    def __init__(self, model: nn.Module, text: HeldOut, norm: str = "model") -> None:
        self.model, self.text, self.norm = model, text, norm
        self._passed: Pass | None = None
        self.steps = (MAX_PASSES + 1) * len(text.windows)  # one is the stock model's

    def run(
        self,
        router: Router,
        budget: float,
        null: AnyNull | str | os.PathLike[str] | None,
        step: Callable[[], object] = lambda: None,
    ) -> Found:
        """BudgetError where the budget is out of the router's reach.

        The parameter is rounded, so that what is shown is what is run.
        """
        passed = self._stock(step)
        setting, note = find(
            router,
            self.model,
            self.text,
            budget,
            resolve(router, null),
            passed=passed,
            norm=self.norm,
            step=step,
        )
        value = _rounded(setting.parameter, router)
        return Found(with_main(router, value), value, setting.average_k, note)

    def _stock(self, step: Callable[[], object]) -> Pass:
        if self._passed is None:
            with evaluating(self.model):
                self._passed = collect(self.model, self.text, step=step)
        return self._passed


def _rounded(value: Any, router: Router) -> Any:
    """Of a number the digits that are shown, unless that leads out of its range."""
    if not isinstance(value, float):
        return value
    low, high = main_of(router)[1]
    short = float(f"{value:.{DIGITS}g}")
    return short if low < short < high else value
