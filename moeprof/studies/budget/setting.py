"""The parameter of a router at which a model takes so many experts per token."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, Union, cast

import numpy as np

from ...measure.passes import Pass, collect, evaluating
from ...measure.routing import by_layer
from ...null import LayerNull, resolve_null
from ...patching.patch import plan_patch
from ...routers import Router, TopK
from .search import Root, Scale, solve

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ...backends.spec import Rule
    from ...null import Null, TokenNull
    from ...null.resolve import AnyNull
    from ...texts.windows import HeldOut


# A main parameter: one for all layers, or one for each.
Values = float | int | tuple[float, ...] | tuple[int, ...]
# Experts per token: one for all layers, or (L,) one for each.
Target = Union[float, Sequence[float], "NDArray[np.float64]"]

TOLERANCE = 0.01  # of the target, in the patched model
MAX_PASSES = 4
STORED = 0.05  # on stored logits the solution is so much closer than the tolerance


class BudgetError(ValueError):
    """The router can't take so many experts per token: names what it reaches."""


class Trial(NamedTuple):
    """One pass of the text through the patched model.

    parameter : the router's main parameter, or a tuple of one for each layer
    predicted : (L,) experts per token with it on the logits of the pass before
    found : (L,) experts per token in the patched model
    jumps : {layer, or None for all layers together: (below, above)} where the average on the
        stored logits jumps over its target
    seconds : of the search and the pass
    """

    parameter: Values
    predicted: NDArray[np.float64]
    found: NDArray[np.float64]
    jumps: dict[int | None, tuple[float, float]]
    seconds: float


@dataclass(eq=False)
class Setting:
    """What `set_budget` found.

    router : the Router with its main parameter set
    null : what `moeprof.patch` takes as null=; None where the router needs none
    target : experts per token: a float, or (L,) one for each layer
    average_k, by_layer : experts per token in the patched model on the text; by_layer (L,)
    reach : (L, 2) smallest and largest averages of the layers on the stock model's logits
    passes : a Trial for each pass
    passed : the Pass of the router returned; a warm start for a neighbouring target
    reached : whether all averages are within the tolerance of their targets
    chosen : the index in `passes` of the pass that came nearest
    """

    router: Router
    null: Null | TokenNull | None
    target: float | NDArray[np.float64]
    average_k: float
    by_layer: NDArray[np.float64]
    reach: NDArray[np.float64]
    passes: list[Trial]
    passed: Pass = field(repr=False)
    reached: bool
    chosen: int

    @property
    def parameter(self) -> Values:
        """The router's main parameter, or a tuple of one for each layer."""
        return self.passes[self.chosen].parameter


def main_of(router: object) -> tuple[str, tuple[float, float], bool]:
    """(name, open range, whether R never falls as it grows) of the main parameter."""
    if not isinstance(router, Router):
        raise TypeError(f"router: expected a Router with a main parameter, got {router!r}")
    if isinstance(router, TopK):
        return "k", (1.0, math.inf), True
    name = getattr(router, "main", None)
    if name is None:
        raise TypeError(f"router: {router.name} has no main parameter that a budget could set")
    return name, router.main_range, router.increasing


def with_main(router: Router, values: Values) -> Router:
    """The router with its main parameter set: a number, or a tuple of one for each layer."""
    changes: dict[str, Any] = {main_of(router)[0]: values}
    if isinstance(router, TopK) and router.max_k in (None, _largest(router.k)):
        changes["max_k"] = _largest(values)  # it only followed k
    return replace(router, **changes)


def _largest(k: Any) -> int:
    return max(k) if isinstance(k, tuple) else k


def resolve(
    router: Router, null: AnyNull | str | os.PathLike[str] | None, stacklevel: int = 4
) -> Null | TokenNull | None:
    """What to give to `patch` as null: resolved once, so that one warning is enough."""
    if not router.wants_null:
        return None
    null = resolve_null(null, stacklevel=stacklevel)
    if isinstance(null, LayerNull):
        raise TypeError("null: expected a Null with all layers, got a LayerNull")
    return null


