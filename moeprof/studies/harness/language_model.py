"""The harness's own model class on a patched model, with the experts of real tokens counted.

Imports lm_eval, which takes seconds: imported where a cell runs, never for a type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.models.huggingface import HFLM

from ...checks import check_token_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...models.routing import Routing
    from ...patching.handle import Handle


class CountingLM(HFLM):
    """`HFLM` of lm_eval, which says of its requests what the routers made of them.

    HFLM pads the shorter requests of a batch on the right, with the token id 0, and gives the
    model no attention mask. A causal model computes the same for the tokens before the padding,
    so the scores need nothing; but the routers see padding as any other token. How long a row is,
    HFLM says after the call: it calls `_select_cont_toks` for each row, in order. A call's counts
    wait until then.

    Of text that is generated, the prompts count, whose attention mask is there.

    experts : (L,) int64, experts of each layer, summed over the tokens of all requests
    tokens : those tokens, without padding
    truncated : requests that were longer than the model's context and lost their beginning
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        handle: Handle,
        batch_size: int,
        step: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        self.cache_hook = _Steps(step)
        self.experts = np.zeros(len(handle.layers), np.int64)
        self.tokens = self.truncated = 0
        self._routed: dict[int, NDArray[np.int64]] = {}
        self._rows: Iterator[NDArray[np.int64]] = iter(())
        handle.on_routing(self._see)

    def _see(self, layer: int, routing: Routing) -> None:
        # Of a generation the first call is the one of the prompts.
        if layer not in self._routed:
            self._routed[layer] = (routing.chosen >= 0).sum(1).numpy(force=True)

    def _counts(self, width: int) -> NDArray[np.int64]:
        """(B, L, width) experts of each token of the call that was made."""
        layers = [self._routed[layer] for layer in sorted(self._routed)]
        return np.stack(layers).reshape(len(layers), -1, width).swapaxes(0, 1)

    def _add(self, counts: NDArray[np.int64]) -> None:
        """counts: (L, n), of n tokens that are real."""
        self.experts += counts.sum(axis=1)
        self.tokens += counts.shape[1]

    # ---- what HFLM calls ----

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        check_token_ids(self.model, [inps])
        self._routed = {}
        logits = super()._model_call(inps, *arguments, **options)
        self._rows = iter(self._counts(inps.shape[1]))
        return logits

    def _select_cont_toks(
        self, logits: Tensor, contlen: int | None = None, inplen: int | None = None
    ) -> Tensor:
        self._add(next(self._rows)[:, :inplen])
        return super()._select_cont_toks(logits, contlen=contlen, inplen=inplen)

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Tensor:
        check_token_ids(self.model, [context])
        self._routed = {}
        made = super()._model_generate(context, *arguments, **options)
        counts = self._counts(context.shape[1])
        real = options["attention_mask"].numpy(force=True) != 0
        each = len(counts) // len(real)  # beams
        for row, mask in zip(counts[::each], real, strict=True):
            self._add(row[:, mask])
        return made

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"an answer of {len(continuation)} tokens is longer than the model's context "
                    f"of {self.max_length}: leave the task out, or shorten its answers"
                )
            self.truncated += len(context) + len(continuation) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, True, override_bs)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.truncated += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        try:
            return super().generate_until(requests, disable_tqdm=True)
        except AssertionError as error:  # more tokens to generate than the context has
            raise ValueError(str(error)) from error


class _Steps:
    """In place of the harness's cache of answers: a step for each request that was answered."""

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self._step()
