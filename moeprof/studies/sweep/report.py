"""The report in plain words; every number in it is computed from the results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ...show.tables import markdown
from .advice import advice, caution, how_sure, is_above, is_below, is_one_document
from .compared import compared, interval, with_band
from .files import results_frame
from .merged import merged, same_results

if TYPE_CHECKING:
    import pandas


TOLERANCES = (1, 5)  # per cent of perplexity above the baseline


def report(run: dict[str, Any]) -> str:
    """Markdown of a run (a dict as in the JSON) that holds at least the baseline."""
    run = compared(run)
    baseline, bh = _split(run)
    groups = merged(run["results"])
    parts = [
        f"# BH routing against the model's own top-{baseline['max_k']}",
        _status(run),
        "## What to use",
        caution(run),
        *map(_advice, advice(run)),
        beside_legend(run),
        "## What was measured",
        _bullets(protocol(run)),
        "## Results",
        markdown(*result_rows(groups)),
        *same_results(groups),
        legend(run),
        "## Static top-k and routers set by budget, on the held-out text",
        _beside_table(run),
        "## What the results say",
        _bullets(findings(run)),
        "## What alpha means here",
        _alpha(run, bh),
        "## What this can't say",
        _bullets(limits(run)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _advice(item: Mapping[str, Any]) -> str:
    code = f"\n\n```python\n{item['code']}\n```" if item["code"] else ""
    others = f"\n\n{_bullets(item['others'])}" if item["others"] else ""
    return f"**{item['head']}**{code}{others}"


def beside_legend(run: dict[str, Any]) -> str:
    """What "beside static" and the intervals mean."""
    text = (
        '"Beside static" is bits per byte above (+) or below (-) a straight line between the whole '
        "k of static top-k, at the configuration's own experts per token. "
    )
    if is_one_document(run):
        text += "The held-out text is one document, so there are no intervals. "
    else:
        text += (
            "A band behind it is a 95 % one by bootstrap over the "
            f"{len(run['heldout_documents'])} held-out documents, each compared with itself: the "
            "bands of all settings hold together, and one is called better or worse than static "
            "top-k only where its whole band is below or above 0. Other brackets are 95 % "
            "intervals, each of one number alone. "
        )
    return text + (
        f"Budgets were set on {run['budget_tokens']:,} tokens of shipped calibration text that is "
        "not the held-out text, with one parameter for all layers; `Router.with_budget` does it "
        "on your own text."
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# ---------------------------------------------------------------- what was measured


def _status(run: dict[str, Any]) -> str:
    done, planned = len(run["results"]), len(run["planned"])
    lines = []
    if done < planned:
        lines.append(f"**Interrupted: {done} of {planned} configurations were finished.**")
    elif not run["finished"]:
        lines.append("**Interrupted before static top-k and the budgets were finished.**")
    if run["dropped_max_k"]:
        left_out = ", ".join(map(str, run["dropped_max_k"]))
        lines.append(
            f"The model has {run['model_config']['num_experts']} experts, so the configurations "
            f"with max_k {left_out} were left out: {planned} remain of "
            f"{planned + run['dropped_configurations']}."
        )
    return "\n\n".join(lines)


def protocol(run: dict[str, Any]) -> list[str]:
    """What was measured and how, in sentences."""
    size, documents = run["model_config"], run["heldout_documents"]
    domains = sorted({document["domain"] for document in documents})
    versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
    return [
        f"Model: {run['model']}, {run['dtype']}; {size['num_hidden_layers']} layers, "
        f"{size['num_experts']} experts a layer of which its own router takes "
        f"{size['num_experts_per_tok']}, hidden size {size['hidden_size']}, expert size "
        f"{size['intermediate_size']}, norm_topk_prob {str(size['norm_topk_prob']).lower()}. "
        "Weights of the selected experts follow the model's own rule.",
        f"Experts, generated tokens and speed: {len(run['prompts'])} prompts, "
        f"{run['new_tokens']} new tokens after each, greedy, batch 1, no stop at an end token. "
        "Experts are averaged over all layers, prompt and generated tokens (the last generated "
        "token is never fed back). Speed is decoding only, without the prompt.",
        f"Perplexity and bits per byte: {run['heldout_tokens']:,} {_whose(run)} tokens of "
        f"{len(documents)} documents ({', '.join(domains)}), in windows of 512 tokens with stride "
        "512; the first token of a window is not predicted.",
        f"Null: {run['null']}. {run['null_source']}",
        f"Machine: {_machine(run['cpu'])}; {run['threads']} thread(s); seed {run['seed']}; "
        f"{versions}; started {run['started']}{_before(run)}.",
    ]


def _before(run: dict[str, Any]) -> str:
    """Of a run that went on: the line's time and threads are those of its last part only."""
    count = run.get("from_store", 0)
    if not count:
        return ""
    return f" and went on with {count} parts that were run before, maybe on other threads"


