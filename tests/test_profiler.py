"""MoEProfiler's counts against a recount by hooks on the gates, on stock and patched models."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from models import V5, blocks, choose, olmoe, token_ids, wrap_gates
from torch import nn

import moeprof
from moeprof.models.entry import Entry
from moeprof.models.phases import PHASES

E, K, NEW = 8, 2, 20
ROUTERS = {
    "stock": None,
    "patched": {},
    "bh": {"router": "bh", "alpha": 0.4, "max_k": 4, "null": "normal"},
}
RUNS = ("forward", "generate", "sample", "beams", *(["static"] if V5 else []))
# 4.57 fails on a static cache with OLMoE, before any profiler


def padded(side):
    """(ids, mask) of three prompts, two of them shorter than 9 tokens; `side` None: no mask."""
    ids, mask = token_ids(3, 9, seed=5), torch.ones(3, 9, dtype=torch.long)
    if side is None:
        return ids, None
    for row, missing in enumerate((4, 0, 1)):
        mask[row, slice(0, missing) if side == "left" else slice(9 - missing, 9)] = 0
    return ids, mask  # padding looks like any token: only the mask tells


def run(model, how, ids, mask):
    """Run it; the number of rows of its steps."""
    given = {"input_ids": ids, "attention_mask": mask}
    if how == "forward":
        model(**given)
        return len(ids)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": how == "sample"}
    if how == "beams":
        options["num_beams"] = 3
    if how == "static":
        options["cache_implementation"] = "static"
    model.generate(**given, **options)
    return len(ids) * options.get("num_beams", 1)


@contextmanager
def patched(model, router):
    if router is None:
        yield
    else:
        with moeprof.patch(model, **router):
            yield


@contextmanager
def gates_heard(model):
    """[logits (T, E) of every call of every gate]; patched layers allow hooks of moeprof only."""
    heard = []

    def hook(gate, args, output):
        heard.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    hook.__module__ = "moeprof.tests"
    handles = [block.gate.register_forward_hook(hook) for block in blocks(model)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def selected(logits, router):
    """[{experts} of each token]."""
    if router is None or not router:
        return [set(row.tolist()) for row in logits.softmax(-1).topk(K).indices]
    options = {key: value for key, value in router.items() if key != "router"}
    chosen = moeprof.benjamini_hochberg_routing(logits, **options).selected_experts
    return [set(row.tolist()) - {-1} for row in chosen]


def recount(heard, router, mask, rows):
    """{phase: [(load (2, E), k (2, E + 1)) of each layer]}: row 1 is padding."""
    made = {
        phase: [(np.zeros((2, E), int), np.zeros((2, E + 1), int)) for _ in range(2)]
        for phase in PHASES
    }
    for call, logits in enumerate(heard):
        phase = PHASES[len(logits) == rows]
        real = torch.ones(len(logits), dtype=torch.bool)
        if phase == "prefill" and mask is not None:
            real = mask.repeat_interleave(rows // len(mask), 0).reshape(-1) != 0
        load, k = made[phase][call % 2]
        for experts, is_real in zip(selected(logits, router), real.tolist(), strict=True):
            row = 0 if is_real else 1
            k[row, len(experts)] += 1
            load[row][list(experts)] += 1
    return made


@pytest.mark.filterwarnings("ignore:null")
@pytest.mark.parametrize("side", ("left", "right", None))
@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("router", ROUTERS)
def test_counts_are_those_of_a_recount_at_the_gates(router, how, side):
    model, (ids, mask), given = olmoe(), padded(side), ROUTERS[router]
    if how == "static" and side == "right":
        pytest.skip("generate() with a static cache wants its padding at the left")
    with patched(model, given), moeprof.MoEProfiler(model) as profiler, gates_heard(model) as heard:
        with torch.no_grad():
            rows = run(model, how, ids, mask)
    steps = len(heard) // 2
    assert steps == (1 if how == "forward" else NEW)
    expected = recount(heard, given, mask, rows)
    for phase in PHASES:
        for layer, counts in enumerate(profiler._session.counts[phase]):
            load, k = expected[phase][layer]
            assert np.array_equal(counts.load, load) and np.array_equal(counts.k, k)
            assert counts.steps == {"prefill": 1, "decode": steps - 1}.get(phase, 0)
            assert counts.batch_steps[rows if phase == "decode" else 9 * rows] == counts.steps
    prefill = profiler._session.counts["prefill"][0]
    assert prefill.tokens == (9 * rows if side is None else (9 * 3 - 5) * rows // 3)
    assert prefill.confidence.sum() == prefill.tokens


@pytest.mark.parametrize("router", ROUTERS)
def test_probabilities_and_pairs_are_those_of_the_logits(router):
    model, (ids, mask), given = olmoe(), padded("left"), ROUTERS[router]
    with patched(model, given), moeprof.MoEProfiler(model) as profiler, gates_heard(model) as heard:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
    real = mask.reshape(-1) != 0
    sets = [[s for s, r in zip(selected(z, given), real, strict=True) if r] for z in heard]
    for layer, counts in enumerate(profiler._session.counts["prefill"]):
        z = heard[layer][real].double()
        p = z.softmax(-1)
        entropy = torch.special.entr(p).sum(-1)
        top = p.topk(2).values
        totals = [
            (1 - entropy / np.log(E)).sum(),
            (top[:, 0] - top[:, 1]).sum(),
            (z.logsumexp(-1) ** 2).sum(),
        ]
        np.testing.assert_allclose(counts.sums, [float(t) for t in totals], rtol=1e-5)
        np.testing.assert_allclose(counts.probability, p.sum(0), rtol=1e-5)
        pairs, moves = np.zeros((E, E), int), np.zeros((E, E), int)
        before = sets[layer - 1] if layer else [()] * len(sets[0])
        for here, there in zip(sets[layer], before, strict=True):
            for i in here:
                pairs[i, list(here)] += 1
            for i in there:
                moves[i, list(here)] += 1
        assert np.array_equal(counts.pairs, pairs) and np.array_equal(counts.moves, moves)
        assert counts.skipped.sum() == 0  # the slots that BH leaves empty are none that it skips


@pytest.mark.parametrize("router", ("stock", "patched"))
def test_a_users_router_that_returns_two_or_three_values_is_read(router):
    """Its weights are (T, k) beside indices; on 5.x a stock block takes three values."""
    if router == "stock" and not V5:
        pytest.skip("the stock block of transformers 4 takes logits only")
    model = olmoe()

    def three(z):
        weights, experts = z.softmax(-1).topk(3)
        return z, weights, experts

    wrap_gates(model, three)
    with patched(model, ROUTERS[router]), moeprof.MoEProfiler(model) as profiler:
        model(token_ids())
    for name, metrics in profiler.get_metrics().items():
        assert name in ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
        assert metrics.k_mean == 3 and metrics.skipped_slots == 0
        assert 0 < metrics.router_confidence < 1


def test_slots_that_a_middleware_skips_are_counted_in_a_patched_model():
    model = olmoe()
    wrap_gates(model, choose)  # two values; slot 1 of every other token, and all of the first
    with moeprof.patch(model), moeprof.MoEProfiler(model) as profiler:
        model(token_ids(2, 11))
    for metrics in profiler.get_metrics().values():
        assert metrics.skipped_slots == 3 + 10  # the first token's three, then of 2, 4, ... 20
        assert metrics.tokens == 22 and metrics.k_distribution[0] == 1
        np.testing.assert_allclose(metrics.k_mean, (3 * 22 - 13) / 22)
        assert np.isnan(metrics.router_confidence)  # it said no logits


@pytest.mark.parametrize("implementation", ("eager", "grouped_mm"))
def test_a_middleware_that_skips_is_refused_in_a_stock_block(implementation):
    if not V5:
        pytest.skip("the stock block of transformers 4 takes logits only")
    model = olmoe()
    model.config._experts_implementation = implementation

    def three(z):
        weights, experts = choose(z)
        return z, weights, experts

    wrap_gates(model, three)
    with moeprof.MoEProfiler(model):
        with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate: .*patch the model"):
            model(token_ids())


def test_the_mask_that_is_given_comes_before_the_attention_mask():
    model, (ids, mask) = olmoe(), padded("left")
    given = np.ones((3, 12), int)
    given[1, 3:] = 0  # a sequence that ended after 3 tokens
    with moeprof.MoEProfiler(model, mask=given) as profiler:
        model(input_ids=ids, attention_mask=mask)
        profiler.mask = None
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids)
    counts = profiler._session.counts["prefill"][1]
    assert counts.k.sum(1).tolist() == [21 + 22 + 27, 6 + 5]


def test_what_is_generated_behind_a_mask_is_real():
    """One that reaches into what is generated says of its own columns only."""
    model, given = olmoe(), np.ones((2, 8), int)
    given[:, 7] = 0
    for mask, padding in ((given, 2), (torch.tensor(given), 2), (torch.ones(2, 8), 0)):
        with moeprof.MoEProfiler(model, mask=mask) as profiler:
            model.generate(token_ids(2, 6), max_new_tokens=6, min_new_tokens=6)
        counts = profiler._session.counts["decode"][0]
        assert counts.k.sum(1).tolist() == [10 - padding, padding]


@pytest.mark.parametrize("columns", (1, 7, 9))
def test_an_attention_mask_beside_a_cache_as_tuples(columns):
    """transformers 4 takes (key, value) of each layer; the mask may cover less, or more."""
    mask = torch.ones(2, columns, dtype=torch.long)
    mask[0, min(columns, 7) - 1] = 0
    key = torch.zeros(2, 4, 6, 8)
    given = {
        "input_ids": token_ids(2, 1),
        "attention_mask": mask,
        "past_key_values": ((key, key), (key, key)),
    }
    assert Entry(nn.Module(), (), given).real().tolist() == [False, True]


@pytest.mark.parametrize("shape", ((3, 8), (2, 9), (3, 1, 9, 8), (3,)))
def test_a_mask_that_does_not_fit_is_refused(shape):
    model, ids = olmoe(), token_ids(3, 9)
    with moeprof.MoEProfiler(model) as profiler:
        profiler.mask = np.ones(shape)
        with pytest.raises(ValueError, match="^mask: expected"):
            model(ids)
        profiler.mask = None
        with pytest.warns(UserWarning, match="1 of 3 rows begin or end in token"):
            model(ids)
    assert profiler.get_metrics()["model.layers.0.mlp.gate"].tokens == 27


def test_a_block_that_is_called_by_itself_is_counted():
    model = olmoe()
    with moeprof.MoEProfiler(model) as profiler:
        hidden = torch.randn(2, 5, 32)
        blocks(model)[1](hidden)
        blocks(model)[1](hidden_states=hidden[:, :1])
    counts = profiler._session.counts
    assert [counts[phase][1].tokens for phase in PHASES] == [0, 0, 0, 12]
    assert counts["unknown"][0].steps == 0


class Own(nn.Module):
    """A user's model without input_ids, of one block that takes what it is given."""

    def __init__(self, block):
        super().__init__()
        self.mlp = block

    def forward(self, x):
        return self.mlp(x)


