"""Routers as they are written in commands and files."""

import pytest

import moeprof
from moeprof.checks import nearest
from moeprof.routers import REGISTRY, Kneedle, StoreyBH
from moeprof.routers.written import written_router

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("text", "router", "budget"),
    [
        ("bh", moeprof.BH(), None),
        ("bh:alpha=0.3,max_k=16", moeprof.BH(0.3, max_k=16), None),
        (" bh : alpha = 3e-1 , max_k = 16 ", moeprof.BH(0.3, max_k=16), None),
        ("topk:k=4", moeprof.TopK(4), None),
        ("kneedle:on=log,c=0", Kneedle(on="log", c=0), None),
        ("storey_bh:pi0=None", StoreyBH(pi0=None), None),
        ("bh@6", moeprof.BH(), 6.0),
        ("bh@4.5:max_k=16,temperature=2", moeprof.BH(max_k=16, temperature=2), 4.5),
    ],
)
def test_what_is_written_is_what_is_made(text, router, budget):
    assert written_router(text) == (router, budget)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_router_can_be_written(name):
    assert written_router(name) == (REGISTRY[name](), None)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("BH", ["there is no 'BH'", "the nearest is 'bh'"]),
        ("top_k:k=4", ["'top_k'", "the nearest is 'topk'"]),
        ("bh:alhpa=0.3", ["bh takes no 'alhpa'", "the nearest is 'alpha'", "max_k"]),
        ("bh:budget=6", ["takes no 'budget'"]),
        ("zzz", ["expected one of bh, by, "]),
        ("bh:alpha=3", ["alpha: expected a number in (0, 1), got 3"]),
        ("bh:alpha=much", ["alpha: expected a number in (0, 1), got 'much'"]),
        ("topk:k=4.5", ["k: expected an integer"]),
        ("bh:alpha", ["expected KEY=VALUE, got 'alpha'"]),
        ("bh:", ["expected a router and its parameters"]),
        ("", ["expected a router and its parameters"]),
        ("bh@", ["expected a router and its parameters"]),
        ("bh@six", ["experts per token after @, got 'six'"]),
        ("bh@-1", ["got '-1'"]),
        ("bh@nan", ["got 'nan'"]),
        ("bh@6:alpha=0.3", ["alpha is what the budget sets"]),
        ("bh:alpha=0.1,alpha=0.2", ["alpha is there twice"]),
    ],
)
def test_what_is_written_wrongly_is_said_in_one_line(text, parts):
    with pytest.raises(ValueError) as error:
        written_router(text)
    said = str(error.value)
    assert "\n" not in said and said.startswith(f"router {text!r}: ")
    assert all(part in said for part in parts), said


def test_the_nearest_is_named_only_where_one_is_near():
    assert nearest("Alpha", ["beta", "alpha"]) == "the nearest is 'alpha', of alpha, beta"
    assert nearest("x", ["beta", "alpha"]) == "expected one of alpha, beta"
