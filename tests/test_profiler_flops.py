"""FLOPs of grouped products: what FlopCounterMode counts while a formula is active."""

import functools

import pytest
import torch
import zoo
from models import V5
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from moeprof.models.find import find_sites
from moeprof.models.reading import read_choice, read_experts_call
from moeprof.profiler.flops import count_grouped_mm

GROUPED = pytest.mark.skipif(
    not hasattr(torch.ops.aten, "_grouped_mm"), reason="this torch has no grouped_mm"
)


@pytest.fixture
def counting():
    undo = count_grouped_mm()
    yield
    undo()


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.skipif(not V5, reason="transformers 4 loops over its experts")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_grouped_experts_count_as_a_loop_over_them(name, dtype):
    model, inputs = zoo.build(name).to(dtype), zoo.inputs(name)

    def count(implementation):
        model.set_experts_implementation(implementation)
        return flops(lambda: model(**inputs))

    before = dict(flop_counter.flop_registry)
    loop, missing = count("eager"), count("grouped_mm")
    tokens, species = inputs["input_ids"].numel(), zoo.ZOO[name]
    experts = len(species.layers) * tokens * species.k * species.expert_flops
    assert missing == loop - experts
    undo = count_grouped_mm()
    try:
        assert count("grouped_mm") == loop
        assert count("batched_mm") == loop  # torch knows bmm: nothing is counted twice
    finally:
        undo()
    assert count("grouped_mm") == missing
    assert dict(flop_counter.flop_registry) == before


# Blocks that hold more than the layer (a decoder layer), or that run what no one chose.
OTHER_BLOCKS = ("gemma4", "jetmoe", *(("nllb_moe",) if V5 else ()))


@pytest.mark.parametrize("name", [n for n in zoo.HERE if n not in OTHER_BLOCKS])
def test_flops_of_a_layer_are_those_of_its_block(name, counting):
    # torch 2.13's module tracker fails on views of parameters that want a gradient (DBRX)
    model = zoo.build(name).requires_grad_(False)
    for site in find_sites(model):
        layer, got = site.layer, {}

        def keep(module, args, kwargs, output=None, got=got):
            got.setdefault(module, (args, kwargs, output))

        hooks = [
            site.block.register_forward_pre_hook(keep, with_kwargs=True),
            site.router.register_forward_hook(keep, with_kwargs=True),
            site.experts.register_forward_pre_hook(keep, with_kwargs=True),
        ]
        with torch.no_grad():
            model(**zoo.inputs(name))
        for hook in hooks:
            hook.remove()
        (args, kwargs, _), block = got[site.block], site.block
        tokens = args[0].shape[:-1].numel()
        if site.chooses == "experts":
            choice = read_experts_call(*got[site.experts][:2], tokens, layer)
        else:
            choice = read_choice(got[site.router][2], tokens, layer)
        selections = (
            tokens * layer.num_experts if layer.dense else int((choice.expert_ids >= 0).sum())
        )
        shared = 0 if name == "granitemoeshared" else layer.shared_flops  # that is beside it
        expected = tokens * (layer.router_flops + shared) + selections * layer.expert_flops
        assert flops(functools.partial(block, *args, **kwargs)) == expected


@pytest.mark.skipif(not V5, reason="an operation of transformers 5")
def test_the_fallback_of_transformers(counting):
    from transformers.integrations import moe  # noqa: F401

    x, w = torch.randn(10, 6), torch.randn(3, 6, 4)
    offsets = torch.tensor([2, 2, 9], dtype=torch.int32)
    run = torch.ops.transformers.grouped_mm_fallback
    assert flops(lambda: run(x, w, offsets)) == 2 * 9 * 6 * 4  # the last row is in no group
    assert flops(lambda: run(x, w, offs=offsets)) == 2 * 9 * 6 * 4


@GROUPED
def test_each_form_of_the_product(counting):
    def count(a, b, offsets=None):
        if offsets is not None:
            offsets = torch.tensor(offsets, dtype=torch.int32)
        a, b = (torch.randn(s, dtype=torch.bfloat16) for s in (a, b))
        return flops(lambda: torch._grouped_mm(a, b, offs=offsets))

    assert count((16, 8), (3, 8, 24), [0, 5, 16]) == 2 * 16 * 8 * 24
    assert count((16, 8), (3, 8, 24), [0, 5, 11]) == 2 * 11 * 8 * 24
    assert count((3, 16, 8), (8, 24), [8, 8, 24]) == 2 * 16 * 8 * 24
    assert count((16, 24), (24, 8), [8, 16, 24]) == 2 * 16 * 24 * 8
    assert count((3, 16, 8), (3, 8, 24)) == 2 * 3 * 16 * 8 * 24


@GROUPED
def test_offsets_without_values_count_all_rows(counting):
    with torch.device("meta"):
        x, w = torch.empty(16, 8, dtype=torch.bfloat16), torch.empty(3, 8, 24, dtype=torch.bfloat16)
        offsets = torch.empty(3, dtype=torch.int32)
    assert flops(lambda: torch._grouped_mm(x, w, offs=offsets)) == 2 * 16 * 8 * 24
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(16, 8, dtype=torch.bfloat16), torch.empty(3, 8, 24, dtype=torch.bfloat16)
        offsets = torch.empty(3, dtype=torch.int32)
        assert flops(lambda: torch._grouped_mm(x, w, offs=offsets)) == 2 * 16 * 8 * 24


@GROUPED
def test_the_formula_goes_with_the_last_undo():
    registry, before = flop_counter.flop_registry, dict(flop_counter.flop_registry)
    operation = torch.ops.aten._grouped_mm
    first, second = count_grouped_mm(), count_grouped_mm()
    assert operation in registry
    first()
    first()  # does not take the second's
    assert operation in registry
    second()
    assert dict(registry) == before
    second()
    again = count_grouped_mm()
    assert operation in registry
    again()
    assert dict(registry) == before


@GROUPED
def test_a_formula_that_is_there_stays(monkeypatch):
    def theirs(*args, **kwargs):
        return 7

    registry, operation = flop_counter.flop_registry, torch.ops.aten._grouped_mm
    monkeypatch.setitem(registry, operation, theirs)
    undo = count_grouped_mm()
    assert registry[operation] is theirs
    undo()
    assert registry[operation] is theirs
    monkeypatch.undo()
    undo = count_grouped_mm()
    monkeypatch.setitem(registry, operation, theirs)  # someone else's, while ours is active
    undo()
    assert registry[operation] is theirs
    monkeypatch.delitem(registry, operation)
