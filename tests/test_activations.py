"""What experts compute between their matrices: read from their modules, and run in C."""

import importlib
import re

import pytest
import torch
from models import V5, moe_block
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

import moeprof
from moeprof.backends.ops import run_experts
from moeprof.backends.tables import (
    INTERLEAVED,
    NOTHING_READ,
    ROWS,
    SWIGLU,
    TRANSPOSED,
    Activation,
    WeightTable,
)
from moeprof.models.families.activations import read_function
from moeprof.models.families.packed import read_packed

only_5 = pytest.mark.skipif(not V5, reason="the experts interface of transformers 5")

E, H, I = 8, 32, 24  # noqa: E741


# ---- functions ----

NAMES = {
    "silu": SWIGLU,
    "swish": SWIGLU,
    "quick_gelu": Activation("silu", 1.702),
    "gelu": Activation("gelu"),
    "gelu_python": Activation("gelu"),
    "gelu_new": Activation("gelu_tanh"),
    "gelu_fast": Activation("gelu_tanh"),
    "gelu_accurate": Activation("gelu_tanh"),
    "gelu_pytorch_tanh": Activation("gelu_tanh"),
    "relu": Activation("relu"),
    "relu2": Activation("relu2"),
}
FUNCTIONS = {
    **{f"transformers {name}": (ACT2FN[name], a) for name, a in NAMES.items()},
    "torch SiLU": (nn.SiLU(), SWIGLU),
    "torch GELU": (nn.GELU(), Activation("gelu")),
    "torch GELU tanh": (nn.GELU("tanh"), Activation("gelu_tanh")),
    "torch ReLU": (nn.ReLU(), Activation("relu")),
    "F.silu": (F.silu, SWIGLU),
    "F.gelu": (F.gelu, Activation("gelu")),
    "F.relu": (F.relu, Activation("relu")),
}


def table_and_stock(act_fn, activation, dtype=torch.float32):
    """(a table of random experts in Linears' matrices, the same computed by torch)."""
    torch.manual_seed(0)
    beside = 2 if activation.gated else 1
    shapes = [*[(I, H)] * beside, (H, I)] * E
    matrices = [(torch.randn(shape) / 4).to(dtype) for shape in shapes]
    own = activation.matrices

    def stock(x, ids, weights):
        out = torch.zeros(x.shape, dtype=torch.float64)
        for e in range(E):
            *into, down = (m.double() for m in matrices[own * e : own * (e + 1)])
            first, *rest = (x.double() @ matrix.T for matrix in into)
            act = act_fn(first) * rest[0] if rest else act_fn(first)
            weight = (weights.double() * (ids == e)).sum(1, keepdim=True)
            out += weight * (act @ down.T)
        return out

    return WeightTable(matrices, activation), stock


def routed(tokens=30, seed=1, width=H):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, width, generator=generator), ids, torch.rand(tokens, 2)


@pytest.mark.parametrize("gated", (True, False))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_is_read_as_what_it_computes(name, gated):
    act_fn, expected = FUNCTIONS[name]
    activation, reason = read_function(act_fn)
    assert (activation, reason) == (expected, None)
    table, stock = table_and_stock(act_fn, activation._replace(gated=gated))
    arguments = routed()
    torch.testing.assert_close(
        run_experts(*arguments, table, "experts").double(), stock(*arguments), rtol=1e-5, atol=1e-5
    )


class SiLU(nn.Module):
    """Not torch's."""

    def forward(self, x):
        return x


@pytest.mark.parametrize("act_fn", (nn.Tanh(), ACT2FN["gelu_10"], SiLU(), torch.tanh, None))
def test_what_is_none_of_them_is_named(act_fn):
    activation, reason = read_function(act_fn)
    named = type(act_fn).__name__ if isinstance(act_fn, nn.Module) else repr(act_fn)
    assert activation == SWIGLU
    assert reason.startswith(f"activation {named}") and "ReLU are supported" in reason


