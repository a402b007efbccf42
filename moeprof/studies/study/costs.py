"""What passes of a model take on this machine, from a short measurement."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ...measure.fitting import Form, fit_nulls
from ...measure.generate import greedy
from ...measure.loss import nats
from ...measure.passes import Reference, collect, evaluating, patched, quick
from ...measure.routing import by_layer
from ...models.blocks import experts_of
from ...models.decoding import device_of
from ...models.tokens import token_ids
from ...null.resolve import resolve_null
from ...patching.patch import patch
from ...routers import Router, TopK
from ...show.console import progress
from ...texts.windows import HeldOut
from ..engine.load import COLLECT, DECODE, FIT, KL, LOSS, STOCK, STOCK_DECODE

if TYPE_CHECKING:
    import os

    from rich.console import Console
    from torch import Tensor, nn

    from ...checks import Tokenizer
    from ...measure.passes import Pass
    from ...null.model import Null
    from ...null.resolve import AnyNull
    from ...show.console import Bar
    from ...texts.windows import Window
    from ..engine.load import Load


WINDOW, PROMPT, NEW_TOKENS = 512, 64, 8  # tokens of what is run
REPEATS, LONG = 5, 0.5  # a pass that takes longer, in seconds, is run once
STEPS = 10  # passes that are timed, and one that isn't


class Rate(NamedTuple):
    """Seconds of a token: `fixed`, and `each` for each of its experts."""

    fixed: float
    each: float

    def at(self, experts: float) -> float:
        return self.fixed + self.each * experts


class Costs:
    """The rates of each kind of pass; nulls: [Null] of the forms, of hardly any text.

    windows: of the texts that a study reads, of which the longest is run, since a token takes
        longer in a short one; passages: that nulls are fitted to; forms: of these nulls.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        windows: Sequence[Window],
        passages: Sequence[str],
        forms: Sequence[Form],
        console: Console,
    ) -> None:
        longest = max(windows, key=lambda window: min(window.ids.shape[1], WINDOW))
        ids = longest.ids[:, :WINDOW]
        document = {"domain": "", "name": "", "tokens": ids.shape[1], "bytes": longest.num_bytes}
        self.text = HeldOut([longest._replace(document=0, ids=ids)], [document])
        self.top_k = experts_of(model)[1]
        self.rates: dict[str, Rate] = {}
        with (
            evaluating(model),
            progress(console, STEPS, "a short measurement", "passes", still=True) as bar,
        ):
            self._measure(model, bar)
            self.nulls = self._fit(model, tokenizer, passages, forms)
            bar.step()

    def seconds(self, load: Load) -> float:
        """What a Load takes."""
        return self.tokens(load) * self.rates[load.kind].at(self.experts(load))

    def tokens(self, load: Load) -> float:
        return load.tokens + load.each * (self.experts(load) if load.each else 0)

    def experts(self, load: Load) -> float:
        """Experts per token: of a router as it would choose on the logits that were measured."""
        if load.experts is None:
            return self.top_k
        if not isinstance(load.experts, Router):
            return float(load.experts)
        return self._chosen(load.experts, load.null)

    def _chosen(self, router: Router, null: AnyNull | os.PathLike[str] | str | None) -> float:
        given: Any = resolve_null(null) if router.wants_null and null is not None else None
        logits, rules = self._passed.logits, self._passed.rules
        pairs = zip(by_layer(router, given, len(logits)), logits, rules, strict=True)
        means = [one.count_tokens(seen, own, rule)[0].mean() for (one, own), seen, rule in pairs]
        return float(statistics.fmean(map(float, means)))

    def _measure(self, model: nn.Module, bar: Bar) -> None:
        def timed(call: Callable[[], object], tokens: int) -> float:
            """Seconds of a token."""
            begun = time.perf_counter()
            call()
            took = [time.perf_counter() - begun]
            while len(took) < REPEATS and took[0] < LONG:
                begun = time.perf_counter()
                call()
                took.append(time.perf_counter() - begun)
            bar.step()
            return statistics.median(took) / tokens

        def loss(k: int) -> Callable[[], object]:
            def run() -> object:
                with patched(model, TopK(k)):
                    return nats(model, ids)

            return run

        ids = self.text.windows[0].ids
        size, own = ids.shape[1], self.top_k
        reference = Reference(model, self.text)  # uncounted: the first pass waits for the disk
        bar.step()

        at_own = timed(loss(own), size)
        few = 1 if own > 1 else 2
        each = max((at_own - timed(loss(few), size)) / (own - few), 0.0)
        found: list[Pass] = []
        collected = timed(lambda: found.append(collect(model, self.text, TopK(own))), size)
        self._passed = found[-1]
        compared = timed(lambda: reference.measure(TopK(own)), size)
        for kind, at in ((LOSS, at_own), (COLLECT, collected), (KL, compared)):
            self.rates[kind] = Rate(at - each * own, each)
        with torch.inference_mode():
            stock = timed(lambda: model(input_ids=ids.to(device_of(model)), use_cache=False), size)
        self.rates[STOCK] = Rate(stock, 0.0)
        self._decoding(model, ids[:, :PROMPT], timed)

    def _decoding(self, model: nn.Module, ids: Tensor, timed: Callable[..., float]) -> None:
        def decoding(k: int | None) -> float:
            """Seconds of a step, without those of the prompt."""
            took: list[float] = []

            def once() -> None:
                with nullcontext() if k is None else patch(model, TopK(k)):
                    took.append(greedy(model, ids, NEW_TOKENS + 1)[1])

            timed(once, 1)
            return statistics.median(took) / NEW_TOKENS

        own, few = self.top_k, 1 if self.top_k > 1 else 2
        at_own = decoding(own)
        each = max((at_own - decoding(few)) / (own - few), 0.0)
        self.rates[DECODE] = Rate(at_own - each * own, each)
        self.rates[STOCK_DECODE] = Rate(decoding(None), 0.0)

    def _fit(
        self, model: nn.Module, tokenizer: Tokenizer, passages: Sequence[str], forms: Sequence[Form]
    ) -> list[Null]:
        few: list[str] = []
        tokens = 0
        for passage in passages:
            few.append(passage)
            tokens += len(token_ids(tokenizer, passage)) - 1
            if tokens >= WINDOW:
                break
        begun = time.perf_counter()
        with quick(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of so little text
            nulls = fit_nulls(model, tokenizer, few, forms, progress=False)
        self.rates[FIT] = Rate((time.perf_counter() - begun) / nulls[0].tokens, 0.0)
        return nulls
