"""Patched layers and models compute what transformers computes: its numbers are the oracle."""

import pytest
import torch
from models import (
    V5,
    blocks,
    choose,
    expert_weights,
    gap,
    gate_logits,
    generate,
    moe_block,
    olmoe,
    random_hidden,
    reference_experts,
    relative,
    run,
    scores,
    stock_routing,
    token_ids,
    wrap_gates,
)
from torch.utils.flop_counter import FlopCounterMode

import moeprof
from moeprof import demo
from moeprof.backends.ops import operands_of
from moeprof.backends.tables import ROWS, SWIGLU

TIE = 1e-5  # selections are compared where the k-th lies further than this above the next

# (E, k, H, I); odd ones among them, k = E, k = 1
SHAPES = [(64, 8, 96, 48), (7, 3, 33, 17), (5, 1, 16, 31), (3, 3, 20, 9), (31, 5, 129, 65)]
LENGTHS = [(1, 0), (1, 1), (1, 2), (3, 7), (1, 64), (1, 513)]

only_5 = pytest.mark.skipif(not V5, reason="transformers 4.57 has no experts interface")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def untied(block, x, k):
    """(T,) bool: the tokens of x (B, T, H) without a tie between the k-th and the next."""
    return gap(gate_logits(block, x.flatten(0, 1)), k) > TIE


def routings_of(handle):
    """{layer index: [Routing, ...]}, filled by each call from now on."""
    seen = {}
    handle.on_routing(lambda index, routing: seen.setdefault(index, []).append(routing))
    return seen


# ---- one block ----


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS, ids=str)
def test_block_float32(length, shape, norm):
    model = moe_block(shape, norm=norm)
    x = random_hidden(*length, shape[2])
    expected = run(model.mlp, x)
    with moeprof.patch(model):
        got = run(model.mlp, x)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    keep = untied(model.mlp, x, shape[1])
    assert keep.sum() >= 0.9 * keep.numel()
    if keep.any():
        assert relative(got.flatten(0, 1)[keep], expected.flatten(0, 1)[keep]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [True, False])
def test_router_logits_are_identical(norm, dtype):
    """One layer, so that both gates see the same bits."""
    model = olmoe(num_hidden_layers=1, norm_topk_prob=norm).to(dtype)
    (expected,) = model(token_ids(), output_router_logits=True).router_logits
    with moeprof.patch(model):
        (got,) = model(token_ids(), output_router_logits=True).router_logits
    assert got.dtype == dtype and torch.equal(got, expected)


def errors_in_half_precision(shape, norm, seed, dtype):
    """(ours, stock eager's) error against float64 experts.

    The reference takes the indices and the weights that the stock block itself routes by, both
    in its dtype, and the weights of the experts and the hidden states as they are in that dtype;
    only what follows, the experts and their sum, is in float64. So what is measured is the
    rounding inside the experts: a float64 router would choose other experts for some tokens,
    which is nobody's error. Tied tokens, where either choice is right, are left out.
    """
    model = moe_block(shape, norm=norm, seed=seed, dtype=dtype)
    x = random_hidden(1, 200, shape[2], dtype)
    weights, experts = stock_routing(model.mlp, x[0], shape[1], norm)
    stock = run(model.mlp, x)[0]
    with moeprof.patch(model):
        ours = run(model.mlp, x)[0]
    assert ours.dtype == dtype
    keep = untied(model.mlp, x, shape[1])
    assert keep.sum() > 100
    reference = reference_experts(model.mlp, x[0], experts, weights)[keep]
    return relative(ours[keep], reference), relative(stock[keep], reference)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", [(64, 8, 96, 48), (7, 3, 33, 17), (16, 4, 128, 64)], ids=str)
def test_block_bfloat16_is_no_worse_than_stock(shape, norm, seed):
    ours, stock = errors_in_half_precision(shape, norm, seed, torch.bfloat16)
    assert ours <= stock
    assert 1e-4 < ours < 2.9e-3  # rounds SwiGLU's result and the output once each


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("shape", [(64, 8, 96, 48), (7, 3, 33, 17)], ids=str)
def test_block_float16_is_no_worse_than_stock(shape, norm):
    ours, stock = errors_in_half_precision(shape, norm, 0, torch.float16)
    assert ours <= stock
    assert 1e-5 < ours < 1e-3


