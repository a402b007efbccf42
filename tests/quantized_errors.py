"""What 8 and 4 bits cost: `python tests/quantized_errors.py layer` or `demo` prints a table.

`layer`: the relative error of one layer's output, to float64, with weights quantised by several
schemes, beside moeprof's q8 and q4 as its kernels compute them. `demo`: of the demo model on its
held-out text, how far the next-token distribution is from that of the unquantised model, with
intervals over documents.
"""

import sys

import numpy as np
import torch
from torch.nn import functional as F

H, I, TOKENS, OUTLIERS = 2048, 1024, 64, 6  # noqa: E741


def in_groups(w, size):
    return w.unflatten(-1, (-1, min(size, w.shape[-1])))


def half(t):
    return t.half().float()


def absmax(w, bits, size, above=0):
    """A scale by the largest weight, whose sign gets the lowest number where above is 0."""
    v = in_groups(w, size)
    most = 2 ** (bits - 1)
    m = v.gather(-1, v.abs().argmax(-1, keepdim=True))
    scale = half(m.abs() / (most - 1) if above else m / -most)
    scale = torch.where(scale == 0, 1e-12, scale)
    return ((v / scale).round().clamp(-most + above, most - 1) * scale).flatten(-2)


def asymmetric(w, size):
    v = in_groups(w, size)
    low = v.amin(-1, keepdim=True)
    scale = half((v.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-12)
    return (((v - low) / scale).round().clamp(0, 15) * scale + half(low)).flatten(-2)


def q4_k(w):
    """llama.cpp's format by rounding: scales and least weights of 6 bits in blocks of 256."""
    v = in_groups(w, 32)
    low = v.amin(-1).clamp_max(0)
    scale = (v.amax(-1) - low) / 15

    def six_bits(t):
        block = in_groups(t, 8)
        step = half(block.amax(-1, keepdim=True) / 63).clamp_min(1e-12)
        return ((block / step).round().clamp(0, 63) * step).flatten(-2)[..., None]

    scale, low = six_bits(scale).clamp_min(1e-12), six_bits(-low)
    return (((v + low) / scale).round().clamp(0, 15) * scale - low).flatten(-2)


SCHEMES = {
    "bfloat16 (16 bits)": lambda w: w.bfloat16().float(),
    "8 bits, a scale a row": lambda w: absmax(w, 8, 10**6, 1),
    "8 bits, groups of 64 (8.25)": lambda w: absmax(w, 8, 64, 1),
    "8 bits, groups of 32, as Q8_0 (8.5)": lambda w: absmax(w, 8, 32, 1),
    "4 bits, groups of 64 (4.25)": lambda w: absmax(w, 4, 64),
    "4 bits, groups of 32, as Q4_0 (4.5)": lambda w: absmax(w, 4, 32),
    "4 bits, groups of 32, scale by max / 7": lambda w: absmax(w, 4, 32, 1),
    "4 bits, with an offset, as Q4_1 (5)": lambda w: asymmetric(w, 32),
    "4 bits, as Q4_K by rounding (4.5)": q4_k,
}


def settings():
    torch.manual_seed(0)
    yield (
        "gaussian",
        [torch.randn(s) * 0.02 for s in ((2 * I, H), (H, I))],
        torch.randn(TOKENS, H),
    )
    t5 = torch.distributions.StudentT(5.0)
    x = torch.randn(TOKENS, H)
    x[:, torch.randperm(H)[:OUTLIERS]] *= 20
    yield "heavy tails, outliers", [t5.sample(s) * 0.02 for s in ((2 * I, H), (H, I))], x


def by_float(x, into, down):
    gate, up = (x @ into.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def by_kernels(x, matrices, format, exact):
    from moeprof.backends.tables import LayerMatrices

    made = quantized(LayerMatrices([m[None] for m in matrices]), format)
    made.exact = exact
    return made(x, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))


def layer():
    columns, rows = [], {}
    for what, matrices, x in settings():
        columns.append(what)
        reference = by_float(x.double(), *[m.double() for m in matrices])

        def error(out, reference=reference):
            return float((out.double() - reference).norm() / reference.norm())

        for name, scheme in SCHEMES.items():
            rows.setdefault(name, []).append(error(by_float(x, *map(scheme, matrices))))
        for format in ("q8", "q4"):
            for exact in (True, False):
                activations = "float32" if exact else "8-bit"
                name = f"moeprof {format}, {activations} activations"
                rows.setdefault(name, []).append(error(by_kernels(x, matrices, format, exact)))
    print("| scheme (bits of a weight) |", " | ".join(columns), "|")
    for name, errors in rows.items():
        print(f"| {name} |", " | ".join(f"{e:.2e}" for e in errors), "|", flush=True)


def demo():
    from moeprof import demo, patch
    from moeprof.models.blocks import find_blocks
    from moeprof.texts.windows import heldout_windows

    held = heldout_windows(demo.load()[1], demo.heldout_texts())
    texts = [
        [w.ids for w in held.windows if w.document == number]
        for number in range(len(held.documents))
    ]

    def distributions(format=None, exact=False):
        model = demo.load()[0]
        for block in find_blocks(model) if format else []:
            made = quantized(block.family.readable(block.module)[0], format)
            made.exact = exact
            setattr(block.module, block.family.family.experts_at, made)
        patch(model)
        for windows in texts:
            with torch.inference_mode():
                each = [model(input_ids=w, use_cache=False).logits[0, :-1] for w in windows]
            yield torch.cat(each).log_softmax(-1)

    texts = [windows for windows in texts if windows]
    own = list(distributions())
    draws = np.random.default_rng(0).integers(0, len(own), (2000, len(own)))
    sizes = np.array([len(p) for p in own])
    print(f"{len(own)} documents, {sizes.sum()} tokens")
    for format in ("q8", "q4"):
        for exact in (True, False):
            kl, same = [], []
            for p, other in zip(own, distributions(format, exact), strict=True):
                kl.append(float((p.exp() * (p - other)).sum()))
                same.append(int((p.argmax(-1) == other.argmax(-1)).sum()))
            text = f"{format} {'float32' if exact else '8-bit'} activations:"
            for what, values in (("KL (nats)", np.array(kl)), ("same top-1", np.array(same))):
                again = values[draws].sum(1) / sizes[draws].sum(1)
                low, high = np.percentile(again, [2.5, 97.5])
                text += f"  {what} {values.sum() / sizes.sum():.3e} ({low:.3e} to {high:.3e})"
            print(text, flush=True)


if __name__ == "__main__":
    from moeprof.quantizing.convert import quantized

    {"layer": layer, "demo": demo}[sys.argv[1]]()
