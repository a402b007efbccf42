"""What a null says about where it is from: the model's routers, its name, the text."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

Gates = list[tuple[str, "nn.Module"]]  # of each MoE layer its router, with its qualified name

# bf16 keeps 8 bits, fp16 loses what lies under 2^-24: the same weights stay within this.
_SAMPLE, _SAMPLE_RTOL, _SAMPLE_ATOL = 16, 2.0**-7, 1e-6


def gates_of(model: "nn.Module") -> Gates:
    """[(qualified name, router)] in layer order; ValueError if the model has none."""
    from .blocks import find_blocks  # with torch, which `import moeprof` has no use for

    return [(block.gate_name, block.family.gate_of(block.module)) for block in find_blocks(model)]


def gate_weight(name: str, gate: "nn.Module") -> "Tensor":
    """A router's weight (E,H); of a user's router around another, the first matrix inside."""
    weight: Tensor | None = getattr(gate, "weight", None)
    if weight is None:
        weight = next((w for w in gate.parameters() if w.ndim == 2), None)
    if weight is None:
        raise ValueError(f"{name}: a router without a weight, so no null can be tied to it")
    return weight


def router_sample(gates: Gates) -> "NDArray[np.float32]":
    """(L, at most 16) float32: the first weights of each router."""
    weights = [gate_weight(name, gate)[0, :_SAMPLE] for name, gate in gates]
    return np.stack([w.detach().float().cpu().numpy() for w in weights])


def same_sample(a: "NDArray[np.float32]", b: "NDArray[np.float32]") -> bool:
    """Whether two samples are of the same routers, in whatever dtype they were loaded."""
    return a.shape == b.shape and np.allclose(a, b, rtol=_SAMPLE_RTOL, atol=_SAMPLE_ATOL)


def model_name(model: Any) -> str:
    """The model's name on the hub, of the first module that has one; of a local path the last
    component only."""
    configs = (getattr(module, "config", None) for module in model.modules())
    names = (getattr(config, "_name_or_path", "") for config in configs)
    name: str = next(filter(None, names), "") or type(model).__name__
    folder = (Path(name) / "config.json").is_file()
    if folder or os.path.isabs(name) or name.startswith((".", "~")):
        name = Path(name).resolve().name
    return name


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 of each text, added modulo 2^256, as hex: the order of the texts doesn't matter.

    So the digest of a merged null is that of the joined lists; of one text it is its SHA-256.
    """
    total = NO_TEXT
    for text in texts:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        total = add_digests(total, digest)
    return total


NO_TEXT = f"{0:064x}"


def add_digests(a: str, b: str) -> str:
    """The digest of both texts."""
    return f"{(int(a, 16) + int(b, 16)) % 2**256:064x}"
