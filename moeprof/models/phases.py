"""The phase of a step: from what was in the cache before it, and from who called the model.

prefill : tokens of a prompt, also in `generate` on a cache that was kept, and whatever runs
    without a cache
decode : one new token a row behind tokens in the cache; in `generate` without a cache each step
    after the first, which computes the whole row again for one new token
verify : tokens that assisted decoding or prompt lookup proposed, with the one before them
unknown : several new tokens behind tokens in the cache outside `generate`: a further part of a
    prompt, or drafts to verify; those that an assistant model catches up on, which are accepted
    drafts; a cache that doesn't say what it holds; a module that is called without token ids or
    embeddings
"""

import sys
from functools import lru_cache
from types import FrameType
from typing import Any

import numpy as np

PHASES = ("prefill", "decode", "verify", "unknown")
PREFILL, DECODE, VERIFY, UNKNOWN = PHASES
_LIBRARY = "transformers.generation.utils"
_PREFILLS = ("_prefill", "_prefill_chunking")
_ASSISTED = "_assisted_decoding"
_SAMPLING = (
    "_sample",
    "_beam_search",
    "_group_beam_search",
    "_constrained_beam_search",
    "_contrastive_search",
    "_dola_decoding",
    "_greedy_search",
)


def phase_of(past: int | None, recomputes: bool, tokens: int) -> str | tuple[int, str, str]:
    """The phase of a step with `tokens` new ones in each row.

    past : tokens in the cache before it; None where the cache doesn't say
    recomputes : was the model told to use no cache?
    Returns (n, first, rest) where the first n tokens of each row are of another phase than the
    rest.
    """
    name, frame = _generating()
    if frame is not None and name == _ASSISTED:
        return _assisted(frame, tokens)
    first = frame is not None and name in _SAMPLING and _is_first(frame)
    begins = name in _PREFILLS or first
    if begins and not (past and frame is not None and _assists(frame)):
        return PREFILL
    # Each further step of sampling is for one new token a row. More are of another call inside
    # the loop, as of the prompt without which classifier-free guidance compares.
    if name in _SAMPLING and not begins and (tokens == 1 or recomputes):
        return DECODE
    if past is None:
        return UNKNOWN
    if past == 0:
        return PREFILL
    return DECODE if tokens == 1 else UNKNOWN


def _assisted(frame: FrameType, tokens: int) -> str | tuple[int, str, str]:
    """The first step runs the prompt, and behind it what was proposed already."""
    proposed = frame.f_locals.get("candidate_length")
    first = frame.f_locals.get("is_first_iteration")
    if proposed is None or first is None or not 0 <= proposed <= tokens:
        return UNKNOWN
    if not first:
        return VERIFY if tokens > 1 else DECODE
    return (tokens - proposed, PREFILL, VERIFY) if proposed else PREFILL


def _is_first(frame: FrameType) -> bool:
    """Has this loop of `generate` not chosen a token yet? What runs then is the prompt's, also
    the last part of one that ran in chunks, or what is new on a cache that was kept."""
    state = frame.f_locals
    if "decoder_prompt_len" in state:  # beam search
        return state.get("cur_len") == state["decoder_prompt_len"]
    return "next_tokens" not in state


def _assists(frame: FrameType) -> bool:
    """Does an assistant model run, to propose tokens? It is given those that were accepted."""
    return bool(getattr(frame.f_locals.get("generation_config"), "is_assistant", False))


def _generating() -> tuple[str | None, FrameType | None]:
    """The function of transformers' `generate` that runs the model, by the callers of this one."""
    library = sys.modules.get(_LIBRARY)
    if library is None:
        return None, None
    loops = _loops(library.GenerationMixin)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame.f_code) in loops:  # to hash code itself takes longer
            return loops[id(frame.f_code)], frame
        frame = frame.f_back
    return None, None


@lru_cache
def _loops(mixin: type) -> dict[int, str]:
    """{id of the code: name} of the functions in which `generate` calls the model."""
    names = [n for n in (*_PREFILLS, _ASSISTED, *_SAMPLING) if n in vars(mixin)]
    functions = {
        name: getattr(vars(mixin)[name], "__wrapped__", vars(mixin)[name]) for name in names
    }
    return {id(f.__code__): name for name, f in functions.items() if hasattr(f, "__code__")}


def packed_phases(arguments: dict[str, Any], tokens: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Of a row in which several sequences lie one behind the other, as in continuous batching.

    arguments : of the call; cu_seq_lens_q and cu_seq_lens_k hold the ends of each sequence's new
        tokens, and of all its tokens with those in the cache
    Returns
    -------
    phases : (tokens,) int8, numbers in `PHASES`
    real : (tokens,) bool, False behind the last sequence
    or None for a call that isn't packed. Of a prompt that runs in several parts, one of a single
    token can't be told from a decode step, and counts as one.
    """
    ends, all_ends = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if ends is None:
        return None
    if isinstance(all_ends, dict):  # by kind of layer; a sliding window holds the last ones only
        all_ends = all_ends.get("full_attention", next(iter(all_ends.values()), None))
    new = np.diff(_numbers(ends))
    past = np.zeros_like(new) if all_ends is None else np.diff(_numbers(all_ends))[: len(new)] - new
    decodes = (past > 0) & (new == 1)
    phases = np.where(decodes, PHASES.index(DECODE), PHASES.index(PREFILL)).astype(np.int8)
    by_token = np.repeat(phases, new)[:tokens]
    real = np.arange(tokens) < len(by_token)
    return np.pad(by_token, (0, tokens - len(by_token))), real


def _numbers(ends: Any) -> np.ndarray:
    return np.asarray(ends.tolist() if hasattr(ends, "tolist") else ends, np.int64)
