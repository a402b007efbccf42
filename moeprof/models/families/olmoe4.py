"""OLMoE of transformers 4.57: the gate is a Linear, each expert a module of three Linears."""

from torch import Tensor, nn
from transformers.models.olmoe import modeling_olmoe

from ...backends.ops import is_silu
from .base import Adapter, RouterOutput, full_name, hooked

_MLP = modeling_olmoe.OlmoeMLP


def _read_expert(expert: nn.Module, weights: list[Tensor]) -> str | None:
    """Append gate, up and down of an expert to `weights`; or why they can't be read.

    A model has hundreds of these modules, read in every step: so from their dicts, since an
    attribute of a module takes ten times as long.
    """
    if type(expert) is not _MLP:
        return f"an expert of class {full_name(expert)}"
    if reason := hooked(expert):
        return reason
    parts = vars(expert)["_modules"]
    activation = parts.get("act_fn") or expert.act_fn
    if not is_silu(activation):
        return f"activation {activation!r} (SiLU is supported)"
    if isinstance(activation, nn.Module) and (reason := hooked(activation)):
        return reason
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = parts[name]
        own = vars(linear)["_parameters"]
        if type(linear) is not nn.Linear:
            return f"{name} of class {full_name(linear)} where torch's Linear is supported"
        if own.get("bias") is not None:
            return f"{name} with a bias"
        if reason := hooked(linear):
            return reason
        if own.get("weight") is None:
            return "a projection without a weight"
        weights.append(own["weight"])
    return None


def _shape_obstacle(weights: list[Tensor]) -> str | None:
    """Why these gate_0, up_0, down_0, gate_1, ... are not one layer's, or None."""
    if not weights or any(weight.dim() != 2 for weight in weights):
        return "experts of different shapes"
    rows, columns = weights[0].shape
    expected = ((rows, columns), (rows, columns), (columns, rows))
    for number, weight in enumerate(weights):
        if not weight.is_contiguous():
            return "expert weights that are not contiguous"
        if weight.shape != expected[number % 3]:
            return "experts of different shapes"
    return None


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
    def read_experts(cls, block: nn.Module) -> tuple[list[Tensor], str | None]:
        if type(block.experts) is not nn.ModuleList:
            return [], f"experts of class {full_name(block.experts)}"
        if reason := hooked(block.experts):
            return [], reason
        weights: list[Tensor] = []
        for expert in vars(block.experts)["_modules"].values():
            if reason := _read_expert(expert, weights):
                return [], reason
        return weights, _shape_obstacle(weights)

    @classmethod
    def logits(cls, block: nn.Module, x: Tensor) -> Tensor:
        return block.gate(x)

    @classmethod
    def output(cls, hidden: Tensor, router: RouterOutput):
        return hidden, router.logits
