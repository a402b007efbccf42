"""Routers by layer, and routers that a user wrote in Python, in a patched model."""

import copy

import pytest
import torch
from models import assert_unchanged, fit_null, olmoe, snapshot, token_ids

import moeprof
from moeprof import BH, TopK


def run(model, *args, **kwargs):
    """(logits, the numbers of experts by layer) of a patched model."""
    counts = {}
    with moeprof.patch(model, *args, **kwargs) as handle, torch.no_grad():
        handle.on_routing(lambda layer, routing: counts.update({layer: routing.counts}))
        out = model(input_ids=token_ids()).logits
    return out, [counts[layer].unique().tolist() for layer in sorted(counts)]


@pytest.mark.parametrize(
    "routers",
    [
        [TopK(1), TopK(3)],
        {0: TopK(1), 1: TopK(3)},
        {"model.layers.1.mlp": TopK(3), 0: TopK(1)},
        [TopK(1), lambda z: torch.softmax(z, -1).topk(3)],
    ],
)
def test_each_layer_has_its_router(routers):
    _, counts = run(olmoe(), routers)
    assert counts == [[1], [3]]


def test_layers_without_a_router_keep_the_models_own():
    model = olmoe()
    stock, _ = run(model)
    for routers in ([None, None], {}, {1: None}):
        out, counts = run(model, routers)
        assert counts == [[2], [2]] and torch.equal(out, stock)
    assert run(model, {1: TopK(5)})[1] == [[2], [5]]


def test_the_null_goes_to_the_layers_that_want_one():
    model = olmoe()
    null = fit_null(model)
    mixed, _ = run(model, {1: BH(0.3)}, null=null)
    own = run(model, [None, BH(0.3)], null=null)[0]
    assert torch.equal(mixed, own) and not torch.equal(mixed, run(model, "bh", null=null)[0])
    with pytest.raises(ValueError, match="null: given, but the router does not work on p-values"):
        moeprof.patch(model, {0: TopK(1)}, null=null)


@pytest.mark.parametrize(
    "routers, error, message",
    [
        ([TopK(1)], ValueError, "expected one for each of 2 layers, got 1"),
        ({2: TopK(1)}, ValueError, r"expected layers 0 to 1 or the names .* got \[2\]"),
        ({"gate": TopK(1)}, ValueError, "model.layers.0.mlp"),
        ({0: TopK(1), "model.layers.0.mlp": TopK(2)}, ValueError, "named twice"),
        ([TopK(1), 3], TypeError, "expected a name or a Router, got int"),
        ([TopK(1), TopK(9)], ValueError, "expected at most 8"),
    ],
)
def test_bad_routers_by_layer_change_nothing(routers, error, message):
    model = olmoe()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        moeprof.patch(model, routers)
    assert_unchanged(model, before)


def test_parameters_need_one_router():
    for routers in ([TopK(1), TopK(2)], {}, None, lambda z: z):
        with pytest.raises(TypeError, match="'k'"):
            moeprof.patch(olmoe(), routers, k=3)


def dense(z):
    weights, chosen = torch.softmax(z.float(), -1).topk(2)
    return torch.zeros(z.shape).scatter(1, chosen, weights)


def slots(z):
    return torch.softmax(z.float(), -1).topk(2)


def skipping(z):
    """The top 2 as weights and indices of four slots, two of them empty."""
    weights, chosen = slots(z)
    empty = torch.full_like(chosen, -1)
    return torch.cat([weights, weights], 1), torch.cat([chosen, empty], 1)


def by_function(z):
    """A RoutingResult; its weights sum to 1, so scaled back to those of the model."""
    result = moeprof.topk_routing(z, 2)
    mass = slots(z)[0].sum(1, keepdim=True)
    return result._replace(routing_weights=result.routing_weights * mass)


@pytest.mark.parametrize("router", [dense, slots, skipping, by_function])
def test_a_python_router_routes_as_the_models_own(router):
    model = olmoe()
    stock, _ = run(model)
    out, counts = run(model, router)
    assert counts == [[2], [2]]
    torch.testing.assert_close(out, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 7, 8])
def test_a_result_of_moeprofs_functions_has_a_weight_for_each_expert(k):
    """Also with max_k = E, where weights by expert and by slot have one shape."""
    model = olmoe()
    wanted, _ = run(model, TopK(k), norm="sum")
    out, counts = run(model, lambda z: moeprof.topk_routing(z, k))
    assert counts == [[k], [k]]
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_a_python_router_may_skip_tokens():
    model = olmoe()
    out, counts = run(model, lambda z: torch.zeros_like(z))
    assert counts == [[0], [0]] and not torch.isnan(out).any()


