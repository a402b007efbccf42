"""Profiles at the edge: hostile words, layers without steps, nothing selected, one expert."""

import copy
import math
import re

import numpy as np
import pytest
from profiles import FACTS, layer, make_profile
from wording import says

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


def of_domains(**rows):
    """A profile of one layer of 8 experts; rows: {domain: its experts' loads, its tokens}."""
    counts = {phase: [Counts(8)] for phase in PHASES}
    counts["prefill"][0].steps += 1
    counts["prefill"][0].k[0, 2] = 1  # a token, so that there are figures
    domains = {name: np.array([row]) for name, row in rows.items()}
    return Profile([layer(0, 8, 2)], counts, {}, domains=domains)


def said_of_domains(profile):
    text = " ".join(profile.summary().split())  # a line may end among the words
    return re.search(r"(Most specialised by domain|Domains): .*?[.](?= )", text)[0]


BUSY = [90, 40, 20, 20, 10, 10, 10, 0, 100]  # expert 0 is busy in every domain


def test_the_most_specialised_expert_is_the_one_that_the_others_select_less():
    own = [90, 10, 20, 20, 40, 10, 10, 0, 100]
    profile = of_domains(code=BUSY, law=own, bible=BUSY)
    assert says(said_of_domains(profile), "expert 4 of layer 0", "40 % of the 100 tokens of law")
    assert says(said_of_domains(profile), "by 10 % of those of the other domains")
    frame = most_by_domain(profile)
    assert frame[["domain", "expert"]].values.tolist() == [["law", 4]]  # nothing of expert 0
    assert frame["others"].tolist() == [0.1] and frame["times"].tolist() == [0.4 / 0.25]
    (row,) = tables.domains(profile).rows
    assert row == ["law", "0", "4", "40.0 %", "10.0 %", "+30.0", "25.0 %", "1.6"]
    figure = profile.plot("domains")
    shown = [axis.get_images()[0].get_array() for axis in figure.axes if axis.get_images()]
    assert [round(float(table[0, 4])) for table in shown] == [0, 30, 0]
    assert all(table.mask[0].tolist() == 7 * [False] + [True] for table in shown)
    assert [float(table[0, 0]) for table in shown] == [0, 0, 0]


def test_domains_alike_show_no_difference():
    profile = of_domains(a=BUSY, b=BUSY)
    assert says(said_of_domains(profile), "Domains: no difference", "no expert")
    assert not most_by_domain(profile).size and "By domain" not in profile.summary()
    for axis in profile.plot("domains").axes:
        for image in axis.get_images():
            assert not image.get_array().any()


def test_a_difference_of_a_few_tokens_is_no_finding():
    """Of 16 two-sided binomial tests the smallest p must be below 0.05 / 16."""
    few = [7, *[0] * 7, 7]
    profile = of_domains(few=few, many=[8, *[20] * 4, *[0] * 3, 44])
    assert says(said_of_domains(profile), "Domains: no difference")
    frame = profile.domain_specialisation()
    for row in frame.to_dict("records"):
        own = round(row["share"] * row["tokens"])
        both = own + round(row["others"] * (51 - row["tokens"]))
        chance = [math.comb(both, n) * row["tokens"] ** n for n in range(both + 1)]
        chance = [c * (51 - row["tokens"]) ** (both - n) for n, c in enumerate(chance)]
        tails = sum(chance[: own + 1]), sum(chance[own:])
        assert row["p"] == pytest.approx(min(2 * min(tails) / 51**both, 1))
    rare = of_domains(few=few, many=[0, *[20] * 4, *[0] * 3, 44])
    assert says(said_of_domains(rare), "expert 0", "100 % of the 7 tokens of few", "by 0.0 %")


def test_one_domain_has_none_to_compare_with():
    profile = of_domains(only=BUSY)
    assert "omain" not in profile.summary() and "domains" not in profile.figures
    assert profile.domain_specialisation()[["others", "p"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="two domain"):
        profile.plot("domains")
    assert "omain" not in of_domains(only=BUSY, none=9 * [0]).summary()


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
