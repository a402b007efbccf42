"""The profiler's FLOPs against torch's FlopCounterMode on a loop over the experts, written here."""

import pytest
import torch
from models import V5, blocks, olmoe, token_ids
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import build

import moeprof


def mixtral():
    return build("mixtral", num_key_value_heads=2, intermediate_size=56, num_experts_per_tok=2)


def qwen3():
    """Three layers, the middle one without experts."""
    sizes = dict(num_hidden_layers=3, num_key_value_heads=2, num_experts=16, num_experts_per_tok=4)
    return build("qwen3_moe", mlp_only_layers=[1], intermediate_size=48, **sizes)


def demo():
    return moeprof.demo.load()[0]


MODELS = {"demo": demo, "mixtral": mixtral, "qwen3": qwen3}


def moe_blocks(model):
    """{router's name: block} of the layers that have experts."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "experts") and hasattr(module, "gate"):
            found[f"{name}.gate"] = module
    return found


def matrices(block, expert):
    """gate and up (I, H), down (H, I) of one expert."""
    experts = block.experts
    if V5:
        return *experts.gate_up_proj[expert].chunk(2), experts.down_proj[expert]
    own = experts[expert]
    names = ("w1", "w3", "w2") if hasattr(own, "w1") else ("gate_proj", "up_proj", "down_proj")
    return [getattr(own, name).weight for name in names]


def loop(block, x, choose):
    """One block as a plain loop: x (T, H) -> (T, H)."""
    logits = F.linear(x, block.gate.weight)
    weights, experts = choose(logits)
    out = torch.zeros_like(x)
    for e in range(logits.shape[1]):
        token, slot = (experts == e).nonzero(as_tuple=True)
        gate, up, down = matrices(block, e)
        y = F.linear(F.silu(F.linear(x[token], gate)) * F.linear(x[token], up), down)
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


def inputs_of(model, ids):
    """{router's name: hidden states (T, H) that its block gets}."""
    seen, handles = {}, []
    for name, block in moe_blocks(model).items():

        def keep(module, args, name=name):
            seen[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        handles.append(block.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", ((2, 37), (3, 1)))
def test_flops_are_those_of_a_loop_over_the_experts(name, shape):
    model, ids = MODELS[name](), token_ids(*shape)
    k = model.config.num_experts_per_tok
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model(ids)
    metrics, total = profiler.get_metrics(), 0
    hidden = inputs_of(model, ids)
    assert list(metrics) == list(hidden)
    for router, x in hidden.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            loop(moe_blocks(model)[router], x, lambda z: z.softmax(-1).topk(k))
        own = metrics[router]
        assert own.flops_total == counter.get_total_flops()
        assert own.flops_total == own.flops_router + own.flops_expert
        assert own.flops_router == 2 * len(x) * x.shape[1] * own.layer.num_experts
        total += own.flops_total
    # Without a cache, whatever its length.
    assert sum(m.flops_total for m in profiler.get_metrics("prefill").values()) == total


@pytest.mark.parametrize("name", MODELS)
def test_flop_counter_mode_sees_the_same_while_a_profiler_is_active(name):
    """Of the whole forward, stock as transformers runs it, against its own eager experts."""
    model, ids = MODELS[name](), token_ids(2, 9, seed=1)  # no row ends as padding would
    counts = []
    for implementation in ("eager", None):
        if V5 and implementation:
            model.set_experts_implementation(implementation)
        elif V5:
            model.set_experts_implementation("grouped_mm")
        with torch.no_grad(), moeprof.MoEProfiler(model):
            with FlopCounterMode(display=False) as counter:
                model(ids)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_under_bh_flops_are_those_of_the_recorded_selections():
    model, ids, selections = olmoe(), token_ids(2, 30), [0, 0]

    def record(layer, routing):
        selections[layer] += int((routing.expert_ids >= 0).sum())

    with moeprof.patch(model, "bh", alpha=0.4, max_k=4, null="normal") as handle:
        handle.on_routing(record)
        with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
            model(ids)
    assert len(set(selections)) == 2 and 120 < sum(selections) < 480
    hidden, intermediate = 32, 16
    for metrics, selected in zip(profiler.get_metrics().values(), selections, strict=True):
        assert metrics.flops_expert == 6 * hidden * intermediate * selected
        assert metrics.flops_router == 2 * hidden * 8 * metrics.tokens and metrics.tokens == 60
        assert metrics.flops_total == metrics.flops_expert + metrics.flops_router


def test_the_formula_of_our_operator_counts_what_the_profiler_counts():
    model = olmoe()
    with moeprof.patch(model, "bh", alpha=0.4, max_k=4, null="normal"):
        with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
            with FlopCounterMode(display=False) as counter:
                for block in blocks(model):
                    block(torch.randn(1, 25, 32))
    assert counter.get_total_flops() == sum(
        metrics.flops_total for metrics in profiler.get_metrics().values()
    )
