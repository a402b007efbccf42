"""The arguments of `moeprof calibrate`, and the command itself."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..files import check_folder
from ..null import KINDS, SCORES, Null
from ..texts.streams import TextFiles
from . import options


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof calibrate`."""
    parser.description = "Fit null distributions to a model's routers, or add fitted ones up."
    options.add_model(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        metavar="TEXT",
        nargs="+",
        help=f"the text to fit to, .txt and the like of any size; {options.DOCUMENTS}",
    )
    source.add_argument(
        "--merge",
        metavar="NULL",
        nargs="+",
        help="nulls fitted to different texts: writes the one fitted to all of them, exactly",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="written there: .safetensors, or .npz, which is compressed",
    )
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="trimmed is the one to route by, efron the one for diagnose and for the routers "
        "local_fdr, ebh and expert_threshold; default: trimmed",
    )
    parser.add_argument("--score", choices=SCORES, help="default: logprob")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    out = Path(arguments.out)
    if out.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out {out}: a null file ends in .safetensors or .npz")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"--out {out}: no such folder {out.parent}")
    if out.is_dir():
        raise IsADirectoryError(f"--out {out}: expected a file, this is a folder")
    check_folder(out.parent)
    null = _fitted(arguments) if arguments.merge is None else _merged(arguments)
    null.save(out)
    print(null.describe())
    print(f"Written: {out}")


def _fitted(arguments: argparse.Namespace) -> Null:
    from ..measure.fitting import fit_null
    from ..measure.passes import quick

    texts = TextFiles(arguments.text)
    options.check_named_model(arguments)
    model, tokenizer = options.load(arguments)
    with quick(model):
        return fit_null(
            model,
            tokenizer,
            texts,
            kind=arguments.kind or "trimmed",
            score=arguments.score or "logprob",
            progress=sys.stderr.isatty(),
        )


def _merged(arguments: argparse.Namespace) -> Null:
    for name, default in {**options.OF_MODEL, "kind": None, "score": None}.items():
        if getattr(arguments, name) != default:
            option = name.replace("_", "-")
            raise ValueError(f"--merge adds up fitted nulls: it takes no --{option}")
    if len(arguments.merge) < 2:
        raise ValueError("--merge: expected at least two nulls, got one")
    total: Null | None = None
    seen: dict[str, str] = {}
    for path in arguments.merge:
        null = Null.load(path)
        if null.text_digest in seen:
            raise ValueError(
                f"--merge: {path} was fitted to the same text as {seen[null.text_digest]}, which "
                "would count twice"
            )
        seen[null.text_digest] = path
        try:
            total = null if total is None else total.merge(null)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    assert total is not None  # there are two at least
    return total
