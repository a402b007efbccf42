"""OLMoE of transformers 4.57: the gate is a Linear, each expert a module of three Linears."""

from torch import Tensor, nn
from transformers.models.olmoe import modeling_olmoe

from ..experts import is_silu
from .base import Adapter, RouterOutput

_MLP = modeling_olmoe.OlmoeMLP


class Olmoe4(Adapter):
    # transformers 5 has the same class name with another inside.
    block_class = (
        None if hasattr(modeling_olmoe, "OlmoeExperts") else modeling_olmoe.OlmoeSparseMoeBlock
    )
    gate_class = nn.Linear

    @classmethod
    def num_experts(cls, block: nn.Module) -> int:
        return len(block.experts)

    @classmethod
    def settings(cls, block: nn.Module) -> tuple[int, bool]:
        return block.top_k, block.norm_topk_prob

    @classmethod
    def weights(cls, block: nn.Module) -> list[Tensor]:
        return [
            linear.weight
            for expert in block.experts
            for linear in (expert.gate_proj, expert.up_proj, expert.down_proj)
        ]

    @classmethod
    def layout_obstacle(cls, block: nn.Module) -> str | None:
        if type(block.experts) is not nn.ModuleList:
            return f"experts of class {type(block.experts).__name__}"
        shape = block.experts[0].gate_proj.weight.shape
        for expert in block.experts:
            if type(expert) is not _MLP:
                return f"an expert of class {type(expert).__name__}"
            if not is_silu(expert.act_fn):
                return f"activation {expert.act_fn!r} (SiLU is supported)"
            for linear in (expert.gate_proj, expert.up_proj, expert.down_proj):
                if type(linear) is not nn.Linear or linear.bias is not None:
                    return f"a projection of class {type(linear).__name__} or with a bias"
                if not linear.weight.is_contiguous():
                    return "expert weights that are not contiguous"
            if not (
                expert.gate_proj.weight.shape == expert.up_proj.weight.shape == shape
                and expert.down_proj.weight.shape == (shape[1], shape[0])
            ):
                return "experts of different shapes"
        return None

    @classmethod
    def logits(cls, block: nn.Module, x: Tensor) -> Tensor:
        return block.gate(x)

    @classmethod
    def output(cls, hidden: Tensor, router: RouterOutput):
        return hidden, router.logits
