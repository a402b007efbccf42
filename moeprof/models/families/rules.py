"""How a family's own router chooses and weighs experts: read from a gate, and checked on it.

A record says which attributes hold it, and `RuleReader` what they say now. That the gate really
does so is not taken on trust: `differs` runs it.
"""

from dataclasses import dataclass
from functools import reduce
from inspect import Parameter, signature
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...backends.c import C
from ...backends.spec import AFFINITIES, Rule, topk_spec
from ...backends.tables import DTYPES, as_array
from ..reading import as_logits, by_expert

ROWS = 32  # that a gate is checked on


@dataclass(frozen=True)
class GateRule:
    """What of `moeprof.backends.spec.Rule` is fixed for a family, and the names of the rest.

    A text where a number could stand is an attribute of the gate, "config.top_k" one of what the
    gate holds, "block.bias" one of the block around it, and "a|b" the first of two that is there;
    "1/top_k" is the inverse of such a number.

    own : what its rule does that none here does; then nothing else counts, and the model's own
        router chooses
    top_k, renormalises : how many experts; whether their weights are scaled to sum 1
    bias_if : an attribute that is true while the bias counts; "" where it always does
    groups : attributes of `groups` and `top_groups`; groups_if : (attribute, value), else there
        are none
    jitter : of the affinity sparsemixer
    logits : "plain" is the product with `weight`, plus `bias` if the gate has one; "float32" the
        same in float32; "" what the gate itself returns
    takes : what the block gives the gate besides the hidden states
    """

    own: str = ""
    affinity: str = "softmax"
    top_k: int | str = "top_k"
    renormalises: bool | str = True
    bias: str = ""
    bias_if: str = ""
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
    others: tuple[Any, ...]
    tensors: tuple[Any, ...] = ()  # their bytes; None where they have none


class RuleReader:
    """Reads the rule of gates of one family."""

    def __init__(self, record: GateRule):
        self.record = record
        named = (record.floor, record.scale, record.jitter, record.affinity)
        paths = [p.removeprefix("1/") for p in named if isinstance(p, str) and p not in AFFINITIES]
        self._others = [*paths, *(record.groups or ())]
        if record.groups_if:
            self._others.append(record.groups_if[0])
        if record.bias_if:
            self._others.append(record.bias_if)

    def settings(self, block: nn.Module, gate: nn.Module) -> Settings:
        record = self.record
        scaled = record.renormalises
        return Settings(
            self._top_k(block, gate),
            bool(getattr(gate, scaled)) if isinstance(scaled, str) else scaled,
            *self.others(block, gate),
        )

    def others(self, block: nn.Module, gate: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The last two of `Settings`."""
        paths = [*self._others, *self._tensors(block, gate)]
        values = [self._at(gate, block, path) for path in paths if path]
        tensors = [_mark(value) for value in values if isinstance(value, Tensor)]
        return tuple([v for v in values if not isinstance(v, Tensor)]), tuple(tensors)

    def lacks(self, block: nn.Module, gate: nn.Module) -> bool:
        """Does the gate, or the block, lack a tensor that the rule names?"""
        return any(self._at(gate, block, p) is None for p in self._tensors(block, gate) if p)

    def _tensors(self, block: nn.Module, gate: nn.Module) -> tuple[str, str]:
        """Where the bias and the experts' scales are, "" where they don't count."""
        record = self.record
        counts = not record.bias_if or self._at(gate, block, record.bias_if)
        return (record.bias if counts else ""), record.expert_scale

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

        def array(path: str) -> Any:
            return _array(self._at(gate, block, path)) if path else None

        bias, expert_scale = self._tensors(block, gate)
        groups, top_groups = 1, 1
        if record.groups and self._has_groups(block, gate):
            groups, top_groups = (int(self._at(gate, block, p) or 1) for p in record.groups)
        rule = Rule(
            affinity=self._affinity(block, gate),
            bias=array(bias),
            on_logits=record.on_logits,
            groups=groups,
            top_groups=top_groups,
            best=record.best if groups > 1 else 1,
            epsilon=record.epsilon,
            floor=number(record.floor),
            scale=number(record.scale),
            expert_scale=array(expert_scale),
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


def _mark(value: Tensor) -> bytes | None:
    """What changes when the values of a tensor do; None where it has none."""
    if torch.compiler.is_compiling() or value.is_meta:
        return None
    return as_array(value.cpu()).tobytes()  # not its version: `.data` and NumPy write past that


def _array(values: Tensor | None) -> Any:
    if values is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("its bias isn't read yet: call the model once before you compile it")
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
    they are the same their weights must agree. What was found is kept as long as nothing of the
    gate changes, since a study patches often.
    """
    if wanted := _wanted(gate, reader.record.takes):
        return Checked(None, False, f"its router chooses by {', '.join(wanted)}, not by its logits")
    try:
        settings = reader.settings(block, gate)
    except (TypeError, ValueError, AttributeError) as error:
        return _unread(error)
    state = (reader.record, settings, dtype, *_state(gate))
    kept = _kept.get(gate)
    if kept is None or kept[0] != state:
        kept = _kept[gate] = state, _run_gate(reader, block, gate, dtype, rule, settings)
    return kept[1]


_kept: WeakKeyDictionary[nn.Module, tuple[Any, Checked]] = WeakKeyDictionary()


def _state(gate: nn.Module) -> tuple[Any, ...]:
    """What a gate's forward may depend on."""
    tensors = [*gate.parameters(), *gate.buffers()]
    return (
        [(type(m), type(m).forward) for m in gate.modules()],
        [{n: v for n, v in vars(m).items() if type(v) in _PLAIN} for m in gate.modules()],
        [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors],
    )


_PLAIN = (bool, int, float, str, type(None))


def _unread(error: Exception) -> Checked:
    message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return Checked(None, False, f"its router can't be read ({message})")


def _run_gate(
    reader: RuleReader,
    block: nn.Module,
    gate: nn.Module,
    dtype: torch.dtype,
    rule: Rule,
    settings: Settings,
) -> Checked:
    try:
        x = _hidden(gate, dtype)
        with torch.no_grad():
            said = _said(gate, x, reader.extras(block, gate))
            if not (len(said) == 2 or is_choice(said)):
                return Checked(None, False, OTHER_FORM)
            *first, weights, ids = (part.reshape(ROWS, -1) for part in said[:3])
            if weights.dtype == torch.int64:  # as transformers 4 has them
                weights, ids = ids, weights
            if weights.shape != ids.shape:  # scores of all experts
                weights = weights.gather(1, ids)
            mine = reader.logits(gate, x) if reader.record.logits else first[0]
            logits = first[0] if first else mine
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, AssertionError) as e:
        return _unread(e)
    own = bool(reader.record.logits) and mine.shape == logits.shape
    own = own and torch.allclose(mine.float(), logits.float(), rtol=1e-5, atol=1e-6, equal_nan=True)
    if not bool(logits.isfinite().all()):  # no rule can be seen, and each call will say so
        return Checked(rule, own, "")
    if found := _difference(rule, settings, as_logits(logits), weights, ids, dtype):
        return Checked(None, own, found)
    return Checked(rule, own, "")