class Flat(nn.Module):
    """A block that takes rows (T, H), and uses its first expert."""

    def __init__(self):
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        self.gate(x)
        return x


@pytest.mark.parametrize("router", ("stock", "patched"))
def test_the_phase_of_a_model_without_input_ids_is_unknown(router):
    model = Own(blocks(olmoe())[0])
    with patched(model, ROUTERS[router]), moeprof.MoEProfiler(model) as profiler:
        for shape in ((3, 1, 32), (2, 5, 32)):
            model(torch.randn(shape))
    counts = profiler._session.counts
    assert [counts[phase][0].tokens for phase in PHASES] == [0, 0, 0, 13]
    assert profiler._session.steps == 2


def test_rows_show_no_phase():
    model = Own(Flat())
    with moeprof.MoEProfiler(model) as profiler:
        model(torch.randn(1, 32))
    assert [profiler._session.counts[phase][0].tokens for phase in PHASES] == [0, 0, 0, 1]


@pytest.mark.filterwarnings("ignore:null")
def test_slots_that_a_named_router_leaves_empty_are_not_the_users_gate_skips():
    def three(z):
        weights, experts = z.softmax(-1).topk(3)
        return z, weights, experts

    model = olmoe()
    wrap_gates(model, three)
    with patched(model, {**ROUTERS["bh"], "alpha": 0.05}), moeprof.MoEProfiler(model) as profiler:
        model(token_ids())
    for metrics in profiler.get_metrics().values():
        assert metrics.k_mean < 4 and metrics.skipped_slots == 0


