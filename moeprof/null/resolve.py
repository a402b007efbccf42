"""What a user's `null=` means."""

import os
import warnings

from .layers import NORMAL, SOFTMAX, LayerNull, TokenNull
from .model import Null

NO_NULL = (
    "no null given: p-values come from each token's own logits (`normal`), a fallback whose "
    "error rates hold nowhere; `moeprof calibrate` fits a null to the model"
)
AnyNull = Null | LayerNull | TokenNull
_BY_NAME = {"normal": NORMAL, "softmax": SOFTMAX}


def resolve_null(null: AnyNull | str | os.PathLike[str] | None, stacklevel: int = 3) -> AnyNull:
    """What a user's `null=` means: a Null, a LayerNull or a TokenNull.

    null: those, the path of a saved null, "normal" or "softmax", or None: `normal` with a
    warning, since it is a fallback. TypeError for anything else.
    """
    if null is None:
        warnings.warn(NO_NULL, stacklevel=stacklevel)
        return NORMAL
    if isinstance(null, str) and null in _BY_NAME:
        return _BY_NAME[null]
    if isinstance(null, (str, os.PathLike)):
        return Null.load(null)
    if not isinstance(null, (Null, LayerNull, TokenNull)):
        raise TypeError(
            'null: expected a Null, a LayerNull, a path, "normal" or "softmax", '
            f"got {type(null).__name__}"
        )
    return null


def resolve_layer_null(null: AnyNull | str | os.PathLike[str] | None) -> LayerNull | TokenNull:
    """The same for one matrix of logits, without a Null: ValueError for several layers."""
    null = resolve_null(null, stacklevel=6)  # the caller of benjamini_hochberg_routing
    if isinstance(null, Null):
        if len(null) > 1:
            raise ValueError(f"null: has {len(null)} layers; pass one of them, null.layer(i)")
        null = null.layer(0)
    return null