# ---- the demo model ----


@pytest.fixture(scope="module")
def loaded():
    """Not the one that all share: once asked for router logits, it keeps transformers' hooks."""
    return demo.load()


def decoded(model, ids):
    """(new tokens (12,), their logits (12, V)) of greedy decoding from one prompt (1, T)."""
    output = generate(model, ids, 12, return_dict_in_generate=True, output_logits=True)
    return output.sequences[0, ids.shape[1] :], torch.cat(output.logits)


def critical_step(model, prompt, new):
    """The first of the new tokens that a rounding could change, or their number.

    Token i follows from all positions before it: from each router choice there, and from its own
    logits' first place. Gaps are those of the unpatched model.
    """
    k = model.config.num_experts_per_tok
    ids = torch.cat([prompt, new[None]], dim=1)
    output = model(ids, output_router_logits=True)
    chosen = torch.stack([gap(logits, k) for logits in output.router_logits]).amin(0)
    ties = (chosen <= TIE) | (gap(output.logits[0], 1) <= TIE) & is_generated(ids, prompt)
    first = int(ties.nonzero()[0]) if ties.any() else ids.shape[1]
    return max(0, min(len(new), first - prompt.shape[1] + 1))


def is_generated(ids, prompt):
    """(T,) bool: positions whose logits choose a token (the last of the prompt, and on)."""
    return torch.arange(ids.shape[1]) >= prompt.shape[1] - 1


@pytest.fixture(scope="module")
def stock_generation(loaded):
    """[(prompt ids, new tokens, logits, critical step)] of the unpatched model."""
    model, tokenizer = loaded
    found = []
    with torch.no_grad():
        for _, text in demo.prompts():
            prompt = tokenizer(text, return_tensors="pt")["input_ids"]
            new, logits = decoded(model, prompt)
            found.append((prompt, new, logits, critical_step(model, prompt, new)))
    return found


@pytest.mark.parametrize("router", ["own", "bh"])
def test_demo_generation(loaded, stock_generation, router):
    """With its own top-k, and with BH made to select 8, the demo model writes what it wrote."""
    model, _ = loaded
    options = {"router": bh_of(8), "null": "normal"} if router == "bh" else {}
    complete = 0
    with moeprof.patch(model, **options):
        for prompt, new, logits, until in stock_generation:
            our_new, our_logits = decoded(model, prompt)
            assert our_new[:until].tolist() == new[:until].tolist()
            for ours, stock in zip(our_logits[:until], logits[:until], strict=True):
                assert relative(ours, stock) <= 1e-4
            complete += until == len(new)
    assert len(stock_generation) == 12
    assert complete >= 10


def bh_of(k):
    """BH that clamping makes select k experts of every token."""
    return moeprof.BH(alpha=1 - 1e-9, min_k=k, max_k=k)


@pytest.mark.parametrize("null", ["normal", "fitted"])
def test_bh_of_8_selects_what_topk_selects(loaded, null):
    model, tokenizer = loaded
    ids = tokenizer(demo.heldout_texts()[0].text, return_tensors="pt")["input_ids"][:, :200]
    if null == "fitted":
        texts = [d.text[:500] for d in demo.calibration_texts()[:4]]
        with pytest.warns(UserWarning, match="null was fitted to 538 tokens"):
            null = moeprof.fit_null(model, tokenizer, texts, progress=False)
    router_logits = model(ids, output_router_logits=True).router_logits
    with moeprof.patch(model) as handle:
        topk = routings_of(handle)
        expected = model(ids).logits
    with moeprof.patch(model, bh_of(8), null=null) as handle:
        bh = routings_of(handle)
        got = model(ids).logits
    for layer, logits in enumerate(router_logits):
        free = gap(logits, 8) > TIE
        ours, theirs = (r[layer][0].expert_ids.sort(dim=1).values[free] for r in (bh, topk))
        assert free.sum() > 100 and torch.equal(ours, theirs)
        stock = logits.topk(8).indices.sort(dim=1).values[free]
        assert torch.equal(theirs.long(), stock)
    assert relative(got, expected) <= 1e-5


