"""The comparison as cells, and what their results say together.

Three stages: what needs no other result; then the budgets that are split over the layers by the
sensitivity that the first stage measured; then the decode speed of all that was set, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...checks import check_token_ids
from ...measure.passes import documents_of, evaluating, reference_bytes
from ...models.blocks import find_blocks, model_norm
from ...version import __version__
from ..budget import allocate
from ..budget.stock import pass_bytes
from ..engine.load import COLLECT, DECODE, KL, LOSS, USUAL_PASSES, Load
from ..engine.steps import steps_of
from ..store.cells import Cell, Subject
from ..store.subject import subject, text_digest
from .bytes_read import BytesTable, quantized_bytes, quantized_name
from .contenders import Nulls
from .controls import ORACLE_PASSES
from .effects import ORACLE, QUANTIZED, RANDOM, ROUTER, STATIC, Documents, Table
from .plan import Part
from .runner import MAX_PASSES, Runner
from .speed import NEW_TOKENS, ROUNDS, summary

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...checks import Tokenizer
    from ..engine.work import Make
    from .contenders import Contender
    from .plan import TablePlan
    from .splits import Splits


LAYER, CURVE, DECODING = "sensitivity", "curve", "decoding"  # roles of cells, beside the tables'
SPEEDS = "decode speeds"  # the name of its one cell


@dataclass
class Comparison:
    """A comparison as `Work`.

    model; splits: Splits; nulls: Nulls; contenders: [Contender]; plans: [TablePlan]; prompts:
    (1, n) token ids for the decode speed. The model's own top-k is also measured with experts in
    each of `bits` (8, 4). found: {name of a cell: its result}.
    """

    model: nn.Module
    splits: Splits
    nulls: Nulls
    contenders: list[Contender]
    plans: list[TablePlan]
    prompts: list[Tensor]
    seed: int = 0
    bits: Sequence[int] = ()
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prompts = self.prompts[:ROUNDS]
        self.top_k, self.layers = model_norm(self.model)[1], len(find_blocks(self.model))
        self.most = max(plan.max_k for plan in self.plans)
        self._shares: dict[tuple[int, int], list[float]] = {}  # of (max_k, budget)

    def check_text(self) -> None:
        """ValueError for a token that the model has no embedding for."""
        windows = (*self.splits.budget.windows, *self.splits.test.windows)
        check_token_ids(self.model, [*(window.ids for window in windows), *self.prompts])

    # ---- Work ----

    @cached_property
    def subject(self) -> Subject:
        texts, fitted_to = (self.splits.budget, self.splits.test), self.splits.null
        text = text_digest(*texts, prompts=self.prompts, documents=fitted_to)
        return subject(self.model, text, self.nulls.given)

    @property
    def cells(self) -> list[Cell]:
        """Those of `planned` whose parameters are known."""
        return [cell for cell in self.planned() if _known(cell)]

    @property
    def make(self) -> Make:
        return partial(
            make_work,
            splits=self.splits,
            given=self.nulls.given,
            contenders=self.contenders,
            plans=self.plans,
            prompts=self.prompts,
            seed=self.seed,
            bits=self.bits,
        )

    def run(self, cell: Cell, step: Callable[[], object]) -> dict[str, Any]:
        begun = time.perf_counter()
        parameters = dict(cell.parameters)
        measure = getattr(self._runner, parameters.pop("role"))
        with evaluating(self.model), steps_of(self.steps(cell), step) as counted:
            result = measure(counted, **parameters)
        return result | {"seconds": time.perf_counter() - begun}

    @cached_property
    def _runner(self) -> Runner:
        return Runner(self.model, self.splits, self.nulls, self.prompts)

    def steps(self, cell: Cell) -> int:
        """Windows of texts, or generations for the decode speed, at most."""
        of, role = cell.parameters, cell.parameters["role"]
        budget, test = len(self.splits.budget.windows), len(self.splits.test.windows)
        many = len(of["part"]["budgets"]) if "part" in of else 1
        if role == LAYER:
            return (1 + sum(k != self.top_k for k in of["ks"])) * budget
        if role == DECODING:
            return len(self.prompts) * self._timed_at_most()
        passes = {ORACLE: 1 + many * ORACLE_PASSES, ROUTER: many * MAX_PASSES}.get(role, 0)
        return passes * budget + self._rows_of(cell) * test

    @property
    def kept_bytes(self) -> int:
        texts = self.splits.budget, self.splits.test
        kept = pass_bytes(self.model, texts[0]) + sum(reference_bytes(self.model, t) for t in texts)
        return kept + quantized_bytes(self.model, max(self.bits)) if self.bits else kept

    def load(self, cell: Cell) -> list[Load]:
        of, role = cell.parameters, cell.parameters["role"]
        budget, test = self.splits.budget.tokens, self.splits.test.tokens
        if role == LAYER:  # all other layers are as they were
            return [Load(KL, len(of["ks"]) * budget)]
        if role == CURVE:
            shared = [Load(KL, test), Load(COLLECT, budget)] if of["k"] == 1 else []  # of all cells
            return [*shared, Load(KL, test, of["k"])]
        if role == QUANTIZED:
            return [Load(KL, test, k) for k in range(1, self.top_k + 1)]
        if role == DECODING:
            read = sum(ids.shape[1] for ids in self.prompts)
            new, times = len(self.prompts) * NEW_TOKENS, self._timed_at_most()
            return [Load(LOSS, times * read), Load(DECODE, times * new)]
        loads, shared = [], of["part"]["allocation"] == "shared"
        if role == ORACLE:
            loads.append(Load(COLLECT, budget, 2 * self.top_k))
        for experts in of["part"]["budgets"]:
            if role == ORACLE:  # all experts run, so as to choose among them
                loads.append(Load(COLLECT, USUAL_PASSES * budget, 2 * self.top_k))
                loads.append(Load(KL, test, 2 * self.top_k))
                continue
            if role == ROUTER:
                loads.append(Load(COLLECT, USUAL_PASSES * budget, experts))
            tested = 2 if role == ROUTER and not shared else 1  # shuffled as well
            loads.append(Load(KL, tested * test, experts))
        return loads

    # ---- the plan ----

    def planned(self) -> list[Cell]:
        """All, in the order of the tables; None among the parameters of one stands for what
        results of others will say."""
        return [*self._measured(), *self._timed()]

    def _measured(self) -> Iterator[Cell]:
        ks = list(range(1, self.most + 1))
        if any("free" in plan.allocations for plan in self.plans):
            for layer in range(self.layers):
                yield _cell(_layer(layer), LAYER, layer=layer, ks=ks)
        for k in ks:
            yield _cell(f"static top-{k}", CURVE, k=k)
        for bits in self.bits:
            yield _cell(quantized_name("k", bits), QUANTIZED, bits=bits)
        for plan in self.plans:
            for allocation in plan.allocations:
                yield from self._controls(plan, allocation)
            for contender in self.contenders:
                for allocation in plan.allocations:
                    yield self._in_table(
                        plan,
                        contender.name,
                        ROUTER,
                        allocation,
                        plan.budgets,
                        contender=contender._asdict(),
                        seed=self.seed,
                    )

    def _controls(self, plan: TablePlan, allocation: str) -> Iterator[Cell]:
        """Those that belong to no router."""
        if allocation == "shared":
            return
        for budget in plan.budgets:
            if allocation == "free":
                yield self._in_table(plan, "top-k", STATIC, allocation, [budget])
            yield self._in_table(plan, "random R", RANDOM, allocation, [budget], seed=self.seed)
        yield self._in_table(plan, "oracle", ORACLE, allocation, plan.budgets)

    def _in_table(
        self,
        plan: TablePlan,
        called: str,
        role: str,
        allocation: str,
        budgets: Sequence[int],
        **parameters: Any,
    ) -> Cell:
        targets = [self._targets(plan, allocation, budget) for budget in budgets]
        part = Part(plan.name, plan.max_k, allocation, budgets, targets)
        at = f", budget {budgets[0]}" if len(budgets) == 1 else ""
        name = f"{plan.name}: {called}, {allocation}{at}"
        return _cell(name, role, part=part._asdict(), **parameters)

    def _targets(self, plan: TablePlan, allocation: str, budget: int) -> float | list[float] | None:
        """(L,) experts of each layer; one number for "shared"; None if that isn't known yet."""
        if allocation == "shared":
            return float(budget)
        if allocation == "equal":
            return [float(budget)] * self.layers
        key = plan.max_k, budget
        if key not in self._shares and (costs := self.sensitivity) is not None:
            ks = list(range(1, plan.max_k + 1))
            split = allocate(costs[:, : plan.max_k], ks, budget * self.layers)
            self._shares[key] = [float(k) for k in split]
        return self._shares.get(key)

    @property
    def sensitivity(self) -> NDArray[np.float64] | None:
        """(L, K) nats per token, k = 1 to K, once all layers have been measured."""
        names = [_layer(layer) for layer in range(self.layers)]
        if any(name not in self.found for name in names):
            return None
        return np.array([self.found[name]["nats"] for name in names])

    def _timed(self) -> Iterator[Cell]:
        """The decode speed of what is measured, all in one cell: they are run in turn."""
        if self.prompts:
            done = all(cell.name in self.found for cell in self._measured())
            timed = [self._setting(row) for row in _with_speed(self.rows())] if done else None
            cell = _cell(
                SPEEDS, DECODING, timed=timed, seed=self.seed, threads=torch.get_num_threads()
            )
            yield cell._replace(alone=True)

    def _setting(self, row: dict[str, Any]) -> dict[str, Any]:
        """What makes the router of a row, and its experts, again, as plain values."""
        if row["role"] != ROUTER:
            value = row["budget"] if row["table"] is None else row["targets"]
            return {"contender": None, "max_k": None, "value": value, "bits": row.get("bits")}
        contender = next(c for c in self.contenders if c.name == row["contender"])
        max_k = next(plan.max_k for plan in self.plans if plan.name == row["table"])
        value = row["parameter"]
        return {"contender": contender._asdict(), "max_k": max_k, "value": value, "bits": None}

    def _timed_at_most(self) -> int:
        """How many rows may have a decode speed."""
        parts = [cell.parameters for cell in self._measured()]
        return sum(
            len(of["part"]["budgets"]) if "part" in of else 1
            for of in parts
            if of["role"] in (CURVE, STATIC, ROUTER)
        ) + self.top_k * len(self.bits)

    def _rows_of(self, cell: Cell) -> int:
        """How many rows it gives; some budgets of a router may turn out to be out of reach."""
        of = cell.parameters
        if of["role"] in (LAYER, DECODING):
            return 0
        if of["role"] == QUANTIZED:
            return self.top_k
        many = len(of["part"]["budgets"]) if "part" in of else 1
        return many * (2 if of["role"] == ROUTER and of["part"]["allocation"] != "shared" else 1)

    # ---- what comes of it ----

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """{"static", "quantized", "cells": rows}, as in the JSON, of what is found.

        Nothing but "static" until that is whole: all else is compared with it.
        """
        rows: dict[str, list[dict[str, Any]]] = {"static": [], "quantized": [], "cells": []}
        for cell in self._measured():
            role, result = cell.parameters["role"], self.found.get(cell.name)
            if result is None and role == CURVE:
                break
            place = {CURVE: "static", QUANTIZED: "quantized"}.get(role, "cells")
            rows[place] += map(dict, (result or {}).get("rows", []))
        speeds = self.found.get(SPEEDS, {}).get("tokens_per_s", [])
        for row, rounds in zip(_with_speed(rows), speeds, strict=False):
            row |= summary(rounds)
        return rows

    def analysed(self) -> dict[str, list[dict[str, Any]]]:
        """The same with effects and their intervals, in every table that has some."""
        tokens = np.bincount(documents_of(self.splits.test))
        predicted = tokens - np.bincount([w.document for w in self.splits.test.windows])
        rows, documents = self.rows(), Documents.of(predicted, tokens, self.splits.domains)
        measured = [row for row in rows["cells"] if row["status"] == "measured"]
        for plan in self.plans:
            if cells := [row for row in measured if row["table"] == plan.name]:
                Table(cells, rows["static"][: plan.max_k], documents).analyse(self.seed)
        if quantized := [row for row in rows["quantized"] if row["status"] == "measured"]:
            curve = rows["static"][: self.top_k]
            skipping = [row for row in measured if row["role"] in (STATIC, ROUTER)]
            BytesTable(quantized, [*curve[:-1], *skipping], curve, documents).analyse(self.seed)
        return rows

    def describe(self) -> dict[str, Any]:
        """The part of the JSON that is not about the machine: splits, nulls, plan, rows."""
        documents = {part: getattr(self.splits, part).documents for part in ("budget", "test")}
        nulls, rows_planned = {}, 0
        for cell in self._measured():
            result = self.found.get(cell.name, {})
            rows_planned += len(result["rows"]) if "rows" in result else self._rows_of(cell)
            if result.get("null") is not None:
                nulls[cell.parameters["contender"]["null"]] = result["null"]
        return {
            "seed": self.seed,
            "contenders": [c._asdict() for c in self.contenders],
            "tables": [plan._asdict() for plan in self.plans],
            "nulls": nulls,
            "splits": {
                "null": [{"domain": d.domain, "name": d.name} for d in self.splits.null],
                **documents,
            },
            "sensitivity": None if self.sensitivity is None else self.sensitivity.tolist(),
            **self.rows(),
            "planned_cells": rows_planned,
            "moeprof": __version__,
            "seconds": round(sum(result["seconds"] for result in self.found.values()), 1),
        }


def _cell(name: str, role: str, **parameters: Any) -> Cell:
    return Cell("compare", name, {"role": role, **parameters})


def _layer(layer: int) -> str:
    return f"sensitivity of layer {layer}"


def _known(cell: Cell) -> bool:
    """Whether its parameters wait for no other result."""
    targets = cell.parameters.get("part", {}).get("targets", ())
    return cell.parameters.get("timed", ()) is not None and None not in targets


def _with_speed(rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The rows whose decode speed is taken."""
    every = [*rows["static"], *rows["quantized"], *rows["cells"]]
    timed = STATIC, QUANTIZED, ROUTER
    return [row for row in every if row["role"] in timed and row["status"] == "measured"]


def make_work(
    model: nn.Module, tokenizer: Tokenizer, *, splits: Splits, given: Any, **rest: Any
) -> Comparison:
    """The same comparison of a model that was loaded again; rest: other fields of Comparison."""
    nulls = Nulls(model, tokenizer, splits.null, given)
    return Comparison(model=model, splits=splits, nulls=nulls, **rest)
