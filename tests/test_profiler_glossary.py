"""Every number that a profile gives is in the glossary, and all glossaries are made from one."""

import csv
import inspect
from pathlib import Path

import numpy as np
import pytest
from profiles import make_profile

from moeprof.profile import glossary, run, specialisation, tables
from moeprof.profile.metrics import LayerMetrics
from moeprof.studies import ablation

pytestmark = pytest.mark.once

DOCS = Path(__file__).parent.parent / "docs" / "glossary.md"


@pytest.fixture(scope="module")
def profile():
    unread = {"label": 2, "block": "model.layers.2.mlp", "reason": "no router was found"}
    return make_profile(2, 8, 2, facts={"not_counted": [unread]})


def test_every_metric_of_the_csv_and_of_get_metrics_is_explained(profile):
    frame = profile.to_frame()
    named = {glossary.metric_of(name) for name in frame["metric"]}
    asked = set(profile.each()[0].get_summary())
    properties = {
        name
        for name, kind in inspect.getmembers(LayerMetrics)
        if isinstance(kind, property) and not name.startswith("_")
    }
    assert named | asked | properties == set(glossary.METRICS)
    for name, (unit, text) in glossary.METRICS.items():
        assert unit and text.endswith(".") and text[0] != " ", name


def test_every_column_is_explained(profile):
    columns = {name: list(texts) for name, texts in glossary.COLUMNS.items()}
    assert columns["metrics.csv"] == list(profile.to_frame().columns)
    assert columns["ablation.csv"] == list(ablation.COLUMNS)
    assert columns["agreement.csv"] == list(run.AGREEMENT)
    words = {
        "tokens": [1],
        "layers": [0],
        "seen": [9],
        "text": None,
        "counts": np.ones((1, 1, 8), int),
    }
    profile.vocabulary = words
    made = specialisation.by_token(profile)
    profile.vocabulary = None
    assert columns["vocabulary.csv"] == list(made.columns)


def test_the_phases_are_explained(profile):
    said = glossary.COLUMNS["metrics.csv"]["phase"]
    assert all(f"{phase}:" in said for phase in set(profile.to_frame()["phase"]))


def test_every_short_heading_is_explained():
    assert set(glossary.HEADINGS.values()) <= set(glossary.METRICS)
    assert {name for name, _ in tables.LAYER_COLUMNS} <= set(glossary.HEADINGS)


def test_the_documents_are_made_from_it(profile, tmp_path):
    again = "python -m moeprof.profile.glossary > docs/glossary.md writes it anew"
    assert DOCS.read_text(encoding="utf-8") == glossary.as_markdown(), again
    profile.save(tmp_path)
    with open(tmp_path / "glossary.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    metrics = {r["name"]: (r["unit"], r["meaning"]) for r in rows if r["kind"] == "metric"}
    assert metrics == glossary.METRICS
    page = profile.to_html()
    assert all(f'id="metric-{name}"' in page for name in glossary.METRICS)
