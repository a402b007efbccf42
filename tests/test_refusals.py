"""What would be a wrong answer, a crash or lost work, and is refused in one clear error."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from models import assert_unchanged, olmoe, snapshot, token_ids

import moeprof


@pytest.fixture
def model():
    return olmoe()


class Experts(torch.nn.Module):
    """Packed experts as transformers 5 has them: E = 4, H = 8, I = 16."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.ones(4, 32, 8), requires_grad=False)
        self.down_proj = torch.nn.Parameter(torch.ones(4, 8, 16), requires_grad=False)
        self.act_fn = torch.nn.SiLU()


INDICES, WEIGHTS = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)


@pytest.mark.parametrize(
    "indices, weights, message",
    [
        (INDICES.to("meta"), WEIGHTS, "routing on device meta"),
        (INDICES, WEIGHTS.to("meta"), "routing on device meta"),
        (torch.full((2, 1), 2.7), WEIGHTS, "idx: expected integers, got torch.float32"),
        (INDICES > 0, WEIGHTS, "idx: expected integers, got torch.bool"),
        (INDICES + 5, WEIGHTS, "outside"),
    ],
)
def test_routings_that_can_not_be_read(indices, weights, message):
    with pytest.raises(ValueError, match=message):
        moeprof.experts_forward(Experts(), torch.ones(2, 8), indices, weights)


def test_experts_of_another_form():
    experts = Experts()
    experts.down_proj = torch.nn.Parameter(torch.ones(8, 16))
    with pytest.raises(ValueError, match=r"down_proj of shape \(8, 16\)"):
        moeprof.experts_forward(experts, torch.ones(2, 8), INDICES, WEIGHTS)


def test_a_hook_on_all_modules_is_not_skipped_silently(model):
    before = snapshot(model)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        with pytest.raises(ValueError, match="layers.0.mlp: .* a hook on all modules"):
            moeprof.patch(model)
    finally:
        hook.remove()
    assert_unchanged(model, before)


def test_a_patched_model_is_not_pickled_into_an_unreadable_file(model):
    ids = token_ids()
    with moeprof.patch(model), pytest.raises(RuntimeError, match="unpatch it first"):
        torch.save(model, io.BytesIO())
    loaded = io.BytesIO()
    torch.save(model, loaded)
    loaded.seek(0)
    again = torch.load(loaded, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_torch_func_needs_the_backend_in_torch(model):
    def loss(parameters):
        return torch.func.functional_call(model, parameters, (token_ids(),)).logits.sum()

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gate = next(name for name in parameters if name.endswith("gate.weight"))
    with moeprof.patch(model, backend="torch"):
        assert torch.func.grad(loss)(parameters)[gate].abs().max() > 0
    with moeprof.patch(model), pytest.raises(RuntimeError, match='torch.func.*backend="torch"'):
        torch.func.grad(loss)(parameters)


def test_what_is_no_model_and_no_callback(model):
    with pytest.raises(TypeError, match="expected a torch.nn.Module, got str"):
        moeprof.patch("model")
    with moeprof.patch(model) as handle, pytest.raises(TypeError, match="on_routing: expected"):
        handle.on_routing(5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "prompts, options, error, message",
    [
        ("hello", {}, TypeError, "prompts: expected a list of texts"),
        ([""], {}, ValueError, "prompts: expected texts that aren't empty"),
        (["a"], {"max_new_tokens": 2.5}, ValueError, "max_new_tokens: expected an integer"),
    ],
)
def test_run_configuration(prompts, options, error, message):
    labels = [None] * len(prompts)
    with pytest.raises(error, match=message):
        moeprof.run_configuration("topk_8_baseline", prompts, labels, **options)


def test_arrays_whose_meaning_would_be_dropped():
    masked = np.ma.masked_array(np.ones((1, 4), np.float32), mask=[[1, 0, 0, 0]])
    with pytest.raises(TypeError, match="router_logits: expected .* got MaskedArray"):
        moeprof.topk_routing(masked, 1)
    for p in (np.array([[0.01 + 5j]]), np.array([[True]])):
        with pytest.raises(TypeError, match="p: expected real numbers"):
            moeprof.benjamini_hochberg(p, 0.05)


def test_threads_beyond_a_c_int():
    with pytest.raises(ValueError, match="expected at most"):
        moeprof.set_num_threads(2**40)


def test_a_null_in_numpys_format_needs_numpy_alone(tmp_path):
    from nulls import null_of, random_logits

    null_of(random_logits(50, 4)).save(tmp_path / "null.npz")
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['torch'] = None\n"
        "import moeprof, numpy as np\n"
        "z = np.zeros((2, 4), np.float32)\n"
        "print(moeprof.benjamini_hochberg_routing(z, null=sys.argv[1]).expert_counts)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "null.npz"], check=True)
