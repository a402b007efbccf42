"""Routing in torch against the C path, over the cases of the C kernels.

Which routers there are is asked of the registry: a new one without a form in torch fails here.
"""

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import util
from nulls import random_logits
from routing import (
    CASES,
    NAMES,
    any_null,
    case_id,
    layer_null,
    logits_of,
    make,
    nulls_of,
    off_boundaries,
    some_nulls,
)
from test_router_kernels import BAD_ROWS
from test_rules import BIAS, LOGITS, RULES
from torch.utils._python_dispatch import TorchDispatchMode

from moeprof.backends.c import C
from moeprof.backends.spec import PLAIN, Rule
from moeprof.backends.torch import nulls, prepared, routing
from moeprof.backends.torch.counts import ROUTERS, step_up_levels
from moeprof.backends.torch.routing import route
from moeprof.backends.torch.rule import choice
from moeprof.routers import BH, REGISTRY, TopK, TopP

pytestmark = pytest.mark.once

WIDTHS = (1, 2, 8, 64, 256, 512)
HALVES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
NORMS = ("none", "sum", "mass")
every_case = pytest.mark.parametrize("case", CASES, ids=case_id)
every_router = pytest.mark.parametrize("name", NAMES)


def spec_of(router, experts, *, null=None, norm="sum", norm_k=1, rule=PLAIN):
    return router.spec(experts, norm=norm, norm_k=norm_k, null=null, rule=rule)


def agree(router, z, *, null=None, norm="sum", norm_k=1, dtype=torch.float32):
    """The same routing by C and torch, but for tokens whose R hangs on the last bits."""
    agree_on(
        spec_of(router, z.shape[1], null=null, norm=norm, norm_k=norm_k), router, z, null, dtype
    )


def agree_on(spec, router, z, null, dtype=torch.float32):
    """`agree` of a spec that was made before: what it takes to prepare it is done once."""
    logits = torch.from_numpy(z).to(dtype)
    ours, other = route(logits, spec, dtype), C.route(logits, spec, dtype)
    assert [t.dtype for t in ours] == [t.dtype for t in other]
    assert [t.shape for t in ours] == [t.shape for t in other]
    weights, ids, counts, rejections = other
    same = (ours[3] == rejections) & (ours[1] == ids).all(1)
    if not same.all():
        steady = off_boundaries(router, logits.float().numpy(), null)
        assert same[torch.from_numpy(steady)].all(), f"{router}: {(~same).nonzero()[:, 0]}"
        assert same.float().mean() > 0.99
    assert torch.equal(ours[2][same], counts[same])
    size = weights[same].double().abs()
    tol = 1e-6 + (0 if dtype == torch.float32 else 2 * util.HALF_ULP[HALVES[dtype]] * size)
    util.assert_close(ours[0][same], weights[same], np.asarray(tol), f"{router} {spec.norm}")


# ---- the forms ----


def test_every_router_has_a_form_in_torch_that_takes_its_parameters():
    assert set(ROUTERS) == set(REGISTRY)
    for name, form in ROUTERS.items():
        _, *taken = inspect.signature(form.rejections).parameters
        assert taken == list(make(name, 8).parameters(layer_null("logprob", 8))), name


@pytest.mark.parametrize("alpha", (0.05, 0.1, 1 / 3, 0.3 / 4.744, 1e-300, 5e-324, 7.0, 1e308))
@pytest.mark.parametrize("experts", (1, 3, 8, 60, 64))
def test_levels_are_the_largest_p_that_is_rejected(alpha, experts):
    for r, level in enumerate(step_up_levels(alpha, experts).tolist(), 1):
        assert Fraction(level) * experts <= Fraction(alpha) * r
        above = math.nextafter(level, math.inf)
        assert Fraction(above) * experts > Fraction(alpha) * r
    assert np.isinf(step_up_levels(math.inf, experts)).all()


