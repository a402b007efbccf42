"""Which modules are MoE layers, and what their parts hold, over transformers and users' own."""

import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo
from models import V5, Middleware, llama, moe_block, olmoe, wrap_gates
from torch import nn

import moeprof
from moeprof.models.find import find_sites
from moeprof.models.sizes import is_list, parameter_bytes

E, H, INTERMEDIATE, K = zoo.E, zoo.H, zoo.INTERMEDIATE, zoo.K


@pytest.fixture(scope="module", params=zoo.HERE)
def specimen(request):
    model = zoo.build(request.param)
    return request.param, model, find_sites(model)


def test_sites_of_the_zoo(specimen):
    name, model, sites = specimen
    assert [site.layer.name for site in sites] == zoo.router_names(name)
    for site in sites:
        layer = site.layer
        assert model.get_submodule(layer.name) is site.router
        assert model.get_submodule(layer.block) is site.block
        assert json.loads(json.dumps(asdict(layer))) == asdict(layer)
        assert site.experts is not None and layer.name.startswith(layer.block)
        if name != "jetmoe" and not name.startswith("granite"):
            assert is_list(site.experts) == (name in LISTS)


LISTS = {"switch_transformers", "nllb_moe"}
if not V5:
    LISTS = set(zoo.HERE) - {"gpt_oss", "dbrx", "llama4", "aria", "qwen3_vl_moe"}


def test_settings_and_flops_of_the_zoo(specimen):
    name, _, sites = specimen
    species = zoo.ZOO[name]
    for site in sites:
        layer = site.layer
        assert (layer.num_experts, layer.top_k, layer.hidden_size) == (E, species.k, H)
        assert layer.router_flops == 2 * H * E
        assert layer.shared_flops == species.shared_flops
        expected = species.expert_flops
        if "attention" in layer.block:  # JetMoE: two matrices, H x (channels of all heads)
            expected = 2 * 2 * H * 8 * 2
        assert layer.expert_flops == expected


