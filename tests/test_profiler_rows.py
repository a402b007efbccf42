"""Rows that experts ran beside those that were selected; layers that share modules; broken ones."""

import pytest
import torch
from listed import Block, E, H, K, hidden, lora, needs, profiled, rows_by_expert
from models import V5, blocks, olmoe, token_ids
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from wording import says

import moeprof
from moeprof.profile.result import Profile


def said(profile):
    return " ".join(profile.summary().split())


# ---- capacities ----


class Rerouting(Block):
    """What an expert has no place for runs in the first one instead."""

    def forward(self, x):
        rows = x.reshape(-1, H)
        chosen = self.router(rows).softmax(-1).topk(K)[1]
        out, over = torch.zeros_like(rows), []
        for number, expert in enumerate(self.experts):
            token = (chosen == number).any(-1).nonzero().squeeze(-1)
            token, rest = token.split(
                [n := min(len(token), self.capacity(len(rows))), len(token) - n]
            )
            out.index_add_(0, token, expert(rows[token]))
            over.append(rest)
        over = torch.cat(over)
        return out.index_add_(0, over, self.experts[0](rows[over])).view_as(x)


class Filled(Block):
    """Every expert gets `capacity` rows, those that no token takes are zero."""

    def forward(self, x):
        rows = x.reshape(-1, H)
        chosen = self.router(rows).softmax(-1).topk(K)[1]
        out, size = torch.zeros_like(rows), self.capacity(len(rows))
        for number, expert in enumerate(self.experts):
            token = (chosen == number).any(-1).nonzero().squeeze(-1)[:size]
            buffer = rows.new_zeros(size, H)
            buffer[: len(token)] = rows[token]
            out.index_add_(0, token, expert(buffer)[: len(token)])
        return out.view_as(x)


def share(tokens):
    return tokens * K // E


@pytest.mark.parametrize("lengths", [(4, 64), (4, 64, 64), (4, 4)])
@pytest.mark.parametrize("alike", [True, False])
def test_what_another_expert_takes_over_is_counted_where_it_ran(lengths, alike):
    torch.manual_seed(0)
    widths = iter([H] * E if alike else range(4, 4 + E))
    make = lambda: nn.Sequential(nn.Linear(H, w := next(widths)), nn.Linear(w, H))  # noqa: E731
    model = nn.Sequential(Rerouting(make, capacity=lambda tokens: 10))
    calls = [hidden(n) for n in lengths]
    rows = rows_by_expert(model, *calls)["0"]
    profile = profiled(model, *calls).result()
    (own,) = profile.each()
    moved = sum(max(n - s, 0) for n, s in zip(rows, own.expert_selections, strict=True))
    assert bool(moved) == (64 in lengths) and sum(rows) == sum(own.expert_selections)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for call in calls:
            model(call)
    assert own.flops_total == counter.get_total_flops()
    note = f"don't agree by expert in layer 0: {moved} selections did not run in their own expert"
    assert (note in said(profile)) == bool(moved)


@pytest.mark.parametrize("lengths", [(64, 64), (1, 64, 64)])
def test_what_another_expert_takes_over_in_the_first_step_is_refused(lengths):
    torch.manual_seed(0)
    model = nn.Sequential(Rerouting(capacity=share))
    with pytest.raises(ValueError, match="the block chooses otherwise than its router's output"):
        profiled(model, *map(hidden, lengths))


@pytest.mark.parametrize(
    "lengths, capacity",
    [((64, 64), share), ((1, 64, 64), share), ((4, 64), lambda tokens: 10), ((64, 1), lambda n: n)],
)
def test_experts_that_are_filled_up_count_what_they_ran(lengths, capacity, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Filled(capacity=capacity))
    calls = [hidden(n) for n in lengths]
    rows = rows_by_expert(model, *calls)["0"]
    profile = profiled(model, *calls).result()
    (own,) = profile.each()
    selected = own.expert_selections
    assert sum(selected) == sum(lengths) * K and own.tokens == sum(lengths)
    assert own.flops_expert == sum(rows) * 2 * H * H
    assert own.dropped_selections == sum(selected) - sum(rows)
    profile.save(tmp_path)
    for text in (said(profile), said(Profile.load(tmp_path))):
        assert ("Experts ran" in text) == (sum(rows) > sum(selected))
        # Some dropped what they had no place for, others were filled up.
        assert ("don't agree by expert in layer 0" in text) == (capacity(64) < 64)