def test_generation_with_left_padding(loaded):
    model, tokenizer = loaded
    texts = [text for _, text in demo.prompts()][:5]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    assert (inputs["attention_mask"] == 0).any()
    real = inputs["attention_mask"].bool()
    options = dict(do_sample=False, max_new_tokens=8, min_new_tokens=8)
    expected, logits = model.generate(**inputs, **options), model(**inputs).logits
    with moeprof.patch(model):
        assert torch.equal(model.generate(**inputs, **options), expected)
        ours = model(**inputs).logits
    assert relative(ours[real], logits[real]) <= 1e-4


# ---- weights by norm ----


@pytest.mark.parametrize("model_norm", [True, False])
@pytest.mark.parametrize("norm", ["model", "none", "sum", "mass"])
@pytest.mark.parametrize("router", ["topk", "bh"])
def test_norm(router, norm, model_norm):
    """Against the definitions, in float64: p is the softmax over all experts."""
    model, x = moe_block((8, 2, 32, 16), norm=model_norm), random_hidden(1, 30, 32)
    options = {"topk": dict(k=3), "bh": dict(alpha=0.5, max_k=5, null="normal")}[router]
    seen = []
    with moeprof.patch(model, router, norm=norm, **options) as handle:
        handle.on_routing(lambda index, routing: seen.append(routing))
        out = run(model.mlp, x)[0]
        p = gate_logits(model.mlp, x[0]).double().softmax(-1)
    experts = seen[0].expert_ids
    selected = p.gather(1, experts.clamp(min=0).long()) * (experts >= 0)
    rule = ("sum" if model_norm else "none") if norm == "model" else norm
    factor = {
        "none": torch.ones(30),
        "sum": 1 / selected.sum(1),
        "mass": p.topk(2).values.sum(1) / selected.sum(1),
    }[rule]
    expected = selected * factor[:, None]
    assert relative(seen[0].weights, expected) <= 1e-6
    assert relative(out, reference_experts(model.mlp, x[0], experts, expected)) <= 1e-5


# ---- routers of users ----


FORMS = {
    "logits, weights, indices": lambda z: (z, *choose(z)),
    "weights, indices": choose,
    "scores, indices": lambda z: (scores(z), choose(z)[1]),
    "a list": lambda z: list(choose(z)),
    "int32 indices": lambda z: (choose(z)[0], choose(z)[1].int()),
    "with a batch": lambda z: tuple(t[None] for t in choose(z)),
}
forms = pytest.mark.parametrize("form", FORMS)


def block_with_gate(change, **options):
    """(model, block, x (1, 12, H), logits of the stock gate)."""
    model = moe_block(**options)
    x = random_hidden(1, 12, 32, model.mlp.gate.weight.dtype)
    gate = model.mlp.gate(x[0])
    wrap_gates(model, change)
    return model, model.mlp, x, gate[0] if isinstance(gate, tuple) else gate


@forms
def test_skipped_slots_contribute_nothing(form):
    model, block, x, z = block_with_gate(FORMS[form])
    weights, experts = choose(z)
    seen = []
    with moeprof.patch(model) as handle:
        handle.on_routing(lambda index, routing: seen.append(routing))
        got = run(block, x)[0]
        with FlopCounterMode(display=False) as counter:
            block(x)
    assert relative(got, reference_experts(block, x[0], experts, weights)) <= 1e-5
    assert (got[0] == 0).all() and (got[1:].abs().sum(1) > 0).all()
    counts = (experts >= 0).sum(1)
    assert seen[0].counts.tolist() == counts.tolist()
    ours = counter.get_flop_counts()["Global"][torch.ops.moeprof.experts]
    assert ours == 6 * 32 * 16 * int(counts.sum())


