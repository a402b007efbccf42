"""Small OLMoE models with random weights for the tests, and plain ways to look into them.

E experts, k of them a token, H hidden and I intermediate size, T tokens.
"""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import moeprof

V5 = int(transformers.__version__.split(".")[0]) >= 5

ONE = moeprof.TopK(1)  # differs visibly from the own top-2 of `olmoe`
LAYER_1 = r"model\.layers\.1\.mlp"  # its second layer, as a pattern for messages


def olmoe_config(**changes) -> OlmoeConfig:
    """Two layers of 8 experts, top-2; weights large enough for the experts to matter."""
    settings = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        initializer_range=0.2,
        max_position_embeddings=128,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=0,
    )
    return OlmoeConfig(**{**settings, **changes})


def olmoe(seed: int = 0, **changes) -> OlmoeForCausalLM:
    torch.manual_seed(seed)
    return OlmoeForCausalLM(olmoe_config(**changes)).eval()


def eager_olmoe() -> OlmoeForCausalLM:
    """With the experts of transformers, and after a call: transformers 5 installs its recorder."""
    model = olmoe()
    if V5:
        model.set_experts_implementation("eager")
    model(token_ids(), output_router_logits=True)
    return model


def llama(vocab_size: int = 64, **settings) -> LlamaForCausalLM:
    """A model without experts."""
    sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes, **settings))


def token_ids(rows: int = 2, columns: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module) -> torch.Tensor:
    return model(token_ids()).logits


def generate(model: nn.Module, ids: torch.Tensor, new: int, **options):
    """What transformers' generate returns for so many new tokens of each row, greedily."""
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        **options,
    )


def moe_block(shape=(8, 2, 32, 16), *, norm=False, seed=0, dtype=torch.float32) -> nn.ModuleDict:
    """A model that is one block, "mlp", of shape (E, k, H, I); stock experts run eagerly."""
    num_experts, k, hidden, intermediate = shape
    config = olmoe_config(
        num_experts=num_experts,
        num_experts_per_tok=k,
        hidden_size=hidden,
        intermediate_size=intermediate,
        norm_topk_prob=norm,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    block = OlmoeSparseMoeBlock(config).eval().requires_grad_(False)
    for parameter in block.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return nn.ModuleDict({"mlp": block}).to(dtype)


def random_hidden(batch: int, length: int, hidden: int, dtype=torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * batch + length)
    return torch.randn(batch, length, hidden, generator=generator).to(dtype)


def run(block, x) -> torch.Tensor:
    """The hidden states that a block returns; on 4.57 beside the router logits."""
    output = block(x)
    return output[0] if isinstance(output, tuple) else output


def blocks(model) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


# ---- weights ----


def expert_weights(block, expert: int) -> list[torch.Tensor]:
    """The weights of one expert, to be changed in place."""
    experts = block.experts
    if V5:
        return [experts.gate_up_proj.data[expert], experts.down_proj.data[expert]]
    return [parameter.data for parameter in experts[expert].parameters()]


def expert_matrices(block) -> list[torch.Tensor]:
    """Gate and up (E, I, H), down (E, H, I), as float64."""
    if V5:
        gate, up = block.experts.gate_up_proj.detach().double().chunk(2, dim=1)
        return [gate, up, block.experts.down_proj.detach().double()]
    names = ("gate_proj", "up_proj", "down_proj")
    return [
        torch.stack([getattr(e, n).weight.detach() for e in block.experts]).double() for n in names
    ]


def reference_experts(block, x, experts, weights) -> torch.Tensor:
    """sum_e w_e down_e(silu(gate_e x) * up_e x) in float64 for x (T, H); -1 is no expert."""
    gate, up, down = expert_matrices(block)
    x, weights, out = x.double(), weights.double(), torch.zeros(x.shape, dtype=torch.float64)
    for e in [e for e in experts.unique().tolist() if e >= 0]:
        token, slot = (experts == e).nonzero(as_tuple=True)
        y = (F.silu(x[token] @ gate[e].T) * (x[token] @ up[e].T)) @ down[e].T
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


# ---- routing ----


def gate_logits(block, x) -> torch.Tensor:
    """What the gate says of x (T, H), patched or not."""
    output = block.gate(x)
    return output[0] if isinstance(output, tuple) else output


def stock_routing(block, x, k: int, norm: bool):
    """(weights, experts) as the stock block computes them, in its dtype."""
    if V5:
        return block.gate(x)[1:]
    weights, experts = F.softmax(block.gate(x), dim=1, dtype=torch.float).topk(k)
    if norm:
        weights /= weights.sum(dim=-1, keepdim=True)
    return weights.to(x.dtype), experts


def gap(values, k: int) -> torch.Tensor:
    """How far the k-th largest lies above the next one, in each row; inf if there is none."""
    if k >= values.shape[-1]:
        return torch.full(values.shape[:-1], torch.inf)
    top = values.float().topk(k + 1).values
    return top[..., k - 1] - top[..., k]


def relative(ours, reference) -> float:
    """||ours - reference|| / ||reference||; zeros in place of ours give 1."""
    reference = reference.double()
    return float((ours.double() - reference).norm() / reference.norm())


# ---- nulls ----


def fit_null(model):
    """A null fitted to random text, by a tokenizer of characters."""
    ids = [{"input_ids": row.tolist()} for row in token_ids(3, 40)]
    with pytest.warns(UserWarning, match="null was fitted to 117 tokens"):
        return moeprof.fit_null(
            model, lambda text, **_: ids[int(text)], list("012"), progress=False
        )


# ---- what patching may not leave behind ----


def snapshot(model) -> dict[str, dict]:
    """dict(vars(m)) of each module, with a copy of every dict in it: parameters, hooks."""
    return {
        name: {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for name, module in model.named_modules()
    }


def assert_unchanged(model, before: dict[str, dict]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    changed = [
        f"{name or 'model'}.{attribute}"
        for name, attributes in before.items()
        for attribute in attributes.keys() | after[name].keys()
        if not _same(attributes.get(attribute, _MISSING), after[name].get(attribute, _MISSING))
    ]
    assert not changed, changed


_MISSING = object()


def _same(a, b) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return a is b or (isinstance(a, int | float | str) and a == b)


# ---- routers of users ----


class Middleware(nn.Module):
    """A user's module around the stock gate: `change` makes its output from logits (T, E)."""

    def __init__(self, gate, change):
        super().__init__()
        self.inner, self.change = gate, change

    def forward(self, hidden_states):
        output = self.inner(hidden_states)
        return self.change(output[0] if isinstance(output, tuple) else output)


def wrap_gates(model, change) -> None:
    for block in model.modules():
        if isinstance(block, OlmoeSparseMoeBlock):
            block.gate = Middleware(block.gate, change)


def choose(z):
    """(weights, indices) of 3 experts a token, of which some slots are skipped."""
    weights, experts = z.softmax(-1).topk(3)
    experts = experts.clone()
    experts[::2, 1] = -1
    experts[0] = -1
    return weights, experts


def scores(z):
    """(T, E): the weights at their experts, zero elsewhere."""
    top = z.softmax(-1).topk(3)
    return torch.zeros_like(z).scatter(1, top.indices, top.values)
