"""Fixtures of several files, and what holds for all tests.

Nothing here may reach a network; said before anything imports huggingface_hub. Where several
processes run tests beside each other (`pytest -n auto`), each keeps to one thread: said before
anything imports torch. How wide a terminal is, which such a process is told, is no test's business.
"""

import gc
import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config, items):
    """Tests with one of these marks run where they are asked for by its name."""
    for mark in ("cluster", "compat", "families"):
        if mark not in config.option.markexpr:
            left_out = [item for item in items if mark in item.keywords]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if mark not in item.keywords]


def pytest_collection_finish(session):
    """What was imported is there to the end: not to be looked through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _token_ids_are_kept():
    try:
        import kept
    except ImportError:  # tests of kernels and routers need no tokenizers
        return
    kept.keep()


@pytest.fixture(autouse=True)
def _pages_without_drawing(request, monkeypatch):
    """HTML pages have empty pictures, which take most of a page's time, but for `drawn` tests."""
    if "drawn" not in request.keywords:
        from moeprof.show import pictures

        monkeypatch.setattr(pictures, "svg", lambda figure, **_: b"<svg></svg>")


@pytest.fixture(params=["memory", "no memory"])
def memory(request, monkeypatch):
    """Whether a copy of the weights fits into memory, as `undoing` asks."""
    from moeprof.measure import snapshot

    if request.param == "no memory":

        def check_memory(needed):
            raise ValueError

        monkeypatch.setattr(snapshot, "check_memory", check_memory)
    return request.param == "memory"


@pytest.fixture(scope="session")
def forked():
    """Forks of a process that has imported what commands import, see `commands.Forks`."""
    from commands import IMPORTED, forks

    with forks(IMPORTED) as started:
        yield started


@pytest.fixture
def no_grad():
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def profile():
    """A profile of three layers and two phases; not to be changed."""
    from profiles import make_profile

    return make_profile(3, 12, 2, padding=0.2, prefill=(20, 33, 8), decode=(1,) * 12 + (4,) * 5)


@pytest.fixture(scope="session")
def _demo():
    from moeprof import demo

    return demo.load()


@pytest.fixture(scope="module")
def loaded(_demo):
    """(model, tokenizer) of the demo, made once; a test that uses it leaves the model as it is."""
    from models import assert_unchanged, snapshot

    model = _demo[0]
    before, writes = snapshot(model), _writes(model)
    yield _demo
    assert_unchanged(model, before)
    assert _writes(model) == writes, "a test wrote to the demo's weights: it needs its own model"


def _writes(model):
    """{parameter: how often something wrote to it}, as torch counts."""
    return {name: parameter._version for name, parameter in model.named_parameters()}
