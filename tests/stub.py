"""Writes moeprof/__init__.pyi, what type checkers and editors see of `import moeprof`.

    python tests/stub.py            prints it
    python tests/stub.py --write    writes it

The face imports most names when they are first asked for, and makes the routing functions from
the registry: a type checker can follow neither. A test compares the file with this.
"""

import inspect
import sys
from pathlib import Path

import moeprof
from moeprof.routers import FUNCTIONS, REGISTRY

PATH = Path(moeprof.__file__).with_suffix(".pyi")
HEAD = '''"""What `import moeprof` gives. Made by tests/stub.py; a test compares the two."""

from typing import Any

from . import demo as demo
from . import null as null
from . import profile as profile
from . import profiler as profiler
from . import routers as routers
from . import studies as studies
'''


def text() -> str:
    """The file."""
    modules = dict(moeprof._LAZY)
    for name in ("cpu_info", "get_num_threads", "set_num_threads"):
        modules[name] = "backends.cpu"
    modules |= {"Router": "routers.base", "__version__": "version"}
    modules |= {cls.__name__: cls.__module__[len("moeprof.") :] for cls in REGISTRY.values()}
    for name in ("benjamini_hochberg", "benjamini_hochberg_routing", "topk_routing"):
        modules[name] = "routers.functions"
    modules |= {"RoutingResult": "routers.functions", "RoutingStats": "routers.functions"}
    imports = [f"from .{m} import {n} as {n}\n" for n, m in sorted(modules.items(), key=_place)]
    functions = [_signature(name) for name in sorted(FUNCTIONS) if name not in modules]
    names = "".join(f'    "{name}",\n' for name in moeprof.__all__)
    return f"{HEAD}{''.join(imports)}\n{''.join(functions)}\n__all__ = [\n{names}]\n"


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
    if sys.argv[1:] == ["--write"]:
        PATH.write_text(text())
    else:
        print(text(), end="")
