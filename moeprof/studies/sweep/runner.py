"""Runs one configuration: generate on the prompts, count experts, evaluate on held-out text."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ... import demo
from ...checks import check_model, check_token_ids, check_tokenizer, check_type
from ...demo.defaults import default_null, load_once
from ...measure.generate import greedy
from ...measure.loss import evaluate
from ...measure.passes import patched
from ...models.blocks import experts_of, own_top_k
from ...models.tokens import most_positions, prompt_ids
from ...patching.patch import patch
from ...texts.documents import read_texts
from ...texts.prompts import COMPLEXITIES
from ...texts.windows import heldout_windows
from ..engine.load import DECODE, LOSS, Load
from .grid import as_configuration

if TYPE_CHECKING:
    from os import PathLike

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...checks import Tokenizer
    from ...null.resolve import AnyNull
    from ...patching.handle import Handle
    from ...routers.base import Router
    from ...texts.documents import Text
    from ...texts.windows import HeldOut
    from .grid import Configuration


NEW_TOKENS = 20


class Tally:
    """A routing callback that counts how many experts the tokens were given, layer by layer."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.histogram = np.zeros((num_layers, num_experts + 1), dtype=np.int64)
        self.unrejected = 0  # tokens x layers in which no expert was significant before min_k
        self.by_call: list[list[int]] = [
            [] for _ in range(num_layers)
        ]  # experts of all tokens of each forward
        self._calls: list[tuple[int, Tensor, Tensor]] = []

    def __call__(self, layer: int, routing: Any) -> None:
        # Counting waits for `settle`, so that the timed decode loop pays for an append only.
        self._calls.append((layer, routing.counts, routing.rejections))

    def settle(self) -> Tally:
        """Count what was kept; call it outside of timed regions."""
        for layer, counts, rejections in self._calls:
            found = np.bincount(counts.numpy(force=True), minlength=self.histogram.shape[1])
            self.histogram[layer] += found
            self.by_call[layer].append(int(counts.sum()))
            self.unrejected += int((rejections == 0).sum())
        self._calls.clear()
        return self

    @staticmethod
    def mean(tallies: Sequence[Tally]) -> float | None:
        """Experts per token over all layers and tokens of several tallies; None without tokens."""
        if not tallies:
            return None
        return _means(_histogram(tallies).sum(axis=0))


def _histogram(tallies: Sequence[Tally]) -> NDArray[np.int64]:
    """(L, E+1) tokens by number of experts, of several tallies together."""
    return np.sum([tally.histogram for tally in tallies], axis=0)


def _means(histogram: NDArray[np.int64]) -> Any:
    """Mean number of experts from token counts (..., E+1) by number of experts."""
    return (histogram @ np.arange(histogram.shape[-1]) / histogram.sum(axis=-1)).tolist()


