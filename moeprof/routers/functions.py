"""The function form of the routers: logits in, routing out, torch or NumPy."""

import math
import sys
from collections.abc import Callable
from inspect import Signature, signature
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import _C
from ..backends.cpu import get_num_threads
from .base import REGISTRY, UNIT, Router, check, parameters_of, warn_if_capped
from .evidence import BH
from .logits import TopK
from .table import indented, lines_of

if TYPE_CHECKING:
    import os

    from ..null import LayerNull, TokenNull
    from ..null.resolve import AnyNull
    from ..null.scores import Logits


class RoutingResult(NamedTuple):
    """What a routing function returns. T tokens (or B, S), E experts.

    routing_weights : (T, E), dtype of the logits; zero where not selected; rows sum to 1, but for
        norm="none"
    selected_experts : (T, max_k) int64, best first, padded with -1
    expert_counts : (T,) int64, the experts of each token
    """

    routing_weights: Any
    selected_experts: Any
    expert_counts: Any


class RoutingStats(NamedTuple):
    """A RoutingResult with what led to it.

    p_values : (T, E) float64
    mask : (T, E) bool, the experts that are selected
    """

    routing_weights: Any
    selected_experts: Any
    expert_counts: Any
    p_values: Any
    mask: Any


def benjamini_hochberg_routing(
    router_logits: "Logits",
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int | None = None,
    *,
    null: "AnyNull | str | os.PathLike[str] | None" = None,
    return_stats: bool = False,
    norm: str = "sum",
) -> RoutingResult | RoutingStats:
    """Route each token to the experts whose router score stands out from the null.

    Parameters
    ----------
    router_logits : torch.Tensor or numpy.ndarray, (T, E) or (B, S, E)
        float32, float16, or bfloat16 (torch); any strides, on the CPU. No gradient flows.
    alpha : float
        In (0, 1); see :class:`BH`.
    temperature : float
        Above 0. The logits are divided by it before the softmax that gives the weights.
    min_k : int
        The fewest experts of a token, at least 1.
    max_k : int or None
        The most. None is min(16, E), with a warning where that cuts more than 1 % of the tokens.
    null : LayerNull, Null of one layer, or None
        `Null.layer` gives a LayerNull. None is the null "normal", each token's own median and
        spread, with a warning.
    return_stats : bool
        Also return the p-values and the mask of the selected experts.
    norm : {"sum", "none"}
        "sum" scales a token's weights to sum to 1; "none" leaves them as the softmax over all
        experts has them. In a function for `patch` it has to be what the model does (its
        config's ``norm_topk_prob``), as `patch` changes no weights of such a function.

    Returns
    -------
    RoutingResult or RoutingStats
        A named tuple: routing_weights (T, E), 0 where not selected, else as `norm` says;
        selected_experts (T, max_k), best first, -1 for no expert; expert_counts (T,). With
        return_stats also p_values (T, E) and mask (T, E), True for selected. Tensors for a
        tensor, arrays for an array.

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
    return _route(router, router_logits, null, return_stats, norm)


def topk_routing(
    router_logits: "Logits",
    k: int = 8,
    temperature: float = 1.0,
    *,
    null: "AnyNull | str | os.PathLike[str] | None" = None,
    return_stats: bool = False,
    norm: str = "sum",
) -> RoutingResult | RoutingStats:
    """Route each token to its k highest logits; see :func:`benjamini_hochberg_routing`.

    k is an integer from 1 to E, temperature > 0 acts on the weights only. The null only matters
    to the p-values of ``return_stats``.
    """
    return _route(TopK(k, temperature=temperature), router_logits, null, return_stats, norm)


def routing_function(cls: type[Router]) -> Callable[..., RoutingResult | RoutingStats]:
    """The function form of a router, ``moeprof.<name>_routing``."""

    def function(
        router_logits: "Logits",
        *args: Any,
        null: "AnyNull | str | os.PathLike[str] | None" = None,
        return_stats: bool = False,
        norm: str = "sum",
        **parameters: Any,
    ) -> RoutingResult | RoutingStats:
        return _route(cls(*args, **parameters), router_logits, null, return_stats, norm)

    function.__name__ = function.__qualname__ = f"{cls.name}_routing"
    function.__doc__ = (
        f"Route each token as :class:`{cls.__name__}` does, with its parameters; logits, null, "
        "return_stats,\nnorm, result and errors as for :func:`benjamini_hochberg_routing`.\n\n"
        f"Defaults and ranges, E experts:\n\n{indented(lines_of(cls))}"
    )
    logits, *shared = (
        signature(benjamini_hochberg_routing).parameters[name]
        for name in ("router_logits", "null", "return_stats", "norm")
    )
    known = {f.name for f in parameters_of(cls)}
    own = [p for p in signature(cls).parameters.values() if p.name in known]
    signed = Signature([logits, *own, *shared])
    function.__signature__ = signed  # type: ignore[attr-defined]  # of a function
    return function


def benjamini_hochberg(p: Any, alpha: float) -> Any:
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
    check("alpha", alpha, UNIT)
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


def _route(
    router: Router,
    router_logits: "Logits",
    null: "AnyNull | str | os.PathLike[str] | None",
    return_stats: bool,
    norm: str,
) -> RoutingResult | RoutingStats:
    array, back = _as_numpy(router_logits, "router_logits")
    dtype, carrier = _dtype(array, router_logits)
    if array.ndim not in (2, 3):
        raise ValueError(f"router_logits: expected (T, E) or (B, S, E), got shape {array.shape}")
    if norm not in ("sum", "none"):
        raise ValueError(f"norm: expected 'sum' or 'none', got {norm!r}")
    lead, num_experts = array.shape[:-1], array.shape[-1]
    spec = router.spec(num_experts, norm=norm, null=_layer_null(router, null, return_stats))
    native = np.require(array, array.dtype.newbyteorder("="), ["C", "A"])
    rows: Any = native.reshape(math.prod(lead), num_experts).view(carrier)
    weights, experts, counts, found, p = _C.route(
        rows, spec.in_c(dtype), get_num_threads(), return_stats
    )
    if cap := router.silent_cap(num_experts):
        warn_if_capped(int((found > cap).sum()), len(found), num_experts, stacklevel=4)

    selected = experts.astype(np.int64)
    dense = np.zeros((len(rows), num_experts + 1), np.float32)  # the last takes the padding
    np.put_along_axis(dense, selected, weights, axis=1)
    dense = dense[:, :num_experts]
    parts = (
        back(dense.reshape(array.shape), like_input=True),
        back(selected.reshape(*lead, selected.shape[1])),
        back(counts.astype(np.int64).reshape(lead)),
    )
    if p is None:  # not wanted
        return RoutingResult(*parts)
    mask = np.zeros((len(rows), num_experts + 1), bool)
    np.put_along_axis(mask, selected, True, axis=1)
    mask = mask[:, :num_experts]
    return RoutingStats(*parts, back(p.reshape(array.shape)), back(mask.reshape(array.shape)))


def _layer_null(
    router: Router, null: "AnyNull | str | os.PathLike[str] | None", return_stats: bool
) -> "LayerNull | TokenNull | None":
    """The null to use; warns where that is a fallback, at the line of the function's caller."""
    from ..null import resolve_layer_null, resolve_null

    if not (router.wants_null or return_stats):
        return None
    return resolve_layer_null(router.adapt(resolve_null(null, stacklevel=5)))


