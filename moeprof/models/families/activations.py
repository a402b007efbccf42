"""What experts compute between their matrices, read from their modules."""

from collections.abc import Callable
from itertools import product
from math import inf, isfinite
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends.tables import INTERLEAVED, ROWS, SWIGLU, Activation, Storage
from ..guards import full_name

GELU_TANH = Activation("gelu_tanh")

# By the names of their classes, of torch.nn and of transformers.activations.
_CLASSES = {
    "SiLU": SWIGLU,
    "SiLUActivation": SWIGLU,
    "QuickGELUActivation": Activation("silu", 1.702),
    "GELUActivation": Activation("gelu"),
    "GELUTanh": GELU_TANH,
    "PytorchGELUTanh": GELU_TANH,
    "NewGELUActivation": GELU_TANH,
    "FastGELUActivation": GELU_TANH,
    "AccurateGELUActivation": GELU_TANH,
    "ReLU": Activation("relu"),
    "ReLUSquaredActivation": Activation("relu2"),
}
_FUNCTIONS: tuple[tuple[object, Activation], ...] = (
    (F.silu, SWIGLU),
    (F.gelu, Activation("gelu")),
    (F.relu, Activation("relu")),
    (torch.relu, Activation("relu")),
)
_SUPPORTED = "SiLU, GELU, GELU by tanh, ReLU and squared ReLU are supported"

# Where a class of experts with a gating of its own keeps its numbers.
LIMITS, ALPHAS = ("limit", "swiglu_limit"), ("alpha", "swiglu_alpha")
# Attributes, of experts or their act_fn, that an activation was read from.
READ = ("act_fn", "approximate", "_apply_gate", *LIMITS, *ALPHAS)


def read_function(act_fn: object) -> tuple[Activation, str | None]:
    """(this function, of a gate and times up, None), or (`SWIGLU`, why not)."""
    kind = type(act_fn)
    found = None
    if kind is nn.GELU:
        found = GELU_TANH if act_fn.approximate == "tanh" else Activation("gelu")  # type: ignore[attr-defined]  # torch's
    elif kind.__module__.startswith(("torch.nn.", "transformers.activations")):
        found = _CLASSES.get(kind.__name__)
    elif not isinstance(act_fn, nn.Module):
        found = next((a for function, a in _FUNCTIONS if function is act_fn), None)
    if found is None:
        name = full_name(act_fn) if isinstance(act_fn, nn.Module) else repr(act_fn)
        return SWIGLU, f"activation {name}: {_SUPPORTED}"
    return found, None


def read_activation(
    experts: nn.Module, gated: bool, storage: Storage = ROWS
) -> tuple[Activation, str | None]:
    """(what packed experts of transformers 5 compute, None), or (`SWIGLU`, why not)."""
    own = vars(experts)
    act_fn = own["_modules"].get("act_fn") or getattr(experts, "act_fn", None)
    if not gated:
        activation, reason = read_function(act_fn)
        return activation._replace(gated=False), reason
    gate = own.get("_apply_gate") or getattr(type(experts), "_apply_gate", None)
    by_turns = storage == INTERLEAVED
    # transformers' default takes gate and up for halves.
    if gate is None or (gate.__name__ == "_default_apply_gate" and not by_turns):
        return read_function(act_fn)
    function, reason = (SWIGLU, None) if act_fn is None else read_function(act_fn)
    found = None if reason else _recognised(experts, function, by_turns)
    if found is None:
        return SWIGLU, reason or "a gating of its own (_apply_gate)"
    return found, None


def read_clamped(experts: nn.Module) -> tuple[Activation, str | None]:
    """(the clamped SwiGLU of GPT-OSS in transformers 4, by its `alpha` and `limit`, None), or
    (`SWIGLU`, why not)."""
    numbers: list[Any] = [experts.alpha, experts.limit]
    if not all(type(number) in (int, float) and number > 0 for number in numbers):
        return SWIGLU, "alpha {} and limit {} where positive numbers are supported".format(*numbers)
    alpha, limit = map(float, numbers)
    return Activation("silu", alpha, limit, shift=1.0), None


