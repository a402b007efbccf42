"""Grids on a tiny model: every cell, the rows that come of them, and a run that goes on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import transformers
from models import olmoe

import moeprof
from moeprof import demo
from moeprof.studies import Grid
from moeprof.studies.engine.serial import Serial
from moeprof.studies.grid import COLUMNS, GridWork, grid_frame, run_grid, work
from moeprof.studies.store.store import Store
from moeprof.studies.store.subject import null_digest
from moeprof.texts.windows import heldout_windows

pytestmark = pytest.mark.slow  # test_every_study runs what they are made of on both versions


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """8 experts, top-2, 2 layers, with the demo's tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)
    model = olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def loaded_once(folder):
    """(model, tokenizer) of it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


@pytest.fixture(scope="module")
def nulls(loaded_once):
    texts = [document.text for document in demo.calibration_texts()[::40]]
    return {
        kind: moeprof.fit_null(*loaded_once, texts, kind=kind, progress=False)
        for kind in ("trimmed", "efron")
    }


@pytest.fixture(scope="module", autouse=True)
def _little_text(nulls):
    """A small part of the shipped text, as nulls and budgets take minutes on all of it."""
    budget, heldout = demo.calibration_halves()[1][::16], demo.heldout_texts()[::16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "heldout_texts", lambda: heldout)
        patch.setattr(
            work, "budget_text", lambda tokenizer, seed: heldout_windows(tokenizer, budget, 600)
        )
        patch.setattr(work, "default_null", lambda model, tokenizer, seed, kind: nulls[kind])
        yield


def small(folder, **changes):
    """Settings with which a cell takes little time."""
    quick = {"models": folder, "tokens": 400, "new_tokens": 2, "samples": 2, "repeats": 2}
    return quick | changes


TOKENS = 1500  # of several documents
TABLES = [
    {"router": "topk", "k": [1, "own", 3, 9]},
    {"router": "bh", "max_k": [4, 16], "alpha": 0.2},
    {"router": "fixed_p", "budgets": ["3k/4", 8], "max_k": "own"},
]


@pytest.fixture(scope="module")
def rows(folder, tmp_path_factory):
    with Store(tmp_path_factory.mktemp("rows") / "cells.sqlite") as store:
        return run_grid(Grid(**small(folder, routers=TABLES, tokens=TOKENS)), store)


def test_a_row_for_each_configuration_with_what_it_did(rows, loaded_once, nulls, folder):
    by_name = {row["configuration"]: row for row in rows}
    assert list(by_name) == [
        "topk_2_baseline", "topk_1", "topk_3", "bh_k4_a020", "fixed_p_k2@1.5", "fixed_p_k2@8"
    ]  # fmt: skip
    own, bh = by_name["topk_2_baseline"], by_name["bh_k4_a020"]
    assert (own["avg_experts_heldout"], own["bits_above_own"], own["perplexity_above_own"]) == (
        2, 0, 0
    )  # fmt: skip
    assert own["null"] is None and bh["null"] == "trimmed"
    assert {(row["model"], row["bits"], row["text"], row["seed"]) for row in rows} == {
        (folder, "none", "shipped", 0)
    }

    # what the model itself gives when it is patched in the same way
    model, tokenizer = loaded_once
    heldout = heldout_windows(tokenizer, demo.heldout_texts(), TOKENS, 0)
    nats = {}
    for name, router in ("topk_2_baseline", None), ("bh_k4_a020", moeprof.BH(0.2, max_k=4)):
        null = None if router is None else nulls["trimmed"]
        with moeprof.patch(model, router, null=null):
            nats[name] = sum(_nats(model, window.ids) for window in heldout.windows)
    size = sum(document["bytes"] for document in heldout.documents)
    predicted = sum(window.ids.shape[1] - 1 for window in heldout.windows)
    for name, total in nats.items():
        row = by_name[name]
        assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(total / predicted), rel=1e-5)
    assert bh["bits_above_own"] == pytest.approx(bh["bits_per_byte"] - own["bits_per_byte"])
    assert bh["perplexity_above_own"] == pytest.approx(bh["perplexity"] - own["perplexity"])
    for field in ("bits_above_own", "perplexity_above_own"):
        assert bh[f"{field}_low"] <= bh[field] <= bh[f"{field}_high"]
    assert by_name["topk_1"]["bits_above_static"] == pytest.approx(0)


def _nats(model, ids):
    import torch

    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


def test_bytes_are_those_of_the_experts_that_tokens_take(rows):
    for row in rows:
        if not row["error"]:  # 3 matrices of 32 x 16 floats an expert, in 2 layers
            expected = row["avg_experts_heldout"] * 2 * 3 * 32 * 16 * 4
            assert row["bytes_per_token"] == pytest.approx(expected)


def test_a_budget_sets_the_main_parameter_or_says_why_not(rows):
    reached, beyond = rows[-2:]
    assert reached["budget"] == 1.5 and reached["parameters"]["max_k"] == 2
    assert 0 < reached["parameters"]["t"] < 1 and reached["error"] is None
    assert reached["avg_experts_heldout"] == pytest.approx(1.5, rel=0.2)
    assert "reaches from" in beyond["error"] and beyond["bits_per_byte"] is None
    assert beyond["tokens_per_s"] is None


@pytest.mark.slow
def test_every_configuration_is_timed_in_every_round(folder, tmp_path, monkeypatch):
    calls = []

    def decode_speeds(model, prompts, timed, *, seed, new_tokens, step):
        assert len(prompts) == 5 and new_tokens == 2 and seed == 0
        calls.extend(tuple(ids[0].tolist()) for ids in prompts)
        return [[100.0 * n + place for n in range(1, 6)] for place in range(len(timed))]

    monkeypatch.setattr(work, "decode_speeds", decode_speeds)
    grid = Grid(**small(folder, routers=TABLES[:1], repeats=5))
    with Store(tmp_path / "cells.sqlite") as store:
        rows = run_grid(grid, store)
        assert len(calls) == 5 and len(set(calls)) == 2  # two prompts in turn
        for place, row in enumerate(rows):
            speeds = [row[f"tokens_per_s{end}"] for end in ("_low", "", "_high")]
            assert speeds == [200 + place, 300 + place, 400 + place]
        run_grid(grid, store)
        assert len(calls) == 5  # they are in the store


@pytest.mark.parametrize("name", ["bh-21", "bh-20-later", "equal-budget"])
def test_every_shipped_grid_runs(name, folder, tmp_path, capsys):
    grid = replace(Grid.read(name), **small(folder, repeats=1))
    with Store(tmp_path / "cells.sqlite") as store:
        frame = grid_frame(run_grid(grid, store))
    planned = grid.configurations(8, 2)
    assert capsys.readouterr().out.count("Left out: ") == len(planned.dropped)
    assert list(frame["configuration"]) == [one.name for one in planned.configurations]
    assert tuple(frame.columns) == COLUMNS
    measured = frame[frame["error"].isna()]
    assert len(measured) > len(frame) // 2 and measured["tokens_per_s"].gt(0).all()
    assert np.isfinite(measured["bits_per_byte"]).all()


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted(folder, tmp_path, monkeypatch):
    grid = Grid(**small(folder, routers=TABLES[:2], seeds=[0, 1], repeats=0))
    ran = []

    class Ends(Serial):
        """Interrupted after five cells."""

        def run(self, work, cells, store, listener):
            def begin(cell):
                if len(ran) == 5:
                    raise KeyboardInterrupt
                ran.append(cell.name)

            super().run(work, cells, store, replace(listener, begin=begin))

    with Store(tmp_path / "cells.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            run_grid(grid, store, lambda source: Ends())
        assert len(store.rows()) == 5  # 4 of the first seed, 1 of the second
        rows = run_grid(grid, store)
        assert len(store.rows()) == 8 and len(rows) == 8
    assert rows[0]["bits_per_byte"] != rows[4]["bits_per_byte"]  # other passages


def test_a_work_made_again_has_the_same_cells_and_subject(folder, loaded_once):
    """As another process does it; a configuration's key is of its own null alone."""
    import pickle

    grid = Grid(**small(folder, routers=TABLES))
    first = GridWork.of(grid, *loaded_once, "shipped", 0)
    again = pickle.loads(pickle.dumps(first.make))(*loaded_once)
    assert again.cells == first.cells and again.subject == first.subject
    more = GridWork.of(replace(grid, nulls=["trimmed", "normal"]), *loaded_once, "shipped", 0)
    named = {cell.name: cell.parameters for cell in more.cells}
    assert named["topk_1"] == first.cells[1].parameters
    assert named["bh_k4_a020 on trimmed"] == first.cells[3].parameters
    assert named["bh_k4_a020 on normal"]["null"] == null_digest("normal")


