"""Makes the nulls that ship with the demo model: `python -m moeprof.demo.make.fit [FOLDER]`.

One of kind trimmed and one of kind efron, fitted to the first of `calibration_halves()`, so that
the second can set budgets and the held-out text can judge; in float32. Written to
moeprof/demo/data/ unless FOLDER is given.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ... import demo
from ...null.fitting import fit_null

if TYPE_CHECKING:
    from ...null.model import Null


def fitted(kind: str, progress: bool = False) -> Null:
    """The null of a kind, fitted anew."""
    model, tokenizer = demo.load()
    documents, _ = demo.calibration_halves()
    texts = [document.text for document in documents]
    return fit_null(model, tokenizer, texts, kind=kind, score="logprob", progress=progress)


def main(arguments: list[str]) -> None:
    for kind, path in demo.NULL_PATHS.items():
        path = Path(arguments[0]) / path.name if arguments else path
        null = fitted(kind, progress=sys.stderr.isatty())
        null.save(path)
        print(f"{null.describe()}\nWritten: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
