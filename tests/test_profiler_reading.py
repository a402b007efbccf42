"""What routers said against what the experts got, over the MoE models of transformers."""

import functools

import pytest
import torch
import zoo
from models import V5, Middleware
from torch import nn
from torch.nn import functional as F

from moeprof.models.find import Layer, find_sites
from moeprof.models.reading import read_choice, read_experts_call, read_logits
from moeprof.models.sizes import expert_slots, is_list
from moeprof.profiler.check import ExpertRows

E, K, T = zoo.E, zoo.K, 10
LAYER = Layer("m.gate", "m", E, K, 16, 0, 0, 0, 0, 0, 0)
WITHOUT_K = Layer("m.gate", "m", E, None, 16, 0, 0, 0, 0, 0, 0)
UNEXPECTED = "Router output format unexpected: m.gate"


# ---- what one layer did ----


class Watched:
    """Records in one forward what a site's router and experts got and gave."""

    def __init__(self, site):
        self.site, self.rows, self.call = site, {}, None
        self.hooks = [
            site.router.register_forward_pre_hook(self.router_got),
            site.router.register_forward_hook(self.router_gave),
        ]
        experts = site.experts
        if is_list(experts):
            for number, expert in enumerate(expert_slots(experts)):
                self.hooks.append(expert.register_forward_pre_hook(self.expert_got(number)))
        else:  # Granite's experts are two modules; the first of them gets the tokens
            target = next((m for n, m in experts.named_children() if n == "input_linear"), experts)
            self.hooks.append(target.register_forward_pre_hook(self.called, with_kwargs=True))

    def router_got(self, module, args):
        self.hidden = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

    def router_gave(self, module, args, output):
        self.output = output

    def expert_got(self, number):
        def hook(module, args):
            self.rows[number] = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

        return hook

    def called(self, module, args, kwargs):
        self.call = args, kwargs

    # What really ran, by the brute force that fits the layout:

    def truth(self) -> torch.Tensor:
        """(T, E) bool: which experts got which token."""
        ran = torch.zeros(len(self.hidden), self.site.layer.num_experts, dtype=torch.bool)
        for expert, rows in self.rows.items() if self.rows else self.rows_by_call().items():
            for row in rows.to(self.hidden.dtype):
                same = (self.hidden == row).all(1).nonzero()
                assert len(same) == 1, "tokens of the test must differ"
                ran[int(same), expert] = True
        return ran

    def rows_by_call(self) -> dict[int, torch.Tensor]:
        given = [v for v in (*self.call[0], *self.call[1].values())]
        hidden = given[0].reshape(-1, given[0].shape[-1])
        if len(given) == 1:  # Llama 4: a copy of all tokens for each expert, most times zero
            inputs = hidden.view(E, len(self.hidden), -1)
            return {e: self.hidden[inputs[e].abs().sum(-1) > 0] for e in range(E)}
        if len(given) == 2:  # tokens in the order of the experts, and how many each has
            parts = hidden.split(list(map(int, given[1])))
            return dict(enumerate(parts))
        index = next(v for v in given[1:] if not v.is_floating_point())
        return {e: self.hidden[(index == e).any(-1)] for e in range(E)}


class Checked:
    """The rows that a site's listed experts get, as the profiler compares them."""

    def __init__(self, site):
        self.expert_rows = ExpertRows(site)
        self.rows = [0] * site.layer.num_experts
        for expert, slot in self.expert_rows.modules:
            expert.register_forward_pre_hook(functools.partial(self.count, slot))

    def count(self, slot, module, args):
        self.rows[slot] += args[0].shape[:-1].numel()

    def verify(self, choice):
        if any(self.rows):
            self.expert_rows.verify(self.rows, choice)

    def left_out(self, choice):
        return self.expert_rows.left_out(self.rows, choice)


def watch(name, model):
    sites = find_sites(model)
    watched = [Watched(site) for site in sites]
    checks = [Checked(site) for site in sites]
    with torch.no_grad():
        model(**zoo.inputs(name))
    return watched, checks


def read(watched):
    site, tokens = watched.site, len(watched.hidden)
    if site.chooses == "experts":
        return read_experts_call(*watched.call, tokens, site.layer)
    return read_choice(watched.output, tokens, site.layer)


def selected(experts, num_experts=E) -> torch.Tensor:
    """(T, E) bool of indices (T, k); -1 selects nothing."""
    ones = F.one_hot(experts.long() + 1, num_experts + 1).sum(1)[:, 1:]
    assert ones.max() <= 1
    return ones.bool()


