"""What each expert did for the next token: the model run again without it.

All copies of a position (one without a change, one for each change) are queries of one forward
pass over one KV cache: each sees the tokens before its position and itself, by the attention
mask. So a document is prefilled once, nothing of the cache is copied, and positions of a
document share a pass. A change acts on one layer; the deeper layers route what then reaches
them, as they do in use.

A cache that does not keep every token, such as that of sliding windows or of linear attention,
can't be shared so. There the tokens before each position are prefilled, and each copy of the
position gets a copy of what is cached of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from ...measure.passes import ids_for, patched
from ...measure.routing import affinities, by_layer, choose
from ...models.blocks import find_blocks, model_norm
from ...models.decoding import cache_of, decode, keeps_all
from ...texts.windows import HeldOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...backends.spec import Rule
    from ...null.layers import LayerNull, TokenNull
    from ...null.resolve import AnyNull
    from ...routers.base import Router
    from ...texts.windows import Window


SINGLE, JOINT, ADDED = 0, 1, 2  # kinds of change
ROWS = 512  # copies in one pass: the mask has ROWS x (window + ROWS) entries
TOKENS = 4096  # of copies that share no cache: their number x the tokens of each, cached or not


class Ablation(NamedTuple):
    """Changes of the next-token loss; P positions, L layers, N changes.

    documents : (P,) the index of each position's document
    loss : (P,) nats, the next-token loss with nothing changed
    counts, rejections : (P, L) experts that ran, and the router's count before min_k and max_k
    position, kind, layer, slot : (N,) what was changed. SINGLE: that slot emptied (0 is the best
        expert); JOINT: that slot and all after it; ADDED: a random unselected expert added
        (slot 0)
    delta : (N,) nats, the loss after the change minus `loss`; above 0 the change hurt
    """

    documents: NDArray[np.int64]
    loss: NDArray[np.float64]
    counts: NDArray[np.int32]
    rejections: NDArray[np.int32]
    position: NDArray[np.int64]
    kind: NDArray[np.int64]
    layer: NDArray[np.int64]
    slot: NDArray[np.int64]
    delta: NDArray[np.float64]


def _sizes(text: HeldOut) -> list[int]:
    """Of each window the positions that can be sampled."""
    return [max(window.ids.shape[1] - 2, 0) for window in text.windows]


def most_positions(text: HeldOut) -> int:
    """How many `sample_positions` can give."""
    return sum(_sizes(text))


def sample_positions(text: HeldOut, count: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """For each window the sampled positions, ascending: `count` in all, even over documents.

    A position has a token before it (the first of a window is left out, as in the fit of a
    null) and one after it, whose loss is measured. ValueError if the text has too few.
    """
    sizes = _sizes(text)
    window = np.repeat(np.arange(len(sizes)), sizes)
    place = np.concatenate([np.arange(1, size + 1) for size in sizes])
    if count > len(place):
        raise ValueError(f"positions: {count} asked for, the held-out text has {len(place)}")
    order = np.random.default_rng(seed).permutation(len(place))
    window, place = window[order], place[order]
    document = np.array([w.document for w in text.windows])[window]
    by_document = np.argsort(document, kind="stable")
    starts = np.searchsorted(document[by_document], document[by_document])
    turn = np.empty(len(place), int)  # its number within its document
    turn[by_document] = np.arange(len(place)) - starts
    chosen = np.argsort(turn, kind="stable")[:count]
    return [np.sort(place[chosen][window[chosen] == w]) for w in range(len(sizes))]


class Changes(NamedTuple):
    """Copies of positions, one a row (N,): which position, and what is changed in which layer.

    place : position in the window; layer : -1 for none
    first, last : slots first <= slot < last of that layer are emptied
    extra : expert that is added to that layer, or -1
    """

    place: NDArray[np.int64]
    layer: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    extra: NDArray[np.int64]

    def take(self, rows: NDArray[np.int64]) -> Changes:
        return Changes(*(field[rows] for field in self))

    def at_end_of(self, length: int) -> Changes:
        """A row for each of `length` tokens, of which the last has the change."""
        repeated = Changes(*(np.repeat(field, length) for field in self))
        is_last = np.arange(len(repeated.place)) % length == length - 1
        return repeated._replace(layer=np.where(is_last, repeated.layer, -1))


class ChangedRouter:
    """A layer's router as a callable for `patch`: it routes, then applies `changes`, if any.

    seen : what it last routed without changes: (experts (T, k), counts (T,), rejections (T,))
    """

    def __init__(
        self,
        layer: int,
        router: Router,
        null: LayerNull | TokenNull | None,
        norm: str,
        norm_k: int,
        rule: Rule,
    ) -> None:
        self.layer, self.router, self.null = layer, router, null
        self.norm, self.norm_k, self.rule = norm, norm_k, rule
        self.changes: Changes | None = None
        self.seen: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]] | None = None

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, experts, counts, rejections = choose(
            self.router, logits, self.null, self.norm, self.norm_k, self.rule
        )
        if self.changes is None:
            self.seen = (
                experts.numpy(force=True),
                counts.numpy(force=True),
                rejections.numpy(force=True),
            )
            return weights, experts
        return self._changed(logits, weights, experts)

    def _changed(self, logits: Tensor, weights: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
        changes = cast("Changes", self.changes)
        mine, first, last, extra = (
            torch.from_numpy(values).to(logits.device)[:, None]
            for values in (changes.layer == self.layer, changes.first, changes.last, changes.extra)
        )
        slot = torch.arange(experts.shape[1], device=logits.device)
        emptied = mine & (slot >= first) & (slot < last)
        # An added expert weighs its affinity times what the norm makes of the selected ones'.
        every = affinities(logits.float() / self.router.temperature, self.rule)
        own = every.gather(1, experts.long().clamp(min=0)) * (experts >= 0)
        scale = weights.sum(1, keepdim=True) / own.sum(1, keepdim=True)
        extra = torch.where(mine, extra, -1)
        added = torch.where(extra >= 0, every.gather(1, extra.clamp(min=0)) * scale, 0)
        experts = torch.where(emptied, -1, experts)
        return torch.cat([weights, added], 1), torch.cat([experts, extra.to(experts.dtype)], 1)


def ablate(
    model: nn.Module,
    text: HeldOut,
    router: Router,
    *,
    positions: Sequence[NDArray[np.int64]],
    null: AnyNull | None = None,
    norm: str = "model",
    seed: int = 0,
    step: Callable[[], object] = lambda: None,
) -> Ablation:
    """Measure what each selected expert did at the sampled positions.

    Parameters
    ----------
    router : Router
        Also routes the tokens before each position. null, norm : as for `patch`.
    positions : for each window of `text` the positions, as `sample_positions` returns them
    seed : chooses the experts that are added
    step : called after each window

    Returns
    -------
    Ablation
        The model is afterwards as it was.
    """
    routers = changed_routers(model, router, null, norm)
    rng, parts, count = np.random.default_rng(seed), [], 0
    with patched(model, routers), torch.inference_mode():
        for window, places in zip(text.windows, positions, strict=True):
            if len(places):
                part = _ablate_window(model, window, places, routers, rng)
                parts.append(part._replace(position=part.position + count))
                count += len(places)
            step()
    return Ablation(*map(np.concatenate, zip(*parts, strict=True)))


def changed_routers(
    model: nn.Module, router: Router, null: AnyNull | None, norm: str = "model"
) -> list[ChangedRouter]:
    """One for each layer; null: a Null or None."""
    own_norm, norm_k = model_norm(model)
    norm = own_norm if norm == "model" else norm
    blocks = find_blocks(model)
    layers = zip(blocks, by_layer(router, null, len(blocks)), strict=True)
    return [
        ChangedRouter(i, scalar, own, norm, norm_k, block.rule())
        for i, (block, (scalar, own)) in enumerate(layers)
    ]


def _ablate_window(
    model: nn.Module,
    window: Window,
    places: NDArray[np.int64],
    routers: list[ChangedRouter],
    rng: np.random.Generator,
) -> Ablation:
    """The Ablation of the positions of one window."""
    ids = ids_for(model, [window])[:, : places[-1] + 2]
    cache = prefill(model, ids[:, :-1], routers)
    seen = [tuple(part[places] for part in router.seen or ()) for router in routers]
    counts, rejections = (np.stack([s[i] for s in seen], axis=1) for i in (1, 2))
    experts = [
        _unselected(s[0], block.num_experts, rng)
        for s, block in zip(seen, find_blocks(model), strict=True)
    ]
    rows, label = plan(places, counts, np.stack(experts, axis=1))
    loss = changed_losses(model, ids, cache, rows, routers)
    before = loss[: len(places)]
    position, kind, layer, slot = (column[len(places) :] for column in label)
    return Ablation(
        np.full(len(places), window.document),
        before,
        counts,
        rejections,
        position,
        kind,
        layer,
        slot,
        loss[len(places) :] - before[position],
    )


def _unselected(
    experts: NDArray[np.int32], num_experts: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(P,) a random expert that is not among experts (P, k), -1 where all are."""
    key = rng.random((len(experts), num_experts + 1))
    np.put_along_axis(key, np.where(experts >= 0, experts, num_experts), -1.0, axis=1)
    key[:, num_experts] = -1.0  # where the padding went
    best = key.argmax(axis=1)
    return np.where(key.max(axis=1) >= 0, best, -1)


