"""Every layer in the result, what its experts ran, what they hold: of unusual models."""

import copy

import pytest
import torch
import zoo
from listed import Block, E, H, K, hidden, lora, needs, profiled, rows_by_expert
from models import V5, olmoe, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from wording import says

import moeprof
from moeprof.models.find import find_layers, find_sites
from moeprof.profile.result import Profile
from moeprof.profiler.flops import count_grouped_mm

LISTS = pytest.mark.skipif(V5, reason="experts in a ModuleList: transformers 4")
STACKED = pytest.mark.skipif(not V5, reason="stacked experts: transformers 5")


# ---- every layer is there ----


@LISTS
@pytest.mark.parametrize("layers", [(1,), (0, 2), (0, 1, 2)])
def test_experts_that_share_a_module_are_as_many_as_their_slots(layers):
    model = olmoe(num_hidden_layers=3, num_experts_per_tok=4)
    for number in layers:
        experts = model.model.layers[number].mlp.experts
        experts[1] = experts[5] = experts[0]
    metrics = profiled(model, {"input_ids": token_ids(1, 6)}).get_metrics()
    assert list(metrics) == [f"model.layers.{n}.mlp.gate" for n in range(3)]
    for own in metrics.values():
        assert own.layer.num_experts == 8 and sum(own.expert_selections) == 24
        assert own.flops_expert == 6 * 4 * 6 * 32 * 16 and own.flops_shared == 0


def test_layers_of_several_kinds_are_all_counted():
    class Alone(nn.Module):  # a router that is found by its name
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(H, E)
            self.top_k = K

        def forward(self, x):
            return x + self.router(x).sum()

    model = nn.Sequential(Alone(), Block(), Alone())
    sites, unread = find_layers(model)
    assert [site.layer.name for site in sites] == ["0.router", "1.router", "2.router"]
    assert not unread
    profile = profiled(model, hidden(5)).result()
    assert [m.tokens for m in profile.each()] == [5, 5, 5]
    assert says(profile.summary(), "Unknown FLOPs", "layers 0 and 2", "no experts lie beside")


def test_a_layer_that_can_not_be_read_is_named_with_its_reason(tmp_path):
    odd = Block()
    odd.experts = odd.experts[:7]  # the router gives 8 columns
    model = nn.Sequential(Block(), odd, Block())
    profiler = profiled(model, hidden(5))
    profile = profiler.result()
    assert list(profiler.get_metrics()) == ["0.router", "2.router"]
    why = "2 of 3 layers counted; layer 1: its router gives 8 columns, and it has 7 experts."
    for text in (profile.summary(), profile.to_html(), profile._repr_html_()):
        assert why in " ".join(text.split())
    frame = profile.to_frame()
    assert frame.loc[frame["metric"] == "not_counted", ["layer", "block"]].values.tolist() == [
        [1, "1"]
    ]
    profile.save(tmp_path)
    assert why in " ".join(Profile.load(tmp_path).summary().split())
    with pytest.raises(ValueError, match="No routers found in .*7 experts"):
        find_sites(nn.Sequential(odd))


def test_a_layer_that_did_not_run_is_named():
    model = nn.Sequential(Block(), Block())
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model[0](hidden(3))
    text = " ".join(profiler.result().summary().split())
    assert says(text, "1 of 2 layers counted", "layer 1", "did not run")


@pytest.mark.parametrize("name", zoo.HERE)
def test_stock_models_have_no_layer_that_can_not_be_read(name):
    sites, unread = find_layers(zoo.build(name))
    assert not unread and len(sites) == len(zoo.router_names(name))


def test_a_quantised_expert_among_others_is_a_layer_like_any():
    model = nn.Sequential(Block(), Block(), Block())
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(H, H)), {nn.Linear})
    model[1].experts[3] = packed[0]
    profile = profiled(model, hidden(40)).result()
    assert len(profile.layers) == 3
    for own in profile.each():
        assert own.flops_expert == 40 * K * 2 * H * H and own.flops_shared == 0
    assert profile.layers[1].expert_bytes is None
    assert "layer 1: its experts differ in bytes" in " ".join(profile.summary().split())


def test_experts_of_different_sizes_count_by_slot():
    sizes = iter([4, 8, 16, 32] * 4)
    model = nn.Sequential(
        Block(lambda: nn.Sequential(nn.Linear(H, w := next(sizes)), nn.Linear(w, H)))
    )
    profiler = profiled(model, hidden(9))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(hidden(9))
    (own,) = profiler.get_metrics().values()
    assert own.flops_total == counter.get_total_flops() and own.layer.expert_flops is None


