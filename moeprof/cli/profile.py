"""The arguments of `moeprof profile`, and the command itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo import heldout_texts
from ..demo.defaults import default_null
from ..files import as_csv, check_folder, write_whole
from ..routers import REGISTRY
from ..routers.written import written_router
from ..show.console import make_console, progress
from ..texts.documents import Document, holds_documents, read_documents
from ..texts.streams import TextFiles
from . import options

if TYPE_CHECKING:
    from ..null.resolve import AnyNull
    from ..profile.page import Section
    from ..profile.result import Profile
    from ..profile.run import Plan
    from ..routers.base import Router


TOKENS, CONTINUATIONS, NEW_TOKENS = 8192, 8, 32
PIECES = 64  # of 65,536 characters at most, read of a text
OPTIONAL = ("trace.json", "agreement.csv", "ablation.csv", "vocabulary.csv")


def declare(parser: argparse.ArgumentParser) -> None:
    """The options of `moeprof profile`."""
    parser.description = (
        "Run a model over text and decode steps and write what its mixture-of-experts "
        "layers did to a folder: index.html, tables, raw counts."
    )
    options.add_model(parser)
    options.add_documents(
        parser,
        "your own text in place of the shipped held-out one; what names no domain has the name of "
        "its file or folder",
    )
    parser.add_argument(
        "--router",
        metavar="NAME[:PARAMETER=VALUE,...]",
        type=_router,
        help="patch the model with another router, such as bh:alpha=0.3,max_k=8; one of "
        + ", ".join(sorted(REGISTRY)),
    )
    parser.add_argument(
        "--patched", action="store_true", help="the model's own router, run in C by moeprof"
    )
    options.add_null(
        parser,
        'for a router on p-values: a null of `moeprof calibrate`, or "normal"; default: a '
        "trimmed null on logprob (efron for local_fdr, ebh and expert_threshold), the demo "
        "model's own or fitted first",
    )
    options.add_out(parser, "profile")
    options.add_number(
        parser, "--tokens", TOKENS, "about so many tokens as prefills of up to 512", 2, 10**9
    )
    options.add_number(
        parser,
        "--continuations",
        CONTINUATIONS,
        "so many passages continued greedily, 0 for none",
        0,
        10**6,
    )
    options.add_number(parser, "--new-tokens", NEW_TOKENS, "decode steps of each", 1, 10**6)
    parser.add_argument(
        "--batch",
        type=options.integer(1, 4096),
        nargs="+",
        default=[1],
        metavar="B",
        help="passages continued at a time; several sizes run one after another; default: 1",
    )
    parser.add_argument("--trace", action="store_true", help="also write trace.json for Perfetto")
    parser.add_argument(
        "--records",
        metavar="PATH",
        help="also write every token's experts: a .parquet file, or a folder of .npz files",
    )
    parser.add_argument(
        "--vocabulary", action="store_true", help="also count the experts of each input token"
    )
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="also measure the loss when one layer takes fewer experts; this takes a while",
    )
    options.add_seed(parser, "chooses the passages")
    parser.set_defaults(run=_run)


def _router(text: str) -> Router:
    """The router of "bh:alpha=0.3,max_k=8"."""
    try:
        router, budget = written_router(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if budget is not None:
        raise argparse.ArgumentTypeError(
            f"router {text!r}: a profile sets no budget; give {router.main}, as `moeprof evaluate` "
            "finds it"
        )
    return router


def _run(arguments: argparse.Namespace) -> None:
    """Whatever can be wrong without the model is looked at before the model is loaded."""
    from ..models.blocks import runnable_blocks
    from ..profiler.records import check_records

    if arguments.router is None and arguments.null is not None:
        raise ValueError("--null is what a router on p-values works on, and no --router is given")
    if arguments.router is not None and arguments.patched:
        raise ValueError("--patched runs the model's own router, and --router another one")
    null = options.given_null(arguments)
    options.check_named_model(arguments)
    asked, largest = arguments.continuations, max(arguments.batch)
    if asked and largest > asked:
        raise ValueError(f"--batch {largest}: expected at most --continuations, which is {asked}")
    check_folder(arguments.out)
    if arguments.records is not None:
        check_records(arguments.records)
    documents = heldout_texts() if arguments.text is None else _documents(arguments.text)
    model, tokenizer = options.load(arguments)
    if arguments.router is not None or arguments.patched or arguments.ablation:
        runnable_blocks(model)  # raises where the model can't be patched
    patch = _patch(arguments, model, tokenizer, null)
    _profile(arguments, model, tokenizer, documents, patch)


def _documents(names: Iterable[str]) -> list[Document]:
    """Documents, and the beginnings of other files.

    domain: a document's own, else the name of what was given, the path where names are alike.
    """
    paths = list(dict.fromkeys(map(Path, names)))
    stems = [path.stem for path in paths]
    found = []
    for path, stem in zip(paths, stems, strict=True):
        domain = stem if stems.count(stem) == 1 else str(path)
        if holds_documents(path):
            found += read_documents([path], domain)
            continue
        pieces = islice(TextFiles([path]), PIECES)
        found += [Document(domain, f"{path} {i}", text) for i, text in enumerate(pieces)]
    return found


def _patch(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, null: AnyNull | None
) -> dict[str, Any] | None:
    """The arguments of `moeprof.patch`, or None for the model as it is."""
    router = arguments.router
    if router is None:
        return {} if arguments.patched else None
    if router.wants_null and null is None:
        null = default_null(model, tokenizer, seed=arguments.seed, kind=router.null_kind)
    return {"router": router, "null": null}


def _profile(
    arguments: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    documents: list[Document],
    patch: dict[str, Any] | None,
) -> None:
    from ..measure.roofline import roofline
    from ..models.decoding import only_device_of
    from ..profile.run import plan, profile_texts
    from ..profile.text import table_as_text

    console = make_console()
    planned = plan(
        tokenizer,
        documents,
        tokens=arguments.tokens,
        prompts=arguments.continuations,
        new_tokens=arguments.new_tokens,
        batches=arguments.batch,
        seed=arguments.seed,
    )
    result = profile_texts(
        model,
        planned,
        patch=patch,
        trace=arguments.trace,
        records=arguments.records,
        vocabulary=arguments.vocabulary,
    )
    if only_device_of(model):  # afterwards, since it takes memory of the device, too
        with progress(console, 1, "the memory's speed, 5 s at most", still=True):
            result.roofline = roofline(model)
    if result.vocabulary is not None:
        result.vocabulary["text"] = [tokenizer.decode([i]) for i in result.vocabulary["tokens"]]
    folder = Path(arguments.out)
    over = (folder / "profile.json").exists()
    paths = _save(result, folder, arguments.trace)  # before what takes long and is interrupted
    result.print_summary()
    sections = {}
    if arguments.router is not None:
        sections["agreement"] = _agreement(model, planned, patch or {})
    if arguments.ablation:
        sections["ablation"] = _ablation(arguments, model, tokenizer, documents)
    for section in sections.values():
        console.print(table_as_text(section.table))
    paths = [*_show(result, folder, sections), *paths]
    if over:
        _remove_others(folder, paths)
    for path in paths:
        console.print(f"Written: {path}")


def _agreement(model: Any, planned: Plan, patch: dict[str, Any]) -> Section:
    from ..profile.page import Section
    from ..profile.run import agreement_by_layer
    from ..profile.tables import agreement

    frame = agreement_by_layer(model, planned, patch)
    return Section(agreement(frame), frame)


def _ablation(
    arguments: argparse.Namespace, model: Any, tokenizer: Any, documents: list[Document]
) -> Section:
    from ..profile.page import Section
    from ..profile.tables import ablation
    from ..studies.ablation import ablation_figure, layer_ablation

    frame = layer_ablation(
        model, tokenizer, documents, tokens=arguments.tokens, seed=arguments.seed
    )
    return Section(ablation(frame), frame, ablation_figure(frame))


def _save(result: Profile, folder: Path, trace: bool) -> list[Path]:
    """What was measured; the files' paths."""
    paths = result.save(folder)
    if trace:
        result.save_trace(folder / "trace.json")
        paths.append(folder / "trace.json")
    return paths


def _show(result: Profile, folder: Path, sections: dict[str, Section]) -> list[Path]:
    """index.html, and the sections' tables; the files' paths."""
    from ..profile.page import page

    with progress(make_console(), len(result.figures), "the page", "figures") as bar:
        files = {"index.html": page(result, sections.values(), bar.step).encode()}
    for name, section in sections.items():
        files[f"{name}.csv"] = as_csv(section.frame)
    for name, data in files.items():
        write_whole(folder / name, data)
    return [folder / name for name in files]


def _remove_others(folder: Path, paths: list[Path]) -> None:
    """Of an earlier profile what this one, whose files are the paths, has not written anew."""
    for name in OPTIONAL:
        if folder / name not in paths:
            (folder / name).unlink(missing_ok=True)
