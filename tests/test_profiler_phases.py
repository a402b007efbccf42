"""The phase of a step, and padding: from the cache, the caller and the mask, never from shapes."""

import threading
import warnings

import numpy as np
import pytest
import torch
import zoo
from models import blocks, generate, olmoe, token_ids
from torch import nn

import moeprof
from moeprof.models.entry import Entry
from moeprof.models.phases import PHASES, packed_phases

V5 = int(__import__("transformers").__version__.split(".")[0]) >= 5
GATE = "model.layers.0.mlp.gate"


def counted(profiler, layer=0):
    """{phase: (tokens, padding, steps)} of the phases that came."""
    found = {}
    for phase in PHASES:
        counts = profiler._session.counts[phase][layer]
        if counts.steps:
            found[phase] = (counts.tokens, counts.tokens_padding, int(counts.steps))
    return found


# ---------------------------------------------------------------- phases


def test_decoding_with_and_without_generate():
    model, ids = olmoe(), token_ids(2, 6)
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        output = model(ids, use_cache=True)
        for _ in range(3):
            cache = output.past_key_values
            output = model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert counted(profiler) == {"prefill": (12, 0, 1), "decode": (6, 0, 3)}


def test_a_prompt_of_one_token_is_a_prompt():
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(token_ids(2, 1), max_new_tokens=4, min_new_tokens=4)
    assert counted(profiler) == {"prefill": (2, 0, 1), "decode": (6, 0, 3)}


def test_more_tokens_behind_a_cache_are_unknown():
    """A second turn of a chat, or drafts that a user verifies: only the user knows."""
    model, ids = olmoe(), token_ids(1, 6)
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        cache = model(ids, use_cache=True).past_key_values
        model(ids[:, :4], past_key_values=cache, use_cache=True)
    assert counted(profiler) == {"prefill": (6, 0, 1), "unknown": (4, 0, 1)}


@pytest.mark.parametrize("beams", (1, 2))
def test_generation_without_a_cache_decodes(beams):
    """Each step computes the whole row again; what ran is counted, in the phase it ran in."""
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(
            token_ids(1, 6), max_new_tokens=4, min_new_tokens=4, use_cache=False, num_beams=beams
        )
    rows = beams * (7 + 8 + 9)
    assert counted(profiler) == {"prefill": (6 * beams, 0, 1), "decode": (rows, 0, 3)}


@pytest.mark.parametrize("new", (1, 4))
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_what_is_new_on_a_kept_cache_is_a_prompt_also_a_single_token(new):
    model, ids = olmoe(), token_ids(1, 10)
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    with torch.no_grad():
        cache = model(ids[:, : 10 - new], use_cache=True).past_key_values
        with moeprof.MoEProfiler(model) as profiler:
            model.generate(ids, past_key_values=cache, **options)
    assert counted(profiler) == {"prefill": (new, 0, 1), "decode": (2, 0, 2)}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
def test_a_decode_step_is_followed_by_one_only_on_its_own_cache():
    """The caller isn't looked for again where the cache is the same and holds one token more."""
    model, ids = olmoe(), token_ids(1, 10)
    options = {"max_new_tokens": 2, "min_new_tokens": 2}
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        cache = model(ids[:, :8], use_cache=True).past_key_values
        model.generate(ids[:, :8], **options)  # ends with a decode step behind 8 tokens
        model.generate(ids[:, :9], past_key_values=cache, **options)
        assert counted(profiler) == {"prefill": (8 + 8 + 1, 0, 3), "decode": (2, 0, 2)}
        model(ids[:, :1])
    assert counted(profiler)["prefill"] == (18, 0, 4)


@pytest.mark.parametrize("use_cache", (True, False))
def test_the_prompt_that_guidance_compares_with_is_a_prompt(use_cache):
    """Classifier-free guidance runs the model a second time inside each step."""
    model, ids = olmoe(), token_ids(1, 6)
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(
            ids,
            negative_prompt_ids=ids[:, :4],
            guidance_scale=1.5,
            max_new_tokens=3,
            min_new_tokens=3,
            use_cache=use_cache,
        )
    further = 4 if use_cache else (7 + 8) + (5 + 6)
    assert counted(profiler) == {"prefill": (6 + 4, 0, 2), "decode": (further, 0, 4)}


