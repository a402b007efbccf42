"""Texts through a patched model: what its routers saw and chose, and what it then predicts."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..backends.torch.prepared import precise
from ..models.blocks import find_blocks
from ..models.decoding import device_of
from ..patching.linears import torch_is_slow
from ..patching.patch import patch
from ..patching.state import is_patched
from ..routers import Router
from ..texts.windows import HeldOut

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..backends.spec import Rule
    from ..null.resolve import AnyNull
    from ..patching.handle import Handle
    from ..routers.base import Router
    from ..texts.windows import Window


# What `moeprof.patch` takes for a router: one for all layers, or one for each.
Routers = Router | str | Callable[..., Any] | list[Any] | dict[Any, Any] | None

BATCH = 512  # tokens in a call of the model, or one window
PIECE = 2**19  # log-probabilities at a time on a CPU: 2 MB, which stay in its cache. Of windows
# that run together each gives a token at least
IN_MEMORY = 2 * 2**30  # bytes of log-probabilities; more are kept in a file


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


def patched(
    model: nn.Module, router: Routers = None, *, null: AnyNull | None = None, norm: str = "model"
) -> Handle:
    """`patch` for passes whose times are not reported: the linear layers around the experts run
    in C too where torch is many times slower with their numbers."""
    return patch(model, router, null=null, norm=norm, linears=_is_slow(model))


def quick(model: nn.Module) -> AbstractContextManager[Any]:
    """The model `patched` where torch is slow with its numbers, if it can be; else, and where it
    is patched already, as it is. For what would run the model as transformers has it.

    Not for what users call, who may patch the model in another thread meanwhile.
    """
    if not _is_slow(model) or any(map(is_patched, model.modules())):
        return nullcontext()
    try:
        return patched(model)
    except ValueError:  # some layer can't run on moeprof's path
        return nullcontext()


def _is_slow(model: nn.Module) -> bool:
    """Whether torch is slow with some linear layer of it, as `torch_is_slow` says of a CPU."""
    weights = [module.weight for module in model.modules() if type(module) is torch.nn.Linear]
    return any(weight.is_cpu and torch_is_slow(weight.dtype) for weight in weights)


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
    with patched(model, router, null=null, norm=norm) as handle, torch.inference_mode():
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

    Its log-probabilities are kept, 4 bytes for each predicted token and entry of the vocabulary:
    see `KeptRows`. own : the unchanged model's own Quality
    """

    def __init__(
        self, model: nn.Module, text: HeldOut, step: Callable[[], object] = lambda: None
    ) -> None:
        self.model, self.text = model, text
        self._kept = KeptRows(sum(window.predicted for window in text.windows))
        self.own = self._run(None, None, "model", step, self._keep)  # its own top-k, the same way

    def measure(
        self,
        router: Routers = None,
        *,
        null: AnyNull | None = None,
        norm: str = "model",
        step: Callable[[], object] = lambda: None,
    ) -> Quality:
        """The quality of the model patched with `router` (arguments as `patch`)."""
        kept = iter(self._kept)

        def compare(routed: Tensor) -> tuple[Any, Any]:
            full = next(kept).reshape(routed.shape).to(routed.device)
            difference = torch.where(full > -torch.inf, full - routed, 0)
            same = (routed.argmax(2) == full.argmax(2)).sum(1)
            return _sums(full.exp() * difference), same.numpy(force=True)

        return self._run(router, null, norm, step, compare)

    def _keep(self, log_probs: Tensor) -> tuple[Any, Any]:
        self._kept.add(log_probs.flatten(0, 1))
        return 0.0, log_probs.shape[1]

    def _run(
        self,
        router: Routers,
        null: AnyNull | None,
        norm: str,
        step: Callable[[], object],
        compare: Callable[[Tensor], tuple[Any, Any]],
    ) -> Quality:
        """compare: (KL, agreements) of log-probabilities (B, n, V), summed over n: (B,) both."""
        size, rows = len(self.text.documents), documents_of(self.text)
        kl, nats = np.zeros(size), np.zeros(size)
        agree, predicted = np.zeros(size, np.int64), np.zeros(size, np.int64)
        with (
            patched(self.model, router, null=null, norm=norm) as handle,
            torch.inference_mode(),
        ):
            calls: list[list[Any]] = [[] for _ in handle.layers]
            handle.on_routing(lambda layer, routing: calls[layer].append(routing.counts))
            for windows in batches(self.text):
                ids, first = ids_for(self.model, windows), windows[0].first
                at = [window.document for window in windows]
                for targets, routed in _log_probs(self.model, ids, first):
                    np.add.at(nats, at, -_sums(routed.gather(2, targets[:, :, None])))
                    divergence, same = compare(routed)
                    np.add.at(kl, at, divergence)
                    np.add.at(agree, at, same)
                    np.add.at(predicted, at, targets.shape[1])
                for _ in windows:
                    step()
        counts = np.stack([torch.cat(layer).numpy(force=True) for layer in calls])
        experts: Any = np.bincount(rows, counts.mean(axis=0), size)
        tokens = np.bincount(rows, minlength=size)
        return Quality(predicted, kl, nats, agree, tokens, counts, experts)


