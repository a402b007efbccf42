"""Steps of several phases: in each with its tokens, and once in all phases together."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from models import blocks, olmoe

import moeprof
from moeprof.profile.metrics import LayerMetrics


def run_mixed(profiler, block, hidden, phases):
    step = profiler._session.begin(entered=True)
    step.phases = "prefill" if phases is None else np.array(phases, np.int8)
    block(hidden)
    profiler._session.end()


@pytest.mark.parametrize("pairs", (True, False))
def test_a_step_of_several_phases_is_one_step_of_all(tmp_path, pairs):
    """All phases together are what the same steps count where each is of one phase only."""
    model, hidden = olmoe(), torch.randn(3, 1, 7, 32)
    found = []
    for mixed in (True, False):
        with torch.no_grad(), moeprof.MoEProfiler(model, pairs=pairs) as profiler:
            for rows, phases in zip(
                hidden, ([0] * 5 + [1] * 2, [1] * 7, [2, 0, 0, 0, 1, 1, 1]), strict=True
            ):
                for block in blocks(model):
                    run_mixed(profiler, block, rows, phases if mixed else None)
        found.append(profiler.result())
    assert [found[0].each(p)[0].steps for p in ("prefill", "decode", "verify")] == [2, 3, 1]
    for own, once in zip(found[0].each(), found[1].each(), strict=True):
        assert own.steps == 3
        for name in (
            "k",
            "load",
            "unique",
            "batch_steps",
            "batch_unique",
            "reuse",
            "pairs",
            "moves",
            "confidence",
        ):
            assert np.array_equal(getattr(own.counts, name), getattr(once.counts, name)), name
        assert own.counts.latency.sum() == 3 and own.counts.latency.min() == 0
        assert own.bytes_per_step == once.bytes_per_step
        adapted = [LayerMetrics(replace(m.layer, call_flops=10), m.counts) for m in (own, once)]
        assert [m.flops_adapter for m in adapted] == [30, 30]
        assert own.latency_ms_mean == pytest.approx(own.counts.nanoseconds / 3e6)
    assert found[0].joint is not None and found[1].joint is None
    found[0].save(tmp_path)
    loaded = moeprof.Profile.load(tmp_path)
    assert loaded == found[0] and loaded.each()[0].steps == 3
    profiler.reset()
    assert profiler.result().joint is None


def test_a_profile_from_before_steps_of_several_phases_were_told_apart(tmp_path):
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        run_mixed(profiler, blocks(model)[0], torch.randn(1, 4, 32), [0, 0, 0, 1])
    older = profiler.result()
    older.joint = None
    older.save(tmp_path)
    with np.load(tmp_path / "counts.npz") as arrays:
        assert not [name for name in arrays if "joint" in name]
    assert moeprof.Profile.load(tmp_path).each()[0].steps == 2


def test_the_first_step_of_prompt_lookup_is_one():
    model, ids = olmoe(), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(ids, max_new_tokens=6, prompt_lookup_num_tokens=2)
    result = profiler.result()
    apart = sum(result.each(phase)[0].steps for phase in result.phases)
    assert result.each()[0].steps == result.facts["steps"] == apart - 1