def test_bits_of_the_experts_are_a_setting(folder, tmp_path):
    if transformers.__version__.startswith("4."):
        pytest.skip("needs the experts of transformers 5")
    grid = Grid(**small(folder, bits=["none", 8], routers={"router": "topk", "k": 1}, repeats=0))
    with Store(tmp_path / "cells.sqlite") as store:
        rows = run_grid(grid, store)
    assert [row["bits"] for row in rows] == ["none", "none", 8, 8]
    assert rows[3]["bytes_per_token"] < 0.5 * rows[1]["bytes_per_token"]


def test_what_can_only_be_told_of_the_model_is_said_before_anything_runs(folder, tmp_path):
    path = tmp_path / "grid.toml"
    with Store(tmp_path / "cells.sqlite") as store:
        path.write_text(f'models = ["{folder}"]\ntexts = "text.txt"\nsamples = 9\n')
        (tmp_path / "text.txt").write_text("The list is short. " * 12)
        with pytest.raises(OSError, match=r"grid.toml:2: texts: "):
            run_grid(Grid.read(path), store)
        here = replace(Grid.read(path), texts=str(tmp_path / "text.txt"))
        with pytest.raises(ValueError, match=r"grid.toml:3: samples: the text has 2 passages"):
            run_grid(here, store)
        moeprof.demo.null().save(tmp_path / "demo.npz")
        grid = Grid(**small(folder, nulls=str(tmp_path / "demo.npz"), routers={"router": "bh"}))
        with pytest.raises(ValueError, match=r"^Grid: .*demo\.npz: this null was fitted to"):
            run_grid(grid, store)
        assert store.rows() == []
