"""fit_null: run text through a model and count its router scores."""

from __future__ import annotations

import hashlib
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..checks import check_model, check_takes_ids, check_token_ids, check_tokenizer
from ..models.blocks import find_blocks
from ..models.identity import NO_TEXT, add_digests, gates_of, model_name, router_sample
from ..models.reading import describe_output
from ..models.tokens import token_ids
from ..null.histograms import Histograms
from ..null.model import KINDS, Null
from ..null.scores import SCORES, check_choice
from ..patching.handle import Removable
from ..patching.layer import PatchedLayer
from ..patching.state import STATE
from ..show.console import make_console
from ..show.console import progress as progress_bar

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from ..checks import Tokenizer
    from ..models.blocks import Block
    from ..models.routing import Routing


# BH's first threshold is p <= alpha/E. Of n tokens' scores of E experts n * alpha lie beyond it:
# at alpha 0.05 one with 20 tokens, and 100, which is what a tail known to 10 % takes, with 2,000.
MIN_TOKENS, ENOUGH_TOKENS = 20, 2000


def _recorder(outputs: dict[int, Any], layer: int) -> Callable[[nn.Module, Any, Any], None]:
    """Forward hook of a gate: keeps its last input and output under its layer's number.

    A function of this module: `moeprof.patch` knows the hook by that.
    """

    def record(module: nn.Module, args: Any, output: Any) -> None:
        outputs[layer] = args[0], output

    return record


def _reader(outputs: dict[int, Any], layer: int) -> Callable[[int, Routing], None]:
    """The same of a patched block, which may do without its gate: keeps what it made of it."""

    def read(index: int, routing: Routing) -> None:
        if routing.logits is not None:
            outputs[layer] = None, routing.logits

    return read


def _windows(text: str, tokenizer: Tokenizer, window: int) -> Iterator[tuple[list[int], float]]:
    """The token ids of a text, `window` at a time; a single last token tells nothing."""
    ids = token_ids(tokenizer, text)
    for start in range(0, len(ids), window):
        if len(ids) - start >= 2:
            yield ids[start : start + window], min(window, len(ids) - start) / len(ids)


def _window_logits(block: Block, said: Any, tokens: int, experts: int) -> NDArray[np.float32]:
    """What a router sees of one window, float32 (T-1,E): the first token is left out.

    said: (hidden states, output) of the block's gate; (None, logits) of a patched one.
    """
    name = block.gate_name
    if said is None:
        raise ValueError(
            f"{name} did not run: was the model patched while a null was fitted to it?"
        )
    hidden, output = said
    logits = output if hidden is None else block.gate_logits(output, hidden)
    if logits is None:
        raise ValueError(
            f"Router output format unexpected: {name}: a null is fitted to logits "
            f"({tokens}, {experts}), got {describe_output(output)}"
        )
    values = block.choice_logits(logits.detach().cpu()).numpy().reshape(tokens, experts)
    if not np.isfinite(values).all():
        what = "NaN" if np.isnan(values).any() else "infinite values"
        raise ValueError(f"the router logits of {name} contain {what}: no null can be fitted")
    return values[1:]


class _Texts:
    """Goes through the texts once: what they are, how many, their digest and the progress.

    total: their bytes, None where only the end will tell (an iterator).
    """

    def __init__(self, texts: Iterable[str]) -> None:
        if isinstance(texts, (str, bytes)):
            raise TypeError("texts: expected a list of strings or an iterator, got one text")
        if not hasattr(texts, "__iter__"):
            raise TypeError(
                f"texts: expected a list of strings or an iterator, got {type(texts).__name__}"
            )
        if isinstance(texts, (list, tuple)):
            for text in texts:  # before the model runs
                _encoded(text)
            self.total: int | None = sum(len(_encoded(text)) for text in texts)
        else:
            self.total = getattr(texts, "total_bytes", None)
        self._texts, self.count, self.digest = iter(texts), 0, NO_TEXT

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """(text, its bytes) one after the other."""
        for text in self._texts:
            data = _encoded(text)
            self.count += 1
            self.digest = add_digests(self.digest, hashlib.sha256(data).hexdigest())
            yield text, len(data)


def _encoded(text: object) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"texts: expected a list of strings, got {type(text).__name__} among them")
    return text.encode("utf-8", "surrogatepass")


def _run(
    model: nn.Module,
    blocks: list[Block],
    texts: _Texts,
    tokenizer: Tokenizer,
    window: int,
    histograms: Sequence[Histograms],
    progress: bool,
) -> int:
    """Feed the texts through the model and count; returns the number of tokens counted."""
    base = getattr(model, "base_model", model)  # the head isn't needed
    gates = [block.family.gate_of(block.module) for block in blocks]
    device = next(gates[0].parameters()).device
    outputs: dict[int, Any] = {}
    tokens, experts = 0, blocks[0].num_experts
    training = [(module, module.training) for module in model.modules()]
    handles: list[Any] = []
    try:
        model.eval()
        for layer, (gate, block) in enumerate(zip(gates, blocks, strict=True)):
            handles.append(gate.register_forward_hook(_recorder(outputs, layer)))
            if isinstance(patch := vars(block.module).get(STATE), PatchedLayer):
                handles.append(Removable([patch], _reader(outputs, layer)))
        total = None if texts.total is None else texts.total / 1000
        bar = progress_bar(make_console(), total, "calibrating", "kB of text", shown=progress)
        with torch.inference_mode(), bar as shown:
            for text, size in texts:
                for ids, share in _windows(text, tokenizer, window):
                    check_token_ids(model, [ids])
                    outputs.clear()
                    base(input_ids=torch.tensor([ids], device=device), use_cache=False)
                    for layer, block in enumerate(blocks):
                        logits = _window_logits(block, outputs.get(layer), len(ids), experts)
                        for histogram in histograms:
                            histogram.add(layer, logits)
                    tokens += len(ids) - 1
                    shown.step(share * size / 1000)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    return tokens


