"""The demo model: a small OLMoE trained on real text, with text to calibrate and evaluate on.

64 experts, top-8, 4 layers, 4.5 million parameters, in the hub's OLMoE format, so that transformers
4.57 and 5.x load it like any other checkpoint. It was trained by moeprof.demo.make.train; curve and
held-out results are in model/training.json, the licences of the text in data/LICENSES.md. Its two
nulls were fitted by moeprof.demo.make.fit to the first of `calibration_halves()`.

    model, tokenizer = moeprof.demo.load()
    moeprof.patch(model, "bh", alpha=0.3, null=moeprof.demo.null())
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..texts.documents import Document

if TYPE_CHECKING:
    import torch

    from ..null.model import Null


__all__ = [
    "PATH",
    "Document",
    "calibration_texts",
    "calibration_halves",
    "heldout_texts",
    "load",
    "null",
    "prompts",
]

PATH = Path(__file__).parent / "model"
_DATA = Path(__file__).parent / "data"
NULL_PATHS = {kind: _DATA / f"null_{kind}.npz" for kind in ("trimmed", "efron")}


def load(dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer), the model in eval mode; dtype is torch.float32 unless given."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # local_files_only: the folder is all there is to read, so a missing file fails at once.
    model = AutoModelForCausalLM.from_pretrained(
        PATH, dtype=torch.float32 if dtype is None else dtype, local_files_only=True
    )
    model.config._name_or_path = "moeprof/demo"  # not where this machine keeps it
    return model.eval(), AutoTokenizer.from_pretrained(PATH, local_files_only=True)


def calibration_texts() -> list[Document]:
    """32 documents a domain to fit null distributions on; not trained on, not evaluated on."""
    return _documents("calibration.jsonl")


def calibration_halves() -> tuple[list[Document], list[Document]]:
    """The calibration documents as (16 a domain for nulls, 16 a domain for budgets).

    Every other document of each domain, always the same: what is set on the second half, against
    a null that was fitted to the first, is set on text that the null hasn't seen.
    """
    by_domain: dict[str, list[Document]] = {}
    for document in calibration_texts():
        by_domain.setdefault(document.domain, []).append(document)
    halves: tuple[list[Document], list[Document]] = ([], [])
    for documents in by_domain.values():
        for half, first in zip(halves, (0, 1), strict=True):
            half += documents[first::2]
    return halves


def heldout_texts() -> list[Document]:
    """32 documents a domain to evaluate on; not trained on, not calibrated on."""
    return _documents("heldout.jsonl")


def null(kind: str = "trimmed") -> Null:
    """The demo model's null on `logprob`, fitted to the first calibration half.

    kind: "trimmed", for routing, or "efron", for diagnoses and for routers that can't use a
    trimmed one (`local_fdr`, `expert_threshold`, `ebh` with e="lr"). ValueError for any other.
    """
    from ..null import Null

    if kind not in NULL_PATHS:
        raise ValueError(f"kind: expected one of {', '.join(NULL_PATHS)}, got {kind!r}")
    return Null.load(NULL_PATHS[kind])


def prompts() -> list[tuple[str, str]]:
    """Twelve (complexity, text), three each of simple, medium, complex and technical."""
    loaded = json.loads((_DATA / "prompts.json").read_text(encoding="utf-8"))
    return [(complexity, text) for complexity, texts in loaded.items() for text in texts]


def _documents(name: str) -> list[Document]:
    # Split at "\n" alone: str.splitlines would also split at U+2028 inside a text.
    lines = (_DATA / name).read_text(encoding="utf-8").split("\n")
    return [Document(**json.loads(line)) for line in lines if line]
