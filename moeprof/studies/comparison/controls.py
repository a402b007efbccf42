"""Routings that no router would choose: they say what a router's choices are worth.

Shuffled-k gives a router's own numbers of experts to other tokens; random R draws them; the
oracle looks at what the experts' outputs would be. All run as routers in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from ...backends.ops import run_experts
from ...backends.spec import Rule
from ...backends.tables import table_of
from ...measure.passes import collect
from ...measure.routing import by_layer, choose
from ...models.blocks import find_blocks, model_norm
from ...routers import TopK

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import nn

    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ...texts.windows import HeldOut


Route = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits (T,E): weights, expert ids
ORACLE_PASSES = 4


def reweigh(weights: Tensor, kept: Tensor, norm: str, mass: Tensor | None = None) -> Tensor:
    """Weights of the slots that are kept, 0 for the others; (T, k) both, float32.

    weights: softmax probabilities over all experts. norm: "none" leaves them, "sum" makes them
    sum to 1, "mass" to `mass` (T,), what the model's own top-k has.
    """
    left = torch.where(kept, weights, 0)
    if norm == "none":
        return left
    total = left.double().sum(1, keepdim=True)
    share: Any = 1.0 if norm == "sum" else cast("Tensor", mass).double()[:, None]
    scale = share / total
    return (left * scale).float()


def with_counts(
    router: Router,
    counts: NDArray[np.int32],
    rules: list[Rule],
    *,
    null: AnyNull | None,
    norm: str,
    top_k: int,
) -> list[Route]:
    """Callables for `patch`, one a layer: the router's own order of experts, cut at given counts.

    router: a Router. counts: (L, T) integers from 1 to the router's max_k, for the tokens in the
    order in which they come: the callables serve one pass over a text. rules: of each layer.
    null: a Null (or one by token), None for a router without p-values.
    """
    layers = len(counts)
    pairs = by_layer(router, null, layers)

    def one(layer: int) -> Route:
        scalar, own = pairs[layer]
        most = cast("int", scalar.max_k)  # `at` has set it
        ordered = replace(scalar, min_k=most, max_k=most)
        if isinstance(scalar, TopK):
            ordered = TopK(most, temperature=scalar.temperature)
        position, plain = 0, rules[layer]._replace(scale=1.0)  # which acts last

        def route(logits: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal position
            wanted = torch.from_numpy(counts[layer, position : position + len(logits)])
            wanted = wanted.to(logits.device)
            position += len(logits)
            weights, experts, *_ = choose(ordered, logits, own, "none", top_k, plain)
            kept = torch.arange(experts.shape[1], device=wanted.device) < wanted[:, None]
            mass = None
            if norm == "mass":
                mass = choose(TopK(top_k), logits, None, "none", top_k, plain)[0].sum(1)
            weights = reweigh(weights, kept, norm, mass) * rules[layer].scale
            return weights, torch.where(kept, experts, -1)

        return route

    return [one(layer) for layer in range(layers)]


def shuffled(counts: NDArray[np.int32], seed: int | Sequence[int]) -> NDArray[np.int32]:
    """Counts (L, T) with each layer's own dealt out to its tokens anew, over the whole text."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(layer) for layer in counts])


def random_counts(
    targets: ArrayLike, tokens: int, max_k: int, seed: int | Sequence[int]
) -> NDArray[np.int32]:
    """(L, T) draws of R = 1 + Binomial(max_k - 1, (B_l - 1)/(max_k - 1)), whose mean is B_l.

    targets: (L,) from 1 to max_k.
    """
    rng = np.random.default_rng(seed)
    chance = (np.asarray(targets, float) - 1) / max(max_k - 1, 1)
    return (1 + rng.binomial(max_k - 1, chance[:, None], (len(chance), tokens))).astype(np.int32)


