"""Models in 8 and 4 bits: read from checkpoints of floats, saved, and loaded back."""

import copy
import json
import re
import shutil
import threading
import time

import every
import pytest
import torch
import transformers
import zoo
from models import V5, llama, olmoe, token_ids
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from wording import says

import moeprof
from moeprof.models.blocks import find_blocks
from moeprof.models.quantized import QuantizedExperts, QuantizedLinear
from moeprof.quantizing import mxfp4, save
from moeprof.quantizing.checkpoint import Checkpoint
from moeprof.quantizing.convert import FORMATS, quantized

FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
if V5:
    FAMILIES += ["gpt_oss", "granitemoe"]
NAN = float("nan")


def _build(family):
    return zoo.build(family) if family in zoo.ZOO else every.build(family)


def _quantise(model, bits):
    """In place, from weights that lie in memory."""
    for block in find_blocks(model):
        read, reason = block.family.readable(block.module)
        assert reason is None
        experts = quantized(read, FORMATS[bits])
        block.module._modules[block.family.family.experts_at] = experts
    return model


def _tensors(model):
    """All of them, with the buffers that no file holds."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def _assert_same(model, other):
    ours, theirs = _tensors(model), _tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def _logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small OLMoE, as its checkpoint is; not to be changed."""
    path = tmp_path_factory.mktemp("olmoe")
    olmoe().save_pretrained(path)
    return path


@pytest.fixture
def changed(folder, tmp_path):
    """(a copy of it that may be changed, a function that changes its tensors)."""
    path = tmp_path / "changed"
    shutil.copytree(folder, path)

    def change(function):
        tensors = load_file(path / "model.safetensors")
        function(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return path, change


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """The same in 4 bits, as it is saved; not to be changed."""
    path = tmp_path_factory.mktemp("saved") / "q4"
    moeprof.save_quantized(moeprof.load(folder, bits=4), path)
    return path


@pytest.fixture
def copied(saved, tmp_path):
    path = tmp_path / "copied"
    shutil.copytree(saved, path)
    return path


# ---- from a checkpoint of floats ----


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loading_makes_what_quantising_in_memory_makes(family, dtype, bits, tmp_path):
    _build(family).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    _quantise(expected, bits)
    model = moeprof.load(tmp_path, bits=bits, dtype=dtype)
    assert type(model) is type(expected)
    assert not model.training
    _assert_same(model, expected)
    # transformers maps files, where tensors may lie at any address, and BLAS looks at these
    torch.testing.assert_close(_logits(model), _logits(expected))


@pytest.mark.skipif(not V5, reason="transformers 4 has no tensors of all experts for OLMoE")
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_files_may_have_tensors_of_all_experts(family, tmp_path, monkeypatch):
    model = _build(family)
    model.save_pretrained(tmp_path / "each")
    model.save_pretrained(tmp_path / "all", save_original_format=False)
    names = [Checkpoint(tmp_path / name).names for name in ("each", "all")]
    assert any(".experts.0." in name for name in names[0])
    assert any(name.endswith("experts.gate_up_proj") for name in names[1])
    each = moeprof.load(tmp_path / "each", bits=4)
    whole = []
    read = Checkpoint.tensor
    monkeypatch.setattr(
        Checkpoint, "tensor", lambda self, name: whole.append(name) or read(self, name)
    )
    _assert_same(moeprof.load(tmp_path / "all", bits=4), each)
    assert whole
    assert not any("experts" in name for name in whole), "a whole layer was read at once"


def test_files_of_transformers_4_and_5_are_one(tmp_path):
    """A checkpoint of Mixtral, with the names that it has on the hub."""
    zoo.build("mixtral").save_pretrained(tmp_path)
    names = Checkpoint(tmp_path).names
    assert "model.layers.0.block_sparse_moe.experts.7.w2.weight" in names
    assert moeprof.load(tmp_path, bits=8)


def test_a_checkpoint_may_lie_in_several_files(folder, tmp_path):
    olmoe().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    _assert_same(moeprof.load(tmp_path, bits=4), moeprof.load(folder, bits=4))


def test_the_tenth_expert_follows_the_ninth(tmp_path):
    olmoe(num_experts=12).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    _assert_same(moeprof.load(tmp_path, bits=8), _quantise(expected, 8))


def test_tied_weights_stay_tied(tmp_path):
    olmoe(tie_word_embeddings=True).save_pretrained(tmp_path / "floats")
    model = moeprof.load(tmp_path / "floats", bits=4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    moeprof.save_quantized(model, tmp_path / "q4")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "q4", save.STEM).names
    back = moeprof.load(tmp_path / "q4")
    assert back.lm_head.weight is back.model.embed_tokens.weight
    _assert_same(back, model)


def test_settings_of_generation_come_along(changed, tmp_path):
    path, _ = changed
    transformers.GenerationConfig(max_new_tokens=7, eos_token_id=3).save_pretrained(path)
    model = moeprof.load(path, bits=8)
    assert model.generation_config.max_new_tokens == 7
    moeprof.save_quantized(model, tmp_path / "q8")
    assert moeprof.load(tmp_path / "q8").generation_config.eos_token_id == 3


def test_a_loaded_model_is_patched_and_generates(folder):
    model = moeprof.load(folder, bits=8, dtype="float32")
    expected = _logits(model)
    with moeprof.patch(model) as handle:
        assert len(handle.layers) == 2
        torch.testing.assert_close(_logits(model), expected)
        assert model.generate(token_ids(), max_new_tokens=3, do_sample=False).shape == (2, 14)


def test_exact_multiplies_with_floats(folder):
    rounded, exact = (moeprof.load(folder, bits=8, exact=e) for e in (False, True))
    modules = [m for m in exact.modules() if isinstance(m, QuantizedExperts)]
    assert modules
    assert all(m.exact for m in modules)
    _assert_same(rounded, exact)
    assert not torch.equal(_logits(rounded), _logits(exact))


def test_others_may_read_what_is_saved_as_the_umask_has_it(saved, tmp_path):
    (tmp_path / "opened").touch()
    expected = (tmp_path / "opened").stat().st_mode
    assert {file.stat().st_mode for file in saved.iterdir()} == {expected}


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])  # without biases, and with
def test_linear_layers_are_quantised_saved_and_loaded_back(family, tmp_path):
    _build(family).save_pretrained(tmp_path / "floats")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.bfloat16)
    moeprof.quantize(expected, bits=4, linears=True, progress=False)
    model = moeprof.load(tmp_path / "floats", bits=4, linears=True, exact=True)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert model.lm_head.exact
    _assert_same(model, expected)
    moeprof.save_quantized(model, tmp_path / "q4")
    back = moeprof.load(tmp_path / "q4", exact=True)
    _assert_same(back, model)
    assert torch.equal(_logits(back), _logits(model))


