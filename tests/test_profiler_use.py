"""Starting, stopping, pausing, several at once, exceptions: what a profiler leaves behind."""

import copy
import gc
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from models import V5, assert_unchanged, blocks, olmoe, snapshot, token_ids, wrap_gates
from torch import nn
from torch.utils import flop_counter
from zoo import build

import moeprof
from moeprof.models.phases import PHASES
from moeprof.profiler.hooks import OWN_IN_C, STOCK


@pytest.fixture
def model():
    made = olmoe()
    assert moeprof.patch  # its import registers the FLOP formulas of our own operators
    with torch.no_grad():
        made(token_ids(), output_router_logits=True)  # transformers 5 installs its recorder once
    return made


def tokens(profiler, layer=0):
    """Real tokens of both phases."""
    return sum(profiler._session.counts[phase][layer].tokens for phase in PHASES)


class Stop(Exception):
    pass


def last_activation(model):
    """A module that the second layer's block calls at its very end."""
    return list(blocks(model)[1].experts.modules())[-1]


def fail_inside(model):
    """An exception in the second layer's block."""

    def fail(module, args):
        raise Stop

    handle = last_activation(model).register_forward_pre_hook(fail)
    try:
        with moeprof.MoEProfiler(model), pytest.raises(Stop):
            model(token_ids())
    finally:
        handle.remove()


def fail_outside(model):
    with pytest.raises(Stop), moeprof.MoEProfiler(model):
        model(token_ids())
        raise Stop


def start_and_stop(model):
    profiler = moeprof.MoEProfiler(model)
    profiler.start()
    profiler.start()
    model(token_ids())
    profiler.stop()
    profiler.stop()


def delete_it(model):
    profiler = moeprof.MoEProfiler(model).start()
    model(token_ids())
    del profiler
    gc.collect()


def patch_and_unpatch_meanwhile(model):
    with moeprof.MoEProfiler(model):
        with moeprof.patch(model):
            model(token_ids())
        model(token_ids())


def stop_while_patched(model):
    profiler = moeprof.MoEProfiler(model).start()
    handle = moeprof.patch(model)
    model(token_ids())
    profiler.stop()
    model(token_ids())
    handle.unpatch()


def fall_back(model):
    """A patched block that runs the model's own forward is watched there."""
    handle = last_activation(model).register_forward_hook(lambda *args: None)
    with moeprof.MoEProfiler(model) as profiler, pytest.warns(UserWarning, match="own forward"):
        with moeprof.patch(model, strict=False):
            model(token_ids())
    handle.remove()
    assert [tokens(profiler, layer) for layer in (0, 1)] == [22, 22]
    assert profiler._session.routers == [["the model's own top-k, patched"], [STOCK]]


def benchmark_inside(model):
    """It puts the model back whole, hooks included."""

    def tokenizer(text, **options):
        return {"input_ids": token_ids(1, 5)}

    with moeprof.MoEProfiler(model):
        bench = moeprof.SimpleBenchmark(model, tokenizer, max_new_tokens=1, repeats=1)
        bench.run_config("patched", ["a"], moeprof.patch)
        model(token_ids())
        with moeprof.patch(model):
            model(token_ids())


@pytest.mark.parametrize(
    "use",
    (
        benchmark_inside,
        fail_inside,
        fail_outside,
        start_and_stop,
        delete_it,
        patch_and_unpatch_meanwhile,
        stop_while_patched,
        fall_back,
    ),
)
def test_the_model_is_afterwards_as_it_was(model, use):
    before, formulas = snapshot(model), dict(flop_counter.flop_registry)
    with torch.no_grad():
        expected = model(token_ids()).logits
    use(model)
    assert_unchanged(model, before)
    assert flop_counter.flop_registry == formulas
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, expected)


def test_a_failed_start_leaves_nothing_behind(model, monkeypatch):
    before = snapshot(model)
    profiler = moeprof.MoEProfiler(model)

    def fail(hook):
        raise Stop

    monkeypatch.setattr(blocks(model)[1], "register_forward_hook", fail, raising=False)
    with pytest.raises(Stop):
        profiler.start()
    monkeypatch.undo()
    assert_unchanged(model, before)
    assert not profiler.active