@pytest.mark.parametrize("kind", ("logprob", "conformal"))
def test_least_scores_are_where_p_reaches_a_level(kind):
    spec = spec_of(make("bh", 8), 8, null=layer_null(kind, 8))
    levels = np.array([0.0, 1e-300, 1e-5, 0.01, 0.3, 1.0])
    least = nulls.least_scores(spec, lambda spec: levels)
    own = prepared.Prepared.of(spec, torch.device("cpu"))
    none = np.isnan(least)
    assert none[0] and least[-1] == -np.inf and (np.diff(least[~none]) <= 0).all()
    for level, score in zip(levels[~none][:-1], least[~none][:-1], strict=True):
        either = torch.tensor([score, math.nextafter(score, -math.inf)], dtype=torch.float64)
        reaches, short = nulls.p_of_scores(own, either).tolist()
        assert reaches <= level < short
    beyond = torch.tensor([math.inf], dtype=torch.float64)
    assert (nulls.p_of_scores(own, beyond).numpy() > levels[none]).all()


# ---- against C ----


@every_case
@pytest.mark.parametrize("experts", WIDTHS)
def test_torch_is_c(case, experts):
    name, own = case
    kinds = some_nulls(case, WIDTHS, experts) if experts <= 64 else nulls_of(name, own)[:1]
    limits = {"max_k": experts}, {"min_k": min(2, experts)}
    for i, kind in enumerate(kinds, WIDTHS.index(experts)):
        null, router = layer_null(kind, experts), make(name, experts, **own)
        spec, z = spec_of(router, experts, null=null), logits_of(150, experts)
        agree_on(spec, router, z, null)
        for dtype in (torch.bfloat16, torch.float16):
            agree_on(spec, router, z[:60].clip(-6e4, 6e4), null, dtype)
        agree(make(name, experts, **own, **limits[i % 2]), z[:80], null=null)


@every_case
def test_thousands_of_tokens(case):
    name, own = case
    for seed, kind in enumerate(nulls_of(name, own)):
        z = random_logits(2000, 64, seed)
        agree(make(name, 64, **own), z, null=layer_null(kind, 64))


@pytest.mark.parametrize("dtype", HALVES, ids=HALVES.get)
@pytest.mark.parametrize("norm", NORMS)
@every_router
def test_norms(name, norm, dtype):
    z = logits_of(100, 32).clip(-6e4, 6e4)
    for temperature in (1.0, 0.5):
        router = make(name, 32, min_k=2, temperature=temperature)
        agree(router, z, null=any_null(name, 32), norm=norm, norm_k=6, dtype=dtype)


@pytest.mark.parametrize("temperature", (0.125, 8.0, 1e39, 1e-50))
@every_router
def test_temperatures(name, temperature):
    agree(make(name, 64, temperature=temperature), logits_of(100, 64), null=any_null(name, 64))


@pytest.mark.parametrize("limits", ((1, 1), (3, 5), (7, 7), (63, 63)))
@every_router
def test_limits(name, limits):
    min_k, max_k = limits
    router = make(name, 64, min_k=min_k, max_k=max_k)
    agree(router, logits_of(100, 64), null=any_null(name, 64))


@every_router
def test_ties_go_to_the_lower_id(name):
    even = {"u": None} if name == "weighted_bh" else {}
    z = torch.tensor(np.round(np.random.default_rng(0).normal(0, 1, (200, 64))))
    spec = spec_of(make(name, 64, **even, min_k=20, max_k=20), 64, null=any_null(name, 64))
    _, ids, _, _ = route(z.bfloat16(), spec, torch.bfloat16)
    assert torch.equal(ids.long(), z.sort(dim=1, descending=True, stable=True).indices[:, :20])


@pytest.mark.parametrize("dtype", (*HALVES, torch.float64), ids=str)
@every_router
def test_no_tokens(name, dtype):
    spec = spec_of(make(name, 8, max_k=8), 8, null=any_null(name, 8))
    out = route(torch.empty((0, 8), dtype=dtype), spec, dtype)
    assert [tuple(t.shape) for t in out] == [(0, 8), (0, 8), (0,), (0,)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in out] == [wide, *[torch.int32] * 3]


@every_router
def test_float64_logits(name):
    """The same experts as of the same numbers in float32, and weights in float64."""
    z, null = random_logits(200, 64), any_null(name, 64)
    spec = spec_of(make(name, 64), 64, null=null)
    weights, *selection = route(torch.from_numpy(z).double(), spec, torch.float64)
    narrow, *expected = route(torch.from_numpy(z), spec, torch.float32)
    assert weights.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(selection, expected, strict=True))
    chosen = selection[0] >= 0
    z = torch.from_numpy(z).double().gather(1, selection[0].clamp(min=0).long())
    ref = torch.softmax(z.masked_fill(~chosen, -torch.inf), 1)
    assert torch.allclose(weights, ref, rtol=1e-13, atol=0)
    assert torch.allclose(narrow, ref.float(), rtol=1e-6, atol=0)


