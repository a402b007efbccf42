"""Train the demo model: a small real OLMoE (64 experts, top-8) on four kinds of text.

    python -m moeprof.demo.make.train --text DIR [--out DIR] [--minutes M | --steps N] [--resume]

DIR holds one entry a domain, made from Debian 12 packages with these commands
(`apt-get download PACKAGE`, then `dpkg -x FILE.deb raw` for each of the packages):

    bible    bible-kjv-text, read with the program of bible-kjv; the text is in the public domain
             cd raw/usr/lib && ../bin/bible -l100000 gen1:1-rev22:21 > DIR/bible.txt
    jargon   jargon-text: the Jargon File 4.4.7, public domain
             zcat raw/usr/share/doc/jargon-text/jargon.txt.gz > DIR/jargon.txt
    docs     python3.11-doc: the reST sources of Python's manual, PSF licence
             cp -r raw/usr/share/doc/python3.11/html/_sources DIR/docs
    code     libpython3.11-minimal and libpython3.11-stdlib: Python's library, PSF licence
             cp -rL raw/usr/lib/python3.11 DIR/code

The text is split by document before anything is trained: 32 documents a domain for calibration and
32 for the held-out evaluation, cut to 5 kB each; no piece of such a document is trained on.

--out receives model/ (the hub's OLMoE format, bf16), data/ and checkpoint.pt. Copy model/ and data/
over this folder to ship another model. The order of the data is a function of seed and step alone,
so that --resume goes on exactly where the checkpoint was. --steps may be changed on resume: the
learning rate stays at its peak until the last half, so a run can be ended early and still decay.
SIGTERM writes a checkpoint and stops; --export only exports the checkpoint that is there.
With glibc, MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000 in the environment
makes it a quarter faster: the large activations are then not mapped anew in every step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cli.options import MOST_THREADS, integer
from ...files import write_whole
from ...show.console import make_console, progress
from ...texts.documents import Document
from .corpus import DOMAINS, read_text, split, write_jsonl
from .evaluation import WINDOW, evaluate, gini

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


EOS, PAD = "<|endoftext|>", "<|padding|>"
VOCAB = 4096
BATCH = 8

PEAK_LR = 3e-3
WARMUP_STEPS = 200
DECAY_SHARE = 0.5
BALANCE_COEF = 0.01  # this and the next as in OLMoE (arXiv 2409.02060)
Z_COEF = 0.001
LOG_EVERY = 50
SAVE_SECONDS = 180

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "router_aux_loss_coef": BALANCE_COEF,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    # 0.02 is meant for widths in the thousands; at 96 it starts with logits near zero.
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(training: Mapping[str, list[Document]]) -> Any:
    """A byte-level BPE; each domain gives at most 4 MB, so that the large ones don't own it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = []
    for domain in DOMAINS:
        size = 0
        for document in training[domain]:
            if size > 4_000_000:
                break
            sample.append(document.text[:40_000])
            size += len(sample[-1])
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Any, documents: Iterable[Document]) -> NDArray[np.int64]:
    """One stream of token ids: eos before every document, as text starts without any other mark."""
    import numpy as np

    eos = tokenizer.token_to_id(EOS)
    pieces = []
    for encoding in tokenizer.encode_batch([d.text for d in documents]):
        pieces += [[eos], encoding.ids]
    return np.concatenate([np.asarray(p, dtype=np.int64) for p in pieces])


class Windows:
    """Random windows of the training text; batch `step` depends on (seed, step) only."""

    def __init__(self, streams: Sequence[NDArray[np.int64]], seed: int) -> None:
        import numpy as np

        self.streams, self.seed = streams, seed
        # Below proportional: the small domains are seen more often than their size says.
        weights = np.array([len(s) for s in streams], dtype=float) ** 0.7
        self.weights = weights / weights.sum()

    def __call__(self, step: int) -> Tensor:
        import numpy as np
        import torch

        rng = np.random.default_rng((self.seed, step))
        rows = []
        for domain in rng.choice(len(self.streams), size=BATCH, p=self.weights):
            stream = self.streams[domain]
            start = rng.integers(0, len(stream) - WINDOW + 1)
            rows.append(stream[start : start + WINDOW])
        return torch.from_numpy(np.stack(rows))


# --- model and losses ---------------------------------------------------------------------------


def make_config(vocab: int) -> Any:
    """OLMoE's architecture at 4.5 million parameters."""
    from transformers import OlmoeConfig

    return OlmoeConfig(**ARCHITECTURE, vocab_size=vocab)


def make_model(config: Any) -> Any:
    """A new model in fp32, with the fast experts where this transformers has them (5.x)."""
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM(config).float()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")
    return model