class Stored:
    """A router on stored logits (L, T, E): experts per token as its parameter moves.

    rules : as in `Pass`
    """

    def __init__(
        self,
        router: Router,
        logits: NDArray[np.float32],
        null: AnyNull | None,
        rules: Sequence[Rule],
    ) -> None:
        self.logits, self.rules = logits, rules
        self.name, bounds, increasing = main_of(router)
        self.scale, self.sign = Scale(*bounds), 1 if increasing else -1
        self.routers, self.nulls = zip(*by_layer(router, null, len(logits)), strict=True)

    @property
    def ends(self) -> tuple[float, float]:
        low, high = self.scale.ends
        return (low, high) if self.sign > 0 else (-high, -low)

    def value(self, position: float) -> float:
        return self.scale.value(self.sign * position)

    def position(self, value: float) -> float:
        return self.sign * self.scale.position(value)

    def average(self, layer: int, position: float) -> float:
        """Experts per token of one layer; never falls as the position grows."""
        router = replace(self.routers[layer], **{self.name: self.value(position)})
        counts, _ = router.count_tokens(self.logits[layer], self.nulls[layer], self.rules[layer])
        return float(counts.mean())

    def averages(self, position: float) -> NDArray[np.float64]:
        return np.array([self.average(layer, position) for layer in range(len(self.logits))])

    def solve(self, target: float, layers: Sequence[int], guess: float, tolerance: float) -> Root:
        """The position at which the layers' mean average is the target."""

        def mean(position: float) -> float:
            return float(np.mean([self.average(layer, position) for layer in layers]))

        return solve(mean, target, self.ends, guess, tolerance)


def reach(
    router: Router, passed: Pass, null: AnyNull | str | os.PathLike[str] | None = None
) -> NDArray[np.float64]:
    """(L, 2): smallest and largest average experts of each layer on the logits of a pass.

    Over the range of the router's main parameter, with its other parameters as they are; null
    as for `moeprof.patch`, without a say for a router that needs none. TopK: 1 to E, unless
    its min_k and max_k say otherwise.
    """
    count, _, experts = passed.logits.shape
    experts = min(rule.eligible(experts) for rule in passed.rules)
    if isinstance(router, TopK):
        free = router.max_k in (None, _largest(router.k))
        return np.array([[router.min_k, experts if free else router.max_k]] * count, float)
    stored = Stored(router, passed.logits, resolve(router, null), passed.rules)
    return np.stack([stored.averages(end) for end in stored.ends], axis=1)


def check_target(target: Target) -> float | NDArray[np.float64]:
    """A float, or (L,) floats; ValueError or TypeError unless all are finite and > 0."""
    values: list[Any]
    values = list(target) if isinstance(target, list | tuple | np.ndarray) else [target]
    for value in values:
        if not isinstance(value, Real) or isinstance(value, bool | np.bool_):
            raise TypeError(f"average_k: expected a number of experts, got {value!r}")
        if not (math.isfinite(value) and float(value) > 0):
            raise ValueError(f"average_k: expected a finite number > 0, got {value!r}")
    if not isinstance(target, list | tuple | np.ndarray):
        return float(cast("float", target))
    return np.array(values, float)


def check_reach(
    router: Router,
    target: Any,
    reached: NDArray[np.float64],
    num_experts: int,
) -> None:
    """BudgetError, naming the interval (and the layer), for a target outside the reach."""
    if np.ndim(target) and len(target) != len(reached):
        raise ValueError(
            f"average_k: expected one for each of {len(reached)} layers, got {len(target)}"
        )
    ends = reached if np.ndim(target) else reached.mean(axis=0, keepdims=True)
    for layer, (value, (low, high)) in enumerate(zip(np.atleast_1d(target), ends, strict=True)):
        slack = 1e-9 * high  # means of integers, rounded
        if not low - slack <= value <= high + slack:
            where = f" in layer {layer}" if np.ndim(target) else ""
            max_k = router.at(0, len(reached)).limits(num_experts)[1]
            limits = "" if isinstance(router, TopK) else f" with min_k={router.min_k}, {max_k=}"
            raise BudgetError(
                f"average_k: {router.name}{limits} reaches from {low:.6g} to {high:.6g} experts "
                f"per token{where} on this text, not {value:.6g}"
            )


