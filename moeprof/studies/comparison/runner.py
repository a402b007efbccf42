"""Measures the cells of a comparison: parameters on the budget text, then the test text.

What a cell gives are rows of the tables, each a dict of plain values as it stands in the JSON:

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
    tokens_per_s : of decoding, median of the rounds; tokens_per_s_low and _high : their quartiles
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...measure.passes import Reference, collect, documents_of
from ...models.blocks import find_blocks, model_norm
from ...quantizing.quantize import experts_in
from ...routers import TopK
from ..budget import BudgetError, sensitivity
from ..budget.setting import find, resolve, with_main
from .bytes_read import expert_bytes, quantized_name
from .contenders import Contender, popularity
from .controls import Oracle, random_counts, shuffled, with_counts
from .effects import ORACLE, QUANTIZED, RANDOM, ROUTER, SHUFFLED, STATIC
from .speed import Timed, decode_speeds

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...measure.passes import Pass
    from ...null.layers import TokenNull
    from ...null.model import Null
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from .contenders import Nulls
    from .splits import Splits


MAX_PASSES = 3  # of the budget text for a row, after a warm start

IDENTITY = ("table", "role", "contender", "allocation", "budget", "targets")

Step = Callable[[], object]
Row = dict[str, Any]


class Runner:
    """Measures on one model. What several cells need is made once, when it is first asked for.

    Each method but `measure` is of cells of one role: of their parameters it makes the result,
    and calls `step` after each window of a text.
    """

    def __init__(
        self, model: nn.Module, splits: Splits, nulls: Nulls, prompts: Sequence[Tensor]
    ) -> None:
        self.model, self.splits, self.nulls, self.prompts = model, splits, nulls, prompts
        self.norm, self.top_k = model_norm(model)
        self.layers = len(find_blocks(model))

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.model, self.splits.test)

    @cached_property
    def stock(self) -> Pass:
        """The budget text through the model with its own top-k."""
        return collect(self.model, self.splits.budget)

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """(L, E) how often the model takes each expert."""
        return popularity(self.stock, self.top_k)

    def measure(self, row: Row, router: Any, null: AnyNull | None, step: Step, max_k: int) -> Any:
        """Write into a row what the test text gives; returns the counts (L, T)."""
        quality = self.reference.measure(router, null=null, step=step)
        predicted = quality.predicted.sum()
        nats = float(quality.nats.sum() / predicted)
        row |= {
            "status": "measured",
            "average_k": quality.average_k,
            "by_layer": quality.counts.mean(axis=1).tolist(),
            "at_floor": float((quality.counts == 1).mean()),
            "at_ceiling": float((quality.counts == max_k).mean()),
            "kl": quality.mean_kl,
            "nats": nats,
            "perplexity": math.exp(nats),
            "agreement": float(quality.agree.sum() / predicted),
            "by_document": {
                name: getattr(quality, name).tolist() for name in ("kl", "nats", "agree", "experts")
            },
        }
        read = expert_bytes(self.model) @ quality.counts
        documents = documents_of(self.splits.test)
        sums = np.bincount(documents, read, len(self.splits.test.documents))
        row["by_document"]["bytes"] = sums.tolist()
        row["bytes_per_token"] = float(read.mean())
        return quality.counts

    # ---- what belongs to no table ----

    def sensitivity(self, step: Step, *, layer: int, ks: Sequence[int]) -> dict[str, Any]:
        """What the layer's experts are worth on the budget text, for each of `ks`."""
        found = sensitivity(self.model, self.splits.budget, ks, layers=[layer], step=step)
        return {"nats": found[0].tolist()}

    def curve(self, step: Step, *, k: int) -> dict[str, Any]:
        """Static top-k, the same in every layer."""
        of = None, STATIC, "top-k", "equal", k, [k] * self.layers
        row = dict(zip(IDENTITY, of, strict=True))
        self.measure(row, TopK(k), None, step, k)
        return {"rows": [row]}

    def quantized(self, step: Step, *, bits: int) -> dict[str, Any]:
        """Static top-k to the model's own k, with the experts in fewer bits meanwhile."""
        _ = self.reference  # of the model as it is
        start = {
            "table": None,
            "role": QUANTIZED,
            "contender": quantized_name("k", bits),
            "allocation": "equal",
            "bits": bits,
        }
        rows = []
        with ExitStack() as stack:
            try:
                stack.enter_context(experts_in(self.model, bits))
            except ValueError as error:
                said = {"budget": self.top_k, "status": "outside", "reason": str(error)}
                return {"rows": [start | said]}
            for k in range(1, self.top_k + 1):
                rows.append(start | {"budget": k, "targets": [k] * self.layers})
                self.measure(rows[-1], TopK(k), None, step, k)
        return {"rows": rows}

    def decoding(
        self, step: Step, *, timed: list[dict[str, Any]], seed: int, threads: int
    ) -> dict[str, Any]:
        """Tokens per second of rows in each round, in turn; timed: what `_timed` takes."""
        settings = [self._timed(**one) for one in timed]
        speeds = decode_speeds(self.model, self.prompts, settings, seed=seed, step=step)
        return {"tokens_per_s": speeds, "threads": threads}

    def _timed(
        self, contender: dict[str, Any] | None, max_k: int, value: Any, bits: int | None
    ) -> Timed:
        """A row as it was measured; contender: None for static top-k."""
        if contender is None:
            static = [TopK(int(k)) for k in value] if isinstance(value, list) else TopK(value)
            return Timed(static, None, bits)
        router, null = self._made(Contender(**contender), max_k)
        value = tuple(value) if isinstance(value, list) else value
        return Timed(with_main(router, value), null, bits)

    def _made(self, contender: Contender, max_k: int) -> tuple[Router, Null | TokenNull | None]:
        """(router, null), its main parameter still to be set."""
        router = contender.make(max_k, self.weights)
        return router, resolve(router, self.nulls.get(contender.null))

    # ---- what belongs to a table; part: a `Part` as a dict ----

    def static(self, step: Step, *, part: Mapping[str, Any]) -> dict[str, Any]:
        """Top-k with a k for each layer."""
        rows = _rows(part, STATIC, "top-k")
        for row in rows:
            routers = [TopK(int(k)) for k in row["targets"]]
            self.measure(row, routers, None, step, part["max_k"])
        return {"rows": rows}

    def random(self, step: Step, *, part: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Numbers of experts that are drawn."""
        rows, max_k = _rows(part, RANDOM, "random R"), part["max_k"]
        tokens = self.splits.test.tokens
        for row in rows:
            counts = random_counts(row["targets"], tokens, max_k, [seed, 2, row["budget"]])
            self.measure(row, self._cut(TopK(max_k), counts, None), None, step, max_k)
        return {"rows": rows}

    def oracle(self, step: Step, *, part: Mapping[str, Any]) -> dict[str, Any]:
        """All budgets, each a start for the next."""
        start, rows = None, _rows(part, ORACLE, "oracle")
        for row in rows:
            wanted = row["targets"]
            if max(wanted) > self.top_k:
                reason = (
                    f"the oracle leaves out of the model's own top-{self.top_k}, so it takes at "
                    f"most {self.top_k} experts in a layer, not {max(wanted):g}"
                )
                row |= {"status": "outside", "reason": reason}
                continue
            with Oracle(self.model) as oracle:
                found = oracle.set_budget(self.splits.budget, wanted, start, step=step)
                thresholds, by_layer, start = found
                row |= {
                    "parameter": thresholds.tolist(),
                    "set_k": float(by_layer.mean()),
                    "set_by_layer": by_layer.tolist(),
                }
                self.measure(row, oracle.routers(thresholds), None, step, part["max_k"])
        return {"rows": rows}

    def router(
        self, step: Step, *, part: Mapping[str, Any], contender: Mapping[str, Any], seed: int
    ) -> dict[str, Any]:
        """All budgets, from few experts to many, each a warm start for the next; and shuffled."""
        router, null = self._made(Contender(**contender), part["max_k"])
        start, rows = None, []
        for row in _rows(part, ROUTER, contender["name"]):
            rows.append(row)
            try:
                start, shortfall = find(
                    router,
                    self.model,
                    self.splits.budget,
                    row["targets"],
                    null,
                    start=start,
                    passed=self.stock,
                    max_passes=MAX_PASSES,
                    step=step,
                )
            except BudgetError as error:
                row |= {"status": "outside", "reason": str(error)}
                continue
            parameter = start.parameter
            row |= {
                "parameter": list(parameter) if isinstance(parameter, tuple) else parameter,
                "set_k": start.average_k,
                "set_by_layer": start.by_layer.tolist(),
                "passes": len(start.passes),
                "note": shortfall or None,
            }
            counts = self.measure(row, start.router, null, step, part["max_k"])
            if part["allocation"] != "shared":
                rows.append({name: row[name] for name in IDENTITY} | {"role": SHUFFLED})
                dealt = self._cut(start.router, shuffled(counts, [seed, 1]), null)
                self.measure(rows[-1], dealt, None, step, part["max_k"])
        return {"rows": rows, "null": None if null is None else null.describe()}

    def _cut(self, router: Router, counts: NDArray[np.int32], null: AnyNull | None) -> list[Any]:
        rules = [block.rule() for block in find_blocks(self.model)]
        return with_counts(router, counts, rules, null=null, norm=self.norm, top_k=self.top_k)


def _rows(part: Mapping[str, Any], role: str, contender: str) -> list[Row]:
    """A row for each budget, without what is measured. part: a `Part` as a dict."""
    pairs = zip(part["budgets"], part["targets"], strict=True)
    of = part["table"], role, contender, part["allocation"]
    return [dict(zip(IDENTITY, (*of, *pair), strict=True)) for pair in pairs]
