"""A whole OLMoE in the formats of llama.cpp, as llama-cpp-python runs it.

The file is written with llama.cpp's own package for it, gguf, under the names that its converter
gives to the weights of OLMoE.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .llama import F32, quantized_rows

# {name in a block of transformers: in one of llama.cpp}
_OF_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Kinds(NamedTuple):
    """ggml's types of the experts, and of the other matrices."""

    experts: int
    others: int


def save_gguf(model: Any, path: Path, kinds: Kinds) -> None:
    """Write an OlmoeForCausalLM; gates and vectors stay float32, as llama.cpp has them."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "olmoe")
    frequencies = model.model.rotary_emb.inv_freq
    writer.add_context_length(4096)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(float(frequencies[1]) ** -len(frequencies))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in _weights(model):
        kind = kinds.experts if weight.dim() == 3 else kinds.others
        if weight.dim() == 1 or "ffn_gate_inp" in name:
            kind = F32
        tensor = weight.float() if kind == F32 else quantized_rows(weight, kind)
        writer.add_tensor(name, tensor.numpy(), raw_dtype=gguf.GGMLQuantizationType(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(name in llama.cpp, weight)."""
    for ours, name in _OTHERS.items():
        yield f"{name}.weight", model.get_submodule(ours).weight.detach()
    for number, block in enumerate(model.model.layers):
        for ours, name in _OF_BLOCK.items():
            yield f"blk.{number}.{name}.weight", block.get_submodule(ours).weight.detach()
        for name, matrices in _experts(block.mlp.experts).items():
            yield f"blk.{number}.ffn_{name}_exps.weight", matrices


def _experts(experts: Any) -> dict[str, Tensor]:
    """{name: (E, N, K)}, of a module of transformers 5 or a list of 4.57."""
    if hasattr(experts, "gate_up_proj"):
        gate, up = experts.gate_up_proj.detach().chunk(2, 1)
        return {"gate": gate, "up": up, "down": experts.down_proj.detach()}
    return {
        name: torch.stack([getattr(expert, f"{name}_proj").weight.detach() for expert in experts])
        for name in ("gate", "up", "down")
    }


class LlamaModel:
    """A model of llama.cpp, and what it has cached."""

    def __init__(self, path: Path, cached: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._llama: Any = Llama(
            str(path), n_ctx=cached + 8, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def fill(self, ids: Tensor) -> None:
        """Cache these tokens, and no others; ids: (n,)."""
        self._llama.reset()
        self._llama.eval(ids.tolist())
        self._cached = len(ids)

    def step(self, token: int) -> Tensor:
        """The logits (V,) after one token more than is cached; that stays as it was."""
        self._llama.n_tokens = self._cached  # what is behind is overwritten
        self._llama.eval([token])
        logits = np.ctypeslib.as_array(self._llama._ctx.get_logits(), (self._llama.n_vocab(),))
        return torch.from_numpy(logits.copy())
