"""The families of MoE blocks that `moeprof.patch` knows, a record each.

To add one: a record here; the tests find its models by themselves (tests/every.py). `GateRule` in
rules.py says what a rule may name; a gate that doesn't do what its record says keeps its own
choice.
"""

import sys
from dataclasses import replace
from functools import cache

from torch import nn

from .base import Family, Layout
from .listed import Listed
from .packed import Packed
from .paired import Paired
from .rules import GateRule
from .transposed import Aria, GptOss

# ---- rules that several families share ----

SOFTMAX = GateRule(renormalises="norm_topk_prob")
SOFTMAX_SCALED = GateRule()  # always to sum 1
SOFTMAX_FLOAT = GateRule(rounds=False)
SOFTMAX_PLAIN = GateRule(renormalises=False)
# Of DeepSeek-V3: sigmoid, a bias that balances the load, groups by their two best experts.
SIGMOID_GROUPS = GateRule(
    affinity="sigmoid",
    renormalises="norm_topk_prob",
    bias="e_score_correction_bias",
    groups=("num_group|n_group", "topk_group"),
    epsilon=1e-20,
    scale="routed_scaling_factor",
    rounds=False,
    logits="float32",
)
# Of DeepSeek-V2: softmax, groups by their best expert.
SOFTMAX_GROUPS = GateRule(
    renormalises=False,
    groups=("num_group|n_group", "topk_group"),
    groups_if=("topk_method", "group_limited_greedy"),
    best=1,
    scale="routed_scaling_factor",
    rounds=False,
    logits="float32",
)
# Of Ernie 4.5: softmax, a bias in a module of its own.
SOFTMAX_BIAS = GateRule(
    bias="moe_statics.e_score_correction_bias", floor="norm_min", logits="float32"
)
# The block keeps the bias and gives it to its gate.
SIGMOID_GIVEN = GateRule(
    affinity="sigmoid",
    bias="block.e_score_correction_bias",
    takes=("block.e_score_correction_bias",),
    rounds=False,
)
SIGMOID_GIVEN_SCALED = replace(
    SIGMOID_GIVEN, epsilon=1e-20, scale="router_scaling_factor", logits="float32"
)
SIGMOID_SCORE_FN = GateRule(
    affinity="score_fn",
    bias="e_score_correction_bias",
    epsilon=1e-20,
    scale="routed_scaling_factor",
    rounds=False,
)

SPARSEMIXER = GateRule(
    affinity="sparsemixer", top_k=2, renormalises=False, jitter="router_jitter_noise"
)

_ROUTER = "router"  # the attribute of a block that holds its gate, where that isn't "gate"

