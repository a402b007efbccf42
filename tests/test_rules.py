"""The rules of models' own routers in C (csrc/rule.h) against their formulas in NumPy float64."""

import numpy as np
import pytest
from scipy import special, stats

from moeprof import _C
from moeprof.backends.spec import PLAIN, RouteSpec, Rule
from moeprof.routers import BH, Entropy, TopK, TopP

pytestmark = pytest.mark.once

E, T = 24, 40
RNG = np.random.default_rng(3)
LOGITS = RNG.normal(0, 2, (T, E)).astype(np.float32)
BIAS = RNG.normal(0, 0.2, E).astype(np.float32)
SCALES = RNG.uniform(0.5, 2, E).astype(np.float32)

RULES = {
    "softmax": PLAIN,
    "sigmoid": Rule("sigmoid"),
    "sqrt_softplus": Rule("sqrt_softplus"),
    "biased softmax": Rule(bias=BIAS / 10),
    "biased sigmoid": Rule("sigmoid", bias=BIAS),
    "far bias": Rule("sigmoid", bias=BIAS + 30),
    "one bias for all": Rule("sigmoid", bias=np.full(E, 0.5, np.float32)),
    "on logits": Rule("sigmoid", bias=BIAS, on_logits=True),
    "groups by the best": Rule(groups=4, top_groups=2, best=1),
    "DeepSeek-V3": Rule("sigmoid", BIAS, groups=6, top_groups=3, best=2, epsilon=1e-20, scale=2.5),
    "zeroed": Rule("sigmoid", BIAS - 0.3, groups=6, top_groups=3, best=2, zeroed=True),
    "scales": Rule(expert_scale=SCALES, scale=3.0, rounds=False),
    "floor": Rule(floor=0.9),
    "epsilon": Rule("sigmoid", epsilon=0.5),
    "sparsemixer": Rule("sparsemixer", jitter=0.2),
}


def affinities(rule, logits):
    z = logits.astype(np.float64)
    return {
        "softmax": lambda: special.softmax(z, axis=1),
        "sparsemixer": lambda: special.softmax(z, axis=1),
        "sigmoid": lambda: special.expit(z),
        "sqrt_softplus": lambda: np.sqrt(np.logaddexp(0, z)),
    }[rule.affinity]()


def bias_of(rule):
    return np.zeros(E) if rule.bias is None else rule.bias.astype(np.float64)


def chosen_by(rule, logits):
    """What the model chooses by; -inf in groups that a token may not use."""
    score = (logits if rule.on_logits else affinities(rule, logits)) + bias_of(rule)
    by_group = score.reshape(len(score), rule.groups, -1)
    value = np.sort(by_group, axis=2)[:, :, -rule.best :].sum(axis=2)
    worse = np.argsort(value, axis=1)[:, : rule.groups - rule.top_groups]
    for row, groups in zip(by_group, worse, strict=True):
        row[groups] = 0 if rule.zeroed else -np.inf
    return by_group.reshape(score.shape)


def choice_logits(rule, logits):
    """What a router sees in place of the logits, groups apart."""
    bias = bias_of(rule)
    if rule.on_logits:
        return logits + bias
    if rule.affinity in ("softmax", "sparsemixer") and not np.ptp(bias):
        return logits.astype(np.float64)
    if rule.zeroed:
        return np.log(chosen_by(rule, logits) - min(bias.min(), 0))
    return np.log(affinities(rule, logits) + (bias - bias.min()))


def affinities_of(rule, logits, ids):
    """The affinities of the experts ids (T, k), in this order."""
    if rule.affinity != "sparsemixer":
        return np.take_along_axis(affinities(rule, logits), ids, 1)
    logits = logits.astype(np.float64)
    left, found = logits.copy(), np.empty(ids.shape)
    for r in range(ids.shape[1]):
        best = left.max(axis=1, keepdims=True)
        near = best - left <= 2 * rule.jitter * np.maximum(abs(logits), best)
        shares = special.softmax(np.where(near, left, -np.inf), axis=1)
        found[:, r : r + 1] = np.take_along_axis(shares, ids[:, r : r + 1], 1)
        np.put_along_axis(left, ids[:, r : r + 1], -np.inf, 1)
    return found