@pytest.mark.parametrize("name", ("jamba", "qwen3_next", "lfm2_moe"))
def test_models_with_a_state_beside_their_cache(name):
    if name not in zoo.HERE:
        pytest.skip(f"{name} needs transformers 5")
    model, ids = zoo.build(name), zoo.inputs(name)["input_ids"]
    for use_cache, decoded in ((True, 2 * 2), (False, 2 * (10 + 11))):
        with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
            generate(model, ids, 3, use_cache=use_cache)
        assert counted(profiler) == {"prefill": (18, 0, 1), "decode": (decoded, 0, 2)}


def test_calls_without_a_cache_are_prefills():
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        for length in (1, 5):
            model(token_ids(2, length), use_cache=False)
    assert counted(profiler) == {"prefill": (12, 0, 2)}


def test_drafts_are_verified(loaded):
    model, tokenizer = loaded
    text = "And God said, Let there be light: and God said, Let there be"
    ids = tokenizer(text, return_tensors="pt")
    rows = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, output: rows.append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
    )
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(**ids, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3)
    hook.remove()
    found, prompt = counted(profiler), ids["input_ids"].shape[1]
    assert found["prefill"][0] == prompt
    assert sum(tokens for tokens, _, _ in found.values()) == sum(rows)
    assert found["decode"][0] == found["decode"][2] == sum(n == 1 for n in rows[1:])
    # What the first step proposed already ran behind the prompt.
    assert found["verify"][0] == rows[0] - prompt + sum(n for n in rows[1:] if n > 1) > 0


def test_an_assistant_proposes_and_the_model_verifies(loaded):
    model, tokenizer = loaded
    ids = tokenizer("And God said, Let there be light", return_tensors="pt")
    other, _ = moeprof.demo.load()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler, moeprof.MoEProfiler(other) as its:
        model.generate(**ids, max_new_tokens=12, do_sample=False, assistant_model=other)
    # The drafts of the assistant that were accepted are given to it again: no prompt.
    assert counted(its)["prefill"][0] == ids["input_ids"].shape[1] and "verify" not in counted(its)
    found = counted(profiler)
    assert found["prefill"][0] == ids["input_ids"].shape[1]
    assert found["verify"][0] > 0 and "unknown" not in found


def test_a_prompt_in_chunks_is_a_prompt(loaded):
    model, tokenizer = loaded
    ids = tokenizer("And God said, Let there be light: and there was light", return_tensors="pt")
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(**ids, max_new_tokens=4, min_new_tokens=4, prefill_chunk_size=5)
    prompt, found = ids["input_ids"].shape[1], counted(profiler)
    # transformers 4 runs the prompt's last token, by itself, in its loop
    assert {phase: tokens for phase, (tokens, _, _) in found.items()} == {
        "prefill": prompt,
        "decode": 3,
    }


def test_a_cache_that_does_not_say_is_unknown():
    class Silent:
        pass

    given = {"input_ids": token_ids(1, 1), "past_key_values": Silent()}
    assert Entry(nn.Module(), (), given).phases == "unknown"


def test_sequences_in_one_row():
    """As continuous batching packs them: a prompt, two decode steps, a prompt's second part."""
    arguments = {
        "cu_seq_lens_q": torch.tensor([0, 4, 5, 6, 9], dtype=torch.int32),
        "cu_seq_lens_k": {"full_attention": torch.tensor([0, 4, 14, 19, 28], dtype=torch.int32)},
    }
    phases, real = packed_phases(arguments, 12)
    assert [PHASES[p] for p in phases[:9]] == ["prefill"] * 4 + ["decode"] * 2 + ["prefill"] * 3
    assert real.tolist() == [True] * 9 + [False] * 3
    model = olmoe()
    given = {"input_ids": token_ids(1, 12), "attention_mask": torch.ones(1, 1, 12, 40), **arguments}
    with torch.no_grad(), moeprof.MoEProfiler(model, trace=True) as profiler:
        model.model(input_ids=given["input_ids"])
        entry = Entry(model.model, (), given)
        step = profiler._session.begin(entered=True)
        step.phases, step.real = entry.phases, entry.real()
        hidden = torch.randn(32).repeat(1, 12, 1)
        hidden[0, 4:6] *= -1  # the decode steps select other experts than the prompts
        blocks(model)[0](hidden)
        profiler._session.end()
    found = counted(profiler)
    assert profiler.result().events[-1][-1] == 2 * model.config.num_experts_per_tok
    assert found == {"prefill": (12 + 7, 3, 2), "decode": (2, 0, 1)}


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_has_no_padding():
    if not V5:
        pytest.skip("the interface is transformers 5's")
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = moeprof.demo.load()
    prompts = [tokenizer(t)["input_ids"] for t in ("In the beginning God", "def main():", "And")]
    model.set_attn_implementation("paged|sdpa")
    rows = []
    gate = model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, output: rows.append(len(output[2])))
    with moeprof.MoEProfiler(model) as profiler:
        model.generate_batch(
            inputs=prompts,
            progress_bar=False,
            generation_config=GenerationConfig(
                max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=1
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                block_size=32, num_blocks=64, max_batch_tokens=256, max_blocks_per_request=0
            ),
        )
    found = counted(profiler)
    assert found["prefill"][:2] == (rows[0], 0) and found["decode"][:2] == (sum(rows[1:]), 0)
    assert set(found) == {"prefill", "decode"}