def test_a_model_on_the_hub_is_taken_from_its_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--small"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    _assert_same(moeprof.load("someone/small", bits=4), moeprof.load(folder, bits=4))
    with pytest.raises(FileNotFoundError, match="someone/other"):
        moeprof.load("someone/other", bits=4)


# ---- checkpoints that can't be loaded ----


@pytest.mark.parametrize("bits", [None, 5, True])
def test_bits_are_8_or_4(folder, bits):
    with pytest.raises(ValueError, match="bits.*8.*4"):
        moeprof.load(folder, bits=bits)


def test_other_dtypes_are_refused(folder):
    for dtype in ("int8", torch.float64):
        with pytest.raises(ValueError, match=f"dtype.*bfloat16.*{dtype}"):
            moeprof.load(folder, bits=8, dtype=dtype)


def test_a_folder_without_weights_or_config_is_named(changed, tmp_path):
    path, _ = changed
    with pytest.raises(FileNotFoundError, match="no such folder"):
        moeprof.load(tmp_path / "nothing", bits=8)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"changed: no model\.safetensors"):
        moeprof.load(path, bits=8)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        moeprof.load(path, bits=8)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def _set(name, value):
    return lambda tensors: tensors.__setitem__(name, value(tensors[name]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), "layers.1.mlp.experts.*7 of 8|7 of 8.*layers.1.mlp.experts"),
        (lambda t: t.pop("model.norm.weight"), "lacks.*model.norm.weight"),
        (lambda t: t.update({"model.adapter": torch.ones(3)}), "no place.*model.adapter"),
        (
            lambda t: t.update({"model.layers.7.mlp.experts.0.up_proj.weight": torch.ones(3, 4)}),
            "no place.*model.layers.7.mlp.experts",
        ),
        (_set("model.norm.weight", lambda w: w[1:].clone()), "model.norm.weight"),
        (_set(EXPERT, lambda w: w[1:].clone()), "layers.1.mlp.experts, expert 3: "),
        (_set(EXPERT, lambda w: w * NAN), "layers.1.mlp.experts, expert 3: .*finite"),
    ],
)
def test_what_does_not_fit_is_one_error_that_names_it(changed, change, message):
    path, change_tensors = changed
    change_tensors(change)
    with pytest.raises(ValueError, match=message) as raised:
        moeprof.load(path, bits=8)
    assert str(path) in str(raised.value)


