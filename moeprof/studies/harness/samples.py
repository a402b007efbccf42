"""What the harness says of a task, document by document, as plain values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

DRAWS = 1000  # of the harness's own bootstrap, where it has no formula for a standard error


def metrics_of(
    task: Any, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Of each metric a dict: name, filter (of the answers, "none" mostly), value and stderr as the
    harness computes them (stderr None where it has no way), higher_is_better; documents [id] and
    the values of each, in their order."""
    made = []
    keys = dict.fromkeys((m, s["filter"]) for s in samples for m in s["metrics"])
    for metric, kind in keys:
        own = [s for s in samples if s["filter"] == kind and metric in s]
        values = [s[metric] for s in own]
        made.append(
            {
                "name": metric,
                "filter": kind,
                "value": results[f"{metric},{kind}"],
                "stderr": _error(task.aggregation().get(metric), values),
                "higher_is_better": task.higher_is_better().get(metric),
                "documents": [s["doc_id"] for s in own],
                "values": values,
            }
        )
    return made


def _error(aggregate: Any, values: Sequence[Any]) -> float | None:
    """The standard error, by the harness's own formula or its bootstrap, in this process."""
    from lm_eval.api import metrics

    found = metrics.stderr_for_metric(aggregate, DRAWS)
    if found is None or len(values) < 2:
        return None
    with _one_process(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return float(found(values))


@contextmanager
def _one_process() -> Iterator[None]:
    """The harness's bootstrap without a process for each core, by the switch that it has."""
    name = "DISABLE_MULTIPROC"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
