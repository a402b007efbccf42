"""The shipped demo model, its text, and the script that made them.

`python tests/test_demo.py` writes the fixture demo_logits.npz anew, after the model has changed.
"""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import kept  # noqa: E402

from moeprof import demo  # noqa: E402
from moeprof.demo.make import corpus, evaluation, train  # noqa: E402
from moeprof.models import tokens  # noqa: E402
from moeprof.texts import windows  # noqa: E402

FIXTURE = Path(__file__).parent / "data" / "demo_logits.npz"
RECORD = json.loads((demo.PATH / "training.json").read_text())


def few_documents(each):
    """The first `each` held-out documents of every domain."""
    documents = demo.heldout_texts()
    return [d for name in corpus.DOMAINS for d in [x for x in documents if x.domain == name][:each]]


def logits_of(model, tokenizer):
    """Logits after 64 tokens of one held-out document a domain: [domains, vocabulary]."""
    ids = [tokenizer(d.text, verbose=False)["input_ids"][:64] for d in few_documents(1)]
    with torch.no_grad():
        return np.array(ids), model(torch.tensor(ids)).logits[:, -1].numpy()


# --- the files ------------------------------------------------------------------------------------


def test_import_needs_no_torch():
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    subprocess.run([sys.executable, "-c", code + "import moeprof.demo"], check=True)


def test_documents_are_split_and_small():
    calibration, heldout = demo.calibration_texts(), demo.heldout_texts()
    for documents in (calibration, heldout):
        assert min(Counter(d.domain for d in documents).values()) >= 30
        assert {d.domain for d in documents} == set(corpus.DOMAINS)
    both = calibration + heldout
    assert len({d.text for d in both}) == len({(d.domain, d.name) for d in both}) == len(both)
    data = demo.PATH.parent / "data"
    assert sum(path.stat().st_size for path in data.glob("*.jsonl")) <= 1_500_000


def test_licences_are_stated():
    licences = (demo.PATH.parent / "data" / "LICENSES.md").read_text(encoding="utf-8")
    for text in (licences, train.__doc__):
        for domain in corpus.DOMAINS:
            line = next(row for row in text.splitlines() if domain in row.split()[:2])
            assert line, domain
        for package in ("bible-kjv-text", "jargon-text", "python3.11-doc", "libpython3.11-stdlib"):
            assert package in text
        assert "public domain" in text and "PSF licence" in text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licences


def test_prompts():
    prompts = demo.prompts()
    assert len({text for _, text in prompts}) == 12
    assert Counter(complexity for complexity, _ in prompts) == dict.fromkeys(
        ("simple", "medium", "complex", "technical"), 3
    )


def test_model_is_small():
    files = [demo.PATH / "model.safetensors", demo.PATH / "tokenizer.json"]
    assert sum(path.stat().st_size for path in files) <= 10_000_000


