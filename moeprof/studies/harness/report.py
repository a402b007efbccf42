"""What the cells of the study say, task by task: tables, and files of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import as_csv, as_json, check_folder, printable, write_whole
from ..configuration import OWN
from .paired import paired

if TYPE_CHECKING:
    from rich.table import Table

    from .work import HarnessWork


COLUMNS = (
    "task",
    "metric",
    "filter",
    "router",
    "ran",
    "value",
    "stderr",
    "difference",
    "difference_low",
    "difference_high",
    "p",
    "better",
    "worse",
    "higher_is_better",
    "experts",
    "documents",
    "requests",
    "truncated",
    "tokens",
)


def rows_of(work: HarnessWork, results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row (see COLUMNS) for each metric of each cell that is in `results` {cell name: result}.

    difference : of the metric from that of the model's own routing on the same documents, with a
        95 % bootstrap interval; p, better, worse : see `Difference`. None in the row of the
        model's own routing, and where that isn't finished.
    """
    rows = []
    own: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cell in work.cells:
        result = results.get(cell.name)
        if result is None:
            continue
        task, router = cell.parameters["task"], cell.parameters["called"]
        counts = {name: result[name] for name in COLUMNS[-5:]}
        for metric in result["metrics"]:
            key = task, metric["name"], metric["filter"]
            row = dict.fromkeys(COLUMNS) | dict(zip(COLUMNS[:3], key, strict=True)) | counts
            row |= {name: metric[name] for name in ("value", "stderr", "higher_is_better")}
            row |= {"router": router, "ran": result["ran"]}
            if router == OWN:
                own[key] = metric
            elif key in own:
                row |= _difference(work, task, metric, own[key])
            rows.append(row)
    return rows


def _difference(
    work: HarnessWork, task: str, metric: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """The columns of a `Difference`, over the documents that have the metric in both."""
    aggregate = work.tasks.aggregation(task, metric["name"])
    before = dict(zip(own["documents"], own["values"], strict=True))
    now = dict(zip(metric["documents"], metric["values"], strict=True))
    both = [document for document in now if document in before]
    if aggregate is None or not both:
        return {}
    found = paired(
        [now[d] for d in both], [before[d] for d in both], aggregate, seed=work.tasks.seed
    )
    return {
        "difference": found.difference,
        "difference_low": found.low,
        "difference_high": found.high,
        "p": found.p,
        "better": found.better,
        "worse": found.worse,
    }


NUMBERS = ("value", "± stderr", "difference", "95 % interval", "p", "experts")


def table_of(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The rows of one task as a rich table."""
    from ...show.tables import RIGHT, table

    columns = dict.fromkeys(("metric", "router"), "{}") | dict.fromkeys(NUMBERS, RIGHT)
    return table(columns, [[_metric(row), row["router"], *_numbers(row)] for row in rows])


def by_task(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each task, those of one metric beside each other."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    for of_task in tasks.values():
        metrics = list(dict.fromkeys(map(_metric, of_task)))
        of_task.sort(key=lambda row: metrics.index(_metric(row)))
    return tasks


def _metric(row: Mapping[str, Any]) -> str:
    arrow = {True: " ↑", False: " ↓", None: ""}[row["higher_is_better"]]
    kind = "" if row["filter"] == "none" else f" ({row['filter']})"
    return f"{row['metric']}{kind}{arrow}"


def _numbers(row: Mapping[str, Any]) -> list[str]:
    """Of a row in words, in the order of NUMBERS."""
    low, high = row["difference_low"], row["difference_high"]
    return [
        _in_words(row["value"], "{:.4g}"),
        _in_words(row["stderr"], "{:.2g}"),
        _in_words(row["difference"], "{:+.4g}"),
        "" if low is None or high is None else f"{low:+.4g} to {high:+.4g}",
        _in_words(row["p"], "{:.2g}"),
        f"{row['experts']:.2f}",
    ]


def _in_words(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, int | float) else ""


LEGEND = (
    "The difference is from the model's own routing, on the same documents; the interval is of a "
    "bootstrap over these. p: McNemar's exact test, where each document is right or wrong. "
    "Experts: per token, the mean over layers and all tokens read, without padding."
)


def title(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of the rows of one task: what was run, and what was cut off."""
    row = rows[0]
    said = f"{row['task']}: {row['documents']} documents, {row['requests']} requests"
    if cut := max(row["truncated"] for row in rows):
        said += (
            f"; {cut} of these are longer than the model's context, and their beginning was cut "
            "off, as the harness does"
        )
    return said


def markdown(facts: Mapping[str, Any], rows: Iterable[dict[str, Any]]) -> str:
    """The report."""
    lines = ["# lm-evaluation-harness", ""]
    lines += [f"- {name}: {_fact(value)}" for name, value in facts.items()]
    for task, of_task in by_task(rows).items():
        lines += ["", f"## {_cell(task)}", "", f"{_cell(title(of_task))}.", ""]
        lines += [
            f"| metric | router | {' | '.join(NUMBERS)} |",
            "|---|---|" + "---:|" * len(NUMBERS),
        ]
        for row in of_task:
            cells = [_metric(row), row["router"], *_numbers(row)]
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return printable("\n".join([*lines, "", LEGEND, ""]))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _fact(value: Any) -> str:
    if isinstance(value, dict):  # of the machine
        return f"{value['cpu']}, {', '.join(map(' '.join, value['versions'].items()))}"
    return ", ".join(value) if isinstance(value, list) else str(value)


class HarnessFiles:
    """harness.json, harness.csv and harness.md in a folder, which is made with the first of them.

    Raises OSError, before anything is run, when it can't be made or written to.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        check_folder(self.folder)

    def save(
        self,
        facts: Mapping[str, Any],
        rows: Sequence[dict[str, Any]],
        results: Mapping[str, Any],
    ) -> list[Path]:
        """Write all three; returns their paths. results : {cell name: its result}."""
        import pandas

        self.folder.mkdir(parents=True, exist_ok=True)
        whole = as_json({**facts, "rows": rows, "cells": results})
        table = pandas.DataFrame(rows, columns=list(COLUMNS))
        files = {
            "harness.json": json.dumps(whole, indent=1, ensure_ascii=False).encode() + b"\n",
            "harness.csv": as_csv(table),
            "harness.md": markdown(facts, rows).encode(),
        }
        for name, data in files.items():
            write_whole(self.folder / name, data)
        return [self.folder / name for name in files]
