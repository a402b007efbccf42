"""What the model's entry says of a step: its phase, and which of its tokens are padding.

MoE blocks see rows of hidden states and nothing of the attention mask, so it is taken where the
model that holds them is called.
"""

import inspect
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INPUTS = ("input_ids", "inputs_embeds")
_CACHES = ("past_key_values", "cache")  # renamed in transformers 5.24


def find_entries(model: nn.Module, blocks: list[nn.Module]) -> list[tuple[nn.Module, list[int]]]:
    """[(module, numbers of its blocks)]: for each block the innermost module around it that
    takes input_ids or inputs_embeds, `model` where there is none.

    The encoder and the decoder of a model are two, each with a mask of its own.
    """
    around = [m for m in model.modules() if any(name in _parameters(type(m)) for name in _INPUTS)]
    inside = [{id(child) for child in module.modules()} for module in around]
    found: dict[int, tuple[nn.Module, list[int]]] = {}
    for number, block in enumerate(blocks):
        holders = [i for i, ids in enumerate(inside) if id(block) in ids]
        entry = around[min(holders, key=lambda i: len(inside[i]))] if holders else model
        found.setdefault(id(entry), (entry, []))[1].append(number)
    return list(found.values())


@lru_cache
def _parameters(module_class: type) -> tuple[str, ...]:
    """The names of forward's arguments, without self."""
    try:
        return tuple(inspect.signature(module_class.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


class Entry:
    """The arguments of one call of the model that a step is made of."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if args:
            names = _parameters(type(module))
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._arguments = kwargs
        self.input_ids = kwargs.get("input_ids")
        rows = self.input_ids if self.input_ids is not None else kwargs.get("inputs_embeds")
        # (B, S) of the new tokens; None: a module of a user, which takes something else
        has_shape = isinstance(rows, Tensor) and rows.dim() >= 2
        self.shape = tuple(rows.shape[:2]) if has_shape else None

    @property
    def past(self) -> int:
        """Tokens in the cache before this step."""
        for name in _CACHES:
            cache = self._arguments.get(name)
            if hasattr(cache, "get_seq_length"):
                return int(cache.get_seq_length())
            if isinstance(cache, tuple) and cache:  # transformers 4: ((key, value, ...), ...)
                return cache[0][0].shape[-2]
        return 0

    def real(self, mask=None) -> np.ndarray | None:
        """(B * S,) bool, False for padding; None where all tokens are real.

        mask: (B, n) over positions, in place of the attention mask.

        Raises
        ------
        ValueError
            For a mask that does not cover the tokens of the step.
        """
        name = "attention_mask" if mask is None else "mask"
        mask = self._arguments.get("attention_mask") if mask is None else mask
        if isinstance(mask, dict):  # by kind of layer; padding is the same in all
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None or self.shape is None:
            return None
        usual = name == "attention_mask" and isinstance(mask, Tensor) and self._covers(mask)
        if usual and bool(mask.all()):
            return None  # the usual case, asked in each decode step; a cache may be slow to tell
        mask = _as_array(mask, name)
        if mask.ndim == 2:
            real = self._columns(mask, name)
        elif mask.ndim in (3, 4):
            real = self._own_slots(mask[:, 0] if mask.ndim == 4 else mask, name)
        else:
            raise ValueError(f"{name}: expected 2 or 4 dimensions, got {mask.shape}")
        return None if real.all() else np.ascontiguousarray(real).reshape(-1)

    def _covers(self, mask) -> bool:
        """Is it (B, n) with n enough for the new tokens?"""
        rows, tokens = self.shape
        return mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= tokens

    def _columns(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Of a mask (B, n) by position the columns of this step.

        An attention mask ends with the new tokens where it does not cover all that is cached.
        """
        rows, tokens = self.shape
        covered = mask.shape[1]
        end = tokens + (self.past if covered != tokens or name == "mask" else 0)
        if name != "mask":
            end = min(end, covered)
        if mask.shape[0] != rows or covered < end or end < tokens:
            raise ValueError(
                f"{name}: expected ({rows}, {self.past + tokens}) for {rows} rows of {tokens} new "
                f"tokens after {self.past}, got {mask.shape}"
            )
        return mask[:, end - tokens : end] != 0

    def _own_slots(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Of a mask (B, S, slots): a token is padding where it can't see its own slot."""
        rows, tokens = self.shape
        slots = mask.shape[2]
        first = min(self.past, slots - tokens)  # a sliding window holds the last ones only
        if mask.shape[0] not in (1, rows) or mask.shape[1] != tokens or first < 0:
            raise ValueError(
                f"{name}: expected ({rows}, 1, {tokens}, at least {tokens}), got {mask.shape}"
            )
        own = mask[:, np.arange(tokens), np.arange(first, first + tokens)]
        # Added to the scores, a mask is 0 where the token is seen and some -1e38 where not.
        seen = own > -1e4 if own.dtype.kind == "f" else own != 0
        return np.broadcast_to(seen, (rows, tokens))


def _as_array(mask, name: str) -> np.ndarray:
    if isinstance(mask, Tensor):
        return (mask.float() if mask.dtype == torch.bfloat16 else mask).numpy(force=True)
    array = np.asarray(mask)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: can't be read as a mask of padding: {type(mask).__name__}; give the "
            "profiler one as mask="
        )
    return array