def _whose(run: dict[str, Any]) -> str:
    source = run.get("heldout_source", "shipped")
    return "held-out" if source == "shipped" else f"(from {', '.join(source)})"


def _machine(cpu: Mapping[str, Any]) -> str:
    features = cpu.get("features", ())
    return f"CPU with {', '.join(features)}" if features else "CPU"


def legend(run: dict[str, Any]) -> str:
    """How to read `result_rows`."""
    ranges = (
        "There are no ranges, as the held-out text is one document."
        if is_one_document(run)
        else "The range after Δ bits/byte is a 95 % bootstrap interval over the "
        f"{len(run['heldout_documents'])} held-out documents, each compared with itself; that "
        "after the distance from static top-k is a band, which holds together with all others."
    )
    return (
        "Experts are per token; those on the held-out text are the ones that go with perplexity "
        f"and bits per byte. {ranges} Agreement is the share of generated tokens equal, "
        "position by position, to the baseline's; after a first difference the texts go their own "
        "ways, so it falls fast. Tokens per second were "
        "taken once, one configuration after the other, so two of them can't be compared."
    )


def result_rows(
    groups: Iterable[tuple[str, list[dict[str, Any]]]],
) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of the grid; groups: as `merged` gives them."""
    head = [
        "config",
        "experts",
        "reduction %",
        "experts, held-out",
        "perplexity",
        "Δ perplexity",
        "Δ bits/byte",
        "beside static",
        "agreement",
        "tokens/s, once",
    ]
    rows = []
    for name, (row, *_) in groups:
        cells = [
            name,
            f"{row['avg_experts']:.2f}",
            f"{row['reduction_pct']:.1f}",
            f"{row['avg_experts_heldout']:.2f}",
            f"{row['perplexity']:.3f}",
            f"{row['delta_perplexity']:+.3f}",
            "0" if row["routing_type"] == "topk" else interval(row, "bits_above_own"),
            "0" if row["routing_type"] == "topk" else with_band(row, ""),
            f"{row['token_agreement']:.2f}",
            _number(row["tokens_per_s"], ".1f"),
        ]
        rows.append(cells)
    return head, rows


def _beside_table(run: dict[str, Any]) -> str:
    head, rows = beside_rows(run)
    return markdown(head, rows, 2) if rows else "None has finished."


def beside_rows(run: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of static top-k and the routers set by budget that have finished."""
    head = [
        "config",
        "parameter",
        "experts, held-out",
        "perplexity",
        "Δ bits/byte",
        "beside static",
    ]
    rows = []
    for row in [*run["static"], *run["budgets"]]:
        if "nats_by_document" not in row:
            continue
        parameter = f"{row['parameter']}={row['value']:g}" if "budget" in row else f"k={row['k']}"
        cells = [
            row["config"],
            parameter,
            f"{row['avg_experts_heldout']:.2f}",
            f"{row['perplexity']:.3f}",
            interval(row, "bits_above_own"),
            with_band(row, "") if "budget" in row else "0",
        ]
        rows.append(cells)
    return head, rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else format(value, form)


# ---------------------------------------------------------------- what the results say


