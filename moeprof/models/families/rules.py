"""How a family's own router chooses and weighs experts: read from a gate, and checked on it.

A record says which attributes hold it, and `RuleReader` what they say now. That the gate really
does so is not taken on trust: `differs` runs it.
"""

from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends.c import C
from ...backends.spec import AFFINITIES, Rule, topk_spec
from ...backends.tables import as_array
from ..reading import as_logits

ROWS = 32  # that a gate is checked on


@dataclass(frozen=True)
class GateRule:
    """What of `moeprof.backends.spec.Rule` is fixed for a family, and the names of the rest.

    A text where a number could stand is an attribute of the gate, "config.top_k" one of what the
    gate holds, "block.bias" one of the block around it, and "a|b" the first of two that is there;
    "1/top_k" is the inverse of such a number.

    top_k, renormalises : how many experts; whether their weights are scaled to sum 1
    groups : attributes of `groups` and `top_groups`; groups_if : (attribute, value), else there
        are none
    jitter : of the affinity sparsemixer
    logits : "plain" is the product with `weight`, plus `bias` if the gate has one; "float32" the
        same in float32; "" what the gate itself returns
    takes : what the block gives the gate besides the hidden states
    """

    affinity: str = "softmax"
    top_k: int | str = "top_k"
    renormalises: bool | str = True
    bias: str = ""
    on_logits: bool = False
    groups: tuple[str, str] | None = None
    groups_if: tuple[str, Any] | None = None
    best: int = 2
    zeroed: bool = False
    epsilon: float = 0.0
    floor: float | str = 0.0
    scale: float | str = 1.0
    expert_scale: str = ""
    rounds: bool = True
    jitter: float | str = 0.0
    logits: str = "plain"
    weight: str = "weight"
    takes: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The rule in words."""
        parts = ["softmax" if self.affinity == "softmax" else self.affinity.replace("_", " ")]
        parts += ["plus a bias"] * bool(self.bias) + ["in groups"] * bool(self.groups)
        return " ".join(parts) + ", top-k"


class Settings(NamedTuple):
    """What a model's own router is set to now. Two are equal if nothing has changed."""

    top_k: int
    renormalises: bool
    others: tuple[Any, ...]  # for tensors: their bytes


class RuleReader:
    """Reads the rule of gates of one family."""

    def __init__(self, record: GateRule):
        self.record = record
        numbers = (record.floor, record.scale, record.jitter)
        named = (*numbers, record.bias, record.expert_scale, record.affinity)
        paths = [p for p in named if isinstance(p, str) and p and p not in AFFINITIES]
        self._others = [*(p.removeprefix("1/") for p in paths), *(record.groups or ())]
        if record.groups_if:
            self._others.append(record.groups_if[0])

    def settings(self, block: nn.Module, gate: nn.Module) -> Settings:
        record = self.record
        scaled = record.renormalises
        return Settings(
            self._top_k(block, gate),
            bool(getattr(gate, scaled)) if isinstance(scaled, str) else scaled,
            tuple([_mark(self._at(gate, block, path)) for path in self._others]),
        )

    def _top_k(self, block: nn.Module, gate: nn.Module) -> int:
        top_k = self.record.top_k
        if isinstance(top_k, int):
            return top_k
        found: int = getattr(gate, top_k) if "." not in top_k else self._at(gate, block, top_k)
        return found

    def rule(self, block: nn.Module, gate: nn.Module) -> Rule:
        record = self.record

        def number(value: float | str) -> float:
            if not isinstance(value, str):
                return value
            found = float(self._at(gate, block, value.removeprefix("1/")))
            return 1 / found if value.startswith("1/") else found

        groups, top_groups = 1, 1
        if record.groups and self._has_groups(block, gate):
            groups, top_groups = (int(self._at(gate, block, p) or 1) for p in record.groups)
        rule = Rule(
            affinity=self._affinity(block, gate),
            bias=_array(self._at(gate, block, record.bias)) if record.bias else None,
            on_logits=record.on_logits,
            groups=groups,
            top_groups=top_groups,
            best=record.best if groups > 1 else 1,
            epsilon=record.epsilon,
            floor=number(record.floor),
            scale=number(record.scale),
            expert_scale=_array(self._at(gate, block, record.expert_scale))
            if record.expert_scale
            else None,
            rounds=record.rounds,
            jitter=number(record.jitter),
        )
        return rule._replace(zeroed=record.zeroed and is_zeroed(rule))

    def extras(self, block: nn.Module, gate: nn.Module) -> list[Any]:
        """What the block gives the gate besides the hidden states."""
        return [self._at(gate, block, path) for path in self.record.takes]

    def logits(self, gate: nn.Module, x: Tensor) -> Tensor:
        """(T, E) of x (T, H), as the gate computes them; where the record says how."""
        weight = reduce(getattr, self.record.weight.split("."), gate)
        bias = getattr(gate, "bias", None)
        assert isinstance(weight, Tensor)
        if self.record.logits == "float32":
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        return F.linear(x, weight, bias)

    def _has_groups(self, block: nn.Module, gate: nn.Module) -> bool:
        condition = self.record.groups_if
        return condition is None or self._at(gate, block, condition[0]) == condition[1]

    def _affinity(self, block: nn.Module, gate: nn.Module) -> str:
        name = self.record.affinity
        if name in AFFINITIES:
            return name
        found = self._at(gate, block, name)  # a word, or a function of torch or transformers
        if isinstance(found, str):
            return found
        name = getattr(found, "__name__", type(found).__name__).lower()
        return "sqrt_softplus" if "sqrtsoftplus" in name.replace("_", "") else name

    @staticmethod
    def _at(gate: nn.Module, block: nn.Module, path: str) -> Any:
        first, _, rest = path.partition(".")
        start: Any = block if first == "block" else gate
        names = (rest if first == "block" else path).split(".")
        for alternatives in names:
            found = (getattr(start, name, None) for name in alternatives.split("|"))
            start = next((value for value in found if value is not None), None)
        return start


