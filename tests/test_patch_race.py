"""Patching while other threads are inside the forward: each call ends as it began."""

import threading
import time
import warnings

import pytest
import torch
from models import (
    assert_unchanged,
    blocks,
    moe_block,
    olmoe,
    random_hidden,
    run,
    snapshot,
    token_ids,
)
from torch import nn

import moeprof
from moeprof.patching.install import install
from moeprof.patching.state import Patched, is_patched

THREADS, SECONDS = 8, 3.0


def unpatched_when_read(layer, model):
    """The patch goes while the layer's forward reads its block, as another thread may do it."""
    family = layer.family

    class Reading(type(family)):
        def obstacle(self, block):
            answer = super().obstacle(block)
            moeprof.unpatch(model)
            return answer

    layer.family = Reading(family.family)


def in_threads(call, meanwhile) -> tuple[list, list]:
    """(outputs, exceptions) of `call` in 8 threads, while `meanwhile` loops in this one."""
    outputs, errors, end = [], [], threading.Event()

    def work():
        seen = []
        with torch.no_grad():
            while not end.is_set():
                try:
                    seen.append(call())
                except BaseException as error:
                    errors.append(error)
                    return
                del seen[:-50]  # enough of them, and no gigabytes
        outputs.extend(seen)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + SECONDS
    try:
        while time.monotonic() < until and not errors:
            meanwhile()
    finally:
        end.set()
        for thread in threads:
            thread.join()
    return outputs, errors


@pytest.mark.parametrize("options", [{}, {"router": moeprof.TopK(1)}], ids=["own", "topk 1"])
def test_a_block_is_patched_and_unpatched_while_threads_run_it(options):
    """Each output is that of the stock block, or of the patched one, bit for bit."""
    model, x = moe_block(), random_hidden(1, 3, 32)
    block, before = model["mlp"], snapshot(model)
    with torch.no_grad():
        right = [run(block, x)]
        with moeprof.patch(model, **options):
            right.append(run(block, x))

    def meanwhile():
        with moeprof.patch(model, **options):
            time.sleep(1e-4)
        time.sleep(1e-4)

    outputs, errors = in_threads(lambda: run(block, x), meanwhile)
    assert not errors, errors[0]
    kinds = [[torch.equal(out, r) for r in right] for out in outputs]
    assert all(any(kind) for kind in kinds)
    assert_unchanged(model, before)


@pytest.mark.parametrize("linears", [False, True])
def test_a_model_is_patched_and_unpatched_while_threads_run_it(linears):
    """Its own router throughout, so that any mixture of its layers says the same."""
    model, ids = olmoe(hidden_size=512, intermediate_size=32), token_ids(1, 3)
    with torch.no_grad():
        model(ids, output_router_logits=True)  # transformers 5 installs its recorder then
        expected = model(ids).logits
    before = snapshot(model)

    def meanwhile():
        with moeprof.patch(model, linears=linears) as handle:
            assert bool(handle.linears) == linears
            with moeprof.patch(model, linears=linears):
                time.sleep(1e-4)

    outputs, errors = in_threads(lambda: model(ids, output_router_logits=True).logits, meanwhile)
    assert not errors, errors[0]
    for out in outputs:
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    assert_unchanged(model, before)


def test_a_fallback_that_loses_its_patch_in_the_middle():
    """strict=False: the model's own forward is found also when the patch has gone meanwhile."""
    model = olmoe()
    block, x = blocks(model)[0], random_hidden(1, 3, 32)
    with torch.no_grad():
        expected = run(block, x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = moeprof.patch(model, strict=False)
            block.experts.register_forward_hook(lambda *_: None)
            unpatched_when_read(handle.layers[0], model)
            assert torch.equal(run(block, x), expected)
    assert not handle.active


def test_a_forward_that_loses_its_patch_before_the_gate():
    model = moe_block()
    block, x = model["mlp"], random_hidden(1, 3, 32)
    with torch.no_grad(), moeprof.patch(model) as handle:
        expected = run(block, x)
        unpatched_when_read(handle.layers[0], model)
        assert torch.equal(run(block, x), expected)
        assert not handle.active


def test_a_forward_that_was_looked_up_before_the_patch_went():
    model = moe_block()
    block, x = model["mlp"], random_hidden(1, 3, 32)
    with torch.no_grad():
        expected = run(block, x)
        with moeprof.patch(model):
            forward = block.forward
        output = forward(x)
    assert torch.equal(output[0] if isinstance(output, tuple) else output, expected)


def test_the_block_is_the_last_that_a_patch_changes():
    """A thread that finds the block patched finds what the block calls patched too."""
    block, seen = nn.Linear(2, 2), []

    class Own(dict):
        def update(self, *changes):
            seen.append(is_patched(block))
            super().update(*changes)

    class Inner:
        """Stands for a module inside the block; its attributes say when they are written."""

        own = Own()
        __dict__ = property(lambda self: self.own)

    inner = Inner()
    install(block, Patched("block"), [(block, lambda self: 1), (inner, lambda self: 2)])
    assert seen == [False] and is_patched(block) and inner.own["forward"]() == 2
    assert block.forward() == 1
