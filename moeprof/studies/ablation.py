"""What each layer's experts are worth: the loss with fewer of them in one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..backends.torch.prepared import precise
from ..checks import check_model, check_token_ids, check_tokenizer
from ..measure.bootstrap import intervals
from ..measure.passes import batches, evaluating, ids_for, patched
from ..models.blocks import runnable_blocks
from ..models.names import layer_keys, layer_labels, layer_numbers, spans
from ..routers import TopK
from ..show.console import make_console
from ..show.console import progress as progress_bar
from ..show.figures import line_styles, whole_ticks
from ..texts.documents import read_texts
from ..texts.windows import HeldOut, heldout_windows

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from torch import nn

    from ..checks import Tokenizer


COLUMNS = ("layer", "name", "block", "k", "loss", "loss_change", "low", "high")


def layer_ablation(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[Any],
    *,
    layers: Collection[int | str] | None = None,
    ks: Iterable[int] | None = None,
    tokens: int = 8192,
    seed: int = 0,
    draws: int = 2000,
    progress: bool | None = None,
) -> pandas.DataFrame:
    """The change of the loss when one MoE layer uses fewer experts, layer by layer.

    Parameters
    ----------
    model : torch.nn.Module
        One that `moeprof.patch` can patch. It runs in eval mode and is afterwards as it was.
    tokenizer : callable
        As transformers has them.
    texts : list of str, or of objects with .text and .domain
        Each is a document.
    layers : list, optional
        Those to try: by number, block's name or gate's name. All unless given.
    ks : list of int, optional
        Experts per token to try in each layer, from 1 to E. Unless given, k - 1, k - 2, k - 4, …
        and 1, where k is the layer's own.
    tokens : int
        About how many of the texts' tokens are used, spread over them, in windows of 512. The
        model reads them once, and once for each layer and k.
    seed : int
        Of the choice of windows and of the bootstrap.
    draws : int
        Of the bootstrap.
    progress : bool, optional
        True and None show a bar where a terminal is; False shows none.

    Returns
    -------
    pandas.DataFrame
        A row per layer and k: layer (the model's own number), name (its gate's,
        "model.layers.0.mlp.gate", as the profiler's), block ("model.layers.0.mlp"), k, loss
        in nats per predicted token, loss_change (positive: worse than the model's own k), low and
        high of its 95 % interval (bootstrap over documents, paired; nan for a single document).
        ``frame.attrs``: loss (with every layer at its own k), own_k (one per layer), tokens,
        documents, seed.

    Raises
    ------
    ValueError
        "No routers found …"; a layer that can't be patched, or that isn't there; ks out of range;
        nothing to try (a top-1 model without ks); no text of two tokens.
    TypeError
        Texts that are not strings.

    Example
    -------
    >>> from moeprof.studies.ablation import ablation_figure    # doctest: +SKIP
    >>> frame = layer_ablation(model, tokenizer, texts)         # doctest: +SKIP
    >>> ablation_figure(frame).savefig("ablation.png")          # doctest: +SKIP
    """
    check_model("layer_ablation", model)
    check_tokenizer("layer_ablation", tokenizer)
    blocks = runnable_blocks(model)
    names = [block.name for block in blocks]
    own = [block.top_k for block in blocks]
    gates = [block.gate_name for block in blocks]
    chosen = _places(layers, names, gates)
    plan = [
        (layer, k)
        for layer, block in enumerate(blocks)
        if layer in chosen
        for k in _ks(ks, own[layer], block.num_experts)
    ]
    if not plan:
        raise ValueError("ks: the model takes one expert per token, so there is none to take away")
    text = heldout_windows(tokenizer, read_texts(texts, "texts"), tokens, seed)
    check_token_ids(model, (window.ids for window in text.windows))
    total = (1 + sum(k != own[layer] for layer, k in plan)) * len(text.windows)
    shown = progress_bar(
        make_console(), total, "layer ablation", "windows", shown=progress is not False
    )
    with evaluating(model), torch.inference_mode(), shown as bar:
        whole = _nats(model, text, {}, bar.step)
        changed = np.stack(
            [
                whole if k == own[layer] else _nats(model, text, {names[layer]: TopK(k)}, bar.step)
                for layer, k in plan
            ]
        )
    frame = _frame(plan, names, gates, changed, whole, _predicted(text), seed, draws)
    frame.attrs |= {
        "loss": float(whole.sum() / _predicted(text).sum()),
        "own_k": own,
        "tokens": text.tokens,
        "documents": len(text.documents),
        "seed": seed,
    }
    return frame


def _places(layers: Collection[int | str] | None, names: list[str], gates: list[str]) -> set[int]:
    """Where the layers stand that a user names, by block or gate; None: all of them."""
    if layers is None:
        return set(range(len(names)))
    keys = layer_keys(names, gates)
    if unknown := [layer for layer in layers if layer not in keys]:
        raise ValueError(
            f"layers: expected {spans(layer_labels(names))} or the names of blocks or gates, got "
            f"{unknown}"
        )
    return {keys[layer] for layer in layers}


def _ks(ks: Iterable[int] | None, own: int, num_experts: int) -> list[int]:
    """The numbers of experts to try in a layer of its own `own`, the most first."""
    if ks is None:
        fewer = {own - 2**n for n in range(own.bit_length())} | {1}
        return sorted((k for k in fewer if 1 <= k < own), reverse=True)
    ks = list(ks)
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k <= num_experts:
            raise ValueError(f"ks: expected integers from 1 to {num_experts}, got {k!r}")
    if not ks:
        raise ValueError("ks: expected at least one number of experts, got none")
    return sorted({int(k) for k in ks}, reverse=True)


def _nats(
    model: nn.Module, text: HeldOut, router: Any, step: Callable[[], object]
) -> NDArray[np.float64]:
    """(D,) the sum of -ln P(token) over each document, patched with `router`."""
    nats = np.zeros(len(text.documents))
    with patched(model, router):
        for windows in batches(text):
            ids = ids_for(model, windows)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), ids[:, 1:], reduction="none"
            ).sum(1, dtype=precise(logits.device))
            np.add.at(nats, [window.document for window in windows], loss.numpy(force=True))
            for _ in windows:
                step()
    return nats


def _predicted(text: HeldOut) -> NDArray[np.float64]:
    """(D,) tokens of each document that are predicted: not the first of a window."""
    counts = np.zeros(len(text.documents))
    for window in text.windows:
        counts[window.document] += window.ids.shape[1] - 1
    return counts


def _frame(
    plan: list[tuple[int, int]],
    names: list[str],
    gates: list[str],
    changed: NDArray[np.float64],
    whole: NDArray[np.float64],
    predicted: NDArray[np.float64],
    seed: int,
    draws: int,
) -> pandas.DataFrame:
    import pandas

    def change(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return weights @ (changed - whole).T / (weights @ predicted)[:, None]

    found = intervals(change, len(whole), draws=draws, seed=seed)
    layers, ks = zip(*plan, strict=True)
    labels, blocks = layer_numbers(names), [names[layer] for layer in layers]
    columns = (
        [labels[layer] for layer in layers],
        [gates[layer] for layer in layers],
        blocks,
        ks,
        changed.sum(1) / predicted.sum(),
        found.estimate,
        found.low,
        found.high,
    )
    return pandas.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def ablation_figure(frame: pandas.DataFrame) -> Figure:
    """A matplotlib Figure of what `layer_ablation` returned: loss change by layer, a line per k.

    Bars are the 95 % intervals. The user's matplotlib backend and state are not touched.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 5.5), dpi=100, layout="constrained")
    axis = fig.subplots()
    # Logarithmic but near 0: one expert less changes hundreds of times less than all but one.
    axis.set_yscale("symlog", linthresh=max(frame["loss_change"].abs().max() / 100, 1e-6))
    ks = sorted(frame["k"].unique(), reverse=True)
    styles = line_styles(len(ks))
    for number, (k, off) in enumerate(zip(ks, np.linspace(-0.2, 0.2, len(ks)), strict=True)):
        rows = frame[frame["k"] == k].sort_values("layer")
        change = rows["loss_change"].to_numpy()
        ends = np.abs(np.stack([change - rows["low"], rows["high"] - change]))
        axis.errorbar(
            rows["layer"] + off,
            change,
            yerr=np.nan_to_num(ends),
            capsize=2,
            linewidth=1.4,
            label=f"top-{k}",
            **styles[number],
        )
    axis.axhline(0, color="black", linewidth=1, linestyle="--")
    axis.yaxis.set_major_formatter("{x:g}")
    whole_ticks(axis)
    axis.grid(color="#e5e5e5")
    axis.set_axisbelow(True)
    axis.set_xlabel("MoE layer that uses fewer experts", size=12)
    axis.set_ylabel("change of the loss (nats per token)", size=12)
    axis.set_title(
        "What a layer's experts are worth: the loss with fewer of them",
        loc="left",
        size=13,
        weight="bold",
        pad=24,
    )
    axis.annotate(
        _about(frame), (0, 1), (0, 7), "axes fraction", "offset points", size=10, color="#444444"
    )
    fig.legend(frameon=False, fontsize=11, ncols=min(len(ks), 6), loc="outside lower center")
    return fig


def _about(frame: pandas.DataFrame) -> str:
    facts = frame.attrs
    if not facts:
        return "bars: 95 % intervals over documents"
    own = ", ".join(str(k) for k in dict.fromkeys(facts["own_k"]))
    return (
        f"0: all layers at top-{own}, {facts['loss']:.3f} nats; {facts['tokens']:,} tokens of "
        f"{facts['documents']} documents; bars: 95 % intervals over documents"
    )
