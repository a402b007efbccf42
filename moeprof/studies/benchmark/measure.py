"""One configuration on some texts: what it chooses and predicts, and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...backends.torch.prepared import precise
from ...checks import check_token_ids, check_type
from ...measure.timing import wait_for
from ...models.decoding import cache_of, decode, device_of
from ...models.tokens import prompt_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...checks import Tokenizer
    from ...profile.profiler import MoEProfiler


class Prompt(NamedTuple):
    """A text; category is None where the texts have none; ids (1, n)."""

    category: str | None
    text: str
    ids: Tensor


class Seen(NamedTuple):
    """What a model does on N prompts, each followed by S greedy tokens.

    experts : (N, 2) mean experts per token over the layers, in the prefill and the decode steps
    nats : (N,) the sum of -ln P(token) over the prompt, without its first token
    generated : N lists of S token ids
    """

    experts: NDArray[np.float64]
    nats: NDArray[np.float64]
    generated: list[list[int]]


class Times(NamedTuple):
    """Seconds of R rounds: prefill (R, N) of each prompt, decode (R, N, S) of each step."""

    prefill: NDArray[np.float64]
    decode: NDArray[np.float64]

    @classmethod
    def of(cls, rounds: Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Times:
        """From what `run_round` returned, R times."""
        prefill, decode = zip(*rounds, strict=True)
        return cls(np.stack(prefill), np.stack(decode))


def read_prompts(tokenizer: Tokenizer, texts: Any) -> list[Prompt]:
    """Prompts of a text, a list of texts or a dict {category: text or [texts]}, checked."""
    kinds = "a text, a list of texts or a dict {category: text or list of texts}"
    check_type("texts", texts, (str, list, tuple, dict), kinds)
    groups = texts if isinstance(texts, dict) else {None: texts}
    prompts = []
    for category, members in groups.items():
        where = "texts" if category is None else f"texts[{category!r}]"
        check_type(where, members, (str, list, tuple), "a text or a list of texts")
        if isinstance(members, str):
            members = [members]
        if not members:
            raise ValueError(f"{where}: expected at least one text, got none")
        for index, text in enumerate(members):
            if not isinstance(text, str):
                raise TypeError(f"{where}[{index}]: expected a text, got {type(text).__name__}")
            ids = prompt_ids(tokenizer, text) if text else torch.empty(0)
            if not ids.numel():
                raise ValueError(f"{where}[{index}]: the text {text!r} is empty")
            prompts.append(Prompt(category, text, ids))
    if not prompts:
        raise ValueError("texts: expected at least one text, got none")
    return prompts


@torch.inference_mode()
def look(
    model: nn.Module,
    prompts: Sequence[Prompt],
    new_tokens: int,
    step: Callable[[], object] = lambda: None,
) -> Seen:
    """What the model does, apart from its times: the profiler counts here, and nowhere else."""
    from ...profile.profiler import MoEProfiler

    check_token_ids(model, (prompt.ids for prompt in prompts))
    experts, nats, generated = [], [], []
    for prompt in prompts:
        ids = prompt.ids.to(device_of(model))
        with MoEProfiler(model) as prefill:
            out = model(input_ids=ids, use_cache=True)
        logits = out.logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        nats.append(loss.sum(dtype=precise(loss.device)).item())
        tokens = []
        with MoEProfiler(model) as steps:
            for _ in range(new_tokens):
                tokens.append(out.logits[:, -1:].argmax(dim=-1))
                out = decode(model, tokens[-1], cache_of(out))
        experts.append((_k_mean(prefill), _k_mean(steps)))
        generated.append(torch.cat(tokens, dim=1)[0].tolist())
        step()
    return Seen(np.array(experts), np.array(nats), generated)


def _k_mean(profiler: MoEProfiler) -> float:
    """Experts per token, mean of the layers."""
    return float(np.mean([layer.k_mean for layer in profiler.get_metrics().values()]))


@torch.inference_mode()
def run_round(
    model: nn.Module,
    prompts: Sequence[Prompt],
    new_tokens: int,
    step: Callable[[], object] = lambda: None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(prefill (N,), decode (N, S)) seconds, all prompts once, batch 1, no early stop."""
    prefill, steps = np.zeros(len(prompts)), np.zeros((len(prompts), new_tokens))
    for number, prompt in enumerate(prompts):
        ids = prompt.ids.to(device_of(model))
        wait_for(ids)
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True)
        wait_for(ids)
        prefill[number] = time.perf_counter() - start
        for place in range(new_tokens):
            start = time.perf_counter()
            token = out.logits[:, -1:].argmax(dim=-1)
            out = decode(model, token, cache_of(out))
            wait_for(ids)
            steps[number, place] = time.perf_counter() - start
        step()
    return prefill, steps
