"""A profile.json that was changed: one error that names the folder, or a profile that works."""

import copy
import json

import numpy as np
import pytest
from profiles import make_profile

from moeprof.profile import page, text
from moeprof.profile.result import Profile

pytestmark = pytest.mark.once

VALUES = (None, True, 0, 10**400, -1, float("nan"), 1.5, "", "x", [], {}, [0])
FACTS = {
    "not_counted": [{"label": 5, "block": "b", "reason": "r"}],
    "passed_over": [0],
    "notes": ["n"],
    "decode_by_batch": [
        {"batch": b, "steps": 2, "k": 2.0, "unique_experts": 3.0, "latency_ms": 1.0, "bytes": 5.0}
        for b in (1, 2)
    ],
}


def paths_of(value, before=()):
    """The path of every value in a tree of dicts and lists, but of "summary", which isn't read."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        if key != "summary":
            yield (*before, key)
            if isinstance(item, dict | list):
                yield from paths_of(item, (*before, key))


def replaced(tree, path, value):
    changed = inner = copy.deepcopy(tree)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@pytest.fixture
def folder(tmp_path):
    profile = make_profile(1, 4, prefill=(5,), decode=(1,), facts=FACTS)
    profile.vocabulary = {
        "tokens": [1],
        "layers": [0],
        "counts": np.ones((1, 1, 4), np.int64),
        "seen": [9],
        "text": ["a"],
    }
    profile.save(tmp_path)
    return tmp_path


def show(profile):
    """All that reads the facts; the figures' text, not the figures themselves."""
    profile.summary(), profile.to_frame().to_csv(), profile.to_html()
    [repr(metrics) for metrics in profile.each()]
    profile.compare(profile).summary(), repr(profile)


def of_the_last(function):
    """The function, not asked twice in a row about the same object."""
    last = [None, None]

    def kept(asked):
        if last[0] is not asked:
            last[:] = asked, function(asked)
        return last[1]

    return kept


@pytest.fixture
def _made_once(monkeypatch):
    """No figures, and what text and page both show of a profile once: most of the time. A table
    that reads as one before is drawn as that one was."""
    monkeypatch.setattr(page, "_figures", lambda *_: ())
    for name in ("tables", "findings"):
        once = of_the_last(getattr(page, name))
        for module in (page, text):
            monkeypatch.setattr(module, name, once)
    draw, drawn = text.in_lines, {}
    monkeypatch.setattr(
        text, "in_lines", lambda t: drawn.get(repr(t)) or drawn.setdefault(repr(t), draw(t))
    )


def test_whatever_a_value_is_replaced_by(folder, _made_once):
    file = folder / "profile.json"
    head = json.loads(file.read_text())
    shown = set()
    for path in paths_of(head):
        for value in VALUES:
            file.write_text(json.dumps(replaced(head, path, value)))
            try:
                loaded = Profile.load(folder)
            except ValueError as error:
                assert str(error).startswith(str(folder)), (path, value)
                continue
            try:
                show(loaded)
            except Exception as error:
                raise AssertionError(f"{path}: {value!r:.20} was loaded") from error
            shown.add(path)
    assert ("facts", "model") in shown and ("facts", "machine", "features") in shown


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("facts", "machine", "features"), [0], "machine: features: expected list"),
        (("facts", "memory_peak_mb"), 10**400, "memory_peak_mb: expected float"),
        (("facts", "steps"), -1, "steps: expected int"),
        (("roofline",), {}, "roofline: it has no read_gbs"),
        (("roofline", "read_gbs"), 0, "roofline: expected rates above 0"),
        (("vocabulary_text",), [], "vocabulary_text: expected one for each token"),
    ],
)
def test_the_error_names_what_is_wrong(folder, path, value, said):
    file = folder / "profile.json"
    file.write_text(json.dumps(replaced(json.loads(file.read_text()), path, value)))
    with pytest.raises(ValueError, match=f"the profile is damaged: .*{said}"):
        Profile.load(folder)