@forms
def test_experts_of_skipped_slots_are_not_read(form):
    """Slots 1 and 2 of every token are skipped, and whoever is only named there is poison."""

    def first_only(z):
        *rest, experts = FORMS[form](z)
        experts[..., 1:] = -1
        return (*rest, experts)

    model, block, x, z = block_with_gate(first_only, shape=(32, 2, 32, 16))
    with moeprof.patch(model):
        expected = run(block, x)
        for expert in set(range(32)) - set(z.argmax(1)[1:].tolist()):
            for weight in expert_weights(block, expert):
                weight.fill_(torch.nan)
        assert torch.equal(run(block, x), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("norm", [True, False])
def test_logits_of_a_users_router(norm):
    """Top-k of what the user made of them, with the model's own norm."""

    def without_two(z):
        return 3 * z.index_fill(1, torch.tensor([1, 6]), -torch.inf)

    model, block, x, z = block_with_gate(without_two, norm=norm)
    weights, experts = without_two(z).softmax(-1).topk(2)
    if norm:
        weights = weights / weights.sum(1, keepdim=True)
    with moeprof.patch(model):
        got = run(block, x)[0]
    assert relative(got, reference_experts(block, x[0], experts, weights)) <= 1e-5


def test_users_router_that_stock_can_run():
    """4.57 takes logits from its gate, 5 takes three values; nothing is skipped."""
    model = olmoe()
    wrap_gates(model, lambda z: (2 * z, *(2 * z).softmax(-1).topk(3)) if V5 else 2 * z)
    expected = model(token_ids()).logits
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=1)
    text = model.generate(token_ids(), **options)
    with moeprof.patch(model):
        assert relative(model(token_ids()).logits, expected) <= 1e-5
        assert torch.equal(model.generate(token_ids(), **options), text)
    assert torch.equal(model(token_ids()).logits, expected)


@pytest.mark.parametrize("form", ["logits", "logits, weights, indices"])
def test_router_on_a_users_logits(form):
    """An explicit router decides in place of the user's, on the logits that it gives."""
    change = FORMS.get(form, lambda z: -z)
    model, block, x, z = block_with_gate(change)
    expected = (-z if form == "logits" else z).softmax(-1).max(-1, keepdim=True)
    with moeprof.patch(model, moeprof.TopK(1)):
        got = run(block, x)[0]
    reference = reference_experts(block, x[0], expected.indices, expected.values)
    assert relative(got, reference) <= 1e-5


def test_float32_logits_of_a_bfloat16_model():
    """The softmax is over the logits as the gate gives them, not rounded to the model's dtype."""

    def close_together(z):
        return 8 + z.float() / 100  # in bfloat16 most of them would be equal

    model, block, x, _ = block_with_gate(close_together, dtype=torch.bfloat16)
    seen = []
    with moeprof.patch(model) as handle:
        handle.on_routing(lambda index, routing: seen.append(routing))
        block(x)
    z = block.gate(x[0])
    free = gap(z, 2) > 1e-5
    assert free.sum() >= 10
    ours, expected = (t.sort(1).values for t in (seen[0].expert_ids, z.topk(2).indices))
    assert ours[free].tolist() == expected[free].tolist()


# ---- what is not selected does not run ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("router", [moeprof.TopK(1), bh_of(1)], ids=["topk", "bh"])
def test_experts_that_are_not_selected_are_not_read(router, dtype):
    shape = (64, 8, 32, 16)
    model, x = moe_block(shape, dtype=dtype), random_hidden(1, 9, 32, dtype)
    null = "normal" if router.wants_null else None
    with moeprof.patch(model, router, null=null) as handle:
        seen = routings_of(handle)
        expected = run(model.mlp, x)
        selected = set(seen[0][0].expert_ids.flatten().tolist())
        assert 1 < len(selected) <= 9
        for expert in set(range(64)) - selected:
            for weight in expert_weights(model.mlp, expert):
                weight.fill_(torch.nan)
        assert torch.equal(run(model.mlp, x), expected)
    assert expected.isfinite().all() and expected.abs().min() > 0


