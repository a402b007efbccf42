"""A routing: which experts some tokens go to. The same for all who choose, run or count one."""

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Which experts T tokens go to, in k_max slots each. None stands for what isn't known.

    Attributes
    ----------
    weights
        (T, k_max) floating point, float32 where moeprof routed: the factors of the experts'
        outputs.
    expert_ids
        (T, k_max) integer, int32 where moeprof routed; -1 for no expert in a slot. Best first;
        with a user's own router in the user's order.
    counts
        (T,) int32, the experts of each token.
    rejections
        (T,) int32, how many the rule selected before min_k and max_k; may be 0.
    logits
        (T, E), what the gate said.
    """

    weights: Tensor | None
    expert_ids: Tensor | None
    counts: Tensor | None = None
    rejections: Tensor | None = None
    logits: Tensor | None = None

    def detached(self) -> "Routing":
        """The same without gradients."""
        if self.weights is None or not self.weights.requires_grad:
            return self
        return Routing(*(None if part is None else part.detach() for part in self))

    def copied(self, logits_only: bool = False) -> "Routing":
        """The same in memory of its own, or with logits of its own alone."""
        if logits_only:
            return self if self.logits is None else self._replace(logits=self.logits.clone())
        return Routing(*(None if part is None else part.clone() for part in self))

    def on_host(self) -> "Routing":
        """The same in the CPU's memory."""
        if self.chosen.is_cpu:
            return self
        return Routing(*(None if part is None else part.cpu() for part in self))

    @property
    def chosen(self) -> Tensor:
        """expert_ids, of a routing in which experts were chosen."""
        assert self.expert_ids is not None
        return self.expert_ids
