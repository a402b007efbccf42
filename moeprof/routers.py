"""Routers: how many experts each token gets, and which.

A router is a frozen dataclass whose fields are the parameters of its C twin
(``csrc/routers/<name>.c``, in the same order) after those that all routers share. All
selections go by evidence, best first: p-values ascending where the router works on p-values,
else logits descending; ties go to the higher logit, then to the lower expert id.
"""

import math
import sys
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import _C
from .cpu import get_num_threads

REGISTRY: dict[str, type["Router"]] = {}


@dataclass(frozen=True)
class Router:
    """What all routers share.

    Parameters
    ----------
    min_k, max_k : int
        A token gets at least and at most so many experts, 1 <= min_k <= max_k <= E;
        max_k None is min(16, E). A min_k of 1 or more voids any statement about false
        discoveries: some tokens get experts that the test did not select.
    temperature : float
        Divides the logits before the softmax that gives the weights; > 0. It never acts on
        the selection.

    Raises
    ------
    ValueError
        For a parameter outside its range, naming it.
    """

    min_k: int = field(default=1, kw_only=True)
    max_k: int | None = field(default=None, kw_only=True)
    temperature: float = field(default=1.0, kw_only=True)

    name: ClassVar[str]
    wants_null: ClassVar[bool] = False  # works on p-values
    budget: ClassVar[Any] = None  # a BudgetReport on what `with_budget` returns

    def __init_subclass__(cls) -> None:
        REGISTRY[cls.name] = cls

    def __post_init__(self) -> None:
        if not (_is_real(self.temperature) and 0 < self.temperature < float("inf")):
            raise ValueError(f"temperature: expected a number > 0, got {self.temperature!r}")
        for name in ("min_k", "max_k"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) or (value is None and name == "max_k")):
                raise ValueError(f"{name}: expected an integer, got {value!r}")

    def limits(self, num_experts: int) -> tuple[int, int]:
        """(min_k, max_k) for E = ``num_experts``; ValueError if they do not fit."""
        max_k = min(16, num_experts) if self.max_k is None else self.max_k
        for name, value in (("min_k", self.min_k), ("max_k", max_k)):
            if not 1 <= value <= num_experts:
                raise ValueError(f"{name}: expected 1 to {num_experts} (experts), got {value}")
        if self.min_k > max_k:
            raise ValueError(f"min_k: expected at most max_k={max_k}, got {self.min_k}")
        return self.min_k, max_k

    def at(self, layer: int, num_layers: int) -> "Router":
        """The router of one layer of `num_layers`: parameters given by layer become scalars."""
        return self

    def adapt(self, null):
        """The Null that the router works with, from the one that was given."""
        return null

    def with_budget(
        self, model, tokenizer, texts, average_k: float = 6.0, per_layer: bool = False, *,
        null=None, heldout=None, norm: str = "model", tokens: int = 32768, progress: bool = True,
    ) -> "Router":  # fmt: skip
        """This router with its main parameter set so that `model` takes `average_k` experts.

        The parameter is solved for on the stock model's logits. Then the texts run through the
        patched model, whose deeper layers see other inputs, and it is solved for again on the
        logits found there, until the average is within 1 % or after 4 passes. All that these
        parameters are is knobs for compute.

        Parameters
        ----------
        model, tokenizer
            Of Hugging Face transformers, on the CPU. The model is afterwards as it was.
        texts : list of str
            Or of objects with .text and .domain, as moeprof.demo has them: one a document.
        average_k : float
            Experts per token, averaged over tokens and layers.
        per_layer : bool
            Split the budget over the layers, by dynamic programming, so that the KL from the
            full model is least, as measured with one layer at a time at top-k on 8,192 tokens
            of the texts; then the parameter is a tuple of one for each layer. Takes a run of
            those for each layer and each k from 1 to max_k.
        null : Null, str, path or None
            As for `moeprof.patch`.
        heldout : list of str, optional
            Where to check the setting; else one fifth of the texts is set aside for that,
            before anything is solved.
        norm : {"model", "none", "sum", "mass"}
            As for `moeprof.patch`. Give the same one there.
        tokens : int
            At most about so many of the texts, and of the held-out ones, are run, spread over
            domains and documents; their logits are kept, 4 bytes an expert, layer and token.
        progress : bool
            Whether to show a bar if it takes more than 2 seconds.

        Returns
        -------
        Router
            With a report in its attribute `budget`: the passes, the reach, the average on the
            calibration text and on held-out text with its standard error over documents.
            There is a warning if no pass came within 1 %.

        Raises
        ------
        BudgetError
            A ValueError: average_k is outside what the router reaches, and the interval is named.
        ValueError, TypeError
            For arguments of another kind, or a router without a main parameter.
        """
        from .budget import with_budget

        return with_budget(
            self, model, tokenizer, texts, average_k, per_layer, null=null, heldout=heldout,
            norm=norm, tokens=tokens, progress=progress,
        )  # fmt: skip

    def parameters(self) -> tuple[float, ...]:
        """The router's own parameters, in the order of its C twin."""
        shared = {f.name for f in fields(Router)}
        return tuple(float(getattr(self, f.name)) for f in fields(self) if f.name not in shared)

    def spec(self, num_experts: int, *, norm: str, norm_k: int = 1, null=None) -> tuple:
        """The argument ``spec`` of the C functions; ``null`` is a LayerNull or None (`normal`)."""
        min_k, max_k = self.limits(num_experts)
        triple = ("normal", "logit", None) if null is None else null.spec
        return (self.name, self.parameters(), min_k, max_k, float(self.temperature),
                norm, norm_k, triple, None)  # fmt: skip

    def count(self, p: np.ndarray) -> int:
        """R of one token before clamping; p (E,) float64: its p-values, ascending."""
        raise NotImplementedError  # abstract: each router has its own

    def reference(self, router_logits: np.ndarray, *, null=None) -> tuple[np.ndarray, np.ndarray]:
        """The routing in NumPy float64, weights summing to 1: the oracle of the C path.

        Parameters
        ----------
        router_logits : (T, E) float array
        null : LayerNull, optional
            None is the `normal` null.

        Returns
        -------
        weights : (T, E) float64, zero where not selected
        rejections : (T,) int64, R before clamping
        """
        z = np.asarray(router_logits, dtype=np.float64)
        bad = np.isnan(z).any(axis=1) | (z == -np.inf).all(axis=1)
        if bad.any():
            raise ValueError(f"router_logits: row {bad.argmax()} has a NaN or is -inf throughout")
        p = np.zeros_like(z)
        if self.wants_null:
            p = _normal_reference(z) if null is None else null.reference(z)
        min_k, max_k = self.limits(z.shape[1])
        weights, rejections = np.zeros_like(z), np.zeros(len(z), dtype=np.int64)
        for t, row in enumerate(z):
            order = np.lexsort((np.arange(row.size), -row, p[t]))
            rejections[t] = self.count(p[t][order])
            chosen = order[: np.clip(rejections[t], min_k, max_k)]
            softmax = _softmax(row / self.temperature)[chosen]
            weights[t, chosen] = softmax / softmax.sum()
        return weights, rejections