def is_zeroed(rule: Rule) -> bool:
    """Can 0, by which experts of other groups are chosen, be above the score of a better one? Only
    a negative bias leaves a score below it; else those experts come last, as if they weren't
    there."""
    return rule.groups > 1 and rule.bias is not None and bool(rule.bias.min() < 0)


def _mark(value: Any) -> Any:
    """Of a tensor, what changes when it does; anything else itself."""
    if not isinstance(value, Tensor):
        return value
    if torch.compiler.is_compiling() or value.is_meta:  # those have no values
        return value.data_ptr(), 0 if value.is_inference() else value._version
    return as_array(value.cpu()).tobytes()  # not its version: `.data` and NumPy write past that


def _array(values: Tensor | None) -> Any:
    if values is None:
        return None
    return values.detach().reshape(-1).to(torch.float32).cpu().numpy().copy()


# ---- does a gate do what its record says? ----


class Checked(NamedTuple):
    """What is known of a gate: its rule, and whether its logits can be had without its choice."""

    rule: Rule | None
    own_logits: bool
    reason: str  # why the rule isn't known


def check_gate(
    reader: RuleReader, block: nn.Module, gate: nn.Module, dtype: torch.dtype, rule: Rule
) -> Checked:
    """Run the gate, as its class has it, on random hidden states, and compare.

    Ties may fall either way: the chosen experts must be as good as those of the rule, and where
    they are the same their weights must agree.
    """
    try:
        settings = reader.settings(block, gate)
        x = _hidden(gate, dtype)
        with torch.no_grad():
            said = _said(gate, x, reader.extras(block, gate))
            *first, weights, ids = (part.reshape(ROWS, -1) for part in said[:3])
            if weights.dtype == torch.int64:  # as transformers 4 has them
                weights, ids = ids, weights
            mine = reader.logits(gate, x) if reader.record.logits else first[0]
            logits = first[0] if first else mine
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError) as e:
        error = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
        return Checked(None, False, f"its router can't be read ({error})")
    own = bool(reader.record.logits) and mine.shape == logits.shape
    own = own and torch.allclose(mine.float(), logits.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
    if not bool(logits.isfinite().all()):  # no rule can be seen, and each call will say so
        return Checked(rule, own, "")
    if found := _difference(rule, settings, as_logits(logits), weights, ids, dtype):
        return Checked(None, own, found)
    return Checked(rule, own, "")


def _said(gate: nn.Module, x: Tensor, extras: list[Any]) -> Any:
    """What the gate returns of x (T, H), or of (1, T, H) where it wants that."""
    try:
        return type(gate).forward(gate, x, *extras)
    except ValueError:
        return type(gate).forward(gate, x[None], *extras)


def _hidden(gate: nn.Module, dtype: torch.dtype) -> Tensor:
    """(ROWS, H), the same in every call."""
    matrices = [p for p in gate.parameters() if p.dim() == 2]
    width = matrices[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, width, generator=generator).to(dtype)


def _difference(
    rule: Rule, settings: Settings, logits: Tensor, weights: Tensor, ids: Tensor, dtype: torch.dtype
) -> str:
    """What a gate did otherwise than its rule, or nothing."""
    top_k, num_experts = settings.top_k, logits.shape[1]
    if ids.shape[1] != top_k:
        return f"its router took {ids.shape[1]} experts, and {top_k} is what it is set to"
    spec = topk_spec(rule, num_experts, top_k, "sum" if settings.renormalises else "none")
    given = (logits if logits.dtype == dtype else logits.float()).contiguous()
    try:
        mine, mine_ids, *_ = C.route(given, spec, dtype)
        choice = C.choice_logits(given, spec, dtype)
    except ValueError as error:
        return f"its router can't be run by its rule: {error}"
    mine_ids = mine_ids.long()
    eps = 8 * torch.finfo(dtype).eps  # some routers compute in the dtype of the hidden states
    theirs, own = (choice.gather(1, chosen).sort(1).values for chosen in (ids, mine_ids))
    if not torch.allclose(theirs, own, rtol=eps, atol=eps):
        return "its router chose other experts than its rule"
    order, mine_order = ids.argsort(1), mine_ids.argsort(1)
    same = (ids.gather(1, order) == mine_ids.gather(1, mine_order)).all(1)
    theirs, own = weights.gather(1, order)[same].float(), mine.gather(1, mine_order)[same]
    if not len(theirs) and rule.bias is None and rule.expert_scale is None:
        # All logits tie, as those of a gate of zeros: then the weights of all are alike.
        theirs, own = weights.float().sort(1).values, mine.sort(1).values
    if not torch.allclose(theirs, own, rtol=eps, atol=1e-6):
        return "its router weighed experts otherwise than its rule"
    return ""
