"""Profiles at the edge: hostile words, layers without steps, nothing selected, one expert."""

import copy

import numpy as np
import pytest
from profiles import FACTS, layer, make_profile

from moeprof.models.phases import PHASES
from moeprof.profile import tables
from moeprof.profile.result import Profile
from moeprof.profile.specialisation import most_by_domain
from moeprof.profiler.tally import Counts

pytestmark = pytest.mark.once

HOSTILE = ("<script>alert(1)</script>", ":smile: [bold]x[/bold]", r"costs $1 $\frac{", "long " * 30)


def drawn(profile):
    """Every figure, the page, the summary; the summary."""
    for name in profile.figures:
        profile.plot(name).canvas.draw()
    assert "<script" not in profile.to_html() + profile._repr_html_()
    summary = profile.summary()
    assert max(map(len, summary.splitlines())) <= 100
    assert "nan" not in summary
    return summary


def one_expert():
    """One layer whose only expert is always selected: nothing is left to choose."""
    profile = make_profile(1, 2, 1)
    counts = {}
    for phase, (own,) in profile.counts.items():
        made = Counts(1)
        for name in ("steps", "nanoseconds", "latency", "batch_steps"):
            getattr(made, name)[...] = getattr(own, name)
        made.k[0, 1] = made.load[0, 0] = made.pairs[0, 0] = made.confidence[99] = own.tokens
        made.unique[1] = made.reuse[0] = own.steps
        made.batch_unique[:] = own.batch_steps
        made.probability[:] = own.tokens
        counts[phase] = [made]
    return Profile([layer(0, 1, 1)], counts, profile.facts, roofline=profile.roofline)


def test_hostile_labels_are_shown_as_they_are():
    """No markup, emoji code or formula is made of them, nor a page's script."""
    profile = make_profile(2, 8, 2, domains=HOSTILE, prefill=(40,) * 4, facts={"model": HOSTILE[0]})
    summary = drawn(profile)
    assert ":smile: [bold]x[/bold]" in summary and r"costs $1 $\frac{" in summary
    titles = [axis.get_title(loc="left") for axis in profile.plot("domains").axes]
    assert max(map(len, titles)) < 90
    assert "&lt;script&gt;" in profile.to_html()


@pytest.mark.filterwarnings("error")
def test_an_unreached_first_layer_is_no_obstacle():
    profile = make_profile(3, 8, 2)
    counts = {phase: [Counts(8), *profile.counts[phase][1:]] for phase in PHASES}
    made = Profile(profile.layers, counts, profile.facts, roofline=profile.roofline)
    row = next(line for line in drawn(made).splitlines() if line.strip().startswith("0 "))
    assert set(row.split()) == {"0", "–"}


def test_tokens_without_any_expert():
    profile = make_profile(2, 8, 2, skip=1.0)
    summary = drawn(profile)
    assert "cache" not in profile.figures and "coactivation" not in profile.figures
    assert "By domain" not in summary  # it would have no row
    with pytest.raises(ValueError, match="no expert ran"):
        profile.plot("cache")


def test_one_expert_has_nothing_to_choose():
    profile = one_expert()
    summary = drawn(profile)
    assert "1 layer of 1 expert, top-1" in summary and "Layer 0: model.layers.0.mlp" in summary
    assert not {"confidence", "cache", "coactivation"} & set(profile.figures)
    metrics = profile.each()[0]
    for name in ("router_confidence", "router_gap", "expert_load_entropy"):
        assert np.isnan(getattr(metrics, name))


def test_a_token_without_its_text_is_its_number():
    assert tables._token({"text": None, "token": 262, "share": 1.0}) == "#262 100 %"
    assert tables._token({"text": "#262", "token": 1, "share": 0.5}) == "'#262' 50 %"


def test_the_most_specialised_expert_comes_with_the_number_of_tokens():
    profile = make_profile(2, 8, 2, prefill=(46, 45), decode=())
    text = " ".join(profile.summary().split())  # a line may end among the words
    assert any(f"of the {n} tokens of" in text for n in (45, 46))


def test_an_expert_of_few_tokens_is_not_called_specialised():
    layers = [layer(0, 8, 2)]
    counts = {phase: [Counts(8)] for phase in PHASES}
    counts["prefill"][0].steps += 1
    tables = {"few": [7, *[0] * 7, 7], "many": [8, *[20] * 4, *[0] * 3, 44]}
    domains = {name: np.array([row]) for name, row in tables.items()}
    profile = Profile(layers, counts, {}, domains=domains)
    frame = most_by_domain(profile)
    assert set(frame["domain"]) == {"many"} and frame["expert"].tolist()[-1] == 0
    assert "tokens of few" not in profile.summary()


def test_a_comparison_without_a_common_phase_has_no_table():
    prefill, decode = (make_profile(2, 8, 2, **{phase: ()}) for phase in ("decode", "prefill"))
    comparison = prefill.compare(decode)
    assert "By layer" not in comparison.summary() and "<table" not in comparison._repr_html_()
    assert "first has none" in comparison.summary()


def test_times_of_other_conditions_are_told_apart():
    first = make_profile(2, 8, 2)
    assert "conditions" not in first.compare(first).summary()
    facts = copy.deepcopy(FACTS)
    facts["machine"]["threads"] = 1
    said = " ".join(first.compare(make_profile(2, 8, 2, facts=facts)).summary().split())
    assert "conditions: Some CPU @ 2.00GHz, 2 threads, Some GPU, float32; Some CPU" in said
    assert "1 thread, Some GPU, float32" in said


def test_padding_is_said_to_cost_more_than_none():
    profile = make_profile(2, 8, 2, padding=0.5)
    both = profile.each()
    real, computed = (
        sum(getattr(m, f"flops_total{end}") for m in both) for end in ("", "_with_padding")
    )
    assert computed > real
    said = " ".join(profile.summary().split())
    assert f"computed as well, {computed / real:.2f} times the FLOPs" in said


def test_the_minimum_of_occurrences_is_enough():
    profile = make_profile(1, 4, 1)
    counts = np.zeros((1, 2, 4), np.int64)
    counts[0, 0, 1], counts[0, 1, 2] = 8, 7
    words = {
        "tokens": [5, 6],
        "layers": [0],
        "counts": counts,
        "seen": np.array([8, 7]),
        "text": None,
    }
    made = Profile(profile.layers, profile.counts, profile.facts, vocabulary=words)
    assert made.vocabulary_specialisation(8)["token"].tolist() == [5]
