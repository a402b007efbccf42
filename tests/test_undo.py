"""Whatever is done to a model within `undoing` is undone, or named."""

import math

import pytest
import torch
from captured import assert_as_before, capture
from models import V5, assert_unchanged, blocks, choose, olmoe, token_ids, wrap_gates
from torch import nn

import moeprof
from moeprof.backends import cpu
from moeprof.measure.bits import words_of
from moeprof.measure.snapshot import _sums, undoing

pytestmark = pytest.mark.slow  # takes no interest in what a model computes


def in_place(change):
    """A configure that changes tensors where they are."""

    def configure(model):
        with torch.no_grad():
            change(model)

    return configure


def set_attributes(find, **values):
    def configure(model):
        for name, value in values.items():
            setattr(find(model), name, value)

    return configure


def swap_experts(model):
    weights = blocks(model)[1].experts
    weights = weights.down_proj if V5 else weights[3].down_proj.weight
    weights.copy_(weights.flip(0))


def lose_a_bit(model):
    words_of(model.lm_head.weight)[5, 7] ^= 1


def add_hooks(model):
    blocks(model)[0].register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    return model.lm_head.register_forward_hook(lambda module, args, output: output + 1)


def new_forward(model):
    stock = blocks(model)[0].forward
    blocks(model)[0].forward = lambda x: stock(2 * x)


def backward(model):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.inference_mode(False):
        model(input_ids=token_ids()).logits.sum().backward()


def other_class(model):
    block = blocks(model)[0]
    block.__class__ = type("Mine", (type(block),), {"forward": lambda self, x: 0})


def other_modules(model):
    model.lm_head = nn.Linear(32, 64)
    model.extra = nn.Linear(3, 3)
    del model.model.layers[1]


def other_config(model):
    model.config.num_experts_per_tok = 1
    model.config.id2label[0] = "changed"
    model.generation_config.max_new_tokens = 3
    model.config.made_up = []


def no_threads(model):
    torch.set_num_threads(torch.get_num_threads() + 1)
    moeprof.set_num_threads(3)


def router(model):
    return blocks(model)[1].gate if V5 else blocks(model)[1]


CHANGES = {
    "patch": lambda m: moeprof.patch(m, "topk", k=1, linears=True),
    "patch and callback": lambda m: moeprof.patch(m).on_routing(lambda *_: None),
    "config": other_config,
    "top_k": set_attributes(router, top_k=1),
    "gates": lambda m: wrap_gates(m, choose),
    "hooks": add_hooks,
    "forward": new_forward,
    "class": other_class,
    "modules": other_modules,
    "train": lambda m: m.train(),
    "threads": no_threads,
    "parameter replaced": lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(64, 32))),
    "parameter gone": lambda m: m.lm_head.register_parameter("weight", None),
    "data replaced": set_attributes(lambda m: m.lm_head.weight, data=torch.ones(64, 32)),
    "attribute": set_attributes(lambda m: m.lm_head.weight, mine=3),
    "dtype": lambda m: m.to(torch.bfloat16),
    "gradients": backward,
    "frozen": lambda m: m.requires_grad_(False),
}
IN_PLACE = {
    "lm_head.weight": in_place(lambda m: m.lm_head.weight.mul_(2)),
    "model.embed_tokens.weight": in_place(lambda m: m.model.embed_tokens.weight.data.zero_()),
    "experts.*down_proj": in_place(swap_experts),
    "head.weight": in_place(lose_a_bit),
    "rotary_emb.inv_freq": in_place(lambda m: m.model.rotary_emb.inv_freq.neg_()),
    "norm.weight": in_place(lambda m: setattr(m.model.norm.weight.mul_(3), "data", torch.ones(32))),
}


@pytest.fixture
def threads():
    before = torch.get_num_threads(), cpu._threads
    yield
    torch.set_num_threads(before[0])
    cpu.set_num_threads(before[1])


@pytest.mark.parametrize("change", CHANGES)
def test_each_kind_of_change_is_undone(change, memory, threads):
    model = olmoe()
    before = capture(model)
    with undoing(model):
        CHANGES[change](model)
        with pytest.raises((AssertionError, TypeError, AttributeError, IndexError)):
            assert_as_before(model, before)  # which sees this change
    assert_as_before(model, before)


@pytest.mark.parametrize("name", IN_PLACE)
def test_weights_changed_in_place(name, memory):
    model = olmoe()
    before = capture(model)
    if memory:
        with undoing(model) as saved:
            for _ in range(2):
                IN_PLACE[name](model)
                with pytest.raises(AssertionError):
                    assert_as_before(model, before)
                saved.restore()
                assert_as_before(model, before)
            IN_PLACE[name](model)
        assert_as_before(model, before)
        return
    with pytest.raises(RuntimeError, match=f"changed in place and not put back: .*{name}"):
        with undoing(model):
            model.config.num_experts_per_tok = 1
            IN_PLACE[name](model)
    assert_unchanged(model, before.modules)  # all the rest was undone
    assert model.config.num_experts_per_tok == 2


def test_an_earlier_patch_stays(memory):
    model = olmoe()
    with moeprof.patch(model, "topk", k=1) as handle:
        before, seen = capture(model), []
        seeing = handle.on_routing(lambda *call: seen.append(call))
        with undoing(model):
            seeing.remove()
            moeprof.unpatch(model)
            moeprof.patch(model, "topk", k=2)
        capture(model)
        assert handle.active and len(seen) == 2
        seeing.remove()
        assert_as_before(model, before)


def test_nan_and_negative_zero_are_bits_like_others(memory):
    model = olmoe()
    with torch.no_grad():
        model.lm_head.weight[:2] = torch.nan
        model.lm_head.weight[2:4] = 0
    with undoing(model):
        pass  # NaN is no change
    before = words_of(model.lm_head.weight).clone()
    try:
        with undoing(model), torch.no_grad():
            model.lm_head.weight[2:4] = -0.0
    except RuntimeError as error:
        assert not memory and "lm_head.weight" in str(error)
    assert torch.equal(words_of(model.lm_head.weight), before) == memory


@pytest.mark.parametrize("shape", [(5,), (1023,), (40, 60), (1 << 10, 1 << 11), (1100, 1000)])
def test_sums_see_where_a_word_stands(shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(torch.int32)
    sums, flat = _sums(tensor), tensor.clone().view(-1)
    flat[[1, 3]] = flat[[3, 1]]
    assert not torch.equal(_sums(flat.view(shape)), sums)
    if len(shape) > 1:
        for dim in (0, 1):
            assert not torch.equal(_sums(tensor.flip(dim)), sums)
    assert torch.equal(_sums(tensor.clone()), sums)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(()),
        torch.randn(4, 6).t(),
        torch.randn(7).half(),
        torch.randn(9, 3).bfloat16()[1:, 1:],
        torch.tensor([True, False]),
        torch.zeros(0, 4),
        torch.randn(2, 3, dtype=torch.complex64),
    ],
)
def test_words_are_the_same_memory(tensor):
    words = words_of(tensor)
    assert not words.is_floating_point() and words.nbytes == tensor.nbytes
    assert words.data_ptr() == tensor.data_ptr()
    if tensor.numel():
        words.zero_()
        assert not tensor.any()