def is_tensor(value: Any) -> bool:
    """True for a torch.Tensor; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _as_numpy(value: Any, argument: str) -> tuple[np.ndarray, Callable[..., Any]]:
    """A NumPy view of a tensor or array, and the way back: array -> the caller's kind.

    bfloat16 comes as its bits, uint16.
    """
    if is_tensor(value):
        torch = sys.modules["torch"]
        if value.device.type != "cpu":
            raise ValueError(f"{argument}: expected a CPU tensor, got one on {value.device}")
        if value.layout is not torch.strided:
            raise TypeError(f"{argument}: expected a dense tensor, got one of {value.layout}")
        data = value.detach().resolve_conj().resolve_neg()

        def back(array: np.ndarray, like_input: bool = False) -> Any:
            tensor = torch.from_numpy(np.ascontiguousarray(array))
            return tensor.to(value.dtype) if like_input else tensor

        bits = data.view(torch.uint16) if data.dtype == torch.bfloat16 else data
        return bits.numpy(), back
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return (
            value,
            lambda array, like_input=False: array.astype(value.dtype) if like_input else array,
        )
    raise TypeError(
        f"{argument}: expected a torch.Tensor or numpy.ndarray, got {type(value).__name__}"
    )


def _dtype(array: np.ndarray, original: Any) -> tuple[str, type[np.float32] | type[np.uint16]]:
    """The dtype's name for C and the NumPy type that carries it."""
    name = getattr(original.dtype, "name", str(original.dtype)).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise TypeError(f"router_logits: expected float32, float16 or bfloat16, got {name}")
    return name, np.float32 if name == "float32" else np.uint16


# topk_routing has positions of its own for its arguments.
FUNCTIONS = {
    f"{name}_routing": routing_function(cls) for name, cls in REGISTRY.items() if name != "topk"
} | {"benjamini_hochberg_routing": benjamini_hochberg_routing, "topk_routing": topk_routing}
