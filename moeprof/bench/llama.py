"""The experts in the formats of llama.cpp as it runs them: a graph for ggml, its library.

ggml is the one that llama-cpp-python brings; what is called here is of its public headers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from ctypes import c_bool, c_int, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .contenders import Contender
    from .weights import LayerWeights

F32, Q4_0, Q8_0, I32 = 0, 2, 8, 26  # enum ggml_type
NODES = 256  # of a graph at most

_TYPES = {"p": c_void_p, "i": c_int, "l": c_int64, "b": c_bool, "v": None}
_SIGNATURES = {  # result, arguments
    "ggml_add": "pppp",
    "ggml_backend_alloc_ctx_tensors": "ppp",
    "ggml_backend_alloc_ctx_tensors_from_buft": "ppp",
    "ggml_backend_buffer_free": "vp",
    "ggml_backend_cpu_buffer_type": "p",
    "ggml_backend_cpu_init": "p",
    "ggml_backend_cpu_reg": "p",
    "ggml_backend_cpu_set_n_threads": "vpi",
    "ggml_backend_dev_supports_op": "bpp",
    "ggml_backend_get_device": "pp",
    "ggml_backend_graph_compute": "ipp",
    "ggml_backend_tensor_get": "vppll",
    "ggml_backend_tensor_set": "vppll",
    "ggml_build_forward_expand": "vpp",
    "ggml_free": "vp",
    "ggml_graph_overhead": "l",
    "ggml_log_set": "vpp",
    "ggml_mul": "pppp",
    "ggml_mul_mat_id": "ppppp",
    "ggml_new_graph": "pp",
    "ggml_new_tensor_3d": "ppilll",
    "ggml_quantize_chunk": "lipplllp",
    "ggml_row_size": "lil",
    "ggml_swiglu_split": "pppp",
    "ggml_tensor_overhead": "l",
    "ggml_view_2d": "pppllll",
}
_silent = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)(lambda *_: None)


class _Parameters(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


@cache
def _ggml() -> Any:
    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'llama_cpp'")
    name = "libggml.dylib" if sys.platform == "darwin" else "libggml.so"
    library = ctypes.CDLL(str(Path(found.origin).parent / "lib" / name))
    for name, signature in _SIGNATURES.items():
        function, (result, *arguments) = getattr(library, name), [_TYPES[c] for c in signature]
        function.restype, function.argtypes = result, arguments
    library.ggml_init.restype, library.ggml_init.argtypes = c_void_p, [_Parameters]
    proc = library.ggml_backend_reg_get_proc_address
    proc.restype, proc.argtypes = c_void_p, [c_void_p, ctypes.c_char_p]
    library.ggml_log_set(ctypes.cast(_silent, c_void_p), None)
    return library


def _context() -> Any:
    """Of tensors whose memory is allocated afterwards."""
    size = NODES * _ggml().ggml_tensor_overhead() + _ggml().ggml_graph_overhead()
    return _ggml().ggml_init(_Parameters(size, None, True))


class _Graph(NamedTuple):
    """Of a call of so many tokens: its tensors, and the products in it."""

    x: Any
    ids: Any
    weights: Any
    out: Any
    graph: Any
    products: list[Any]


def _graph(backend: Any, matrices: list[Any], shape: tuple[int, int], tokens: int) -> _Graph:
    """matrices: gate, up, down; shape: hidden size, experts a token."""
    ggml, context, (hidden, top_k) = _ggml(), _context(), shape
    x = ggml.ggml_new_tensor_3d(context, F32, hidden, 1, tokens)
    ids = ggml.ggml_new_tensor_3d(context, I32, top_k, tokens, 1)
    weights = ggml.ggml_new_tensor_3d(context, F32, 1, top_k, tokens)
    gate, up = (ggml.ggml_mul_mat_id(context, matrix, x, ids) for matrix in matrices[:2])
    act = ggml.ggml_swiglu_split(context, gate, up)
    down = ggml.ggml_mul_mat_id(context, matrices[2], act, ids)
    weighted = ggml.ggml_mul(context, down, weights)
    row = 4 * hidden
    parts = [
        ggml.ggml_view_2d(context, weighted, hidden, tokens, top_k * row, slot * row)
        for slot in range(top_k)
    ]
    out = parts[0]
    for part in parts[1:]:
        out = ggml.ggml_add(context, out, part)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, out)
    ggml.ggml_backend_alloc_ctx_tensors(context, backend)
    return _Graph(x, ids, weights, out, graph, [gate, up, down])


def _buffer_types(device: Any) -> Iterator[Any]:
    """Those that lay weights out for this CPU's instructions, then the plain one."""
    ggml = _ggml()
    name = b"ggml_backend_dev_get_extra_bufts"
    address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_cpu_reg(), name)
    if address:
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        number = 0
        while extra and extra[number]:
            yield extra[number]
            number += 1
    yield ggml.ggml_backend_cpu_buffer_type()


def _matrices(backend: Any, weights: LayerWeights, kind: int) -> list[Any]:
    """gate, up and down of all experts, in the first layout that the CPU multiplies."""
    ggml = _ggml()
    gate, up = weights.gate_up.chunk(2, 1)
    device = ggml.ggml_backend_get_device(backend)
    for buffer_type in _buffer_types(device):
        context = _context()
        made = [
            ggml.ggml_new_tensor_3d(context, kind, k, n, experts)
            for experts, n, k in (gate.shape, up.shape, weights.down.shape)
        ]
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        products = _graph(backend, made, (gate.shape[2], 1), 1).products
        if all(ggml.ggml_backend_dev_supports_op(device, product) for product in products):
            break
        ggml.ggml_backend_buffer_free(buffer)
        ggml.ggml_free(context)
    for tensor, matrix in zip(made, (gate, up, weights.down), strict=True):
        q = quantized_rows(matrix, kind)
        ggml.ggml_backend_tensor_set(tensor, q.data_ptr(), 0, q.nbytes)
    return made


def quantized_rows(matrices: Tensor, kind: int) -> Tensor:
    """The rows of (..., N, K) in bytes, (..., N, bytes of a row)."""
    ggml, (*many, n, k) = _ggml(), matrices.shape
    q = torch.empty(*many, n, ggml.ggml_row_size(kind, k), dtype=torch.uint8)
    for matrix, to in zip(matrices.view(-1, n, k), q.view(-1, *q.shape[-2:]), strict=True):
        wide = matrix.float().contiguous()
        ggml.ggml_quantize_chunk(kind, wide.data_ptr(), to.data_ptr(), 0, n, k, None)
    return q


def llama(weights: LayerWeights, top_k: int, kind: int) -> Contender:
    """kind: Q8_0 or Q4_0."""
    ggml = _ggml()
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    matrices, shape = _matrices(backend, weights, kind), (weights.down.shape[1], top_k)

    @cache
    def graph_of(tokens: int) -> _Graph:
        return _graph(backend, matrices, shape, tokens)

    def call(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        graph, out = graph_of(len(x)), torch.empty(x.shape)
        inputs = {graph.x: x.float(), graph.ids: idx.int(), graph.weights: w.float()}
        for tensor, value in inputs.items():
            ggml.ggml_backend_tensor_set(tensor, value.data_ptr(), 0, value.nbytes)
        if ggml.ggml_backend_graph_compute(backend, graph.graph):
            raise RuntimeError("ggml could not compute the graph")
        ggml.ggml_backend_tensor_get(graph.out, out.data_ptr(), 0, out.nbytes)
        return out

    return call
