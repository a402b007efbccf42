"""The files of a profile: profile.json to read, counts.npz to load, metrics.csv for others."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from ..files import alone, as_csv, as_json, write_whole
from ..files.npz import read_npz
from ..measure.roofline import Roofline
from ..models.layer import Layer
from ..models.phases import PHASES
from ..profiler.tally import Counts
from . import glossary
from .frame import ALL, WHOLE
from .metrics import SCALARS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..files.npz import Header
    from .types import Event, Profiled


Made = TypeVar("Made")
FORMAT, VERSION = "moeprof-profile", 1
JSON, COUNTS, CSV = "profile.json", "counts.npz", "metrics.csv"
GLOSSARY, VOCABULARY = "glossary.csv", "vocabulary.csv"
NEXT = "counts.next.npz"  # the counts of a profile that is being written
MOST_BYTES = 1 << 32  # of one array
MOST_ROWS = 1 << 22  # events, or tokens of a vocabulary: far above any there are
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, OverflowError, MemoryError, RecursionError)
_FACTS: dict[str, Any] = {
    "model": str,
    "model_class": str,
    "config": dict,
    "machine": dict,
    "router": str,
    "steps": int,
    "steps_left_out": int,
    "warmup_steps": int,
    "sampling_rate": int,
    "memory_peak_mb": float | None,
    "notes": list[str],
    "not_counted": list[dict],  # type: ignore[type-arg]  # compared with, see `_fits`
    "passed_over": list[int | str],
    "devices": list[dict],  # type: ignore[type-arg]
    "decode_by_batch": list[dict],  # type: ignore[type-arg]
}
_MEASURED = float | None
# What each row of these facts has.
_ROWS: dict[str, dict[str, Any]] = {
    "not_counted": {"label": int | str, "block": str, "reason": str},
    "devices": {"device": str, "name": str, "memory_peak_mb": _MEASURED},
    "decode_by_batch": {
        "batch": int,
        "steps": int,
        "k": _MEASURED,
        "unique_experts": _MEASURED,
        "latency_ms": _MEASURED,
        "bytes": _MEASURED,
    },
}
_MACHINE = {"cpu": str, "features": list[str], "threads": int}
_TEXTS = {"domains": list[str] | None, "vocabulary_text": list[str | None] | None}
_BELOW = 2**63  # each number that a profile is written with
_FIRST = PHASES[:2]  # the phases of profiles before moeprof told them all apart


def pack(profile: Profiled) -> dict[str, bytes]:
    """{file name: content}; the JSON comes last, it has the digest of the counts."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = _arrays(profile)
    np.savez_compressed(buffer, **arrays)
    counts = buffer.getvalue()
    head = {
        "format": FORMAT,
        "version": VERSION,
        "counts_sha256": hashlib.sha256(counts).hexdigest(),
        "facts": profile.facts,
        "roofline": profile.roofline and profile.roofline._asdict(),
        "layers": [asdict(layer) for layer in profile.layers],
        "domains": profile.domains and list(profile.domains),
        "vocabulary_text": profile.vocabulary and profile.vocabulary["text"],
        "summary": {phase: _summary(profile, phase) for phase in (*profile.phases, ALL)},
    }
    text = json.dumps(as_json(head), indent=1, ensure_ascii=False, allow_nan=False)
    files = {COUNTS: counts, CSV: as_csv(profile.to_frame()), GLOSSARY: glossary.as_csv().encode()}
    if profile.vocabulary is not None:
        files[VOCABULARY] = as_csv(profile.vocabulary_specialisation())
    return files | {JSON: text.encode() + b"\n"}


def _summary(profile: Profiled, phase: str) -> dict[str, Any]:
    layers = {
        name: {key: getattr(metrics, key) for key in SCALARS}
        for name, metrics in profile.metrics(phase).items()
    }
    whole = {name: getattr(profile, name)(phase) for name in WHOLE}
    return {**whole, "layers": layers}


