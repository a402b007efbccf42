"""What a run takes for the demo model where nothing is given: its own nulls, or a new fit."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from .. import demo
from ..texts.windows import calibration_passages

if TYPE_CHECKING:
    from torch import nn

    from ..null.model import Null


_default_nulls: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Null]] = WeakKeyDictionary()


@lru_cache(maxsize=1)
def load_once() -> tuple[Any, Any]:
    """The demo model, the same one for all that is run on it in one process."""
    return demo.load()


def shipped_null(model: Any, kind: str = "trimmed") -> Null | None:
    """The null of this kind that ships with the demo model if `model` is that, else None."""
    null = demo.null(kind)
    try:
        null.check(model)
    except ValueError:
        return None
    return null


def default_null(
    model: Any, tokenizer: Any, progress: bool = True, seed: int = 0, *, kind: str = "trimmed"
) -> Null:
    """The null of this kind on the score `logprob`: the demo model's, or fitted to `model`.

    "trimmed" is the one to route by, "efron" the one for diagnoses and for the routers that need
    it. It is fitted once a model, kind and seed, to the first half of the calibration text that
    ships with the demo model; no budget is set and nothing is evaluated on that half.
    """
    nulls = _default_nulls.setdefault(model, {})
    if (kind, seed) not in nulls:
        null = shipped_null(model, kind)
        if null is None:
            from ..measure.fitting import fit_null
            from ..measure.passes import quick

            passages = calibration_passages(demo.calibration_halves()[0], seed=seed)
            with quick(model):
                null = fit_null(model, tokenizer, passages, kind=kind, progress=progress)
        nulls[kind, seed] = null
    return nulls[kind, seed]