def test_one_mask_for_all_rows():
    """(1, 1, S, S): as SDPA takes it, of numbers that are added, for two rows of tokens."""
    mask = torch.full((1, 1, 4, 4), torch.finfo(torch.float32).min)
    mask[..., 1:, 1:] = torch.triu(mask[0, 0, 1:, 1:], 1)
    given = {"input_ids": token_ids(2, 4), "attention_mask": mask}
    assert Entry(nn.Module(), (), given).real().tolist() == 2 * [False, True, True, True]


def test_of_masks_by_kind_of_layer_that_of_full_attention_counts():
    causal = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    full = causal.clone()
    full[..., 0, 0] = False
    given = {"input_ids": token_ids(1, 3)}
    for masks in ({"sliding_attention": causal, "full_attention": full}, {"other": full}):
        entry = Entry(nn.Module(), (), {**given, "attention_mask": masks})
        assert entry.real().tolist() == [False, True, True]
    assert Entry(nn.Module(), (), {**given, "attention_mask": {}}).real() is None


def test_the_base_model_is_an_entry_too():
    model, (ids, mask) = olmoe(), padded("left")
    with moeprof.MoEProfiler(model) as profiler:
        model.model(input_ids=ids, attention_mask=mask)
        model.model(ids, mask)  # by position
    assert profiler._session.counts["prefill"][0].k.sum(1).tolist() == [44, 10]


def test_the_trace_keeps_the_last_calls(monkeypatch):
    monkeypatch.setattr("moeprof.profiler.session.MAX_EVENTS", 3)
    model = olmoe()
    with moeprof.MoEProfiler(model, trace=True) as profiler:
        for length in (3, 4, 5):
            model(token_ids(1, length))
    result = profiler.result()
    assert [(event[0], event[4]) for event in result.events] == [(1, 4), (0, 5), (1, 5)]
    assert result.facts["notes"] == ["the trace lacks the first 3 calls of layers"]
