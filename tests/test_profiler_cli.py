"""`moeprof profile`: what it writes, and one clear line, in time, for what is wrong."""

import importlib
import importlib.util
import json
import os
import sys

import numpy as np
import pandas
import pytest
import transformers
from commands import MAIN
from models import olmoe
from wording import says
from zoo import build

import moeprof
from moeprof import cli, demo
from moeprof.cli import profile as profile_arguments
from moeprof.models import families
from moeprof.profile import run
from moeprof.profiler.records import read_records

SAVED = ["counts.npz", "glossary.csv", "index.html", "metrics.csv", "profile.json"]


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A function: the folder of a model and its tokenizer."""

    def saved(name, model):
        folder = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return saved


@pytest.fixture(scope="module")
def tiny(folder, tokenizer):
    model = olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3)
    return folder("tiny", model)


@pytest.fixture(scope="module")
def mixtral(folder, tokenizer):
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    return folder("mixtral", build("mixtral", num_experts_per_tok=2, **sizes))


@pytest.fixture(autouse=True)
def no_roofline(monkeypatch):
    """Seconds of measuring that these tests don't need."""
    module = importlib.import_module("moeprof.measure.roofline")
    roof = module.Roofline(20.0, 900.0, "float32", 10**6, 0.0)
    monkeypatch.setattr(module, "roofline", lambda model: roof)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text(demo.heldout_texts()[0].text[:4000])
    return path


@pytest.fixture
def unloaded(monkeypatch):
    """The model must not be loaded: what is wrong is told before."""

    def fail(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("moeprof.models.load.load_model", fail)
    monkeypatch.setattr(demo, "load", fail)


def profile(*options):
    quick = ("--tokens", 300, "--continuations", 2, "--new-tokens", 2)
    return cli.main(["profile", *map(str, (*quick, *options))])


def error(capsys):
    """The one line on stderr."""
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("moeprof: error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_everything_at_once(tiny, text, tmp_path, capsys):
    out, records = tmp_path / "new" / "out", tmp_path / "records"
    options = [
        "--tokens",
        900,
        "--router",
        "bh:alpha=0.3,max_k=4",
        "--null",
        "normal",
        "--trace",
        "--ablation",
        "--vocabulary",
        "--records",
        records,
        "--batch",
        1,
        2,
    ]
    assert profile("--model", tiny, "--text", text, "--out", out, *options) == 0
    extra = ["ablation.csv", "agreement.csv", "trace.json", "vocabulary.csv"]
    assert sorted(p.name for p in out.iterdir()) == sorted(SAVED + extra)
    said = capsys.readouterr().out
    assert "BH(" in said and "max_k=4" in said
    assert "Agreement with the model's own router" in said
    assert "What a layer's experts are worth" in said
    assert max(map(len, said.split("Written:")[0].splitlines())) <= 100
    assert [line.split("/")[-1] for line in said.splitlines() if "Written" in line] == [
        "index.html",
        "agreement.csv",
        "ablation.csv",
        "counts.npz",
        "metrics.csv",
        "glossary.csv",
        "vocabulary.csv",
        "profile.json",
        "trace.json",
    ]
    result = moeprof.Profile.load(out)
    assert list(result.domains) == ["prose"] and result.facts["notes"] == []
    frame = read_records(records)
    decode = frame[(frame["phase"] == "decode") & (frame["layer"] == 0)]
    assert sorted(decode.groupby("step").size()) == [1, 1, 1, 1, 2, 2]  # 2 prompts; then both
    assert result.each("decode")[0].tokens == len(decode) == 8
    assert result.each("prefill")[0].tokens == sum(
        (frame["phase"] == "prefill") & (frame["layer"] == 0)
    )
    agreement = pandas.read_csv(out / "agreement.csv")
    assert list(agreement["layer"]) == [0, 1]
    assert (agreement["agreement"] <= agreement["at_most"] + 1e-12).all()
    assert set(pandas.read_csv(out / "ablation.csv")["k"]) == {1}
    tracks = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in tracks) == 2 * frame["step"].nunique()
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "Agreement with the model" in page and "What a layer" in page
    assert "<th>same experts</th>" in page and "<th>change of loss</th>" in page
    assert "mlp.gate" not in page  # each layer's name, which its number says already
    assert any(isinstance(word, str) and word.strip() for word in result.vocabulary["text"])
    assert profile("--model", tiny, "--text", text, "--out", out, "--continuations", 0) == 0
    assert sorted(p.name for p in out.iterdir()) == SAVED  # nothing of the profile before is left


@pytest.mark.slow
def test_without_a_text_the_shipped_one_runs(tiny, tmp_path, capsys):
    assert profile("--model", tiny, "--out", tmp_path / "out", "--continuations", 0) == 0
    result = moeprof.Profile.load(tmp_path / "out")
    assert result.phases == ["prefill"] and "decode" not in capsys.readouterr().out
    assert set(result.domains) <= {d.domain for d in demo.heldout_texts()}


@pytest.mark.slow
def test_a_model_that_is_not_patched_is_profiled_as_it_is(mixtral, text, tmp_path, capsys):
    assert profile("--model", mixtral, "--text", text, "--out", tmp_path / "out") == 0
    assert "2 layers of 8 experts, top-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [("--router", "topk:k=1"), ("--patched",), ("--ablation",), ("--router", "bh")]
)
def test_a_model_that_cannot_be_patched_leaves_nothing(
    mixtral, text, tmp_path, capsys, option, monkeypatch
):
    """Told before anything runs: neither a folder nor records are left."""
    monkeypatch.setattr(families, "FAMILIES", ())
    places = "--out", tmp_path / "out", "--records", tmp_path / "records"
    assert profile("--model", mixtral, "--text", text, *places, *option) == 2
    assert "No routers found in MixtralForCausalLM" in error(capsys)
    assert not (tmp_path / "out").exists() and not (tmp_path / "records").exists()


