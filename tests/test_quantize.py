"""moeprof.quantize: what it changes, what it leaves, what it refuses."""

import contextlib
import copy
import pickle

import pytest
import torch
from models import (
    assert_unchanged,
    blocks,
    expert_weights,
    olmoe,
    relative,
    snapshot,
    token_ids,
)
from torch.utils.flop_counter import FlopCounterMode

import moeprof
from moeprof.models.find import find_sites
from moeprof.models.quantized import QuantizedExperts, QuantizedLinear
from moeprof.quantizing import quantize as module
from moeprof.quantizing.convert import decoded

IDS = token_ids(1, 11)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("bits, bound", ((8, 0.02), (4, 0.25)))
def test_the_report_says_bytes_and_errors(bits, bound):
    model = olmoe()
    report = moeprof.quantize(model, bits, linears=True, texts=[IDS], progress=False)
    experts = [row for row in report.layers if row.layer.endswith("mlp")]
    assert [row.format for row in experts] == [f"q{bits}"] * 2
    for row in experts:
        assert row.bytes_before == 8 * 3 * 32 * 16 * 4
        # gate and up 16 rows of one group; down 32 rows of one that is not full
        assert row.bytes_after == 8 * (2 * 16 + 32) * (4 * bits + 2)
    assert all(0 < row.error < bound for row in experts)
    assert all(0 < r.error < 0.02 for r in report.layers if not r.layer.endswith("mlp"))
    assert len(report.to_frame()) == len(report.layers) == 2 * 5 + 1
    assert "lm_head" in str(report) and "not measured" not in str(report)


def test_what_is_not_quantised_keeps_its_bits():
    model = olmoe()
    before = copy.deepcopy(model.state_dict())
    report = moeprof.quantize(model, skip="model.layers.1.*", progress=False)
    after = model.state_dict()
    for name, value in before.items():
        if not name.startswith("model.layers.0.mlp.experts"):
            assert torch.equal(after[name], value), name
    assert "left: skip" in str(report) and "not measured" in str(report)
    assert isinstance(blocks(model)[0].experts, QuantizedExperts)
    assert not isinstance(blocks(model)[1].experts, QuantizedExperts)


def test_a_tied_head_is_left():
    model = olmoe(tie_word_embeddings=True)
    report = moeprof.quantize(model, linears=True, progress=False)
    assert "tied to model.embed_tokens" in report.layers[-1].note
    assert not isinstance(model.lm_head, QuantizedLinear)


def test_a_second_time_leaves_all():
    model = olmoe()
    moeprof.quantize(model, linears=True, progress=False)
    before = snapshot(model)
    report = moeprof.quantize(model, linears=True, progress=False)
    assert_unchanged(model, before)
    assert {row.note for row in report.layers} == {"left: quantised already"}