class Oracle:
    """The model's own top-k, without the slots whose output ||w_e f_e(x)|| is below tau_l.

    The slot with the largest output stays. It runs all k experts to choose among them, so it is
    for evaluation only: what a router could do that knew the experts' outputs. As a context
    manager it sees the hidden states by a hook on each block.
    """

    def __init__(self, model: nn.Module, norm: str = "model") -> None:
        self.model = model
        own, self.top_k = model_norm(model)
        self.norm, self.own_norm = own if norm == "model" else norm, own
        self.blocks = find_blocks(model)
        # Of the slots' outputs, (T, k) a call.
        self.sizes: list[list[Tensor]] = [[] for _ in self.blocks]
        self._hidden: list[Any] = [None] * len(self.blocks)
        self._hooks: list[Any] = []

    def __enter__(self) -> Oracle:
        for index, block in enumerate(self.blocks):
            hook = self._keep(index)
            self._hooks.append(block.module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _keep(self, index: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._hidden[index] = hidden.reshape(-1, hidden.shape[-1])

        return keep

    def routers(self, thresholds: NDArray[np.float64]) -> list[Route]:
        """Callables for `patch`, one a layer; thresholds (L,)."""
        return [self._router(layer, float(tau)) for layer, tau in enumerate(thresholds)]

    def _router(self, layer: int, tau: float) -> Route:
        def route(logits: Tensor) -> tuple[Tensor, Tensor]:
            top = TopK(self.top_k)
            rule = self.blocks[layer].rule()
            unscaled = rule._replace(scale=1.0)  # the scale acts last
            plain, experts, *_ = choose(top, logits, None, "none", self.top_k, unscaled)
            own = reweigh(plain, experts >= 0, self.own_norm) * rule.scale
            sizes = self._sizes(layer, experts, own)
            self.sizes[layer].append(sizes)
            kept = sizes >= torch.clamp(sizes.max(1, keepdim=True).values, max=tau)
            weights = reweigh(plain, kept, self.norm, plain.sum(1)) * rule.scale
            return weights, torch.where(kept, experts, -1)

        return route

    def _sizes(self, layer: int, experts: Tensor, weights: Tensor) -> Tensor:
        """(T, k) norms of what each slot adds to the block's output."""
        block, x = self.blocks[layer], self._hidden[layer]
        read, _ = block.family.readable(block.module)
        table = table_of(read)
        slots = [
            run_experts(x, experts[:, [slot]], weights[:, [slot]].to(x.dtype), table, "oracle")
            for slot in range(self.top_k)
        ]
        return torch.stack([slot.float().norm(dim=1) for slot in slots], dim=1)

    def set_budget(
        self,
        text: HeldOut,
        targets: ArrayLike,
        start: NDArray[np.float32] | None = None,
        tolerance: float = 0.01,
        step: Callable[[], object] = lambda: None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float32]]:
        """(thresholds (L,), experts per token on the text (L,), sizes (L, T, k)).

        targets (L,), at most k: each layer's threshold is solved for on the sizes of the pass
        before (`start` is a neighbour's), and again, as the layers before change what it sees.
        """
        targets = np.asarray(targets, float)
        best: Any = None
        sizes = self._pass(text, np.zeros(len(targets)), step)[0] if start is None else start
        for _ in range(ORACLE_PASSES):
            pairs = zip(sizes, targets, strict=True)
            thresholds = np.array([threshold_for(layer, target) for layer, target in pairs])
            sizes, found = self._pass(text, thresholds, step)
            error = np.abs(found / targets - 1).max()
            if best is None or error < best[0]:
                best = error, thresholds, found, sizes
            if error <= tolerance:
                break
        return best[1:]

    def _pass(
        self, text: HeldOut, thresholds: NDArray[np.float64], step: Callable[[], object]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        self.clear()
        passed = collect(self.model, text, self.routers(thresholds), norm=self.norm, step=step)
        sizes = np.stack([torch.cat(layer).numpy(force=True) for layer in self.sizes])
        self.clear()
        return sizes, passed.counts.mean(axis=1)

    def clear(self) -> None:
        """Forget the sizes of the passes so far."""
        for layer in self.sizes:
            layer.clear()


def threshold_for(sizes: NDArray[np.float32], target: float) -> float:
    """tau at which a token keeps `target` of its slots on average, one at least; sizes (T, k)."""
    tokens, k = sizes.shape
    rest = np.sort(sizes, axis=1)[:, : k - 1].ravel()  # the largest always stays
    wanted = round((target - 1) * tokens)
    if wanted >= rest.size:
        return 0.0
    if wanted <= 0:
        return np.inf
    descending = np.sort(rest)[::-1]
    # Between two sizes, so that rounding in the next pass does not decide about one of them.
    return float((descending[wanted - 1] + descending[wanted]) / 2)