def test_the_time_of_a_step_of_two_phases_is_divided():
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        step = profiler._session.begin(entered=True)
        step.phases = np.array([0, 0, 0, 1], np.int8)
        blocks(model)[0](torch.randn(1, 4, 32))
        profiler._session.end()
    spent = {p: profiler._session.counts[p][0].nanoseconds for p in ("prefill", "decode")}
    assert spent["prefill"] == pytest.approx(3 * spent["decode"], rel=1e-3) and spent["decode"] > 0


def test_a_phase_without_steps_is_not_shown(tmp_path):
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model.generate(token_ids(1, 6), max_new_tokens=3, min_new_tokens=3)
    result = profiler.result()
    assert result.phases == ["prefill", "decode"]
    assert "verify" not in result.summary() and "unknown" not in result.summary()
    assert set(result.to_frame()["phase"]) == {"prefill", "decode", "all"}
    result.save(tmp_path)
    assert moeprof.Profile.load(tmp_path) == result


@pytest.mark.slow
def test_all_phases_are_drawn_and_stored(tmp_path, loaded):
    model, tokenizer = loaded
    ids = tokenizer("And God said, Let there be light: And God said", return_tensors="pt")
    records = tmp_path / "records"
    with torch.no_grad(), moeprof.MoEProfiler(model, records=records, trace=True) as profiler:
        model.generate(**ids, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
        cache = model(**ids, use_cache=True).past_key_values
        model(ids["input_ids"][:, :3], past_key_values=cache, use_cache=True)
    result = profiler.result()
    assert set(result.phases) >= {"prefill", "verify", "unknown"}
    text = result.summary()
    assert max(map(len, text.split("\n"))) <= 100 and "verify" in text and "unknown" in text
    for name in result.figures:
        result.plot(name).canvas.draw()
    result.save(tmp_path / "profile")
    assert moeprof.Profile.load(tmp_path / "profile") == result


# ---------------------------------------------------------------- padding


def ragged(pad=1, lengths=(9, 4, 6)):
    """Rows padded on the right, and how many of their ids are real."""
    ids = token_ids(len(lengths), max(lengths)) % 50 + 10
    for row, length in enumerate(lengths):
        ids[row, length:] = pad
    return ids, sum(lengths)


@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_may_be_said_by_its_id(side):
    model, (ids, real) = olmoe(), ragged()
    ids = ids.flip(1) if side == "left" else ids
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with moeprof.MoEProfiler(model, pad_token_id=1) as profiler:
            model(input_ids=ids)
    assert counted(profiler)["prefill"] == (real, ids.numel() - real, 1)


def test_the_id_inside_a_row_is_text():
    model, (ids, real) = olmoe(), ragged()
    ids[0, 3] = 1
    with torch.no_grad(), moeprof.MoEProfiler(model, pad_token_id=1) as profiler:
        model(input_ids=ids)
    assert counted(profiler)["prefill"][0] == real


def test_an_attention_mask_comes_before_the_id():
    model, (ids, _) = olmoe(), ragged()
    with torch.no_grad(), moeprof.MoEProfiler(model, pad_token_id=1) as profiler:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert counted(profiler)["prefill"] == (ids.numel(), 0, 1)


def six_tokens_and_padding(mask, use_cache):
    """Options of `generate`: rows that ended get an id that no row chooses, as a model that is
    not trained may choose any other one."""
    return {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "use_cache": use_cache,
        "pad_token_id": 1,
        "bad_words_ids": [[1]],
    }


@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("masked", (True, False))
def test_what_generate_gives_to_rows_that_ended_is_padding_on_request(use_cache, masked):
    """Their attention mask goes on with ones; transformers 5 passes on none of ones only."""
    model, ids = olmoe(), token_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = not masked
    options = six_tokens_and_padding(mask, use_cache)
    counts = []
    with torch.no_grad():
        eos = int(model.generate(ids, min_new_tokens=6, **options)[0, 7])
        for given in ({"pad_token_id": 1}, {}):
            with moeprof.MoEProfiler(model, **given) as profiler:
                ids_out = model.generate(ids, eos_token_id=eos, **options)
            counts.append(counted(profiler)["decode"])
    fed = ids_out[:, 6:-1]  # the last token is not run
    ended = sum(int((fed[:, : n + 1] == 1).sum()) for n in range(fed.shape[1]))
    if use_cache:
        ended = int((fed == 1).sum())
    left = 0 if use_cache or not masked else 2 * fed.shape[1]
    assert ended > 0
    assert counts[0][1] == ended + left
    assert counts[0][0] + counts[0][1] == counts[1][0] + counts[1][1]
    if masked or not V5:
        assert counts[1][1] == left


def test_text_that_generates_repetitions_does_not_look_padded():
    model = olmoe()
    ids = torch.tensor([[5, 6, 7, 9], [8, 5, 6, 7]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with moeprof.MoEProfiler(model):
            for use_cache in (True, False):
                generate(model, ids, 20, use_cache=use_cache)


def test_what_looks_padded_is_said_once_and_counts():
    model, (ids, _) = olmoe(), ragged(pad=7)
    with torch.no_grad(), pytest.warns(UserWarning, match="pad_token_id=7") as caught:
        with moeprof.MoEProfiler(model) as profiler:
            model(input_ids=ids)
            model(input_ids=ids)
    assert len([w for w in caught if "pad_token_id" in str(w.message)]) == 1
    assert counted(profiler)["prefill"] == (2 * ids.numel(), 0, 2)


@pytest.mark.parametrize("given", ("mask", "attention_mask", "one row", "no run"))
def test_nothing_is_said_where_nothing_looks_padded(given):
    model, (ids, _) = olmoe(), ragged(pad=7)
    options = {"mask": np.ones((3, 9))} if given == "mask" else {}
    inputs = {"input_ids": ids}
    if given == "attention_mask":
        inputs["attention_mask"] = torch.ones_like(ids)
    elif given == "one row":
        inputs["input_ids"] = ids[1:2]
    elif given == "no run":
        inputs["input_ids"] = torch.arange(10, 28).reshape(2, 9)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with moeprof.MoEProfiler(model, **options):
            model(**inputs)


def test_a_mask_for_what_runs_inside():
    model, (ids, real) = olmoe(), ragged()
    mask = ids != 1
    with torch.no_grad(), moeprof.MoEProfiler(model, mask=np.ones((3, 9))) as profiler:
        with profiler.mask(mask):
            model(input_ids=ids)
        model(input_ids=ids)
        with pytest.raises(RuntimeError), profiler.mask(mask):
            raise RuntimeError
        model(input_ids=ids)
    assert counted(profiler)["prefill"] == (real + 2 * ids.numel(), ids.numel() - real, 3)


def test_masks_inside_masks():
    model, (ids, real) = olmoe(), ragged()
    profiler = moeprof.MoEProfiler(model)
    with torch.no_grad(), profiler, profiler.mask(ids != 1):
        with pytest.raises(RuntimeError), profiler.mask(np.ones((3, 9))):
            model(input_ids=ids)
            raise RuntimeError
        model(input_ids=ids)
    assert counted(profiler)["prefill"] == (real + ids.numel(), ids.numel() - real, 2)
    assert profiler._session.mask is None


@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("pad", (None, 1))
def test_the_mask_of_a_prompt_goes_on_in_what_is_generated(use_cache, pad):
    """With ones; but for rows that ended, where the profiler knows their id."""
    model, ids = olmoe(), token_ids(3, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    options = six_tokens_and_padding(mask, use_cache)
    with torch.no_grad():
        eos = int(model.generate(ids, min_new_tokens=6, **options)[0, 7])
        with moeprof.MoEProfiler(model, pad_token_id=pad) as profiler:
            with profiler.mask(mask):
                out = model.generate(ids, eos_token_id=eos, **options)
        with moeprof.MoEProfiler(model, pad_token_id=pad) as told:
            model.generate(ids, eos_token_id=eos, **options)
    fed = out[:, 6:-1]  # the last token is not run
    assert (fed == 1).any()
    assert counted(profiler) == counted(told)
    padding = counted(profiler)["decode"][1] - (0 if use_cache else 2 * fed.shape[1])
    assert (padding > 0) == (pad is not None)


def test_the_mask_of_a_prompt_with_drafts():
    """The first step of prompt lookup runs the prompt and drafts behind it."""
    model, ids = olmoe(), torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler, profiler.mask(mask):
        model.generate(ids, attention_mask=mask, max_new_tokens=6, prompt_lookup_num_tokens=2)
    found = counted(profiler)
    assert found["prefill"][:2] == (9, 1) and "verify" in found
    assert all(padding == 0 for phase, (_, padding, _) in found.items() if phase != "prefill")


@pytest.mark.parametrize(
    "shape, said", [((2, 5), r"got \(2, 5\)"), ((3, 6), r"got \(3, 6\)"), ((6,), r"got \(6,\)")]
)
def test_a_mask_of_another_shape_is_refused_at_the_first_step(shape, said):
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler, profiler.mask(np.ones(shape)):
        with pytest.raises(ValueError, match=rf"^mask: expected \(2, 6\).*{said}"):
            model.generate(token_ids(2, 6), max_new_tokens=3)
    assert counted(profiler) == {}


def test_beams_of_one_prompt_do_not_look_padded():
    model, ids = olmoe(), torch.tensor([[7, 7, 5, 6, 8, 9]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with moeprof.MoEProfiler(model):
            model(ids.repeat(3, 1))
            for options in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
                model.generate(ids, max_new_tokens=3, **options)


@pytest.mark.parametrize("value", (-1, True, 1.5, "1"))
def test_a_pad_token_id_of_another_kind(value):
    with pytest.raises((TypeError, ValueError), match="pad_token_id: expected"):
        moeprof.MoEProfiler(olmoe(), pad_token_id=value)


# ---------------------------------------------------------------- blocks alone


@pytest.mark.parametrize("patch", (False, True))
def test_a_block_that_is_the_model_itself(patch):
    block = blocks(olmoe())[0]
    with torch.no_grad(), moeprof.MoEProfiler(block) as profiler:
        if patch:
            moeprof.patch(block)
        block(torch.randn(1, 12, 32))
        block(torch.randn(2, 1, 32))
    assert counted(profiler) == {"unknown": (14, 0, 2)}


class ByForward(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.mlp = block

    def forward(self, x):
        return self.mlp.forward(x)


def test_a_block_that_is_called_by_forward_is_said_to_be():
    net = ByForward(blocks(olmoe())[0])
    with torch.no_grad(), moeprof.MoEProfiler(net) as profiler:
        net(torch.randn(1, 12, 32))
    text = profiler.result().summary()
    assert "called by .forward()" in text and "did not run" not in text


# ---------------------------------------------------------------- threads


def test_start_and_stop_while_eight_threads_run():
    """Nothing raises, in no thread, and no hook stays."""
    model, ids = olmoe(), token_ids(2, 5)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    stop, errors = threading.Event(), []

    def run():
        try:
            with torch.no_grad():
                while not stop.is_set():
                    model(ids)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        profiler, other = moeprof.MoEProfiler(model), moeprof.MoEProfiler(model)
        deadline = threading.Event()
        timer = threading.Timer(3, deadline.set)
        timer.start()
        while not deadline.is_set():
            profiler.start()
            other.start()
            profiler.result()
            profiler.stop()
            profiler.reset()
            other.stop()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with torch.no_grad(), profiler:
        model(ids)
    counts = profiler.get_metrics()[GATE]
    assert counts.tokens >= 10


# ---------------------------------------------------------------- offload


def test_weights_that_accelerate_keeps_on_the_disk_are_profiled(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = olmoe()
    with torch.no_grad(), moeprof.MoEProfiler(model) as whole:
        model(token_ids(2, 5))
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        model(token_ids(2, 5))
    for name, metrics in profiler.get_metrics().items():
        stock = whole.get_metrics()[name]
        assert metrics.expert_selections == stock.expert_selections
        assert metrics.flops_total == stock.flops_total > 0


def test_a_packed_prompt_of_one_token_is_a_prompt():
    """As is the rest of a longer one; one token behind others in the cache is a decode step."""
    lengths = {"cu_seq_lens_q": [0, 1, 2, 4], "cu_seq_lens_k": [0, 1, 9, 14]}
    phases, real = packed_phases(lengths, 5)
    assert [PHASES[n] for n in phases[:4]] == ["prefill", "decode", "prefill", "prefill"]
    assert real.tolist() == [True] * 4 + [False]