# ---- what ran ----


@pytest.mark.parametrize("lengths", [(1, 64, 64), (64, 1), (64,)])
def test_what_experts_with_a_capacity_drop_is_not_counted_as_run(lengths):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(H, H), Block(capacity=lambda tokens: tokens * K // E))
    calls = [hidden(n) for n in lengths]
    rows = sum(rows_by_expert(model, *calls)["1"])
    profile = profiled(model, *calls).result()
    (own,) = profile.each()
    selected = sum(own.expert_selections)
    assert selected == sum(lengths) * K > rows
    assert own.flops_expert == rows * 2 * H * H
    assert own.dropped_selections == selected - rows
    assert own.flops_total == own.flops_expert + own.flops_router
    assert f"Capacity: {100 * (selected - rows) / selected:.0f} % of the sel" in profile.summary()
    assert all(not e._forward_pre_hooks for e in model[1].experts)


def test_dropped_selections_are_in_the_files_and_in_the_sum_of_phases(tmp_path):
    model = nn.Sequential(Block(capacity=lambda tokens: 1))
    profile = profiled(model, hidden(1), hidden(9), hidden(1)).result()
    assert profile.each("decode")[0].dropped_selections == 0
    dropped = profile.each("unknown")[0].dropped_selections
    assert dropped == profile.each()[0].dropped_selections > 0
    profile.save(tmp_path)
    assert Profile.load(tmp_path) == profile
    assert Profile.load(tmp_path).each()[0].dropped_selections == dropped
    frame = profile.to_frame()
    at = (frame["metric"] == "dropped_selections") & (frame["phase"] == "all")
    assert frame.loc[at, "value"].tolist() == [dropped]


def test_without_a_capacity_nothing_is_dropped():
    profile = profiled(nn.Sequential(Block()), hidden(30), hidden(1)).result()
    assert profile.each()[0].dropped_selections == 0
    assert "Capacity" not in profile.summary()


def test_experts_that_run_every_token_cost_what_they_ran():
    class Dense(Block):
        def forward(self, x):
            rows = x.reshape(-1, H)
            scores = self.router(rows).softmax(-1)
            return sum(scores[:, e, None] * expert(rows) for e, expert in enumerate(self.experts))

    profile = profiled(nn.Sequential(Dense()), hidden(7)).result()
    (own,) = profile.each()
    assert own.flops_expert == 7 * E * 2 * H * H
    assert own.dropped_selections == -7 * (E - K)
    assert says(profile.summary(), "Experts ran 42 rows more", "selected")


class Stacked(nn.Module):
    def __init__(self, experts=E):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, H, H))


def test_stacked_experts_that_get_a_buffer_for_each_expert():
    class Buffered(Stacked):
        def forward(self, buffers):  # (E, capacity, H)
            return buffers @ self.weight

    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k, self.router, self.experts = K, nn.Linear(H, E), Buffered()

        def forward(self, x):
            rows = x.reshape(-1, H)
            self.router(rows)
            return x + self.experts(rows.new_zeros(E, 5, H)).sum()

    (own,) = profiled(nn.Sequential(Of()), hidden(11)).get_metrics().values()
    assert own.flops_expert == E * 5 * 2 * H * H and own.dropped_selections == 22 - 40


class Chooser(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.top_k = K

    def forward(self, x):
        return super().forward(x).softmax(-1).topk(K)


def test_stacked_experts_that_get_other_indices():
    class Indexed(Stacked):
        def forward(self, x, indices, weights):
            return x

    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = Chooser(H, E), Indexed()

        def forward(self, x):
            rows = x.reshape(-1, H)
            weights, indices = self.router(rows)
            indices = indices.clone()
            indices[3:] = E  # beyond the experts: left out
            return self.experts(rows, indices, weights).view_as(x)

    (own,) = profiled(nn.Sequential(Of()), hidden(11)).get_metrics().values()
    assert own.dropped_selections == 8 * K and own.flops_expert == 3 * K * 2 * H * H


class Embedded(nn.Module):
    """Takes input_ids and an attention mask, as a language model does."""

    def __init__(self, block):
        super().__init__()
        self.embed, self.block = nn.Embedding(64, H), block

    def forward(self, input_ids, attention_mask=None):
        return self.block(self.embed(input_ids))


def test_of_dropped_selections_beside_padding_the_real_ones_are_unknown():
    model = Embedded(Block(capacity=lambda tokens: 1))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :4] = 0
    calls = [{"input_ids": token_ids()}, {"input_ids": token_ids(), "attention_mask": mask}]
    whole, padded = (profiled(model, call).result() for call in calls)
    (own,), (of_padded,) = whole.each(), padded.each()
    assert own.flops_expert == (44 - own.dropped_selections) * 2 * H * H
    assert own.flops_total_with_padding == of_padded.flops_total_with_padding
    for name in ("flops_expert", "flops_total", "dropped_selections"):
        value = getattr(of_padded, name)
        assert value != value, name
    assert "are unknown" in padded.summary()