@pytest.mark.parametrize("name", ("gelu", "relu2"))
def test_a_patched_model_runs_them(name):
    block = moe_block().mlp
    for module in block.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = ACT2FN[name]
    x = torch.randn(1, 9, H)
    with torch.no_grad():
        stock = block(x)
        with moeprof.patch(block) as handle:
            ours = block(x)
            assert not handle.fallbacks
    stock, ours = (out if V5 else out[0] for out in (stock, ours))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gated", (True, False))
def test_flops_count_the_matrices_that_there_are(gated):
    table, _ = table_and_stock(F.silu, Activation(gated=gated))
    with FlopCounterMode(display=False) as counter:
        run_experts(*routed(7), table, "experts")
    assert counter.get_total_flops() == 7 * 2 * (6 if gated else 4) * H * I


def test_activations_survive_the_way_through_an_operator():
    for activation in (SWIGLU, Activation("silu", 1.702, 7.0, 1.0), Activation(gated=False)):
        assert Activation.from_text(activation.as_text()) == activation


# ---- the experts of transformers 5 ----

CLASSES = {
    # folder: (config, its settings, experts, what they are read as)
    "nemotron_h": (
        "NemotronHConfig",
        dict(n_routed_experts=E, moe_intermediate_size=I, mlp_hidden_act="relu2"),
        "NemotronHExperts",
        Activation("relu2", gated=False),
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        dict(n_routed_experts=E, moe_intermediate_size=I, swiglu_limit=0.5),
        "DeepseekV4Experts",
        Activation(limit=0.5),
    ),
    "hy_v4": (
        "HYV4Config",
        dict(num_experts=E, moe_intermediate_size=I, swiglu_limit=0.5),
        "HYV4Experts",
        Activation(limit=0.5),
    ),
    "glm5_next": (
        "Glm5NextTextConfig",
        dict(n_routed_experts=E, moe_intermediate_size=I, swiglu_limit=0.5),
        "Glm5NextTextExperts",
        Activation(limit=0.5),
    ),
    "minimax_m3_vl": (
        "MiniMaxM3VLTextConfig",
        dict(num_local_experts=E, intermediate_size=I, swiglu_limit=0.5, swiglu_alpha=1.702),
        "MiniMaxM3VLExperts",
        Activation("silu", 1.702, 0.5, 1.0),
    ),
    "gemma4": (
        "Gemma4TextConfig",
        dict(num_experts=E, moe_intermediate_size=I, hidden_activation="gelu_pytorch_tanh"),
        "Gemma4TextExperts",
        Activation("gelu_tanh"),
    ),
    "beam": (
        "BeamConfig",
        dict(num_experts=E, moe_intermediate_size=I, hidden_act="silu"),
        "BeamExperts",
        SWIGLU,
    ),
    "gpt_oss": (
        "GptOssConfig",
        dict(num_local_experts=E, intermediate_size=I, swiglu_limit=0.5),
        "GptOssExperts",
        Activation("silu", 1.702, 0.5, 1.0),
    ),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterConfig",
        dict(num_local_experts=E, intermediate_size=I, swiglu_limit=0.5),
        "OpenAIPrivacyFilterExperts",
        Activation("silu", 1.702, 0.5, 1.0),
    ),
    "aria": (
        "AriaTextConfig",
        dict(moe_num_experts=E, intermediate_size=I),
        "AriaExperts",
        SWIGLU,
    ),
}
# How their matrices are stored, where not in rows.
STORAGE = {"gpt_oss": INTERLEAVED, "openai_privacy_filter": TRANSPOSED, "aria": TRANSPOSED}


def experts_of(folder):
    modeling = pytest.importorskip(f"transformers.models.{folder}.modeling_{folder}")
    configuration = importlib.import_module(f"transformers.models.{folder}")
    config_class, settings, experts_class, _ = CLASSES[folder]
    config = getattr(configuration, config_class)(hidden_size=H, **settings)
    config._experts_implementation = "eager"
    experts = getattr(modeling, experts_class)(config)
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts.requires_grad_(False)