# ---- models' own rules ----


def steady(logits, spec, dtype):
    """The tokens that C routes in the same way when the logits are moved by some last bits."""
    routings = [C.route(logits * (1 + off), spec, dtype) for off in (-4e-7, 0, 4e-7)]
    same = [(r[1] == routings[1][1]).all(1) & (r[3] == routings[1][3]) for r in routings]
    return same[0] & same[2]


BY_RULE = [
    TopK(4),
    TopK(4, temperature=2.0),
    TopP(0.7),
    BH(0.3, max_k=8),
    make("weighted_bh", 24, alpha=0.3, max_k=8),
    make("gap_ratio", 24),
]
MANY = np.concatenate([LOGITS, random_logits(1000, 24)])


@pytest.mark.parametrize("router", BY_RULE, ids=lambda r: f"{r.name} {r.temperature}")
@pytest.mark.parametrize("name", RULES)
def test_rules(name, router):
    """Each norm with two of the routers of a rule, and with five rules of a router."""
    norm = NORMS[(list(RULES).index(name) + BY_RULE.index(router)) % 3]
    rule, logits = RULES[name], torch.from_numpy(MANY)
    spec = spec_of(router, 24, norm=norm, norm_k=5, rule=rule)
    z = choice(prepared.Prepared.of(spec, logits.device), logits)[0]
    assert torch.allclose(z, C.choice_logits(logits, spec, torch.float32), rtol=1e-6, atol=2e-6)
    ours, other = route(logits, spec, torch.float32), C.route(logits, spec, torch.float32)
    kept = steady(logits, spec, torch.float32)
    assert kept.float().mean() > 0.97
    for a, b in zip(ours[1:], other[1:], strict=True):
        assert torch.equal(a[kept], b[kept])
    most = max(1.0, rule.scale * (1 if rule.expert_scale is None else rule.expert_scale.max()))
    util.assert_close(ours[0][kept], other[0][kept], 1e-6 * most, name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rules_in_16_bits(name, dtype):
    """Where logits tie all the time, and weights are rounded, or not, as the rule says."""
    logits, rule = torch.from_numpy(MANY).to(dtype), RULES[name]
    spec = spec_of(TopK(4), 24, norm_k=4, rule=rule)
    ours, other = route(logits, spec, dtype), C.route(logits, spec, dtype)
    same = (ours[1] == other[1]).all(1)
    assert same.float().mean() > 0.995
    size = other[0][same].double()
    rounding = 2 * util.HALF_ULP[HALVES[dtype]] * size if rule.rounds else 0
    util.assert_close(ours[0][same], other[0][same], np.asarray(3e-6 + rounding), name)
    assert torch.equal(ours[0], ours[0].to(dtype).float()) == rule.rounds


@pytest.mark.parametrize("name", RULES)
def test_infinite_logits_by_rule(name):
    logits = torch.from_numpy(LOGITS.copy())
    logits[0, :3], logits[0, 3:6], logits[1, 5], logits[2, ::2] = (
        math.inf,
        -math.inf,
        math.inf,
        -math.inf,
    )
    for norm in NORMS:
        spec = spec_of(TopK(3), 24, norm=norm, norm_k=4, rule=RULES[name])
        ours, other = route(logits, spec, torch.float32), C.route(logits, spec, torch.float32)
        assert torch.equal(ours[1], other[1])
        util.assert_close(ours[0], other[0], 1e-5, f"{name} {norm}")


@pytest.mark.parametrize("affinity", ("sigmoid", "sqrt_softplus"))
def test_affinities_too_small_for_a_float(affinity):
    logits = torch.linspace(-300, -150, 24)[None]
    spec = spec_of(TopK(3), 24, rule=Rule(affinity))
    ours, other = route(logits, spec, torch.float32), C.route(logits, spec, torch.float32)
    assert torch.equal(ours[1], other[1])
    if affinity == "sigmoid":  # of the root C has nothing left in fp32
        util.assert_close(ours[0], other[0], 1e-6)


# ---- what can't be routed ----


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
@every_router
def test_an_unusable_row(name, bad, monkeypatch):
    """An error that names the first, as in C. Where asking would take a wait for the device, the
    row's weights are NaN, and all else is as without it."""
    z = logits_of(300, 4)
    spec = spec_of(make(name, 4), 4, null=any_null(name, 4))
    good = route(torch.from_numpy(z), spec, torch.float32)
    broken = torch.from_numpy(z)
    broken[[70, 37, 299]] = torch.tensor(bad, dtype=torch.float32)
    for dtype in HALVES:
        with pytest.raises(ValueError, match="row 37 has a NaN or no entry above -inf"):
            route(broken.to(dtype), spec, dtype)
    monkeypatch.setattr(routing, "_check_rows", lambda unusable: None)
    weights, ids, counts, rejections = route(broken, spec, torch.float32)
    rows = torch.zeros(300, dtype=torch.bool)
    rows[[70, 37, 299]] = True
    assert weights[rows].isnan().all()
    assert ((ids >= -1) & (ids < 4)).all() and ((counts >= 1) & (counts <= spec.max_k)).all()
    assert ((rejections >= 0) & (rejections <= 4)).all()
    for a, b in zip((weights, ids, counts, rejections), good, strict=True):
        assert torch.equal(a[~rows], b[~rows])


def test_what_is_not_a_spec_or_not_its_logits():
    spec = spec_of(TopK(2), 8)
    for shape in ((3, 7), (8,), (1, 3, 8)):
        with pytest.raises(ValueError, match="router_logits: expected 8 experts"):
            route(torch.zeros(shape), spec, torch.float32)
    bad = spec_of(TopK(2), 24, rule=Rule(bias=BIAS[:-1]))
    with pytest.raises(ValueError, match="bias: expected a finite number for each of 24"):
        route(torch.zeros(3, 24), bad, torch.float32)


# ---- on other devices ----


class OnOneDevice(TorchDispatchMode):
    """Fails where an operation has a tensor of another device: to bring it there takes a copy,
    which waits. Those whose shape or whose number hang on the data fail on meta by themselves."""

    def __init__(self, device):
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        self.operations += 1
        for values in (arguments, found if isinstance(found, (tuple, list)) else (found,)):
            for tensor in values:
                if isinstance(tensor, torch.Tensor):
                    assert tensor.device.type == self.device, function
        return found


def run_on_meta(spec, dtype=torch.bfloat16, tokens=7):
    logits = torch.empty((tokens, spec.num_experts), dtype=dtype, device="meta")
    route(logits, spec, dtype)  # what is made once is there
    with OnOneDevice("meta") as mode:
        weights, ids, counts, rejections = route(logits, spec, dtype)
    assert weights.shape == ids.shape == (tokens, spec.max_k)
    assert counts.shape == rejections.shape == (tokens,)
    assert weights.dtype == torch.float32 and ids.dtype == counts.dtype == torch.int32
    return mode.operations


@every_case
def test_nothing_waits_for_the_device(case):
    """Every null; the norms by turns, which look at no router."""
    name, own = case
    for i, kind in enumerate(nulls_of(name, own), CASES.index(case)):
        null, norm = layer_null(kind, 16), NORMS[i % len(NORMS)]
        router = make(name, 16, **own, temperature=0.7)
        run_on_meta(spec_of(router, 16, null=null, norm=norm, norm_k=4))


@pytest.mark.parametrize("name", RULES)
def test_nothing_waits_for_the_device_by_rule(name):
    for router in BY_RULE:
        run_on_meta(spec_of(router, 24, norm="mass", norm_k=4, rule=RULES[name]))


def test_a_wait_would_be_seen(monkeypatch):
    spec = spec_of(TopK(2), 8)
    taken = routing._taken

    def waiting(logits, spec):
        logits.amax().item()
        return taken(logits, spec)

    monkeypatch.setattr(routing, "_taken", waiting)
    with pytest.raises(RuntimeError, match="item"):
        run_on_meta(spec)

    def copying(logits, spec):
        return taken(logits + torch.ones(8).to(logits.device), spec)

    monkeypatch.setattr(routing, "_taken", copying)
    with pytest.raises(AssertionError, match="ones|_to_copy"):
        run_on_meta(spec)


@pytest.mark.parametrize(
    ("name", "kind", "most"),
    [("topk", "normal", 30), ("bh", "logprob", 40), ("bh", "normal", 60)],
)
def test_few_operations(name, kind, most):
    """Each costs some microseconds; views count too."""
    assert run_on_meta(spec_of(make(name, 64), 64, null=layer_null(kind, 64))) <= most


@pytest.mark.parametrize("name", ("topk", "storey_bh", "weighted_bh", "higher_criticism"))
def test_a_compiler_takes_it_as_one_graph(name):
    """Once the spec is prepared, for which one call is enough, be it of no tokens."""
    z = torch.from_numpy(random_logits(50, 24))
    kind = "each" if name == "weighted_bh" else "logprob"
    spec = spec_of(make(name, 24), 24, null=layer_null(kind, 24), rule=RULES["biased sigmoid"])
    route(z[:0], spec, torch.float32)
    compiled = torch.compile(
        lambda z: route(z, spec, torch.float32), backend="eager", fullgraph=True
    )
    for ours, other in zip(compiled(z), route(z, spec, torch.float32), strict=True):
        assert torch.equal(ours, other)


@every_case
def test_where_there_is_no_float64(case, monkeypatch):
    """As on MPS: the same but for counts that hang on the last bits of float32."""
    monkeypatch.setattr(prepared, "precise", lambda device: torch.float32)
    name, own = case
    z = torch.from_numpy(random_logits(1000, 64))
    for kind in nulls_of(name, own):
        spec = spec_of(make(name, 64, **own), 64, null=layer_null(kind, 64))
        ours, other = route(z, spec, torch.float32), C.route(z, spec, torch.float32)
        same = (ours[1] == other[1]).all(1)
        assert same.float().mean() > 0.99, kind
        assert torch.allclose(ours[0][same], other[0][same], rtol=0, atol=2e-6)


# ---- gradients ----


def check_gradient(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((2, spec.num_experts), dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: route(z, spec, torch.float64)[0], (logits,))


@every_case
def test_gradients(case):
    """One norm and null each: a gradient sees of a router only which experts were chosen."""
    name, own = case
    i = CASES.index(case)
    kinds, norm = nulls_of(name, own), NORMS[i % len(NORMS)]
    null = layer_null(kinds[i // len(NORMS) % len(kinds)], 8)
    router = make(name, 8, **own, temperature=0.7, max_k=8)
    check_gradient(spec_of(router, 8, null=null, norm=norm, norm_k=3))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", RULES)
def test_gradients_by_rule(name, norm):
    check_gradient(spec_of(TopK(4), 24, norm=norm, norm_k=5, rule=RULES[name]))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", RULES)
def test_gradients_of_ties_and_infinities_are_finite(name, norm):
    logits = torch.from_numpy(LOGITS.copy()).bfloat16()
    logits[0], logits[1, :3], logits[2, ::2], logits[3] = 1.0, math.inf, -math.inf, -3e38
    logits.requires_grad_()
    spec = spec_of(TopK(4), 24, norm=norm, norm_k=5, rule=RULES[name])
    weights = route(logits, spec, torch.bfloat16)[0]
    usual = weights.isfinite().all(1)  # the root of an infinite logit is infinite
    (weights[usual] * torch.arange(4)).sum().backward()
    assert logits.grad.dtype == torch.bfloat16 and logits.grad[usual].isfinite().all()
    assert logits.grad[4:].abs().sum() > 0


def test_gradients_after_inference_mode():
    spec = spec_of(make("bh", 24), 24, null=layer_null("logprob", 24), rule=RULES["scales"])
    with torch.inference_mode():
        route(torch.from_numpy(LOGITS), spec, torch.float32)
    check_gradient(spec)


def test_equal_logits_have_the_gradient_of_a_softmax():
    logits = torch.zeros((1, 4), requires_grad=True, dtype=torch.float64)
    weights = route(logits, spec_of(TopK(2), 4, norm="none"), torch.float64)[0]
    (gradient,) = torch.autograd.grad(weights[0, 0], logits)
    assert torch.allclose(gradient, torch.tensor([[3.0, -1, -1, -1]], dtype=torch.float64) / 16)
