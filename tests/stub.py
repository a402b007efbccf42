"""Writes the stubs moeprof/__init__.pyi and moeprof/routers/__init__.pyi, for type checkers.

    python tests/stub.py            prints them
    python tests/stub.py --write    writes them

The face imports most names when they are first asked for, and makes the routing functions from
the registry: a type checker can follow neither. A test compares the file with this.
"""

import inspect
import sys
from pathlib import Path

import moeprof
from moeprof.routers import EXPORTS, FUNCTIONS, REGISTRY

FACE = Path(moeprof.__file__).with_suffix(".pyi")
ROUTERS = FACE.parent / "routers" / "__init__.pyi"
MADE = "Made by tests/stub.py; a test compares the two."
OF_ROUTERS = {
    "Router": "base",
    "Tokens": "base",
    "REGISTRY": "base",
    "make_router": "base",
    "FUNCTIONS": "functions",
    "RoutingResult": "functions",
    "RoutingStats": "functions",
    "benjamini_hochberg": "functions",
    "benjamini_hochberg_routing": "functions",
    "is_tensor": "functions",
    "topk_routing": "functions",
}


def texts() -> dict[Path, str]:
    """{path: what is to stand there}."""
    return {FACE: _face(), ROUTERS: _routers()}


def _face() -> str:
    modules = dict(moeprof._LAZY)
    for name in ("cpu_info", "get_num_threads", "set_num_threads"):
        modules[name] = "backends.cpu"
    modules["__version__"] = "version"
    for name in (*EXPORTS, "Router", "benjamini_hochberg"):
        modules[name] = "routers"
    rooms = "".join(f"from . import {name} as {name}\n" for name in moeprof._MODULES)
    names = "".join(f'    "{name}",\n' for name in moeprof.__all__)
    head = f'"""What `import moeprof` gives. {MADE}"""\n\n{rooms}'
    return f"{head}{_imports(modules)}\n__all__ = [\n{names}]\n"


def _routers() -> str:
    modules = OF_ROUTERS | {c.__name__: c.__module__.rpartition(".")[2] for c in REGISTRY.values()}
    functions = [_signature(name) for name in sorted(FUNCTIONS) if name not in modules]
    head = (
        f'"""The routers, and their functions. {MADE}"""\n\nimport os\nfrom typing import Any\n\n'
    )
    head += "from ..null.resolve import AnyNull\nfrom ..null.scores import Logits\n"
    exports = "\nEXPORTS: dict[str, Any]\n\n"
    return f"{head}{_imports(modules)}{exports}{''.join(functions)}"


def _imports(modules: dict[str, str]) -> str:
    return "".join(f"from .{m} import {n} as {n}\n" for n, m in sorted(modules.items(), key=_place))


def _place(item):
    return item[1], item[0]


def _signature(name: str) -> str:
    """Of a routing function, from its router's own parameters."""
    lines = [f"def {name}(\n"]
    keywords = False
    for parameter in inspect.signature(FUNCTIONS[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords:
            lines.append("    *,\n")
            keywords = True
        annotation = parameter.annotation
        kind = "Any" if annotation is parameter.empty else annotation
        kind = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
        kind = {"min_k": "int", "max_k": "int | None", "return_stats": "bool"}.get(
            parameter.name, kind
        )
        default = "" if parameter.default is parameter.empty else " = ..."
        lines.append(f"    {parameter.name}: {kind}{default},\n")
    return "".join([*lines, ") -> RoutingResult | RoutingStats: ...\n"])


if __name__ == "__main__":
    for path, text in texts().items():
        if sys.argv[1:] == ["--write"]:
            path.write_text(text)
        else:
            print(f"# {path.name} of {path.parent.name}\n{text}")