READABLE = [name for name in zoo.HERE if not (V5 and name == "nllb_moe")]


@pytest.mark.parametrize("name", READABLE)
def test_the_read_choice_is_what_the_experts_got(name):
    watched, checks = watch(name, zoo.build(name))
    for each, check in zip(watched, checks, strict=True):
        choice = read(each)
        assert torch.equal(selected(choice.expert_ids), each.truth())
        check.verify(choice)
        if each.call is None:
            assert check.left_out(choice) is None
        elif not each.site.layer.dense:
            assert check.expert_rows.left_out_of_call(*each.call, choice) is None


@pytest.mark.skipif(not V5, reason="transformers 4 runs what its router says")
def test_nllb_of_transformers_5_is_refused():
    # It takes the mask of zeros and ones for indices: experts 0 and 1 run, whatever is chosen.
    watched, checks = watch("nllb_moe", zoo.build("nllb_moe"))
    for each, check in zip(watched, checks, strict=True):
        assert each.truth()[:, 2:].sum() == 0
        with pytest.raises(ValueError, match="format unexpected: model.*ffn.router.*otherwise"):
            check.verify(read(each))


# Models whose router does not say its logits.
SILENT = ("nllb_moe",) if V5 else ("deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss", "nllb_moe")


@pytest.mark.parametrize("name", [n for n in zoo.HERE if n not in ("gemma4", *SILENT)])
def test_logits_are_those_of_the_routers_matrix(name):
    for each in watch(name, zoo.build(name))[0]:
        choice, tokens = read(each), len(each.hidden)
        logits = choice.logits
        if each.site.chooses == "experts":
            logits = read_logits(each.output, tokens, each.site.layer)
        (weight,) = [p for p in each.site.router.parameters() if p.shape == (E, zoo.H)]
        bias = getattr(each.site.router, "bias", None)
        expected = F.linear(each.hidden.float(), weight.float(), bias)
        assert torch.allclose(logits.softmax(-1), expected.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in SILENT if n in READABLE])
def test_logits_that_a_router_does_not_say_are_not_made_up(name):
    for each in watch(name, zoo.build(name))[0]:
        assert read(each).logits is None


@pytest.mark.parametrize("name", [n for n in READABLE if n != "llama4"])
def test_read_weights_are_those_that_stacked_experts_got(name):
    for each in watch(name, zoo.build(name))[0]:
        if each.call is None or len(each.call[0]) == 2:
            continue
        choice = read(each)
        given = [v for v in (*each.call[0], *each.call[1].values())][1:]
        assert any(
            torch.equal(
                choice.weights,
                v if v.shape == choice.expert_ids.shape else v.gather(1, choice.expert_ids),
            )
            for v in given
            if v.is_floating_point() and len(v) == len(choice.expert_ids)
        )


@pytest.mark.skipif(V5, reason="transformers 5 has the bias in the router")
def test_a_bias_that_the_block_adds_is_refused():
    model = zoo.build("ernie4_5_moe")
    (site,) = find_sites(model)
    site.block.moe_statics.e_score_correction_bias.data[0, 3] = 0.5
    with pytest.raises(ValueError, match="mlp.gate: it returns logits.*e_score_correction_bias"):
        ExpertRows(site).refuse_bias()


# ---- values that user-made routers return ----


def test_rows_with_fewer_scores_than_others_have_empty_slots():
    dense = scatter(logits())
    dense[1] = 0
    dense[2, dense[2].argmax()] = 0
    for output in ((dense, logits()), (logits(), dense)):
        chosen = read_choice(output, T, LAYER).expert_ids
        assert (chosen >= 0).sum(1).tolist() == [K, 0, K - 1, *[K] * (T - 3)]
        assert torch.equal(selected(chosen), dense != 0)


def logits(seed=0, tokens=T):
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed)) * 2


def top(z, k=K):
    weights, experts = z.softmax(-1).topk(k)
    return weights, experts


def scatter(z, k=K):
    weights, experts = top(z, k)
    return torch.zeros_like(z).scatter(1, experts, weights)


def assert_read(output, *, experts, weights=None, logits=None, layer=LAYER):
    choice = read_choice(output, T, layer)
    assert torch.equal(choice.expert_ids, experts)
    for got, expected in ((choice.weights, weights), (choice.logits, logits)):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got, expected)


