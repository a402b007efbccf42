"""fit_null: run text through a model and count its router scores."""

import math

import numpy as np

from .null import (
    BINS,
    KINDS,
    SCORES,
    Null,
    bins_of,
    check_choice,
    gate_weight,
    gates_of,
    keep_largest,
    model_name,
    router_sample,
    scores_of,
    text_digest,
)


class _Histograms:
    """Counts scores layer by layer, in memory that doesn't grow with the text.

    counts (L,E,8192), largest: per layer a descending (<=1024,) array.
    """

    def __init__(self, layers, experts, score, r_high=0, r_low=0):
        self.score, self.r_high, self.r_low = score, r_high, r_low
        self.counts = np.zeros((layers, experts, BINS), np.uint64)
        self.largest = [np.empty(0)] * layers

    def add(self, layer, logits):
        """Count a layer's float32 logits (T,E); of equal ones the lower id ranks higher."""
        scores, experts = scores_of(logits, self.score), logits.shape[1]
        ranked = np.argsort(-logits, axis=1, kind="stable")
        kept = ranked[:, self.r_high : experts - self.r_low]
        values = np.take_along_axis(scores, kept, axis=1)
        at = (kept * BINS + bins_of(values)).ravel()
        np.add.at(self.counts[layer].reshape(-1), at, np.uint64(1))
        joined = np.concatenate([self.largest[layer], values.ravel()])
        self.largest[layer] = keep_largest(joined[None])[0]


def _recorder(outputs, layer):
    """Forward hook of a gate: keeps its last output under its layer's number.

    A function of this module: `moeprof.patch` knows the hook by that.
    """

    def record(module, args, output):
        outputs[layer] = output

    return record


def _windows(text, tokenizer, window):
    """The token ids of a text, `window` at a time; a single last token tells nothing."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for start in range(0, len(ids), window):
        if len(ids) - start >= 2:
            yield ids[start : start + window], len(text) / len(ids)


def _window_logits(name, output, tokens, experts):
    """The logits in a gate's output for one window, float32 (T-1,E): the first token is left out.

    Logits alone (4.57), or first of three (5.x); of two values the first are no logits.
    """
    logits = output[0] if isinstance(output, tuple) and len(output) == 3 else output
    shape = tuple(getattr(logits, "shape", ()))
    if math.prod(shape) != tokens * experts or shape[-1] != experts:
        raise ValueError(
            f"Router output format unexpected at {name}: expected logits ({tokens},{experts}), "
            f"got {shape or type(logits).__name__}"
        )
    values = logits.detach().float().cpu().numpy().reshape(tokens, experts)
    if not np.isfinite(values).all():
        what = "NaN" if np.isnan(values).any() else "infinite values"
        raise ValueError(f"the router logits of {name} contain {what}: no null can be fitted")
    return values[1:]


def _run(model, gates, texts, tokenizer, window, histograms, progress):
    """Feed the texts through the model and count; returns the number of tokens counted."""
    import torch
    from tqdm import tqdm

    base = getattr(model, "base_model", model)  # the head isn't needed
    device = gate_weight(*gates[0]).device
    outputs, tokens, experts = {}, 0, histograms.counts.shape[1]
    training = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        model.eval()
        for layer, (_, gate) in enumerate(gates):
            handles.append(gate.register_forward_hook(_recorder(outputs, layer)))
        bar = tqdm(
            desc="calibrating", total=sum(map(len, texts)), unit="char", unit_scale=True,
            delay=2, disable=not progress,
        )
        with torch.inference_mode(), bar:
            for text in texts:
                for ids, chars_per_token in _windows(text, tokenizer, window):
                    outputs.clear()
                    base(input_ids=torch.tensor([ids], device=device), use_cache=False)
                    for layer, (name, _) in enumerate(gates):
                        logits = _window_logits(name, outputs.get(layer), len(ids), experts)
                        histograms.add(layer, logits)
                    tokens += len(ids) - 1
                    done = len(ids) * chars_per_token  # rounding must not pass the total
                    bar.update(min(done, bar.total - bar.n))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    return tokens


def _trimming(kind, r_high, r_low, model, experts):
    """(r_high, r_low): none for `all`; for `trimmed` half the model's top-k each by default."""
    if kind == "all":
        if r_high or r_low:
            raise ValueError("r_high and r_low belong to kind='trimmed'")
        return 0, 0
    # Rounded up, so that a top-1 router's own choice is left out.
    half = (model.config.num_experts_per_tok + 1) // 2
    r_high, r_low = (half if r is None else r for r in (r_high, r_low))
    if min(r_high, r_low) < 0 or r_high + r_low >= experts:
        raise ValueError(
            f"r_high and r_low: expected >= 0 and a sum below the {experts} experts, "
            f"got {r_high} and {r_low}"
        )
    return r_high, r_low


def fit_null(
    model, tokenizer, texts, *, kind="trimmed", score="logprob", r_high=None, r_low=None,
    window=512, progress=True,
):
    """Fit a null to the router scores of `model` on `texts`, a list of strings.

    Each text is tokenised without special tokens and cut into windows of `window` tokens, which
    run through the model one by one; the first token of each is left out. `kind="trimmed"`
    leaves each token's r_high highest and r_low lowest scores out (default k/2 each, rounded
    up), `kind="all"` none; `score` is "logprob" (z - logsumexp(z)) or "logit" (z). The model is
    afterwards as it was. Returns a Null.

    Raises ValueError: kind, score, window, r_high or r_low out of range; no text with two tokens;
    logits that are not finite (the layer is named); a model without a router. TypeError: texts
    that are not strings.

    >>> null = moeprof.fit_null(model, tokenizer, texts)        # doctest: +SKIP
    >>> null.save("olmoe.safetensors")                          # doctest: +SKIP
    """
    check_choice("kind", kind, KINDS)
    check_choice("score", score, SCORES)
    if window < 2:
        raise ValueError(f"window: expected at least 2 tokens, got {window}")
    texts = [None] if isinstance(texts, str) else list(texts)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("texts: expected a list of strings")
    gates = gates_of(model)
    experts = gate_weight(*gates[0]).shape[0]
    r_high, r_low = _trimming(kind, r_high, r_low, model, experts)
    histograms = _Histograms(len(gates), experts, score, r_high, r_low)
    tokens = _run(model, gates, texts, tokenizer, window, histograms, progress)
    if tokens == 0:
        raise ValueError(f"texts: expected one with at least 2 tokens, got {len(texts)} without")
    return Null(
        kind=kind, score=score, r_high=r_high, r_low=r_low, counts=histograms.counts,
        largest=np.stack(histograms.largest), tokens=tokens, model_name=model_name(model),
        router_sample=router_sample(gates), text_digest=text_digest(texts),
    )