def test_weights_have_the_hubs_names():
    from safetensors import safe_open

    with safe_open(demo.PATH / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"
    assert {"model.layers.0.mlp.experts.63.gate_proj.weight", "lm_head.weight"} <= names
    assert not any("gate_up_proj" in name for name in names)


def test_record_belongs_to_the_weights():
    weights = (demo.PATH / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == RECORD["weights_sha256"]
    assert RECORD["curve"]["step"][-1] <= RECORD["steps"]
    assert RECORD["curve"]["loss"][-1] < RECORD["curve"]["loss"][0]


# --- the model ------------------------------------------------------------------------------------


def test_loads_without_missing_or_unexpected_keys():
    _, info = transformers.AutoModelForCausalLM.from_pretrained(demo.PATH, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_load(loaded):
    model, _ = loaded
    config = model.config
    assert type(model) is transformers.OlmoeForCausalLM and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (config.num_experts, config.num_experts_per_tok) == (64, 8)
    assert config.norm_topk_prob is False and config.num_hidden_layers >= 4
    assert demo.load(torch.bfloat16)[0].dtype == torch.bfloat16


def test_same_logits_in_every_transformers_version(loaded):
    ids, logits = logits_of(*loaded)
    stored = np.load(FIXTURE)
    np.testing.assert_array_equal(ids, stored["ids"])
    error = np.linalg.norm(logits - stored["logits"]) / np.linalg.norm(stored["logits"])
    assert error <= 1e-5


def test_tokenizer(loaded):
    tokenizer = loaded[1]
    texts = [d.text for d in few_documents(2)] + ["\x00 \t\n\n  naïve 東京 🙂\u2028 <|x|>", ""]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    batch = tokenizer(["a b c d e f", "a"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"][1][0] == 0 and batch["attention_mask"][1][-1] == 1
    assert tokenizer.padding_side == "left"
    assert (tokenizer.eos_token, tokenizer.pad_token) == (train.EOS, train.PAD)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_kept_token_ids_are_the_tokenizers(loaded):
    """What other tests take, see kept.py; not for a tokenizer that was changed."""
    text, tokenizer = demo.heldout_texts()[0].text, deepcopy(loaded[1])
    assert windows.token_ids is kept.token_ids and kept.is_demos(tokenizer)
    assert windows.token_ids(tokenizer, text) == tokens.token_ids(tokenizer, text)
    tokenizer.add_tokens([text[:9]])
    assert not kept.is_demos(tokenizer)


def check_results(results, margin):
    """The demo model's promises; `results` as evaluate() gives them."""
    model, xz = results["bits_per_byte"], results["xz_bits_per_byte"]
    assert all(model[name] < xz[name] for name in [*corpus.DOMAINS, "total"])
    assert model["total"] <= margin * xz["total"]
    assert results["random_experts_bits_per_byte"]["total"] >= model["total"] + 0.3
    assert results["experts_used"] == [64] * 4
    assert max(results["load_gini"]) < 0.5


def test_recorded_results():
    assert RECORD["heldout"]["documents"] == len(demo.heldout_texts())
    check_results(RECORD["heldout"], margin=0.9)


@pytest.fixture
def own():
    """(model, tokenizer) of one test: transformers 5 leaves its recorder of logits in the model."""
    return demo.load()


@pytest.mark.slow
def test_routing_matters_and_text_is_compressed(own):
    results = evaluation.evaluate(*own, few_documents(4))
    check_results(results, margin=0.9)
    recorded = RECORD["heldout"]["bits_per_byte"]
    assert results["bits_per_byte"]["total"] == pytest.approx(recorded["total"], abs=0.2)


# --- evaluation -----------------------------------------------------------------------------------


def test_bytes_of_tokens(loaded):
    text = "naïve text 東京 \U0001f642\n"
    ids = loaded[1](text)["input_ids"]
    assert evaluation.token_bytes(loaded[1])[ids].sum() == len(text.encode())


def test_first_token_of_a_window_is_not_counted(own):
    model, tokenizer = own
    document = demo.Document("docs", "made up", "a plain text of some words. " * 200)
    totals, load = evaluation.bits_and_load(model, tokenizer, [document])
    ids = tokenizer(document.text, verbose=False)["input_ids"]
    given = [tokenizer.decode(ids[start : start + 1]) for start in range(0, len(ids), 512)]
    assert len(given) > 1
    assert totals["docs"][1] == len(document.text) - len("".join(given))
    assert load.sum(dim=1).tolist() == [8 * len(ids)] * 4


def test_random_experts_keeps_the_weights():
    scores = torch.rand(50, 64).softmax(dim=-1)
    best = torch.topk(scores, 8, dim=-1)
    with evaluation.random_experts(seed=1):
        weights, experts = torch.topk(scores, 8, dim=-1)
    assert torch.equal(weights, best.values)
    assert all(len(set(row)) == 8 for row in experts.tolist())
    assert not torch.equal(experts, best.indices)
    with evaluation.random_experts(seed=1):
        assert torch.equal(torch.topk(scores, 8, dim=-1)[1], experts)


def test_gini():
    assert evaluation.gini([1, 1, 1, 1]) == 0
    assert evaluation.gini([0, 0, 0, 1]) == 0.75


# --- training -------------------------------------------------------------------------------------


class StopAfter:
    """Like train.Stop, but after a number of steps; leaves the signal handlers alone."""

    def __init__(self, steps=10**9):
        self.left = steps + 1

    def __bool__(self):
        self.left -= 1
        return self.left <= 0


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A made-up text of all four domains, and a training small enough for it."""
    small = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2}
    small |= {"num_experts": 8, "num_experts_per_tok": 2}
    monkeypatch.setattr(train, "ARCHITECTURE", train.ARCHITECTURE | small)
    sizes = {"HELD_BACK": 2, "CUT_BYTES": 200}
    sizes |= {"ELIGIBLE_BYTES": (100, 10**4), "JARGON_BYTES": (150, 300)}
    for name, value in sizes.items():
        monkeypatch.setattr(corpus, name, value)
    for name, value in {"VOCAB": 300, "WINDOW": 32, "BATCH": 2, "LOG_EVERY": 1}.items():
        monkeypatch.setattr(train, name, value)
    monkeypatch.setattr(evaluation, "WINDOW", 32)
    monkeypatch.setattr(train, "Stop", StopAfter)
    folder = tmp_path / "text"
    verses = [f"  {v} And there was a verse of number {v}.\n" for v in range(1, 9)]
    chapters = [f"\nBook {c}\n\n" + "".join(verses[c % 3 :]) for c in range(1, 10)]
    entries = [f"   :word{e}: n.\n\n   Said of the thing {e}, see {{word}}." for e in range(60)]
    for kind, ending in (("docs", "txt"), ("code", "py")):
        (folder / kind).mkdir(parents=True)
        for i in range(9):
            lines = [f"{kind} line {line} of file {i}\n" for line in range(20)]
            (folder / kind / f"f{i}.{ending}").write_text("".join(lines))
    (folder / "bible.txt").write_text("".join(chapters))
    (folder / "jargon.txt").write_text("\n\n".join(entries))
    return folder


def run_main(text, out, *options):
    train.main(["--text", str(text), "--out", str(out), "--threads", "1", *options])
    return json.loads((out / "model" / "training.json").read_text())


def test_split_holds_whole_documents_back(text):
    documents = corpus.read_text(text)
    training, calibration, heldout = corpus.split(documents, seed=0)
    for domain in corpus.DOMAINS:
        names = [
            {d.name for d in part if d.domain == domain}
            for part in (training[domain], calibration, heldout)
        ]
        assert [len(n) for n in names] == [len(documents[domain]) - 4, 2, 2]
        assert len(set.union(*names)) == len(documents[domain])
    originals = {(d.domain, d.name): d.text for part in documents.values() for d in part}
    for d in calibration + heldout:
        assert originals[d.domain, d.name].startswith(d.text) and d.text.endswith("\n")
        assert len(d.text.encode()) <= 200
    assert corpus.split(documents, seed=0)[1:] == (calibration, heldout)
    assert corpus.split(documents, seed=1)[1:] != (calibration, heldout)


def test_duplicates_and_empty_files_are_dropped(text):
    (text / "docs" / "copy.txt").write_text((text / "docs" / "f0.txt").read_text())
    (text / "docs" / "empty.txt").write_text("\n")
    assert len(corpus.read_text(text)["docs"]) == 9


@pytest.mark.slow
def test_training_resumes_bit_for_bit(text, tmp_path, monkeypatch):
    whole = run_main(text, tmp_path / "whole", "--steps", "6")
    monkeypatch.setattr(train, "Stop", lambda: StopAfter(3))
    assert run_main(text, tmp_path / "parts", "--steps", "6")["steps"] == 3
    monkeypatch.setattr(train, "Stop", StopAfter)
    parts = run_main(text, tmp_path / "parts", "--steps", "6", "--resume")
    assert parts["curve"]["step"] == [1, 2, 3, 4, 5, 6]
    assert parts["curve"]["loss"] == whole["curve"]["loss"]
    assert parts["weights_sha256"] == whole["weights_sha256"]
    assert parts["heldout"] == whole["heldout"]
    train.main(["--export", "--out", str(tmp_path / "parts"), "--threads", "1"])
    again = json.loads((tmp_path / "parts" / "model" / "training.json").read_text())
    assert again["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.slow  # of the clock
def test_minutes_are_measured(text, tmp_path):
    assert run_main(text, tmp_path / "out", "--minutes", "0.001")["steps"] >= 1


def test_learning_rate():
    rates = [train.learning_rate(step, 1000) for step in range(1000)]
    assert 0 < rates[0] < rates[50] < rates[100] == rates[500] == train.PEAK_LR
    assert rates[500] > rates[750] > rates[999] > 0


def test_balance_loss_sees_each_layer():
    """Opposite imbalances in two layers cancel when pooled, as transformers pools them."""
    one = torch.zeros(6, 4)
    one[:, 0] = 9.0
    other = torch.zeros(6, 4)
    other[:, 1] = 9.0
    balance, z, load = train.router_losses([one, other], k=1)
    assert balance == pytest.approx(4, rel=0.01)
    assert z == pytest.approx(81, rel=0.01)
    assert load.tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


if __name__ == "__main__":
    FIXTURE.parent.mkdir(exist_ok=True)
    fixture_ids, fixture_logits = logits_of(*demo.load())
    np.savez_compressed(FIXTURE, ids=fixture_ids, logits=fixture_logits)
