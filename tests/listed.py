"""A small block whose experts lie in a list, for tests of what its experts ran, and adapters.

E experts, K of them a token, H hidden size.
"""

import importlib.util

import pytest
import torch
from torch import nn

import moeprof

H, E, K = 16, 8, 2


class Block(nn.Module):
    """Experts that take at most `capacity` tokens each; None: all that are routed."""

    def __init__(self, make=lambda: nn.Linear(H, H), *, capacity=None, here=range(E)):
        super().__init__()
        self.top_k, self.capacity = K, capacity
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleList(make() if n in here else None for n in range(E))

    def forward(self, x):
        rows = x.reshape(-1, H)
        chosen = self.router(rows).softmax(-1).topk(K)[1]
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token = (chosen == number).any(-1).nonzero().squeeze(-1)
            if self.capacity is not None:
                token = token[: self.capacity(len(rows))]
            if expert is not None and len(token):
                out.index_add_(0, token, expert(rows[token]))
        return out.view_as(x)


def profiled(model, *calls):
    with torch.no_grad(), moeprof.MoEProfiler(model) as profiler:
        for call in calls:
            model(**call) if isinstance(call, dict) else model(call)
    return profiler


def hidden(tokens, seed=0):
    return torch.randn(1, tokens, H, generator=torch.Generator().manual_seed(seed))


def rows_by_expert(model, *calls):
    """{name: rows that each expert of this Block ran}; a shared one's at its first slot."""
    rows, handles = {}, []
    for name, block in model.named_modules():
        if isinstance(block, Block):
            slots = list(block.experts)
            rows[name] = [0] * len(slots)
            for slot, expert in enumerate(slots):
                if expert is None or expert in slots[:slot]:
                    continue

                def count(module, args, ran=rows[name], slot=slot):
                    ran[slot] += len(args[0])

                handles.append(expert.register_forward_pre_hook(count))
    with torch.no_grad():
        for call in calls:
            model(call)
    for handle in handles:
        handle.remove()
    return rows


def needs(package):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed"
    )


def lora(model, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **options)).eval()
