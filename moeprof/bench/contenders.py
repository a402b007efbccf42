"""Implementations of a layer's experts, all on the same weights: functions of a `weights.Call`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe import modeling_olmoe

from ..patching.experts_forward import experts_forward
from ..patching.patch import patch

if TYPE_CHECKING:
    from .settings import Shape
    from .weights import Call, LayerWeights


Contender = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of a `weights.Call`
PACKED = hasattr(modeling_olmoe, "OlmoeExperts")  # transformers 5


def contenders(shape: Shape, weights: LayerWeights, peers: bool) -> dict[str, Contender]:
    """{name: function}, moeprof's last.

    On transformers 5 the experts alone run, on 4.57 the block around them with a gate that
    costs nothing.
    """
    config = OlmoeConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    own = (_packed if PACKED else _listed)(config, weights)
    others = {"zentorch": _zentorch, "vllm": _vllm} if peers else {}
    ours = own.pop("moeprof")
    return own | {name: late(make, weights) for name, make in others.items()} | {"moeprof": ours}


def usable(calls: dict[str, Contender], call: Call) -> tuple[dict[str, Contender], dict[str, str]]:
    """({name: function} of those that run, {name: why not}); moeprof has to."""
    running, missing = {}, {}
    for name, function in calls.items():
        try:
            function(*call)
        except Exception as error:
            if name == "moeprof":
                raise
            missing[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        else:
            running[name] = function
    return running, missing


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


# ---- transformers and moeprof ----


def _packed(config: OlmoeConfig, weights: LayerWeights) -> dict[str, Contender]:
    with torch.device("meta"):
        experts = modeling_olmoe.OlmoeExperts(config)
    experts.gate_up_proj, experts.down_proj = _frozen(weights.gate_up), _frozen(weights.down)

    def transformers(name: str) -> Contender:
        def call(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
            config._experts_implementation = name
            return experts(x, idx, w)

        return call

    return {
        "eager": transformers("eager"),
        "grouped_mm": transformers("grouped_mm"),
        "moeprof": lambda x, logits, idx, w: experts_forward(experts, x, idx, w),
    }


class _Gate(nn.Module):
    """Says what it was told to: logits, or (weights, indices)."""

    def forward(self, hidden_states: Tensor) -> Any:
        return self.answer


def _listed(config: OlmoeConfig, weights: LayerWeights) -> dict[str, Contender]:
    stock, patched = _block(config, weights), _block(config, weights)
    patch(patched)

    def eager(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        stock.gate.answer = logits
        return stock(x[None])[0][0]

    def ours(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        patched.gate.answer = w, idx
        return patched(x[None])[0][0]

    return {"eager": eager, "moeprof": ours}


def _block(config: OlmoeConfig, weights: LayerWeights) -> Any:
    """The block of transformers 4.57 on the packed weights."""
    with torch.device("meta"):
        block: Any = modeling_olmoe.OlmoeSparseMoeBlock(config)
    for number, expert in enumerate(block.experts):
        matrices = map(_frozen, weights.matrices(number))
        expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight = matrices
    block.gate = _Gate()
    return block.eval()


# ---- others, made at their first call, which may fail ----


def late(make: Callable[[LayerWeights], Contender], weights: LayerWeights) -> Contender:
    made: list[Contender] = []

    def call(*arguments: Tensor) -> Tensor:
        if not made:
            made.append(make(weights))
        return made[0](*arguments)

    return call


def _zentorch(weights: LayerWeights) -> Contender:
    import zentorch  # noqa: F401, takes half a minute

    def call(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops.zentorch.zentorch_fused_moe(
            out, x, weights.gate_up, weights.down, None, None, w.float(), idx.int(), False, "silu"
        )
        return out

    return call


def _vllm(weights: LayerWeights) -> Contender:
    """It repacks all weights into a copy."""
    library = os.environ.get("VLLM_SO")
    if not library:
        raise ValueError("VLLM_SO does not name its library")
    if weights.down.dtype != torch.bfloat16:
        raise ValueError("it runs bfloat16 only")
    torch.ops.load_library(library)
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    w13, w2 = torch.empty_like(weights.gate_up), torch.empty_like(weights.down)
    torch.ops._C.prepack_moe_weight(weights.gate_up, w13, isa)
    torch.ops._C.prepack_moe_weight(weights.down, w2, isa)

    def call(x: Tensor, logits: Tensor, idx: Tensor, w: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(
            out, x, w13, w2, None, None, w.float(), idx.int(), False, "silu", isa
        )
        return out

    return call