def check_whole(target: Any, layers: int, *, per_layer: bool = False) -> None:
    """BudgetError unless all targets are whole; per_layer: multiples of 1/layers, to be split."""
    parts = layers if per_layer else 1
    for value in np.atleast_1d(target):
        units = value * parts
        if abs(units - round(units)) > 1e-9 * units:
            low, high = max(math.floor(units) / parts, 1.0), math.ceil(units) / parts
            hint = "" if per_layer else f" (per_layer=True: multiples of 1/{layers})"
            raise BudgetError(
                f"average_k: topk takes whole numbers of experts in each layer; the nearest to "
                f"{value:.6g} are {low:.6g} and {high:.6g}{hint}"
            )


def set_budget(
    router: Router,
    model: nn.Module,
    text: HeldOut,
    *,
    target: Target,
    null: AnyNull | str | os.PathLike[str] | None = None,
    start: Setting | None = None,
    norm: str = "model",
    tolerance: float = TOLERANCE,
    max_passes: int = MAX_PASSES,
    step: Callable[[], object] = lambda: None,
) -> Setting:
    """Find the main parameter with which the patched model takes `target` experts per token.

    Solves on the logits of the stock model, runs the text through the patched model (whose
    deeper layers see other inputs, hence have other logits), solves again on its logits, and so
    on until the average is within the tolerance or `max_passes` are used up.

    Parameters
    ----------
    router : Router
        Its main parameter is what is looked for; all others are kept.
    model : torch.nn.Module
        Afterwards as it was, also after an exception.
    text : experiment.heldout.HeldOut
    target : float, or one for each layer
        Experts per token: averaged over layers and tokens with one parameter for all layers, or
        each layer's own average with a parameter for each layer.
    null : Null, str, path or None
        As for `moeprof.patch`; without a say for a router that needs none.
    start : Setting
        Of the same router, null and text at a neighbouring target: its pass and its parameter
        take the place of the stock model's pass.
    norm : str
        As for `moeprof.patch`: the weights of the experts change the deeper layers' logits.
    tolerance : float
        Relative to the target.
    step : function
        Called after each window of each pass.

    Returns
    -------
    Setting
        Of the pass that came nearest; with a warning if that is not within the tolerance.

    Raises
    ------
    BudgetError
        If the target is outside what the router reaches on the stock model's logits.
    ValueError, TypeError
        For a target that is no number > 0, or a router without a main parameter.
    """
    setting, shortfall = find(
        router,
        model,
        text,
        target,
        resolve(router, null),
        start=start,
        norm=norm,
        tolerance=tolerance,
        max_passes=max_passes,
        step=step,
    )
    if shortfall:
        warnings.warn(shortfall, stacklevel=2)
    return setting


