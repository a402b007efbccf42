"""Tables of texts, which the summary and the page both show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..show.tables import Table, fine, with_interval
from .specialisation import LEVEL, MINIMUM, most_by_domain
from .wording import layer_names, number, short

if TYPE_CHECKING:
    import pandas

    from .metrics import LayerMetrics
    from .types import Profiled


EXPERTS = 3  # shown of each end of a layer
DOMAIN_ROWS, TOKENS = 4, 6  # experts shown of each domain; tokens shown of an expert
TOKEN_ROWS = 12  # experts shown, over all layers, but at least one of each


def _roof(metrics: LayerMetrics) -> str:
    return number(100 * max(metrics.mbu, metrics.mfu), ".0f")


# (name, text of a LayerMetrics)
LAYER_COLUMNS: tuple[tuple[str, Callable[[LayerMetrics], str]], ...] = (
    ("k", lambda m: number(m.k_mean, ".2f")),
    ("Gini", lambda m: number(m.expert_load_gini, ".2f")),
    ("max", lambda m: number(m.expert_load_max_imbalance, ".1f")),
    ("conf", lambda m: number(m.router_confidence, ".2g")),
    ("uniq", lambda m: number(m.unique_experts_mean, ".1f")),
    ("p50", lambda m: short(m.latency_ms_p50)),
    ("p99", lambda m: short(m.latency_ms_p99)),
)
LAYER_NOTE = (
    "k: experts per token. Gini: how unequal the experts' loads are, 0 if alike. max: the largest "
    "load over the mean. conf: how sure the router is, 0 to 1. uniq: distinct experts a step. "
    "p50, p99: ms a step."
)
ROOF_NOTE = " roof: % of the measured bandwidth or matrix product rate, whichever is nearer."


def layers(profile: Profiled, names: Sequence[str]) -> Table:
    """A row for each layer, the phases of these names beside each other."""
    columns = list(LAYER_COLUMNS)
    note = f"{layer_names(profile.layers)}. {LAYER_NOTE}"
    if profile.roofline is not None:
        columns.append(("roof", _roof))
        note += ROOF_NOTE
    phases = {phase: profile.each(phase) for phase in names}
    rows = [
        [str(label), *(text(phases[phase][i]) for phase in phases for _, text in columns)]
        for i, label in enumerate(profile.labels)
    ]
    heads = [("", "layer"), *((phase, name) for phase in phases for name, _ in columns)]
    return Table("By layer", note, heads, rows)


def experts(profile: Profiled) -> Table:
    """Of each layer the experts that are selected most and least, over all phases."""
    rows = []
    for label, m in zip(profile.labels, profile.each(), strict=True):
        load = m.counts.load[0]
        if not load.sum():
            continue
        times = load / load.mean()
        order = np.argsort(-load, kind="stable")
        count = min(EXPERTS, len(load) // 2)
        ends = order[:count], order[len(load) - count :][::-1]
        cells = (", ".join(f"{e} ({short(times[e])}×)" for e in end) for end in ends)
        rows.append([str(label), *cells])
    return Table(
        "Most and least used experts",
        "By how many tokens select them, over all phases; in brackets the times of a layer's mean.",
        [("", name) for name in ("layer", "most used", "least used")],
        rows,
        ("most used", "least used"),
    )


def by_batch(profile: Profiled) -> Table:
    """A row for each batch size that `moeprof profile` decoded with."""
    rows = [
        [
            str(row["batch"]),
            str(row["steps"]),
            number(row["k"], ".2f"),
            number(row["unique_experts"], ".1f"),
            short(row["latency_ms"]),
            number(row["bytes"] / 1e6, ".2f"),
        ]
        for row in profile.decode_by_batch
    ]
    return Table(
        "Decode by batch size",
        "steps: of decode, at this batch size alone. k: experts per token. "
        "uniq: distinct experts of a layer and step. p50: ms a step in MoE layers, the sum of the "
        "layers' medians. MB: of weights that a step reads.",
        [("", name) for name in ("batch", "steps", "k", "uniq", "p50", "MB")],
        rows,
    )


def domains(profile: Profiled) -> Table:
    """The experts that each domain selects more often than the others do."""
    frame = most_by_domain(profile)
    rows: list[list[str]] = []
    for label in profile.domains or ():
        best = frame[frame["domain"] == label].head(DOMAIN_ROWS).to_dict("records")
        rows += [
            [
                label if not i else "",
                str(r["layer"]),
                str(r["expert"]),
                f"{100 * r['share']:.1f} %",
                f"{100 * r['others']:.1f} %",
                f"+{100 * (r['share'] - r['others']):.1f}",
                f"{100 * r['baseline']:.1f} %",
                f"{r['times']:.1f}",
            ]
            for i, r in enumerate(best)
        ]
    return Table(
        "By domain",
        "The experts that a larger share of a domain's tokens selects than of the others, those of "
        "the other domains; more: the difference in points. Two-sided binomial tests of all "
        f"experts, {100 * LEVEL:.0f} % for all together, tell these from chance as if tokens were "
        "independent, which those of one document are not. k/E: an even choice; times: share over "
        "k/E.",
        [
            ("", name)
            for name in ("domain", "layer", "expert", "share", "others", "more", "k/E", "times")
        ],
        rows,
        ("domain",),
    )


def vocabulary(profile: Profiled, minimum: int = MINIMUM) -> Table:
    """Of each layer the experts that their input tokens single out most, with these tokens."""
    frame = profile.vocabulary_specialisation(minimum, top=TOKENS)
    assert profile.vocabulary is not None  # the line before has raised
    each = max(TOKEN_ROWS // len(profile.vocabulary["layers"]), 1)
    rows = []
    for layer, of in frame.groupby("layer"):
        groups = list(of.groupby("expert"))
        groups.sort(key=lambda item: -item[1]["times"].sum())  # many such tokens before one
        rows += [
            [str(layer), str(expert), ", ".join(map(_token, group.to_dict("records")))]
            for expert, group in groups[:each]
        ]
    left_out = "" if rows else f" No input token occurred {minimum} times."
    return Table(
        "By input token",
        f"Of a token's occurrences the share that selects the expert; of each "
        f"layer the experts whose tokens are the most above k/E. Tokens that occurred fewer than "
        f"{minimum} times are left out. All experts: vocabulary.csv.{left_out}",
        [("", name) for name in ("layer", "expert", "tokens")],
        rows,
        ("tokens",),
    )


def _token(row: Mapping[str, Any]) -> str:
    name = repr(row["text"]) if isinstance(row["text"], str) else f"#{row['token']}"
    return f"{name} {100 * row['share']:.0f} %"


def agreement(frame: pandas.DataFrame) -> Table:
    """Of what `agreement_by_layer` returned."""
    rows = [
        [
            str(r["layer"]),
            f"{r['tokens']:,}",
            *(f"{100 * r[name]:.1f} %" for name in ("agreement", "at_most", "same_experts")),
        ]
        for r in frame.to_dict("records")
    ]
    return Table(
        "Agreement with the model's own router",
        "The router beside the model's own top-k on the same text. agreement: mean of |S ∩ S'| / k "
        "(S: the model's own k experts of a token, S': the router's). at most: what it would be "
        "with the router's number of experts, had it taken those of S first. same experts: of the "
        "tokens, those with the very same ones.",
        [("", name) for name in ("layer", "tokens", "agreement", "at most", "same experts")],
        rows,
    )


def ablation(frame: pandas.DataFrame) -> Table:
    """Of what `layer_ablation` returned."""
    rows = [
        [
            str(r["layer"]),
            str(r["k"]),
            f"{r['loss']:.4f}",
            with_interval(*change, fine(*change)),
        ]
        for r in frame.to_dict("records")
        for change in [(r["loss_change"], r["low"], r["high"])]
    ]
    return Table(
        "What a layer's experts are worth",
        "The loss, in nats per token, when one layer takes its top k only, and its change against "
        "the model's own k [95 % interval over documents].",
        [("", name) for name in ("layer", "k", "loss", "change of loss")],
        rows,
    )


def tables(profile: Profiled) -> list[Table]:
    """All that the profile has numbers for."""
    if not profile.phases:
        return []
    side_by_side = [profile.phases[i : i + 2] for i in range(0, len(profile.phases), 2)]
    made = [layers(profile, names) for names in side_by_side] + [experts(profile)]
    if len(profile.decode_by_batch) > 1:
        made.append(by_batch(profile))
    if profile.domains is not None:
        made.append(domains(profile))
    if profile.vocabulary is not None:
        made.append(vocabulary(profile))
    return [table for table in made if table.rows or table.title == "By input token"]
