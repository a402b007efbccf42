"""Cells: the least parts of a study that are run, and kept, on their own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from ...files import as_json
from ...routers.base import Router, parameters_of
from ...routers.table import describe


class Subject(NamedTuple):
    """What cells are measured on and with, each as a digest or a short text.

    Results of different subjects are never mixed. model : its config and all weights; text : the
    token ids that are read; null : what p-values are measured against; code : the versions of
    moeprof, torch and transformers.
    """

    model: str
    text: str
    null: str
    code: str


class Cell(NamedTuple):
    """One part of a study, which needs the result of no other cell.

    kind : the study, such as "sweep"
    name : what tables call it
    parameters : plain values; with the kind and the subject they are all that its result depends
        on
    alone : whether times are taken in it that are to be compared, so that no other cell may run
        beside it
    """

    kind: str
    name: str
    parameters: dict[str, Any]
    alone: bool = False


def key_of(cell: Cell, subject: Subject) -> str:
    """SHA-256 of all that the result depends on, as hex."""
    content = [cell.kind, as_json(cell.parameters), list(subject)]
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def described(router: Router | Callable[..., Any] | None) -> dict[str, Any] | None:
    """A router as plain values; None, the model's own, stays None."""
    if router is None:
        return None
    if not isinstance(router, Router):
        return {"name": describe([router])}
    values = {f.name: getattr(router, f.name) for f in parameters_of(type(router))}
    return {"name": router.name, **values}
