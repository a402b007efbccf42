"""What shows that the demo is a model on which routing matters: evaluate()."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

    from ...texts.documents import Document


WINDOW = 512  # tokens; of training and of evaluation


def gini(load: ArrayLike) -> float:
    """0 when all loads are equal, towards 1 when one expert has everything."""
    import numpy as np

    load = np.sort(np.asarray(load, dtype=float))
    n = len(load)
    return float((2 * np.arange(1, n + 1) - n - 1) @ load / (n * load.sum()))


def windows_of(tokenizer: Any, document: Document) -> list[Tensor]:
    """The document's token ids [1, n] in windows of WINDOW; their first token isn't predicted."""
    import torch

    ids = tokenizer(document.text, verbose=False)["input_ids"]
    pieces = (ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW))
    return [torch.tensor([piece]) for piece in pieces if len(piece) > 1]


def token_bytes(tokenizer: Any) -> Tensor:
    """Bytes of each token id: a byte-level BPE writes a byte as one character."""
    import torch

    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return torch.tensor([len(token) for token in tokens])


def bits_and_load(
    model: Any, tokenizer: Any, documents: Iterable[Document]
) -> tuple[dict[str, tuple[float, int]], Tensor]:
    """({domain: (bits, bytes)}, selections of each expert [layers, experts])."""
    import torch

    sizes, load = token_bytes(tokenizer), torch.tensor(0)
    totals: dict[str, tuple[float, int]] = {}
    k, experts = model.config.num_experts_per_tok, model.config.num_experts
    for document in documents:
        bits, size = totals.get(document.domain, (0.0, 0))
        for ids in windows_of(tokenizer, document):
            with torch.no_grad():
                out = model.model(input_ids=ids, output_router_logits=True, use_cache=False)
                logits = model.lm_head(out.last_hidden_state[0, :-1]).float()
            nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            bits, size = bits + nats.item() / math.log(2), size + int(sizes[ids[0, 1:]].sum())
            chosen = [torch.softmax(r.float(), -1).topk(k).indices for r in out.router_logits]
            load = load + torch.stack([c.flatten().bincount(minlength=experts) for c in chosen])
        totals[document.domain] = bits, size
    return totals, load


def per_byte(totals: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """{domain: bits per byte}, and over all of them as "total"."""
    both = [sum(column) for column in zip(*totals.values(), strict=True)]
    pairs = [*totals.items(), ("total", both)]
    return {name: round(bits / size, 4) for name, (bits, size) in pairs}


def random_experts(seed: int = 0) -> Any:
    """A context in which the router's k best become k random experts; the weights stay.

    Both transformers versions choose by torch.topk, and nothing else in a forward calls it.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    class RandomIndices(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is not torch.topk:
                return result
            order = torch.rand(args[0].shape, generator=generator).argsort(dim=-1)
            return result[0], order[..., : result[0].shape[-1]]

    return RandomIndices()


def xz_bits_per_byte(documents: Sequence[Document]) -> dict[str, float]:
    """Bits per byte of `xz -9`: each domain's documents as one text, and all as one ("total")."""
    texts = dict.fromkeys((d.domain for d in documents), "")
    for document in documents:
        texts[document.domain] += document.text
    texts["total"] = "".join(texts.values())
    raw = {name: text.encode() for name, text in texts.items()}
    packed = {name: lzma.compress(data, preset=9) for name, data in raw.items()}
    return {name: round(8 * len(packed[name]) / len(raw[name]), 4) for name in raw}


def evaluate(
    model: Any, tokenizer: Any, documents: Sequence[Document], seed: int = 0
) -> dict[str, Any]:
    """What shows that this is a model on which routing matters, as a dict for training.json."""
    totals, load = bits_and_load(model, tokenizer, documents)
    with random_experts(seed):
        random_totals, _ = bits_and_load(model, tokenizer, documents)
    return {
        "documents": len(documents),
        "bytes": sum(size for _, size in totals.values()),
        "bits_per_byte": per_byte(totals),
        "xz_bits_per_byte": xz_bits_per_byte(documents),
        "random_experts_bits_per_byte": per_byte(random_totals),
        "experts_used": (load > 0).sum(dim=1).tolist(),
        "load_gini": [round(gini(layer), 4) for layer in load.numpy()],
    }