def test_files_that_are_cut_off_or_something_else_are_named(changed):
    path, _ = changed
    file = path / "model.safetensors"
    data = file.read_bytes()
    for other in (data[: len(data) // 2], data[:5], b"PK" + data, b""):
        file.write_bytes(other)
        with pytest.raises(ValueError, match=r"model\.safetensors: no whole safetensors file"):
            moeprof.load(path, bits=8)


def test_an_index_with_a_file_that_is_missing(tmp_path):
    olmoe().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"{lost.name} is missing"):
        moeprof.load(tmp_path, bits=8)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: no index"):
        moeprof.load(tmp_path, bits=8)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', "[]", ""])
def test_an_index_that_names_no_files(changed, content):
    path, _ = changed
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: no index of"):
        moeprof.load(path, bits=4)


def test_weights_that_others_have_quantised_are_refused(changed):
    path, _ = changed
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fp8.*float32, bfloat16, float16"):
        moeprof.load(path, bits=8)


@pytest.mark.parametrize("kind", ["changed", "copied"])
def test_an_adapter_beside_the_weights_is_not_left_out(request, kind):
    """transformers' from_pretrained adds it to the model."""
    found = request.getfixturevalue(kind)
    path, bits = (found[0], 8) if kind == "changed" else (found, None)
    (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ValueError) as raised:
        moeprof.load(path, bits=bits)
    assert says(raised.value, str(path), "PEFT", "merge_and_unload")


def test_a_model_without_experts_is_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No routers found in LlamaForCausalLM"):
        moeprof.load(tmp_path, bits=8)


@pytest.mark.skipif(V5, reason="transformers 5 calls these experts as others")
def test_experts_that_nothing_can_stand_in_for_are_refused(tmp_path):
    every.build("gpt_oss").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*transformers 5 can"):
        moeprof.load(tmp_path, bits=8)


# ---- saved and loaded back ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_bit_for_bit(family, tmp_path):
    _build(family).save_pretrained(tmp_path / "floats")
    model = moeprof.load(tmp_path / "floats", bits=8, dtype="float32")
    moeprof.save_quantized(model, tmp_path / "q8")
    shutil.rmtree(tmp_path / "floats")
    for bits in (None, 8):
        back = moeprof.load(tmp_path / "q8", bits=bits)
        assert type(back) is type(model)
        _assert_same(back, model)
        assert torch.equal(_logits(back), _logits(model))


def test_large_models_are_saved_in_several_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 10_000)
    model = moeprof.load(folder, bits=4)
    moeprof.save_quantized(model, tmp_path / "q4")
    files = sorted(p.name for p in (tmp_path / "q4").glob("*.safetensors"))
    assert files[0] == f"moeprof-00001-of-{len(files):05}.safetensors"
    assert len(files) > 1
    _assert_same(moeprof.load(tmp_path / "q4"), model)