def _split(run: dict[str, Any]) -> tuple[Any, pandas.DataFrame]:
    """The baseline's row and the frame of BH's."""
    frame = results_frame(run["results"])
    return frame.iloc[0], frame[frame["routing_type"] == "bh"]


def findings(run: dict[str, Any]) -> list[str]:
    """What the results say, in sentences; run: as `compared` gives it."""
    baseline, bh = _split(run)
    if not len(bh):
        return ["No BH configuration has finished."]
    own = baseline["avg_experts_heldout"]
    fewer, more = bh[bh["avg_experts_heldout"] < own], bh[bh["avg_experts_heldout"] >= own]
    lines = [
        caution(run),
        f"The baseline, {baseline['config']}, has perplexity {baseline['perplexity']:.3f} and "
        f"{baseline['bits_per_byte']:.4f} bits per byte.",
        _range(bh),
        _cheaper(bh, fewer, is_one_document(run)),
        _closest(baseline, fewer),
        *_within(baseline, fewer),
        _loses(baseline, more),
        _dominated(bh),
        beside_static(run),
        _agreement(bh),
        _layers(bh),
    ]
    return [line for line in lines if line]


def _range(bh: pandas.DataFrame) -> str:
    low, high = bh.loc[bh["avg_experts"].idxmin()], bh.loc[bh["avg_experts"].idxmax()]
    return (
        f"On the prompts BH used between {low['avg_experts']:.2f} ({low['config']}) and "
        f"{high['avg_experts']:.2f} ({high['config']}) experts per token, a reduction of "
        f"{high['reduction_pct']:.1f} to {low['reduction_pct']:.1f} %."
    )


def _cheaper(bh: pandas.DataFrame, fewer: pandas.DataFrame, one_document: bool) -> str:
    """How many save experts, and whether any of them does so for free."""
    if not len(fewer):
        return "No BH configuration used fewer experts than the baseline on the held-out text."
    count = f"{len(fewer)} of {len(bh)} BH configurations used fewer experts than the baseline"
    if one_document:
        higher = int((fewer["bits_above_own"] > 0).sum())
        return (
            f"{count} on the held-out text; {higher} of these have a higher perplexity on it, "
            "which another document may turn round."
        )
    free = fewer[fewer["bits_above_own_low"].astype(float) <= 0]
    if not len(free):
        return (
            f"{count} on the held-out text, and every one of them pays for it: all have a higher "
            "perplexity, by more than the documents' variation explains."
        )
    return (
        f"{count} on the held-out text. For these of them no loss was seen beyond the documents' "
        f"variation: {_names(free)}."
    )


def _closest(baseline: Any, fewer: pandas.DataFrame) -> str:
    if not len(fewer):
        return ""
    best = fewer.loc[fewer["perplexity"].idxmin()]
    return f"The best of these is {_described(best, baseline)}."


def _described(row: Any, baseline: Any) -> str:
    change = 100 * (row["perplexity"] / baseline["perplexity"] - 1)
    return (
        f"{row['config']}: {row['avg_experts_heldout']:.2f} experts on the held-out text, "
        f"perplexity {row['perplexity']:.3f} ({change:+.2f} %)"
    )


def _within(baseline: Any, fewer: pandas.DataFrame) -> Iterator[str]:
    for tolerance in TOLERANCES:
        limit = baseline["perplexity"] * (1 + tolerance / 100)
        good = fewer[fewer["perplexity"] <= limit]
        if len(good):
            best = good.loc[good["avg_experts_heldout"].idxmin()]
            yield (
                f"Within {tolerance} % of the baseline's perplexity, the one with the fewest "
                f"experts is {_described(best, baseline)}."
            )
        else:
            yield (
                f"No BH configuration with fewer experts stays within {tolerance} % of the "
                "baseline's perplexity."
            )


def _loses(baseline: Any, more: pandas.DataFrame) -> str:
    if not len(more):
        return ""
    lost = more[more["perplexity"] > baseline["perplexity"]]
    if not len(lost):
        return f"With at least as many experts as the baseline, none was worse: {_names(more)}."
    return (
        f"BH loses outright, with at least as many experts and a higher perplexity: {_names(lost)}."
    )