def plan(
    places: NDArray[np.int64], counts: NDArray[np.int32], unselected: NDArray[np.int64]
) -> tuple[Changes, NDArray[np.int64]]:
    """(Changes, (position, kind, layer, slot)) for positions with counts (P, L) of experts.

    The first P rows have no change (kind -1). Emptying the slots from the last one on is that
    slot's SINGLE, so JOINT stops before it. unselected (P, L): the experts to add.
    """
    rows, label = [], []
    for p, place in enumerate(places):
        rows.append((place, -1, 0, 0, -1))
        label.append((p, -1, -1, 0))
    for p, place in enumerate(places):
        for layer, count in enumerate(counts[p]):
            for slot in range(count):
                rows.append((place, layer, slot, slot + 1, -1))
                label.append((p, SINGLE, layer, slot))
            for slot in range(count - 1):
                rows.append((place, layer, slot, count, -1))
                label.append((p, JOINT, layer, slot))
            if unselected[p, layer] >= 0:
                rows.append((place, layer, 0, 0, unselected[p, layer]))
                label.append((p, ADDED, layer, 0))
    return Changes(*np.array(rows, np.int64).T.copy()), np.array(label, np.int64).T


def prefill(model: nn.Module, ids: Tensor, routers: list[ChangedRouter]) -> Any:
    """The KV cache of ids (1, n); the routers remember what they chose."""
    for router in routers:
        router.changes = None
    return cache_of(model(input_ids=ids, use_cache=True))


