"""The MoE blocks of a model that `moeprof.patch` knows, each with its family."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.c import C
from ..backends.spec import PLAIN, Rule, topk_spec
from ..backends.tables import backend_of, tensor_obstacle
from .families import FAMILIES, family_of, stock_parent
from .families.base import Layout
from .families.packed import read_packed
from .families.rules import Checked
from .find import dense, find_sites
from .guards import explained, full_name
from .reading import as_logits

# How a patched block runs: in one call to C; by its own forward, with moeprof's router and
# experts; the same, but its own router chooses, since its rule isn't known. Or it isn't patched.
FUSED, SEAM, EXPERTS_ONLY, OWN = "fused", "seam", "experts only", "the model's own"


class Block(NamedTuple):
    """A block of a known family."""

    name: str  # "model.layers.0.mlp"; "" where the model itself is the block
    module: nn.Module
    family: Layout

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return self.name or type(self.module).__name__

    @property
    def gate_name(self) -> str:
        """The qualified name of its gate."""
        return f"{self.name}.{self.family.family.gate_at}".lstrip(".")

    @property
    def num_experts(self) -> int:
        """E of this layer."""
        return self.family.num_experts(self.module)

    @property
    def top_k(self) -> int:
        """How many experts its own router takes, as it is set now."""
        return self.family.settings(self.module).top_k

    def readable(self, backend: str | None = None) -> str | None:
        """Why it can't run now, and what of that the user can change; or None."""
        reason = self.family.readable(self.module, backend)[1]
        return explained(reason, self.module) if reason else None

    def check(self) -> Checked:
        """What is known of its own router."""
        if own := self.family.family.rule.own:
            return Checked(None, False, f"its router has a rule of its own: {own}")
        if not self.family.has_stock_gate(self.module):  # a user's, which may choose or not
            return self._of_users_gate()
        dtype = self.family.dtype_of(self.module)
        return self.family.check(self.module, dtype)

    def _of_users_gate(self) -> Checked:
        """A gate that a user put in has the rule of the family where it has what that names."""
        gate = self.family.gate_of(self.module)
        lacks = f"its router {type(gate).__name__} lacks what the family's rule names"
        try:
            rule, settings = self.rule(), self.family.settings(self.module)
            topk_spec(rule, self.num_experts, settings.top_k).in_c("float32")
        except (TypeError, ValueError, AttributeError):
            return Checked(None, False, lacks)
        if self.family.reader.lacks(self.module, gate):
            return Checked(None, False, lacks)
        return Checked(rule, False, "")

    def rule(self) -> Rule:
        """What its own router makes of its logits, as it is set now."""
        return self.family.rule(self.module)

    def gate_logits(self, output: Any, hidden: Tensor) -> Tensor | None:
        """(T, E) of what its gate returned for hidden states; None where that says none.

        A stock router of transformers 4 may return its choice alone.
        """
        gate = self.family.gate_of(self.module)
        x = hidden.reshape(-1, hidden.shape[-1])
        if not self.family.has_stock_gate(self.module):
            return self.family.read(output, len(x), self.num_experts, self.gate_name).logits
        chosen = isinstance(output, tuple) and len(output) == 2  # the scores of the chosen, as said
        first = output[0] if isinstance(output, tuple) else output
        if not chosen and first.is_floating_point() and first.shape[-1] == self.num_experts:
            return as_logits(first.reshape(-1, self.num_experts))
        return self.family.reader.logits(gate, x) if self.family.family.rule.logits else None

    def choice_logits(self, logits: Tensor) -> Tensor:
        """(T, E) float32 on the CPU: what a router sees in place of the gate's logits, by which
        the model chooses; the same for a softmax without bias. Groups are left: see
        `choice_rule`."""
        rule = self.rule()
        if not rule.zeroed:
            rule = rule._replace(groups=1, top_groups=1, best=1)
        if rule.affinity == "softmax" and rule.bias is None and not rule.zeroed:
            return logits.float().cpu()
        spec = topk_spec(rule, self.num_experts)
        return C.choice_logits(logits.float().cpu(), spec, torch.float32)

    def choice_rule(self) -> Rule:
        """What is left of its rule where choice logits stand for its logits: the groups. Their
        softmax orders the sums of a group's best as the model's own scores do."""
        rule = self.rule()
        if rule.zeroed:  # choice logits know its groups
            return PLAIN
        return Rule(groups=rule.groups, top_groups=rule.top_groups, best=rule.best)

    def path(self, checked: Checked) -> str:
        """How it runs when it is patched; checked: what `check` said."""
        if checked.rule is None:
            return EXPERTS_ONLY if self.family.has_seam else OWN
        users = not self.family.has_stock_gate(self.module)
        one_call = self.family.is_fused(self.module) and (checked.own_logits or users)
        return FUSED if one_call else SEAM


def find_blocks(model: nn.Module) -> list[Block]:
    """The MoE blocks of known families, in the order of the layers.

    Raises
    ------
    ValueError
        "No routers found ...", with what was looked for and what was found.
    """
    modules = ((name, m, family_of(m)) for name, m in model.named_modules())
    blocks = [Block(name, m, family) for name, m, family in modules if family is not None]
    if blocks:
        return blocks
    raise ValueError(_no_routers(model))