def _arrays(profile: Profiled) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for phase in PHASES:
        for index, counts in enumerate(profile.counts[phase]):
            arrays[f"{phase}.{index}.ints"] = counts.ints
            arrays[f"{phase}.{index}.floats"] = counts.floats
            if counts.left_out.any():
                arrays[f"{phase}.{index}.left_out"] = counts.left_out
    for index, counts in enumerate(profile.joint or []):
        arrays[f"joint.{index}.ints"] = counts.ints  # it has no sums
    for number, table in enumerate((profile.domains or {}).values()):
        arrays[f"domain.{number}"] = table
    if profile.vocabulary is not None:
        for name in ("tokens", "layers", "counts", "seen"):
            arrays[f"vocabulary.{name}"] = np.asarray(profile.vocabulary[name], dtype=np.int64)
    if profile.events is not None:
        rows = [(layer, PHASES.index(phase), *rest) for layer, phase, *rest in profile.events]
        arrays["events"] = np.array(rows, dtype=np.int64).reshape(len(rows), 6)
    return arrays


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `pack` gave. The JSON decides: until it is replaced the older profile stands,
    from then on this one, whose counts may still have the name NEXT."""
    with alone(folder):
        if (folder / NEXT).is_file():
            _finish(folder)  # what an earlier call left when it was interrupted
        try:
            write_whole(folder / NEXT, files[COUNTS])
            write_whole(folder / JSON, files[JSON])
        except OSError:
            (folder / NEXT).unlink(missing_ok=True)
            raise
        os.replace(folder / NEXT, folder / COUNTS)
        for name in files.keys() - {COUNTS, JSON}:  # for others to read, not for `unpack`
            write_whole(folder / name, files[name])


def _finish(folder: Path) -> None:
    """Give NEXT its name if the JSON is of it."""
    with suppress(OSError, ValueError):
        if _is_of(_head(folder), (folder / NEXT).read_bytes()):
            os.replace(folder / NEXT, folder / COUNTS)


def _is_of(head: Mapping[str, Any], counts: bytes) -> bool:
    return hashlib.sha256(counts).hexdigest() == head.get("counts_sha256")


def unpack(make: Callable[..., Made], folder: Path) -> Made:
    """make(layers, counts, facts, …) of a folder written by `write`; raises as Profile.load."""
    with alone(folder) if folder.is_dir() else nullcontext():
        present = [name for name in (COUNTS, NEXT) if (folder / name).is_file()]
        if not (folder / JSON).is_file() or not present:
            missing = COUNTS if (folder / JSON).is_file() else JSON
            raise FileNotFoundError(f"no profile in {folder}: it has no {missing}")
        head = _head(folder)
        contents = [(folder / name).read_bytes() for name in present]
    data = next((data for data in contents if _is_of(head, data)), None)
    if data is None:
        raise ValueError(f"{folder}: {COUNTS} is not the one that {JSON} was written with")
    try:
        _check_head(head)
        layers = [Layer(**layer) for layer in head["layers"]]
        return _parts(make, head, layers, read_npz(data, partial(_check_members, head, layers)))
    except _DAMAGED as error:
        raise ValueError(f"{folder}: the profile is damaged: {error!r}") from error


def _check_head(head: dict[str, Any]) -> None:
    """ValueError unless all that is read later has the type and range it was written with."""
    facts = head["facts"]
    _check_types("facts", facts, _FACTS)
    for name, types in _ROWS.items():
        for row in facts.get(name, ()):
            _check_whole(name, row, types)
    if machine := facts.get("machine"):
        _check_whole("machine", machine, _MACHINE)
        _check_types("machine", machine, {"versions": dict})
    for layer in head["layers"]:
        _check_types("layer", layer, get_type_hints(Layer))
        each = layer.get("slot_flops")
        if each is not None and len(each) != layer["num_experts"]:
            raise ValueError("layer: slot_flops: expected an integer for each expert")
    _check_whole("texts", {name: head[name] for name in _TEXTS}, _TEXTS)
    if (roof := head["roofline"]) is not None:
        hints = get_type_hints(Roofline)
        _check_types("roofline", roof, hints)
        _check_whole("roofline", roof, {n: hints[n] for n in ("read_gbs", "gemm_gflops", "dtype")})
        if not (roof["read_gbs"] and roof["gemm_gflops"]):
            raise ValueError("roofline: expected rates above 0")


def _check_types(what: str, values: Any, types: Mapping[str, Any]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected names and values, got {values!r:.60}")
    for name, hint in types.items():
        if name in values and not _fits(values[name], hint):
            raise ValueError(
                f"{what}: {name}: expected {getattr(hint, '__name__', hint)}, numbers from 0 to "
                f"2^63, got {values[name]!r:.60}"
            )


def _check_whole(what: str, values: Any, types: Mapping[str, Any]) -> None:
    """The same, and that none of them is missing."""
    _check_types(what, values, types)
    if missing := [name for name in types if name not in values]:
        raise ValueError(f"{what}: it has no {missing[0]}")


def _fits(value: Any, hint: Any) -> bool:
    """Is a value of JSON what a type hint says? An int will do for a float; numbers are finite,
    none is negative or as large as `_BELOW`."""
    parts = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if hint in (int, float):
        number = isinstance(value, int | hint) and not isinstance(value, bool)
        return number and 0 <= value < _BELOW
    return isinstance(value, hint)


def _shapes(num_experts: int) -> dict[str, set[tuple[int, ...]]]:
    """{array of a layer's Counts: its shapes, with pairs and without}."""
    both = [Counts(num_experts, pairs) for pairs in (True, False)]
    return {name: {getattr(c, name).shape for c in both} for name in ("ints", "floats", "left_out")}


def _check_members(head: dict[str, Any], layers: list[Layer], headers: dict[str, Header]) -> None:
    """ValueError for an array of another name or size than the profile's has."""
    shapes = {size: _shapes(size) for size in {layer.num_experts for layer in layers}}
    expected = {
        f"{phase}.{index}.{name}": allowed
        for phase in PHASES
        for index, layer in enumerate(layers)
        for name, allowed in shapes[layer.num_experts].items()
    }
    for index, layer in enumerate(layers):
        expected[f"joint.{index}.ints"] = shapes[layer.num_experts]["ints"]
    widest = max((layer.num_experts for layer in layers), default=0)
    for number in range(len(head["domains"] or [])):
        expected[f"domain.{number}"] = {(len(layers), widest + 1)}
    for name, header in headers.items():
        known = header.shape in expected.get(name, ())
        if not (known or _is_recorded(name, headers, layers)):
            raise ValueError(f"counts: an array {name!r} of {header.shape}")
        if math.prod(header.shape) * header.dtype.itemsize > MOST_BYTES:
            raise ValueError(f"counts: {name} is of {header.shape}")


def _is_recorded(name: str, headers: dict[str, Header], layers: list[Layer]) -> bool:
    """Whether an array of events or of the vocabulary has a form that a profiler gives it."""
    kind, _, part = name.partition(".")
    shape, dtype = headers[name]
    if dtype != np.int64:
        return False
    if kind == "events":
        return not part and len(shape) == 2 and shape[0] <= MOST_ROWS and shape[1] == 6
    tokens, own = (headers.get(f"vocabulary.{n}", ((), None))[0] for n in ("tokens", "layers"))
    if kind != "vocabulary" or len(tokens) != 1 or len(own) != 1:
        return False
    sizes = {layer.num_experts for layer in layers}
    forms: dict[str, list[tuple[int, ...]]] = {
        "tokens": [tokens],
        "seen": [tokens],
        "layers": [own],
        "counts": [(*own, *tokens, size) for size in sizes],
    }
    few = tokens[0] <= MOST_ROWS and own[0] <= len(layers)
    return few and shape in forms.get(part, ())


def _head(folder: Path) -> dict[str, Any]:
    try:
        head = json.loads((folder / JSON).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / JSON}: expected JSON: {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"{folder / JSON}: this is no profile of moeprof")
    if head.get("version") != VERSION:
        raise ValueError(
            f"{folder / JSON}: expected format version {VERSION}, got {head.get('version')!r}"
        )
    return head


def _parts(
    make: Callable[..., Made],
    head: dict[str, Any],
    layers: list[Layer],
    arrays: dict[str, NDArray[Any]],
) -> Made:
    if f"{PHASES[0]}.{len(layers)}.ints" in arrays:
        raise ValueError("facts or layers are not those of the counts")
    counts = {
        phase: [
            Counts.from_arrays(
                layer.num_experts,
                arrays[f"{phase}.{i}.ints"],
                arrays[f"{phase}.{i}.floats"],
                arrays.get(f"{phase}.{i}.left_out", 0),
            )
            for i, layer in enumerate(layers)
        ]
        for phase in PHASES
        if phase in _FIRST or f"{phase}.0.ints" in arrays
    }
    for phase in PHASES:  # an older profile has not all
        empty = [Counts(c.num_experts, c.has_pairs) for c in counts[_FIRST[0]]]
        counts.setdefault(phase, empty)
    joint = None
    if "joint.0.ints" in arrays:  # of steps of several phases; older profiles lack it
        joint = [
            Counts.from_arrays(c.num_experts, arrays[f"joint.{i}.ints"], np.zeros_like(c.floats))
            for i, c in enumerate(counts[_FIRST[0]])
        ]
    return make(
        layers,
        counts,
        head["facts"],
        joint=joint,
        domains={label: arrays[f"domain.{n}"] for n, label in enumerate(head["domains"] or [])},
        vocabulary=_vocabulary(arrays, head["vocabulary_text"]),
        roofline=None if head["roofline"] is None else Roofline(**head["roofline"]),
        events=_events(arrays),
    )


def _vocabulary(
    arrays: dict[str, NDArray[Any]], text: list[str | None] | None
) -> dict[str, Any] | None:
    if "vocabulary.counts" not in arrays:
        return None
    names = ("tokens", "layers", "counts", "seen")
    if text is not None and len(text) != len(arrays["vocabulary.tokens"]):
        raise ValueError("vocabulary_text: expected one for each token")
    return {**{name: arrays[f"vocabulary.{name}"] for name in names}, "text": text}


def _events(arrays: dict[str, NDArray[Any]]) -> list[Event] | None:
    if "events" not in arrays:
        return None
    rows = arrays["events"].tolist()
    return [(layer, PHASES[phase], *rest) for layer, phase, *rest in rows]