def router_losses(router_logits: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(load-balance loss, z-loss, load [layers, experts]), the losses averaged over the layers.

    E · Σ_e f_e · P_e with f the share of the selections and P the mean probability (Switch,
    arXiv 2101.03961): 1 when balanced (transformers counts k times that). Taken layer by layer:
    transformers' own loss pools all layers first, so that an imbalance in one layer can hide behind
    the opposite one in another.
    """
    import torch

    balance, z, loads = torch.tensor(0.0), torch.tensor(0.0), []
    for logits in router_logits:
        experts = logits.shape[-1]
        probabilities = torch.softmax(logits.float(), dim=-1)
        chosen = probabilities.detach().topk(k, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        balance = balance + experts * (load * probabilities.mean(dim=0)).sum()
        z = z + torch.logsumexp(logits.float(), dim=-1).square().mean()
        loads.append(load)
    return balance / len(loads), z / len(loads), torch.stack(loads)


def losses(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """(cross entropy, load balance, z-loss, load) of one batch [B, window]."""
    import torch

    out = model.model(input_ids=ids, output_router_logits=True, use_cache=False)
    hidden = out.last_hidden_state[:, :-1].flatten(0, 1)
    entropy = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:].flatten())
    return entropy, *router_losses(out.router_logits, model.config.num_experts_per_tok)


def make_optimizer(model: Any) -> Any:
    import torch

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, constant, linear to zero over the last half: independent of `steps` until then."""
    warm = min(WARMUP_STEPS, max(1, steps // 10))
    left = (steps - step) / max(1.0, DECAY_SHARE * steps)
    return PEAK_LR * max(0.0, min((step + 1) / warm, 1.0, left))


# --- training -----------------------------------------------------------------------------------


class Run:
    """Model, optimizer, step and curve: what a checkpoint holds."""

    def __init__(self, config: Any, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        self.model = make_model(config)
        self.optimizer = make_optimizer(self.model)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []

    def save(self, path: Path) -> None:
        import torch

        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
        }
        part = path.with_name(path.name + ".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        import torch

        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]

    def advance(self, windows: Windows, steps: int) -> tuple[Tensor, ...]:
        """One step of the optimizer; (cross entropy, balance, z, load) as tensors."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps)
        entropy, balance, z, load = losses(self.model, windows(self.step))
        (entropy + BALANCE_COEF * balance + Z_COEF * z).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return entropy.detach(), balance.detach(), z.detach(), load


class Stop:
    """True once SIGTERM came: the loop then ends after its step, with a checkpoint."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *_: object) -> None:
        self.asked = True

    def __bool__(self) -> bool:
        return self.asked


def curve_point(
    step: int, recent: Sequence[tuple[Tensor, ...]], bytes_per_token: float, seconds: float
) -> dict[str, Any]:
    """What the curve records of the last steps, (entropy, balance, z, load) each."""
    import torch

    means = [torch.stack(part).mean(dim=0) for part in zip(*recent, strict=True)]
    entropy, balance, z, load = means
    return {
        "step": step,
        "loss": round(entropy.item(), 4),
        "bits_per_byte": round(entropy.item() / math.log(2) / bytes_per_token, 4),
        "balance": round(balance.item(), 4),
        "z": round(z.item(), 4),
        "gini": [round(gini(layer), 3) for layer in load.numpy()],
        "tokens_per_s": round(BATCH * WINDOW * len(recent) / seconds),
    }


def train(
    run: Run,
    windows: Windows,
    steps: int,
    checkpoint: Path,
    bytes_per_token: float,
    stop: Stop | bool = False,
) -> None:
    """Advance `run` to `steps`; a point of the curve every LOG_EVERY steps."""
    run.model.train()
    recent, started, saved = [], time.monotonic(), time.monotonic()
    with progress(make_console(), steps - run.step, "training", "steps") as bar:
        while run.step < steps and not stop:
            recent.append(run.advance(windows, steps))
            bar.step()
            now = time.monotonic()
            if run.step % LOG_EVERY == 0 or run.step == steps:
                point = curve_point(run.step, recent, bytes_per_token, now - started)
                run.curve.append(point)
                run.seconds += now - started
                recent, started = [], now
                bar.note(f"loss {point['loss']:.3f}, {point['tokens_per_s']:.0f} tokens/s")
            if now - saved > SAVE_SECONDS:
                run.save(checkpoint)
                saved = now
    run.save(checkpoint)


def steps_for(minutes: float, run: Run, windows: Windows) -> int:
    """How many steps fit into `minutes`, from twelve timed steps on a copy that is thrown away."""
    import copy

    trial = copy.copy(run)
    trial.model = copy.deepcopy(run.model)
    trial.optimizer = make_optimizer(trial.model)
    for i in range(12):
        if i == 2:
            started = time.monotonic()
        trial.advance(windows, 10**6)
    return max(1, int(minutes * 60 / ((time.monotonic() - started) / 10)))


# --- export -------------------------------------------------------------------------------------

# Both files are written by hand, in the form that transformers 4.57 reads and 5.x still does. 5.x
# itself writes a rope theta that 4.57 silently ignores, and a tokenizer class that it doesn't have.
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "left",
    "model_max_length": ARCHITECTURE["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "eos_token": EOS,
    "pad_token": PAD,
}


def hub_config(vocab: int) -> dict[str, Any]:
    """config.json as a dict."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        **ARCHITECTURE,
        "vocab_size": vocab,
        "torch_dtype": "bfloat16",
    }


def hub_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The hub's names and shapes, three matrices an expert, in bf16.

    transformers 5.x holds a layer's experts as two tensors, gate_up_proj [E,2I,H] and down_proj
    [E,H,I]; the state of 4.57 has the hub's names already.
    """
    import torch

    weights = {}
    for name, tensor in state.items():
        experts, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                weights[f"{experts}.{e}.gate_proj.weight"] = gate
                weights[f"{experts}.{e}.up_proj.weight"] = up
        elif part == "down_proj":
            for e, down in enumerate(tensor):
                weights[f"{experts}.{e}.down_proj.weight"] = down
        else:
            weights[name] = tensor
    return {name: w.to(torch.bfloat16).contiguous() for name, w in sorted(weights.items())}


def export(model: Any, folder: Path) -> None:
    """Write config, tokenizer settings and weights into `folder` (tokenizer.json is there)."""
    from safetensors.torch import save

    special = {"eos_token": EOS, "pad_token": PAD}
    generation = {"eos_token_id": 0, "pad_token_id": 1}
    write_json(folder / "config.json", hub_config(model.config.vocab_size))
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    write_json(folder / "special_tokens_map.json", special)
    data = save(hub_weights(model.state_dict()), metadata={"format": "pt"})
    write_whole(folder / "model.safetensors", data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One line a key, so that a loss curve isn't a thousand lines."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value[key])}" for key in value)
    write_whole(path, f"{{\n{lines}\n}}\n".encode())


def finish(run: Run, out: Path, seed: int) -> dict[str, Any]:
    """Export `run` to OUT/model, load that as users do, evaluate it, write training.json."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = out / "model"
    export(run.model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with open(out / "data" / "heldout.jsonl", encoding="utf-8") as lines:
        heldout = [Document(**json.loads(line)) for line in lines]
    record = {
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "steps": run.step,
        "tokens": run.step * BATCH * WINDOW,
        "minutes": round(run.seconds / 60, 1),
        "heldout": evaluate(model, tokenizer, heldout),
        "curve": {key: [point[key] for point in run.curve] for key in run.curve[0]},
    }
    write_json(folder / "training.json", record)
    return record


# --- command line -------------------------------------------------------------------------------


def prepare(text: Path, out: Path, seed: int) -> tuple[list[NDArray[np.int64]], float]:
    """Write OUT/data and the tokenizer; (a stream of token ids a domain, bytes per token)."""
    from tokenizers import Tokenizer

    training, calibration, heldout = split(read_text(text), seed)
    write_jsonl(out / "data" / "calibration.jsonl", calibration)
    write_jsonl(out / "data" / "heldout.jsonl", heldout)
    path = out / "model" / "tokenizer.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, train_tokenizer(training).to_str().encode())
    tokenizer = Tokenizer.from_file(str(path))
    streams = [encode(tokenizer, training[domain]) for domain in DOMAINS]
    size = sum(len(d.text.encode()) for documents in training.values() for d in documents)
    return streams, size / sum(map(len, streams))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moeprof.demo.make.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, help="folder with the four domains")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="default: demo-out")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=60, help="default: 60, measured first")
    length.add_argument("--steps", type=int, help="instead of --minutes; reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=integer(1, MOST_THREADS), default=os.cpu_count())
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--export", action="store_true", help="OUT/checkpoint.pt as it is")
    args = parser.parse_args(argv)
    if args.text is None and not args.export:
        parser.error("--text is needed to train")
    return args


def open_run(args: argparse.Namespace) -> Run:
    """A new run, or the one in the checkpoint."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.out / "model" / "tokenizer.json"))
    run = Run(make_config(tokenizer.get_vocab_size()), args.seed)
    if args.resume or args.export:
        run.restore(args.out / "checkpoint.pt")
    return run


def main(argv: list[str] | None = None) -> None:
    import torch

    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.export:
        run = open_run(args)
    else:
        streams, bytes_per_token = prepare(args.text, args.out, args.seed)
        run, windows = open_run(args), Windows(streams, args.seed)
        steps = args.steps or run.step + steps_for(args.minutes, run, windows)
        sizes = ", ".join(f"{d} {len(s):,}" for d, s in zip(DOMAINS, streams, strict=True))
        print(f"tokens: {sizes}; steps {run.step} to {steps}", flush=True)
        train(run, windows, steps, args.out / "checkpoint.pt", bytes_per_token, Stop())
    print(json.dumps(finish(run, args.out, args.seed)["heldout"], indent=2))


if __name__ == "__main__":
    main()
