"""Held-out text in windows, and how well a model predicts it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from ..models.tokens import token_ids

if TYPE_CHECKING:
    from torch import Tensor

    from ..checks import Tokenizer
    from .documents import Text


WINDOW = 512  # tokens; the stride is the same, so every token is read once
HELDOUT_TOKENS = 32768
BUDGET_TOKENS = 8192  # that budgets are set on
PASSAGE = 1500  # characters, hardly more than a window
Piece = TypeVar("Piece")
CALIBRATION_CHARACTERS = 150_000  # about 45,000 tokens of the demo model


class Window(NamedTuple):
    """Up to `window` (512) consecutive tokens of one document."""

    document: int  # index into HeldOut.documents
    ids: Tensor  # token ids (1, n), int64
    num_bytes: int  # of the predicted tokens' text
    first: int = 1  # of the predicted tokens; those before it are context alone

    @property
    def predicted(self) -> int:
        """How many of its tokens count; the first of a window has nothing before it."""
        return self.ids.shape[1] - self.first


class HeldOut(NamedTuple):
    """The windows to evaluate on, and the documents that they are from."""

    windows: list[Window]
    documents: list[dict[str, Any]]  # {domain, name, tokens, bytes} of what the windows use, and
    # complexity, where a document has one

    @property
    def tokens(self) -> int:
        """Tokens that are read (the first of each window isn't predicted)."""
        return sum(document["tokens"] for document in self.documents)


def heldout_windows(
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    tokens: int = HELDOUT_TOKENS,
    seed: int = 0,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    whole: bool = False,
) -> HeldOut:
    """About `tokens` tokens of `texts` in windows, spread evenly over domains and documents.

    texts: objects with .domain, .name and .text, each a document. It is cut into windows of
    `window` tokens from its first token on, each `stride` tokens after the one before; `seed`
    decides which of the windows are taken. stride: `window` unless given; with a smaller one
    windows overlap, and a token counts in the first window that it is in. whole: a shorter one at
    a document's end is left out, unless the document has no other.
    """
    stride = window if stride is None else stride
    documents = list(texts)
    pieces: dict[str, list[list[_Cut]]] = {}
    for index, document in enumerate(documents):
        cuts = _cuts(index, token_ids(tokenizer, document.text), window, stride)
        if whole and len(cuts) > 1 and len(cuts[-1].ids) < window:
            cuts.pop()
        pieces.setdefault(document.domain, []).append(cuts)
    taken = spread(pieces, lambda cut: len(cut.ids) - cut.first + 1, tokens, seed)
    if not taken:
        raise ValueError("held-out text: no document has two tokens")
    used = sorted({cut.document for cut in taken})
    place = {index: position for position, index in enumerate(used)}
    chosen = [_window(tokenizer, place[cut.document], cut) for cut in taken]
    described = [
        {
            "domain": documents[index].domain,
            "name": documents[index].name,
            "tokens": sum(w.ids.shape[1] for w in chosen if w.document == place[index]),
            "bytes": sum(w.num_bytes for w in chosen if w.document == place[index]),
            **_complexity(documents[index]),
        }
        for index in used
    ]
    return HeldOut(chosen, described)


def _complexity(document: Text) -> dict[str, str]:
    complexity = getattr(document, "complexity", None)
    return {} if complexity is None else {"complexity": complexity}


class _Cut(NamedTuple):
    """What a window is made of, if it is taken: most of a text is not."""

    document: int
    ids: list[int]
    first: int


def _cuts(document: int, ids: list[int], window: int, stride: int) -> list[_Cut]:
    """The document's windows; one of a single token predicts nothing and is left out."""
    cuts, end = [], 0
    for start in range(0, len(ids) - 1, stride):
        piece = ids[start : start + window]
        cuts.append(_Cut(document, piece, max(end - start, 1)))
        end = start + len(piece)
        if end == len(ids):
            break
    return cuts


def _window(tokenizer: Tokenizer, document: int, cut: _Cut) -> Window:
    import torch

    predicted = tokenizer.decode(cut.ids[cut.first :], clean_up_tokenization_spaces=False)
    return Window(document, torch.tensor([cut.ids]), len(predicted.encode()), cut.first)


def calibration_passages(
    texts: Iterable[Text], characters: int = CALIBRATION_CHARACTERS, seed: int = 0
) -> list[str]:
    """About `characters` of `texts` in passages of 1,500, spread like the held-out windows."""
    return spread(passages(texts, PASSAGE), len, characters, seed)


def passages(texts: Iterable[Text], length: int) -> dict[str, list[list[str]]]:
    """{domain: the passages of `length` characters of each document}, as `spread` takes them."""
    pieces: dict[str, list[list[str]]] = {}
    for document in texts:
        text = document.text
        cut = [text[start : start + length] for start in range(0, len(text), length)]
        pieces.setdefault(document.domain, []).append(cut)
    return pieces


def spread(
    pieces: Mapping[str, Sequence[Sequence[Piece]]],
    size: Callable[[Piece], int],
    budget: int,
    seed: int = 0,
) -> list[Piece]:
    """Pieces in turns, one of each domain, until their sizes reach `budget`.

    pieces: {domain: one list of pieces a document}. A domain gives a piece of each of its
    documents before it gives a second one of any; `seed` decides the order.
    """
    rng = np.random.default_rng(seed)
    by_domain = []
    for documents in pieces.values():
        shuffled = [_shuffled(documents[i], rng) for i in rng.permutation(len(documents))]
        by_domain.append(list(_in_turns(shuffled)))
    chosen, total = [], 0
    for piece in _in_turns(by_domain):
        if total >= budget:
            break
        chosen.append(piece)
        total += size(piece)
    return chosen


def _shuffled(items: Sequence[Piece], rng: np.random.Generator) -> list[Piece]:
    return [items[i] for i in rng.permutation(len(items))]


def _in_turns(lists: Iterable[Sequence[Piece]]) -> Iterator[Piece]:
    """The first of each list, then the second of each, …"""
    return (item for turn in zip_longest(*lists) for item in turn if item is not None)