def find(
    router: Router,
    model: nn.Module,
    text: HeldOut,
    target: Target,
    null: Null | TokenNull | None,
    *,
    start: Setting | None = None,
    passed: Pass | None = None,
    norm: str = "model",
    tolerance: float = TOLERANCE,
    max_passes: int = MAX_PASSES,
    step: Callable[[], object] = lambda: None,
) -> tuple[Setting, str]:
    """(Setting, what it falls short by or ""): `set_budget` with a null as `resolve` gives it.

    passed: the Pass of the stock model, if there is one already.
    """
    target = check_target(target)
    if start is not None:
        passed, reached = start.passed, start.reach
    else:
        check(router, model, null, norm)
        if passed is None:
            with evaluating(model):
                passed = collect(model, text, step=step)
        reached = reach(router, passed, null)
    check_reach(router, target, reached, passed.logits.shape[2])
    if isinstance(router, TopK):
        check_whole(target, len(reached))
    best: Any = None
    trials: list[Trial] = []
    guess = getattr(router, main_of(router)[0]) if start is None else start.parameter
    while len(trials) < max_passes:
        begun = time.perf_counter()
        parameter, predicted, jumps = _solve(router, passed, null, target, guess, tolerance)
        if trials and parameter == trials[-1].parameter:
            break  # on a jump: another pass would find the same
        tried = with_main(router, parameter)
        with evaluating(model):
            passed = collect(model, text, tried, null=null, norm=norm, step=step)
        found = passed.counts.mean(axis=1)
        trials.append(Trial(parameter, predicted, found, jumps, time.perf_counter() - begun))
        error = _error(found, target)
        if best is None or error < best[0]:
            best = (error, tried, passed, found, len(trials) - 1)
        if error <= tolerance:
            break
        guess = parameter
    error, tried, passed, found, chosen = best
    short = _shortfall(router, target, found, trials, tolerance) if error > tolerance else ""
    average = float(found.mean())
    return Setting(
        tried, null, target, average, found, reached, trials, passed, not short, chosen
    ), short


def check(router: Router, model: nn.Module, null: Null | TokenNull | None, norm: str) -> None:
    """Raise what `moeprof.patch` and `main_of` would, before any text is run."""
    main_of(router)
    plan_patch(model, router, null=null, norm=norm)


def _solve(
    router: Router,
    passed: Pass,
    null: Null | TokenNull | None,
    target: Any,
    guess: Any,
    tolerance: float,
) -> tuple[Any, NDArray[np.float64], dict[int | None, tuple[float, float]]]:
    """(parameter, predicted (L,), jumps) on stored logits."""
    if isinstance(router, TopK):
        k = tuple(map(round, target.tolist())) if np.ndim(target) else round(target)
        return k, np.broadcast_to(np.asarray(target, float), len(passed.logits)), {}
    stored = Stored(router, passed.logits, null, passed.rules)
    count = len(passed.logits)
    given = guess if isinstance(guess, tuple) else (guess,)
    guesses = [0.0 if g is None else stored.position(g) for g in given]
    jumps: dict[int | None, tuple[float, float]] = {}
    if np.ndim(target) == 0:
        first = float(np.mean(guesses))
        root = stored.solve(target, range(count), first, STORED * tolerance * target)
        if root.jump is not None:
            jumps[None] = root.jump
        return stored.value(root.position), stored.averages(root.position), jumps
    values, predicted = [], []
    for layer, (wanted, first) in enumerate(zip(target, np.resize(guesses, count), strict=True)):
        root = stored.solve(wanted, [layer], first, STORED * tolerance * wanted)
        if root.jump is not None:
            jumps[layer] = root.jump
        values.append(stored.value(root.position))
        predicted.append(root.average)
    return tuple(values), np.array(predicted), jumps


def _error(found: NDArray[np.float64], target: Any) -> float:
    """The largest relative distance of an average from its target."""
    reached = found if np.ndim(target) else found.mean()
    return float(np.max(np.abs(reached / target - 1)))


def _shortfall(
    router: Router,
    target: Any,
    found: NDArray[np.float64],
    trials: list[Trial],
    tolerance: float,
) -> str:
    """What was reached instead of the target, and why if that is known."""
    if np.ndim(target):
        off = np.abs(found / target - 1) > tolerance
        reached = ", ".join(
            f"{found[i]:.4g} instead of {target[i]:.4g} in layer {i}" for i in np.flatnonzero(off)
        )
    else:
        reached = f"{found.mean():.4g} instead of {target:.4g}"
    jumps = "".join(
        f"; on the logits of the last pass the average{'' if at is None else f' of layer {at}'} "
        f"jumps from {low:.4g} to {high:.4g}"
        for at, (low, high) in trials[-1].jumps.items()
    )
    return (
        f"{router.name}: {reached} experts per token after {len(trials)} passes, "
        f"more than {tolerance:.0%} off{jumps}"
    )
