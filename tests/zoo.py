"""Tiny random models of each MoE architecture in transformers, with what is true of them.

E experts, k of them a token, H hidden and I intermediate size of an expert, S of shared experts.
"""

import importlib
from typing import Any, NamedTuple

import torch
from models import V5
from torch import nn

VOCABULARY, H, E, K, INTERMEDIATE, SHARED = 64, 32, 8, 3, 24, 20


class Species(NamedTuple):
    """One architecture; what is True or a number here was counted by hand from its config."""

    folder: str  # transformers.models.<folder>
    model: str
    config: str
    settings: dict[str, Any]
    router: str = "model.layers.{}.mlp.gate"
    layers: tuple[int, ...] = (0, 1)  # those that are MoE layers
    expert_flops: int = 6 * H * INTERMEDIATE
    shared_flops: int = 0
    k: int | None = K
    versions: tuple[int, ...] = (4, 5)


_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=H,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=1,
    bos_token_id=2,
    eos_token_id=0,
    num_experts_per_tok=K,
    initializer_range=0.3,
)
_DEEPSEEK = dict(
    n_routed_experts=E,
    moe_intermediate_size=INTERMEDIATE,
    intermediate_size=40,
    n_group=2,
    topk_group=1,
    n_shared_experts=2,
    first_k_dense_replace=1,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
)
_QWEN = dict(num_experts=E, moe_intermediate_size=INTERMEDIATE, intermediate_size=40)
_QWEN_SHARED = dict(_QWEN, shared_expert_intermediate_size=SHARED)
_LOCAL = dict(num_local_experts=E, intermediate_size=INTERMEDIATE)
_SPARSE = "model.layers.{}.block_sparse_moe."
_ENCODER_DECODER = dict(
    vocab_size=VOCABULARY,
    d_model=H,
    num_experts=E,
    expert_capacity=64,
    pad_token_id=1,
    eos_token_id=0,
    decoder_start_token_id=1,
)