@pytest.mark.parametrize("here", [range(4), range(4, 8), (0,)])
def test_experts_of_other_machines_cost_nothing_here(here):
    model = nn.Sequential(Block(here=here))
    rows = sum(rows_by_expert(model, hidden(40))["0"])
    profile = profiled(model, hidden(40)).result()
    (own,) = profile.each()
    assert own.layer.num_experts == E and sum(own.expert_selections) == 40 * K
    assert own.flops_expert == rows * 2 * H * H < 40 * K * 2 * H * H
    assert own.layer.expert_bytes is None
    text = " ".join(profile.summary().split())
    assert f"{E - len(here)} of its 8 experts are not on this machine" in text


def test_a_part_of_the_stacked_experts_is_said_to_be_unknown():
    class Of(nn.Module):
        def __init__(self):
            super().__init__()
            self.top_k, self.gate, self.experts = K, nn.Linear(H, E), Stacked(4)

        def forward(self, x):
            return x + self.gate(x).sum()

    profile = profiled(nn.Sequential(Of()), hidden(4)).result()
    (own,) = profile.each()
    assert own.layer.num_experts == E and own.flops_expert != own.flops_expert
    assert own.flops_shared == 0 and "divided among machines" in profile.summary()


def test_a_stock_model_can_be_patched_while_its_experts_are_watched():
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model(token_ids())
        with moeprof.patch(model):
            model(token_ids())
        model(token_ids())
    for own in profiler.get_metrics().values():
        assert own.tokens == 66 and own.dropped_selections == 0 and own.steps == 3


# ---- what modules hold ----


def flops_of(model, name, **inputs):
    """As torch counts them, which needs a formula of grouped products."""
    undo = count_grouped_mm()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    undo()
    counts = counter.get_flop_counts()
    return sum(sum(c.values()) for module, c in counts.items() if module.endswith(name))


