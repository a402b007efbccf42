"""The linear layers around the experts: for few rows, their weights at memory speed.

In a decode step with the experts in C, torch's own matrix-vector products (the attention's
projections, lm_head) take most of the time; in bfloat16 they read at half the bandwidth. Where
torch has no instructions for a dtype, its products of many rows are slower still.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _C
from ..backends.c import C
from ..backends.ops import unobserved
from ..backends.tables import tensor_obstacle
from .install import run_stock
from .state import STATE, Patched

# Measured against torch 2.13 (AMD Zen 4, 2 threads, K = N = 2048, weights from memory): 1 row
# takes 0.48 of torch's time in bfloat16 and 0.50 in float32, 64 rows 0.86 and 0.64, 256 rows
# 1.03 and 0.84. Beyond 64 rows the weights are no longer what takes the time.
MAX_ROWS = 64

# What tells whether torch has such instructions; not every build of torch can be asked.
SUPPORT = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@cache
def torch_is_slow(dtype: torch.dtype) -> bool:
    """Whether C is faster beyond `MAX_ROWS`, too: at any number of rows.

    So it is where torch multiplies numbers of 16 bits without instructions for them, and the
    kernels have vectors: torch then takes 4 to 6 times as long (AMD Zen 3 with AVX2, torch 2.13).
    """
    ask = getattr(torch.ops.mkldnn, SUPPORT.get(dtype, ""), None)
    return ask is not None and not ask() and "avx2" in _C.cpu_features()


# Likewise, the least weights for which the way into C pays at 1 row: 512 x 512 in float32
# (torch 28 us, ours 25), 128 x 128 in bfloat16 (27, 16).
MIN_WEIGHTS = {torch.float32: 2**18, torch.bfloat16: 2**14, torch.float16: 2**14}


@dataclass(eq=False)
class PatchedLinear(Patched):
    """What a patched linear layer carries: "model.layers.0.self_attn.q_proj"."""


def find_linears(model: nn.Module, blocks: list[nn.Module]) -> list[tuple[str, nn.Linear]]:
    """The (qualified name, layer) of each plain `nn.Linear` that is not part of a MoE block.

    Left out: subclasses (quantised, LoRA), layers with a forward of their own, weights that
    the kernels can't read, and small ones.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) not in inside
        and "forward" not in vars(module)
        and not tensor_obstacle([module.weight])
        and module.weight.numel() >= MIN_WEIGHTS[module.weight.dtype]
    ]


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward of a patched layer, bound to it: in C where that is faster, else as it was."""
    if STATE not in vars(self):  # unpatched since this forward was looked up
        return run_stock(self, input)
    weight, bias = self.weight, self.bias
    if _runs_in_c(input, weight, bias):
        rows = input.reshape(-1, weight.shape[1])
        out = C.linear(rows, weight, bias)
        return out.view(*input.shape[:-1], weight.shape[0])
    return F.linear(input, weight, bias)


def _runs_in_c(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """False also for what torch refuses: it then says so itself."""
    if not isinstance(input, Tensor) or weight.dim() != 2 or not input.dim():
        return False
    tensors = [weight, input] if bias is None else [weight, input, bias]
    features = weight.shape[1]
    return (
        unobserved(*tensors)  # first: a compiler would specialise on what comes after
        and input.shape[-1] == features
        and input.numel() > 0
        and (input.numel() <= MAX_ROWS * features or torch_is_slow(weight.dtype))
        and tensor_obstacle(tensors) is None
        and weight.is_contiguous()
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not torch.is_autocast_enabled("cpu")
    )
