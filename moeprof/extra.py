"""The packages of `moeprof[hf]`, which whatever works on models needs."""

import importlib.util

MODELS = ("torch", "transformers", "safetensors", "tqdm")
ALL = (*MODELS, "scipy", "statsmodels", "pandas", "matplotlib", "rich")


def check_installed(who, packages):
    """ImportError naming the first of `packages` that isn't installed; imports none of them.

    who: what needs them, as a user calls it.
    """
    for name in packages:
        if not _is_installed(name):
            raise ImportError(missing(who, name))


def missing(who, name):
    """What is said where a package is missing."""
    return f"{who} needs {name}, which isn't installed: pip install 'moeprof[hf]'"


def _is_installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # hidden by an import hook; a module made by hand
        return False