def weights_of(rule, logits, ids, norm, k):
    """The weights of the chosen experts ids (T, k), -1 for none."""
    used = ids >= 0
    weights = np.where(used, affinities_of(rule, logits, np.maximum(ids, 0)), 0)
    if norm != "none":
        total = weights.sum(axis=1, keepdims=True)
        own = np.argsort(-chosen_by(rule, logits), axis=1)[:, :k]
        mass = 1
        if norm == "mass":
            mass = affinities_of(rule, logits, own).sum(axis=1, keepdims=True)
        weights = weights / np.maximum(total + rule.epsilon, rule.floor) * mass
    own = np.ones(E) if rule.expert_scale is None else rule.expert_scale
    return weights * rule.scale * np.where(used, own[ids], 0)


def route(router, logits, rule, norm="sum", k=4):
    spec = router.spec(E, norm=norm, norm_k=k, rule=rule)
    return _C.route(logits, spec.in_c("float32"), 1, True)


@pytest.fixture(params=RULES)
def rule(request):
    return RULES[request.param]


def test_choice_logits(rule):
    spec = TopK(2).spec(E, norm="sum", rule=rule)
    z = _C.choice_logits(LOGITS, spec.in_c("float32"))
    assert np.allclose(z, choice_logits(rule, LOGITS), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("norm", ["none", "sum", "mass"])
def test_top_k_is_the_models_own_choice_and_its_weights(rule, norm):
    weights, ids, counts, *_ = route(TopK(4), LOGITS, rule, norm)
    best = np.argsort(-chosen_by(rule, LOGITS), axis=1)[:, :4]
    assert (np.sort(ids, axis=1) == np.sort(best, axis=1)).all() and (counts == 4).all()
    assert np.allclose(weights, weights_of(rule, LOGITS, ids, norm, 4), rtol=2e-6, atol=1e-7)


def test_the_mass_of_more_experts_than_were_chosen(rule):
    weights, ids, *_ = route(TopK(2), LOGITS, rule, "mass", 5)
    assert np.allclose(weights, weights_of(rule, LOGITS, ids, "mass", 5), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "router", [TopP(0.7), Entropy(0.4), BH(0.3, max_k=8)], ids=lambda r: r.name
)
def test_a_router_counts_by_what_the_model_chooses_by(rule, router):
    """On the experts that a token may use, and with p-values of all."""
    weights, ids, counts, rejections, p = route(router, LOGITS, rule)
    z, allowed = choice_logits(rule, LOGITS), np.isfinite(chosen_by(rule, LOGITS))
    for t in range(T):
        own = np.flatnonzero(allowed[t])
        expected = router.reference(z[t : t + 1, own])[1][0]
        if router.name == "bh":
            middle = np.median(z[t])
            spread = 1.4826022 * np.median(abs(z[t] - middle))
            p_t = stats.norm.sf((z[t] - middle) / spread)
            assert np.allclose(p[t], p_t, rtol=1e-4, atol=1e-12)
            ranks = np.arange(1, len(own) + 1)
            passed = np.sort(p_t[own]) * len(own) <= 0.3 * ranks
            expected = ranks[passed].max(initial=0)
        assert rejections[t] == expected
        assert counts[t] == np.clip(expected, 1, router.limits(E, len(own))[1])
        chosen = ids[t, : counts[t]]
        assert set(chosen) == set(own[np.argsort(-z[t, own], kind="stable")][: counts[t]])
    assert np.allclose(weights, weights_of(rule, LOGITS, ids, "sum", 4), rtol=2e-6, atol=1e-7)


def test_a_bias_means_the_same_whatever_is_added_to_all_of_it():
    near, far = (route(TopP(0.5), LOGITS, RULES[name]) for name in ("biased sigmoid", "far bias"))
    assert (near[1] == far[1]).mean() > 0.99  # 30 more costs the last bits of the bias


def test_temperature_acts_on_the_weights_only():
    rule = RULES["biased sigmoid"]
    plain, hot = route(TopK(4), LOGITS, rule), route(TopK(4, temperature=2.0), LOGITS, rule)
    assert (plain[1] == hot[1]).all()
    expected = weights_of(rule, LOGITS / 2, hot[1], "sum", 4)
    assert np.allclose(hot[0], expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("affinity", ["sigmoid", "sqrt_softplus"])
def test_affinities_too_small_for_a_float_are_still_in_order(affinity):
    logits = np.linspace(-300, -150, E, dtype=np.float32)[None]
    weights, ids, *_ = route(TopK(3), logits, Rule(affinity))
    assert list(ids[0]) == [E - 1, E - 2, E - 3]
    z = _C.choice_logits(logits, TopK(3).spec(E, norm="sum", rule=Rule(affinity)).in_c("float32"))
    assert np.isfinite(z).all() and (np.diff(z) > 0).all()


def test_weights_are_rounded_where_the_rule_says_so():
    for rounds in (True, False):
        spec = TopK(4).spec(E, norm="sum", rule=Rule("sigmoid", rounds=rounds))
        weights = _C.route(LOGITS, spec.in_c("bfloat16"), 1, False)[0]
        halves = (weights.view(np.uint32) & 0xFFFF) == 0
        assert halves.all() == rounds


def test_infinite_logits():
    logits = LOGITS[:1].copy()
    logits[0, :3], logits[0, 3:6] = np.inf, -np.inf
    for name, rule in RULES.items():
        weights, ids, *_ = route(TopK(3), logits, rule)
        # The root of infinity is infinite, and so is a model's own sum of such affinities.
        assert np.isfinite(weights).all() or rule.affinity == "sqrt_softplus", name
        if rule.groups == 1 and rule.bias is None:
            assert set(ids[0]) == {0, 1, 2}, name


BAD = {
    "groups": (Rule(groups=5, top_groups=1), "24 experts in 1 to 64 groups of equal size, got 5"),
    "top_groups": (Rule(groups=4, top_groups=5), "groups"),
    "best": (Rule(groups=6, top_groups=2, best=5), "groups"),
    "bias": (Rule(bias=BIAS[:-1]), "bias: expected a finite number for each of 24 experts"),
    "nan": (Rule(bias=np.full(E, np.nan, np.float32)), "bias: expected a finite number"),
    "expert_scale": (Rule(expert_scale=BIAS[:3]), "expert_scale: expected a finite number"),
    "affinity": (
        Rule("tanh"),
        "affinity: expected softmax, sigmoid, sqrt_softplus or sparsemixer, got tanh",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_rule_that_can_not_be(name):
    rule, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        TopK(2).spec(E, norm="sum", rule=rule).in_c("float32")


@pytest.mark.parametrize("router", [TopK(9), BH(max_k=9)], ids=lambda r: r.name)
def test_more_experts_than_the_groups_that_a_token_may_use_have(router):
    with pytest.raises(ValueError, match="8"):
        router.spec(E, norm="sum", rule=Rule(groups=6, top_groups=2))
    assert BH().limits(E, 8) == (1, 8)


def test_a_spec_survives_the_way_through_an_operator_of_torch():
    made = BH(0.2, max_k=4).spec(E, norm="mass", norm_k=3, rule=RULES["DeepSeek-V3"])
    text, p_table, table = made.operands()
    again = RouteSpec.from_operands(text, p_table, table)
    for one, other in zip(made.arguments[9], again.arguments[9], strict=True):
        assert np.array_equal(one, other)
    assert made.arguments[:9] == again.arguments[:9]