@dataclass(frozen=True)
class TopK(Router):
    """R = k: the k experts with the highest logits, for every token.

    Parameters
    ----------
    k : int
        Experts per token, 1 <= k <= E. max_k is k unless given.

    Source: Shazeer et al. 2017, "Outrageously Large Neural Networks", eq. (3) to (5).
    """

    k: int = 8
    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.k, Integral) or self.k < 1:
            raise ValueError(f"k: expected an integer >= 1, got {self.k!r}")
        if self.max_k is None:
            object.__setattr__(self, "max_k", self.k)

    def limits(self, num_experts: int) -> tuple[int, int]:
        if self.k > num_experts:
            raise ValueError(f"k: expected at most {num_experts} (experts), got {self.k}")
        return super().limits(num_experts)

    def count(self, p: np.ndarray) -> int:
        return self.k


@dataclass(frozen=True)
class BH(Router):
    """R = max{r : p_(r) E <= alpha r}, the step-up rule of Benjamini and Hochberg.

    Parameters
    ----------
    alpha : float
        In (0, 1). A knob for compute. It bounds the false discovery rate only against the
        null that the p-values come from, for independent (or positively dependent) scores,
        and only before the clamping to min_k..max_k.

    Source: Benjamini & Hochberg 1995, J. R. Statist. Soc. B 57, eq. (1). The comparison is
    exact, not of rounded products.
    """

    alpha: float = 0.05
    name: ClassVar[str] = "bh"
    main: ClassVar[str] = "alpha"
    main_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    increasing: ClassVar[bool] = True
    wants_null: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)

    def count(self, p: np.ndarray) -> int:
        # Exact where a long double has 64 bits or more: 53 of p or alpha, 11 of E or r.
        r = np.arange(1, p.size + 1)
        below = p.astype(np.longdouble) * p.size <= np.longdouble(self.alpha) * r
        return int(below.nonzero()[0].max(initial=-1)) + 1


