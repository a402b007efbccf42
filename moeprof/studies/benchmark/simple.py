"""SimpleBenchmark: a model in several configurations on the same texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

from torch import nn

from ...checks import check_model, check_tokenizer
from ...measure.machine import describe
from ...measure.snapshot import undoing
from ...measure.timing import interleave
from ...show.console import make_console, progress
from .measure import Times, look, read_prompts, run_round
from .result import BenchmarkComparison, Measurement

if TYPE_CHECKING:
    from ...checks import Tokenizer
    from ...show.console import Bar
    from .measure import Prompt


Configure = Callable[[nn.Module], object]  # changes a model in place


class SimpleBenchmark:
    """Measure configurations of a model, and compare them with the first one.

    Each configuration runs every text as a prefill with a cache and then `max_new_tokens`
    greedy decode steps, batch 1, without an early stop, in eval and inference mode. What
    `configure` changed of the model is undone after its run.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers with MoE layers.
    tokenizer : callable
        As transformers has them.
    max_new_tokens : int
        Decode steps after each text.
    warmup : int
        Rounds over all texts that are not counted.
    repeats : int
        Rounds that are counted; with fewer than 5 no difference can be told from noise.

    Raises
    ------
    TypeError, ValueError
        No module, no callable; a number that is none or too small.

    Example
    -------
    >>> bench = SimpleBenchmark(model, tokenizer)                               # doctest: +SKIP
    >>> bench.run_config("as it is", texts)                                     # doctest: +SKIP
    >>> bench.run_config("bh", texts, lambda m: moeprof.patch(m, "bh", null=null))  # doctest: +SKIP
    >>> print(bench.compare())                                                  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int = 20,
        warmup: int = 1,
        repeats: int = 5,
    ) -> None:
        check_model("SimpleBenchmark", model)
        check_tokenizer("SimpleBenchmark", tokenizer)
        least = {
            "max_new_tokens": (max_new_tokens, 1),
            "warmup": (warmup, 0),
            "repeats": (repeats, 1),
        }
        for name, (value, smallest) in least.items():
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name}: expected an integer, got {value!r}")
            if value < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.warmup, self.repeats = max_new_tokens, warmup, repeats
        self.results: dict[str, Measurement] = {}
        self._runs: dict[str, tuple[list[Prompt], Configure | None]] = {}

    def __repr__(self) -> str:
        names = ", ".join(self.results) or "none yet"
        return f"<SimpleBenchmark of {type(self.model).__name__}; configurations: {names}>"

    def run_config(self, name: str, texts: Any, configure: Configure | None = None) -> Measurement:
        """Measure one configuration, alone.

        Its times are not to be set beside those of another run, when the machine may have been
        faster or slower: `compare` runs all of them in turn for that.

        Parameters
        ----------
        name : str
        texts : str, list of str, or dict {category: str or list of str}
            Experts and loss are also given by category.
        configure : callable, optional
            ``configure(model)`` changes the model in place: patches it, changes its config or a
            block's top_k, wraps a gate, registers hooks, replaces or changes weights, sets the
            number of threads. What it returns is kept until the run is over.

        Returns
        -------
        Measurement
            Times in ms, loss in nats per token, experts per token and layer.

        Raises
        ------
        ValueError
            A name that was used, empty texts, a model without MoE layers or with fewer
            embeddings than the tokenizer has ids.
        TypeError
            Texts or a `configure` of another kind.
        RuntimeError
            If weights were changed in place and there was no memory to copy them before.
        Exception
            Whatever `configure` or the model raises; the model is as it was then, too.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name: expected a text, got {name!r}")
        if name in self.results:
            raise ValueError(f"name: {name!r} was run already; names are of one run each")
        if configure is not None and not callable(configure):
            raise TypeError(f"configure: expected a function of the model, got {configure!r}")
        prompts = read_prompts(self.tokenizer, texts)
        rounds = self.warmup + self.repeats
        with self._bar((1 + rounds) * len(prompts), name, "texts") as bar:
            with self._configuring([configure]) as configured:
                configured(configure)
                seen = look(self.model, prompts, self.max_new_tokens, bar.step)
                times = [
                    run_round(self.model, prompts, self.max_new_tokens, bar.step)
                    for _ in range(rounds)
                ][self.warmup :]
                machine = describe()
        result = Measurement(name, prompts, seen, Times.of(times), machine)
        self.results[name], self._runs[name] = result, (prompts, configure)
        return result

    def compare(self) -> BenchmarkComparison:
        """Run all configurations again, in turn, and set them against the first one.

        Each of the `repeats` rounds runs every configuration once on all texts, in an order
        that is drawn for each round; a first round is not counted. Before each turn the model
        is configured anew and runs the first text, uncounted.

        Returns
        -------
        BenchmarkComparison
            Prints as tables of at most 100 columns; `to_frame()` has all numbers.

        Raises
        ------
        ValueError
            Before any `run_config`, or if they were given different texts.
        Exception
            Whatever `run_config` raises.
        """
        if not self._runs:
            raise ValueError("compare: no configuration yet; call run_config first")
        (first, (prompts, _)), *others = self._runs.items()
        for name, (own, _) in others:
            if [p[:2] for p in own] != [p[:2] for p in prompts]:
                raise ValueError(
                    f"compare: {name!r} was run on other texts than {first!r}, so their times "
                    "can't be compared"
                )
        rounds: dict[str, list[Any]] = {name: [] for name in self._runs}
        configures = {name: configure for name, (_, configure) in self._runs.items()}
        shown = self._bar(self.repeats + 1, "compare", "rounds")
        with shown as bar, self._configuring(configures.values()) as configured:

            def prepare(name: str) -> tuple[str]:
                bar.note(name)
                configured(configures[name])
                if self.warmup:
                    run_round(self.model, prompts[:1], self.max_new_tokens)
                return (name,)

            def call(name: str) -> None:
                rounds[name].append(run_round(self.model, prompts, self.max_new_tokens))

            interleave(dict.fromkeys(configures, call), self.repeats, prepare, bar)
        return BenchmarkComparison(
            [replace(self.results[name], times=Times.of(own[1:])) for name, own in rounds.items()]
        )

    @contextmanager
    def _configuring(
        self, configures: Iterable[Configure | None]
    ) -> Iterator[Callable[[Configure | None], None]]:
        """A function that puts the model into one of `configures`, from what it is now.

        At the end it is as it was. What `configure` returned goes before that, for some handles
        undo on their own when they do.
        """
        changing = any(configure is not None for configure in configures)
        held: list[object] = []
        with undoing(self.model, weights=changing) as snapshot:

            def configured(configure: Configure | None) -> None:
                if held:
                    held.clear()
                    snapshot.restore()
                self.model.eval()
                held.append(None if configure is None else configure(self.model))

            try:
                yield configured
            finally:
                held.clear()

    def _bar(self, steps: int, name: str, unit: str) -> AbstractContextManager[Bar]:
        return progress(make_console(), steps, name, unit, still=True)