# ---- a gating of the class's own: recognised by what it computes ----


# The parameters that take no part in it.
_PROJECTIONS = {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}


class _Seen(NamedTuple):
    numbers: dict[str, Any]  # the attributes that are plain numbers and texts
    function: Activation  # of its act_fn
    by_turns: bool  # it takes gate and up from the even and the odd columns, not from halves
    found: Activation | None


_PLAIN = (bool, int, float, str)
_seen: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch's
def _recognised(experts: nn.Module, function: Activation, by_turns: bool) -> Activation | None:
    """The activation that the experts' own `_apply_gate` is, or None.

    What was found is kept as long as no attribute changes: this runs in every step.
    """
    numbers = {n: v for n, v in vars(experts).items() if v is None or type(v) in _PLAIN}
    seen = _seen.get(experts)
    if seen is None or seen[:3] != (numbers, function, by_turns):
        found = _find(experts, function, by_turns, numbers)
        seen = _seen[experts] = _Seen(numbers, function, by_turns, found)
    return seen.found


def _find(
    experts: nn.Module, function: Activation, by_turns: bool, own: dict[str, Any]
) -> Activation | None:
    if {*experts._parameters, *experts._buffers} - _PROJECTIONS:
        return None  # it may use what else it has
    limits = [float(own[n]) for n in LIMITS if type(own.get(n)) in (int, float) and own[n] > 0]
    alphas = [float(own[n]) for n in ALPHAS if type(own.get(n)) in (int, float) and own[n] > 0]
    g, u = _grid(filter(isfinite, limits))
    got = _called(experts, (torch.stack([g, u], 1) if by_turns else torch.cat([g, u])).view(1, -1))
    if got is None or got.shape != (1, len(g)):
        return None
    alphas = [function.alpha, *(alphas if function.name == "silu" else ())]
    for alpha, limit, shift in product(alphas, [inf, *limits], [0.0, 1.0]):
        candidate = function._replace(alpha=alpha, limit=limit, shift=shift)
        expected = _compute(candidate, g.double(), u.double())
        if torch.allclose(got[0].double(), expected, rtol=1e-5, atol=1e-5):
            return candidate
    return None


def _grid(limits: Any) -> tuple[Tensor, Tensor]:
    """float32 gates and ups, each with each: around 0, and on both sides of the limits."""
    inner = torch.linspace(-6, 6, 25)
    outer = [limit * factor for limit in limits for factor in (-3, -1.1, -0.9, 0.9, 1.1, 3)]
    points = torch.cat([inner, torch.tensor(outer)])
    return tuple(torch.cartesian_prod(points, points).unbind(1))  # type: ignore[return-value]  # two


def _called(experts: Any, gate_up: Tensor) -> Tensor | None:
    """What `_apply_gate` gives of it, or None if that is no float32."""
    try:
        with torch.no_grad():
            got = experts._apply_gate(gate_up)
    except Exception:  # of a class that is not known here, whatever it needs
        return None
    return got if isinstance(got, Tensor) and got.dtype == torch.float32 else None


_COMPUTED: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda x, alpha: x * torch.sigmoid(alpha * x),
    "gelu": lambda x, alpha: F.gelu(x),
    "gelu_tanh": lambda x, alpha: F.gelu(x, approximate="tanh"),
    "relu": lambda x, alpha: F.relu(x),
    "relu2": lambda x, alpha: F.relu(x) ** 2,
}


def _compute(a: Activation, g: Tensor, u: Tensor) -> Tensor:
    """A gated activation by its formula."""
    up = u.clamp(-a.limit, a.limit) + a.shift
    return _COMPUTED[a.name](g.clamp(max=a.limit), a.alpha) * up