def check_alpha(alpha: Any) -> None:
    """ValueError unless alpha is a number in (0, 1)."""
    if not (_is_real(alpha) and 0 < alpha < 1):
        raise ValueError(f"alpha: expected a number in (0, 1), got {alpha!r}")


def make_router(router: str | Router, **parameters) -> Router:
    """A router from a name and keywords, or the object itself (then without keywords)."""
    if isinstance(router, Router):
        if parameters:
            raise TypeError(f"router: {router!r} takes no further parameters: {sorted(parameters)}")
        return router
    if not isinstance(router, str):
        raise TypeError(f"router: expected a name or a Router, got {type(router).__name__}")
    if router not in REGISTRY:
        raise ValueError(f"router: expected one of {sorted(REGISTRY)}, got {router!r}")
    cls = REGISTRY[router]
    known = [f.name for f in fields(cls)]
    if unknown := sorted(set(parameters) - set(known)):
        raise TypeError(f"router {router!r}: unknown parameters {unknown}; it takes {known}")
    return cls(**parameters)


class RoutingResult(NamedTuple):
    """What a routing function returns. T tokens (or B, S), E experts.

    routing_weights : (T, E), dtype of the logits; zero where not selected, rows sum to 1
    selected_experts : (T, max_k) int64, best first, padded with -1
    expert_counts : (T,) int64
    """

    routing_weights: Any
    selected_experts: Any
    expert_counts: Any


class RoutingStats(NamedTuple):
    """A RoutingResult with what led to it: p_values (T, E) float64 and mask (T, E) bool."""

    routing_weights: Any
    selected_experts: Any
    expert_counts: Any
    p_values: Any
    mask: Any


def benjamini_hochberg_routing(
    router_logits,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int | None = None,
    *,
    null=None,
    return_stats: bool = False,
) -> RoutingResult | RoutingStats:
    """Route each token to the experts whose router score stands out from the null.

    Parameters
    ----------
    router_logits : torch.Tensor or numpy.ndarray, (T, E) or (B, S, E)
        float32, float16, or bfloat16 (torch); any strides, on the CPU. No gradient flows.
    alpha, temperature, min_k, max_k
        See :class:`BH`.
    null : LayerNull, Null of one layer, or None
        None is the `normal` null: a fallback, see :mod:`moeprof.null`.
    return_stats : bool
        Also return the p-values and the mask of the selected experts.

    Returns
    -------
    RoutingResult or RoutingStats
        torch in, torch out; NumPy in, NumPy out.

    Raises
    ------
    ValueError
        For a parameter out of range, a wrong number of dimensions, or a row with a NaN or
        with nothing above -inf (naming the row).
    TypeError
        If ``router_logits`` is no tensor or array of those dtypes.

    Examples
    --------
    >>> import numpy as np, moeprof
    >>> logits = np.zeros((1, 64), np.float32); logits[0, 3] = 9
    >>> moeprof.benjamini_hochberg_routing(logits, null=None).selected_experts[0, 0]
    np.int64(3)
    """
    router = BH(alpha, min_k=min_k, max_k=max_k, temperature=temperature)
    return _route(router, router_logits, null, return_stats)


def topk_routing(
    router_logits, k: int = 8, temperature: float = 1.0, *, null=None, return_stats: bool = False
) -> RoutingResult | RoutingStats:
    """Route each token to its k highest logits; see :func:`benjamini_hochberg_routing`.

    The null only matters to the p-values of ``return_stats``.
    """
    return _route(TopK(k, temperature=temperature), router_logits, null, return_stats)


