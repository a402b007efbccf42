"""The C extension: routing and experts. Arrays are NumPy, C-contiguous; bf16 and f16 are uint16."""

from typing import Any

from numpy import bool_, float32, float64, int32, int64, uint8, uint16, uint64
from numpy.typing import NDArray

_Bits = NDArray[float32] | NDArray[uint16]
# (form, score, p_table): the layer's table (N,), or one for each expert (E,N)
_Null = tuple[str, str, NDArray[float64] | None]
# (router, parameters, min_k, max_k, temperature, norm, norm_k, null, table[, rule])
_Spec = tuple[Any, ...]  # the rule is moeprof.backends.spec.Rule as a tuple

# what a call is told besides its arrays; read and checked once, immutable
class RouteSpec:
    def __new__(cls, spec: _Spec, dtype: str, num_experts: int, /) -> RouteSpec: ...

class Layer:
    def __new__(
        cls,
        pointers: NDArray[uint64],
        format: str,
        dtype: str,
        hidden_size: int,
        intermediate_size: int,
        activation: tuple[str, float, float, float],
        storage: str,
        /,
    ) -> Layer: ...

# true for as long as dicts hold what they held, have as many entries, and objects are of their type
class Watch:
    def __new__(
        cls,
        places: list[tuple[dict[Any, Any], Any]],
        tables: list[dict[Any, Any]],
        objects: list[Any],
        /,
    ) -> Watch: ...
    def __bool__(self) -> bool: ...

# routing: (routing_weights, expert_ids, counts, rejections), and p
def route(
    logits: _Bits, spec: RouteSpec, threads: int, want_p: bool, /
) -> tuple[
    NDArray[float32], NDArray[int32], NDArray[int32], NDArray[int32], NDArray[float64] | None
]: ...
def choice_logits(logits: _Bits, spec: RouteSpec, /) -> NDArray[float32]: ...
def p_values(logits: NDArray[float32], null: _Null, threads: int = 1, /) -> NDArray[float64]: ...
def step_up(p: NDArray[float64], alpha: float, /) -> NDArray[int64]: ...

# experts
def experts(
    hidden: _Bits,
    expert_ids: NDArray[int32] | NDArray[int64],
    routing_weights: _Bits,
    layer: Layer,
    threads: int,
    /,
) -> _Bits: ...
def moe(
    hidden: _Bits, logits: _Bits, layer: Layer, spec: RouteSpec, threads: int, /
) -> tuple[_Bits, NDArray[float32], NDArray[int32], NDArray[int32], NDArray[int32]]: ...

# linear layers
def dense(
    x: _Bits, weight: int, features: int, bias: int, format: str, dtype: str, threads: int, /
) -> _Bits: ...

# weights in 8 and 4 bits, laid out as csrc/quantized.h says
def encode(w: _Bits, dtype: str, format: str, threads: int, /) -> NDArray[uint8]: ...
def decode(encoded: NDArray[uint8], n: int, k: int, format: str, /) -> NDArray[float32]: ...

# counting
_Places = dict[str, tuple[int, int, int]]

def tally_layout(num_experts: int, pairs: bool, /) -> tuple[_Places, _Places]: ...
def tally(
    counts: NDArray[int64],
    sums: NDArray[float64],
    recency: NDArray[int32],
    expert_ids: NDArray[int32] | NDArray[int64],
    logits: _Bits | None,
    dtype: str,
    real: NDArray[bool_] | None,
    previous: NDArray[int32] | None,
    nanoseconds: int,
    skips: bool,
    /,
) -> int: ...

# the build and the machine
def limit_cpu(name: str | None, /) -> None: ...
def cpu_features() -> list[str]: ...
def variants() -> list[tuple[str, str, bool, bool]]: ...
def routers() -> dict[str, list[str]]: ...
def threads() -> tuple[str, int]: ...
def find_openmp() -> bool: ...
