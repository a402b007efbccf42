"""What `patch` and a patched model refuse: NaN, unreadable routers, arguments, other models."""

import pytest
import torch
from models import (
    LAYER_1,
    ONE,
    V5,
    assert_unchanged,
    blocks,
    choose,
    eager_olmoe,
    fit_null,
    llama,
    logits,
    olmoe,
    random_hidden,
    scores,
    snapshot,
    wrap_gates,
)
from zoo import build

import moeprof

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def model():
    return eager_olmoe()


# ---- NaN ----


@pytest.mark.parametrize("router", [None, moeprof.BH(0.1)], ids=["own", "bh"])
def test_nan_in_hidden_states(model, router):
    x = random_hidden(2, 3, 32)
    x[1, 1, 5] = torch.nan
    with moeprof.patch(model, router, null="normal" if router else None):
        with pytest.raises(ValueError, match=f"{LAYER_1}: .*row 4 has a NaN"):
            blocks(model)[1](x)
        logits(model)  # the patch is as good as before


def test_nan_in_router_logits(model):
    blocks(model)[1].gate.weight[4, 0] = torch.nan
    with moeprof.patch(model), pytest.raises(ValueError, match=f"{LAYER_1}: .*row 0 has a NaN"):
        logits(model)


def test_row_without_any_expert(model):
    def change(z):
        z = z.clone()
        z[2] = -torch.inf
        return z

    wrap_gates(model, change)
    words = r"model\.layers\.0\.mlp: .*row 2 .*-inf"
    with moeprof.patch(model), pytest.raises(ValueError, match=words):
        logits(model)


# ---- routers of users that can't be read ----


def test_router_needs_logits(model):
    wrap_gates(model, choose)
    with moeprof.patch(model, ONE):
        words = r"Router output format unexpected: model\.layers\.0\.mlp: .*TopK.* works on logits"
        with pytest.raises(ValueError, match=words):
            logits(model)


@pytest.mark.skipif(V5, reason="the block of transformers 5 returns no router logits")
def test_weights_are_not_passed_off_as_logits(model):
    """A router that gives none must not end as an auxiliary loss over its weights."""
    wrap_gates(model, choose)
    with moeprof.patch(model):
        _, router_logits = blocks(model)[1](random_hidden(1, 6, 32))
    assert router_logits is None or router_logits.shape == (6, 8)


UNREADABLE = {
    "None": lambda z: None,
    "a string": lambda z: "logits",
    "a dict": lambda z: {"logits": z},
    "nothing": lambda z: (),
    "too few experts": lambda z: z[:, :5],
    "too few rows": lambda z: z[1:],
    "integers": lambda z: z.long(),
    "a vector": lambda z: z[0],
    "float indices": lambda z: (choose(z)[0], choose(z)[1].float()),
    "indices alone": lambda z: choose(z)[1],
    "the wrong way round": lambda z: choose(z)[::-1],
    "other widths": lambda z: (choose(z)[0], choose(z)[1][:, :2]),
    "four values": lambda z: (z, z, *choose(z)),
    "with None": lambda z: (z, None, None),
    "a mask": lambda z: (scores(z), scores(z) > 0),
}


@pytest.mark.parametrize("output", UNREADABLE)
def test_unreadable_output_of_a_router(model, output):
    wrap_gates(model, UNREADABLE[output])
    with moeprof.patch(model):
        with pytest.raises(ValueError, match="Router output format unexpected.*wanted.*; got "):
            logits(model)


@pytest.mark.parametrize("index", [9, -2, 2**40])
def test_index_that_is_no_expert(model, index):
    wrap_gates(model, lambda z: (choose(z)[0], choose(z)[1].fill_(index)))
    with (
        moeprof.patch(model),
        pytest.raises(ValueError, match=r"model\.layers\.0\.mlp \(olmoe\): .*index"),
    ):
        logits(model)


def test_experts_numbered_from_1_are_noticed(model):
    """A slot with their number is empty where a library says so, with weight 0."""
    weights = torch.tensor([0.5, 0.5])
    for last, fails in ((0.0, False), (0.5, True)):
        weights[1] = last

        def router(z, weights=weights):
            return weights.expand(len(z), 2), torch.tensor([0, 8]).expand(len(z), 2)

        with moeprof.patch(model, router):
            if fails:
                with pytest.raises(ValueError, match="layers.0.mlp.*expert 8: .*numbered from 0"):
                    logits(model)
            else:
                logits(model)


# ---- arguments ----

BAD = {
    "router": (dict(router="nope"), ValueError, r"router: expected one of .*'bh'.*got 'nope'"),
    "router kind": (dict(router=3), TypeError, "router: expected a name or a Router, got int"),
    "keyword": (dict(router="bh", beta=1), TypeError, r"unknown parameters \['beta'\].*alpha"),
    "object": (dict(router=ONE, k=2), TypeError, r"no further parameters: \['k'\]"),
    "no router": (dict(k=2, alpha=0.1), TypeError, r"\['alpha', 'k'\] given without a router"),
    "null, topk": (dict(router=ONE, null="normal"), ValueError, "null: given, but the router"),
    "null, own": (dict(null="normal"), ValueError, "null: given, but the router"),
    "null kind": (dict(router="bh", null=3), TypeError, "null: expected a Null.*got int"),
    "null file": (dict(router="bh", null="no.npz"), FileNotFoundError, "no such null.*no.npz"),
    "norm": (dict(norm="l2"), ValueError, r"norm: expected one of .*'mass'.*got 'l2'"),
    "k": (dict(router="topk", k=9), ValueError, r"k: expected at most 8 \(experts\), got 9"),
    "max_k": (dict(router="bh", max_k=9, null="normal"), ValueError, "max_k: expected 1 to 8"),
    "alpha": (dict(router="bh", alpha=1.0), ValueError, r"alpha: .*\(0, 1\), got 1.0"),
    "temperature": (dict(router="topk", temperature=0), ValueError, "temperature: .* > 0, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(model, case):
    options, kind, words = BAD[case]
    before = snapshot(model)
    with pytest.raises(kind, match=words):
        moeprof.patch(model, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("other", [dict(seed=1), dict(num_hidden_layers=3), dict(num_experts=6)])
def test_null_of_another_model(model, other):
    null, before = fit_null(olmoe(**other)), snapshot(model)
    with pytest.raises(ValueError, match="null was fitted to .*, not to"):
        moeprof.patch(model, "bh", null=null)
    assert_unchanged(model, before)


@pytest.mark.parametrize("face", [moeprof.patch, moeprof.OLMoERouterPatcher])
@pytest.mark.parametrize(
    "make, found",
    [(llama, "none"), (lambda: build("jetmoe"), "JetMoeMoE")],
    ids=["llama", "jetmoe"],
)
def test_model_without_known_blocks(make, found, face):
    other = make()
    words = f"No routers found in {type(other).__name__}.*: looked for .*a gate and experts.*: "
    with pytest.raises(ValueError, match=f"{words}.*{found}"):
        face(other)