def test_bytes_of_the_zoo(specimen):
    name, _, sites = specimen
    biases = {"gpt_oss": 2 * INTERMEDIATE + H, "nllb_moe": INTERMEDIATE + H}.get(name, 0)
    for layer in (site.layer for site in sites):
        assert layer.expert_bytes == 4 * (layer.expert_flops // 2 + biases)
        in_router = {"gpt_oss": E, "gemma4": H + E}.get(name, 0)  # a bias, scales
        in_block = 0
        if name == "ernie4_5_moe":  # the bias that corrects its choice
            in_router, in_block = (E, 0) if V5 else (0, E)
        if name == "jetmoe" and "attention" not in layer.block:
            in_block = H  # a bias
        assert layer.router_bytes == 4 * (H * E + in_router)
        assert layer.shared_bytes == 4 * (layer.shared_flops // 2 + in_block)


def test_layers_whose_experts_all_run(specimen):
    name, _, sites = specimen
    expected = name == "llama4" or (name == "qwen3_vl_moe" and not V5)
    assert all(site.layer.dense is expected for site in sites)


def test_whose_call_tells_the_choice(specimen):
    name, _, sites = specimen
    only_logits = ("dbrx",) if V5 else ("qwen3_vl_moe",)
    expected = "experts" if name in only_logits else "router"
    assert all(site.chooses == expected for site in sites)


def test_bytes_add_up_to_the_block():
    for name in ("olmoe", "qwen2_moe", "deepseek_v3"):
        for site in find_sites(zoo.build(name)):
            layer = site.layer
            whole = layer.router_bytes + E * layer.expert_bytes + layer.shared_bytes
            assert whole == parameter_bytes(site.block)


# ---- stock models in other states ----


def test_a_patched_model():
    model = olmoe()
    stock = [site.layer for site in find_sites(model)]
    with moeprof.patch(model):
        assert [site.layer for site in find_sites(model)] == stock


@pytest.mark.parametrize("inner", ["inner", "router", "gate", "proj"])
def test_of_nested_routers_the_outermost_counts(inner):
    class Wrapper(nn.Module):
        def __init__(self, gate):
            super().__init__()
            setattr(self, inner, gate)

    model = olmoe()
    stock = [site.layer for site in find_sites(model)]
    for layer in model.model.layers:
        layer.mlp.gate = Wrapper(Wrapper(layer.mlp.gate))
    sites = find_sites(model)
    assert [site.layer for site in sites] == stock
    assert all(type(site.router) is Wrapper for site in sites)


def test_middleware_with_matrices_of_its_own():
    model = olmoe()
    wrap_gates(model, lambda z: z)
    for layer in model.model.layers:
        layer.mlp.gate.adapter = nn.Linear(32, 32)
    for site in find_sites(model):
        assert type(site.router) is Middleware
        assert site.layer.router_flops == 2 * (32 * 8 + 32 * 32)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = zoo.build("qwen2_moe")
    stock = [site.layer for site in find_sites(zoo.build("qwen2_moe"))]
    assert [site.layer for site in find_sites(model)] == stock


def test_other_dtypes_change_bytes_only():
    (stock, *_), (half, *_) = (
        [site.layer for site in find_sites(moe_block((8, 2, 32, 16), dtype=dtype))]
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.expert_bytes * 2 == stock.expert_bytes == 4 * 3 * 32 * 16
    assert half.router_bytes * 2 == stock.router_bytes
    assert half.expert_flops == stock.expert_flops


@pytest.mark.skipif(V5, reason="experts of linears")
def test_a_quantised_linear_counts_what_it_multiplies():
    class Packed(nn.Module):  # two 4-bit numbers in a byte, as a vector
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
            self.weight = nn.Parameter(packed, requires_grad=False)

    model = olmoe()
    stock = [site.layer for site in find_sites(model)]
    for layer in model.model.layers:
        for expert in layer.mlp.experts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                setattr(expert, name, Packed(getattr(expert, name)))
    for site, before in zip(find_sites(model), stock, strict=True):
        assert site.layer.expert_flops == before.expert_flops
        assert site.layer.expert_bytes * 8 == before.expert_bytes


# ---- users' own modules ----


class Router(nn.Module):
    """What its forward returns is a matter for reading."""

    def __init__(self, size=E, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, H))
        vars(self).update(attributes)


class Stacked(nn.Module):
    def __init__(self, *shapes):
        super().__init__()
        for number, shape in enumerate(shapes):
            self.register_parameter(f"w{number}", nn.Parameter(torch.randn(shape)))

    def forward(self, hidden, index, weights): ...


def swiglu() -> nn.Module:
    sizes = {"gate_proj": (H, 24), "up_proj": (H, 24), "down_proj": (24, H)}
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def block(**children) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        setattr(module, name, child)
    return module


def only_site(module):
    (site,) = find_sites(module)
    return site


@pytest.mark.parametrize("name", ["gate", "router", "moe_gate", "noisy_router", "gating"])
def test_a_router_beside_a_list(name):
    experts = nn.ModuleList(swiglu() for _ in range(E))
    module = block(**{name: Router(top_k=2)}, experts=experts)
    site = only_site(module)
    assert site.router is getattr(module, name) and site.block is module
    assert site.experts is experts and site.chooses == "router"
    layer = site.layer
    assert (layer.name, layer.block, layer.num_experts, layer.top_k) == (name, "", E, 2)
    assert (layer.hidden_size, layer.expert_flops) == (H, 6 * H * 24)
    assert layer.expert_bytes == 4 * (3 * H * 24 + 24 + 24 + H)  # with the biases


def test_a_router_beside_stacked_experts():
    experts = Stacked((E, H, 24), (E, 24, H), (E, 24))  # the last is a bias
    site = only_site(nn.Sequential(block(router=Router(k=2), experts=experts)))
    assert site.layer.name == "0.router" and site.experts is experts
    assert site.layer.expert_flops == 2 * 2 * H * 24
    assert site.chooses == "router"  # it may have chosen: it knows k
    assert only_site(block(router=Router(), experts=experts)).chooses == "experts"


def test_stacked_parameters_of_the_block_itself():
    module = Stacked((E, H, 24), (E, 24, H))
    module.router, module.shared_expert = nn.Linear(H, E), swiglu()
    site = only_site(module)
    assert site.experts is site.block is module
    assert site.layer.expert_flops == 2 * 2 * H * 24
    assert site.layer.shared_flops == 6 * H * 24
    assert site.layer.expert_bytes == 4 * 2 * H * 24


def test_a_router_without_experts():
    site = only_site(nn.Sequential(nn.Linear(H, H), block(router=Router())))
    layer = site.layer
    assert layer.name == "1.router" and site.experts is None
    assert (layer.num_experts, layer.top_k, layer.hidden_size) == (E, None, H)
    assert layer.expert_flops is layer.expert_bytes is None
    assert only_site(block(gate=nn.Linear(H, E))).layer.num_experts == E
    assert only_site(block(gate=Middleware(nn.Linear(H, E), None))).layer.name == "gate"
    assert only_site(block(gate=block(num_experts=5))).layer.num_experts == 5


def test_a_router_of_another_name_beside_experts():
    experts = nn.ModuleList(swiglu() for _ in range(E))
    site = only_site(block(norm=nn.LayerNorm(H), chooser=nn.Linear(H, E), experts=experts))
    assert site.layer.name == "chooser"
    function = block()  # by hash: nothing that shows E
    assert only_site(block(gate=function, experts=experts)).router is function


def test_experts_in_other_places():
    alike = nn.ModuleDict({f"expert_{n}": swiglu() for n in range(E)})
    site = only_site(block(router=Router(), experts=alike, other=nn.Linear(H, 3)))
    assert site.experts is alike and site.layer.shared_flops == 2 * H * 3
    wrapped = block(mlps=nn.ModuleList(swiglu() for _ in range(E)))
    assert only_site(block(gate=Router(), experts=wrapped)).experts is wrapped.mlps
    parts = {f"w{n}": nn.ModuleList(nn.Linear(H, 24) for _ in range(E)) for n in (1, 2)}
    module = block(gate=Router(), **parts)
    assert only_site(module).experts is module
    assert only_site(module).layer.expert_flops == 2 * 2 * H * 24


def test_experts_that_are_not_alike_have_no_flops():
    experts = nn.ModuleList([*(swiglu() for _ in range(E - 1)), nn.Identity()])
    layer = only_site(block(gate=Router(), experts=experts)).layer
    assert layer.num_experts == E
    assert layer.expert_flops is layer.expert_bytes is None
    wider = nn.ModuleList([nn.Linear(H, 8), nn.Linear(H, 16)])
    assert only_site(block(gate=Router(2), experts=wider)).layer.expert_flops is None


def test_shared_experts_are_no_experts():
    shared = nn.ModuleList(swiglu() for _ in range(E))
    experts = nn.ModuleList(swiglu() for _ in range(E))
    module = block(shared_experts=shared, gate=Router(), experts=experts)
    module.shared_expert_gate = nn.Linear(H, 1)
    site = only_site(module)
    assert site.experts is experts
    assert site.layer.shared_flops == E * 6 * H * 24 + 2 * H


def test_shared_beside_the_block_and_the_attention_of_a_decoder_layer():
    experts = Stacked((E, H, 24), (E, 24, H))
    module = block(moe=block(gate=Router(), experts=experts), shared_mlp=swiglu(), mlp=swiglu())
    assert only_site(module).layer.shared_flops == 6 * H * 24
    layer = block(self_attn=nn.Linear(H, H), gate=Router(), experts=experts, shared_mlp=swiglu())
    assert only_site(layer).layer.shared_flops == 6 * H * 24


def test_a_gate_of_residuals_around_a_block_is_none_of_its_own():
    inner = block(gate=Router(), experts=Stacked((E, H, 24), (E, 24, H)))
    layer = block(self_attn=nn.Linear(H, H), residual_gate=nn.Identity(), mlp=inner)
    assert only_site(layer).layer.name == "mlp.gate"


def test_stacked_experts_whose_first_matrix_is_called_gate():
    parts = {name: Stacked((E, 24, H)) for name in ("gate", "up", "down")}
    experts = block(**parts)
    site = only_site(block(gate=Router(), experts=experts))
    assert site.layer.name == "gate" and site.experts is experts
    assert site.layer.expert_flops == 6 * H * 24


# ---- what is no router ----


@pytest.mark.parametrize(
    "children",
    [
        {"mlp": swiglu()},
        {"gate": nn.Linear(H, 24), "up": nn.Linear(H, 24), "down": nn.Linear(24, H)},
        {"gate": nn.Linear(H, H)},
        {"gate": nn.Linear(H, 48)},
        {"gate_up_proj": nn.Linear(H, 24)},
        {"shared_expert_gate": nn.Linear(H, 1), "shared_expert": swiglu()},
        {"g_proj": nn.Linear(H, 4), "q_proj": nn.Linear(H, H)},
        {"attn_gate": nn.Linear(H, 4)},
        {"per_layer_input_gate": nn.Linear(H, 4)},
        {"out_gate": nn.Linear(H, 4)},
        {"output_gate": nn.Linear(H, 4)},
        {"self_attn": block(gate=nn.Linear(H, 4), q_proj=nn.Linear(H, H))},
        {"gate_norm": nn.LayerNorm(H), "gate": nn.SiLU()},
        {"layers": nn.ModuleList(nn.Linear(H, H) for _ in range(4)), "head": nn.Linear(H, 4)},
        {"conv": nn.Conv1d(H, H, 3), "gate": nn.Sigmoid()},
    ],
    ids=lambda children: " ".join(children),
)
def test_no_router(children):
    with pytest.raises(ValueError, match="No routers found in Module, .*dense.*; found "):
        find_sites(block(**children))


def test_a_dense_model():
    message = "No routers found in LlamaForCausalLM, .* dense .*gate or router; found .* none$"
    with pytest.raises(ValueError, match=message):
        find_sites(llama())


def test_the_error_names_what_looks_like_a_mixture_of_experts():
    class MoeThing(nn.Module): ...

    with pytest.raises(ValueError, match=re.escape("of a mixture of experts: MoeThing")):
        find_sites(nn.Sequential(MoeThing(), nn.Linear(4, 4)))


# ---- k ----


@pytest.mark.parametrize(
    "name", ["num_experts_per_tok", "moe_top_k", "top_k", "num_experts_per_token", "moe_topk"]
)
def test_k_from_the_configuration(name):
    experts = nn.ModuleList(swiglu() for _ in range(E))
    module = nn.Sequential(block(gate=nn.Linear(H, E), experts=experts))
    assert only_site(module).layer.top_k is None
    module.config = SimpleNamespace(**{name: 3})
    assert only_site(module).layer.top_k == 3
    module.config = SimpleNamespace(text_config=SimpleNamespace(**{name: 2}))
    assert only_site(module).layer.top_k == 2


def test_the_router_comes_before_the_block_and_the_configuration():
    experts = nn.ModuleList(swiglu() for _ in range(E))
    module = block(gate=Router(top_k=1), experts=experts, top_k=2)
    module.config = SimpleNamespace(num_experts_per_tok=3)
    assert only_site(module).layer.top_k == 1
    module.gate = Router()
    assert only_site(module).layer.top_k == 2
    module.gate = block(inner=Router(top_k=4))
    del module.top_k
    assert only_site(module).layer.top_k == 4


def test_the_k_of_text_generation_is_none_of_the_routers():
    experts = nn.ModuleList(swiglu() for _ in range(60))
    module = block(gate=nn.Linear(H, 60), experts=experts)
    module.config = transformers.PretrainedConfig(top_k=50)
    assert only_site(module).layer.top_k is None


@pytest.mark.parametrize("alike", [True, False])
def test_a_list_of_unlike_modules_holds_no_experts(alike):
    """Unless its name says so: beside a router they may be anything."""
    stages = [nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H)]
    if not alike:
        stages[2] = nn.Sequential(stages[2])
    module = block(gate=nn.Linear(H, 3), stages=nn.ModuleList(stages))
    site = only_site(module)
    assert site.experts is (module.stages if alike else None) and site.layer.num_experts == 3