@pytest.mark.parametrize("container", [tuple, list])
def test_three_values(container):
    z = logits()
    weights, experts = top(z)
    given = {"experts": experts, "weights": weights, "logits": z}
    assert_read(container((z, weights, experts)), **given)
    assert_read(container((z, scatter(z), experts)), **given)
    assert_read(container((weights, experts, z)), **given)
    batched = tuple(v.view(2, 5, -1) for v in (z, weights, experts))
    assert_read(container(batched), **given)
    assert_read(container((z, weights, experts, "router states")[:3]), **given)


def test_skipped_slots_stay():
    z = logits()
    weights, experts = top(z)
    experts[::2, 1] = -1
    assert_read((z, weights, experts), experts=experts, weights=weights, logits=z)
    assert_read((weights, experts.int()), experts=experts.int(), weights=weights)


def test_two_values():
    z = logits()
    weights, experts = top(z)
    for pair in ((weights, experts), (experts, weights)):
        assert_read(pair, experts=experts, weights=weights)
        assert_read(pair, experts=experts, weights=weights, layer=WITHOUT_K)
    for pair in ((scatter(z), experts), (experts, scatter(z))):
        assert_read(pair, experts=experts, weights=weights)
    assert_read((z, experts), experts=experts, logits=z)
    assert_read(
        (z.softmax(-1), experts), experts=experts, weights=weights, logits=z.log_softmax(-1)
    )


def test_another_k_than_the_layers_is_taken_as_it_comes():
    z = logits()
    weights, experts = top(z, 5)
    assert_read((z, weights, experts), experts=experts, weights=weights, logits=z)
    assert_read((scatter(z, 5), experts), experts=experts, weights=weights)
    weights, experts = top(z, E)  # all of them: no mask
    layer = Layer("m.gate", "m", E, E, 16, 0, 0, 0, 0, 0, 0)
    assert_read((weights, experts), experts=experts, weights=weights, layer=layer)
    assert_read((weights, experts), experts=experts, weights=weights)