def test_negative_weights_are_selected_and_unselected_slots_are_not():
    z = torch.tensor([[0.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    weights, experts = moeprof.patching.callables.read_routing(z, torch.randn(2, 4), "layer")
    assert experts.tolist() == [[3, 1], [-1, -1]]
    assert weights[0].tolist() == [2.0, -1.0]


@pytest.mark.parametrize(
    "output",
    [None, torch.zeros(3, 5), (torch.zeros(22, 2),), torch.zeros(22, 8, dtype=torch.int64), "bh"],
)
def test_what_a_python_router_may_not_return(output):
    model = olmoe()
    before = snapshot(model)
    with pytest.raises(ValueError, match="Router output format unexpected: model.layers.0.mlp"):
        run(model, lambda z: output)
    assert_unchanged(model, before)


def test_numpy_is_no_tensor():
    with pytest.raises(ValueError, match="in tensors, weights .*; got ndarray"):
        run(olmoe(), lambda z: z.detach().softmax(-1).numpy())


@pytest.mark.parametrize(
    ("router", "said"),
    [
        (lambda z: z, "its logits, not weights"),
        (lambda z: z / 2, "its logits, not weights"),
        (lambda z: z.log_softmax(-1), "its logits, not weights"),
        (lambda z: z - z.amax(-1, keepdim=True), "its logits, not weights"),
        (lambda z: z.topk(2), "its logits, not weights"),
        (lambda z: torch.where(z >= z.topk(2).values[:, 1:], z, 0), "its logits, not weights"),
        (lambda z: torch.where(z > 1, z, -torch.inf), "weights that are NaN or infinite"),
        (lambda z: (slots(z)[0] / 0, slots(z)[1]), "weights that are NaN or infinite"),
        (lambda z: z.softmax(-1) * torch.nan, "weights that are NaN or infinite"),
        (lambda z: z.softmax(-1).to_sparse(), "a sparse tensor"),
        (lambda z: (slots(z)[0].to_sparse(), slots(z)[1]), "a sparse tensor"),
        (lambda z: (z[:, :0], z[:, :0].long()), "no slot"),
        (lambda z: slots(z)[::-1], "expected .weights, experts."),
    ],
)
def test_what_is_no_routing_is_named(router, said):
    model = olmoe()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=f"unexpected: model.layers.0.mlp .olmoe.: the router .* {said}"
    ):
        run(model, router)
    assert_unchanged(model, before)


def test_weights_of_any_size_and_sign_that_are_not_the_logits():
    z = torch.randn(6, 8)
    best = z.topk(2)
    for output in (
        100 * z.softmax(-1),
        (best.values.softmax(-1), best.indices),
        (-torch.rand(6, 2), best.indices),
    ):
        moeprof.patching.callables.read_routing(output, z, "layer")
    tied = torch.zeros(6, 8)
    moeprof.patching.callables.read_routing(
        (torch.full((6, 2), 0.5), tied.topk(2).indices), tied, "layer"
    )


def test_a_relu_of_the_logits_is_a_routing():
    """Other logits that are exactly the weights are taken for a mistake."""
    z = 5 * torch.randn(40, 8)
    moeprof.patching.callables.read_routing(z.relu(), z, "layer")
    with pytest.raises(ValueError, match="its logits, not weights"):
        moeprof.patching.callables.read_routing(z.topk(1), z, "layer")


def test_a_few_signed_weights_may_look_shifted_by_chance():
    """In bfloat16 two weights often differ from two logits by one number, within rounding."""
    weights = torch.tensor([[1.2, -0.2]])
    for seed in range(200):
        z = (8 * torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))).bfloat16()
        moeprof.patching.callables.read_routing((weights, z.topk(2).indices), z, "layer")


def test_a_broken_models_nans_go_through():
    z = torch.full((6, 8), torch.nan)
    moeprof.patching.callables.read_routing(z.softmax(-1), z, "layer")


def test_every_expert_of_every_token_may_be_selected():
    out, counts = run(olmoe(), lambda z: z.softmax(-1))
    assert counts == [[8], [8]] and not torch.isnan(out).any()


def test_signs_that_are_still_to_be_turned():
    """torch keeps a negation as a bit of the tensor until somebody reads it."""
    model = olmoe()
    wanted, _ = run(model, slots)

    def lazy(z):
        weights, chosen = slots(z)
        return torch._neg_view(-weights), torch._neg_view(-chosen)

    out, _ = run(model, lazy)
    assert torch.equal(out, wanted)
    z = torch.randn(5, 8)
    turned = moeprof.topk_routing(torch._neg_view(-z), 2).routing_weights
    assert torch.equal(turned, moeprof.topk_routing(z, 2).routing_weights)
    with pytest.raises(TypeError, match="router_logits: expected a dense tensor"):
        moeprof.topk_routing(z.to_sparse(), 2)


def test_an_index_outside_names_the_layer():
    bad = torch.full((22, 1), 9)
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp \(olmoe\): experts: an index is outside"
    ):
        run(olmoe(), lambda z: (torch.ones(22, 1), bad))


def test_a_copy_keeps_the_python_router():
    model = olmoe()
    with moeprof.patch(model, dense), torch.no_grad():
        copied = copy.deepcopy(model)
        out = model(input_ids=token_ids()).logits
        assert torch.equal(copied(input_ids=token_ids()).logits, out)


def test_routing_carries_the_logits_of_the_gate():
    model, seen = olmoe(), {}
    for router in (None, "topk", dense):
        with moeprof.patch(model, router) as handle, torch.no_grad():
            handle.on_routing(lambda layer, routing: seen.update({layer: routing}))
            model(input_ids=token_ids())
        for routing in seen.values():
            assert routing.logits.shape == (22, 8)
            best = routing.logits.argmax(1).to(torch.int32)
            assert torch.equal(best, routing.expert_ids[:, 0])