@pytest.mark.parametrize("options", (dict(bits=4), dict(exact=True)), ids=str)
def test_what_is_quantised_otherwise_is_refused_unless_it_is_skipped(options):
    model = olmoe()
    moeprof.quantize(model, skip="model.layers.1.mlp", progress=False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.0.mlp is in q8 with exact=False already"):
        moeprof.quantize(model, **options, progress=False)
    assert_unchanged(model, before)
    moeprof.quantize(model, **options, skip="model.layers.0.mlp", progress=False)
    first, second = (block.experts.format_in_c for block in blocks(model))
    assert first == "q8" and second == {"bits": "q4", "exact": "q8_exact"}[[*options][0]]


def test_a_linear_layer_that_is_quantised_otherwise_is_refused():
    model = olmoe()
    moeprof.quantize(model, linears=True, exact=True, progress=False)
    with pytest.raises(ValueError, match="in q8 with exact=True already"):
        moeprof.quantize(model, linears=True, skip="*.mlp", progress=False)


def test_float64_is_refused_when_it_is_quantised_and_when_it_is_saved(tmp_path):
    with pytest.raises(ValueError, match=r"weights of dtype torch.float64"):
        moeprof.quantize(olmoe().double(), progress=False)
    model = olmoe()
    moeprof.quantize(model, progress=False)
    with pytest.raises(ValueError, match="a model in float64 can't be saved: expected float32"):
        moeprof.save_quantized(model.double(), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    moeprof.save_quantized(model.float(), tmp_path / "saved")


@pytest.mark.parametrize("end", (KeyboardInterrupt, RuntimeError, None))
def test_experts_for_a_while_are_those_of_quantize_and_the_own_ones_come_back(end):
    model, quantised = olmoe(), olmoe()
    moeprof.quantize(quantised, 4, progress=False)
    before, expected = snapshot(model), logits(model)
    with contextlib.suppress(*filter(None, [end])), module.experts_in(model, 4):
        assert torch.equal(logits(model), logits(quantised))
        if end:
            raise end
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


def test_experts_for_a_while_interrupted_between_layers_or_refused(monkeypatch):
    model, made = olmoe(), []
    before, run = snapshot(model), module.quantized

    def second_fails(*arguments):
        made.append(arguments)
        if len(made) == 2:
            raise KeyboardInterrupt
        return run(*arguments)

    monkeypatch.setattr(module, "quantized", second_fails)
    with pytest.raises(KeyboardInterrupt), module.experts_in(model, 8):
        raise AssertionError("it was not interrupted")
    assert_unchanged(model, before)
    moeprof.quantize(model, progress=False)
    with pytest.raises(ValueError, match="is in q8 with"), module.experts_in(model, 4):
        pass
    with pytest.raises(ValueError, match="is quantised already"), module.experts_in(model, 8):
        pass


def test_copies_and_dtypes():
    model = olmoe()
    moeprof.quantize(model, linears=True, progress=False)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16 and logits(half).isfinite().all()
    with pytest.raises(RuntimeError, match="a tensor on device meta"):
        blocks(model)[0].experts.to("meta")(torch.ones(1, 32), IDS[:, :1] * 0, torch.ones(1, 1))


@pytest.mark.parametrize("error", (KeyboardInterrupt, ValueError))
def test_interrupted_leaves_whole_layers(monkeypatch, error):
    model, made = olmoe(), []
    run = module.quantized

    def second_fails(*arguments):
        made.append(arguments)
        if len(made) == 2:
            raise error("expert 3, up")
        return run(*arguments)

    monkeypatch.setattr(module, "quantized", second_fails)
    with pytest.raises(error, match="expert 3, up"):
        moeprof.quantize(model, progress=False)
    kinds = [isinstance(block.experts, QuantizedExperts) for block in blocks(model)]
    assert kinds == [True, False] and logits(model).isfinite().all()
    # Transformers' own would write bytes as if they were its weights.
    assert type(model.save_pretrained).__module__ == "moeprof.quantizing.save"


@pytest.mark.parametrize(
    "change",
    (
        lambda t: t[:, :, :-1],
        lambda t: t[:1],
        lambda t: t.float(),
        lambda t: t.repeat(1, 1, 2)[:, :, ::2],
    ),
    ids=("bytes", "experts", "dtype", "stride"),
)
def test_tensors_of_other_sizes_are_not_read(change):
    model = olmoe()
    moeprof.quantize(model, linears=True, progress=False)
    experts, linear = blocks(model)[0].experts, model.lm_head
    experts.down_proj = change(experts.down_proj)
    with pytest.raises(RuntimeError, match="quantised matrices"):
        logits(model)
    with pytest.raises(ValueError, match="quantised matrices"):
        moeprof.patch(model)
    linear.weight = linear.weight[:-1]
    with pytest.raises(RuntimeError, match="quantised weight: expected"):
        linear(torch.ones(1, linear.in_features))


def test_refusals_change_nothing():
    model = olmoe()
    before = snapshot(model)
    for options, message in (
        (dict(bits=3), "bits: expected one of"),
        (dict(skip=["lm_haed"]), "lm_haed"),
    ):
        with pytest.raises(ValueError, match=message):
            moeprof.quantize(model, **options)
    with pytest.raises(TypeError, match="tokenizer"):
        moeprof.quantize(model, texts=["text"])
    assert_unchanged(model, before)
    with moeprof.patch(model), pytest.raises(ValueError, match="is patched"):
        moeprof.quantize(model)
    expert_weights(blocks(model)[1], 5)[1][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers.1.mlp: expert 5, (gate|up|down): .* row 0"):
        moeprof.quantize(model, progress=False)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        moeprof.quantize("model")


def test_gradients_are_refused_with_the_cause():
    model = olmoe()
    moeprof.quantize(model, progress=False)
    with pytest.raises(RuntimeError, match="its weights are quantised"):
        model(IDS).logits.sum().backward()


def test_profile_flops_and_bytes():
    plain, model = olmoe(), olmoe()
    moeprof.quantize(model, exact=True, progress=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(IDS)
    with torch.no_grad(), moeprof.patch(plain), FlopCounterMode(display=False) as expected:
        plain(IDS)
    assert counted.get_total_flops() == expected.get_total_flops()
    by_itself, patched = moeprof.MoEProfiler(model), moeprof.MoEProfiler(model)
    with by_itself:
        logits(model)
    with moeprof.patch(model), patched:
        logits(model)
    found = find_sites(model)[0].layer
    assert found.expert_bytes == (2 * 16 + 32) * 34
    assert found.expert_flops == find_sites(plain)[0].layer.expert_flops
    alone, together = by_itself.get_metrics(), patched.get_metrics()
    assert alone.keys() == together.keys() and len(alone) == 2
    for name, metrics in alone.items():
        assert sum(metrics.expert_selections) == 11 * 2
        assert metrics.expert_selections == together[name].expert_selections
    shown = moeprof.inspect(model)[0]
    assert (shown.dtype, shown.intermediate_size) == ("q8_exact", 16)
    assert moeprof.roofline(model).dtype == "uint8"


def test_linears_run_in_c():
    plain, model = olmoe(), olmoe()
    moeprof.quantize(model, linears=True, exact=True, progress=False)
    assert isinstance(model.lm_head, QuantizedLinear)
    head, x = model.lm_head, torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    weight = decoded(head.weight, 64, 32, "q8").double()
    assert relative(weight, plain.lm_head.weight.detach()) < 0.01
    assert relative(head(x), x.double() @ weight.T) < 32 * torch.finfo(torch.float32).eps
    assert logits(model).isfinite().all()
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model.lm_head(torch.ones(3, 32))
    assert counted.get_total_flops() == 2 * 3 * 32 * 64


# ---- what others do to models ----


def test_a_module_of_two_layers_is_quantised_once_and_stays_shared():
    model = olmoe()
    first, second = blocks(model)
    second.experts = first.experts
    plain = copy.deepcopy(model)
    report = moeprof.quantize(model, 8, exact=True, texts=[IDS], progress=False)
    assert first.experts is second.experts and isinstance(first.experts, QuantizedExperts)
    assert [row.note for row in report.layers] == ["", "shared with a layer above"]
    assert report.bytes_after == 8 * (2 * 16 + 32) * 34
    assert 0 < relative(logits(model), logits(plain)) < 0.05
    whole = olmoe()
    whole.model.layers[1].mlp = whole.model.layers[0].mlp
    moeprof.quantize(whole, progress=False)
    assert blocks(whole)[0] is blocks(whole)[1] and logits(whole).isfinite().all()


@pytest.mark.parametrize("linears", (False, True))
def test_adapters_on_a_quantised_model_and_quantising_under_adapters(linears):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = olmoe()
    moeprof.quantize(model, skip=["*.q_proj"] * linears, linears=linears, progress=False)
    expected = logits(model)
    adapted = peft.get_peft_model(model, config)
    changed = logits(adapted)
    assert relative(changed, expected) > 0.01
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), expected)
    with moeprof.patch(adapted):
        assert relative(logits(adapted), changed) < 1e-5
    adapted = peft.get_peft_model(olmoe(), config)
    report = moeprof.quantize(adapted, linears=True, progress=False)
    notes = {row.layer.split("self_attn.")[-1]: row.note for row in report.layers}
    assert notes["q_proj.base_layer"] == "left: an adapter of PEFT is on it"
    assert notes["q_proj.lora_A.default"] == "left: an adapter of PEFT"
    assert notes["k_proj"] == ""
    merged = adapted.merge_and_unload()
    assert logits(merged).isfinite().all()


@pytest.mark.parametrize("offload", ("disk", "cpu"))
def test_offloaded_weights_are_refused_with_the_reason(offload, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = olmoe()
    if offload == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, "cpu")
    before = snapshot(model)
    with pytest.raises(ValueError, match="layers.0.mlp: .*accelerate .*without offload"):
        moeprof.quantize(model, linears=True, progress=False)
    assert_unchanged(model, before)


def test_an_offloaded_linear_layer_is_left_with_the_reason():
    accelerate = pytest.importorskip("accelerate")
    model = olmoe()
    accelerate.cpu_offload(model.lm_head, "cpu")
    report = moeprof.quantize(model, linears=True, progress=False)
    assert "accelerate has put its hooks" in report.layers[-1].note
    assert not isinstance(model.lm_head, QuantizedLinear) and logits(model).isfinite().all()