@needs("peft")
@STACKED
@pytest.mark.parametrize("experts", [8, 6])
@pytest.mark.parametrize("parameters", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_lora_on_stacked_experts(experts, parameters):
    model = olmoe(num_hidden_layers=1, num_experts=experts)
    targets = [f"mlp.experts.{name}" for name in parameters]
    adapted = lora(model, target_modules=["q_proj"], target_parameters=targets)
    ids = {"input_ids": token_ids(1, 6)}
    with adapted.disable_adapter():
        (own,) = profiled(adapted, ids).get_metrics().values()
        assert own.flops_total == flops_of(adapted, "layers.0.mlp", **ids)
        assert own.flops_adapter == 0
    (own,) = profiled(adapted, ids).get_metrics().values()
    assert own.flops_total == flops_of(adapted, "layers.0.mlp", **ids)
    assert own.flops_shared == 0 and own.flops_adapter > own.flops_expert


@needs("peft")
@LISTS
def test_lora_on_listed_experts():
    model = olmoe(num_hidden_layers=1)
    adapted = lora(model, target_modules=["gate_proj", "down_proj"])
    ids = {"input_ids": token_ids(1, 6)}
    (own,) = profiled(adapted, ids).get_metrics().values()
    assert own.flops_total == flops_of(adapted, "layers.0.mlp", **ids)
    adapters = 4 * 2 * (32 + 16)  # r (in + out) of two of the three matrices
    assert own.layer.expert_flops == 6 * 32 * 16 + 2 * adapters
    assert own.layer.expert_bytes == 4 * (3 * 32 * 16 + adapters)
    adapted.merge_adapter()
    (own,) = profiled(adapted, ids).get_metrics().values()
    assert own.layer.expert_flops == 6 * 32 * 16


@needs("peft")
def test_a_router_that_is_trained_beside_adapters_counts_once():
    adapted = lora(olmoe(num_hidden_layers=1), target_modules=["q_proj"], modules_to_save=["gate"])
    (own,) = profiled(adapted, {"input_ids": token_ids(1, 6)}).get_metrics().values()
    assert own.flops_router == 6 * 2 * 32 * 8 and own.layer.router_bytes == 4 * 32 * 8


@needs("peft")
@pytest.mark.parametrize("saved", ["mlp", "gate", pytest.param("experts", marks=STACKED)])
def test_of_modules_that_are_trained_beside_adapters_the_active_copy_counts(saved):
    adapted = lora(olmoe(num_hidden_layers=2), target_modules=["q_proj"], modules_to_save=[saved])
    adapted.add_adapter("other", adapted.peft_config["default"])
    ids = {"input_ids": token_ids(1, 6)}
    profile = profiled(adapted, ids).result()
    with adapted.disable_adapter():
        disabled = profiled(adapted, ids).result()
    adapted.set_adapter("other")
    for made in (profile, disabled, profiled(adapted, ids).result()):
        assert [own.tokens for own in made.each()] == [6, 6]
        assert "did not run" not in made.summary()
        for layer, own in enumerate(made.each()):
            assert own.flops_total == flops_of(adapted, f"layers.{layer}.mlp", **ids)
            assert own.flops_expert == 2 * 6 * 6 * 32 * 16 and not own.layer.unknown
            assert own.layer.expert_bytes == 4 * 3 * 32 * 16
    names = [made.layers[0].block.partition("layers.0.mlp")[2] for made in (profile, disabled)]
    copies = [".modules_to_save.default", ".original_module"]
    assert names == (copies if saved == "mlp" else ["", ""])


@needs("peft")
def test_shared_experts_beside_a_block_that_is_trained_beside_adapters():
    adapted = lora(
        zoo.build("granitemoeshared"),
        target_modules=["q_proj"],
        modules_to_save=["block_sparse_moe"],
    )
    for site in find_sites(adapted):
        assert site.layer.shared_flops == zoo.ZOO["granitemoeshared"].shared_flops


@needs("peft")
@STACKED
def test_experts_that_all_run_do_so_under_an_adapter():
    model = zoo.build("llama4")
    targets = ["feed_forward.experts.down_proj"]
    for options in ({"target_parameters": targets}, {"modules_to_save": ["experts"]}):
        adapted = lora(copy.deepcopy(model), target_modules=["q_proj"], **options)
        assert [site.layer.dense for site in find_sites(adapted)] == [True]


def adapters(peft):
    """{name: configuration} of adapters that multiply something else than plain LoRA."""
    modules = ["gate_proj", "down_proj"]
    return {
        "DoraLinearVariant": peft.LoraConfig(r=4, use_dora=True, target_modules=modules),
        "loha": peft.LoHaConfig(r=4, target_modules=modules),
        "ia3": peft.IA3Config(target_modules=modules, feedforward_modules=["down_proj"]),
        "adalora": peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=modules),
        "vera": peft.VeraConfig(r=4, target_modules=["gate_proj"]),
        "lora.layer.ParamWrapper": peft.LoraConfig(
            r=4, target_modules=["q_proj"], target_parameters=["experts.3.up_proj.weight"]
        ),
    }


@needs("peft")
@LISTS
@pytest.mark.parametrize(
    "name", ["DoraLinearVariant", "loha", "ia3", "adalora", "vera", "lora.layer.ParamWrapper"]
)
def test_the_flops_of_other_adapters_are_said_to_be_unknown(name):
    import peft

    adapted = peft.get_peft_model(olmoe(num_hidden_layers=1), adapters(peft)[name]).eval()
    ids = {"input_ids": token_ids(1, 6)}
    profile = profiled(adapted, ids).result()
    (own,) = profile.each()
    assert own.flops_expert != own.flops_expert and own.flops_total != own.flops_total
    assert own.layer.expert_bytes is None and own.flops_router == 6 * 2 * 32 * 8
    assert name in own.layer.unknown and "merge or disable it" in own.layer.unknown
    assert "Unknown FLOPs or bytes, layer 0: an adapter runs in it" in profile.summary()
    with adapted.disable_adapter():
        (own,) = profiled(adapted, ids).get_metrics().values()
        assert own.flops_total == flops_of(adapted, "layers.0.mlp", **ids)
        assert not own.layer.unknown


