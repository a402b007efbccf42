"""An evaluation as cells: a configuration each, the model's own routing first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ...measure.passes import reference_bytes
from ...routers.base import Router
from ..budget.stock import pass_bytes
from ..configuration import with_own
from ..engine.load import COLLECT, KL, USUAL_PASSES, Load
from ..engine.steps import steps_of
from ..store.cells import Cell, Subject, described
from ..store.subject import null_digest, subject, text_digest
from .measure import Evaluation

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...texts.windows import HeldOut
    from ..configuration import Configuration
    from ..engine.work import Make


class EvaluationWork:
    """An evaluation as `Work`; ValueError for a router that doesn't fit the model."""

    def __init__(
        self,
        model: nn.Module,
        text: HeldOut,
        calibration: HeldOut,
        configurations: Sequence[Configuration],
        norm: str = "model",
    ) -> None:
        self._by_name = with_own(model, configurations)
        self.configurations = list(self._by_name.values())
        self.evaluation = Evaluation(model, text, calibration, norm)
        self.text, self.calibration, self.norm = text, calibration, norm

    @cached_property
    def cells(self) -> list[Cell]:
        calibration = text_digest(self.calibration)

        def parameters(one: Configuration) -> dict[str, Any]:
            found: dict[str, Any] = {"router": described(one.router), "norm": self.norm}
            found["null"] = null_digest(one.null)
            if one.budget is not None:
                found |= {"budget": one.budget, "calibration": calibration}
            return found

        return [Cell("evaluate", one.name, parameters(one)) for one in self.configurations]

    def planned(self) -> list[Cell]:
        return self.cells

    @property
    def kept_bytes(self) -> int:
        model = self.evaluation.model
        setting = any(one.budget is not None for one in self.configurations)
        kept = pass_bytes(model, self.calibration) if setting else 0
        return kept + reference_bytes(model, self.text)

    def load(self, cell: Cell) -> list[Load]:
        _, router, budget, null = self._by_name[cell.name]
        if budget is None:
            known = router if isinstance(router, Router) else None
            return [Load(KL, self.text.tokens, known, null)]
        tokens, shared = self.calibration.tokens, []
        if cell.name == next(one.name for one in self.configurations if one.budget is not None):
            shared = [Load(COLLECT, tokens)]  # the stock model's pass, which all share
        passes = Load(COLLECT, USUAL_PASSES * tokens, budget)
        return [*shared, passes, Load(KL, self.text.tokens, budget)]

    @cached_property
    def subject(self) -> Subject:
        """Each cell names its own null."""
        return subject(self.evaluation.model, text_digest(self.text), None)

    @property
    def make(self) -> Make:
        return partial(
            make_work,
            text=self.text,
            calibration=self.calibration,
            configurations=self.configurations[1:],
            norm=self.norm,
        )

    def steps(self, cell: Cell) -> int:
        return self.evaluation.steps(self._by_name[cell.name].budget)

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        _, router, budget, null = self._by_name[cell.name]
        with steps_of(self.steps(cell), step) as counted:
            return self.evaluation.measure(router, null=null, budget=budget, step=counted)


def make_work(model: nn.Module, tokenizer: Tokenizer, **shared: Any) -> EvaluationWork:
    """The same on a model that was loaded again; shared: the other arguments."""
    return EvaluationWork(model, **shared)