def test_the_files_say_what_they_hold(saved):
    with safe_open(saved / "moeprof.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["moeprof"])
    assert said == {
        "experts": dict.fromkeys((f"model.layers.{n}.mlp.experts" for n in (0, 1)), "q4"),
        "linears": {},
        "dtype": "bfloat16",
        "transformers": transformers.__version__,
        "version": 1,
        "group": 32,
    }
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "moeprof"
    assert sorted(p.name for p in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "moeprof.safetensors",
    ]


def test_from_pretrained_stops_at_a_saved_model(saved):
    """It would make up weights of experts otherwise."""
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_save_pretrained_writes_what_load_reads(folder, tmp_path):
    model = moeprof.load(folder, bits=4)
    model.save_pretrained(tmp_path / "q4")
    _assert_same(moeprof.load(tmp_path / "q4"), model)
    with pytest.raises(TypeError, match="save_quantized.*"):
        model.save_pretrained(tmp_path / "other", max_shard_size="1GB")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    other.save_pretrained(tmp_path / "copy")
    _assert_same(moeprof.load(tmp_path / "copy"), other)
    with pytest.raises(ValueError, match="not quantised"):
        moeprof.save_quantized(olmoe(), tmp_path / "floats")
    assert not (tmp_path / "floats").exists()


def test_a_patched_model_is_not_saved(folder, tmp_path):
    model = moeprof.load(folder, bits=4)
    with moeprof.patch(model):
        with pytest.raises(ValueError, match=r"patched: moeprof\.unpatch"):
            moeprof.save_quantized(model, tmp_path / "q4")
    assert not (tmp_path / "q4").exists()


def test_a_model_with_adapters_is_not_saved(folder, tmp_path):
    """`load` would look for weights that PEFT calls otherwise."""
    peft = pytest.importorskip("peft")
    model = moeprof.load(folder, bits=4)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    for each in (adapted, model):
        with pytest.raises(ValueError) as raised:
            moeprof.save_quantized(each, tmp_path / "q4")
        assert says(raised.value, "PEFT", "merge_and_unload")
    assert not (tmp_path / "q4").exists()
    merged = adapted.merge_and_unload()
    moeprof.save_quantized(merged, tmp_path / "q4")
    _assert_same(moeprof.load(tmp_path / "q4"), merged)


def test_no_model_is_written_over(folder, saved, copied):
    model = moeprof.load(folder, bits=8)
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    with pytest.raises(FileExistsError, match="holds a model already"):
        moeprof.save_quantized(model, copied)
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    with pytest.raises(FileExistsError, match="this is a file"):
        moeprof.save_quantized(model, copied / "config.json")


def test_nor_one_that_another_process_saves_meanwhile(folder, saved, tmp_path, monkeypatch):
    """It comes between the first look at the folder and the end."""
    model, path = moeprof.load(folder, bits=8), tmp_path / "new"

    def write_configs(*arguments):
        shutil.copytree(saved, path, dirs_exist_ok=True)
        return real(*arguments)

    real = save._write_configs
    monkeypatch.setattr(save, "_write_configs", write_configs)
    with pytest.raises(FileExistsError, match="holds a model already"):
        moeprof.save_quantized(model, path)
    assert {p.name for p in path.iterdir()} == {p.name for p in saved.iterdir()}
    assert (path / "config.json").read_bytes() == (saved / "config.json").read_bytes()


def test_two_that_save_to_one_folder_take_turns(folder, tmp_path, monkeypatch):
    """The second waits until the first is done, and is refused then."""
    models = [moeprof.load(folder, bits=bits) for bits in (8, 4)]
    path, inside, most = tmp_path / "new", [], []
    began, refused = threading.Event(), []
    real = save._write_weights

    def write_slowly(*arguments):
        inside.append(1)
        began.set()
        time.sleep(0.3)
        names = real(*arguments)
        most.append(len(inside))
        inside.pop()
        return names

    def second():
        began.wait(10)
        try:
            moeprof.save_quantized(models[1], path)
        except FileExistsError as error:
            refused.append(str(error))

    monkeypatch.setattr(save, "_write_weights", write_slowly)
    other = threading.Thread(target=second)
    other.start()
    moeprof.save_quantized(models[0], path)
    other.join(30)
    assert set(most) == {1} and len(refused) == 1 and "holds a model already" in refused[0]
    _assert_same(moeprof.load(path), models[0])


def test_what_a_killed_save_left_goes_with_the_next(folder, tmp_path):
    left = tmp_path / "q4" / ".moeprof.0123abcd.part"
    left.mkdir(parents=True)
    (left / "moeprof.safetensors").write_bytes(b"half")
    moeprof.save_quantized(moeprof.load(folder, bits=4), tmp_path / "q4")
    assert not left.exists() and moeprof.load(tmp_path / "q4") is not None


def test_a_full_disk_for_the_config_is_told_in_our_words(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "/q8/.moeprof.1.part/config.json")

    model = moeprof.load(folder, bits=8)
    monkeypatch.setattr(save, "_write_configs", full)
    with pytest.raises(OSError, match=r"q8 can't be written: No space left on device$"):
        moeprof.save_quantized(model, tmp_path / "q8")
    assert not (tmp_path / "q8").exists()


def test_a_full_disk_is_told_in_our_words(folder, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = moeprof.load(folder, bits=8)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"q8 can't be written: .*No space left"):
        moeprof.save_quantized(model, tmp_path / "q8")
    assert not (tmp_path / "q8").exists()


@pytest.mark.parametrize("step", ["replace", "_write_configs"])
def test_a_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch, step):
    model = moeprof.load(folder, bits=4)
    for name, existing in (("new", False), ("with a tokenizer", True)):
        path = tmp_path / name
        if existing:
            path.mkdir()
            (path / "tokenizer.json").write_text("{}")
        with monkeypatch.context() as patched:
            _fail_at(patched, step)
            with pytest.raises(KeyboardInterrupt):
                moeprof.save_quantized(model, path)
        assert path.exists() == existing
        assert not existing or [p.name for p in path.iterdir()] == ["tokenizer.json"]
        moeprof.save_quantized(model, path)