def _dominated(bh: pandas.DataFrame) -> str:
    """Configurations for which another one has fewer experts and a lower perplexity."""
    experts, perplexity = bh["avg_experts_heldout"].to_numpy(), bh["perplexity"].to_numpy()
    beaten = (experts[:, None] > experts) & (perplexity[:, None] > perplexity)
    worse = bh[beaten.any(axis=1)]
    if not len(worse):
        return ""
    return (
        "Another BH configuration had fewer experts and a lower perplexity, by however little, "
        f"than {_names(worse)}."
    )


def beside_static(run: dict[str, Any]) -> str:
    """How many settings have their whole band below, and above, the static line."""
    settings = [group[0] for _, group in merged(run["results"][1:])]
    settings += [row for row in run["budgets"] if not row["error"]]
    known = [row for row in settings if row.get("bits_above_static") is not None]
    if not known:
        return ""
    text = (
        f"Of {len(known)} settings (BH configurations, equal ones once, and those set by budget) "
        f"{sum(map(is_below, known))} predict the text better than static top-k at the same "
        f"experts per token, {sum(map(is_above, known))} worse; "
        f"{how_sure(known, len(run['heldout_documents']))}"
    )
    if len(known) < len(settings):
        others = len(settings) - len(known)
        text += f" {others} lie beside a k that static top-k was not run for."
    return text


def _agreement(bh: pandas.DataFrame) -> str:
    low, high = bh.loc[bh["token_agreement"].idxmin()], bh.loc[bh["token_agreement"].idxmax()]
    return (
        f"Of the generated tokens, {100 * low['token_agreement']:.0f} % ({low['config']}) to "
        f"{100 * high['token_agreement']:.0f} % ({high['config']}) are the baseline's."
    )


def _layers(bh: pandas.DataFrame) -> str:
    layers = np.mean(bh["experts_by_layer"].tolist(), axis=0)
    if len(layers) == 1:
        return ""
    means = ", ".join(f"{mean:.2f}" for mean in layers)
    return f"Over all BH configurations the layers, first to last, used {means} experts."


def _names(frame: pandas.DataFrame) -> str:
    return ", ".join(frame["config"])


# ---------------------------------------------------------------- what may be claimed


def _alpha(run: dict[str, Any], bh: pandas.DataFrame) -> str:
    text = (
        "BH turns the scores of a token's experts into p-values against the null named above and "
        "selects by alpha: a larger alpha, more experts. Here alpha is a knob for compute. A "
        "false discovery rate would be a statement against that null, if the p-values were "
        "independent and valid under it; neither was shown for this model."
    )
    if len(bh):
        shares = 100 * bh["share_without_rejection"]
        text += (
            " It would not survive min_k = 1 in any case: the best expert was used also where "
            f"nothing was rejected, which was so in {shares.min():.1f} to {shares.max():.1f} % of "
            "the cases (a token in a layer), depending on the configuration."
        )
    return text


def limits(run: dict[str, Any]) -> list[str]:
    """What the results can't say, in sentences."""
    spread = (
        "The held-out text is one document: what is said of it holds for this document."
        if is_one_document(run)
        else "Intervals and bands of bits per byte are for texts like the held-out documents."
    )
    return [
        "Which setting is best of all: bands say which are better than static top-k, not which of "
        "these is the best. It was chosen on the text that it was measured on, so its lead over "
        "the others is a little too large; parameters that differ "
        "by layer (`with_budget(..., per_layer=True)`) and other routers (`moeprof compare`) were "
        "not tried in the sweep.",
        "How another model behaves: this is one model, without any training under BH.",
        f"How other prompts behave: experts, agreement and speed come from "
        f"{len(run['prompts'])} prompts and have no intervals. {spread}",
        "How fast this is elsewhere: tokens per second were taken once, in passing, on this "
        "machine and whatever else it was doing.",
    ]
