"""Did what was routed run? Asked of each expert in every counted step."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..models.find import Site, calls_one_by_one
from ..models.reading import INTEGERS
from ..models.routing import Routing
from ..models.sizes import expert_slots, is_list


class ExpertRows:
    """The rows that the experts of one layer got in a call, beside what its router chose.

    Experts in a list have calls of their own, of which each row is counted. A router that
    returns logits only leaves the choice to its block, which may choose otherwise than by the
    largest: the first rows show it, and are refused. Later ones that differ are counted, as an
    expert with a capacity drops tokens. Stacked experts have one call, which shows the indices or
    the rows that they got, but not what their own code leaves out.

    E experts. Rows by slot: a module that is in several slots has them in its first one.
    """

    def __init__(self, site: Site):
        self.site, self._size = site, site.layer.num_experts
        experts = site.experts
        self.listed = experts is not None and is_list(experts)
        slots = expert_slots(experts) if experts is not None and self.listed else []
        first: dict[nn.Module, int] = {}
        for slot, module in enumerate(slots):
            if module is not None:
                first.setdefault(module, slot)
        self.modules = list(first.items())  # each expert with its slot
        owner = np.array([i if m is None else first[m] for i, m in enumerate(slots)], np.int64)
        self._owner = None if np.array_equal(owner, np.arange(len(slots))) else owner
        self._all_here = None not in slots
        # Not of parameters of the block's own, nor where all run whatever was chosen.
        stacked = experts is not None and not self.listed and experts is not site.block
        self.stacked = experts if stacked and not site.layer.dense else None

    def refuse_bias(self) -> None:
        """Raise ValueError, "Router output format unexpected: ...", if the block adds a bias of
        its own to what its router says: few tokens would not show that."""
        chosen_by_block = calls_one_by_one(self.site.block, self.site.experts)
        if chosen_by_block and (bias := _choice_bias(self.site)):
            raise ValueError(
                f"Router output format unexpected: {self.site.layer.name}: it returns logits, to "
                f"which its block adds {bias} before it chooses: the choice can't be read"
            )

    def left_out(self, rows: list[int], choice: Routing) -> np.ndarray | None:
        """(E + 1,): selections of each expert less the rows (E,) that it got; None: no difference.

        Negative where it got more rows than were selected.
        """
        difference = self._chosen(choice) - np.array(rows)
        return np.append(difference, 0) if difference.any() else None

    def left_out_of_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], choice: Routing
    ) -> np.ndarray | None:
        """The same of what stacked experts got; [E]: of experts that are not known."""
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if not given or any(value is choice.expert_ids for value in given[1:]):
            return None
        hidden, *others = given
        tokens = len(choice.chosen)
        for value in others:
            if value.dtype in INTEGERS and value.dim() > 1 and value[..., 0].numel() == tokens:
                return self._other_indices(value.reshape(tokens, -1), choice)
        rows = hidden.shape[:-1].numel()
        selections = int((choice.chosen >= 0).sum())
        if rows in (tokens, selections):  # each token once: what runs of it can't be seen
            return None
        if hidden.dim() == 3 and len(hidden) == self._size:  # (E, capacity, H)
            return np.append(self._chosen(choice) - hidden.shape[1], 0)
        return np.append(np.zeros(self._size, np.int64), selections - rows)

    def _other_indices(self, indices: Tensor, choice: Routing) -> np.ndarray | None:
        chosen = choice.chosen
        if indices.shape == chosen.shape and torch.equal(indices.long(), chosen.long()):
            return None
        flat = indices.detach().reshape(-1).cpu().numpy()
        got = np.bincount(flat[(flat >= 0) & (flat < self._size)], minlength=self._size)
        return np.append(self._chosen(choice) - got, 0)

    def _chosen(self, choice: Routing) -> np.ndarray:
        """(E,) selections, those of a module in several slots at its first one."""
        experts = choice.chosen.detach().reshape(-1).cpu().numpy()
        experts = experts[(experts >= 0) & (experts < self._size)]
        if self._owner is not None:
            experts = self._owner[experts]
        return np.bincount(experts, minlength=self._size)

    def verify(self, rows: list[int], choice: Routing, filled: list[int] | None = None) -> None:
        """Compare the rows (E,) of the first call, expert by expert.

        They may be the choice; the choice up to one capacity; all tokens for every expert. filled
        (E,): the rows that are not all zero, as experts that are filled up to a capacity have.

        Raises
        ------
        ValueError
            "Router output format unexpected: ...", with the layer, for others.
        """
        got, read = np.array(rows), self._chosen(choice)
        up_to = np.minimum(read, got.max(initial=0))
        if not self._all_here or any(np.array_equal(r, up_to) for r in (rows, filled or rows)):
            return
        used = np.array([slot for _, slot in self.modules])
        if (got[used] == len(choice.chosen)).all():
            return
        wrong = int((read != got).nonzero()[0][0])
        raise ValueError(
            f"Router output format unexpected: {self.site.layer.name}: read as {read[wrong]} "
            f"tokens for expert {wrong}, which got {got[wrong]}: the block chooses otherwise than "
            "its router's output says"
        )


def _choice_bias(site: Site) -> str | None:
    """The name of a bias for E experts, not zero, in a block whose router is a bare linear."""
    if type(site.router) is not nn.Linear:
        return None
    parts = (site.router, site.experts)
    names = {id(p) for m in parts if m is not None for p in m.parameters()}
    for name, value in [*site.block.named_parameters(), *site.block.named_buffers()]:
        fits = "bias" in name and value.numel() == site.layer.num_experts and not value.is_meta
        if fits and id(value) not in names and bool(value.any()):
            return name
    return None