@only_5
@pytest.mark.parametrize("folder", CLASSES)
def test_experts_of_transformers(folder):
    """As far from float64 as the stock forward; a gate that limits nothing would be seen."""
    experts = experts_of(folder)
    read, reason = read_packed(experts)
    activation = read.activation
    assert (activation, reason) == (CLASSES[folder][3], None)
    assert read.storage == STORAGE.get(folder, ROWS)
    x, ids, weights = routed(40, width=read.hidden_size)
    stock = experts(x, ids, weights)
    ours = moeprof.experts_forward(experts, x, ids, weights)
    experts.config._experts_implementation = "moeprof"
    assert torch.equal(experts(x, ids, weights), ours)
    # One forward of some classes computes in float32 whatever they hold; this one doesn't.
    experts.config._experts_implementation = "batched_mm"
    exact = experts.double()(x.double(), ids, weights.double())
    error, own = ((out.double() - exact).abs().max() for out in (ours, stock))
    assert error <= 4 * own + 1e-7
    relu = Activation("relu", gated=activation.gated)
    read = read_packed(experts.float())[0]
    other = WeightTable(read.matrices, relu, read.storage)
    assert (run_experts(x, ids, weights, other, "other").double() - exact).abs().max() > 1e-2


@only_5
@pytest.mark.parametrize("folder", ("nemotron_h", "minimax_m3_vl", "gpt_oss"))
def test_experts_of_transformers_compile(folder):
    experts = experts_of(folder)
    x, ids, weights = routed(6, width=read_packed(experts)[0].hidden_size)
    run = torch.compile(moeprof.experts_forward, backend="eager", fullgraph=True)
    expected = moeprof.experts_forward(experts, x, ids, weights)
    assert torch.equal(run(experts, x, ids, weights), expected)


@only_5
def test_a_limit_that_changes_is_read_again():
    experts = experts_of("deepseek_v4")
    for limit in (0.5, 0.25, 7):
        experts.limit = limit
        assert read_packed(experts)[0].activation == Activation(limit=float(limit))


@only_5
@pytest.mark.parametrize("folder", STORAGE)
def test_flops_and_empty_slots_of_matrices_stored_otherwise(folder):
    experts = experts_of(folder)
    x, ids, weights = routed(7)
    x, ids[0, 1], ids[1] = x[:, :H], E, -1  # transformers writes E, moeprof -1
    with FlopCounterMode(display=False) as counter:
        out = moeprof.experts_forward(experts, x, ids, weights)
    assert counter.get_total_flops() == (7 * 2 - 3) * 6 * H * I
    assert (out[1] == 0).all() and out[0].abs().max() > 0


@only_5
def test_biases_that_change_count_at_once_and_new_ones_are_read():
    experts = experts_of("gpt_oss")
    x, ids, weights = routed(9)
    before = moeprof.experts_forward(experts, x, ids, weights)
    experts.down_proj_bias += 1
    after = moeprof.experts_forward(experts, x, ids, weights)
    torch.testing.assert_close(after - before, weights.sum(1, keepdim=True).expand(-1, H))
    experts.down_proj_bias = nn.Parameter(experts.down_proj_bias - 1, requires_grad=False)
    torch.testing.assert_close(moeprof.experts_forward(experts, x, ids, weights), before)


@only_5
@pytest.mark.parametrize(
    "name, shape, reason",
    [
        ("gate_up_proj", (E, 2 * I, H), r"gate_up_proj \(8, 48, 32\) beside down_proj \(8, 24, 32"),
        ("gate_up_proj_bias", (E, I), r"gate_up_proj_bias \(8, 24\) beside down_proj"),
        ("down_proj_bias", (E, I), r"down_proj_bias \(8, 24\) beside down_proj"),
        ("down_proj", (E, I), r"down_proj of shape .*expected \(E, I, H\)"),
        ("down_proj_bias", None, "no tensors .*down_proj_bias"),
    ],
)
def test_tensors_that_are_not_of_one_layer(name, shape, reason):
    experts = experts_of("gpt_oss")
    setattr(experts, name, None if shape is None else nn.Parameter(torch.zeros(shape)))
    assert re.search(reason, read_packed(experts)[1])