def benjamini_hochberg(p, alpha: float):
    """Mark the hypotheses that the Benjamini-Hochberg procedure rejects, row by row.

    Parameters
    ----------
    p : torch.Tensor or numpy.ndarray, (T, E) or (E,)
        p-values in [0, 1]; computed in float64.
    alpha : float
        In (0, 1).

    Returns
    -------
    bool array of the shape of p
        The same as ``scipy.stats.false_discovery_control(p, axis=-1) <= alpha``, exact where
        p_(r) E == alpha r.
    """
    check_alpha(alpha)
    if is_tensor(p):
        p = p.detach().double()
    array, back = _as_numpy(p, "p")
    if array.dtype.kind not in "fiu":
        raise TypeError(f"p: expected real numbers, got {array.dtype}")
    if array.ndim not in (1, 2):
        raise ValueError(f"p: expected (T, E) or (E,), got shape {array.shape}")
    rows = np.ascontiguousarray(np.atleast_2d(array), dtype=np.float64)
    if not ((rows >= 0) & (rows <= 1)).all():
        raise ValueError("p: expected p-values in [0, 1]")
    rejections = _C.step_up(rows, float(alpha))
    # Equal p-values are rejected together: the largest rejected one is the threshold.
    ordered = np.sort(rows, axis=1)
    mask = np.zeros(rows.shape, dtype=bool)
    hit = rejections > 0
    threshold = ordered[hit, rejections[hit] - 1]
    mask[hit] = rows[hit] <= threshold[:, None]
    return back(mask.reshape(array.shape))


def _route(router: Router, router_logits, null, return_stats: bool):
    array, back = _as_numpy(router_logits, "router_logits")
    dtype, carrier = _dtype(array, router_logits)
    if array.ndim not in (2, 3):
        raise ValueError(f"router_logits: expected (T, E) or (B, S, E), got shape {array.shape}")
    lead, num_experts = array.shape[:-1], array.shape[-1]
    spec = router.spec(num_experts, norm="sum", null=_layer_null(router, null, return_stats))
    native = np.require(array, array.dtype.newbyteorder("="), "CA")
    rows = native.reshape(math.prod(lead), num_experts).view(carrier)
    weights, experts, counts, _, p = _C.route(rows, dtype, spec, get_num_threads(), return_stats)

    selected = experts.astype(np.int64)
    dense = np.zeros((len(rows), num_experts + 1), np.float32)  # the last takes the padding
    np.put_along_axis(dense, selected, weights, axis=1)
    dense = dense[:, :num_experts]
    parts = [
        back(dense.reshape(array.shape), like_input=True),
        back(selected.reshape(*lead, selected.shape[1])),
        back(counts.astype(np.int64).reshape(lead)),
    ]
    if not return_stats:
        return RoutingResult(*parts)
    mask = np.zeros((len(rows), num_experts + 1), bool)
    np.put_along_axis(mask, selected, True, axis=1)
    mask = mask[:, :num_experts]
    return RoutingStats(*parts, back(p.reshape(array.shape)), back(mask.reshape(array.shape)))


def _layer_null(router: Router, null, return_stats: bool):
    """The LayerNull to use, or None for `normal`; warns where that is a fallback."""
    from .null import resolve_layer_null

    return resolve_layer_null(null) if router.wants_null or return_stats else None


def is_tensor(value) -> bool:
    """True for a torch.Tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_numpy(value, argument: str):
    """A NumPy view of a tensor or array, and the way back: array -> the caller's kind.

    bfloat16 comes as its bits, uint16.
    """
    if is_tensor(value):
        torch = sys.modules["torch"]
        if value.device.type != "cpu":
            raise ValueError(f"{argument}: expected a CPU tensor, got one on {value.device}")
        data = value.detach()

        def back(array, like_input=False):
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            return tensor.to(value.dtype) if like_input else tensor

        bits = data.view(torch.uint16) if data.dtype == torch.bfloat16 else data
        return bits.numpy(), back
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return value, lambda array, like_input=False: (
            array.astype(value.dtype) if like_input else array
        )
    raise TypeError(
        f"{argument}: expected a torch.Tensor or numpy.ndarray, got {type(value).__name__}"
    )


def _dtype(array: np.ndarray, original) -> tuple[str, type]:
    """The dtype's name for C and the NumPy type that carries it."""
    name = getattr(original.dtype, "name", str(original.dtype)).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"router_logits: expected float32, float16 or bfloat16, got {name}")
    return name, np.float32 if name == "float32" else np.uint16


def _is_real(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _softmax(z: np.ndarray) -> np.ndarray:
    below = np.zeros_like(z)  # stays 0 at the maximum: inf - inf would be NaN
    np.subtract(z, z.max(), out=below, where=z != z.max())
    weights = np.exp(below)
    return weights / weights.sum()


def _normal_reference(z: np.ndarray) -> np.ndarray:
    from .null import normal_reference

    return normal_reference(z)
