"""Calls that are wrong, each in a way that mypy has to find. This is not run.

`mypy` reads it together with the package: were a call taken for right, its `type: ignore` would
be one too many, which is an error too.
"""

import torch

import moeprof

logits = torch.zeros(3, 8)
moeprof.top_p_routing(logits, P="much")  # type: ignore[arg-type]  # a number
moeprof.patch(3)  # type: ignore[arg-type]  # a model
moeprof.no_such_name()  # type: ignore[attr-defined]
version: int = moeprof.__version__  # type: ignore[assignment]