def no_record(block: nn.Module) -> str:
    """Why a block is of no known family."""
    if parent := stock_parent(block):
        return (
            f"{full_name(block)} is made from {parent.__name__}, and may do other things: "
            "moeprof.patch runs blocks of transformers' own classes"
        )
    return f"moeprof.patch has no record of {type(block).__name__}"


def changed_blocks(model: nn.Module) -> dict[str, str]:
    """{name: why it isn't one} of what a user has made from the class of a family's blocks."""
    return {
        name or type(module).__name__: explained(no_record(module), module)
        for name, module in model.named_modules()
        if family_of(module) is None and stock_parent(module)
    }


def runnable_blocks(model: nn.Module) -> list[Block]:
    """The same; ValueError also for a block that can't run on the C path, as `moeprof.patch`."""
    blocks = find_blocks(model)
    for block in blocks:
        if reason := block.readable():
            raise ValueError(not_runnable(block.title, reason))
    return blocks


def not_runnable(name: str, reason: str) -> str:
    """What is said of a block that can't run on the C path."""
    return f"{name}: can't run on moeprof's path: {reason}"


def fewest_experts(model: nn.Module) -> int:
    """E of the layer with the fewest: what one number of experts for all layers has to fit."""
    return min(block.num_experts for block in find_blocks(model))


def own_top_k(model: nn.Module) -> int:
    """How many experts the model's own routers take, the same number in every layer.

    Raises ValueError where layers take different numbers: what is named by k, or compared with
    it, has no such k then.
    """
    taken = {block.title: block.top_k for block in find_blocks(model)}
    if len(set(taken.values())) == 1:
        return next(iter(taken.values()))
    each = ", ".join(f"{name} takes {k}" for name, k in taken.items())
    raise ValueError(
        f"the model's own routers take different numbers of experts ({each}): expected one number "
        "for all layers, which others are compared with; moeprof.patch and moeprof.MoEProfiler "
        "run such a model"
    )


def experts_of(model: nn.Module) -> tuple[int, int]:
    """(fewest experts of a layer, experts that the model's own routers take).

    Raises ValueError, as moeprof.patch does, for a model that can't be patched, and for one of
    which layers take different numbers of experts.
    """
    runnable_blocks(model)
    return fewest_experts(model), own_top_k(model)


def model_norm(model: nn.Module) -> tuple[str, int]:
    """(norm, top_k): how the model weighs its experts ("sum" or "none"), and how many it takes."""
    _, module, family = find_blocks(model)[0]
    settings = family.settings(module)
    return ("sum" if settings.renormalises else "none"), settings.top_k


def model_sizes(model: Any) -> dict[str, Any]:
    """What a study's JSON says of a model's size. E and k are read from the layers, since
    families name them differently in the configuration; the rest is None where that lacks it."""
    num_experts, top_k = experts_of(model)
    rest = ("num_hidden_layers", "hidden_size", "intermediate_size")
    return {
        "model_type": model.config.model_type,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        **{name: getattr(model.config, name, None) for name in rest},
        "norm_topk_prob": model_norm(model)[0] == "sum",
    }


def _no_routers(model: nn.Module) -> str:
    """What was looked for and found, and what of moeprof works on such a model."""
    classes = {type(m).__name__ for m in model.modules()}
    alike = sorted(c for c in classes if any(s in c.lower() for s in ("moe", "router", "expert")))
    known = len({family.name for family in FAMILIES})  # some have a record for each layout
    text = (
        f"No routers found in {type(model).__name__}{dense(alike)}: looked for blocks with a gate "
        f"and experts, of the {known} families that moeprof.patch knows; found "
        f"{len(classes)} classes of modules, of a mixture of experts: {', '.join(alike) or 'none'}"
    )
    if _profiler_reads(model):
        text += ". moeprof.MoEProfiler(model) reads this model as it is"
    if has_interface(model):
        text += (
            '. model.set_experts_implementation("moeprof") runs its experts in C, with the '
            "model's own router"
        )
    return text


def _profiler_reads(model: nn.Module) -> bool:
    try:
        return bool(find_sites(model))
    except ValueError:  # it has nothing to read either
        return False


def has_interface(model: nn.Module) -> bool:
    """Do all its experts lie behind transformers' interface, in a form that the C path reads?"""
    if not hasattr(model, "set_experts_implementation"):  # transformers 4 has no such interface
        return False
    behind = [m for m in model.modules() if is_behind_interface(m)]
    return bool(behind) and not any(map(interface_obstacle, behind))


def is_behind_interface(experts: nn.Module) -> bool:
    """Are these experts called through transformers' interface? Its decorator sets the flag."""
    return "is_concatenated" in vars(experts)


def interface_obstacle(experts: nn.Module) -> str | None:
    """Why the experts implementation "moeprof" can't run these, or None."""
    read, reason = read_packed(experts)
    return reason or tensor_obstacle(read.matrices, read.storage, backend_of(read.matrices))
