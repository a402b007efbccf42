"""What the model's entry says of a step: its phase, and which of its tokens are padding.

MoE blocks see rows of hidden states and nothing of the attention mask, so it is taken where the
model that holds them is called.
"""

import inspect
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .phases import DECODE, PHASES, PREFILL, UNKNOWN, VERIFY, packed_phases, phase_of

_INPUTS = ("input_ids", "inputs_embeds")
# Renamed in transformers 5.24; models without attention have a cache of another name.
_CACHES = ("past_key_values", "cache", "past_key_value", "cache_params")
# What a cache of another kind may raise when it is asked for its length.
_NO_LENGTH = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def find_entries(model: nn.Module, blocks: list[nn.Module]) -> list[tuple[nn.Module, list[int]]]:
    """[(module, numbers of its blocks)]: for each block the innermost module around it that
    takes input_ids or inputs_embeds, `model` where there is none. Layers that take input_ids
    beside hidden states, as routers by token id want it, know nothing of cache and mask.

    The encoder and the decoder of a model are two, each with a mask of its own.
    """
    around = [
        module
        for module in model.modules()
        if _takes_inputs(_parameters(type(module)))  # type: ignore[arg-type]  # a class is hashable
    ]
    inside = [{id(child) for child in module.modules()} for module in around]
    found: dict[int, tuple[nn.Module, list[int]]] = {}
    for number, block in enumerate(blocks):
        holders = [i for i, ids in enumerate(inside) if id(block) in ids]
        entry = around[min(holders, key=lambda i: len(inside[i]))] if holders else model
        found.setdefault(id(entry), (entry, []))[1].append(number)
    return list(found.values())


def _takes_inputs(parameters: tuple[str, ...]) -> bool:
    return "hidden_states" not in parameters and any(name in parameters for name in _INPUTS)