@dataclass(frozen=True)
class Experiment:
    """What all configurations share.

    prompts, complexities: texts, and for each one of `COMPLEXITIES` or None.
    heldout: HeldOut; null: the null distributions that BH measures against.
    """

    model: nn.Module
    tokenizer: Tokenizer
    prompts: tuple[str, ...]
    complexities: tuple[str | None, ...]
    heldout: HeldOut
    null: AnyNull | PathLike[str] | str | None
    new_tokens: int = NEW_TOKENS

    def __post_init__(self) -> None:
        check_model("Experiment", self.model)
        check_tokenizer("Experiment", self.tokenizer)
        if isinstance(self.prompts, str):
            raise TypeError("prompts: expected a list of texts, got one text")
        if not self.prompts:
            raise ValueError("prompts: expected at least one, got none")
        if len(self.prompts) != len(self.complexities):
            raise ValueError(
                f"prompt_complexities: expected one for each of the {len(self.prompts)} prompts, "
                f"got {len(self.complexities)}"
            )
        unknown = set(self.complexities) - {*COMPLEXITIES, None}
        if unknown:
            raise ValueError(
                f"prompt_complexities: expected {', '.join(COMPLEXITIES)} or None, "
                f"got {', '.join(sorted(map(repr, unknown)))}"
            )
        if not all(isinstance(text, str) and text for text in self.prompts):
            raise ValueError("prompts: expected texts that aren't empty")
        if not isinstance(self.new_tokens, int) or self.new_tokens < 1:
            raise ValueError(
                f"max_new_tokens: expected an integer of at least 1, got {self.new_tokens!r}"
            )
        check_token_ids(self.model, (window.ids for window in self.heldout.windows))
        prompts = self.prompt_ids()
        check_token_ids(self.model, prompts)
        longest, most = max(ids.shape[1] for ids in prompts), most_positions(self.model)
        if most is not None and longest + self.new_tokens > most:
            raise ValueError(
                f"prompts: one of {longest} tokens, with {self.new_tokens} more to generate, is "
                f"longer than the {most} positions of the model: give shorter ones "
                "(moeprof sweep --prompts FILE)"
            )

    @property
    def shared(self) -> dict[str, Any]:
        """Its fields but the model and tokenizer: the same experiment where these are loaded."""
        names = [field.name for field in fields(self)]
        return {name: getattr(self, name) for name in names if name not in ("model", "tokenizer")}

    @property
    def steps(self) -> int:
        """How often `run` calls `step`."""
        return len(self.prompts) + len(self.heldout.windows)

    def run(
        self, router: Router | None, step: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        """What a router does on the prompts and on the held-out text: a dict of plain values.

        router: None for the model's own top-k. The model is unpatched afterwards.
        """
        start = time.perf_counter()
        measured = self._generate(router, step) | self._evaluate(router, step)
        return measured | {"seconds": time.perf_counter() - start}

    def quality(
        self, router: Router | None, step: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        """The same on the held-out text alone: the fields of `run` that are of that."""
        start = time.perf_counter()
        measured = self._evaluate(router, step)
        return measured | {"seconds": time.perf_counter() - start}

    def load(self, router: Router | None) -> list[Load]:
        """What `run` takes."""
        prompts = self.prompt_ids()
        read = sum(ids.shape[1] for ids in prompts)
        new = len(prompts) * (self.new_tokens - 1)
        return [
            Load(LOSS, read, router, self.null),
            Load(DECODE, new, router, self.null),
            *self.quality_load(router),
        ]

    def quality_load(self, experts: Router | float | None) -> list[Load]:
        """What `quality` takes; experts: the router, or how many it takes."""
        return [Load(LOSS, self.heldout.tokens, experts, self.null)]

    def _null(self, router: Router | None) -> Any:
        return self.null if router is not None and router.wants_null else None

    def _evaluate(self, router: Router | None, step: Callable[[], object]) -> dict[str, Any]:
        with patched(self.model, router, null=self._null(router)) as handle:
            tally = self._tally(handle)
            handle.on_routing(tally)
            measured = evaluate(self.model, self.heldout, step)
        tally.settle()
        by_document = [0.0] * len(self.heldout.documents)
        by_window = np.mean(tally.by_call, axis=0)  # a window is one forward
        for window, experts in zip(self.heldout.windows, by_window, strict=True):
            by_document[window.document] += float(experts)
        return {
            **measured,
            "avg_experts_heldout": Tally.mean([tally]),
            "experts_by_layer_heldout": _means(tally.histogram),
            "experts_by_document": by_document,
        }

    def _tally(self, handle: Handle) -> Tally:
        return Tally(len(handle.layers), max(layer.num_experts for layer in handle.layers))

    def _generate(self, router: Router | None, step: Callable[[], object]) -> dict[str, Any]:
        """Greedy generation on all prompts, batch 1: experts, tokens per second, tokens, texts."""
        prompts = self.prompt_ids()
        tallies, tokens, seconds = [], [], 0.0
        with patch(self.model, router, null=self._null(router)) as handle:
            greedy(self.model, prompts[0], 2)  # uncounted: the first calls pay for page faults
            for ids in prompts:
                tally = self._tally(handle)
                with handle.on_routing(tally):
                    new, decode_seconds = greedy(self.model, ids, self.new_tokens)
                tallies.append(tally.settle())
                tokens.append(new)
                seconds += decode_seconds
                step()
        decoded = len(prompts) * (self.new_tokens - 1)
        histogram = _histogram(tallies)
        return {
            "avg_experts": Tally.mean(tallies),
            **self._by_complexity(tallies),
            "tokens_per_s": decoded / seconds if decoded else None,
            "experts_by_layer": _means(histogram),
            "tokens_by_number_of_experts": histogram.sum(axis=0).tolist(),
            "share_without_rejection": sum(t.unrejected for t in tallies) / int(histogram.sum()),
            "generated_tokens": tokens,
            "generated_texts": [self.tokenizer.decode(new) for new in tokens],
        }

    def prompt_ids(self) -> list[Tensor]:
        """(1, n) token ids of each prompt."""
        return [prompt_ids(self.tokenizer, text) for text in self.prompts]

    def _by_complexity(self, tallies: list[Tally]) -> dict[str, Any]:
        means = {}
        for label in COMPLEXITIES:
            of_label = [t for t, c in zip(tallies, self.complexities, strict=True) if c == label]
            means[f"avg_experts_{label}"] = Tally.mean(of_label)
        return means


def row_of(
    configuration: Configuration,
    result: dict[str, Any],
    baseline: dict[str, Any] | None,
    top_k: int,
) -> dict[str, Any]:
    """A configuration's row: what it is, what `Experiment.run` gave, and both beside the baseline.

    baseline: what the run of the model's own top_k gave; without it `delta_perplexity` and
    `token_agreement` are None.
    """
    compared = {
        "config": configuration.name,
        "routing_type": configuration.routing_type,
        "alpha": configuration.alpha,
        "max_k": configuration.max_k,
        **result,
        "reduction_pct": 100 * (1 - result["avg_experts"] / top_k),
        "delta_perplexity": None,
        "token_agreement": None,
    }
    if baseline is not None:
        same = np.equal(result["generated_tokens"], baseline["generated_tokens"])
        compared["delta_perplexity"] = result["perplexity"] - baseline["perplexity"]
        compared["token_agreement"] = float(same.mean())
    return compared


def run_configuration(
    config: Configuration | Mapping[str, Any] | str,
    prompts: Iterable[str],
    prompt_complexities: Iterable[str | None],
    max_new_tokens: int = NEW_TOKENS,
    *,
    model: nn.Module | None = None,
    tokenizer: Tokenizer | None = None,
    null: AnyNull | str | os.PathLike[str] | None = None,
    baseline: dict[str, Any] | None = None,
    texts: Iterable[str | Text] | None = None,
) -> dict[str, Any]:
    """Run one configuration of the experiment, for notebooks; the sweep does the same 21 times.

    Parameters
    ----------
    config : str, dict or Configuration
        A name: "bh_k8_a005" is BH with max_k 8 and alpha 0.05. Or a Configuration's fields.
    prompts : list of str
        Texts to continue.
    prompt_complexities : list of str or None
        "simple", "medium", "complex", "technical" or None for each of them.
    max_new_tokens : int
        Tokens to generate after every prompt, greedy and without an early stop.
    model : torch.nn.Module
        The demo model when not given. On a patched model the configuration runs on top of that
        patch.
    tokenizer : callable
        The model's; give both or none.
    null : Null, str, path or None
        For BH: a null, the path of one, or "normal". When not given, the `trimmed` null on the
        score `logprob` that ships with the demo model; for another model one is fitted to the
        shipped calibration text, once.
    baseline : dict
        What the baseline's run returned. Without it delta_perplexity and token_agreement are
        None (but the baseline's own).
    texts : list of str, or of objects with .text and .domain
        Each is a document: the held-out text that perplexity is measured on. What ships with the
        demo model when not given.

    Returns
    -------
    dict
        The columns of the sweep's CSV, and more: experts_by_layer, generated_texts, …

    Raises
    ------
    ValueError
        An unknown configuration, no prompts, lists of different lengths, a model that can't be
        patched, a tokenizer of another model.
    TypeError
        No model, no tokenizer.

    Example
    -------
    >>> result = run_configuration("bh_k8_a005", ["The list is"], ["simple"])  # doctest: +SKIP
    >>> result["avg_experts"], result["perplexity"]                            # doctest: +SKIP
    """
    if (model is None) != (tokenizer is None):
        raise ValueError("run_configuration: give both model and tokenizer, or none of them")
    if model is None or tokenizer is None:
        model, tokenizer = load_once()
    check_model("run_configuration", model)
    check_tokenizer("run_configuration", tokenizer)
    for name, given in (("prompts", prompts), ("prompt_complexities", prompt_complexities)):
        check_type(f"run_configuration: {name}", given, Iterable, "a list of texts")
    configuration = as_configuration(config, *experts_of(model))
    if null is None and configuration.routing_type == "bh":
        null = default_null(model, tokenizer)
    heldout = demo.heldout_texts() if texts is None else read_texts(texts, "texts")
    experiment = Experiment(
        model,
        tokenizer,
        prompts if isinstance(prompts, str) else tuple(prompts),  # type: ignore[arg-type]  # refused
        tuple(prompt_complexities),
        heldout_windows(tokenizer, heldout),
        null,
        max_new_tokens,
    )
    top_k = own_top_k(model)
    result = experiment.run(configuration.router(top_k))
    if configuration.is_baseline(top_k):
        baseline = result
    return row_of(configuration, result, baseline, top_k)
