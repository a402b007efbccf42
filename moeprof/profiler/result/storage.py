"""The files of a profile: profile.json to read, counts.npz to load, metrics.csv for others."""

import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import asdict

import numpy as np

from ..tally import PHASES, Counts
from .glossary import as_csv
from .metrics import SCALARS
from .profile import ALL, as_json

FORMAT, VERSION = "moeprof-profile", 1
JSON, COUNTS, CSV = "profile.json", "counts.npz", "metrics.csv"
GLOSSARY, VOCABULARY = "glossary.csv", "vocabulary.csv"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, TypeError, ValueError)


def pack(profile) -> dict[str, bytes]:
    """{file name: content}; the JSON comes last, it has the digest of the counts."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **_arrays(profile))
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
    csv = profile.to_frame().to_csv(index=False)
    files = {COUNTS: counts, CSV: csv.encode(), GLOSSARY: as_csv().encode()}
    if profile.vocabulary is not None:
        files[VOCABULARY] = profile.vocabulary_specialisation().to_csv(index=False).encode()
    return files | {JSON: text.encode() + b"\n"}


def _summary(profile, phase):
    layers = {
        name: {key: getattr(metrics, key) for key in SCALARS}
        for name, metrics in profile.metrics(phase).items()
    }
    losses = (profile.load_balance_loss(phase), profile.z_loss(phase))
    return {"load_balance_loss": losses[0], "z_loss": losses[1], "layers": layers}


def _arrays(profile):
    arrays = {}
    for phase in PHASES:
        for index, counts in enumerate(profile.counts[phase]):
            arrays[f"{phase}.{index}.ints"] = counts.ints
            arrays[f"{phase}.{index}.floats"] = counts.floats
    for number, table in enumerate((profile.domains or {}).values()):
        arrays[f"domain.{number}"] = table
    if profile.vocabulary is not None:
        for name in ("tokens", "layers", "counts", "seen"):
            arrays[f"vocabulary.{name}"] = np.asarray(profile.vocabulary[name], dtype=np.int64)
    if profile.events is not None:
        rows = [(layer, PHASES.index(phase), *rest) for layer, phase, *rest in profile.events]
        arrays["events"] = np.array(rows, dtype=np.int64).reshape(len(rows), 6)
    return arrays


def unpack(make, folder):
    """make(layers, counts, facts, …) of a folder written by `pack`; raises as Profile.load."""
    for name in (JSON, COUNTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no profile in {folder}: it has no {name}")
    head = _head(folder)
    data = (folder / COUNTS).read_bytes()
    if hashlib.sha256(data).hexdigest() != head.get("counts_sha256"):
        raise ValueError(f"{folder}: {COUNTS} is not the one that {JSON} was written with")
    try:
        return _parts(make, head, dict(np.load(io.BytesIO(data), allow_pickle=False)))
    except _DAMAGED as error:
        raise ValueError(f"{folder}: the profile is damaged: {error!r}") from error


def _head(folder):
    try:
        head = json.loads((folder / JSON).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / JSON}: expected JSON: {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"{folder / JSON}: this is no profile of moeprof")
    if head.get("version") != VERSION:
        raise ValueError(
            f"{folder / JSON}: expected format version {VERSION}, got {head.get('version')!r}"
        )
    return head


def _parts(make, head, arrays):
    from ..finding import Layer
    from ..roofline import Roofline

    layers = [Layer(**layer) for layer in head["layers"]]
    if not isinstance(head["facts"], dict) or f"{PHASES[0]}.{len(layers)}.ints" in arrays:
        raise ValueError("facts or layers are not those of the counts")
    counts = {
        phase: [
            Counts.from_arrays(
                layer.num_experts, arrays[f"{phase}.{i}.ints"], arrays[f"{phase}.{i}.floats"]
            )
            for i, layer in enumerate(layers)
        ]
        for phase in PHASES
    }
    return make(
        layers, counts, head["facts"],
        domains={label: arrays[f"domain.{n}"] for n, label in enumerate(head["domains"] or [])},
        vocabulary=_vocabulary(arrays, head["vocabulary_text"]),
        roofline=head["roofline"] and Roofline(**head["roofline"]),
        events=_events(arrays),
    )  # fmt: skip


def _vocabulary(arrays, text):
    if "vocabulary.counts" not in arrays:
        return None
    names = ("tokens", "layers", "counts", "seen")
    return {**{name: arrays[f"vocabulary.{name}"] for name in names}, "text": text}


def _events(arrays):
    if "events" not in arrays:
        return None
    rows = arrays["events"].tolist()
    return [(layer, PHASES[phase], *rest) for layer, phase, *rest in rows]
