"""What a patched module carries, whatever was patched."""

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

STATE = "_moeprof"  # the instance attribute by which a patched module knows its Patched


def is_patched(module: nn.Module) -> bool:
    """True while a patch is on this very module."""
    return STATE in vars(module)


@dataclass(eq=False)
class Patched:
    """The state of one patch of one module. A copy of the model carries a copy of it.

    name: the module's qualified name; saved: (module, its instance attributes before), the
    patched module first.
    """

    name: str
    ends_by_itself: bool = field(default=False, kw_only=True, repr=False)  # in a `with` block
    saved: list[tuple[nn.Module, dict[str, Any]]] = field(
        default_factory=list, kw_only=True, repr=False
    )

    def __deepcopy__(self, memo: dict) -> "Patched":
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self):
        # The bound methods of a patch could be written but not be read again.
        raise RuntimeError(
            f"{self.name}: a patched model can't be pickled (torch.save): unpatch it first, or "
            "use save_pretrained or state_dict"
        )
