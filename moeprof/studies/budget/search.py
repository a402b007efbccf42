"""Where a step function that never falls meets a target, in few evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

EVALUATIONS = 60  # far more than a smooth average needs (5 to 10); halving a jump takes them
_OPEN_01 = math.log(2**53)  # expit of more is 1.0, which an open interval does not contain
_FAR = 690.0  # exp(-690) is still a normal double
_TILT = 40.0  # sinh(40) = 1.2e17, beyond any statistic that a tilt has to outweigh


class Scale(NamedTuple):
    """A parameter's open range, stretched to positions that a search can halve.

    A position is the logit of a parameter between two ends, the logarithm of the distance to
    one end, and asinh where there is no end: even steps near 0, growing ones outwards.
    """

    low: float
    high: float

    @property
    def ends(self) -> tuple[float, float]:
        """The positions beyond which a double is no longer inside the range."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return (-_FAR if self.low == 0 else -_OPEN_01), _OPEN_01
        if math.isfinite(self.low) or math.isfinite(self.high):
            return (-_FAR, _FAR)
        return (-_TILT, _TILT)

    def value(self, position: float) -> float:
        """The parameter at a position, inside the open range."""
        low, high = self.low, self.high
        if math.isfinite(low) and math.isfinite(high):
            part = math.exp(min(position, 0)) / (1 + math.exp(-abs(position)))
            value = low + (high - low) * part
        elif math.isfinite(low):
            value = low + math.exp(position)
        elif math.isfinite(high):
            value = high - math.exp(-position)
        else:
            return math.sinh(position)
        return min(max(value, math.nextafter(low, math.inf)), math.nextafter(high, -math.inf))

    def position(self, value: float) -> float:
        """The position of a parameter of the range; its inverse is `value`."""
        low, high = self.low, self.high
        if math.isfinite(low) and math.isfinite(high):
            place = math.log(value - low) - math.log(high - value)
        elif math.isfinite(low):
            place = math.log(value - low)
        elif math.isfinite(high):
            place = -math.log(high - value)
        else:
            place = math.asinh(value)
        return min(max(place, self.ends[0]), self.ends[1])


class Root(NamedTuple):
    """Where a search ended.

    position, average : the place, and what the function is there
    jump : None, or the (below, above) between which nothing was found: the function jumps
        over the target there, or the target lies beyond one of its ends
    evaluations : int
    """

    position: float
    average: float
    jump: tuple[float, float] | None
    evaluations: int


def solve(
    average: Callable[[float], float],
    target: float,
    ends: tuple[float, float],
    guess: float,
    tolerance: float,
    stride: float = 0.5,
) -> Root:
    """The position within `ends` at which `average` is the target, to within a tolerance.

    average : function of a position that never falls; a step function is allowed
    guess : where to begin; the bracket grows from there by `stride`, 2 `stride`, 4 ...
    tolerance : in the units of the average

    Where the function jumps over the target, the nearer side of the jump is returned.
    """
    calls = 0

    def measured(position: float) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        return position, average(position)

    low, high = ends
    best = below = above = measured(min(max(guess, low), high))
    while abs(best[1] - target) > tolerance:  # grow towards the target
        rising = best[1] < target
        edge = above if rising else below
        if edge[0] == (high if rising else low):
            return Root(*best, (best[1], best[1]), calls)
        step = edge[0] + (stride if rising else -stride)
        best = measured(min(max(step, low), high))
        below, above = (above, best) if rising else (best, below)
        stride *= 2
        if (best[1] >= target) == rising:
            break
    halve = False
    while abs(best[1] - target) > tolerance:
        width, resolution = above[0] - below[0], 4e-16 * (abs(above[0]) + abs(below[0]))
        if calls >= EVALUATIONS or width <= max(resolution, 1e-13):
            nearer = min(below, above, key=lambda side: abs(side[1] - target))
            return Root(*nearer, (below[1], above[1]), calls)
        best = measured(_between(below, above, target, halve=halve))
        below, above = (best, above) if best[1] < target else (below, best)
        halve = not halve and above[0] - below[0] > width / 2  # a line that did not help
    return Root(*best, None, calls)


def _between(
    below: tuple[float, float], above: tuple[float, float], target: float, *, halve: bool
) -> float:
    """The next place to look: on the straight line, or in the middle where that crept."""
    (a, at_a), (b, at_b) = below, above
    if halve or at_b == at_a:
        return (a + b) / 2
    part = (target - at_a) / (at_b - at_a)
    return a + (b - a) * min(max(part, 0.02), 0.98)