def changed_losses(
    model: nn.Module, ids: Tensor, cache: Any, rows: Changes, routers: list[ChangedRouter]
) -> NDArray[np.float64]:
    """(N,) nats: the loss of the token after each row's position, with the row's change.

    cache: of ids[:, :-1]; it is afterwards as it was.
    """
    losses = np.empty(len(rows.place))
    if keeps_all(cache, min(ROWS, len(losses))):
        passes = _together(model, ids, cache, rows, routers)
    else:
        passes = _apart(model, ids, rows, routers)
    for these, logits in passes:
        target = ids[0, rows.place[these] + 1].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")
        losses[these] = loss.numpy(force=True)
    for router in routers:
        router.changes = None
    return losses


def _together(
    model: nn.Module, ids: Tensor, cache: Any, rows: Changes, routers: list[ChangedRouter]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(some of the rows, their logits): ROWS of any positions in a pass over the one cache."""
    columns = np.arange(ids.shape[1] - 1)
    dtype: Any = model.dtype
    every = np.arange(len(rows.place))
    for start in range(0, len(every), ROWS):
        these = every[start : start + ROWS]
        part, size = rows.take(these), len(these)
        for router in routers:
            router.changes = part
        # A row sees the tokens before its position and, of the queries, itself only.
        sees = np.concatenate([columns < part.place[:, None], np.eye(size, dtype=bool)], axis=1)
        mask = torch.zeros(sees.shape, dtype=dtype)
        mask = mask.masked_fill_(torch.from_numpy(~sees), torch.finfo(dtype).min).to(ids.device)
        place = torch.from_numpy(part.place)[None].to(ids.device)
        out = decode(
            model, ids[:, place[0]], cache, attention_mask=mask[None, None], position_ids=place
        )
        cache.crop(-size)  # tokens to remove, in 4.57 as in 5
        yield these, out.logits[0]


def _apart(
    model: nn.Module, ids: Tensor, rows: Changes, routers: list[ChangedRouter]
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """(some of the rows, their logits): of one position in a pass, each with a cache of its own.

    A model that returns no cache runs all tokens up to the position.
    """
    for place in np.unique(rows.place):
        here = np.flatnonzero(rows.place == place)
        cache = prefill(model, ids[:, :place], routers)
        size = max(1, TOKENS // (place + 1))
        for start in range(0, len(here), size):
            these = here[start : start + size]
            copied = copy.deepcopy(cache)
            length = 1 if cache is not None else place + 1
            if cache is not None:
                copied.reorder_cache(torch.zeros(len(these), dtype=torch.long, device=ids.device))
            for router in routers:
                router.changes = rows.take(these).at_end_of(length)
            given = ids[:, place + 1 - length : place + 1].expand(len(these), -1)
            yield these, decode(model, given, copied).logits[:, -1]