@needs("peft")
@STACKED
def test_the_flops_of_an_adapted_router_parameter_are_said_to_be_unknown():
    adapted = lora(
        olmoe(num_hidden_layers=1), target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]
    )
    (own,) = profiled(adapted, {"input_ids": token_ids(1, 6)}).get_metrics().values()
    assert own.flops_router != own.flops_router and "ParamWrapper" in own.layer.unknown
    assert own.flops_expert == 2 * 6 * 6 * 32 * 16


class Halved(nn.Module):
    """A user's module around a linear, which has the names of peft's and is none."""

    def __init__(self, linear):
        super().__init__()
        self.base_layer, self.more = linear, nn.Linear(H, H, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.more(x)


def test_a_users_wrapper_runs_whole_and_a_parametrization_is_said_to_be_unknown():
    model = nn.Sequential(Block(lambda: Halved(nn.Linear(H, H))))
    (own,) = profiled(model, hidden(5)).get_metrics().values()
    assert own.flops_expert == 5 * K * 2 * 2 * H * H
    model = nn.Sequential(Block())
    for expert in model[0].experts:
        nn.utils.parametrizations.orthogonal(expert)
    (own,) = profiled(model, hidden(5)).get_metrics().values()
    assert own.flops_expert != own.flops_expert and "a parametrization" in own.layer.unknown


def test_dynamically_quantised_linears():
    model = nn.Sequential(Block(lambda: nn.Linear(H, H, bias=False)))
    packed = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    profile = profiled(packed, hidden(5)).result()
    (own,) = profile.each()
    assert (own.flops_expert, own.flops_router) == (5 * K * 2 * H * H, 5 * 2 * H * E)
    assert own.layer.expert_bytes == H * H  # one byte a number
    assert own.layer.router_bytes == H * E + 4 * E


class Quantised(torch.Tensor):
    """Stands for float32 numbers, keeps int8 ones and a scale for each row, as torchao's do."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.detach().abs().amax(1, keepdim=True) / 127
        self.data8 = (weight.detach() / self.scale).round().to(torch.int8)

    def __tensor_flatten__(self):
        return ["data8", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        plain = [a.data8 * a.scale if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def test_tensors_that_keep_fewer_bytes_than_they_stand_for():
    model = nn.Sequential(Block(lambda: nn.Linear(H, H, bias=False)))
    for expert in model[0].experts:
        expert.weight = nn.Parameter(Quantised(expert.weight), requires_grad=False)
    layer = find_sites(model)[0].layer
    assert (layer.expert_flops, layer.expert_bytes) == (2 * H * H, H * H + 4 * H)


@needs("torchao")
def test_torchao():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(Block(lambda: nn.Linear(H, H, bias=False)))
    quantize_(model, Int8WeightOnlyConfig())
    (own,) = profiled(model, hidden(5)).get_metrics().values()
    assert own.flops_expert == 5 * K * 2 * H * H and own.flops_router == 5 * 2 * H * E
    assert H * H < own.layer.expert_bytes <= H * H + 8 * H


def test_packed_stacked_experts_are_said_to_be_unknown():
    class Packed(nn.Module):  # as transformers keeps MXFP4: two numbers in a byte, and scales
        def __init__(self):
            super().__init__()
            blocks = torch.zeros(E, 2 * H, H // 32 + 1, 16, dtype=torch.uint8)
            self.blocks = nn.Parameter(blocks, requires_grad=False)

        def forward(self, x, indices, weights):
            return x

    module = nn.Module()
    module.router, module.experts = nn.Linear(H, E), Packed()
    layer = find_sites(nn.Sequential(module))[0].layer
    assert layer.expert_flops is None and "blocks of Packed is packed" in layer.unknown
    assert layer.expert_bytes == 2 * H * 16


@needs("accelerate")
def test_weights_that_accelerate_brings_when_they_are_needed(tmp_path):
    from accelerate import disk_offload

    model = olmoe()
    stock = [site.layer for site in find_sites(model)]
    disk_offload(model, tmp_path, execution_device="cpu")
    profiler = profiled(model, {"input_ids": token_ids()})
    assert [own.tokens for own in profiler.get_metrics().values()] == [22, 22]
    assert [site.layer for site in find_sites(model)] == stock