def test_the_outputs_are_the_same_bit_for_bit(model):
    for patched in (False, True):
        handle = moeprof.patch(model) if patched else None
        with torch.no_grad():
            plain = model(token_ids(), output_router_logits=True)
            with moeprof.MoEProfiler(model):
                watched = model(token_ids(), output_router_logits=True)
        assert torch.equal(plain.logits, watched.logits)
        assert all(map(torch.equal, plain.router_logits, watched.router_logits))
        if handle:
            handle.unpatch()


def test_after_an_exception_counting_goes_on(model):
    def fail(module, args):
        raise Stop

    with moeprof.MoEProfiler(model) as profiler:
        handle = last_activation(model).register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            model(token_ids())
        handle.remove()
        model(token_ids())
    assert [tokens(profiler, layer) for layer in (0, 1)] == [44, 22]
    assert profiler._session.counts["prefill"][0].moves.sum() == 0


# ---- which steps count ----


@pytest.mark.parametrize("number", [int, np.int64])
def test_warm_up_and_sampling(model, number):
    profiler = moeprof.MoEProfiler(model, warmup_steps=number(2), sampling_rate=number(3))
    with profiler:
        for length in range(3, 13):
            model(token_ids(1, length))
    assert tokens(profiler) == 5 + 8 + 11  # the third step, and every third one after it
    facts = profiler.result().facts
    assert (facts["steps"], facts["steps_left_out"]) == (3, 7)


def test_without_a_counted_step_the_summary_says_so(model, capsys):
    with moeprof.MoEProfiler(model, warmup_steps=5) as profiler:
        model(token_ids())
    profiler.print_summary()
    assert "nothing" in capsys.readouterr().out.lower()
    for metrics in profiler.get_metrics().values():
        assert metrics.tokens == 0 and np.isnan(metrics.k_mean)


def test_pause_resume_and_reset(model):
    with moeprof.MoEProfiler(model) as profiler:
        model(token_ids(1, 3))
        profiler.pause()
        model(token_ids(1, 4))
        profiler.resume()
        model(token_ids(1, 5))
        assert tokens(profiler) == 8 and profiler.result().facts["steps_left_out"] == 0
        profiler.reset()
        assert tokens(profiler) == 0
        model(token_ids(1, 6))
    model(token_ids(1, 7))
    assert tokens(profiler) == 6
    profiler.start()
    model(token_ids(1, 8))
    profiler.stop()
    assert tokens(profiler) == 14  # it adds up


def test_nested_use_counts_once_and_ends_with_the_outer_one(model):
    with moeprof.MoEProfiler(model) as profiler:
        with profiler:
            model(token_ids(1, 3))
        assert profiler.active
        model(token_ids(1, 4))
    assert not profiler.active and tokens(profiler) == 7


@pytest.mark.parametrize("patched", (False, True))
def test_several_at_once_count_each_for_itself(model, patched):
    handle = moeprof.patch(model) if patched else None
    with moeprof.MoEProfiler(model) as outer:
        model(token_ids(1, 3))
        with moeprof.MoEProfiler(model, sampling_rate=2) as inner:
            model(token_ids(1, 4))
            model(token_ids(1, 5))
        model(token_ids(1, 6))
    assert tokens(outer) == 18 and tokens(inner) == 4
    assert (handle is not None) == outer.result().facts["router"].endswith(", patched")


def test_a_result_is_what_was_counted_until_then(model):
    with moeprof.MoEProfiler(model) as profiler:
        model(token_ids(1, 3))
        result = profiler.result()
        model(token_ids(1, 4))
    assert next(iter(result.metrics().values())).tokens == 3 and tokens(profiler) == 7