def _wanted(gate: nn.Module, given: tuple[str, ...]) -> list[str]:
    """What the gate's forward can't do without, besides the hidden states and what is given."""
    parameters = [*signature(type(gate).forward).parameters.values()][2 + len(given) :]
    return [p.name for p in parameters if p.default is p.empty and p.kind not in _VARIABLE]


_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _said(gate: nn.Module, x: Tensor, extras: list[Any]) -> Any:
    """What the gate returns of x (T, H), or of (1, T, H) where it wants that."""
    try:
        said = type(gate).forward(gate, x, *extras)
    except ValueError:
        return type(gate).forward(gate, x[None], *extras)
    if len(said) == 5 and (read := by_expert(said, len(x), said[-1].shape[-1])):
        return read.logits, read.weights, read.chosen
    return said


OTHER_FORM = "its router does not return (logits, weights, experts)"


def is_choice(said: Any) -> bool:
    """Has a gate returned (logits, weights, expert ids), and perhaps more after them? Up to
    transformers 5.20 some return them in another order, or logits alone and the block chooses."""
    return (
        isinstance(said, tuple)
        and len(said) >= 3
        and [part.is_floating_point() for part in said[:3]] == [True, True, False]
    )


def _hidden(gate: nn.Module, dtype: torch.dtype) -> Tensor:
    """(ROWS, H), the same in every call."""
    matrices = [p for p in gate.parameters() if p.dim() == 2]
    width = matrices[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, width, generator=generator).to(matrices[0].device, dtype)


def _difference(
    rule: Rule, settings: Settings, logits: Tensor, weights: Tensor, ids: Tensor, dtype: torch.dtype
) -> str:
    """What a gate did otherwise than its rule, or nothing."""
    top_k, num_experts = settings.top_k, logits.shape[1]
    dtype = dtype if dtype in DTYPES else torch.float32  # C has no other
    if ids.shape[1] != top_k:
        return f"its router took {ids.shape[1]} experts, and {top_k} is what it is set to"
    spec = topk_spec(rule, num_experts, top_k, "sum" if settings.renormalises else "none")
    logits, weights, ids = logits.cpu(), weights.cpu(), ids.cpu()
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