FAMILIES = (
    # softmax, top-k
    *(
        Family(
            name, SOFTMAX, fused=True, blocks=(f"{prefix}SparseMoeBlock",), expert=f"{prefix}MLP"
        )
        for name, prefix in (
            ("olmoe", "Olmoe"),
            ("flex_olmo", "FlexOlmo"),
            ("qwen3_moe", "Qwen3Moe"),
        )
    ),
    Family("mellum", SOFTMAX, fused=True),
    *(
        Family(name, SOFTMAX, blocks=(f"{prefix}SparseMoeBlock",), expert=f"{prefix}MLP")
        for name, prefix in (("qwen2_moe", "Qwen2Moe"), ("qwen3_next", "Qwen3Next"))
    ),
    *(Family(name, SOFTMAX) for name in ("qwen3_omni_moe", "qwen4_exp")),
    *(Family(name, SOFTMAX_SCALED) for name in ("qwen3_5_moe", "qwen3_vl_moe")),
    *(
        Family(
            name,
            SOFTMAX_FLOAT,
            fused="jitter_noise",
            blocks=(f"{prefix}SparseMoeBlock",),
            expert=f"{prefix}BlockSparseTop2MLP",
            projections=("w1", "w3", "w2"),
        )
        for name, prefix in (("mixtral", "Mixtral"), ("minimax", "MiniMax"))
    ),
    Family(
        "jamba",
        SOFTMAX_PLAIN,
        _ROUTER,
        fused=True,
        blocks=("JambaSparseMoeBlock",),
        expert="JambaMLP",
    ),
    Family("lara_mini", GateRule(renormalises="norm_topk_prob", logits="float32")),
    Family("hunyuan_v1_moe", GateRule(logits="", weight="wg.weight"), config_top_k="moe_topk"),
    # top-k, then a softmax of these: the same as softmax, top-k, to sum 1
    *(
        Family(name, SOFTMAX_SCALED, _ROUTER, fused=True)
        for name in ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared")
    ),
    *(
        Family(
            name,
            GateRule(weight="layer.weight"),
            _ROUTER,
            experts_at="",
            blocks=(f"{prefix}MoE",),
            expert=f"{prefix}ParallelExperts",
        )
        for name, prefix in (
            ("granitemoe", "GraniteMoe"),
            ("granitemoehybrid", "GraniteMoeHybrid"),
            ("granitemoeshared", "GraniteMoeShared"),
        )
    ),
    Family("gpt_oss", SOFTMAX_SCALED, _ROUTER, blocks=("GptOssMLP",)),
    Family("aria", SOFTMAX_SCALED, _ROUTER, config_top_k="moe_topk"),
    Family(
        "aria",
        GateRule(top_k="config.moe_topk"),
        _ROUTER,
        blocks=("AriaTextMoELayer",),
        logged=False,
    ),
    Family("cohere2_moe", GateRule(affinity="expert_selection_fn", renormalises=True)),
    Family(
        "openai_privacy_filter",
        GateRule(scale="1/top_k", rounds=False, logits="float32"),
        _ROUTER,
    ),
    # softmax, with groups or a bias or a scale for each expert
    Family(
        "deepseek_v2",
        SOFTMAX_GROUPS,
        blocks=("DeepseekV2Moe", "DeepseekV2MoE"),
        expert="DeepseekV2MLP",
        logged=False,
    ),
    *(Family(name, SOFTMAX_GROUPS) for name in ("deepseek_ocr2", "unlimited_ocr")),
    *(
        Family(
            name,
            GateRule(
                renormalises=scaled,
                groups=("num_group|n_group", "topk_group"),
                epsilon=1e-20,
                scale="routed_scaling_factor",
                rounds=False,
                logits=logits,
            ),
        )
        for name, scaled, logits in (
            ("mistral4", "norm_topk_prob", "plain"),
            ("mistral_large4", True, "float32"),
        )
    ),
    Family(
        "ernie4_5_moe",
        SOFTMAX_BIAS,
        blocks=("Ernie4_5_MoeSparseMoeBlock",),
        expert="Ernie4_5_MoeMLP",
    ),
    Family("ernie4_5_vl_moe", SOFTMAX_BIAS),
    *(
        Family(
            name,
            GateRule(
                top_k="config.top_k_experts",
                expert_scale="per_expert_scale",
                logits="",
                rounds=False,
            ),
            _ROUTER,
            config_top_k="top_k_experts",
        )
        for name in ("gemma4", "diffusion_gemma")
    ),
    # softmax to choose by; a weight depends on the experts before
    Family("phimoe", SPARSEMIXER, _ROUTER),
    Family(
        "phimoe",
        SPARSEMIXER,
        blocks=("PhimoeSparseMoeBlock",),
        expert="PhimoeBlockSparseTop2MLP",
        projections=("w1", "w3", "w2"),
    ),
    # sigmoid, a bias, groups
    *(
        Family(name, SIGMOID_GROUPS, blocks=(f"{prefix}MoE",), expert=f"{prefix}MLP", logged=False)
        for name, prefix in (
            ("deepseek_v3", "DeepseekV3"),
            ("dots1", "Dots1"),
            ("glm4_moe", "Glm4Moe"),
            ("glm4v_moe", "Glm4vMoeText"),
        )
    ),
    *(
        Family(name, SIGMOID_GROUPS)
        for name in (
            "axk1",
            "bailing_hybrid",
            "deepseek_v32",
            "exaone_moe",
            "glm4_moe_lite",
            "glm5_next",
            "glm_moe_dsa",
            "hy_v4",
            "hy_v4_vl",
            "kimi_linear",
            "mimo_v2_flash",
            "nemotron_h",
            "solar_open",
        )
    ),
    Family("axk2", replace(SIGMOID_GROUPS, zeroed=True)),
    Family("dots3_note", SIGMOID_GROUPS, blocks=("Dots3NoteTextMoE",)),
    Family("beam", replace(SIGMOID_GROUPS, scale=1.0)),  # its block scales
    # sigmoid, without groups
    Family("minimax_m2", SIGMOID_GIVEN),
    Family(
        "minimax_m3_vl",
        GateRule(affinity="sigmoid", bias="e_score_correction_bias", rounds=False),
    ),
    *(
        Family(name, SIGMOID_GIVEN_SCALED, blocks=blocks)
        for name, blocks in (("hy_v3", ()), ("dots3_note", ("Dots3NoteVisionMoE",)))
    ),
    Family(
        "afmoe",
        replace(
            SIGMOID_GIVEN_SCALED,
            bias="block.expert_bias",
            takes=("block.expert_bias",),
            scale="route_scale",
            logits="",
        ),
        _ROUTER,
    ),
    Family(
        "lfm2_moe",
        GateRule(
            affinity="sigmoid",
            renormalises="norm_topk_prob",
            bias="block.expert_bias",
            bias_if="use_expert_bias",
            takes=("block.expert_bias",),
            epsilon=1e-6,
            scale="routed_scaling_factor",
        ),
    ),
    Family(
        "flint",
        GateRule(affinity="sigmoid", renormalises="norm_topk_prob", rounds=False, logits="float32"),
    ),
    Family(
        "laguna",
        GateRule(affinity="sigmoid", bias="e_score_correction_bias", logits=""),
    ),
    Family(
        "kolibri1",
        GateRule(
            affinity="sigmoid",
            renormalises="norm_topk_prob",
            bias="e_score_correction_bias",
            on_logits=True,
            rounds=False,
            logits="float32",
        ),
    ),
    Family(
        "muse_spark",
        GateRule(
            affinity="sigmoid",
            bias="e_score_correction_bias",
            epsilon=1e-15,
            scale="routed_scaling_factor",
            rounds=False,
            logits="",
        ),
    ),
    # the function in the gate
    *(Family(name, SIGMOID_SCORE_FN) for name in ("deepseek_v4", "inkling2", "inkling2_loop")),
    # a rule that is none of these
    Family("inkling", GateRule(own="shared experts take part of the weights", logits="")),
    Family("zaya", GateRule(own="a token may choose no expert", logits="")),
)


def family_of(block: nn.Module) -> Layout | None:
    """How to read this block, or None if it is of no family that is known here."""
    return _family_of(block, type(block))


def stock_parent(block: nn.Module) -> type | None:
    """The class of a known family's blocks that the class of this block is made from."""
    parents = type(block).__mro__[1:]
    return next((kind for kind in parents if _family_of(block, kind)), None)


def _family_of(block: nn.Module, kind: type) -> Layout | None:
    module = kind.__module__
    if not module.startswith("transformers.models."):
        return None
    for family in FAMILIES:
        if family.module == module and _layout(family).is_of(block, kind):
            return _layout(family)
    return None


@cache
def _layout(family: Family) -> Layout:
    """In the layout of the transformers that the family's module is of."""
    if "use_experts_implementation" in vars(sys.modules[family.module]):
        return Packed(family)
    if not family.experts_at:
        return Paired(family)
    return {"aria": Aria, "gpt_oss": GptOss}.get(family.name, Listed)(family)
