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
from ...measure.fitting import Form, fit_nulls

if TYPE_CHECKING:
    from ...null.model import Null


def fitted(progress: bool = False) -> dict[str, Null]:
    """{kind: null} of all that ship, fitted anew."""
    model, tokenizer = demo.load()
    documents, _ = demo.calibration_halves()
    texts = [document.text for document in documents]
    forms = [Form(kind, "logprob") for kind in demo.NULL_PATHS]
    nulls = fit_nulls(model, tokenizer, texts, forms, progress=progress)
    return dict(zip(demo.NULL_PATHS, nulls, strict=True))


def main(arguments: list[str]) -> None:
    for kind, null in fitted(progress=sys.stderr.isatty()).items():
        path = demo.NULL_PATHS[kind]
        path = Path(arguments[0]) / path.name if arguments else path
        null.save(path)
        print(f"{null.describe()}\nWritten: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
