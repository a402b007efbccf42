"""A model through texts and decode steps, profiled: what `moeprof profile` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..checks import check_token_ids
from ..files import as_json
from ..measure.passes import evaluating
from ..models.blocks import find_blocks
from ..models.decoding import cache_of, decode, device_of
from ..models.names import layer_labels
from ..patching.patch import patch
from ..show.console import make_console, progress
from ..texts.windows import HeldOut, heldout_windows
from .agreement import router_agreement
from .metrics import LayerMetrics
from .profiler import MoEProfiler
from .result import Profile

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..checks import Tokenizer
    from ..show.console import Bar
    from ..texts.documents import Text
    from ..texts.windows import Window


PROMPT = 64  # tokens before the decode steps
AGREEMENT = ("layer", "name", "block", "tokens", "agreement", "at_most", "same_experts")


class Plan(NamedTuple):
    """What a profile runs.

    text : HeldOut, its windows run as prefills without a cache
    prompts : how many windows are begun and continued, greedily
    asked : how many that should have been; fewer are long enough
    new_tokens : of each of them
    batches : so many prompts at a time; each batch size has its own pass over the prompts
    """

    text: HeldOut
    prompts: int
    new_tokens: int
    batches: tuple[int, ...]
    asked: int = 0

    @property
    def steps(self) -> int:
        """Calls of the model, counted in windows and in decode steps."""
        groups = sum(-(-self.prompts // batch) for batch in self.batches)
        return len(self.text.windows) + groups * self.new_tokens


def plan(
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    tokens: int,
    prompts: int,
    new_tokens: int,
    batches: Iterable[int],
    seed: int = 0,
) -> Plan:
    """A Plan for texts with .domain, .name and .text: about `tokens` tokens of them."""
    text = heldout_windows(tokenizer, texts, tokens, seed)
    long = _long(text)
    number = min(prompts, len(long))
    # Batches that all prompts are less than would be the same one several times.
    sizes = dict.fromkeys(min(batch, number) for batch in batches if number)
    return Plan(text, number, new_tokens, tuple(sizes), prompts)


def _long(text: HeldOut) -> list[Window]:
    """The windows that can be continued."""
    return [window for window in text.windows if window.ids.shape[1] >= PROMPT]


def profile_texts(
    model: nn.Module,
    plan: Plan,
    *,
    patch: dict[str, Any] | None = None,
    **options: Any,
) -> Profile:
    """The Profile of a model that runs a Plan; the model is afterwards as it was.

    patch : dict of arguments of `moeprof.patch`, or None for the model as it is
    options : of MoEProfiler
    """
    check_token_ids(model, (window.ids for window in plan.text.windows))
    console = make_console()
    profiler = MoEProfiler(model, **options)
    with evaluating(model), torch.inference_mode(), _patched(model, patch):
        _prefill(model, plan.text.windows[0].ids)  # what is slow the first time isn't counted
        with profiler, progress(console, plan.steps, "profile", "forwards", still=True) as bar:
            for window in plan.text.windows:
                with profiler.domain(plan.text.documents[window.document]["domain"]):
                    _prefill(model, window.ids)
                bar.step()
            results = [profiler.result()]
            for batch in plan.batches:
                _continue(model, plan, batch, profiler, bar)
                results.append(profiler.result())
    result = profiler.result()
    result.facts["decode_by_batch"] = as_json(
        [
            _decode_row(batch, *pair)
            for batch, *pair in zip(plan.batches, results, results[1:], strict=False)
        ]
    )
    read = f"the {plan.text.tokens:,} tokens of text that were run have no"
    if not plan.prompts and plan.asked:
        result.facts["notes"].append(
            f"No decode steps were run: {read} passage of {PROMPT} tokens to continue."
        )
    elif plan.prompts < plan.asked:
        result.facts["notes"].append(
            f"{plan.prompts} of {plan.asked} prompts were continued: {read} other passage of "
            f"{PROMPT} tokens."
        )
    return result


def _decode_row(batch: int, before: Profile, after: Profile) -> dict[str, Any]:
    """What the decode steps of one batch size did: those that `after` has and `before` lacks.

    k: experts per token; unique_experts: distinct experts of a layer and step; latency_ms: the
    median of a step, summed over the layers; bytes: of the weights that a step reads.
    """
    pairs = zip(after.counts["decode"], before.counts["decode"], strict=True)
    layers = [
        LayerMetrics(layer, new - old)
        for layer, (new, old) in zip(after.layers, pairs, strict=True)
    ]
    return {
        "batch": batch,
        "steps": max(m.steps for m in layers),
        "k": float(np.mean([m.k_mean for m in layers])),
        "unique_experts": float(np.mean([m.unique_experts_mean for m in layers])),
        "latency_ms": float(sum(m.latency_ms_p50 for m in layers)),
        "bytes": float(sum(m.bytes_per_step for m in layers)),
    }


def _patched(model: nn.Module, options: dict[str, Any] | None) -> AbstractContextManager[Any]:
    """A context in which the model is patched, or as it is."""
    return nullcontext() if options is None else patch(model, **options)


def _prefill(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids.to(device_of(model)), use_cache=False)


def _continue(model: nn.Module, plan: Plan, batch: int, profiler: MoEProfiler, bar: Bar) -> None:
    """Greedy decode steps from the first tokens of windows, `batch` at a time.

    Once for each batch size a step runs uncounted before: the first one is slower.
    """
    windows = _long(plan.text)[: plan.prompts]
    domains = [plan.text.documents[window.document]["domain"] for window in windows]
    for start in range(0, len(windows), batch):
        ids = torch.cat([window.ids[:, :PROMPT] for window in windows[start : start + batch]])
        ids = ids.to(device_of(model))
        profiler.pause()  # the prompts are prefills that were counted with their windows
        if not start:
            first_step = model(input_ids=ids, use_cache=True)
            decode(model, ids[:, -1:], cache_of(first_step))
        output = model(input_ids=ids, use_cache=True)
        profiler.resume()
        first, *others = set(domains[start : start + batch])
        with nullcontext() if others else profiler.domain(first):  # a mixed batch is of none
            for _ in range(plan.new_tokens):
                token = output.logits[:, -1:].argmax(-1)
                output = decode(model, token, cache_of(output))
                bar.step()


def agreement_by_layer(model: nn.Module, plan: Plan, patch: dict[str, Any]) -> pandas.DataFrame:
    """A pandas table: how far a router agrees with the model's own top-k on the same text.

    Columns: layer (its own number), name (its gate's), block, tokens, agreement (mean of
    |S ∩ S'| / k, S the model's own k experts and S' the router's), at_most (what it would be if
    the router only took experts that the model's own takes too, mean of min(|S'|, k) / k),
    same_experts (share of the tokens).
    Both run in the model, so that deeper layers also differ by what the layers before them did.
    """
    import pandas

    with progress(make_console(), 2 * len(plan.text.windows), "agreement", "windows") as bar:
        own, others = (_selections(model, plan, options, bar.step) for options in ({}, patch))
    blocks, rows = find_blocks(model), []
    labels = layer_labels([block.name for block in blocks])
    for label, block, first, second in zip(labels, blocks, own, others, strict=True):
        pairs = list(zip(first, second, strict=True))
        share = np.concatenate([router_agreement(*pair) for pair in pairs])
        k, other = (np.concatenate([(e >= 0).sum(1) for e in side]) for side in (first, second))
        at_most = float((np.minimum(k, other) / k).mean())
        same = (share == 1) & (k == other)
        rows.append(
            (
                label,
                block.gate_name,
                block.name,
                len(share),
                float(share.mean()),
                at_most,
                float(same.mean()),
            )
        )
    return pandas.DataFrame(rows, columns=AGREEMENT)


def _selections(
    model: nn.Module, plan: Plan, patch: dict[str, Any], step: Callable[[], object]
) -> list[list[NDArray[np.int32]]]:
    """For each layer the experts (T, k) of each window."""
    with evaluating(model), torch.inference_mode(), _patched(model, patch) as handle:
        found: list[list[NDArray[np.int32]]] = [[] for _ in handle.layers]
        handle.on_routing(
            lambda layer, routing: found[layer].append(routing.expert_ids.numpy(force=True))
        )
        for window in plan.text.windows:
            _prefill(model, window.ids)
            step()
    return found