# ---- layers that share modules ----


def test_a_list_of_experts_in_two_blocks_counts_for_the_one_that_runs():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    model[2].experts = model[0].experts
    calls = hidden(9), hidden(5)
    profile = profiled(model, *calls).result()
    for own in profile.each():
        assert own.flops_expert == 14 * K * 2 * H * H and own.dropped_selections == 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for call in calls:
            model(call)
    assert sum(own.flops_total for own in profile.each()) == counter.get_total_flops()


@pytest.mark.skipif(V5, reason="experts in a ModuleList: transformers 4")
def test_layers_of_a_stock_model_that_share_their_experts():
    model = olmoe(num_hidden_layers=3)
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    for own in profiled(model, {"input_ids": token_ids()}).get_metrics().values():
        assert own.tokens == 22 and own.flops_expert == 22 * 2 * 6 * 32 * 16


@pytest.mark.parametrize("patched", [False, True])
def test_a_block_that_is_called_twice_in_a_step_is_named(patched, tmp_path):
    model = olmoe(num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mlp = model.model.layers[1].mlp
    ids = {"input_ids": token_ids()}
    if patched:
        with moeprof.patch(model):
            profile = profiled(model, ids).result()
    else:
        profile = profiled(model, ids).result()
    assert [own.tokens for own in profile.each()] == [22, 44]
    note = "Called up to 2 times in one step: layer 1, one module that stands for several layers"
    profile.save(tmp_path)
    for made in (profile, Profile.load(tmp_path)):
        assert note in said(made) and note in " ".join(made.to_html().split())
    stock = profiled(olmoe(), ids, ids).result()
    assert "Called up to" not in said(stock)


@needs("peft")
@pytest.mark.parametrize("saved", ["mlp", "gate", "q_proj"])
def test_adapters_that_are_switched_while_the_profiler_counts_are_said(saved):
    adapted = lora(olmoe(), target_modules=["k_proj"], modules_to_save=[saved])
    ids, note = {"input_ids": token_ids()}, "Adapters of the model were switched"
    with torch.no_grad(), moeprof.MoEProfiler(adapted) as profiler:
        adapted(**ids)
        assert note not in said(profiler.result())
        with adapted.disable_adapter():
            adapted(**ids)
    assert (note in said(profiler.result())) == (saved != "q_proj")  # of no MoE layer
    profiler.reset()
    assert not profiler.result().facts["notes"]


# ---- numbers that are none ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_router_whose_logits_are_not_finite_is_named(value, tmp_path):
    model = olmoe(num_hidden_layers=3)
    blocks(model)[1].gate.weight.data[2] = value
    profile = profiled(model, {"input_ids": token_ids()}).result()
    # Infinite scores break the hidden states behind them as well.
    note = "Not finite (NaN or infinite): what the router said in layer"
    profile.save(tmp_path)
    for made in (profile, Profile.load(tmp_path)):
        assert note in said(made) and note in " ".join(made.to_html().split())
    assert profile.each()[0].tokens == 22 and "in layers 0 to" not in said(profile)


def test_a_model_of_nan_is_named_layer_by_layer():
    model = olmoe()
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    text = said(profiled(model, {"input_ids": token_ids()}).result())
    assert says(text, "the router said", "layers 0 to 1", "22 tokens")


def test_an_expert_that_is_ruled_out_and_padding_are_no_broken_numbers():
    class Without(nn.Linear):
        def forward(self, x):
            return super().forward(x).index_fill(-1, torch.tensor([3]), -torch.inf)

    torch.manual_seed(0)
    model = nn.Sequential(Block())
    model[0].router = Without(H, E)
    profile = profiled(model, hidden(9)).result()
    assert profile.each()[0].expert_selections[3] == 0 and "Not finite" not in said(profile)


def test_weights_that_are_not_finite_are_named_where_no_logits_are_known():
    class Chooser(nn.Linear):
        def forward(self, x):
            weights, experts = super().forward(x).softmax(-1).topk(K)
            return weights * float("nan"), experts

    model = nn.Sequential(Block())
    model[0].router = Chooser(H, E)
    model[0].forward = lambda x: model[0].router(x.reshape(-1, H))[0].sum() + x
    text = said(profiled(model, hidden(9)).result())
    assert says(text, "the router said", "layer 0", "9 tokens")