def _fail_at(patched, step):
    """At the configs, or where the last file is moved to its place."""

    def fail(*args):
        raise KeyboardInterrupt

    if step != "replace":
        patched.setattr(save, step, fail)
        return
    replace = save.os.replace
    patched.setattr(
        save.os, "replace", lambda a, b: fail() if b.name == "config.json" else replace(a, b)
    )


# ---- saved files that are wrong ----


def test_bits_that_contradict_the_files(saved):
    with pytest.raises(ValueError, match="bits=8 contradicts.*q4"):
        moeprof.load(saved, bits=8)


def _rewritten(path, metadata=None, change=lambda tensors: None):
    """As a file that says nothing of its tensors' checksums, as those of before they had any."""
    file = path / "moeprof.safetensors"
    with safe_open(file, framework="pt") as opened:
        given = opened.metadata()
    del given["moeprof_checksums"]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, given if metadata is None else metadata(given))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["weights"]
    (path / "config.json").write_text(json.dumps(config))


def test_a_newer_layout_is_refused(copied):
    _rewritten(
        copied, lambda m: m | {"moeprof": m["moeprof"].replace('"version": 1', '"version": 2')}
    )
    with pytest.raises(ValueError, match="version 2.*update moeprof"):
        moeprof.load(copied)


@pytest.mark.parametrize("said", [None, "[]", "{", '{"version": "x"}'])
def test_foreign_files_are_refused(copied, said):
    _rewritten(copied, lambda m: {"format": "pt"} | ({"moeprof": said} if said else {}))
    with pytest.raises(ValueError, match=r"not from moeprof\.save_quantized"):
        moeprof.load(copied)


def test_saved_files_that_are_cut_off(copied):
    file = copied / "moeprof.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"moeprof\.safetensors: no whole safetensors file"):
        moeprof.load(copied)


def test_files_of_before_there_were_checksums_are_read(copied, saved):
    _rewritten(copied)
    _assert_same(moeprof.load(copied), moeprof.load(saved))


def test_weights_of_before_there_were_checksums_beside_a_newer_config(copied):
    config = (copied / "config.json").read_text()
    _rewritten(copied)
    (copied / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"config\.json was saved with other weights"):
        moeprof.load(copied)


def test_a_changed_byte_of_a_saved_model_is_noticed(copied):
    file = copied / "moeprof.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"moeprof\.safetensors: model.* not what was saved"):
        moeprof.load(copied)


@pytest.mark.parametrize("swapped", ["moeprof.safetensors", "-00002-of-", "config.json"])
def test_a_file_of_another_saved_model_is_noticed(tmp_path, monkeypatch, swapped):
    """Of the same shapes, so that nothing else is wrong with it."""
    if "-of-" in swapped:
        monkeypatch.setattr(save, "SHARD_BYTES", 30_000)
    for seed in (1, 2):
        olmoe(seed).save_pretrained(tmp_path / "original")
        moeprof.save_quantized(moeprof.load(tmp_path / "original", bits=4), tmp_path / str(seed))
    names = sorted(p.name for p in (tmp_path / "1").iterdir() if swapped in p.name)
    shutil.copy(tmp_path / "2" / names[0], tmp_path / "1" / names[0])
    with pytest.raises(ValueError, match="not what was saved with|saved with other weights"):
        moeprof.load(tmp_path / "1")