def flops(model, *args):
    with FlopCounterMode(display=False) as counter:
        model(*args)
    return counter


@pytest.mark.parametrize("shape", [(8, 2, 32, 16), (7, 3, 33, 17)], ids=str)
def test_flops_are_those_of_stock_eager(shape):
    model, x = moe_block(shape), random_hidden(2, 13, shape[2])
    stock = flops(model.mlp, x).get_total_flops()
    num_experts, k, hidden, intermediate = shape
    assert stock == 26 * (k * 6 * hidden * intermediate + 2 * hidden * num_experts)
    with moeprof.patch(model):
        counter = flops(model.mlp, x)
    assert counter.get_total_flops() == stock
    per_op = counter.get_flop_counts()["Global"]
    assert per_op[torch.ops.moeprof.moe] == 26 * k * 6 * hidden * intermediate


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_flops_follow_the_routing(alpha):
    model, x = moe_block((32, 4, 32, 16)), random_hidden(1, 50, 32)
    with moeprof.patch(model, "bh", alpha=alpha, max_k=6, null="normal") as handle:
        seen = routings_of(handle)
        counter = flops(model.mlp, x)
    counts = seen[0][0].counts
    assert counts.unique().numel() > 1  # tokens differ, so the formula has to look
    ours = counter.get_flop_counts()["Global"][torch.ops.moeprof.moe]
    assert ours == 6 * 32 * 16 * int(counts.sum())


def test_flops_of_a_whole_model():
    model = olmoe()
    if V5:
        model.set_experts_implementation("eager")
    stock = flops(model, token_ids()).get_total_flops()
    with moeprof.patch(model):
        assert flops(model, token_ids()).get_total_flops() == stock


# ---- torch.compile ----


@pytest.mark.slow  # test_patch_compile compiles on both versions
def test_compiled_block():
    """Behind aot_eager, the C call is an opaque operator whose fake stands for its shapes."""
    model, x = moe_block(), random_hidden(2, 5, 32)
    expected = run(model.mlp, x)
    torch._dynamo.reset()
    with moeprof.patch(model):
        assert relative(run(torch.compile(model.mlp, backend="aot_eager"), x), expected) <= 1e-5


def test_compiled_block_follows_patch_and_unpatch():
    """A whole quantised model does in test_patch_compile, where it takes longer."""
    model, x = moe_block(), random_hidden(2, 5, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model.mlp, backend="eager")
    stock = run(model.mlp, x)
    assert relative(run(compiled, x), stock) <= 1e-6
    with moeprof.patch(model, "bh", alpha=0.5, max_k=4, null="normal"):
        patched = run(model.mlp, x)
        assert relative(patched, stock) > 1e-2
        assert relative(run(compiled, x), patched) <= 1e-6
    assert relative(run(compiled, x), stock) <= 1e-6


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_operators_keep_what_they_declare(tokens):
    """Schema, fake tensors and autograd registration, as torch checks them."""
    block = moe_block().mlp
    x = random_hidden(1, tokens, 32)[0]
    weights = [p for p in block.experts.parameters()]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    spec = moeprof.BH(0.5, max_k=5).spec(8, norm="none", norm_k=2)
    how = SWIGLU.as_text(), ROWS.as_text()
    moe = (x, gate_logits(block, x), weights, *how, *operands_of(spec), "mlp")
    torch.library.opcheck(torch.ops.moeprof.moe.default, moe, test_utils=checks)
    ids, ones = torch.zeros(tokens, 3, dtype=torch.long), torch.ones(tokens, 3)
    experts = (x, ids, ones, weights, *how, "mlp")
    torch.library.opcheck(torch.ops.moeprof.experts.default, experts, test_utils=checks)


def test_layers_are_of_their_own_size(loaded):
    """Guards the tests above: the demo model is the real thing, not a stub."""
    config = loaded[0].config
    assert (config.num_experts, config.num_experts_per_tok) == (64, 8)
    assert len(blocks(loaded[0])) == config.num_hidden_layers >= 4