@pytest.mark.slow
def test_files_of_the_same_name_are_domains_of_their_own(tiny, text, tmp_path):
    other = tmp_path / "other" / text.name
    other.parent.mkdir()
    other.write_text(demo.heldout_texts()[-1].text[:2000])
    out = tmp_path / "out"
    given = "--text", text, other, text, "--tokens", 900, "--continuations", 0
    assert profile("--model", tiny, *given, "--out", out) == 0
    assert sorted(moeprof.Profile.load(out).domains) == sorted([str(text), str(other)])


@pytest.mark.slow
def test_documents_keep_their_domains(tiny, text, tmp_path):
    """What names none has the name of its file or folder."""
    passage = demo.heldout_texts()[-1].text[:700]
    rows = [{"text": passage, "domain": "en"}, {"text": passage, "domain": "de"}, {"text": passage}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inside = tmp_path / "kept" / "code"
    inside.mkdir(parents=True)
    for folder in (inside, inside.parent):
        (folder / "x.txt").write_text(passage)
    out, given = tmp_path / "out", (tmp_path / "chat.jsonl", inside.parent, text)
    options = "--tokens", 1800, "--continuations", 0, "--out", out
    assert profile("--model", tiny, "--text", *given, *options) == 0
    domains = moeprof.Profile.load(out).domains
    assert sorted(domains) == ["chat", "code", "de", "en", "kept", "prose"]


@pytest.mark.slow
def test_short_texts(tiny, tmp_path, capsys):
    """Without a passage to continue there are no decode steps, and that is said."""
    short = tmp_path / "short.txt"
    short.write_text("Hello there, you.")
    out = tmp_path / "out"
    given = "--model", tiny, "--text", short, "--out", out
    assert profile(*given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert says(said, "No decode steps", "no passage of 64 tokens")
    assert moeprof.Profile.load(out).phases == ["prefill"] and (out / "index.html").exists()
    assert profile(*given, "--continuations", 0) == 0  # none were asked for
    assert "No decode steps" not in capsys.readouterr().out
    one = tmp_path / "one.txt"
    one.write_text("a")
    assert profile("--model", tiny, "--text", one, "--continuations", 0, "--out", out) == 2
    assert "two tokens" in error(capsys)


@pytest.mark.slow
def test_fewer_prompts_than_asked_for(tiny, text, tmp_path, capsys):
    out = tmp_path / "out"
    options = "--text", text, "--out", out, "--continuations", 64, "--batch", 32, 64
    assert profile("--model", tiny, *options) == 0
    said = " ".join(capsys.readouterr().out.split())
    result = moeprof.Profile.load(out)
    read = result.each("prefill")[0].tokens
    assert says(said, "of 64 prompts were continued", f"{read:,} tokens", "no other passage of 64")
    assert result.each("decode")[0].steps == 2  # once, for both sizes are more than there are


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--text", "nofile.txt"), "nofile.txt can't be read: No such file"),
        (("--text", "empty.txt"), "empty.txt is empty"),
        (("--text", "bytes.txt"), "isn't UTF-8"),
        (("--text", "full"), "text full: the folder has no .txt"),
        (("--text", "bad.jsonl"), "bad.jsonl, line 1: no such document"),
        (("--router", "nope"), "there is no 'nope'"),
        (("--router", ""), "expected a router and its parameters"),
        (("--router", "bh:alpha=2"), "alpha: expected a number in (0, 1), got 2"),
        (("--router", "bh:foo=1"), "bh takes no 'foo'"),
        (("--router", "bh:alpha"), "expected KEY=VALUE, got 'alpha'"),
        (("--router", "bh:alpha=[0.1,0.2]"), "KEY=VALUE"),
        (("--router", "bh@6"), "a profile sets no budget; give alpha"),
        (("--router", "bh", "--patched"), "--patched runs the model's own router"),
        (("--null", "normal"), "no --router is given"),
        (("--router", "bh", "--null", "nonull.npz"), "nonull.npz"),
        (("--records", "full"), "full exists already"),
        (("--records", "x.csv"), "x.csv: expected a .parquet file, or a folder"),
        (("--records", "full/file/x"), "can't be written"),
        (("--out", "full/file"), "can't be written"),
        (("--out", "full/file/x"), "can't be written"),
        (("--batch", 3), "--batch 3: expected at most --continuations, which is 2"),
        (("--batch", 0), "--batch"),
        (("--tokens", 1), "--tokens"),
        (("--continuations", -1), "--continuations"),
        (("--new-tokens", 0), "--new-tokens"),
        (("--model", "nowhere"), "nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_told_before_the_model_is_loaded(
    unloaded, tmp_path, monkeypatch, capsys, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.jsonl").write_text('{"messages": []}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    try:
        code = profile(*options)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert words in error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_without_pyarrow_is_told_before_the_model_is_loaded(
    unloaded, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "pyarrow" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    assert profile("--records", tmp_path / "r.parquet") == 2
    assert "moeprof[records]" in error(capsys)


def test_what_was_measured_is_on_disk_before_the_ablation(tiny, text, tmp_path, monkeypatch):
    """Ctrl-C in what takes long: exit code 130, and a profile that can be loaded; what else an
    earlier one wrote is still there."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(profile_arguments, "_ablation", interrupted)
    out, earlier = tmp_path / "out", ["index.html", "trace.json", "vocabulary.csv"]
    out.mkdir()
    for name in ["profile.json", *earlier]:
        (out / name).touch()
    assert profile("--model", tiny, "--text", text, "--out", out, "--ablation") == 130
    assert moeprof.Profile.load(out).phases == ["prefill", "decode"]
    assert all((out / name).exists() for name in earlier)
    assert not list(out.glob(".*"))


def test_a_profile_is_written_whatever_becomes_of_what_is_printed(
    tiny, text, tmp_path, monkeypatch, capsys
):
    """The pipe's reader has gone, the disk is full, or the encoding lacks characters."""
    reading, writing = os.pipe()
    os.close(reading)
    shown = tmp_path / "shown"
    outputs = [(open(writing, "w"), 141), (shown.open("w", encoding="ascii"), 0)]
    if os.path.exists("/dev/full"):
        outputs.append((open("/dev/full", "w"), 2))
    for number, (stdout, code) in enumerate(outputs):
        out = tmp_path / str(number)
        with stdout, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            assert profile("--model", tiny, "--text", text, "--out", out) == code
        assert sorted(p.name for p in out.iterdir()) == SAVED
        said = "moeprof: error: standard output can't be written: No space left on device\n"
        assert capsys.readouterr().err == (said if code == 2 else "")
    assert "Written: " in shown.read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_half_written(forked, tiny, tmp_path):
    """The records before it are readable."""
    records, out = tmp_path / "records.parquet", tmp_path / "out"
    pytest.importorskip("pyarrow")
    options = ["--records", records, "--tokens", 200_000, "--continuations", 0, "--out", out]

    def written():
        return records.exists() and records.stat().st_size > 1000

    # Not after 33 000 tokens.
    soon = "from moeprof.profiler import records; records.CHUNK = 1 << 12; "
    ended = forked.run(soon + MAIN, "profile", "--model", tiny, *options, until=written)
    assert (ended.returncode, ended.stderr) == (130, "moeprof: interrupted\n")
    assert not out.exists()
    assert len(read_records(records)) > 0


class TestRun:
    """What a plan runs, counted."""

    @pytest.fixture
    def model(self, tokenizer):
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
        return olmoe(**size, initializer_range=0.3)

    @pytest.fixture
    def documents(self):
        """The first and the last of the shipped ones, of two domains."""
        shipped = demo.heldout_texts()
        cut = [demo.Document(d.domain, d.name, d.text[:1000]) for d in (shipped[0], shipped[-1])]
        assert cut[0].domain != cut[1].domain
        return cut

    @pytest.mark.parametrize("batches", [(1,), (2,), (1, 2)])
    def test_prompts_are_counted_once_and_mixed_batches_are_of_no_domain(
        self, model, tokenizer, documents, batches
    ):
        planned = run.plan(
            tokenizer, documents, tokens=10_000, prompts=2, new_tokens=3, batches=batches
        )
        result = run.profile_texts(model, planned)
        prefill, decode = result.each("prefill")[0], result.each("decode")[0]
        assert (prefill.steps, prefill.tokens) == (len(planned.text.windows), planned.text.tokens)
        assert planned.prompts == 2 and decode.tokens == 6 * len(batches)
        labelled = sum(int(table[0, -1]) for table in result.domains.values())
        assert labelled == prefill.tokens + (6 if 1 in batches else 0)
        assert decode.steps == planned.steps - len(planned.text.windows)

    def test_each_batch_size_has_its_own_row(self, model, tokenizer, documents):
        planned = run.plan(
            tokenizer, documents, tokens=10_000, prompts=2, new_tokens=3, batches=(1, 2)
        )
        result = run.profile_texts(model, planned)
        text, frame = result.summary(), result.to_frame()
        assert "decode step at batch 1 " in text and "decode step at batch 2 " in text
        assert "A decode step spends" not in text
        found = {}
        for size in (1, 2):
            alone = run.plan(
                tokenizer, documents, tokens=10_000, prompts=2, new_tokens=3, batches=(size,)
            )
            metrics = run.profile_texts(model, alone).each("decode")
            rows = frame[frame["phase"] == f"decode_batch_{size}"]
            found[size] = dict(zip(rows["metric"], rows["value"], strict=True))
            assert rows["layer"].isna().all() and found[size]["steps"] == metrics[0].steps
            for name, of in (
                ("k_mean", np.mean),
                ("unique_experts_mean", np.mean),
                ("bytes_per_step", np.sum),
            ):
                expected = of([getattr(m, name) for m in metrics])
                assert found[size][name] == pytest.approx(expected)
        assert found[1]["steps"] == 2 * found[2]["steps"] == 6
        assert found[1]["unique_experts_mean"] < found[2]["unique_experts_mean"]

    def test_a_router_of_fewer_experts_can_agree_no_more_than_with_them(
        self, model, tokenizer, documents
    ):
        planned = run.plan(tokenizer, documents, tokens=500, prompts=0, new_tokens=1, batches=())
        frame = run.agreement_by_layer(model, planned, {"router": "topk", "k": 1})
        assert (frame["at_most"] == 0.5).all() and (frame["same_experts"] == 0).all()
        assert frame["agreement"][0] == 0.5  # the first layer sees the same states
        assert (frame["tokens"] == planned.text.tokens).all()
