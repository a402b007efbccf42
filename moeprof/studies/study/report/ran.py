"""What was run, how long it took, how to hand it on, and what it can't say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ....measure.machine import in_one_line
from ...comparison.report import protocol as compare_protocol
from ...sweep.report import limits as sweep_limits
from ...sweep.report import protocol as sweep_protocol
from ..plan import in_words
from .content import Section, Sentence, Shown, plain_table

if TYPE_CHECKING:
    from ....show.tables import Table
    from .results import Results


def sections(results: Results) -> Iterator[Section]:
    facts = results.facts
    shown = [Shown("ran", _about(facts)), Shown("parts", _parts(facts["parts"]))]
    yield Section("What was run", list(_planned(facts["parts"])), shown)
    yield Section("How it was measured", list(_protocol(results)))
    yield Section("Hand the result on", [Sentence(line) for line in _contribute(facts)])
    yield Section("What this can't say", [Sentence(line) for line in _limits(results)])


def _about(facts: dict[str, Any]) -> Table:
    rows = [
        ["model", str(facts["model"])],
        ["weights", facts["dtype"]],
        ["machine", in_one_line(facts["machine"])],
        ["versions", ", ".join(f"{name} {number}" for name, number in facts["versions"].items())],
        ["command", facts["command"]],
        ["seed", str(facts["seed"])],
        ["store", str(facts["store"])],
        ["started", str(facts["machine"].get("started", ""))],
    ]
    if facts.get("peak_gb") is not None:
        rows.append(["memory at most", f"{facts['peak_gb']:.2f} GB (resident, 10^9 bytes)"])
    for row in facts.get("devices") or []:
        peak = row["memory_peak_mb"]
        most = "" if peak is None else f", {peak / 1e3:.2f} GB at most (10^9 bytes, of torch)"
        rows.append([row["device"], row["name"] + most])
    if beside := facts.get("beside"):
        rows.append(
            ["also in the folder", f"{', '.join(beside)}: not of this study, or unfinished"]
        )
    return plain_table("Model, machine, command", "", ["what", "is"], rows, 2)


def _parts(parts: list[dict[str, Any]]) -> Table:
    rows = [
        [
            one["part"],
            in_words(one["seconds"]),
            _planned_time(one),
            _cells(one),
            f"failed: {one['failed']}" if one.get("failed") else str(one.get("words", "")),
        ]
        for one in parts
    ]
    note = (
        "Time taken, and what the plan had said before; how many cells it has, and how "
        "many the store had from before, which took no time."
    )
    made = plain_table("Parts", note, ["part", "took", "planned", "cells", "what"], rows)
    return made._replace(words=("part", "what"))


def _planned_time(part: dict[str, Any]) -> str:
    seconds = part.get("planned_seconds")
    return "" if seconds is None else in_words(seconds)


def _cells(part: dict[str, Any]) -> str:
    before = part.get("finished_before")
    return f"{part.get('cells', '')}" + (f", {before} of them before" if before else "")


def _planned(parts: list[dict[str, Any]]) -> Iterator[Sentence]:
    took = sum(one["seconds"] for one in parts)
    text = f"All parts took {in_words(took)}"
    known = [one for one in parts if one.get("planned_seconds")]
    if known:
        plan = sum(one["planned_seconds"] for one in known)
        real = sum(one["seconds"] for one in known)
        text += f"; of those with a plan {in_words(real)}, {100 * (real / plan - 1):+.0f} % of it"
    before, cells = (sum(one.get(of) or 0 for one in parts) for of in ("finished_before", "cells"))
    if before:
        text += f"; {before} of the {cells} cells were finished before and took none of it"
    yield Sentence(f"{text}.", "parts")


def _protocol(results: Results) -> Iterator[Sentence]:
    if results.sweep is not None:
        yield from (Sentence(f"Sweep. {line}") for line in sweep_protocol(results.sweep))
    if results.compare is not None:
        yield from (Sentence(f"Compare. {line}") for line in compare_protocol(results.compare))
    if sum(run is not None for run in (results.sweep, results.compare, results.evaluate)) > 1:
        yield Sentence(
            "Each part cuts its own windows of the held-out text and may draw other passages of "
            "it, so bits per byte and perplexities are compared within a part, not between two."
        )
    if results.evaluate is not None:
        yield Sentence(f"Evaluate. {results.evaluate.facts['protocol']['words']}")


def _contribute(facts: dict[str, Any]) -> list[str]:
    return [
        "Nobody has to run this again on the same model if you hand it on: send report.md and the "
        "store as JSON to the project, in an issue with the model's name as its title.",
        f"`moeprof store {facts['store']} --export result.json` writes the store as JSON: every "
        "finished cell with its parameters, the digests of model and text, and the versions.",
        "Both hold numbers and names: of the model, of files and folders in the command, and of "
        "documents. Of texts they hold what the model wrote after prompts, which are shipped ones "
        "unless a grid names others.",
    ]


def _limits(results: Results) -> list[str]:
    lines = [
        "How another model behaves: this is one model, without any training under these routers.",
        "How fast this is elsewhere: times and tokens per second are of this machine, of its "
        "kernels and of whatever else it did.",
        "What people would say of the texts: KL, perplexity and bits per byte are of predictions "
        "of held-out text, not of answers to tasks (`moeprof eval-harness` measures these).",
    ]
    lines += sweep_limits(results.sweep) if results.sweep is not None else []
    by_subject = {line.partition(":")[0]: line for line in reversed(lines)}  # the first of each
    return list(reversed(by_subject.values()))
