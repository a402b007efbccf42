"""Write a random model of OLMoE-1B-7B's exact shape to a folder: 13.8 GB, with little memory.

    python tests/make_olmoe_shape.py FOLDER

Names and files are as those of the real checkpoint: a matrix for each expert, several files with
an index, bfloat16. `tests/load_olmoe_shape.py` loads it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig

LAYERS, EXPERTS, HIDDEN, INTERMEDIATE, VOCABULARY = 16, 64, 2048, 1024, 50304
SHARD_BYTES = 10**9  # all that lies in memory at a time


def config() -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        norm_topk_prob=False,
        max_position_embeddings=4096,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=50279,
        architectures=["OlmoeForCausalLM"],
    )


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for number in range(LAYERS):
        layer = f"model.layers.{number}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{name}.weight", (HIDDEN,)
        for name in "qkvo":
            yield f"{layer}self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)
        for name in "qk":
            yield f"{layer}self_attn.{name}_norm.weight", (HIDDEN,)
        yield f"{layer}mlp.gate.weight", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name in ("gate_proj", "up_proj"):
                yield f"{layer}mlp.experts.{expert}.{name}.weight", (INTERMEDIATE, HIDDEN)
            yield f"{layer}mlp.experts.{expert}.down_proj.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Ones for a norm; weights of a size at which hidden states keep theirs."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    numbers = torch.empty(shape, dtype=torch.bfloat16)
    return numbers.normal_(0, shape[-1] ** -0.5, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes():
        own = 2 * torch.Size(shape).numel()
        if size + own > SHARD_BYTES:
            files.append({})
            size = 0
        files[-1][name] = shape
        size += own
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, wanted in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        made = {name: tensor(shape, generator) for name, shape in wanted.items()}
        save_file(made, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(wanted, file))
        print(file, flush=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    made_config = config()
    made_config.dtype = torch.bfloat16
    made_config.save_pretrained(folder)


if __name__ == "__main__":
    main()
