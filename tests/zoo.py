"""Tiny random models of each MoE architecture in transformers, with what is true of them.

E experts, k of them a token, H hidden and I intermediate size of an expert, S of shared experts.
"""

import importlib
from typing import Any, NamedTuple

import torch
from models import V5
from torch import nn

VOCABULARY, H, E, K, INTERMEDIATE, SHARED = 64, 32, 8, 3, 24, 20
EXPERT = 6 * H * INTERMEDIATE  # FLOPs a token


class Species(NamedTuple):
    """One architecture; what is True or a number here was counted by hand from its config."""

    name: str  # of its classes, which end in `model` and `config`
    settings: dict[str, Any]
    router: str = "model.layers.{}.mlp.gate"
    layers: tuple[int, ...] = (0, 1)  # those that are MoE layers
    expert_flops: int = EXPERT
    shared_flops: int = 0
    k: int | None = K
    versions: tuple[int, ...] = (4, 5)
    model: str = "ForCausalLM"
    config: str = "Config"


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
QWEN_LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=2,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
)
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
        "Mixtral",
        _LOCAL,
        router=(_SPARSE if not V5 else "model.layers.{}.mlp.") + "gate",
    ),
    "qwen2_moe": Species(
        "Qwen2Moe",
        dict(_QWEN_SHARED, mlp_only_layers=[0]),
        layers=(1,),
        shared_flops=6 * H * SHARED + 2 * H,
    ),
    "qwen3_moe": Species("Qwen3Moe", dict(_QWEN, norm_topk_prob=True)),
    "qwen3_next": Species(
        "Qwen3Next",
        _QWEN_SHARED | QWEN_LINEAR,
        shared_flops=6 * H * SHARED + 2 * H,
    ),
    "olmoe": Species("Olmoe", dict(num_experts=E, intermediate_size=INTERMEDIATE)),
    "flex_olmo": Species("FlexOlmo", dict(num_experts=E, intermediate_size=INTERMEDIATE)),
    "deepseek_v2": Species(
        "DeepseekV2",
        dict(_DEEPSEEK, topk_method="greedy"),
        layers=(1,),
        shared_flops=2 * EXPERT,
    ),
    "deepseek_v3": Species("DeepseekV3", _DEEPSEEK, layers=(1,), shared_flops=2 * EXPERT),
    "glm4_moe": Species("Glm4Moe", _DEEPSEEK, layers=(1,), shared_flops=2 * EXPERT),
    "gpt_oss": Species("GptOss", _LOCAL, router="model.layers.{}.mlp.router"),
    "granitemoe": Species("GraniteMoe", _LOCAL, router=_SPARSE + "router"),
    "granitemoeshared": Species(
        "GraniteMoeShared",
        dict(_LOCAL, shared_intermediate_size=SHARED),
        router=_SPARSE + "router",
        shared_flops=6 * H * SHARED,
    ),
    "jetmoe": Species(
        "JetMoe",
        dict(_LOCAL, kv_channels=8, num_key_value_heads=2, num_attention_heads=2 * K),
        router="model.layers.{}.mlp.router",
    ),
    "dbrx": Species(
        "Dbrx",
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
        "Jamba",
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
        "Phimoe",
        dict(_LOCAL, num_experts_per_tok=2),
        k=2,
        router="model.layers.{}.mlp.router" if V5 else _SPARSE + "gate",
    ),
    "llama4": Species(
        "Llama4",
        dict(_LOCAL, num_experts_per_tok=1, intermediate_size_mlp=40, moe_layers=[1]),
        k=1,
        router="model.layers.{}.feed_forward.router",
        layers=(1,),
        shared_flops=EXPERT,
        config="TextConfig",
    ),
    "ernie4_5_moe": Species(
        "Ernie4_5_Moe",
        dict(
            moe_num_experts=E,
            moe_k=K,
            moe_intermediate_size=INTERMEDIATE,
            intermediate_size=40,
            moe_num_shared_experts=2,
            moe_layer_start_index=1,
        ),
        layers=(1,),
        shared_flops=2 * EXPERT,
    ),
    "hunyuan_v1_moe": Species(
        "HunYuanMoEV1",
        dict(num_experts=E, moe_topk=K, intermediate_size=INTERMEDIATE),
        shared_flops=EXPERT,
    ),
    "minimax": Species(
        "MiniMax",
        dict(_LOCAL, block_size=16),
        router=(_SPARSE if not V5 else "model.layers.{}.mlp.") + "gate",
    ),
    "lfm2_moe": Species(
        "Lfm2Moe",
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
        "AriaText",
        dict(
            moe_num_experts=E, moe_topk=K, moe_num_shared_experts=2, intermediate_size=INTERMEDIATE
        ),
        router="model.layers.{}.mlp.router",
        shared_flops=2 * EXPERT,
    ),
    "qwen3_vl_moe": Species(
        "Qwen3VLMoeText",
        _QWEN if V5 else dict(_QWEN, rope_scaling=dict(rope_type="default")),
        router="layers.{}.mlp.gate",
        model="Model",
    ),
    "gemma4": Species(
        "Gemma4",
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
        config="TextConfig",
    ),
    "switch_transformers": Species(
        "SwitchTransformers",
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
        model="ForConditionalGeneration",
    ),
    "nllb_moe": Species(
        "NllbMoe",
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
        model="ForConditionalGeneration",
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
    folder = f"transformers.models.{name}."
    config_module = importlib.import_module(f"{folder}configuration_{name}")
    module = importlib.import_module(f"{folder}modeling_{name}")
    common = {} if name in ("dbrx", *_ENCODER_DECODERS) else _COMMON
    config_class = getattr(config_module, species.name + species.config)
    config = config_class(**{**common, **species.settings, **changes})
    torch.manual_seed(seed)
    model = getattr(module, species.name + species.model)(config).eval()
    modules = dict(model.named_modules())
    for site_name in router_names(name):  # some start at zero: every choice would be a tie
        if site_name in modules:  # `changes` may leave a layer without experts
            for parameter in modules[site_name].parameters():
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