def reference_bytes(model: nn.Module, text: HeldOut) -> int:
    """Of memory that a `Reference` takes, but for what lies in a file."""
    predicted = sum(window.predicted for window in text.windows)
    head: Any = model
    weight = head.get_output_embeddings().weight
    row = 4 * weight.shape[0]
    if predicted * row <= IN_MEMORY:
        return predicted * row
    together = max(map(len, batches(text)))  # each with a token at least
    return max(_piece(weight.shape[0], weight.device), together) * row


class KeptRows:
    """Float32 rows in the order in which they were added, in pieces as they were.

    rows : how many there will be. Up to `IN_MEMORY` bytes of them stay in memory; more lie in a
    file of the temporary folder that no name leads to, of which one piece at a time is read.
    OSError where that folder has no room for them, before any is written.
    """

    def __init__(self, rows: int) -> None:
        self.rows, self._pieces = rows, []  # type: int, list[Tensor | tuple[int, ...]]
        self._file: Any = None

    def add(self, piece: Tensor) -> None:
        piece = piece.cpu()
        if not self._pieces and self.rows * piece[0].nbytes > IN_MEMORY:
            self._file = _temporary(self.rows * piece[0].nbytes)
            weakref.finalize(self, self._file.close)
        if self._file is None:
            self._pieces.append(piece)
            return
        self._file.write(piece.contiguous().numpy())
        self._pieces.append(tuple(piece.shape))

    def __iter__(self) -> Iterator[Tensor]:
        if self._file is not None:
            self._file.seek(0)
        for piece in self._pieces:
            if isinstance(piece, tuple):
                read = np.fromfile(self._file, np.float32, math.prod(piece))
                piece = torch.from_numpy(read).reshape(piece)
            yield piece


def _temporary(size: int) -> Any:
    """A file without a name, for `size` bytes."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"the unchanged model's log-probabilities take {size / 1e9:.1f} GB, and the temporary "
            f"folder {folder} has {free / 1e9:.1f} GB left: run fewer tokens, or name a folder "
            "with more room in TMPDIR"
        )
    return tempfile.TemporaryFile(dir=folder)


def batches(text: HeldOut) -> Iterator[list[Window]]:
    """Its windows in order, those alike together up to `BATCH` tokens: short ones alone leave the
    time to Python. Alike: as long, and predicted from the same token on."""
    batch: list[Window] = []
    for window in text.windows:
        size = window.ids.shape[1]
        alike = batch and (batch[0].ids.shape[1], batch[0].first) == (size, window.first)
        if batch and (not alike or (len(batch) + 1) * size > BATCH):
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


def _log_probs(model: nn.Module, ids: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(token ids (B, m), their float32 log-probabilities (B, m, V)) of the tokens (B, n) from the
    first on, in pieces: of a long window all at once take gigabytes."""
    logits = model(input_ids=ids, use_cache=False).logits
    length = max(_piece(logits.shape[2], logits.device) // len(ids), 1)
    for start in range(first, ids.shape[1], length):
        targets = ids[:, start : start + length]
        predicting = logits[:, start - 1 : start - 1 + targets.shape[1]]
        yield targets, torch.log_softmax(predicting.float(), -1)


def _piece(vocabulary: int, device: torch.device) -> int:
    """Tokens whose log-probabilities are computed at a time."""
    return min(BATCH, max(PIECE // vocabulary, 1)) if device.type == "cpu" else BATCH
