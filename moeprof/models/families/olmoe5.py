"""OLMoE of transformers 5: a router module, and the experts in two 3-D tensors."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.olmoe import modeling_olmoe

from ...backends.ops import read_packed
from .base import Adapter, RouterOutput, full_name, hooked


def _gate_forward(self, hidden_states, *, logits_only: bool = False):
    """The router's forward while its block is patched; bound to the router.

    The block asks for logits only: no top-k runs, and the recorder of router logits, a hook
    on the router, still sees them. For everyone else it is the stock router.
    """
    if not logits_only:
        return type(self).forward(self, hidden_states)
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    return logits, None, None


class Olmoe5(Adapter):
    gate_class = getattr(modeling_olmoe, "OlmoeTopKRouter", nn.Module)
    experts_class = getattr(modeling_olmoe, "OlmoeExperts", None)
    block_class = modeling_olmoe.OlmoeSparseMoeBlock if experts_class else None
    gate_forward = staticmethod(_gate_forward)

    @classmethod
    def num_experts(cls, block: nn.Module) -> int:
        return len(block.experts.down_proj)

    @classmethod
    def settings(cls, block: nn.Module) -> tuple[int, bool]:
        if cls.has_stock_gate(block):
            return block.gate.top_k, block.gate.norm_topk_prob
        config = block.experts.config  # a user's router: what the model was made with
        return config.num_experts_per_tok, config.norm_topk_prob

    @classmethod
    def read_experts(cls, block: nn.Module) -> tuple[list[Tensor], str | None]:
        experts = block.experts
        if type(experts) is not cls.experts_class:
            return [], f"experts of class {full_name(experts)}"
        for module in experts.modules():
            if reason := hooked(module):
                return [], reason
        return read_packed(experts)

    @classmethod
    def logits(cls, block: nn.Module, x: Tensor) -> Tensor:
        try:
            return block.gate(x, logits_only=True)[0]
        except TypeError as error:
            # Another thread has unpatched the model since this forward began, and the stock
            # router has no such argument. Its logits are the same.
            if "logits_only" not in str(error):
                raise
        return block.gate(x)[0]

    @classmethod
    def output(cls, hidden: Tensor, router: RouterOutput):
        return hidden
