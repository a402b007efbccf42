"""torch.compile(fullgraph=True) and torch.export of models on the C path, as of stock ones.

The graph holds moeprof's operator once a layer, and nothing of the way to it. Whole models are
compiled once patched and once quantised; else their layers alone, since most of the time goes to
what transformers has around these.
"""

import copy
from contextlib import contextmanager

import pytest
import torch
import zoo
from models import (
    V5,
    assert_unchanged,
    blocks,
    fit_null,
    moe_block,
    olmoe,
    random_hidden,
    run,
    snapshot,
    token_ids,
)

import moeprof
from moeprof.models.blocks import find_blocks

CALL = {"input_ids": token_ids(1, 12), "use_cache": False}


@contextmanager
def implementation(model):
    """The experts implementation "moeprof" of transformers 5."""
    model.set_experts_implementation("moeprof")
    yield


def bh(model):
    return moeprof.patch(model, "bh", alpha=0.3, max_k=5, null=fit_null(model))


def nested(model):
    handle = moeprof.patch(model, "topk", k=1)
    handle.__enter__()
    return moeprof.patch(model, linears=True)


WAYS = {"patched": moeprof.patch, "bh": bh, "nested": nested}
OPERATOR = dict.fromkeys(WAYS, torch.ops.moeprof.moe.default)
if V5:  # transformers 4 has no such interface
    WAYS["implementation"] = implementation
    OPERATOR["implementation"] = torch.ops.moeprof.experts.default