def _trimming(
    kind: str, r_high: int | None, r_low: int | None, model: nn.Module, experts: int
) -> tuple[int, int]:
    """(r_high, r_low): none but for `trimmed`, there half the model's top-k each by default."""
    if kind != "trimmed":
        if r_high or r_low:
            raise ValueError("r_high and r_low belong to kind='trimmed'")
        return 0, 0
    # Rounded up, so that a top-1 router's own choice is left out; a score at least stays.
    top_k = max(block.top_k for block in find_blocks(model))
    half = min((top_k + 1) // 2, (experts - 1) // 2)
    high, low = (half if r is None else r for r in (r_high, r_low))
    if min(high, low) < 0 or high + low >= experts:
        raise ValueError(
            f"r_high and r_low: expected >= 0 and a sum below the {experts} experts, "
            f"got {high} and {low}"
        )
    return high, low


def _check_amount(tokens: int, texts: int) -> None:
    """Refuse a null of too few tokens, and warn of one of few."""
    if tokens < MIN_TOKENS:
        raise ValueError(
            f"texts: a null needs at least {MIN_TOKENS} tokens (better {ENOUGH_TOKENS:,}), got "
            f"{tokens} from {texts} text(s), the first token of each window left out; give more "
            "text"
        )
    if tokens < ENOUGH_TOKENS:
        warnings.warn(
            f"the null was fitted to {tokens:,} tokens, and its tail, which decides what is "
            f"selected, is known to 10 % from {ENOUGH_TOKENS:,} on: give more text",
            stacklevel=4,
        )


def fit_null(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    kind: str = "trimmed",
    score: str = "logprob",
    r_high: int | None = None,
    r_low: int | None = None,
    window: int = 512,
    progress: bool = True,
) -> Null:
    """Fit a null to the router scores of a model on texts.

    How far the tail of a null can be known is a matter of tokens: fewer than 20 are refused, as
    not one score is then expected beyond BH's first threshold at alpha 0.05; for fewer than 2,000
    (100 scores beyond it, so a tail known to 10 %) there is a warning. Counted are the tokens
    that scores are taken of: the first of each window isn't.

    Parameters
    ----------
    model : torch.nn.Module
        It is afterwards as it was.
    tokenizer : callable
        The model's, as transformers has them. It is told to add no special tokens.
    texts : iterable of str
        An iterator is read as it goes, so that memory doesn't grow with the amount of text.
    kind : str
        "efron", "all" or "conformal", which count every score, or "trimmed", which leaves out
        each token's r_high highest and r_low lowest.
    score : str
        Of the logits z: "logprob" (z - logsumexp(z)), "logit" (z) or "centred" (z - mean(z)).
    r_high : int or None
        Of a trimmed null. None is half of the model's k, rounded up, and never so many that no
        score is left.
    r_low : int or None
        As r_high.
    window : int
        Each text is cut into windows of so many tokens, which run through the model one by one,
        without padding; the first token of each is left out.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    Null

    Raises
    ------
    ValueError
        kind, score, window, r_high or r_low out of range; fewer than 20 tokens; logits that are
        not finite (the layer is named); a model without a router; a token id that its embedding
        has no row for.
    TypeError
        Texts that are not strings; no model, no tokenizer.

    Example
    -------
    >>> null = moeprof.fit_null(model, tokenizer, texts)        # doctest: +SKIP
    >>> null.save("olmoe.safetensors")                          # doctest: +SKIP
    """
    form = Form(kind, score, r_high, r_low)
    return fit_nulls(model, tokenizer, texts, [form], window=window, progress=progress)[0]


class Form(NamedTuple):
    """Which null is fitted: the arguments of `fit_null` that say so."""

    kind: str = "trimmed"
    score: str = "logprob"
    r_high: int | None = None
    r_low: int | None = None


def fit_nulls(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    forms: Iterable[Form],
    *,
    window: int = 512,
    progress: bool = True,
) -> list[Null]:
    """Nulls of several forms in one pass over the texts: each as `fit_null` would give it."""
    forms = list(forms)
    check_model("fit_null", model)
    check_tokenizer("fit_null", tokenizer)
    for form in forms:
        check_choice("kind", form.kind, KINDS)
        check_choice("score", form.score, SCORES)
    if not isinstance(window, numbers.Integral) or window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    texts = _Texts(texts)
    blocks = find_blocks(model)
    check_takes_ids("fit_null", model)
    experts = blocks[0].num_experts
    cuts = [_trimming(form.kind, form.r_high, form.r_low, model, experts) for form in forms]
    histograms = [
        Histograms(len(blocks), experts, form.score, *cut)
        for form, cut in zip(forms, cuts, strict=True)
    ]
    tokens = _run(model, blocks, texts, tokenizer, window, histograms, progress)
    _check_amount(tokens, texts.count)
    return [
        Null(
            kind=form.kind,
            score=form.score,
            r_high=r_high,
            r_low=r_low,
            counts=histogram.counts,
            largest=histogram.largest,
            tokens=tokens,
            model_name=model_name(model),
            router_sample=router_sample(gates_of(model)),
            text_digest=texts.digest,
        )
        for form, (r_high, r_low), histogram in zip(forms, cuts, histograms, strict=True)
    ]
