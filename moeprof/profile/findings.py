"""What a profile shows, in sentences that hold only what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.phases import PHASES
from .specialisation import most_by_domain
from .wording import PLAIN, counted, listed, number, percent, scaled, short, spans

if TYPE_CHECKING:
    from .metrics import LayerMetrics
    from .types import Label, Profiled


SLOW = 1.5  # from this multiple of the median on, the mean is of a few slow steps
NAMED = 4  # so many experts are named one by one
FEW = 5  # selections of an expert, on average, below which its load is chance
ROOF = 1.0  # above this share of a roof, the roof was measured too low


def findings(profile: Profiled) -> list[str]:
    """The most important first."""
    reason = nothing_counted(profile)
    if reason:
        return [reason, *_layers(profile), *_notes(profile)]
    found = [*_layers(profile), *_tokens(profile), *_flops(profile), *_left_out(profile)]
    for phase in profile.phases:
        found += [*_balance(profile, phase), *_time(profile, phase)]
    found += [*_cache(profile), *_domains(profile), *_losses(profile), *_rest(profile)]
    return [*found, *_notes(profile)]


PASSED_OVER = (
    "the block was called by .forward(), which passes over the hooks that count; call the module "
    "itself"
)
NOT_RUN = "it did not run while the profiler counted"


def nothing_counted(profile: Profiled) -> str | None:
    """Why there is nothing to show; None if there is something."""
    if profile.phases:
        return None
    facts = profile.facts
    left_out = facts.get("steps_left_out") or 0
    if facts.get("passed_over"):
        return f"Nothing was counted: {_plural(facts['passed_over'])}: {PASSED_OVER}."
    if not left_out:
        return (
            "Nothing was counted: the model did not run while the profiler was active, or "
            "torch.compile had compiled it before."
        )
    settings = _settings(facts)
    which = "the only forward" if left_out == 1 else f"all {left_out:,} forwards"
    return (
        f"Nothing was counted: {which} of the model {'was' if left_out == 1 else 'were'} left out"
        f"{f', by {settings}' if settings else ''}."
    )


def _settings(facts: Mapping[str, Any]) -> str:
    """ "warmup_steps=2 and sampling_rate=4": what leaves forwards out."""
    asked = (("warmup_steps", 0), ("sampling_rate", 1))
    set_ = [f"{name}={facts[name]}" for name, none in asked if facts.get(name, none) != none]
    return listed(set_) if set_ else ""


def _notes(profile: Profiled) -> list[str]:
    return [str(note) for note in profile.facts.get("notes") or []]


def _layer(profile: Profiled, index: int) -> str:
    return f"layer {profile.labels[index]}"


def _most(metrics: Sequence[LayerMetrics], name: str) -> tuple[int, float] | None:
    """(index, value) of the layer with the largest value; None if no layer has one."""
    values = [float(getattr(m, name)) for m in metrics]
    known = [i for i, value in enumerate(values) if not math.isnan(value)]
    if not known:
        return None
    best = max(known, key=values.__getitem__)
    return best, values[best]


def _layers(profile: Profiled) -> Iterator[str]:
    """Which layers there are no numbers of, and why."""
    missing = [(u["label"], u["reason"]) for u in profile.facts.get("not_counted") or []]
    idle = [not m.steps for m in profile.each()]
    if profile.phases:
        passed_over = profile.facts.get("passed_over") or []
        missing += [
            (label, PASSED_OVER if label in passed_over else NOT_RUN)
            for label, none in zip(profile.labels, idle, strict=True)
            if none
        ]
    by_reason: dict[str, list[Label]] = {}
    for label, reason in missing:
        by_reason.setdefault(reason, []).append(label)
    if missing:
        total = len(profile.layers) + len(profile.facts.get("not_counted") or [])
        reasons = [f"{_plural(labels)}: {why}" for why, labels in by_reason.items()]
        yield f"{total - len(missing)} of {total} layers counted; {'; '.join(reasons)}."


def _plural(labels: Sequence[Label]) -> str:
    return f"layer{'s' * (len(labels) > 1)} {spans(labels)}"


def _tokens(profile: Profiled) -> Iterator[str]:
    parts, padded = [], 0
    for phase in profile.phases:
        # A layer that some forward didn't reach counts fewer.
        most = max(profile.each(phase), key=lambda m: m.tokens + m.tokens_padding)
        parts.append(f"{phase} {counted(most.tokens, 'token')} in {counted(most.steps, 'step')}")
        padded += most.tokens_padding
    yield "Counted: " + "; ".join(parts) + "."
    left_out = profile.facts.get("steps_left_out") or 0
    if left_out:
        settings = _settings(profile.facts)
        yield f"Left out: {counted(left_out, 'forward')}{f' ({settings})' if settings else ''}."
    if padded:
        both = profile.each()
        real, computed = (
            sum(getattr(m, name) for m in both)
            for name in ("flops_total", "flops_total_with_padding")
        )
        more = "" if math.isnan(real) or not real else f", {computed / real:.2f} times the FLOPs"
        yield (
            f"{counted(padded, 'position')} of padding were computed as well{more}; all numbers "
            "are of real tokens unless they say otherwise."
        )


def _flops(profile: Profiled) -> Iterator[str]:
    parts = {
        name: sum(getattr(m, f"flops_{name}") for m in profile.each())
        for name in ("router", "expert", "shared", "adapter")
    }
    unknown: dict[str, list[Label]] = {}
    for label, layer in zip(profile.labels, profile.layers, strict=True):
        if layer.unknown:
            unknown.setdefault(layer.unknown, []).append(label)
    for reason, labels in unknown.items():
        yield f"Unknown FLOPs or bytes, {_plural(labels)}: {reason}."
    total = sum(parts.values())
    if math.isnan(total) or not total:
        return
    names = {
        "router": "router",
        "expert": "experts",
        "shared": "shared experts",
        "adapter": "adapters added to all experts in each step",
    }
    shares = [f"{names[name]} {percent(part / total)}" for name, part in parts.items() if part]
    yield f"FLOPs of the MoE layers: {scaled(total, 'FLOP')} ({listed(shares)})."


def _left_out(profile: Profiled) -> Iterator[str]:
    """Of selections that no expert ran, and of rows that none selected."""
    metrics = profile.each()
    dropped = [m.dropped_selections_with_padding for m in metrics]
    selected = [int(m.counts.load.sum()) for m in metrics]
    lost, extra = (sum(max(sign * n, 0) for n in dropped) for sign in (1, -1))
    if lost:
        most = max(range(len(metrics)), key=lambda i: dropped[i] / max(selected[i], 1))
        away = any("not on this machine" in m.layer.unknown for m in metrics)
        why = "their experts are on other machines" if away else "experts were at their capacity"
        yield (
            f"Capacity: {percent(lost / sum(selected))} of the selections did not run ({why}), "
            f"most in {_layer(profile, most)} ({percent(dropped[most] / selected[most])}); FLOPs "
            "are of what ran, load and experts per token of what was selected."
        )
    if extra:
        yield (
            f"Experts ran {counted(extra, 'row')} more than were selected, as experts that are "
            "filled up to a capacity do; FLOPs are of what ran."
        )
    if any(m.counts.left_out[1].any() for m in metrics):
        yield (
            "Which of these were padding is not known: the experts' FLOPs of real tokens alone "
            "are unknown."
        )


def _balance(profile: Profiled, phase: str) -> Iterator[str]:
    metrics = profile.each(phase)
    uneven = _most(metrics, "expert_load_gini")
    if uneven is None or not uneven[1] > 0:
        return
    each = [m for m in metrics if m.tokens]
    mean = min(m.tokens * m.k_mean / m.layer.num_experts for m in each)
    if mean < FEW:
        yield (
            f"Few tokens in {phase}: an expert is selected {mean:.1f} times on average, so which "
            "are busy, and which idle, may be chance."
        )
    index, value = uneven
    busy, times = _most(metrics, "expert_load_max_imbalance") or uneven
    expert = int(np.argmax(metrics[busy].counts.load[0]))
    yield (
        f"Least balanced in {phase}: {_layer(profile, index)} (Gini {value:.2f}); busiest: expert "
        f"{expert} of {_layer(profile, busy)}, {times:.1f} times the mean load."
    )
    yield from _never_selected(profile, phase)


def _never_selected(profile: Profiled, phase: str) -> Iterator[str]:
    """How many experts, and which: of a few each, of many the layer with most."""
    each = [(i, m) for i, m in enumerate(profile.each(phase)) if m.tokens]
    idle = {i: [str(e) for e in np.flatnonzero(m.counts.load[0] == 0)] for i, m in each}
    count, total = sum(map(len, idle.values())), sum(m.layer.num_experts for _, m in each)
    if not count:
        return
    if count <= NAMED:
        named = [
            f"{_layer(profile, i)}: expert{'s' * (len(experts) > 1)} {listed(experts)}"
            for i, experts in idle.items()
            if experts
        ]
        which = "; ".join(named)
    else:
        most = max(idle, key=lambda i: len(idle[i]))
        which = f"most in {_layer(profile, most)}, {len(idle[most])}"
    yield f"Never selected in {phase}: {count:,} of {total:,} experts ({which})."


def _time(profile: Profiled, phase: str) -> Iterator[str]:
    sizes = profile.decode_by_batch
    if phase == "decode" and len(sizes) > 1:  # steps of several sizes have no common time
        yield from map(_time_of_batch, sizes)
        return
    metrics = [m for m in profile.each(phase) if m.steps]
    # Medians, as the table's, which a few slow steps do not move.
    step = sum(m.latency_ms_p50 for m in metrics)
    slow, value = _most(profile.each(phase), "latency_ms_p50") or (0, math.nan)
    line = f"A {phase} step spends {short(step)} ms in MoE layers"
    if len(metrics) > 1:
        line += " (the sum of their medians)"
        slowest = _layer(profile, slow)
        line += f", {percent(value / step)} of it in {slowest}, the slowest" if step else ""
    weights = sum(m.bytes_per_step for m in metrics)
    if not math.isnan(weights):
        experts = np.mean([m.unique_experts_mean for m in metrics])
        line += (
            f"; it runs {experts:.1f} distinct experts a layer and reads {scaled(weights, 'B')} "
            "of weights"
        )
    yield f"{line}{_of_roof(profile, metrics)}."
    mean = sum(m.latency_ms_mean for m in metrics)
    if step and mean > SLOW * step:
        yield (
            f"Some {phase} steps took far longer: the mean is {short(mean)} ms, {mean / step:.1f} "
            f"times the median; rates{' and shares of a roof' * bool(profile.roofline)} are of all "
            "steps."
        )
    each = zip(profile.labels, profile.each(phase), strict=True)
    above = [label for label, m in each if max(m.mbu, m.mfu) > ROOF]
    if above:
        yield (
            f"More than 100 % of a roof in {phase}, {_plural(above)}: weights were still in a "
            "cache, or the roof was measured beside another load on the machine."
        )


def _time_of_batch(row: Mapping[str, Any]) -> str:
    return (
        f"A decode step at batch {row['batch']} spends {short(row['latency_ms'])} ms in MoE layers "
        f"(the sum of their medians); it runs {row['unique_experts']:.1f} distinct experts a layer "
        f"and reads {scaled(row['bytes'], 'B')} of weights."
    )


def _of_roof(profile: Profiled, metrics: Sequence[LayerMetrics]) -> str:
    """What the steps reached, beside what the machine was measured to reach."""
    roof = profile.roofline
    nanoseconds = sum(int(m.counts.nanoseconds) for m in metrics)
    read = sum(m.bytes_per_step * m.steps for m in metrics)
    if roof is None or math.isnan(read) or not nanoseconds:
        return ""
    done = sum(m.flops_total_with_padding for m in metrics) / nanoseconds
    return (
        f": {short(read / nanoseconds)} GB/s, {percent(read / nanoseconds / roof.read_gbs)} of the "
        f"measured bandwidth, and {scaled(1e9 * done, 'FLOP/s')}, "
        f"{percent(done / roof.gemm_gflops)} of the measured matrix product rate"
    )


def _cache(profile: Profiled) -> Iterator[str]:
    """How small a cache of experts would do in decode, of layers of the same size."""
    if "decode" not in profile.phases:
        return
    metrics = [m for m in profile.each("decode") if m.counts.reuse.sum()]
    sizes = {m.layer.num_experts for m in metrics}
    if len(sizes) != 1 or min(sizes) < 4:
        return
    size = sizes.pop()
    cells = [
        f"{n} experts a layer {percent(float(np.mean([m.lru_hit_rate(n) for m in metrics])))}"
        for n in (size // 4, size // 2)
    ]
    yield f"Accesses to experts in decode that an LRU cache would serve: of {', of '.join(cells)}."


def _domains(profile: Profiled) -> Iterator[str]:
    ran = [table for table in (profile.domains or {}).values() if table[:, -1].any()]
    if len(ran) < 2:
        return
    frame = most_by_domain(profile)
    if not len(frame):
        yield (
            "Domains: no difference is seen, no expert that one selects more often than the others "
            "beyond chance."
        )
        return
    row = frame.iloc[0]
    yield (
        f"Most specialised by domain: expert {row['expert']} of layer {row['layer']}, selected "
        f"by {percent(row['share'])} of the {counted(row['tokens'], 'token')} of {row['domain']} "
        f"and by {percent(row['others'])} of those of the other domains."
    )


def _losses(profile: Profiled) -> Iterator[str]:
    balance, z = profile.load_balance_loss(), profile.z_loss()
    if math.isnan(z):
        return
    ks = [m.k_mean for m in profile.each() if m.tokens]
    yield (
        "Training's losses, of this routing: load-balance loss "
        f"{number(balance, '.3f')} with all layers' tokens pooled, as transformers computes it, "
        f"{number(profile.load_balance_loss_by_layer(), '.3f')} as the mean of the layers' own "
        f"({np.mean(ks):.3f} if balanced); z-loss {z:.3g}."
    )


def _rest(profile: Profiled) -> Iterator[str]:
    skipped = {phase: sum(m.skipped_slots for m in profile.each(phase)) for phase in PHASES}
    if any(skipped.values()):
        parts = [f"{value:,} in {phase}" for phase, value in skipped.items() if value]
        yield f"Slots that the router left out (-1): {listed(parts)}."
    peak = profile.facts.get("memory_peak_mb")
    if peak is not None:
        yield f"Peak memory of the process: {short(float(peak))} MB."
    for row in profile.facts.get("devices") or []:
        if row["memory_peak_mb"] is not None:
            yield f"Peak memory on {row['device']}: {short(float(row['memory_peak_mb']))} MB."


def heading(profile: Profiled) -> list[tuple[str, str]]:
    """(what, text) of the model, the router, the machine."""
    from ..measure.machine import in_one_line

    facts = profile.facts
    model = " ".join(filter(None, (facts.get("model_class"), facts.get("model"))))
    lines = [("Model", model or PLAIN), ("Router", str(facts.get("router") or PLAIN))]
    experts = sorted({layer.num_experts for layer in profile.layers})
    ks = sorted({layer.top_k for layer in profile.layers if layer.top_k is not None})
    each = f"{' or '.join(map(str, experts))} expert{'s' * (experts != [1])}"
    shape = f"{counted(len(profile.layers), 'layer')} of {each}"
    if ks:
        shape += f", top-{' or '.join(map(str, ks))}"
    lines.append(("MoE", shape))
    machine = facts.get("machine") or {}
    if machine:
        versions = machine.get("versions") or {}
        lines.append(("Machine", in_one_line(machine)))
        lines.append(("Software", ", ".join(f"{k} {v}" for k, v in versions.items())))
    for row in facts.get("devices") or []:
        lines.append(("Device", f"{row['name']} ({row['device']})"))
    roof = profile.roofline
    if roof is not None:
        note = f"; {roof.note}" if roof.note else ""
        text = (
            f"{short(roof.read_gbs)} GB/s reading, {scaled(1e9 * roof.gemm_gflops, 'FLOP/s')} in "
            f"matrix products ({roof.conditions}), measured{note}"
        )
        lines.append(("Roof", text))
    return lines
