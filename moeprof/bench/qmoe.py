"""The experts in 8 and 4 bits as onnxruntime runs them, by its operator QMoE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from .contenders import Contender
    from .weights import LayerWeights

GROUP = 32  # columns that share a scale


def qmoe(weights: LayerWeights, top_k: int, bits: int, accuracy_level: int = 0) -> Contender:
    """accuracy_level 4: hidden states in 8 bits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin after a call would take the cores from the next contender.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        _model(weights, top_k, bits, accuracy_level), options, ["CPUExecutionProvider"]
    )

    def call(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        routing = torch.zeros(logits.shape).scatter_(1, idx, w.float()).numpy()
        (out,) = session.run(None, {"x": x.float().numpy(), "routing": routing})
        return torch.from_numpy(out)

    return call


def _model(weights: LayerWeights, top_k: int, bits: int, accuracy_level: int) -> bytes:
    """A graph of the one operator."""
    from onnx import TensorProto, helper, numpy_helper

    gate, up = weights.gate_up.chunk(2, 1)
    matrices = {"gate_up": torch.stack([gate, up], 2).flatten(1, 2), "down": weights.down}
    constants: dict[str, NDArray[np.generic]] = {}
    for name, matrix in matrices.items():
        constants[name], constants[f"{name}_scales"] = _quantized(matrix, bits)
    node = helper.make_node(
        "QMoE",
        # what experts are chosen by, and at the end what they are weighted by
        ["x", "routing", "gate_up", "gate_up_scales", "", "down", "down_scales"]
        + [""] * 7
        + ["routing"],
        ["y"],
        domain="com.microsoft",
        k=top_k,
        expert_weight_bits=bits,
        block_size=GROUP,
        activation_type="swiglu",
        swiglu_fusion=1,  # gate and up in turns
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=0,
        **({"accuracy_level": accuracy_level} if accuracy_level else {}),
    )
    experts, hidden, _ = weights.down.shape
    widths = {"x": hidden, "routing": experts, "y": hidden}
    x, routing, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", width])
        for name, width in widths.items()
    )
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "experts", [x, routing], [y], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _quantized(matrices: Tensor, bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Numbers (E, N, bytes) and scales (E, N, groups) of matrices (E, N, K)."""
    zero = 2 ** (bits - 1)
    numbers, scales = [], []
    for matrix in matrices:
        groups = matrix.float().unflatten(-1, (-1, GROUP))
        scale = groups.abs().amax(-1, keepdim=True) / (zero - 1)
        q = ((groups / scale).round() + zero).to(torch.uint8).flatten(-2)
        numbers.append(q if bits == 8 else q[:, 0::2] | q[:, 1::2] << 4)
        scales.append(scale[..., 0])
    return torch.stack(numbers).numpy(), torch.stack(scales).numpy()
