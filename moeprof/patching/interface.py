"""The experts implementation "moeprof" of transformers 5, registered whichever is imported first.

transformers keeps its implementations in ``transformers.integrations.moe``. Importing that
means importing torch, which ``import moeprof`` must not do for people who have no use for it;
so the registration waits until somebody else imports it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODULE = "transformers.integrations.moe"


def _experts_forward(
    experts: "nn.Module",
    hidden_states: "Tensor",
    top_k_index: "Tensor",
    top_k_weights: "Tensor",
) -> "Tensor":
    from .experts_forward import experts_forward

    return experts_forward(experts, hidden_states, top_k_index, top_k_weights)


def _register(module: ModuleType) -> None:
    module.ALL_EXPERTS_FUNCTIONS.register("moeprof", _experts_forward)


class _Waiter(MetaPathFinder):
    """Sees the import of the one module, registers behind it, and is gone."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:  # transformers 4 has no such module
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # this import's
        return spec


def register_experts_implementation() -> None:
    """Register now if transformers is there already, else when it comes."""
    if _MODULE in sys.modules:
        _register(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _Waiter())