def test_an_index_that_is_missing_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(save, "SHARD_BYTES", 30_000)
    moeprof.save_quantized(moeprof.load(folder, bits=4), tmp_path / "q4")
    (tmp_path / "q4" / "moeprof.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"its moeprof\.safetensors, or .* is missing"):
        moeprof.load(tmp_path / "q4")


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(DOWN), f"lack.*{DOWN}"),
        (
            _set(DOWN, lambda w: w[1:].clone()),
            f"{DOWN} is.* \\(7, 1, .*expected torch.uint8 \\(8, 1",
        ),
        (_set(DOWN, lambda w: w[..., 1:].clone()), f"{DOWN} is .*expected"),
        (_set(DOWN, lambda w: w.float()), f"{DOWN} is torch.float32.*expected torch.uint8"),
        (lambda t: t.update({"other": torch.ones(2)}), "no place.*other"),
        (lambda t: t.pop("model.norm.weight"), "lacks.*model.norm.weight"),
    ],
)
def test_saved_tensors_that_do_not_fit(copied, change, message):
    _rewritten(copied, change=change)
    with pytest.raises(ValueError, match=message):
        moeprof.load(copied)


def test_saved_files_of_another_model(copied):
    config = json.loads((copied / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts.*no MoE block.*saved with"):
        moeprof.load(copied)


# ---- MXFP4 ----


def test_mxfp4_is_decoded_as_its_specification_says():
    """By hand: bytes of each number, and scales of 2^-1 and 2^3."""
    codes = torch.arange(32) % 16  # 0, 1, ..., 15, twice
    byte = (codes[::2] | codes[1::2] << 4).to(torch.uint8)
    blocks = byte.repeat(1, 2, 1)  # (1, 2, 16)
    scales = torch.tensor([[126, 130]], dtype=torch.uint8)
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    numbers = torch.tensor([*half, *(-x for x in half)]).repeat(2)
    expected = torch.cat([numbers * 0.5, numbers * 8])[None]
    assert torch.equal(mxfp4.decoded(blocks, scales), expected)
    nothing = torch.full_like(scales, 255)
    assert not mxfp4.decoded(blocks, nothing).isfinite().any()


def _random_mxfp4(rows, columns, generator):
    blocks = torch.randint(0, 256, (*rows, columns // 32, 16), generator=generator)
    scales = torch.randint(118, 122, (*rows, columns // 32), generator=generator)
    return blocks.to(torch.uint8), scales.to(torch.uint8)


def test_mxfp4_is_decoded_as_transformers_decodes_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = _random_mxfp4((3, 10), 64, torch.Generator().manual_seed(0))
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(mxfp4.decoded(blocks, scales).transpose(1, 2), theirs)


@pytest.mark.skipif(not V5, reason="transformers 4 has no place for other experts of gpt_oss")
@pytest.mark.parametrize(("bits", "least", "most"), [(8, 0.1, 1), (4, 3, 12)])
def test_a_checkpoint_in_mxfp4_is_read_and_its_error_said(tmp_path, bits, least, most):
    zoo.build("gpt_oss", intermediate_size=64).save_pretrained(tmp_path / "floats")
    packed, floats = tmp_path / "mxfp4", tmp_path / "floats"
    shutil.copytree(floats, packed)
    tensors, generator = load_file(floats / "model.safetensors"), torch.Generator().manual_seed(0)
    decoded = dict(tensors)
    for name in [n for n in tensors if re.search("experts.(gate_up|down)_proj$", n)]:
        count, columns, rows = tensors.pop(name).shape
        blocks, scales = _random_mxfp4((count, rows), columns, generator)
        tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
        decoded[name] = mxfp4.decoded(blocks, scales).transpose(1, 2).contiguous()
    save_file(decoded, floats / "model.safetensors", {"format": "pt"})
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=f"MXFP4; in q{bits}.*% away") as warned:
        model = moeprof.load(packed, bits=bits)
    _assert_same(model, moeprof.load(floats, bits=bits))
    (error,) = re.findall(r"([\d.]+) %", str(warned[0].message))
    assert least < float(error) < most
