"""One configuration at a time on one text, as sums by document."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from ...checks import check_token_ids
from ...measure.passes import Quality, Reference, evaluating
from ...models.tokens import most_positions
from ...routers.base import Router
from ...routers.table import describe
from ...texts.windows import HELDOUT_TOKENS, heldout_windows
from ..budget.setting import BudgetError
from ..budget.stock import Setter

if TYPE_CHECKING:
    from torch import nn

    from ...checks import Tokenizer
    from ...null.resolve import AnyNull
    from ...texts.documents import Text
    from ...texts.windows import HeldOut


CONTEXT = 2048  # tokens, where the model has as many positions


class Protocol(NamedTuple):
    """How a text is read: windows of `context` tokens, `stride` tokens apart."""

    context: int
    stride: int

    def words(self) -> str:
        """What is scored, and with what before it."""
        apart = "one after the other" if self.stride == self.context else f"{self.stride:,} apart"
        least = self.context - self.stride
        before = (
            f"Every scored token has at least {least:,} tokens of its document before it, or all "
            "that there are. "
            if least
            else ""
        )
        return (
            f"Each document is cut into windows of {self.context:,} tokens, {apart}, the last one "
            "shorter. Each window is read by itself. In it those tokens are scored that no "
            "window before had; the first token of a window is never scored, as nothing stands "
            f"before it. {before}No token (bos, eos) is put before a document."
        )


def protocol_for(
    model: nn.Module, context: int | None = None, stride: int | None = None
) -> Protocol:
    """The protocol asked for, or windows of 2,048 tokens (fewer where the model takes fewer), one
    after the other; ValueError where the model can't read so many, or a stride leaves gaps."""
    most = most_positions(model)
    if context is None:
        context = min(CONTEXT, most or CONTEXT)
    if context < 2 or (most is not None and context > most):
        limit = "" if most is None else f" to {most:,}, the positions of this model"
        raise ValueError(f"context: expected 2{limit or ' or more'} tokens, got {context:,}")
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride: expected 1 to {context:,}, the context, got {stride:,}")
    return Protocol(context, stride)


def evaluation_text(
    tokenizer: Tokenizer,
    documents: Iterable[Text],
    protocol: Protocol,
    tokens: int = HELDOUT_TOKENS,
    seed: int = 0,
) -> HeldOut:
    """The windows of the documents; at most about `tokens` tokens, `seed` chooses which."""
    context, stride = protocol
    return heldout_windows(tokenizer, documents, tokens, seed, window=context, stride=stride)


class Evaluation:
    """A model and a text (HeldOut); calibration: the HeldOut that budgets are set on.

    The unpatched model's predictions are kept as `Reference` says, from the first measurement on,
    and its pass over the calibration text from the first budget on. Nothing is kept of a
    configuration.
    """

    def __init__(
        self, model: nn.Module, text: HeldOut, calibration: HeldOut, norm: str = "model"
    ) -> None:
        check_token_ids(model, (window.ids for window in text.windows))
        self.model, self.text, self.norm = model, text, norm
        self._setter = Setter(model, calibration, norm)
        self._reference: Reference | None = None

    def steps(self, budget: float | None) -> int:
        """How often `measure` calls `step` at most."""
        return len(self.text.windows) + (0 if budget is None else self._setter.steps)

    @cached_property
    def sizes(self) -> list[int]:
        """(D,) bytes of the scored text of each document."""
        return [document["bytes"] for document in self.text.documents]

    def measure(
        self,
        router: Router | Callable[..., Any] | None,
        *,
        null: AnyNull | None = None,
        budget: float | None = None,
        step: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:
        """A router on the text: plain values; the model is afterwards as it was.

        router: None for the model's own routing. budget: experts per token, which the router's
        main parameter is set to first. Returns {nats, kl, agree, predicted, tokens, experts,
        bytes: (D,) sums by document, as in `Quality`; router: what was run, in words; seconds};
        with a budget also parameter, value, average_k on the calibration text and note. A budget
        out of reach gives {error: why} alone.
        """
        begun, found = time.perf_counter(), {}
        with evaluating(self.model):
            if isinstance(router, Router) and budget is not None:
                try:
                    setting = self._setter.run(router, budget, null, step)
                except BudgetError as error:
                    return {"error": str(error).removeprefix("average_k: ")}
                router = setting.router
                found = {"parameter": router.main, "value": setting.value}
                found |= {"average_k": setting.average_k, "note": setting.note}
            quality = self._quality(router, null, step)
        return {
            **found,
            "router": _words(router),
            "nats": quality.nats.tolist(),
            "kl": quality.kl.tolist(),
            "agree": quality.agree.tolist(),
            "predicted": quality.predicted.tolist(),
            "tokens": quality.tokens.tolist(),
            "experts": quality.experts.tolist(),
            "bytes": self.sizes,
            "seconds": time.perf_counter() - begun,
        }

    def _quality(
        self,
        router: Router | Callable[..., Any] | None,
        null: AnyNull | None,
        step: Callable[[], object],
    ) -> Quality:
        if self._reference is None:  # one more pass, unless its own quality is what is asked for
            own = step if router is None else _nothing
            self._reference = Reference(self.model, self.text, own)
        if router is None:
            return self._reference.own
        return self._reference.measure(router, null=null, norm=self.norm, step=step)


def _words(router: Router | Callable[..., Any] | None) -> str:
    if router is None:
        return "the model's own"
    return repr(router) if isinstance(router, Router) else describe([router])


def _nothing() -> None:
    pass