def test_scores_beside_logits():
    z = logits()
    scores = scatter(z).where(scatter(z) == 0, torch.sigmoid(z))
    experts = top(z)[1]
    for pair in ((scores, z), (z, scores)):
        choice = read_choice(pair, T, LAYER)
        assert torch.equal(selected(choice.expert_ids), selected(experts))
        assert torch.equal(choice.weights, torch.sigmoid(z).gather(1, choice.expert_ids))
        assert choice.logits is z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_alone(dtype):
    z = logits().to(dtype)
    weights, experts = z.softmax(-1, dtype=torch.float32).topk(K)
    assert_read(z, experts=experts, weights=weights, logits=z)
    assert_read(z.view(2, 5, E), experts=experts, weights=weights, logits=z)
    assert_read((z,), experts=experts, weights=weights, logits=z)
    positive = z.abs() + 1  # no probabilities: their sum is another
    weights, experts = positive.softmax(-1, dtype=torch.float32).topk(K)
    assert_read(positive, experts=experts, weights=weights, logits=positive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_in_place_of_logits(dtype):
    p = logits().softmax(-1).to(dtype)
    weights, experts = p.topk(K)
    log = p.float().log()
    assert_read(p, experts=experts, weights=weights, logits=log)
    assert_read((p, weights, experts), experts=experts, weights=weights, logits=log)
    choice = read_choice((p, weights, experts), T, LAYER)
    normalised = p.float() / p.float().sum(-1, keepdim=True)
    assert torch.allclose(choice.logits.softmax(-1), normalised, atol=1e-6)


def test_probabilities_of_zero_stay_finite():
    p = scatter(logits())
    p /= p.sum(-1, keepdim=True)
    choice = read_choice(p, T, LAYER)
    assert choice.logits.isfinite().all()
    assert torch.allclose(choice.logits.softmax(-1), p, atol=1e-6)


def test_a_mask_over_all_experts():
    z = logits()
    weights, experts = top(z, 1)
    mask = selected(experts)
    full = torch.arange(T) % 3 == 0  # these tokens are over the expert's capacity
    mask[full] = False
    experts = experts.masked_fill(full[:, None], -1)
    for given in (mask.long(), mask):
        assert_read(
            (given, weights, z), experts=experts, weights=weights, logits=z, layer=WITHOUT_K
        )
    scores = scatter(z, 2)
    choice = read_choice((mask.long(), scores), T, WITHOUT_K)
    assert torch.equal(selected(choice.expert_ids), scores > 0)


@pytest.mark.parametrize(
    "output",
    [
        None,
        "logits",
        {"logits": logits()},
        (),
        (logits(), None, None),  # the gate of a patched block
        logits().long(),
        logits()[:-1],
        logits()[:, :-1],
        logits()[0],
        logits().softmax(-1).topk(K)[1],  # indices alone
        (logits(), logits(1)),  # neither is zero anywhere
        (top(logits())[0][:, :2], top(logits())[1]),
        (top(logits())[0], top(logits())[1] > 1),
        (top(logits())[1], top(logits())[1]),
        (logits(), *top(logits())[::-1], logits(), logits()),
        (logits()[:, :-1], *top(logits())),
        (top(logits())[0], torch.zeros(T, E + 1, dtype=torch.long)),
    ],
    ids=range(17),
)
def test_what_can_not_be_read(output):
    with pytest.raises(ValueError, match=UNEXPECTED):
        read_choice(output, T, LAYER)


def test_logits_need_a_k():
    with pytest.raises(ValueError, match=f"{UNEXPECTED}.*whose k neither"):
        read_choice(logits(), T, WITHOUT_K)


def test_no_tokens():
    z = logits(tokens=0)
    weights, experts = z.softmax(-1).topk(K)
    for output in (z, (z, weights, experts), (weights, experts), (scatter(z), experts)):
        assert read_choice(output, 0, LAYER).expert_ids.shape == (0, K)


# ---- the call of the experts ----


def test_the_experts_call():
    hidden, (weights, experts) = torch.randn(T, 16), top(logits())
    for args, kwargs in [
        ((hidden, experts, weights), {}),
        ((hidden, weights, experts), {}),
        ((hidden,), {"top_k_weights": weights, "top_k_index": experts}),
        ((hidden.view(2, 5, 16), experts.view(2, 5, K), weights.view(2, 5, K)), {}),
        ((hidden, scatter(logits()), experts), {}),
    ]:
        choice = read_experts_call(args, kwargs, T, LAYER)
        assert torch.equal(choice.expert_ids, experts)
        assert torch.equal(choice.weights, weights)
        assert choice.logits is None


def test_an_experts_call_that_tells_nothing():
    hidden = torch.randn(T, 16)
    for args in [(hidden,), (hidden, torch.ones(E).long()), (hidden, logits())]:
        with pytest.raises(ValueError, match=f"{UNEXPECTED}.*call of the experts"):
            read_experts_call(args, {}, T, LAYER)


# ---- the check of the choice ----


class ListBlock(nn.Module):
    """A user's block, with a gate that returns logits: `choose` takes the experts from them."""

    def __init__(self, choose):
        super().__init__()
        self.top_k, self.choose = K, choose
        self.gate = nn.Linear(16, E)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(E))

    def forward(self, x):
        z = self.gate(x)
        experts = self.choose(z)
        out = torch.zeros_like(x)
        for e in range(E):
            rows = (experts == e).any(-1)
            out[rows] += self.experts[e](x[rows])
        return out


def run_checked(choose):
    block = ListBlock(choose)
    (site,) = find_sites(block)
    check = Checked(site)
    x = torch.randn(T, 16)
    with torch.no_grad():
        block(x)
        return check, read_choice(block.gate(x), T, site.layer)


def test_check_of_a_block_that_takes_the_largest():
    check, choice = run_checked(lambda z: z.topk(K)[1])
    check.verify(choice)
    assert check.left_out(choice) is None


def test_check_of_a_block_that_chooses_otherwise():
    check, choice = run_checked(lambda z: (-z).topk(K)[1])
    with pytest.raises(ValueError, match="format unexpected: gate: read as .* tokens for expert"):
        check.verify(choice)


def test_a_bias_of_a_users_block_is_refused_unless_it_is_zero():
    block = ListBlock(lambda z: (z + block.score_bias).topk(K)[1])
    block.register_buffer("score_bias", torch.zeros(E))
    (site,) = find_sites(block)
    ExpertRows(site).refuse_bias()
    block.score_bias[1] = 1
    with pytest.raises(ValueError, match="gate: it returns logits, to which its block adds score"):
        ExpertRows(site).refuse_bias()


def test_middleware_around_the_stock_gate():
    model = zoo.build("olmoe")
    for layer in model.model.layers:
        layer.mlp.gate = Middleware(layer.mlp.gate, lambda z: (z, *top(z)) if V5 else z)
    watched, checks = watch("olmoe", model)
    for each, check in zip(watched, checks, strict=True):
        choice = read(each)
        assert torch.equal(selected(choice.expert_ids), each.truth())
        check.verify(choice)