@only_5
def test_halves_of_interleaved_columns_are_refused():
    """transformers' default gating takes halves, whatever the flag says."""
    experts = experts_of("aria")
    experts.is_concatenated = False
    assert read_packed(experts)[1] == "a gating of its own (_apply_gate)"


def own_gating(apply_gate, by_turns=False, **attributes):
    """Experts in the form of transformers 5 with this `_apply_gate`."""
    kind = type("Experts", (nn.Module,), {"_apply_gate": apply_gate})
    experts = kind()
    shapes = ((H, 2 * I), (I, H)) if by_turns else ((2 * I, H), (H, I))
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(torch.zeros(E, *s)) for s in shapes)
    experts.is_transposed, experts.is_concatenated = by_turns, not by_turns
    experts.act_fn = nn.SiLU()
    for name, value in attributes.items():
        setattr(experts, name, value)
    return experts


def halves(gate_up):
    return gate_up.chunk(2, dim=-1)


GATINGS = {
    "a limit": (
        lambda self, x: (
            F.silu(halves(x)[0].clamp(max=self.limit)) * halves(x)[1].clamp(-self.limit, self.limit)
        ),
        dict(limit=7.0),
        Activation(limit=7.0),
    ),
    "gelu, by its act_fn, and 1 added": (
        lambda self, x: self.act_fn(halves(x)[0]) * (halves(x)[1] + 1),
        dict(act_fn=nn.GELU()),
        Activation("gelu", shift=1.0),
    ),
    "a limit after the function": (
        lambda self, x: F.silu(halves(x)[0]).clamp(max=self.limit) * halves(x)[1],
        dict(limit=7.0),
        None,
    ),
    "a limit of the gate alone": (
        lambda self, x: F.silu(halves(x)[0].clamp(max=self.limit)) * halves(x)[1],
        dict(limit=7.0),
        None,
    ),
    "up and gate exchanged": (lambda self, x: F.silu(halves(x)[1]) * halves(x)[0], {}, None),
    "interleaved": (lambda self, x: F.silu(x[..., ::2]) * x[..., 1::2], {}, None),
    "interleaved, as it says": (
        lambda self, x: F.silu(x[..., ::2]) * x[..., 1::2],
        dict(by_turns=True),
        SWIGLU,
    ),
    "halves, where it says interleaved": (
        lambda self, x: F.silu(halves(x)[0]) * halves(x)[1],
        dict(by_turns=True),
        None,
    ),
    "another function": (lambda self, x: torch.tanh(halves(x)[0]) * halves(x)[1], {}, None),
    "a factor that is learned": (
        lambda self, x: F.silu(halves(x)[0]) * halves(x)[1] * self.factor,
        dict(factor=nn.Parameter(torch.ones(1))),
        None,
    ),
    "an error": (lambda self, x: self.nothing, {}, None),
}


@pytest.mark.parametrize("name", GATINGS)
def test_a_gating_of_its_own_is_recognised_by_what_it_computes(name):
    apply_gate, attributes, expected = GATINGS[name]
    read, reason = read_packed(own_gating(apply_gate, **attributes))
    if expected is None:
        assert read is NOTHING_READ and reason == "a gating of its own (_apply_gate)"
    else:
        assert (read.activation, reason) == (expected, None)


@pytest.mark.parametrize(
    "flag, reason",
    [
        ({"has_bias": True}, "no tensors .* gate_up_proj_bias and down_proj_bias"),
        ({"is_transposed": True}, r"gate_up_proj \(8, 48, 32\) beside down_proj"),
        ({"is_concatenated": False}, "interleaved expert weights that are not transposed"),
        ({"has_post_expert_norm": True}, "a norm after each expert"),
        ({"_is_expert_parallel": True}, "expert parallelism"),
        ({"has_gate": False}, "no tensors up_proj and down_proj"),
        ({"act_fn": nn.Tanh()}, "activation Tanh"),
    ],
)
def test_what_the_c_path_lacks_is_the_reason(flag, reason):
    experts = own_gating(None, **flag)
    assert re.search(reason, read_packed(experts)[1])
