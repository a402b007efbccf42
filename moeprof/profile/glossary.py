"""What each number of a profile means: one table, from which all glossaries are made.

`python -m moeprof.profile.glossary > docs/glossary.md` writes the one of the
documentation anew; a profile's folder gets glossary.csv, its page a section.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .specialisation import MINIMUM

SHARE = "share, 0 to 1"


class Entry(NamedTuple):
    """unit: "" where there is none; text: one sentence or two, with the formula."""

    unit: str
    text: str


METRICS = {
    name: Entry(unit, text)
    for name, unit, text in (
        ("tokens", "tokens", "Real tokens that the layer was given: T in what follows."),
        ("tokens_padding", "tokens", "Padding that the layer was given and computed as well."),
        (
            "steps",
            "calls",
            "Calls of the layer, one in each forward of the model. A forward that mixes phases, "
            "as in continuous batching, is one step in each of them, with the tokens of that phase "
            "and a part of the time by their number; in the phase all it is one step.",
        ),
        ("skipped_slots", "slots", "Slots of real tokens that the router set to -1."),
        ("skipped_slots_padding", "slots", "Slots of padding that the router set to -1."),
        (
            "dropped_selections",
            "selections",
            "Selections of real tokens that no expert ran (it had reached its capacity, or is not "
            "on this machine), less the rows that experts ran without being selected (one may take "
            "what others drop, or be filled up to its capacity): negative where there are more of "
            "these. nan where padding was among them.",
        ),
        (
            "dropped_selections_with_padding",
            "selections",
            "dropped_selections of real tokens and padding together.",
        ),
        (
            "flops_total",
            "FLOP",
            "flops_router + flops_expert + flops_shared + flops_adapter; a "
            "multiplication and an addition of a matrix product are two.",
        ),
        (
            "flops_router",
            "FLOP",
            "Of the router's matrix product, over the real tokens: 2·H·E a "
            "token for a linear one, with H the hidden size.",
        ),
        (
            "flops_expert",
            "FLOP",
            "Of the routed experts, over the rows of real tokens that ran: "
            "6·H·I a row where an expert has three matrices (gate, up, down), 4·H·I where it has "
            "two, with I the expert's own size. What was dropped "
            "costs nothing.",
        ),
        ("flops_shared", "FLOP", "Of the experts that every token passes, over the real tokens."),
        (
            "flops_adapter",
            "FLOP",
            "Of adapters that are multiplied out and added to all experts in "
            "every step, whatever runs (peft's target_parameters); 0 without such. A forward of "
            "several phases counts in each of them, and once in the phase all.",
        ),
        (
            "flops_total_with_padding",
            "FLOP",
            "flops_total of real tokens and padding together: what the machine computed.",
        ),
        (
            "k_mean",
            "experts",
            "Experts per real token, Σ k_t / T; a token whose slots were all skipped counts as 0.",
        ),
        ("k_mean_with_padding", "experts", "k_mean of real tokens and padding together."),
        (
            "k_distribution",
            "tokens",
            "Real tokens that use 0, 1, … E experts; the CSV has one row "
            "for each number that occurs, k_distribution_0 and so on.",
        ),
        ("active_experts", "experts", "Experts that a real token selected at least once."),
        ("expert_selections", "tokens", "N_i: real tokens that select expert i."),
        (
            "expert_load",
            SHARE,
            "N_i / Σ N: the expert's share of all selections; 1/E where all experts are alike.",
        ),
        ("expert_load_with_padding", SHARE, "expert_load of real tokens and padding together."),
        ("expert_load_std", SHARE, "Standard deviation of expert_load over the experts (ddof 0)."),
        ("expert_load_cv", "1", "expert_load_std over the mean load, 1/E."),
        (
            "expert_load_gini",
            "0 to (E − 1)/E",
            "Gini coefficient of N_i, 2 Σ r N_(r) / (E Σ N) − "
            "(E + 1)/E with N_(r) in ascending order; 0: all experts alike.",
        ),
        (
            "expert_load_gini_with_padding",
            "0 to (E − 1)/E",
            "expert_load_gini of real tokens and padding together.",
        ),
        (
            "expert_load_entropy",
            "0 to 1",
            "−Σ load·ln load / ln E; 1: all experts alike, 0: all selections on one.",
        ),
        ("expert_load_max_imbalance", "1", "The largest load over the mean load."),
        (
            "router_confidence",
            "0 to 1",
            "Mean over tokens of 1 − H(p)/ln E with p the softmax of "
            "the router's logits and H its entropy; 1: certain.",
        ),
        (
            "router_confidence_quartiles",
            "0 to 1",
            "25th, 50th and 75th percentile over tokens of 1 − H(p)/ln E, to within 0.005.",
        ),
        (
            "router_gap",
            "0 to 1",
            "Mean over tokens of p_(1) − p_(2), the distance of the two largest probabilities.",
        ),
        (
            "router_gap_quartiles",
            "0 to 1",
            "25th, 50th and 75th percentile over tokens of p_(1) − p_(2), to within 0.005.",
        ),
        (
            "router_probability",
            SHARE,
            "P_i: the expert's mean probability under the router's softmax.",
        ),
        (
            "load_balance_loss",
            "1",
            "E Σ_i f_i P_i with f_i = N_i / T; k where all experts are "
            "alike. Without a layer: f and P over the tokens of all layers together.",
        ),
        (
            "load_balance_loss_by_layer",
            "1",
            "Of all layers: the mean of their own "
            "load_balance_loss, which one over all tokens together can hide.",
        ),
        ("z_loss", "1", "Mean over tokens of logsumexp(logits)², which training keeps small."),
        ("latency_ms_mean", "ms", "Mean time of a step of the layer, router and experts."),
        ("latency_ms_p50", "ms", "Median time of a step, from bins: off by at most 0.8 %."),
        ("latency_ms_p90", "ms", "90th percentile of the time of a step, as above."),
        ("latency_ms_p99", "ms", "99th percentile of the time of a step, as above."),
        ("unique_experts", "steps", "Steps in which 0, 1, … E distinct experts ran."),
        (
            "unique_experts_mean",
            "experts",
            "Distinct experts that ran in a step, those of padding too: what had to be read.",
        ),
        (
            "unique_experts_by_tokens",
            "experts",
            "unique_experts_mean by the number of tokens in the step; 256 stands for 256 or more.",
        ),
        ("expert_bytes_per_step", "bytes", "Weights of the distinct experts that a step runs."),
        (
            "bytes_per_step",
            "bytes",
            "expert_bytes_per_step and the weights of the router and of the shared experts.",
        ),
        ("read_gbs", "GB/s", "bytes_per_step over the time of a step, 10⁹ bytes a second."),
        (
            "gflops",
            "GFLOP/s",
            "flops_total_with_padding over the time of the steps, 10⁹ FLOP a second.",
        ),
        (
            "arithmetic_intensity",
            "FLOP/byte",
            "flops_total_with_padding over the bytes of weights that the steps read.",
        ),
        (
            "mbu",
            "share",
            "Memory bandwidth utilisation: read_gbs over the read bandwidth that was "
            "measured; above 1 where weights were still in a cache, or that was measured beside "
            "another load.",
        ),
        (
            "mfu",
            "share",
            "Model FLOPs utilisation: gflops over the rate of matrix products that "
            "was measured; above 1 if that was measured beside another load.",
        ),
        (
            "lru_hit_rates",
            SHARE,
            "Share of the accesses to experts, step by step, that a cache of "
            "the 0, 1, … E most lately used experts of the layer would serve; first accesses are "
            "misses.",
        ),
        (
            "coactivation",
            SHARE,
            "N_ij / N_j: of the tokens that select expert j, the share that selects i too.",
        ),
        (
            "moves",
            SHARE,
            "Of the tokens of expert i in the MoE layer before, the share that goes "
            "to expert j here.",
        ),
        (
            "not_counted",
            "1",
            "1 for what looks like an MoE layer and could not be counted; the summary says why.",
        ),
        ("memory_peak_mb", "MB", "Peak memory of the process since it began, 10⁶ bytes."),
        (
            "device_memory_peak_mb",
            "MB",
            "The most that torch has had on the devices of the model since the process began, "
            "10⁶ bytes, their sum; not of a model on the CPU.",
        ),
    )
}

# Columns of the CSV files, by file.
COLUMNS = {
    "metrics.csv": {
        "layer": "The MoE layer, by the model's own number; empty: the whole profile.",
        "name": "The qualified name of the layer's router.",
        "block": "The qualified name of the layer's block.",
        "expert": "The expert, from 0; empty where a number is not of one expert.",
        "phase": "prefill: tokens of a prompt or a text. decode: one new token of each sequence. "
        "verify: several drafted tokens checked at once. unknown: which of them it was could not "
        "be known. all: all phases together. decode_batch_4 and so on, where several sizes were "
        "run: the decode steps of four sequences at a time, of all layers; k_mean and "
        "unique_experts_mean are means over the layers, latency_ms_p50 and bytes_per_step sums.",
        "metric": "A name of the table above.",
        "value": "The number; empty: not measured.",
    },
    "vocabulary.csv": {
        "layer": "The MoE layer.",
        "name": "The qualified name of the layer's router.",
        "block": "The qualified name of the layer's block.",
        "expert": "The expert, from 0.",
        "token": "The input token's id.",
        "text": "What the tokenizer makes of it; \ufffd for a control character.",
        "seen": "Occurrences that were counted; tokens seen fewer than "
        f"{MINIMUM} times are left out.",
        "share": "Of these occurrences, the share that selects the expert.",
        "baseline": "k/E: that share under an even choice, with the mean k of this routing.",
        "times": "share / baseline.",
    },
    "agreement.csv": {
        "layer": "The MoE layer.",
        "name": "The qualified name of the layer's router.",
        "block": "The qualified name of the layer's block.",
        "tokens": "Tokens on which both routers were compared.",
        "agreement": "Mean of |S ∩ S'| / k, with S the model's own k experts of a token and S' "
        "the router's: the share of the first that the router selects too.",
        "at_most": "Mean of min(|S'|, k) / k: what agreement would be if the router took experts "
        "of the model's own first.",
        "same_experts": "Share of the tokens with the very same experts.",
    },
    "ablation.csv": {
        "layer": "The MoE layer that uses fewer experts.",
        "name": "The qualified name of the layer's router.",
        "block": "The qualified name of the layer's block.",
        "k": "Its number of experts.",
        "loss": "Mean next-token loss, nats per token.",
        "loss_change": "That loss less the one with the model's own k everywhere, nats per token.",
        "low": "Lower end of its 95 % interval over documents.",
        "high": "Upper end of that interval.",
    },
}

# The metric that a short heading of a table stands for.
HEADINGS = {
    "k": "k_mean",
    "Gini": "expert_load_gini",
    "max": "expert_load_max_imbalance",
    "conf": "router_confidence",
    "uniq": "unique_experts_mean",
    "p50": "latency_ms_p50",
    "p99": "latency_ms_p99",
}

INTRODUCTION = (
    "Each number is of one MoE layer with E experts, in one phase of the run (prefill, decode and "
    "so on; all: all phases together). It is of real tokens only, unless its name says "
    "with_padding; times, steps, bytes and distinct experts are what the machine did, padding "
    "included. What was not measured is nan, never 0. A token gets k experts by the model's own "
    "rule; the unit 1 is that of a plain number."
)

# Below the heading of the metrics, in the documentation alone.
BEYOND_THE_CSV = (
    "Quartiles, `coactivation`, `moves`, `lru_hit_rates`, `unique_experts`, "
    "`unique_experts_by_tokens` and `dropped_selections_with_padding` are not in metrics.csv: they "
    "are attributes of what `MoEProfiler.get_metrics` gives."
)


def metric_of(name: str) -> str:
    """The entry that a name in the CSV belongs to: "k_distribution_3" to "k_distribution"."""
    return re.sub(r"^(k_distribution)_\d+$", r"\1", name)


def as_csv() -> str:
    """name, kind ("metric", or the file that it is a column of), unit, meaning."""
    import csv
    import io

    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("name", "kind", "unit", "meaning"))
    rows.writerows((name, "metric", *entry) for name, entry in METRICS.items())
    for file, columns in COLUMNS.items():
        rows.writerows((name, f"column of {file}", "", text) for name, text in columns.items())
    return out.getvalue()


def as_markdown() -> str:
    """docs/glossary.md."""
    parts = [
        "# Glossary of a profile's numbers",
        INTRODUCTION,
        "## Metrics",
        BEYOND_THE_CSV,
        _rows(
            ("metric", "unit", "meaning"),
            ((f"`{name}`", *entry) for name, entry in METRICS.items()),
        ),
    ]
    for file, columns in COLUMNS.items():
        parts += [
            f"## Columns of {file}",
            _rows(("column", "meaning"), ((f"`{name}`", text) for name, text in columns.items())),
        ]
    parts.append(
        "Made by `python -m moeprof.profile.glossary`; a test compares it with what the code says."
    )
    return "\n\n".join(parts) + "\n"


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    print(as_markdown(), end="")
