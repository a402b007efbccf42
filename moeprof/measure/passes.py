"""Texts through a patched model: what its routers saw and chose, and what it then predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..backends.torch.prepared import precise
from ..models.blocks import find_blocks
from ..models.decoding import device_of
from ..patching.patch import patch
from ..routers import Router
from ..texts.windows import HeldOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..backends.spec import Rule
    from ..null.resolve import AnyNull
    from ..routers.base import Router
    from ..texts.windows import Window


# What `moeprof.patch` takes for a router: one for all layers, or one for each.
Routers = Router | str | Callable[..., Any] | list[Any] | dict[Any, Any] | None

BATCH = 512  # tokens in a call of the model


class Pass(NamedTuple):
    """What the routers of a model did on a text of T tokens, in L layers.

    logits : (L, T, E) float32, what a router sees of what each gate said: `Block.choice_logits`
    counts : (L, T) int32, experts of each token
    rejections : (L, T) int32, before min_k and max_k
    documents : (T,) int64, the index of each token's document
    rules : of each layer, what a router on these logits has to keep to: `Block.choice_rule`
    """

    logits: NDArray[np.float32]
    counts: NDArray[np.int32]
    rejections: NDArray[np.int32]
    documents: NDArray[np.int64]
    rules: list[Rule]


class Quality(NamedTuple):
    """How a routed model predicts a text, summed by document (D documents).

    predicted : (D,) int64, tokens that were predicted
    kl : (D,) nats, the sum of KL(full model || routed model) over the predicted tokens
    nats : (D,) the sum of -ln P(next token)
    agree : (D,) int64, predictions whose most probable token is that of the full model
    tokens : (D,) int64, tokens that were routed
    counts : (L, T) int32, experts of each token by layer
    experts : (D,) experts summed over the tokens, averaged over the layers
    """

    predicted: NDArray[np.int64]
    kl: NDArray[np.float64]
    nats: NDArray[np.float64]
    agree: NDArray[np.int64]
    tokens: NDArray[np.int64]
    counts: NDArray[np.int32]
    experts: NDArray[np.float64]

    @property
    def average_k(self) -> float:
        """Experts per token, over all tokens and layers."""
        return float(self.experts.sum() / self.tokens.sum())

    @property
    def mean_kl(self) -> float:
        """KL(full model || routed model) in nats per predicted token."""
        return float(self.kl.sum() / self.predicted.sum())


def collect(
    model: nn.Module,
    text: HeldOut,
    router: Routers = None,
    *,
    null: AnyNull | None = None,
    norm: str = "model",
    step: Callable[[], object] = lambda: None,
) -> Pass:
    """A Pass: the text through the model patched with `router` (arguments as `patch`).

    text: HeldOut; step is called for each window. The model is afterwards as it was.
    """
    base = getattr(model, "base_model", model)  # the head is not needed
    with patch(model, router, null=null, norm=norm) as handle, torch.inference_mode():
        calls: list[list[Any]] = [[] for _ in handle.layers]
        handle.on_routing(lambda layer, routing: calls[layer].append(routing))
        for windows in batches(text):
            base(input_ids=ids_for(model, windows), use_cache=False)
            for _ in windows:
                step()
    if any(routing.logits is None for layer in calls for routing in layer):
        raise ValueError("the model's gates give no logits, so no router can be set by them")

    def joined(field: str) -> list[Tensor]:
        return [torch.cat([getattr(routing, field) for routing in layer]) for layer in calls]

    counts, rejections = (
        np.stack([part.numpy(force=True) for part in joined(field)])
        for field in ("counts", "rejections")
    )
    blocks = find_blocks(model)
    each = zip(blocks, joined("logits"), strict=True)
    logits = torch.stack([block.choice_logits(said) for block, said in each]).numpy()
    rules = [block.choice_rule() for block in blocks]
    return Pass(logits, counts, rejections, documents_of(text), rules)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, for dropout would make each pass another; then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def documents_of(text: HeldOut) -> NDArray[np.int64]:
    """(T,) the index of each token's document."""
    sizes = [window.ids.shape[1] for window in text.windows]
    return np.repeat([window.document for window in text.windows], sizes)


class Reference:
    """What the unchanged model predicts of a text: what routed models are measured against.

    Keeps its log-probabilities, 4 bytes for each token and entry of the vocabulary.
    """

    def __init__(
        self, model: nn.Module, text: HeldOut, step: Callable[[], object] = lambda: None
    ) -> None:
        self.model, self.text = model, text
        self.log_probs = []
        with patch(model), torch.inference_mode():  # its own top-k, on the same kernels
            for windows in batches(text):
                self.log_probs.append(_log_probs(model, ids_for(model, windows)).cpu())
                for _ in windows:
                    step()

    def measure(
        self,
        router: Routers = None,
        *,
        null: AnyNull | None = None,
        norm: str = "model",
        step: Callable[[], object] = lambda: None,
    ) -> Quality:
        """The quality of the model patched with `router` (arguments as `patch`)."""
        size, rows = len(self.text.documents), documents_of(self.text)
        kl, nats = np.zeros(size), np.zeros(size)
        agree, predicted = np.zeros(size, np.int64), np.zeros(size, np.int64)
        patched = patch(self.model, router, null=null, norm=norm)
        with patched as handle, torch.inference_mode():
            calls: list[list[Any]] = [[] for _ in handle.layers]
            handle.on_routing(lambda layer, routing: calls[layer].append(routing.counts))
            for windows, full in zip(batches(self.text), self.log_probs, strict=True):
                ids = ids_for(self.model, windows)
                routed = _log_probs(self.model, ids)
                at = [window.document for window in windows]
                full = full.to(routed.device)
                difference = torch.where(full > -torch.inf, full - routed, 0)
                parts = _sums(full.exp() * difference)
                np.add.at(kl, at, parts)
                likely = _sums(routed.gather(2, ids[:, 1:, None]))
                np.add.at(nats, at, -likely)
                same = (routed.argmax(2) == full.argmax(2)).sum(1)
                np.add.at(agree, at, same.numpy(force=True))
                np.add.at(predicted, at, ids.shape[1] - 1)
                for _ in windows:
                    step()
        counts = np.stack([torch.cat(layer).numpy(force=True) for layer in calls])
        experts: Any = np.bincount(rows, counts.mean(axis=0), size)
        tokens = np.bincount(rows, minlength=size)
        return Quality(predicted, kl, nats, agree, tokens, counts, experts)


def batches(text: HeldOut) -> Iterator[list[Window]]:
    """Its windows in order, those of one length together up to `BATCH` tokens: short ones alone
    leave the time to Python."""
    batch: list[Window] = []
    for window in text.windows:
        size = window.ids.shape[1]
        if batch and (batch[0].ids.shape[1] != size or (len(batch) + 1) * size > BATCH):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def ids_for(model: nn.Module, windows: Iterable[Window]) -> Tensor:
    """(B, n) token ids of windows of one length, where the model takes them."""
    return torch.cat([window.ids for window in windows]).to(device_of(model))


def _sums(values: Tensor) -> NDArray[np.float64]:
    """(B,) of values (B, n, V)."""
    return values.sum((1, 2), dtype=precise(values.device)).numpy(force=True)


def _log_probs(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, n - 1, V) float32 log-probabilities of the tokens (B, n) after the first."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return torch.log_softmax(logits, -1)
