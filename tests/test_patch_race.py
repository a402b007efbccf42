"""Patching while other threads are inside the forward: each call ends as it began."""

import threading
import time
import warnings

import pytest
import torch
import zoo
from models import (
    V5,
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
from moeprof.models.blocks import find_blocks
from moeprof.patching.install import install
from moeprof.patching.state import Patched, is_patched

THREADS, SECONDS = 8, 1.0


def unpatched_when_read(layer, model):
    """The patch goes while the layer's forward reads its block, as another thread may do it."""
    family = layer.family

    class Reading(type(family)):
        def gate_of(self, block):
            moeprof.unpatch(model)
            return super().gate_of(block)

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


@pytest.mark.parametrize("put_back", [False, True])
def test_a_forward_that_was_looked_up_before_the_patch_went(put_back):
    """Also where somebody puts it back: it runs as the class does, and goes."""
    model = moe_block()
    block, x = model["mlp"], random_hidden(1, 3, 32)
    with torch.no_grad():
        expected = run(block, x)
        with moeprof.patch(model):
            forward = block.forward
        if put_back:
            block.forward = forward
        assert torch.equal(run(block if put_back else forward, x), expected)
    assert "forward" not in vars(block)


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


# ---- blocks whose own forward runs ----

only_5 = pytest.mark.skipif(not V5, reason="transformers 4 has no seam")


def slots(logits):
    """The best expert of each token, and an empty slot."""
    best = logits.argmax(1, keepdim=True)
    return torch.ones(len(logits), 2), torch.cat([best, torch.full_like(best, -1)], 1)


@only_5
@pytest.mark.parametrize("undo", ["handle", "unpatch"])
def test_a_seam_that_is_unpatched_between_its_gate_and_its_experts(undo):
    """Empty slots never meet the model's own experts: the patch stays until the call has ended."""
    model = zoo.build("qwen2_moe")
    block, x, before = find_blocks(model)[-1].module, random_hidden(1, 3, zoo.H), snapshot(model)
    with torch.no_grad(), moeprof.patch(model, slots):
        expected = block(x)
    threads = []

    def meanwhile(logits):
        threads.append(threading.Thread(target=undoing))
        threads[0].start()
        threads[0].join(0.2)
        return slots(logits)

    handle = moeprof.patch(model, meanwhile)
    undoing = handle.unpatch if undo == "handle" else lambda: moeprof.unpatch(model)
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    threads[0].join()
    assert not handle.active
    assert_unchanged(model, before)


@only_5
@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_a_seam_is_patched_profiled_and_unpatched_while_threads_run_it(name):
    """Each output is that of the stock block, or of the patched one, bit for bit."""
    model, options = zoo.build(name), dict(router="bh", alpha=0.3, max_k=4, null="normal")
    block, x, before = find_blocks(model)[-1].module, random_hidden(1, 9, zoo.H), snapshot(model)
    with torch.no_grad():
        right = [block(x)]
        with moeprof.patch(model, **options):
            right.append(block(x))

    def meanwhile():
        with moeprof.patch(model, **options), moeprof.MoEProfiler(model):
            time.sleep(1e-4)
        time.sleep(1e-4)

    outputs, errors = in_threads(lambda: block(x), meanwhile)
    assert not errors, errors[0]
    assert all(any(torch.equal(out, r) for r in right) for out in outputs)
    assert_unchanged(model, before)


# ---- what others put over a patch, and keep of it ----


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_an_inner_patch_leaves_the_outer_one_whole(name):
    """Also what the gate, the experts and the block were before any patch."""
    model, inputs = zoo.build(name), zoo.inputs(name)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(**inputs).logits
        with torch.autocast("cpu"):
            stock = model(**inputs).logits
        with moeprof.patch(model, strict=False):
            with moeprof.patch(model, "topk", k=1):
                model(**inputs)
            torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
            with torch.autocast("cpu"):
                assert torch.equal(model(**inputs).logits, stock)
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.filterwarnings("ignore:moeprof. ")
@pytest.mark.parametrize("linears", [False, True])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3"])
def test_hooks_put_over_a_patch_stay_when_it_goes(name, linears):
    """And what they had kept of it runs as the class does, and goes at the next occasion."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = zoo.build(name), zoo.inputs(name)
    before, called = snapshot(model), []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return args, kwargs

    with torch.no_grad():
        expected = model(**inputs).logits
        handle = moeprof.patch(model, linears=linears)
        modules = [m for m in model.modules() if "forward" in vars(m)]
        for module in modules:
            hooks.add_hook_to_module(module, Counting())
        handle.unpatch()
        assert torch.equal(model(**inputs).logits, expected)
        assert {id(m) for m in called} == {id(m) for m in modules}
        # And under another patch, where the block's own forward is called too.
        with moeprof.patch(model, strict=False, linears=linears), torch.autocast("cpu"):
            under = model(**inputs).logits
        with torch.autocast("cpu"):
            assert torch.equal(model(**inputs).logits, under)
        for module in modules:
            hooks.remove_hook_from_module(module)
        assert torch.equal(model(**inputs).logits, expected)
        moeprof.unpatch(model)
    assert_unchanged(model, before)


@pytest.mark.skipif(V5, reason="transformers 5 records by hooks")
class TestRecordedByTransformers4:
    """It puts back the forward that it found, whatever has happened meanwhile."""

    def test_unpatched_in_the_middle(self):
        model, inputs = zoo.build("mixtral"), zoo.inputs("mixtral")
        with torch.no_grad():
            expected = model(**inputs).logits
            handle = moeprof.patch(model, linears=True)
            handle.on_routing(lambda layer, routing: handle.unpatch())
            model(**inputs, output_router_logits=True)
            assert torch.equal(model(**inputs).logits, expected)
        assert not [m for m in model.modules() if any("moeprof" in name for name in vars(m))]

    def test_patched_in_the_middle_is_refused(self):
        model, inputs = zoo.build("mixtral"), zoo.inputs("mixtral")
        before, said = snapshot(model), []

        def patch(*_):
            if not said:
                with pytest.raises(RuntimeError, match="patch before or after that call") as told:
                    moeprof.patch(model)
                said.append(told)

        with torch.no_grad():
            hook = model.model.layers[0].self_attn.register_forward_hook(patch)
            model(**inputs, output_router_logits=True)
            hook.remove()
        assert said
        for block in find_blocks(model):  # the class's own, which transformers leaves there
            assert vars(block.module).pop("forward").__func__ is type(block.module).forward
        for module in model.modules():
            vars(module).pop("forward", None)
        assert_unchanged(model, before)

    def test_a_patch_waits_for_the_call_of_another_thread(self):
        model, inputs = zoo.build("mixtral"), zoo.inputs("mixtral")
        twin, inside, go = zoo.build("mixtral"), threading.Event(), threading.Event()
        with torch.no_grad(), moeprof.patch(twin, "topk", k=1):
            expected = twin(**inputs).logits

        def wait(*_):
            inside.set()
            go.wait(10)

        hook = model.model.layers[0].self_attn.register_forward_hook(wait)

        def call():
            with torch.no_grad():
                model(**inputs, output_router_logits=True)

        caller = threading.Thread(target=call)
        patcher = threading.Thread(target=moeprof.patch, args=(model, "topk"), kwargs={"k": 1})
        caller.start()
        assert inside.wait(10)
        patcher.start()
        patcher.join(0.5)
        assert patcher.is_alive() and not any(map(is_patched, model.modules()))
        go.set()
        caller.join(), patcher.join(10)
        hook.remove()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
