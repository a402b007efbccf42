"""Runs the comparison: parameters on the budget text, one pass of the test text a cell.

A cell is a dict of plain values, as it stands in the JSON:

    table, role, contender, allocation, budget : what it is; role "static", "router", "shuffled",
        "random", "oracle" or "quantized", which is static top-k with experts in "bits"
    status : "measured", or "outside" with a "reason" that names the reach
    targets, parameter, set_k, set_by_layer, passes, note : on the budget text
    average_k, by_layer, at_floor, at_ceiling : experts per token on the test text, and the
        shares of tokens with 1 and with max_k
    kl, nats, perplexity, agreement : means per predicted token of the test text
    bytes_per_token : of the matrices of a token's experts, as they are kept, over all layers;
        the mean of the test text. What is read if each token's experts are read for it alone
    by_document : sums of kl, nats, agree, experts and bytes by document
    effect, against, level : written by `effects`, of quantised experts by `bytes_read`
    tokens_per_s : of decoding
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ...checks import check_token_ids
from ...measure.passes import Reference, collect, documents_of
from ...models.blocks import find_blocks, model_norm
from ...quantizing.quantize import experts_in
from ...routers import TopK
from ...version import __version__
from ..budget import BudgetError, allocate, sensitivity
from ..budget.setting import find, resolve
from .bytes_read import BytesTable, expert_bytes, quantized_name
from .contenders import Nulls, popularity
from .controls import Oracle, random_counts, shuffled, with_counts
from .effects import ORACLE, QUANTIZED, RANDOM, ROUTER, SHUFFLED, STATIC, Table
from .speed import decode_speeds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...null.layers import TokenNull
    from ...null.model import Null
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ..budget.setting import Setting
    from .contenders import Contender
    from .controls import Route
    from .plan import TablePlan
    from .splits import Splits


MAX_PASSES = 3  # of the budget text for a cell, after a warm start


@dataclass
class Comparison:
    """A comparison and what has been measured of it.

    model; splits: Splits; nulls: Nulls; contenders: [Contender]; plans: [TablePlan]; prompts:
    (1, n) token ids for the decode speed. cells: the tables' cells; static: those of the curve,
    top-k with k = 1, 2, ... in every layer; quantized: the same, to the model's own k, with
    experts in each of `bits` (8, 4). `after` is called with each finished cell.
    """

    model: nn.Module
    splits: Splits
    nulls: Nulls
    contenders: list[Contender]
    plans: list[TablePlan]
    prompts: list[Tensor]
    seed: int = 0
    bits: Sequence[int] = ()
    after: Callable[[dict[str, Any]], object] = lambda cell: None
    cells: list[dict[str, Any]] = field(default_factory=list)
    static: list[dict[str, Any]] = field(default_factory=list)
    quantized: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: NDArray[np.float64] | None = None  # (L, K) nats per token, k = 1 to K
    _patches: dict[int, tuple[Any, AnyNull | None]] = field(
        default_factory=dict
    )  # id(cell): (router, null), for the speed

    def steps(self) -> int:
        """How many cells there will be; what turns out of reach has no shuffle."""
        most = max(plan.max_k for plan in self.plans)
        own_k = model_norm(self.model)[1]
        left_out = [c for c in self.quantized if c["status"] == "outside"]
        total = most + own_k * len(self.bits) - (own_k - 1) * len(left_out)
        for plan in self.plans:
            for allocation in plan.allocations:
                controls = {"equal": 2, "free": 3}.get(allocation, 0)
                each = 1 if allocation == "shared" else 2
                total += len(plan.budgets) * (controls + each * len(self.contenders))
        outside = [c for c in self.cells if c["role"] == ROUTER and c["status"] == "outside"]
        return total - sum(cell["allocation"] != "shared" for cell in outside)

    def check_text(self) -> None:
        """ValueError for a token that the model has no embedding for."""
        windows = (*self.splits.budget.windows, *self.splits.test.windows)
        check_token_ids(self.model, [*(window.ids for window in windows), *self.prompts])

    def run(self) -> None:
        """Measure everything; what is finished stays in `cells` whatever interrupts it."""
        self._prepare()
        for bits in self.bits:
            self._quantized(bits)
        for plan in self.plans:
            self._controls(plan)
            for contender in self.contenders:
                for allocation in plan.allocations:
                    self._contender(plan, contender, allocation)
        decode_speeds(self.model, self.prompts, self._timed(), seed=self.seed)

    def _prepare(self) -> None:
        """What all tables need: the reference, the static curve, the split over the layers."""
        self.norm, self.top_k = model_norm(self.model)
        self.reference = Reference(self.model, self.splits.test)
        self.stock = collect(self.model, self.splits.budget)
        self.weights = popularity(self.stock, self.top_k)
        self.layers = len(self.stock.logits)
        self.expert_bytes = expert_bytes(self.model)
        most = max(plan.max_k for plan in self.plans)
        for k in range(1, most + 1):
            cell = {
                "table": None,
                "role": STATIC,
                "contender": "top-k",
                "allocation": "equal",
                "budget": k,
                "targets": [k] * self.layers,
            }
            self._measure(cell, TopK(k), None, into=self.static)
        if any("free" in plan.allocations for plan in self.plans):
            ks = range(1, most + 1)
            self.sensitivity = sensitivity(self.model, self.splits.budget, ks)

    def _quantized(self, bits: int) -> None:
        """Static top-k with the experts in fewer bits, which then have their own weights again."""
        name = quantized_name("k", bits)
        start: dict[str, Any] = {
            "table": None,
            "role": QUANTIZED,
            "contender": name,
            "allocation": "equal",
            "bits": bits,
        }
        whole = self.expert_bytes
        with ExitStack() as stack:
            try:
                stack.enter_context(experts_in(self.model, bits))
            except ValueError as error:
                cell = start | {"budget": self.top_k, "status": "outside", "reason": str(error)}
                self._keep(cell, self.quantized)
                return
            stack.callback(setattr, self, "expert_bytes", whole)
            self.expert_bytes = expert_bytes(self.model)
            for k in range(1, self.top_k + 1):
                cell = start | {"budget": k, "targets": [k] * self.layers}
                self._measure(cell, TopK(k), None, into=self.quantized)

    def _targets(self, plan: TablePlan, allocation: str, budget: int) -> float | list[float]:
        """(L,) experts of each layer; one number for "shared"."""
        if allocation == "shared":
            return float(budget)
        if allocation == "equal":
            return [float(budget)] * self.layers
        ks = range(1, plan.max_k + 1)
        costs = cast("NDArray[np.float64]", self.sensitivity)[:, : plan.max_k]
        return [float(k) for k in allocate(costs, list(ks), budget * self.layers)]

    def _cell(
        self, plan: TablePlan, role: str, contender: str, allocation: str, budget: int
    ) -> dict[str, Any]:
        targets = self._targets(plan, allocation, budget)
        return {
            "table": plan.name,
            "role": role,
            "contender": contender,
            "allocation": allocation,
            "budget": budget,
            "targets": targets,
        }

    def _measure(
        self,
        cell: dict[str, Any],
        router: Any,
        null: AnyNull | None,
        into: list[dict[str, Any]] | None = None,
    ) -> NDArray[np.int32]:
        """Run the test text and keep the cell; returns its counts (L, T)."""
        quality = self.reference.measure(router, null=null)
        predicted = quality.predicted.sum()
        nats = float(quality.nats.sum() / predicted)
        most = quality.counts.max()
        cell |= {
            "status": "measured",
            "average_k": quality.average_k,
            "by_layer": quality.counts.mean(axis=1).tolist(),
            "at_floor": float((quality.counts == 1).mean()),
            "at_ceiling": float((quality.counts == self._max_k(cell, most)).mean()),
            "kl": quality.mean_kl,
            "nats": nats,
            "perplexity": math.exp(nats),
            "agreement": float(quality.agree.sum() / predicted),
            "by_document": {
                name: getattr(quality, name).tolist() for name in ("kl", "nats", "agree", "experts")
            },
        }
        read = self.expert_bytes @ quality.counts
        documents = documents_of(self.splits.test)
        sums = np.bincount(documents, read, len(self.splits.test.documents))
        cell["by_document"]["bytes"] = sums.tolist()
        cell["bytes_per_token"] = float(read.mean())
        self.predicted, self.tokens = quality.predicted, quality.tokens
        if cell["role"] in (STATIC, ROUTER):
            self._patches[id(cell)] = router, null
        self._keep(cell, into)
        return quality.counts

    def _max_k(self, cell: dict[str, Any], most: int) -> int:
        return next((p.max_k for p in self.plans if p.name == cell["table"]), most)

    def _keep(self, cell: dict[str, Any], into: list[dict[str, Any]] | None = None) -> None:
        (self.cells if into is None else into).append(cell)
        self.after(cell)

    # ---- controls that belong to no router ----

    def _controls(self, plan: TablePlan) -> None:
        for allocation in plan.allocations:
            if allocation == "shared":
                continue
            for budget in plan.budgets:
                if allocation == "free":
                    cell = self._cell(plan, STATIC, "top-k", allocation, budget)
                    routers = [TopK(int(k)) for k in cell["targets"]]
                    self._measure(cell, routers, None)
                self._random(plan, allocation, budget)
            self._oracle(plan, allocation)

    def _random(self, plan: TablePlan, allocation: str, budget: int) -> None:
        cell = self._cell(plan, RANDOM, "random R", allocation, budget)
        tokens = self.splits.test.tokens
        counts = random_counts(cell["targets"], tokens, plan.max_k, [self.seed, 2, budget])
        router = TopK(plan.max_k)
        self._measure(cell, self._cut(router, counts, None), None)

    def _oracle(self, plan: TablePlan, allocation: str) -> None:
        start = None
        for budget in plan.budgets:
            cell = self._cell(plan, ORACLE, "oracle", allocation, budget)
            if max(cell["targets"]) > self.top_k:
                reason = (
                    f"the oracle leaves out of the model's own top-{self.top_k}, so it takes at "
                    f"most {self.top_k} experts in a layer, not {max(cell['targets']):g}"
                )
                self._keep(cell | {"status": "outside", "reason": reason})
                continue
            with Oracle(self.model) as oracle:
                found = oracle.set_budget(self.splits.budget, cell["targets"], start)
                thresholds, by_layer, start = found
                cell |= {
                    "parameter": thresholds.tolist(),
                    "set_k": float(by_layer.mean()),
                    "set_by_layer": by_layer.tolist(),
                }
                self._measure(cell, oracle.routers(thresholds), None)

    def _cut(self, router: Router, counts: NDArray[np.int32], null: AnyNull | None) -> list[Route]:
        rules = [block.rule() for block in find_blocks(self.model)]
        return with_counts(router, counts, rules, null=null, norm=self.norm, top_k=self.top_k)

    # ---- routers ----

    def _contender(self, plan: TablePlan, contender: Contender, allocation: str) -> None:
        """All budgets of one router, from few experts to many, each a warm start for the next."""
        router = contender.make(plan.max_k, self.weights)
        null = resolve(router, self.nulls.get(contender.null))
        start = None
        for budget in plan.budgets:
            cell = self._cell(plan, ROUTER, contender.name, allocation, budget)
            try:
                start = self._set(router, null, cell, start)
            except BudgetError as error:
                self._keep(cell | {"status": "outside", "reason": str(error)})
                continue
            counts = self._measure(cell, start.router, null)
            if allocation != "shared":
                self._shuffled(cell, start.router, null, counts)

    def _set(
        self,
        router: Router,
        null: Null | TokenNull | None,
        cell: dict[str, Any],
        start: Setting | None,
    ) -> Setting:
        """The Setting at the cell's targets; the stock model's pass serves all routers."""
        setting, shortfall = find(
            router,
            self.model,
            self.splits.budget,
            cell["targets"],
            null,
            start=start,
            passed=self.stock,
            max_passes=MAX_PASSES,
        )
        parameter = setting.parameter
        cell |= {
            "parameter": list(parameter) if isinstance(parameter, tuple) else parameter,
            "set_k": setting.average_k,
            "set_by_layer": setting.by_layer.tolist(),
            "passes": len(setting.passes),
            "note": shortfall or None,
        }
        return setting

    def _shuffled(
        self, cell: dict[str, Any], router: Router, null: AnyNull | None, counts: NDArray[np.int32]
    ) -> None:
        control = {
            name: cell[name] for name in ("table", "contender", "allocation", "budget", "targets")
        }
        dealt = shuffled(counts, [self.seed, 1])
        self._measure(control | {"role": SHUFFLED}, self._cut(router, dealt, null), None)

    # ---- what comes of it ----

    def _timed(self) -> list[tuple[dict[str, Any], Any, AnyNull | None]]:
        """[(cell, router, null)] whose decode speed is taken."""
        cells = [*self.static, *self.cells]
        return [(cell, *self._patches[id(cell)]) for cell in cells if id(cell) in self._patches]

    def analyse(self) -> None:
        """Effects and their intervals, into the cells of every table that has some."""
        for plan in self.plans:
            curve = self.static[: plan.max_k]
            cells = [c for c in self.cells if c["table"] == plan.name and c["status"] == "measured"]
            if cells:
                table = Table(cells, curve, self.predicted, self.tokens, self.splits.domains)
                table.analyse(self.seed)
        quantized = [cell for cell in self.quantized if cell["status"] == "measured"]
        if quantized:
            curve = self.static[: self.top_k]
            skipping = [
                cell
                for cell in self.cells
                if cell["role"] in (STATIC, ROUTER) and cell["status"] == "measured"
            ]
            BytesTable(
                quantized,
                [*curve[:-1], *skipping],
                curve,
                self.predicted,
                self.tokens,
                self.splits.domains,
            ).analyse(self.seed)

    def describe(self) -> dict[str, Any]:
        """The part of the JSON that is not about the machine: splits, nulls, plan, cells."""
        documents = {part: getattr(self.splits, part).documents for part in ("budget", "test")}
        return {
            "seed": self.seed,
            "contenders": [c._asdict() for c in self.contenders],
            "tables": [plan._asdict() for plan in self.plans],
            "nulls": self.nulls.describe(),
            "splits": {
                "null": [{"domain": d.domain, "name": d.name} for d in self.splits.null],
                **documents,
            },
            "sensitivity": None if self.sensitivity is None else self.sensitivity.tolist(),
            "static": self.static,
            "quantized": self.quantized,
            "cells": self.cells,
            "planned_cells": self.steps(),
            "moeprof": __version__,
        }
