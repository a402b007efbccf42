"""Is what was read from a router what its experts got? Asked once, of experts in a list."""

from threading import get_ident
from types import MappingProxyType

import torch
from torch import Tensor, nn

from .finding import Site
from .reading import Choice
from .sizes import is_list, listed_experts


class ChoiceCheck:
    """Counts the rows that each expert of a list gets in one call of the block.

    A router that returns logits only leaves the choice to its block, which may choose otherwise
    than by the largest: the rows by expert show it. Stacked experts have no calls of their own
    to count; there nothing is checked.

    Example
    -------
    >>> check = ChoiceCheck(site)
    >>> model(**inputs)
    >>> check.verify(choice)  # as read in that forward

    Raises
    ------
    ValueError
        "Router output format unexpected: ..." if the block adds a bias of its own to what its
        router says: few tokens would not show that.
    """

    def __init__(self, site: Site):
        self._name = site.layer.name
        self._rows = torch.zeros(site.layer.num_experts, dtype=torch.int64)
        self._hooks = []
        self._thread = get_ident()  # another may run the same block
        if site.experts is None or not is_list(site.experts):
            return
        if bias := _choice_bias(site):
            raise ValueError(
                f"Router output format unexpected: {self._name}: it returns logits, to which its "
                f"block adds {bias} before it chooses: the choice can't be read"
            )
        for number, expert in enumerate(listed_experts(site.experts)):
            hook = self._count(number)
            self._hooks.append(expert.register_forward_pre_hook(hook, with_kwargs=True))

    def _count(self, expert: int):
        @torch.compiler.disable
        def hook(module, args, kwargs=MappingProxyType({})):
            # torch calls it without kwargs in a thread that runs while another one hooks.
            given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if given and get_ident() == self._thread:
                self._rows[expert] += given[0].shape[:-1].numel()

        return hook

    def remove(self) -> None:
        """Take the hooks off; may be called again."""
        for hook in self._hooks:
            hook.remove()

    def verify(self, choice: Choice) -> None:
        """Take the hooks off and compare.

        Raises
        ------
        ValueError
            "Router output format unexpected: ...", with the layer, if an expert got more or
            fewer rows than the choice gives it.
        """
        self.remove()
        if not int(self._rows.sum()):  # nothing to count, or a block that calls no expert
            return
        experts = choice.experts.detach().reshape(-1).cpu().long()
        read = torch.bincount(experts[experts >= 0], minlength=len(self._rows))
        if torch.equal(read, self._rows):
            return
        wrong = int((read != self._rows).nonzero()[0])
        raise ValueError(
            f"Router output format unexpected: {self._name}: read as {int(read[wrong])} tokens "
            f"for expert {wrong}, which got {int(self._rows[wrong])}: the block chooses otherwise "
            "than its router's output says"
        )


def _choice_bias(site: Site) -> str | None:
    """The name of a bias for E experts, not zero, in a block whose router is a bare linear."""
    if type(site.router) is not nn.Linear:
        return None
    names = {id(p) for m in (site.router, site.experts) for p in m.parameters()}
    for name, value in [*site.block.named_parameters(), *site.block.named_buffers()]:
        fits = "bias" in name and value.numel() == site.layer.num_experts
        if fits and id(value) not in names and bool(value.any()):
            return name
    return None
