"""The experts interface of transformers 5: its models with experts that run here, unpatched."""

import pytest
import torch
from commands import forks
from models import (
    V5,
    moe_block,
    random_hidden,
    reference_experts,
    relative,
    token_ids,
)
from torch.utils.flop_counter import FlopCounterMode
from zoo import build

import moeprof

# (E, k, H, I); odd ones among them, k = E, k = 1
SHAPES = [(64, 8, 96, 48), (7, 3, 33, 17), (5, 1, 16, 31), (3, 3, 20, 9), (31, 5, 129, 65)]

pytestmark = [
    pytest.mark.skipif(not V5, reason="transformers 4.57 has no experts interface"),
    pytest.mark.usefixtures("no_grad"),
]


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "qwen3_moe"])
def test_experts_implementation(name):
    model = build(name)
    model.set_experts_implementation("eager")
    expected = model(token_ids()).logits
    model.set_experts_implementation("moeprof")
    with FlopCounterMode(display=False) as counter:
        model(token_ids())
    assert counter.get_flop_counts()["Global"][torch.ops.moeprof.experts] > 0  # it is ours
    assert relative(model(token_ids()).logits, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_forward(shape, dtype):
    block = moe_block(shape, dtype=dtype).mlp
    x = random_hidden(1, 40, shape[2], dtype)[0]
    _, weights, experts = block.gate(x)
    got = moeprof.experts_forward(block.experts, x, experts, weights)
    expected = block.experts(x, experts, weights)
    reference = reference_experts(block, x, experts, weights)
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert relative(got, expected) <= 1e-5
    assert relative(got, reference) <= max(relative(expected, reference), 1e-6)


def test_experts_forward_skips_minus_one():
    block = moe_block().mlp
    x = random_hidden(1, 40, 32)[0]
    _, weights, experts = block.gate(x)
    experts = experts.masked_fill(torch.rand(experts.shape) < 0.4, -1)
    experts[3] = -1
    got = moeprof.experts_forward(block.experts, x, experts, weights)
    assert relative(got, reference_experts(block, x, experts, weights)) <= 1e-5
    assert (got[3] == 0).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda e, x, i, w: (e, x[:, :-1], i, w), r"hidden: expected \(T, 32\)"),
        (lambda e, x, i, w: (e, x, i[:-1], w), r"idx and weights: expected \(4, k\)"),
        (lambda e, x, i, w: (e, x, i, w[:, :1]), r"idx and weights: expected \(4, k\)"),
        (lambda e, x, i, w: (e, x.bfloat16(), i, w), "dtypes torch.float32 and torch.bfloat16"),
        (lambda e, x, i, w: (torch.nn.Linear(2, 2), x, i, w), "Linear: not on moeprof's path"),
        (lambda e, x, i, w: (e, x, i.fill_(9), w), "OlmoeExperts.*expert"),
    ],
    ids=["hidden", "rows", "slots", "dtype", "class", "id"],
)
def test_experts_forward_refuses(change, words):
    block = moe_block().mlp
    x = random_hidden(1, 4, 32)[0]
    _, weights, experts = block.gate(x)
    with pytest.raises(ValueError, match=words):
        moeprof.experts_forward(*change(block.experts, x, experts, weights))


IMPORTS = {
    "before": "import moeprof; import transformers.integrations.moe as m",
    "after": "import transformers.integrations.moe as m; import moeprof",
}


@pytest.fixture(scope="module")
def forked():
    """Forks of a process without the module that moeprof waits for; the rest takes long."""
    with forks("import torch._dynamo, transformers.conversion_mapping") as started:
        yield started


@pytest.mark.parametrize("when", IMPORTS)
def test_implementation_is_registered_whichever_is_imported_first(forked, when):
    code = (
        "import sys; assert not {'moeprof', 'transformers.integrations.moe'} & set(sys.modules)\n"
    )
    code += IMPORTS[when] + "; assert 'moeprof' in m.ALL_EXPERTS_FUNCTIONS.valid_keys()"
    ended = forked.run(code)
    assert ended.returncode == 0, ended.stderr