@lru_cache
def _parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    """The names of forward's arguments, without self."""
    try:
        return tuple(inspect.signature(module_class.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()


def _cache_in(arguments: dict[str, Any]) -> Any:
    for name in _CACHES:
        if (cache := arguments.get(name)) is not None:
            return cache
    return None


def _length(cache: Any) -> int | None:
    """Tokens in it, 0 for None; None: it doesn't say."""
    if cache is None:
        return 0
    if getattr(cache, "has_previous_state", None) is False:  # Jamba's, in transformers 4
        return 0
    try:
        if hasattr(cache, "get_seq_length"):
            return int(cache.get_seq_length())
        return int(cache[0][0].shape[-2])  # transformers 4: ((key, value, ...), ...)
    except _NO_LENGTH:
        return None


class Entry:
    """The arguments of one call of the model that a step is made of.

    shape : (B, S) of the new tokens; None: a module of a user, which takes something else
    past : tokens in the cache before this step, 0 without a cache; None: it doesn't say
    phases : the phase of the step; (B * S,) numbers in `PHASES` where its tokens are of several
    before : the `decoded` of the step before
    """

    # Made for every step: plain attributes, as a cached_property of Python 3.11 has a lock.
    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        before: tuple[int, int] | None = None,
    ):
        if args:
            names = _parameters(type(module))  # type: ignore[arg-type]  # a class is hashable
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        self._arguments = kwargs
        self.input_ids = kwargs.get("input_ids")
        rows: Any = self.input_ids if self.input_ids is not None else kwargs.get("inputs_embeds")
        has_shape = isinstance(rows, Tensor) and rows.dim() >= 2
        self.shape: tuple[int, int] | None = tuple(rows.shape[:2]) if has_shape else None
        self._shape = self.shape or (0, 0)  # for what is asked of calls with a shape only
        self._cache = _cache_in(kwargs)
        self.past = _length(self._cache)
        packed = has_shape and kwargs.get("cu_seq_lens_q") is not None
        self._packed = packed_phases(kwargs, rows.shape[:2].numel()) if packed else None
        self.phases = self._phases(before)

    def _phases(self, before: tuple[int, int] | None) -> str | np.ndarray:
        if self.shape is None:
            return UNKNOWN
        if self._packed is not None:
            by_token = self._packed[0]
            same = len(by_token) == 0 or (by_token == by_token[0]).all()
            return PHASES[by_token[0] if len(by_token) else 0] if same else by_token
        rows, tokens = self.shape
        # To look for the caller takes longer than all else: not in each decode step.
        if tokens == 1 and before is not None and before == (id(self._cache), self.past):
            return DECODE
        phase = phase_of(self.past, self._arguments.get("use_cache") is False, tokens)
        if isinstance(phase, str):
            return phase
        number, first, rest = phase
        row = np.full(tokens, PHASES.index(rest), np.int8)
        row[:number] = PHASES.index(first)
        return np.tile(row, rows)

    @property
    def decoded(self) -> tuple[int, int] | None:
        """(id of its cache, tokens in it after the step) of a decode step with a cache. One more
        token behind exactly these is a decode step too."""
        if self._cache is None or self.past is None or not self._is_all(DECODE):
            return None
        return id(self._cache), self.past + self._shape[1]

    def _is_all(self, phase: str) -> bool:
        return isinstance(self.phases, str) and self.phases == phase

    def real(self, mask: Any = None, pad_token_id: int | None = None) -> np.ndarray | None:
        """(B * S,) bool, False for padding; None where all tokens are real.

        mask: (B, n) over positions, in place of the attention mask. Tokens that are generated
            behind its end are real.
        pad_token_id: where there is no mask at all, the runs of this id at the start and at the
            end of a row are padding. In decode steps also where the attention mask has ones, and
            behind the end of `mask`: `generate` gives this id, and a one, to rows that have ended.

        Raises
        ------
        ValueError
            For a mask that does not cover the tokens of the step.
        """
        name = "attention_mask" if mask is None else "mask"
        mask = self._arguments.get("attention_mask") if mask is None else mask
        if isinstance(mask, dict):  # by kind of layer; padding is the same in all
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if self.shape is None:
            return None
        if self._packed is not None and name == "attention_mask":
            real = self._packed[1]
            return None if real.all() else real
        if mask is None:
            return self._without_edges(pad_token_id)
        ended = self._without_edges(pad_token_id) if self._is_all(DECODE) else None
        if name == "mask":
            mask = _as_array(mask, name)
            if ended is not None and mask.ndim == 2:
                ended |= np.tile(~self._behind(mask.shape[1]), self.shape[0])
        usual = name == "attention_mask" and isinstance(mask, Tensor) and self._covers(mask)
        if usual and bool(mask.all()):
            return ended  # the usual case, asked in each decode step; a cache may be slow to tell
        real = self._of_mask(mask, name)
        if ended is not None:
            real = real & ended
        return None if real.all() else real

    def _of_mask(self, mask: Any, name: str) -> np.ndarray:
        """(B * S,) bool of a mask of any of the shapes that models take."""
        mask = _as_array(mask, name)
        if mask.ndim == 2:
            real = self._columns(mask, name)
        elif mask.ndim in (3, 4):
            real = self._own_slots(mask[:, 0] if mask.ndim == 4 else mask, name)
        else:
            expected = self._shape[0], (self.past or 0) + self._shape[1]
            raise ValueError(f"{name}: expected {expected}, got {mask.shape}")
        return np.ascontiguousarray(real).reshape(-1)

    def _without_edges(self, pad_token_id: int | None) -> np.ndarray | None:
        if pad_token_id is None or self.input_ids is None:
            return None
        padding = (self.input_ids == pad_token_id).numpy(force=True)
        if not padding.any():
            return None
        before = np.logical_and.accumulate(padding, axis=1)
        behind = np.logical_and.accumulate(padding[:, ::-1], axis=1)[:, ::-1]
        return ~(before | behind).reshape(-1)

    def looks_padded(self) -> tuple[int, int] | None:
        """(rows, id): that many of several rows of a prompt begin or end in one id, repeated; no
        mask says why. None where nothing looks like that: text that is generated may repeat, and
        rows that are all alike, as of beams, are not padded to one length."""
        unmasked = self._arguments.get("attention_mask") is None and self._packed is None
        if not unmasked or self.input_ids is None or min(self._shape) < 2:
            return None
        if not self._is_all(PREFILL):
            return None
        ids = self.input_ids.numpy(force=True)
        if (ids == ids[0]).all():
            return None
        for outer, inner in ((-1, -2), (0, 1)):
            repeated = ids[:, outer] == ids[:, inner]
            found, rows = np.unique(ids[repeated, outer], return_counts=True)
            for token in found[np.argsort(-rows)]:
                text = cast(np.ndarray, self._without_edges(token))  # the id is there
                edge = ~text.reshape(ids.shape)
                if ((ids == token) == edge).all():  # it stands nowhere else
                    return int(edge.any(axis=1).sum()), int(token)
        return None

    def _covers(self, mask: Tensor) -> bool:
        """Is it (B, n) with n enough for the new tokens?"""
        rows, tokens = self._shape
        return mask.dim() == 2 and mask.shape[0] == rows and mask.shape[1] >= tokens

    def _behind(self, covered: int) -> np.ndarray:
        """(S,) bool: which new tokens are behind so many positions?"""
        return (self.past or 0) + np.arange(self._shape[1]) >= covered

    def _are_generated(self, behind: np.ndarray) -> bool:
        """Are the new tokens behind the mask none of a prompt?"""
        if isinstance(self.phases, str):
            return self.phases in (DECODE, VERIFY)
        numbers = self.phases.reshape(self._shape)[:, behind]
        return bool(np.isin(numbers, (PHASES.index(DECODE), PHASES.index(VERIFY))).all())

    def _columns(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Of a mask (B, n) by position the columns of this step.

        An attention mask ends with the new tokens where it does not cover all that is cached. The
        mask of a prompt goes on with ones for what is generated.
        """
        (rows, tokens), given = self._shape, mask.shape
        missing = (self.past or 0) + tokens - mask.shape[1]
        if name == "mask" and missing > 0 and self._are_generated(self._behind(mask.shape[1])):
            mask = np.pad(mask != 0, ((0, 0), (0, missing)), constant_values=True)
        covered = mask.shape[1]
        past = self.past or 0
        end = tokens + (past if covered != tokens or name == "mask" else 0)
        if name != "mask":
            end = min(end, covered)
        if mask.shape[0] != rows or covered < end or end < tokens:
            raise ValueError(
                f"{name}: expected ({rows}, {past + tokens}) for {rows} rows of {tokens} new "
                f"tokens after {past}, got {given}"
            )
        return mask[:, end - tokens : end] != 0

    def _own_slots(self, mask: np.ndarray, name: str) -> np.ndarray:
        """Of a mask (B, S, slots): a token is padding where it can't see its own slot."""
        rows, tokens = self._shape
        slots = mask.shape[2]
        first = min(self.past or 0, slots - tokens)  # a sliding window holds the last ones only
        if mask.shape[0] not in (1, rows) or mask.shape[1] != tokens or first < 0:
            raise ValueError(
                f"{name}: expected ({rows}, 1, {tokens}, at least {tokens}), got {mask.shape}"
            )
        own = mask[:, np.arange(tokens), np.arange(first, first + tokens)]
        # Added to the scores, a mask is 0 where the token is seen and some -1e38 where not.
        seen = own > -1e4 if own.dtype.kind == "f" else own != 0
        return np.broadcast_to(seen, (rows, tokens))


def _as_array(mask: Any, name: str) -> np.ndarray:
    if isinstance(mask, Tensor):
        return (mask.float() if mask.dtype == torch.bfloat16 else mask).numpy(force=True)
    array = np.asarray(mask)
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: can't be read as a mask of padding: {type(mask).__name__}; give the "
            "profiler one as mask="
        )
    return array
