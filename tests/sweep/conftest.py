"""One tiny OLMoE, and what a sweep of it gives; made once, for all tests of sweeps."""

import contextlib
import io

import pytest
import transformers
from models import olmoe
from sweep_setting import FACTS, NEW_TOKENS, PROMPTS, measured

import moeprof
from moeprof import demo
from moeprof.studies.sweep import Configuration, Experiment, SweepFiles, configurations, sweep
from moeprof.texts.windows import heldout_windows


@pytest.fixture(scope="session")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(demo.PATH, local_files_only=True)


@pytest.fixture(scope="session")
def model(tokenizer):
    """8 experts, top-2, 2 layers; weights large enough for tokens to differ in their experts."""
    return olmoe(vocab_size=len(tokenizer), max_position_embeddings=1024, initializer_range=0.3)


@pytest.fixture(scope="session")
def null(model, tokenizer):
    texts = [document.text for document in demo.calibration_texts()[::40]]
    return moeprof.fit_null(model, tokenizer, texts, kind="trimmed", progress=False)


@pytest.fixture(scope="session")
def experiment(model, tokenizer, null):
    heldout = heldout_windows(tokenizer, demo.heldout_texts()[::24], 2500)
    complexities, texts = zip(*PROMPTS, strict=True)
    return Experiment(model, tokenizer, texts, complexities, heldout, null, NEW_TOKENS)


@pytest.fixture(scope="session")
def baseline(experiment):
    return measured(experiment, configurations(8, 2)[0])


@pytest.fixture(scope="session")
def bh(experiment, baseline):
    return measured(experiment, Configuration("bh_k4_a020", "bh", 0.2, 4), baseline)


@pytest.fixture(scope="session")
def swept(experiment, tmp_path_factory):
    """A whole sweep, the folder that it wrote, and what it printed."""
    files = SweepFiles(tmp_path_factory.mktemp("results"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = sweep(experiment, files, FACTS)
    return result, files, printed.getvalue()


@pytest.fixture(scope="session")
def run(swept):
    """A whole sweep, and the folder that it wrote."""
    return swept[:2]
