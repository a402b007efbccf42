"""Parameters, defaults and ranges: in every help, in docs/routers.md, and as they are; max_k."""

import inspect
import re
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from nulls import random_logits
from routing import NAMES, any_null, make, route

import moeprof
from moeprof.routers import REGISTRY, table
from moeprof.routers.base import own_fields, parameters_of

pytestmark = pytest.mark.once

every_router = pytest.mark.parametrize("name", NAMES)
ON_NULL = [name for name, cls in REGISTRY.items() if cls.wants_null]
ON_LOGITS = [name for name, cls in REGISTRY.items() if not cls.wants_null and name != "topk"]


# ---- what the help says ----


def test_the_page_is_current():
    page = Path(__file__).parents[1] / "docs" / "routers.md"
    assert page.read_text() == table.page(), (
        "docs/routers.md is out of date: write it anew with python -c "
        "\"from moeprof.routers.table import page; print(page(), end='')\""
    )


@every_router
def test_every_parameter_stands_in_every_help(name):
    cls = REGISTRY[name]
    function = getattr(moeprof, f"{name}_routing")
    for f in parameters_of(cls):
        default = f'"{f.default}"' if isinstance(f.default, str) else str(f.default)
        line = re.compile(rf"^    {f.name} *= {re.escape(default)} ", re.M)
        assert line.search(cls.__doc__), f.name
        if name != "topk":  # it has positions of its own for its arguments
            assert line.search(function.__doc__), f.name
    for f in own_fields(cls):
        assert re.search(rf"^  [* ] {f.name} = ", patch_entry(cls), re.M)
        if interval := f.metadata.get("interval"):
            assert interval in cls.__doc__ and interval in patch_entry(cls)
    assert f"* {cls.main} = " in patch_entry(cls)
    none = {"topk": "k"}.get(name, "min(16, E)" if cls.wants_null else "E, no cap")
    assert f"None is {none}" in cls.__doc__ and f"None is {none}" in patch_entry(cls)


def patch_entry(cls) -> str:
    """What the help of `patch` says of one router."""
    text = inspect.getdoc(moeprof.patch)
    _, _, after = text.partition(f"\n{cls.name} ({cls.__name__})")
    assert after, "the router is missing"
    return re.split(r"\n(?=\S)", after)[0]


def test_all_are_there():
    entries = re.findall(r"^(\w+) \((\w+)\); max_k None is ", inspect.getdoc(moeprof.patch), re.M)
    assert entries and entries == [(name, cls.__name__) for name, cls in REGISTRY.items()]


# ---- max_k=None ----


@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("experts", [8, 64, 257, 512])
def test_routers_on_the_logits_have_no_cap(name, experts):
    router = REGISTRY[name]()
    assert router.limits(experts) == (1, experts) and router.silent_cap(experts) is None
    logits = random_logits(50, experts)
    got = route(router, logits)
    weights, rejections = router.reference(logits)
    np.testing.assert_array_equal(got.counts, np.maximum(rejections, 1))
    np.testing.assert_array_equal(got.counts, (weights > 0).sum(axis=1))


def test_top_p_takes_what_it_needs():
    logits = random_logits(40, 64)
    counts = moeprof.top_p_routing(logits, 0.99).expert_counts
    assert counts.max() > 16 and len(set(counts.tolist())) > 3
    p = np.sort(np.exp(logits - logits.max(axis=1, keepdims=True)), axis=1)[:, ::-1]
    needed = 1 + (np.cumsum(p, axis=1) < 0.99 * p.sum(axis=1, keepdims=True)).sum(axis=1)
    np.testing.assert_array_equal(counts, needed)


@pytest.mark.parametrize("name", ON_NULL)
def test_routers_on_a_null_keep_theirs(name):
    router = REGISTRY[name]()
    assert router.limits(64) == (1, 16) and router.silent_cap(64) == 16
    assert router.limits(16) == (1, 16) and router.silent_cap(16) is None
    assert router.limits(4) == (1, 4) and router.silent_cap(4) is None
    assert REGISTRY[name](max_k=16).silent_cap(64) is None


@every_router
@pytest.mark.parametrize("experts", [64, 512])
def test_a_max_k_of_all_experts(name, experts):
    """As many slots as there are experts, and what lies in them is each expert at most once."""
    logits = random_logits(40, experts)
    router = make(name, experts, max_k=experts)
    got = route(router, logits, null=any_null(name, experts))
    assert got.experts.shape == (40, experts)
    for row, count in zip(got.experts, got.counts, strict=True):
        assert len(set(row[:count].tolist())) == count and (row[count:] == -1).all()


# ---- the warning ----


def capped_share(capped: int, tokens: int = 1000):
    """Logits of which so many tokens have 20 experts that stand out, the others one."""
    logits = np.random.default_rng(0).normal(0, 0.1, (tokens, 64)).astype(np.float32)
    logits[:, 0] = 50
    logits[:capped, :20] = 50
    return logits


@pytest.mark.parametrize("function", ["bh_routing", "benjamini_hochberg_routing"])
@pytest.mark.parametrize("capped, warns", [(0, False), (10, False), (11, True), (1000, True)])
def test_functions_warn_beyond_one_in_a_hundred(function, capped, warns):
    logits = capped_share(capped)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(moeprof, function)(logits, 0.01, null="normal")
    messages = [str(w.message) for w in caught]
    assert len(messages) == warns
    if warns:
        assert f"{capped} of 1000 tokens would have more" in messages[0]
        assert "max_k=64 for no cap" in messages[0] and caught[0].filename == __file__


@pytest.mark.parametrize("options", [{"max_k": 16}, {"max_k": 64}])
def test_a_max_k_that_is_given_is_silent(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moeprof.bh_routing(capped_share(1000), 0.01, null="normal", **options)


# ---- numbers beyond a float ----


HUGE = [10**400, -(10**400), Fraction(10**400, 3), 10**5000]


@pytest.mark.parametrize("value", HUGE, ids=["1e400", "-1e400", "fraction", "1e5000"])
@every_router
def test_numbers_beyond_a_float_are_value_errors(name, value):
    cls = REGISTRY[name]
    for f in parameters_of(cls):
        if f.name in ("u", "v") or (f.metadata and not f.metadata["interval"]):
            continue
        with pytest.raises((ValueError, TypeError), match=f.name) as caught:
            cls(**{f.name: value}).limits(64)
        assert caught.type is ValueError and len(str(caught.value)) < 300
