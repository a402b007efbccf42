"""Makes the null that ships with the demo model: `python -m moeprof.demo.fit [FILE]`.

Fitted to the first of `calibration_halves()`, so that the second can set budgets and the held-out
text can judge; in float32. Written to moeprof/demo/data/null.npz unless FILE is given.
"""

import sys

from .. import demo
from ..calibration import fit_null


def fitted(progress=False):
    """The null, fitted anew."""
    model, tokenizer = demo.load()
    documents, _ = demo.calibration_halves()
    texts = [document.text for document in documents]
    return fit_null(model, tokenizer, texts, kind="efron", score="logprob", progress=progress)


def main(arguments):
    path = arguments[0] if arguments else demo.NULL_PATH
    null = fitted(progress=sys.stderr.isatty())
    null.save(path)
    print(f"{null.describe()}\nWritten: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