ZOO = {
    "mixtral": Species(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        _LOCAL,
        router=(_SPARSE if not V5 else "model.layers.{}.mlp.") + "gate",
    ),
    "qwen2_moe": Species(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        dict(_QWEN_SHARED, mlp_only_layers=[0]),
        layers=(1,),
        shared_flops=6 * H * SHARED + 2 * H,
    ),
    "qwen3_moe": Species(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        dict(_QWEN, norm_topk_prob=True),
    ),
    "qwen3_next": Species(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        dict(
            _QWEN_SHARED,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        shared_flops=6 * H * SHARED + 2 * H,
    ),
    "olmoe": Species(
        "olmoe",
        "OlmoeForCausalLM",
        "OlmoeConfig",
        dict(num_experts=E, intermediate_size=INTERMEDIATE),
    ),
    "flex_olmo": Species(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        "FlexOlmoConfig",
        dict(num_experts=E, intermediate_size=INTERMEDIATE),
    ),
    "deepseek_v2": Species(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        dict(_DEEPSEEK, topk_method="greedy"),
        layers=(1,),
        shared_flops=6 * H * 2 * INTERMEDIATE,
    ),
    "deepseek_v3": Species(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _DEEPSEEK,
        layers=(1,),
        shared_flops=6 * H * 2 * INTERMEDIATE,
    ),
    "glm4_moe": Species(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        _DEEPSEEK,
        layers=(1,),
        shared_flops=6 * H * 2 * INTERMEDIATE,
    ),
    "gpt_oss": Species(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        _LOCAL,
        router="model.layers.{}.mlp.router",
    ),
    "granitemoe": Species(
        "granitemoe",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        _LOCAL,
        router=_SPARSE + "router",
    ),
    "granitemoeshared": Species(
        "granitemoeshared",
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        dict(_LOCAL, shared_intermediate_size=SHARED),
        router=_SPARSE + "router",
        shared_flops=6 * H * SHARED,
    ),
    "jetmoe": Species(
        "jetmoe",
        "JetMoeForCausalLM",
        "JetMoeConfig",
        dict(_LOCAL, kv_channels=8, num_key_value_heads=2, num_attention_heads=2 * K),
        router="model.layers.{}.mlp.router",
    ),
    "dbrx": Species(
        "dbrx",
        "DbrxForCausalLM",
        "DbrxConfig",
        dict(
            d_model=H,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            vocab_size=VOCABULARY,
            ffn_config=dict(
                ffn_hidden_size=INTERMEDIATE,
                moe_num_experts=E,
                moe_top_k=K,
                **(dict(hidden_size=H) if V5 else {}),
            ),
            attn_config=dict(kv_n_heads=4, clip_qkv=8.0, rope_theta=10000.0),
        ),
        router="transformer.blocks.{}.ffn.router",
    ),
    "jamba": Species(
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        dict(
            num_experts=E,
            intermediate_size=INTERMEDIATE,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
        router="model.layers.{}.feed_forward.router",
        layers=(1,),
    ),
    "phimoe": Species(
        "phimoe",
        "PhimoeForCausalLM",
        "PhimoeConfig",
        dict(_LOCAL, num_experts_per_tok=2),
        k=2,
        router="model.layers.{}.mlp.router" if V5 else _SPARSE + "gate",
    ),
    "llama4": Species(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        dict(_LOCAL, num_experts_per_tok=1, intermediate_size_mlp=40, moe_layers=[1]),
        k=1,
        router="model.layers.{}.feed_forward.router",
        layers=(1,),
        shared_flops=6 * H * INTERMEDIATE,
    ),
    "ernie4_5_moe": Species(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        dict(
            moe_num_experts=E,
            moe_k=K,
            moe_intermediate_size=INTERMEDIATE,
            intermediate_size=40,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
        ),
        layers=(1,),
        shared_flops=6 * H * 2 * INTERMEDIATE,
    ),
    "hunyuan_v1_moe": Species(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        "HunYuanMoEV1Config",
        dict(num_experts=E, moe_topk=K, intermediate_size=INTERMEDIATE),
        shared_flops=6 * H * INTERMEDIATE,
    ),
    "minimax": Species(
        "minimax",
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        dict(_LOCAL, block_size=16),
        router=(_SPARSE if not V5 else "model.layers.{}.mlp.") + "gate",
    ),
    "lfm2_moe": Species(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        dict(
            num_experts=E,
            moe_intermediate_size=INTERMEDIATE,
            intermediate_size=40,
            num_dense_layers=1,
            layer_types=["conv", "full_attention"],
            use_expert_bias=True,
        ),
        router="model.layers.{}.feed_forward.gate",
        layers=(1,),
        versions=(5,),
    ),
    "aria": Species(
        "aria",
        "AriaTextForCausalLM",
        "AriaTextConfig",
        dict(
            moe_num_experts=E, moe_topk=K, moe_num_shared_experts=2, intermediate_size=INTERMEDIATE
        ),
        router="model.layers.{}.mlp.router",
        shared_flops=6 * H * 2 * INTERMEDIATE,
    ),
    "qwen3_vl_moe": Species(
        "qwen3_vl_moe",
        "Qwen3VLMoeTextModel",
        "Qwen3VLMoeTextConfig",
        _QWEN if V5 else dict(_QWEN, rope_scaling=dict(rope_type="default")),
        router="layers.{}.mlp.gate",
    ),
    "gemma4": Species(
        "gemma4",
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        dict(
            num_experts=E,
            top_k_experts=K,
            moe_intermediate_size=INTERMEDIATE,
            intermediate_size=40,
            enable_moe_block=True,
            vocab_size_per_layer_input=VOCABULARY,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            global_head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        router="model.layers.{}.router",
        versions=(5,),
    ),
    "switch_transformers": Species(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        dict(
            _ENCODER_DECODER,
            d_kv=8,
            d_ff=INTERMEDIATE,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            initializer_factor=3.0,
        ),
        k=None,
        expert_flops=4 * H * INTERMEDIATE,
    ),
    "nllb_moe": Species(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        "NllbMoeConfig",
        dict(
            _ENCODER_DECODER,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=INTERMEDIATE,
            decoder_ffn_dim=INTERMEDIATE,
            encoder_sparse_step=2,
            decoder_sparse_step=2,
            init_std=0.3,
        ),
        k=None,
        expert_flops=4 * H * INTERMEDIATE,
    ),
}
_ENCODER_DECODERS = {
    "switch_transformers": [
        "encoder.block.1.layer.1.mlp.router",
        "decoder.block.1.layer.2.mlp.router",
    ],
    "nllb_moe": ["model.encoder.layers.1.ffn.router", "model.decoder.layers.1.ffn.router"],
}

HERE = [name for name, species in ZOO.items() if (5 if V5 else 4) in species.versions]


def router_names(name: str) -> list[str]:
    species = ZOO[name]
    if name in _ENCODER_DECODERS:
        return _ENCODER_DECODERS[name]
    names = [species.router.format(number) for number in species.layers]
    if name == "jetmoe":  # its attention is a mixture of experts too
        attention = [f"model.layers.{n}.self_attention.experts.router" for n in species.layers]
        pairs = zip(names, attention, strict=True) if V5 else zip(attention, names, strict=True)
        names = [name for pair in pairs for name in pair]
    return names


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """`changes`: settings in place of the species' own."""
    species = ZOO[name]
    folder = f"transformers.models.{species.folder}."
    config_module = importlib.import_module(f"{folder}configuration_{species.folder}")
    module = importlib.import_module(f"{folder}modeling_{species.folder}")
    common = {} if name in ("dbrx", *_ENCODER_DECODERS) else _COMMON
    config = getattr(config_module, species.config)(**{**common, **species.settings, **changes})
    torch.manual_seed(seed)
    model = getattr(module, species.model)(config).eval()
    for site_name in router_names(name):  # some start at zero: every choice would be a tie
        for parameter in model.get_submodule(site_name).parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.5)
    return model


def inputs(name: str, rows: int = 2, columns: int = 9) -> dict[str, torch.Tensor]:
    """Tokens that all differ, so that a row of hidden states shows which it is."""
    order = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(1))
    ids = order[: rows * columns].view(rows, columns) + 3
    given = {"input_ids": ids}
    if name in _ENCODER_DECODERS:
        given["decoder_input_ids"] = ids[:, :5]
    return given
