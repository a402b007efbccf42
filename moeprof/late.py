"""What is looked up late: exports that import much, and methods whose work is done higher up.

`Router.with_budget` and `Null.diagnose` stand on classes that whole studies are built on. The
face, moeprof/__init__.py, says where those studies are; the methods look them up here by name,
so that no import runs upwards.
"""

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

_MODULES: dict[str, str] = {}


def bind(name: str, module: str) -> None:
    """Let `late(name)` be the function of this name in `module`, imported when first asked for."""
    _MODULES[name] = module


def late(name: str) -> Callable[..., Any]:
    """The function that was bound to this name."""
    function: Callable[..., Any] = getattr(importlib.import_module(_MODULES[name]), name)
    return function


def exports(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are imported when they are first asked for.

    names: {name: the module that defines it, relative to the package}, none of which may be the
    name of a module of the package: an import of that would hide it. modules: those that are
    attributes themselves.
    """

    def get(name: str) -> Any:
        if name in modules:
            return importlib.import_module(f".{name}", package)
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{names[name]}", package), name)

    return get