def test_threads_do_not_mix_their_steps(model):
    lengths = list(range(3, 11))
    with moeprof.MoEProfiler(model) as profiler:
        threads = [threading.Thread(target=model, args=(token_ids(1, n, seed=n),)) for n in lengths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for layer in (0, 1):
        counts = profiler._session.counts["prefill"][layer]
        assert counts.tokens == sum(lengths) and counts.steps == len(lengths)
        assert np.flatnonzero(counts.batch_steps).tolist() == lengths
    assert profiler._session.counts["prefill"][1].moves.sum() == 4 * sum(lengths)


def test_a_copy_of_the_model_does_not_count(model):
    with moeprof.MoEProfiler(model) as profiler:
        copied = copy.deepcopy(model)
        copied(token_ids())
        with moeprof.patch(copied):
            copied(token_ids())
        assert tokens(profiler) == 0
        model(token_ids())
    copied(token_ids())
    assert tokens(profiler) == 22


def test_the_router_that_ran_is_named(model):
    with moeprof.MoEProfiler(model) as profiler:
        model(token_ids())
        with moeprof.patch(model, moeprof.TopK(1)):
            model(token_ids())
    router = profiler.result().facts["router"]
    assert router == f"{STOCK} and {moeprof.TopK(1)!r}"


# ---- a model that is changed, compiled or interrupted meanwhile ----


def k_means(profiler):
    return [metrics.k_mean for metrics in profiler.get_metrics().values()]


def three_experts(z):
    weights, experts = z.softmax(-1).topk(3)
    return z, weights, experts


@pytest.mark.skipif(not V5, reason="the stock block of transformers 4 takes logits only")
@pytest.mark.parametrize("active", (False, True))
def test_a_router_that_is_wrapped_after_the_profiler_was_made_is_heard(model, active):
    profiler, hooks = moeprof.MoEProfiler(model), snapshot(model)
    if active:
        profiler.start()
    before = [block.gate for block in blocks(model)]
    wrap_gates(model, three_experts)
    with profiler:
        model(token_ids())
    assert k_means(profiler) == [3, 3]
    with profiler:
        for block, gate in zip(blocks(model), before, strict=True):
            block.gate = gate
        model(token_ids())
    assert k_means(profiler) == [2.5, 2.5]
    profiler.stop()
    assert_unchanged(model, hooks)


def test_the_k_of_now_counts(model):
    with moeprof.MoEProfiler(model) as profiler:
        model(token_ids())
        for block in blocks(model):
            (block.gate if V5 else block).top_k = 3
        model(token_ids())
    with profiler:
        model(token_ids())
    np.testing.assert_allclose(k_means(profiler), [8 / 3] * 2)


def test_layers_that_are_replaced_between_uses_are_watched(model):
    profiler = moeprof.MoEProfiler(model)
    model.model.layers[0].mlp = copy.deepcopy(blocks(model)[0])
    with profiler:
        model(token_ids())
    assert [tokens(profiler, layer) for layer in (0, 1)] == [22, 22]
    model.model.layers[1].mlp = blocks(olmoe(num_experts=4))[1]
    before = snapshot(model)
    with pytest.raises(ValueError, match="no longer those that were counted"):
        profiler.start()
    assert_unchanged(model, before)
    profiler.reset()
    with profiler:
        model(token_ids())
    assert list(profiler.get_metrics().values())[1].layer.num_experts == 4
    assert profiler._session.counts["prefill"][1].moves.sum() == 0  # 8 experts before, 4 here


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpoint_computes_again_is_not_counted(model, reentrant):
    """Nor must the profiler have a part in the graph: checkpoints look at what is saved in it."""
    model.train()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    ids = token_ids()
    with moeprof.MoEProfiler(model) as profiler:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert [tokens(profiler, layer) for layer in (0, 1)] == [22, 22]
    facts = profiler.result().facts
    assert (facts["steps"], facts["steps_left_out"]) == (1, 0)


@pytest.mark.parametrize("when", ["start", "stop of a patch"])
@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
def test_an_interrupted_hook_is_taken_out_by_stop(model, monkeypatch, kind, when):
    """Ctrl-C after each hook was put in, before anyone has taken note of it."""
    left, register = [0], getattr(nn.Module, kind)

    def interrupted(*args, **kwargs):
        handle = register(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return handle

    before = snapshot(model)
    for calls in range(1, 1000):
        profiler = moeprof.MoEProfiler(model)
        if when != "start":
            handle = moeprof.patch(model)
            profiler.start()
        monkeypatch.setattr(nn.Module, kind, interrupted)
        left[0] = calls
        try:
            profiler.start() if when == "start" else handle.unpatch()
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        moeprof.unpatch(model)
        profiler.stop()
        assert_unchanged(model, before)
        if left[0] > 0:  # all were put in
            break
    assert calls > 2


@pytest.mark.parametrize("error", (Stop, KeyboardInterrupt))
def test_blocks_that_are_interrupted_twice_keep_no_hook(model, error):
    def fail(module, args):
        raise error

    handle = last_activation(model).register_forward_pre_hook(fail)
    before = snapshot(model)
    with moeprof.MoEProfiler(model):
        for run in (model, model, blocks(model)[1], blocks(model)[1]):
            with pytest.raises(error):
                run(token_ids() if run is model else torch.randn(2, 5, 32))
    assert_unchanged(model, before)
    handle.remove()


def test_after_an_exception_a_model_can_be_patched(model):
    """Which a hook in its experts, of the check of the first call, would forbid."""

    def fail(module, args):
        raise Stop

    with moeprof.MoEProfiler(model):
        handle = last_activation(model).register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            model(token_ids())
        handle.remove()
        with moeprof.patch(model):
            model(token_ids())


def test_a_model_that_is_stored_meanwhile_does_not_count_when_it_is_read(tmp_path):
    model = olmoe()
    with moeprof.MoEProfiler(model) as profiler:
        torch.save(model, tmp_path / "model.pt")
        read = torch.load(tmp_path / "model.pt", weights_only=False)
        read(token_ids())
        assert tokens(profiler) == 0
        with moeprof.patch(read), moeprof.MoEProfiler(read) as own:
            read(token_ids())
    assert tokens(own) == 22


@pytest.mark.slow  # most of it is the compiler's, on the code of transformers
def test_a_compiled_model_counts_once_it_is_compiled_anew(model):
    ids, mask = token_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    compiled = torch.compile(model, backend="eager")
    with moeprof.MoEProfiler(model) as profiler, torch.no_grad():
        for _ in range(2):
            compiled(ids, attention_mask=mask)
    with torch.no_grad():
        compiled(ids, attention_mask=mask)
    for counts in profiler._session.counts["prefill"]:
        assert counts.k.sum(1).tolist() == [2 * 23, 2 * 4] and counts.steps == 2


@pytest.mark.skipif(not V5, reason="on 4.57 it is compiled anew by itself")
def test_a_block_that_was_compiled_before_says_what_to_do():
    model = olmoe()  # one whose outputs were recorded is compiled anew too
    torch._dynamo.reset()
    model.model.layers[0].mlp.compile(backend="eager")
    with torch.no_grad():
        model(token_ids())
        with (
            moeprof.MoEProfiler(model),
            pytest.raises(ValueError, match="torch.compile .*before, start the profiler first"),
        ):
            model(token_ids())


def test_a_profiler_that_a_benchmark_has_put_out_of_the_model_stops(model):
    def tokenizer(text, **options):
        return {"input_ids": token_ids(1, 5)}

    before, profilers = snapshot(model), []
    bench = moeprof.SimpleBenchmark(model, tokenizer, max_new_tokens=1, repeats=1)
    bench.run_config("x", ["a"], lambda model: profilers.append(moeprof.MoEProfiler(model).start()))
    profilers[0].stop()
    assert_unchanged(model, before)


def test_a_users_callback_is_no_time_of_the_layer(model):
    handle = moeprof.patch(model)
    handle.on_routing(lambda index, routing: time.sleep(0.05))
    with moeprof.MoEProfiler(model) as profiler:
        for _ in range(5):
            model(token_ids())
    handle.unpatch()
    assert all(m.latency_ms_p50 < 45 for m in profiler.get_metrics().values())


def test_after_a_reset_the_router_is_named_again(model):
    with moeprof.MoEProfiler(model) as profiler:
        for _ in range(2):
            profiler.reset()
            model(token_ids())
            assert profiler.result().facts["router"] == STOCK
        with moeprof.patch(model):
            for _ in range(2):
                profiler.reset()
                model(token_ids())
                assert profiler.result().facts["router"] == OWN_IN_C


def test_each_null_that_a_router_was_on_is_named(model):
    """Also where one router object was patched in on two of them."""
    router = moeprof.BH(alpha=0.3)
    with moeprof.MoEProfiler(model) as profiler:
        for null in ("normal", "softmax"):
            with moeprof.patch(model, router, null=null):
                model(token_ids())
    named = profiler.result().facts["router"]
    assert named.count("BH(") == 2
    assert "on this null: normal: " in named and "on this null: softmax: " in named


def test_records_that_were_closed_are_refused_at_the_start(model, tmp_path):
    profiler = moeprof.MoEProfiler(model, records=tmp_path / "records")
    with profiler:
        model(token_ids())
    before = snapshot(model)
    with pytest.raises(ValueError, match="closed by stop"):
        profiler.start()
    assert_unchanged(model, before)


# ---- domains, vocabulary ----


def test_domains_hold_what_ran_inside_them(model):
    with moeprof.MoEProfiler(model) as profiler:
        with profiler.domain("a"):
            model(token_ids(1, 3))
            with profiler.domain("b"):
                model(token_ids(1, 4))
            model(token_ids(1, 5))
            assert profiler.result().metrics()  # may be asked for at any time
        model(token_ids(1, 6))
        with profiler.domain("b"):
            model(token_ids(1, 7))
    by_domain = profiler._by_domain
    assert {label: loads[0, -1] for label, loads in by_domain.items()} == {"a": 8, "b": 11}
    for loads in by_domain.values():
        assert np.array_equal(loads[:, :-1].sum(1), 2 * loads[:, -1])


def test_the_vocabulary_holds_the_experts_of_each_token(model):
    ids = token_ids(3, 9, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with moeprof.MoEProfiler(model, vocabulary=True, trace=True) as profiler:
        model(input_ids=ids, attention_mask=mask)
        model(input_ids=ids[:1])
    found = profiler._session.vocabulary.as_dict()
    flat = torch.cat([ids[mask != 0], ids[0]])
    assert sorted(found["tokens"]) == sorted(set(flat.tolist()))
    for token, seen, counts in zip(
        found["tokens"], found["seen"], found["counts"].transpose(1, 0, 2), strict=True
    ):
        assert seen == (flat == token).sum() and (counts.sum(1) == 2 * seen).all()
    total = profiler._session.counts["prefill"][1].load[0]
    assert np.array_equal(found["counts"][1].sum(0), total)
    assert [event[0] for event in profiler._session.events] == [0, 1, 0, 1]


def test_the_vocabulary_of_an_encoder_and_a_decoder_is_the_encoders():
    model, ids = build("switch_transformers"), token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with moeprof.MoEProfiler(model, vocabulary=True) as profiler, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :4])
    found = profiler._session.vocabulary.as_dict()
    assert found["layers"] == [0] and found["seen"].sum() == found["counts"].sum() == 23
    assert [tokens(profiler, layer) for layer in (0, 1)] == [23, 12]


# ---- bad input ----


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match=r"No routers found in Sequential.*: looked for .*found"):
        moeprof.MoEProfiler(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got dict"):
        moeprof.MoEProfiler({})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0, got -1"),
        ({"sampling_rate": 0}, ValueError, "sampling_rate: expected at least 1, got 0"),
        ({"sampling_rate": 1.5}, TypeError, "sampling_rate: expected an integer, got 1.5"),
    ],
)
def test_bad_options_are_named(model, options, error, message):
    with pytest.raises(error, match=message):
        moeprof.MoEProfiler(model, **options)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, lambda p: copy.deepcopy((p.model, p))])
def test_a_profiler_is_not_copied(model, copied):
    with pytest.raises(TypeError, match=r"MoEProfiler: .*profiler\.result\(\)"):
        copied(moeprof.MoEProfiler(model))


def test_weights_elsewhere_are_refused(model):
    with pytest.raises(ValueError, match="device meta, which has no values"):
        moeprof.MoEProfiler(olmoe().to("meta"))


# ---- memory ----


def resident():
    """Bytes of this process's memory."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.slow
def test_a_million_tokens_take_no_more_memory():
    model = olmoe(num_hidden_layers=1, num_experts=64, num_experts_per_tok=8)
    block, hidden = blocks(model)[0], torch.randn(1, 8192, 32)
    with moeprof.patch(model), moeprof.MoEProfiler(model) as profiler, torch.inference_mode():
        block(hidden)
        gc.collect()
        before = resident()
        for _ in range(123):
            block(hidden)
        assert resident() - before < 50e6
    assert tokens(profiler) == 124 * 8192 > 1_000_000