SLOW = pytest.mark.slow
each_way = pytest.mark.parametrize(  # one of them on both versions: the operator is the same
    "way", [pytest.param(way, marks=() if way == "patched" else SLOW) for way in WAYS]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Layers(torch.nn.Module):
    """The decoder layers of a model, on the same hidden states each time."""

    def __init__(self, model):
        super().__init__()
        self.layers, self.x = model.model.layers, random_hidden(1, 12, 32)
        self.position = model.model.rotary_emb(self.x, torch.arange(12)[None])

    def forward(self):
        x = self.x
        for layer in self.layers:
            x = layer(x, position_embeddings=self.position)
            x = x if V5 else x[0]  # a tuple there
        return x


class Whole(torch.nn.Module):
    """The logits of a model, of the same tokens each time."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self):
        return self.model(**CALL).logits


def counted(graph, operator) -> int:
    return sum(node.target is operator for node in graph.nodes)


class Seen:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self):
        self.graphs = []

    def __call__(self, module, inputs):
        self.graphs.append(module.graph)
        return module.forward


@each_way
def test_one_graph_with_one_operator_a_layer(way):
    model, seen = olmoe(), Seen()
    block = blocks(model)[1]
    before = snapshot(block)
    module = Whole(model) if way == "patched" else Layers(model)
    with WAYS[way](model), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend=seen)
        first = compiled()  # traced before it ever ran
        again = compiled()
        expected = module()
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert [counted(graph, OPERATOR[way]) for graph in seen.graphs] == [2]
    moeprof.unpatch(model)
    assert_unchanged(block, before)


@pytest.mark.parametrize(
    ("way", "strict"),
    [
        pytest.param(way, strict, marks=() if (way, strict) == ("bh", False) else SLOW)
        for way, strict in [*((way, False) for way in WAYS), ("bh", True), ([*WAYS][-1], True)]
    ],
)
def test_export(way, strict):
    """A strict one is traced by what torch.compile traces with, and that by each way above."""
    layers = 1 if strict else 2
    model = olmoe(num_hidden_layers=layers)
    module = Layers(model) if strict else Whole(model)
    with WAYS[way](model), torch.no_grad():
        expected = module()
        program = torch.export.export(module, (), strict=strict)
        assert counted(program.graph, OPERATOR[way]) == layers
        assert torch.equal(program.module()(), expected)


@SLOW
def test_inductor():
    """One block: to compile a whole model takes a minute."""
    model, x = moe_block(), torch.randn(1, 7, 32)
    block = model["mlp"]
    with moeprof.patch(model, "bh", alpha=0.3, null="normal"), torch.no_grad():
        expected = run(block, x)
        compiled = torch.compile(block, fullgraph=True)
        torch.testing.assert_close(run(compiled, x), expected, atol=1e-5, rtol=1e-5)


@SLOW
def test_other_lengths_and_a_changed_top_k():
    """The compiled block follows what the eager one does: what stands around it is not ours."""
    model = moe_block()
    block = model["mlp"]
    with moeprof.patch(model), torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        for shape in ((1, 5), (3, 9), (1, 30)):
            x = random_hidden(*shape, 32)
            torch.testing.assert_close(run(compiled, x), run(block, x))


@pytest.mark.parametrize("top_k", [1, pytest.param(3, marks=SLOW)])
def test_a_block_whose_own_k_changed(top_k):
    model, x = moe_block(), torch.randn(1, 7, 32)
    block = model["mlp"]
    owner = block.gate if V5 else block
    with moeprof.patch(model), torch.no_grad():
        run(block, x)
        owner.top_k = top_k
        expected = run(block, x)
        assert torch.equal(run(torch.compile(block, backend="eager"), x), expected)


# ---- blocks whose own forward runs ----

only_5 = pytest.mark.skipif(not V5, reason="transformers 4 has no seam")
SEAMS = ("qwen2_moe", "deepseek_v3", "lfm2_moe")  # the last two choose with a bias
ROUTERS = {"own": {}, "bh": dict(router="bh", alpha=0.3, max_k=4, null="normal")}
each_seam = pytest.mark.parametrize("name", SEAMS)
each_router = pytest.mark.parametrize("router", ROUTERS)


def seam(name):
    """(its last MoE block, hidden states)."""
    return find_blocks(zoo.build(name))[-1].module, torch.randn(1, 7, zoo.H)


def operators(graph):
    ours = torch.ops.moeprof
    return [counted(graph, operator.default) for operator in (ours.route, ours.experts)]


@only_5
@each_seam
@each_router
def test_a_seam_is_one_graph(name, router):
    (block, x), seen = seam(name), Seen()
    with moeprof.patch(block, **ROUTERS[router]), torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend=seen)
        first, again = compiled(x), compiled(x)
        expected = block(x)
    assert torch.equal(first, expected) and torch.equal(again, expected)
    assert [operators(graph) for graph in seen.graphs] == [[1, 1]]


@only_5
@each_seam
@each_router
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_a_seam_is_exported(name, router):
    """Strictly with one of the routers, and otherwise with the other."""
    strict = (SEAMS.index(name) + [*ROUTERS].index(router)) % 2 == 1
    block, x = seam(name)
    with moeprof.patch(block, **ROUTERS[router]), torch.no_grad():
        expected = block(x)
        program = torch.export.export(block, (x,), strict=strict)
        assert operators(program.graph) == [1, 1]
        assert torch.equal(program.module()(x), expected)


@only_5
def test_a_bias_is_compiled_as_it_was_read_last():
    block, x = seam("deepseek_v3")
    with moeprof.patch(block), torch.no_grad():
        block.gate.e_score_correction_bias += torch.linspace(-1, 1, zoo.E)
        expected = block(x)
        assert torch.equal(torch.compile(block, fullgraph=True, backend="eager")(x), expected)


@only_5
def test_a_copy_that_never_ran_says_what_to_do_before_it_is_compiled():
    block, x = seam("deepseek_v3")
    with moeprof.patch(block), torch.no_grad():
        copied = copy.deepcopy(block)
    with torch.no_grad():
        with pytest.raises(Exception, match="call the model once before you compile it"):
            torch.compile(copied, fullgraph=True, backend="eager")(x)
        expected = copied(x)
        assert torch.equal(torch.compile(copied, fullgraph=True, backend="eager")(x), expected)


@pytest.mark.parametrize(
    "bits, exact, part", ((4, True, Layers), pytest.param(8, False, Whole, marks=SLOW))
)
def test_a_quantised_model_compiles(bits, exact, part):
    """Experts and linear layers, by itself and patched with a router; in 8 bits all of it."""
    model = olmoe(num_hidden_layers=1)
    moeprof.quantize(model, bits, linears=True, exact=exact, progress=False)
    module = part(model)
    with torch.no_grad():
        expected = module()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(), expected)
        with moeprof.patch(model, "topk", k=1):
            patched = module()
            assert not torch.equal(patched, expected)
            assert torch.equal(compiled(), patched)
        assert torch.equal(compiled(), expected)


@SLOW
def test_what_quantize_changes_after_compiling_is_seen():
    model = olmoe(num_hidden_layers=1)
    layers = Layers(model)
    compiled = torch.compile(layers, fullgraph=True, backend="eager")
    with torch.no_grad():
        before = compiled()
        moeprof.quantize(model, 4, linears=True, progress=False)
        after = compiled()
        assert not torch.allclose(after, before, rtol=1e-3)
        assert torch.equal(after, layers())
