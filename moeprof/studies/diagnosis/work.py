"""The diagnosis as cells: rows of the stock and of the patched model, of nulls by domain, of each
router whose experts are ablated. At which parameters the others are compared is a cell before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...measure.passes import collect, evaluating
from ...models.blocks import fewest_experts, find_blocks
from ...null import Null
from ...routers import FixedP, Router, TopK, make_router
from ..budget import BudgetError, set_budget
from ..budget.setting import MAX_PASSES
from ..budget.stock import pass_bytes
from ..engine.load import COLLECT, FIT, LOSS, USUAL_PASSES, Load
from ..engine.steps import steps_of
from ..store.cells import Cell, Subject, described
from ..store.subject import subject, text_digest
from .ablation import ablate, sample_positions
from .discoveries import discovery_rows
from .pvalues import p_value_rows, selection_rows
from .rows import PATCHED, POOLED, SHOWN, STOCK
from .seen import see, select
from .transfer import domain_nulls, transfer_rows

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...null.layers import TokenNull
    from ...texts.documents import Text
    from ...texts.windows import HeldOut
    from ..engine.work import Make
    from .seen import Seen


Step = Callable[[], object]
TRANSFER, COMPARED, ABLATED = "transfer", "compared", "ablated"  # roles beside STOCK and PATCHED
EQUAL = "equal budgets"  # the name of the one cell that is COMPARED
OTHERS = 2  # routers, at most


@dataclass
class DiagnosisWork:
    """A diagnosis as `Work`.

    router: Router; norm, seed, draws, positions: as `diagnose` takes them. text: HeldOut, what
    all is measured on; for_nulls: documents for the nulls by domain, none to leave them out, and
    windows: HeldOut, of these; budget: HeldOut, which sets the routers that `router` is compared
    with. found: {name of a cell: its result}.
    """

    model: nn.Module
    tokenizer: Tokenizer
    null: Null | TokenNull
    router: Router
    norm: str
    seed: int
    draws: int
    positions: int
    text: HeldOut
    for_nulls: Sequence[Text]
    windows: HeldOut
    budget: HeldOut
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = sample_positions(self.text, self.positions, self.seed)
        self.domains = np.array([d["domain"] for d in self.text.documents])
        self.groups = np.unique(self.domains, return_inverse=True)[1]
        self.num_experts = fewest_experts(self.model)
        self._seen: Seen | None = None

    # ---- Work ----

    @cached_property
    def subject(self) -> Subject:
        text = text_digest(self.text, self.windows, self.budget, documents=self.for_nulls)
        return subject(self.model, text, self.null)

    @property
    def cells(self) -> list[Cell]:
        """In the order of the rows; those of an ablation once it is known of which routers."""
        cells = [self._cell(name, role, draws=self.draws) for role, name in SHOWN.items()]
        if self.for_nulls and isinstance(self.null, Null):
            cells.append(self._cell("nulls by domain", TRANSFER, draws=self.draws))
        if self.positions and not isinstance(self.router, TopK):
            cells.append(self._cell(EQUAL, COMPARED))
        for name, router in self.compared.items():
            cells.append(
                self._cell(
                    f"ablation, {name}",
                    ABLATED,
                    of=described(router),
                    draws=self.draws,
                    positions=self.positions,
                    seed=self.seed,
                )
            )
        return cells

    def _cell(self, name: str, role: str, **parameters: Any) -> Cell:
        shared = {"router": described(self.router), "norm": self.norm}
        return Cell("diagnose", name, {"role": role, **shared, **parameters})

    @property
    def compared(self) -> dict[str, Router]:
        """{label: Router} whose experts are ablated, as far as they are known."""
        if not self.positions:
            return {}
        others = self.found.get(EQUAL, {"routers": []})["routers"]
        compared: dict[str, Router] = {}
        for router in (self.router, *map(_made, others)):
            compared.setdefault(label(router), router)
        return compared

    @property
    def make(self) -> Make:
        names = ("null", "router", "norm", "seed", "draws", "positions", "text", "for_nulls")
        given = {name: getattr(self, name) for name in (*names, "windows", "budget")}
        return partial(DiagnosisWork, **given)

    def steps(self, cell: Cell) -> int:
        """Windows of the texts, at most."""
        of = {
            TRANSFER: (self.text, self.windows),
            COMPARED: (self.budget,) * (2 + MAX_PASSES),  # the router, the stock model, a search
        }
        return sum(len(text.windows) for text in of.get(cell.parameters["role"], (self.text,)))

    @property
    def all_steps(self) -> int:
        """Those of all cells, also of the ablations that are not known yet."""
        unknown = OTHERS if any(cell.name == EQUAL for cell in self.cells) else 0
        return sum(map(self.steps, self.cells)) + unknown * len(self.text.windows)

    def planned(self) -> list[Cell]:
        """Also the ablations of routers that the cell EQUAL will name."""
        cells = self.cells
        if any(cell.name == EQUAL for cell in cells) and EQUAL not in self.found:
            cells += [self._cell(f"ablation, another {n}", ABLATED) for n in range(OTHERS)]
        return cells

    @property
    def kept_bytes(self) -> int:
        return pass_bytes(self.model, self.budget) + pass_bytes(self.model, self.text)

    def load(self, cell: Cell) -> list[Load]:
        role, null, router = cell.parameters["role"], self.null, self.router
        if role == TRANSFER:
            bytes_each = sum(d["bytes"] for d in self.windows.documents) / self.windows.tokens
            fitted_to = sum(len(document.text.encode()) for document in self.for_nulls)
            return [Load(FIT, fitted_to / bytes_each), Load(LOSS, self.windows.tokens)]
        if role == COMPARED:
            return [Load(COLLECT, (2 + USUAL_PASSES) * self.budget.tokens, router, null)]
        if role == ABLATED:  # each expert of each layer alone, and it with all after it; one added
            layers = len(find_blocks(self.model)) * self.positions
            read = self.text.tokens + self.positions + layers
            return [Load(LOSS, read, router, self._null_for(router), 2 * layers)]
        return [Load(LOSS, self.text.tokens, router if role == PATCHED else None, null)]

    def run(self, cell: Cell, step: Step) -> dict[str, Any]:
        begun = time.perf_counter()
        role = cell.parameters["role"]
        with evaluating(self.model), steps_of(self.steps(cell), step) as counted:
            if role == COMPARED:
                result: dict[str, Any] = {"routers": self._others(counted)}
            else:
                result = {"rows": list(self._rows(cell, counted))}
        return result | {"seconds": time.perf_counter() - begun}

    # ---- what is measured ----

    def _rows(self, cell: Cell, step: Step) -> Iterator[dict[str, Any]]:
        role = cell.parameters["role"]
        if role == STOCK:
            return self._passes(self._stock(step), STOCK)
        if role == PATCHED:
            null = self._null_for(self.router)
            seen = see(self.model, self.text, self.router, null=null, norm=self.norm, step=step)
            return self._passes(seen, PATCHED)
        if role == TRANSFER:
            return self._transfer(step)
        of = cell.parameters["of"]
        return self._ablation(self.router if of == described(self.router) else _made(of), step)

    def _null_for(self, router: Router) -> Null | TokenNull | None:
        return self.null if router.wants_null else None

    def _stock(self, step: Step) -> Seen:
        """What the stock model does on the text, once a process."""
        if self._seen is None:
            self._seen = see(self.model, self.text, norm=self.norm, step=step)
        return self._seen

    def _passes(self, seen: Seen, routing: str) -> Iterator[dict[str, Any]]:
        """p-values and selections, on the logits of the stock or of the patched model."""
        limits = self.router.limits(self.num_experts)
        selected = select(self.router, seen, self.null)
        yield from p_value_rows(seen, self.null, routing, self.groups, self.draws)
        yield from selection_rows(seen, selected, limits, routing, self.groups, self.draws)

    def _transfer(self, step: Step) -> Iterator[dict[str, Any]]:
        """Nulls fitted to one domain each, checked on all."""
        null = cast("Null", self.null)  # others are of no domain
        nulls = domain_nulls(self.model, self.tokenizer, null, self.for_nulls)
        calibration = see(self.model, self.windows, step=step)
        domains = np.array([d["domain"] for d in self.windows.documents])
        return transfer_rows(
            {POOLED: null} | nulls,
            (calibration, domains),
            self._stock(step),
            self.domains,
            self.router,
            self.draws,
        )

    def _others(self, step: Step) -> list[dict[str, Any] | None]:
        """FixedP and top-k near the router's average number of experts, as `described`."""
        null, model, text = self._null_for(self.router), self.model, self.budget
        passed = collect(model, text, self.router, null=null, norm=self.norm, step=step)
        average = float(passed.counts.mean())
        fixed = self._fixed_p(average, step)
        k = min(max(round(average), 1), self.num_experts)
        return [described(router) for router in (fixed, TopK(k)) if router is not None]

    def _fixed_p(self, average: float, step: Step) -> Router | None:
        """FixedP with the same limits and average; None if the router is one, or it can't."""
        if isinstance(self.router, FixedP) or not self.router.wants_null:
            return None
        fixed = FixedP(min_k=self.router.min_k, max_k=self.router.max_k)
        try:
            return set_budget(
                fixed,
                self.model,
                self.budget,
                null=self.null,
                target=average,
                norm=self.norm,
                step=step,
            ).router
        except BudgetError:
            return None

    def _ablation(self, router: Router, step: Step) -> Iterator[dict[str, Any]]:
        """The same positions under each router."""
        found = ablate(
            self.model,
            self.text,
            router,
            positions=self.places,
            null=self._null_for(router),
            norm=self.norm,
            seed=self.seed,
            step=step,
        )
        yield from discovery_rows(found, label(router), self.groups, self.draws)


def _made(values: dict[str, Any]) -> Router:
    """The router that `described` gave these values of."""
    parameters = dict(values)
    return make_router(parameters.pop("name"), **parameters)


def label(router: Any) -> str:
    """Such as "bh 0.3": the router's name and main parameter, or "by layer" for several."""
    value = getattr(router, router.main)
    return f"{router.name} {'by layer' if isinstance(value, tuple) else format(value, '.3g')}"
