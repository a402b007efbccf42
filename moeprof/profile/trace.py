"""The steps of the layers in time, as chrome://tracing and ui.perfetto.dev read them.

The format: "Trace Event Format" (Chromium's catapult); "X" is an event with a duration, "M"
names a row. Times in microseconds, from the first step on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .types import Profiled


def trace(profile: Profiled) -> str:
    """JSON: a row for each layer, in it its steps, named by their phase.

    ValueError unless events were recorded.
    """
    if profile.events is None:
        raise ValueError("this profile has no events: ask the profiler to record a trace")
    start = min((event[2] for event in profile.events), default=0)
    events = [_name("process_name", 0, name=str(profile.facts.get("model")))]
    for index, layer in enumerate(profile.layers):
        name = f"{profile.labels[index]} {layer.block or layer.name}"
        events.append(_name("thread_name", index, name=name))
        events.append(_name("thread_sort_index", index, sort_index=index))
    for place, phase, begin, duration, tokens, unique in profile.events:
        events.append(
            {
                "name": phase,
                "cat": "moe",
                "ph": "X",
                "pid": 1,
                "tid": place,
                "ts": (begin - start) / 1e3,
                "dur": duration / 1e3,
                "args": {"tokens": tokens, "unique experts": unique},
            }
        )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, ensure_ascii=False)


def _name(what: str, row: int, **arguments: Any) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": row, "args": arguments}
