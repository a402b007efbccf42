"""A tiny random model of every model type of transformers that has an experts class.

A family is the folder of transformers.models that defines the class; one that defines several
has a name for each, "folder/Class". Most need no line here: the shapes of a config are made small
by name (TINY), and what a family needs beyond that is in EXTRAS.

As a program it writes the table of docs/models.md for the installed transformers.
"""

import copy
import importlib
import inspect
import re
from dataclasses import replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import routing
import torch
import transformers
from models import V5, relative
from nulls import null_of, random_logits
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from zoo import QWEN_LINEAR

import moeprof
from moeprof.models.identity import gates_of, router_sample
from moeprof.routers import REGISTRY

VOCABULARY, H, E, K = 64, 32, 8, 3
EOS, PAD = 0, 1

# What configs call a size, and the size: names of the same one in one line.
_SIZES = {
    "vocab_size unpadded_vocab_size": VOCABULARY,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": EOS,
    # attention
    "num_attention_heads num_key_value_heads": 4,
    "swa_num_attention_heads swa_num_key_value_heads index_n_heads": 4,
    "head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim": 8,
    "q_lora_rank kv_lora_rank": 8,
    "sliding_window": 16,
    "index_topk": 32,
    # experts
    "num_experts num_local_experts n_routed_experts moe_num_experts": E,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts": K,
    "moe_intermediate_size": 23,
    "shared_expert_intermediate_size": 20,
    "n_shared_experts num_shared_experts moe_num_shared_experts": 2,
    "first_k_dense_replace num_dense_layers": 1,
    # their router
    "n_group num_expert_group": 4,
    "topk_group": 2,
    "routed_scaling_factor router_scaling_factor route_scale moe_routed_scaling_factor": 1.7,
}
TINY = {name: size for names, size in _SIZES.items() for name in names.split()}
_DENSE_FIRST = dict(mlp_layer_types=["dense", "sparse"])
_LINEAR_FIRST = dict(layer_types=["linear_attention", "full_attention"])
EXTRAS: dict[str, dict[str, Any]] = {
    "deepseek_v4": dict(mlp_layer_types=["hash_moe", "moe"]),
    "bailing_hybrid": _LINEAR_FIRST,
    "beam": _DENSE_FIRST,
    "deepseek_ocr2": _DENSE_FIRST,
    "ernie4_5_vl_moe": dict(
        moe_intermediate_size=[23, 13],
        rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2]),
    ),
    "flint": dict(mlp_only_layers=[0]),
    "gemma4": dict(
        enable_moe_block=True,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm4v_moe": dict(
        head_dim=16, rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2])
    ),
    "glm5_next": dict(
        _DENSE_FIRST,
        qk_rope_head_dim=0,
        layer_types=["linear_attention", "indexed_attention"],
        linear_num_heads=4,
        linear_head_dim=8,
    ),
    "granitemoehybrid": dict(
        _LINEAR_FIRST,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=4,
        shared_intermediate_size=20,
    ),
    "granitemoeshared": dict(shared_intermediate_size=20),
    "hy_v4_vl": dict(rope_parameters=dict(rope_type="default", mrope_section=[1, 1, 2])),
    "inkling": dict(d_rel=4, rel_extent=16),
    "inkling2": dict(d_rel=4, rel_extent=16),
    "inkling2_loop": dict(d_rel=4, rel_extent=16),
    "jamba": dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
        mamba_d_state=4,
        mamba_dt_rank=4,
    ),
    "kimi_linear": dict(_LINEAR_FIRST, linear_num_heads=4, linear_head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mimo_v2_flash": dict(num_key_value_heads=2),
    "mistral4": dict(head_dim=16),
    "muse_spark": dict(moe_hidden_size=H),
    "nemotron_h": dict(n_groups=2, ssm_state_size=4, mamba_num_heads=4, mamba_head_dim=8),
    "phimoe": dict(num_experts_per_tok=2),
    "qwen3_5_moe": QWEN_LINEAR,
    "qwen3_next": QWEN_LINEAR,
    "qwen3_omni_moe/Qwen3OmniMoeTalkerTextExperts": dict(shared_expert_intermediate_size=20),
    "qwen4_exp": dict(
        QWEN_LINEAR,
        layer_types=["linear_attention", "indexed_attention"],
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=32,
        indexer_compress_ratio=4,
    ),
    "zaya": dict(num_experts_per_tok=1),
}
if not V5:
    _ROPE = dict(rope_scaling=dict(rope_type="default", mrope_section=[1, 1, 2]))
    _JETMOE = dict(kv_channels=8, num_key_value_heads=2, num_attention_heads=2 * K)
    EXTRAS |= {
        "glm4v_moe": dict(_ROPE, head_dim=16),
        "granitemoehybrid": dict(EXTRAS["granitemoehybrid"], layer_types=["mamba", "attention"]),
        "jetmoe/JetMoeMoA": _JETMOE,
        "jetmoe/JetMoeMoE": _JETMOE,
        "llama4": dict(intermediate_size_mlp=40, moe_layers=[1]),
        "qwen3_omni_moe/Qwen3OmniMoeTalkerTextSparseMoeBlock": dict(
            _ROPE, shared_expert_intermediate_size=20
        ),
        "qwen3_omni_moe/Qwen3OmniMoeThinkerTextSparseMoeBlock": _ROPE,
        "qwen3_vl_moe": _ROPE,
    }
_ENCODER_DECODER = "an encoder-decoder without causal model: tests/zoo.py has it"
NOT_BUILT = (
    {}
    if V5
    else {
        "dbrx": "its config holds others: tests/zoo.py has it",
        "jetmoe/JetMoeAttention": "is built with what it holds, JetMoeMoA",
        "longcat_flash": "experts that compute nothing among the others",
        "nllb_moe": _ENCODER_DECODER,
        "switch_transformers": _ENCODER_DECODER,
        "vitpose_backbone": "reads pictures, and has no router",
    }
)


class Found(NamedTuple):
    """The class of a family's experts, on transformers 4 of its blocks, and where it is."""

    module: str
    name: str


@cache
def families() -> dict[str, Found]:
    """What the source of the installed transformers has."""
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        folder, names = path.parent.name, _experts_in(path.read_text())
        for name in names:
            family = folder if len(names) == 1 else f"{folder}/{name}"
            found[family] = Found(f"transformers.models.{folder}.{path.stem}", name)
    return found


def _experts_in(source: str) -> list[str]:
    """On transformers 5 a decorator marks them; on 4.57 a block has them as an attribute."""
    if V5:
        return re.findall(r"^@use_experts_implementation.*\nclass (\w+)", source, re.M)
    has = re.compile(r"self\.experts = |= \w+ParallelExperts\(")
    classes = re.split(r"^class ", source, flags=re.M)[1:]
    return [re.split(r"\W", text)[0] for text in classes if has.search(text)]


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """The smallest model of a family that has its experts, with random weights."""
    found = families()[family]
    module = importlib.import_module(found.module)
    advice = f"{family}: give its sizes in EXTRAS of tests/every.py, or the reason in NOT_BUILT"
    for kind in _candidates(module):
        torch.manual_seed(seed)
        try:
            model = kind(_config(kind.config_class, EXTRAS.get(family, {}))).eval()
        except Exception as error:
            raise LookupError(f"{advice}: {kind.__name__}: {error}") from error
        if any(type(m).__name__ == found.name for m in model.modules()):
            _randomise(model)
            if V5:
                model.set_experts_implementation("eager")  # the others run no odd sizes
            return model
    raise LookupError(f"{advice}: no model of text alone has {found.name}")


def _candidates(module: Any) -> list[type[PreTrainedModel]]:
    """The models of text alone that a module defines, those that can generate first."""
    kinds = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind)
        and issubclass(kind, PreTrainedModel)
        and kind.__module__ == module.__name__
        and "PreTrained" not in kind.__name__
        and inspect.isclass(kind.config_class)
        and not kind.config_class.sub_configs
    ]
    order = ("ForCausalLM", "Text", "TalkerModel", "")
    return sorted(kinds, key=lambda kind: [part in kind.__name__ for part in order].index(True))


def _config(kind: Any, extras: dict[str, Any]) -> Any:
    names = {*kind().to_dict(), *kind.attribute_map}
    known = {name: value for name, value in TINY.items() if name in names}
    return kind(**{**known, **extras})


def _randomise(model: nn.Module) -> None:
    """Weights by which tokens differ, so that routers have few ties and experts matter."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):  # (vocabulary, k): the experts of each token
                tensor.copy_(torch.rand(len(tensor), E).topk(tensor.shape[1]).indices)
            elif isinstance(tensor, nn.Parameter) and tensor.dim() > 1:
                columns = 1 if id(tensor) in embeddings else tensor.shape[-1]
                tensor.normal_(0, columns**-0.5)
            elif isinstance(tensor, nn.Parameter) or name.endswith("bias"):
                tensor += 0.1 * torch.randn_like(tensor)


def scale_experts(model: nn.Module, family: str, factor: float) -> None:
    """In place; on transformers 4 the whole block, for not all keep the experts in a module."""
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == families()[family].name:
                for parameter in module.parameters():
                    parameter.mul_(factor)


def top_k(family: str) -> int:
    """How many experts a token gets."""
    k: int = EXTRAS.get(family, {}).get("num_experts_per_tok", K)
    return k


def inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two rows of tokens that all differ, the first padded on the left, the second on the right."""
    order = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(1))
    ids, mask = order[:18].view(2, 9) + 3, torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = mask[1, -2:] = 0
    given = {"input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":  # it reads no tokens
        given["inputs_embeds"] = model.get_input_embeddings()(given.pop("input_ids")).detach()
    return given


def run(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or of a model without a head the last hidden states, at what is no padding."""
    with torch.no_grad():
        output = model(**given)
    values = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return values[given["attention_mask"] == 1]


def truth(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same of a copy in float64."""
    double = copy.deepcopy(model).double()
    given = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    with _Double():
        return run(double, given)


class _Double(TorchFunctionMode):
    """Gives float64 where a model asks for float32, as routers do."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        function = torch.Tensor.double if function is torch.Tensor.float else function
        named = {name: _wide(value) for name, value in (named or {}).items()}
        return function(*map(_wide, arguments), **named)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def error(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative to float64, where that is finite: padding on the left is not, in GraniteMoeSWA."""
    finite = reference.isfinite().all(-1)
    return relative(values[finite], reference[finite])


# ---- the tables of docs/models.md ----

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
# What stands before and after the table of the installed transformers
START, END = f"<!-- table of transformers {4 + V5} -->", f"<!-- end of transformers {4 + V5} -->"


class Parity(NamedTuple):
    """How far a family's output lies from float64, patched and by itself.

    paths : what `moeprof.inspect` says of its MoE layers
    ours : None where it can't be patched
    routers : those that run, patched in
    """

    family: str
    paths: str
    ours: float | None
    stock: float
    routers: list[str]


def paths(model: nn.Module) -> str:
    """How its MoE layers run, each way once."""
    return ", ".join(dict.fromkeys(layer.path for layer in moeprof.inspect(model)))


def kinds(model: nn.Module) -> set[tuple[Any, ...]]:
    """Of its MoE layers the rule, the path, the activation, and how the experts' tensors lie."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    experts = [m for m in model.modules() if "is_concatenated" in vars(m)]
    lie = {tuple(getattr(module, flag) for flag in flags) for module in experts}
    return {
        (layer.rule, layer.path, layer.activation, *flags)
        for layer in moeprof.inspect(model)
        for flags in lie
    }


def parity(family: str) -> Parity:
    model = build(family)
    given = inputs(model)
    reference = truth(model, given)
    stock = error(run(model, given), reference)
    try:
        with moeprof.patch(model) as handle:
            ours, layers = error(run(model, given), reference), len(handle.layers)
    except ValueError:
        return Parity(family, paths(model), None, stock, [])
    logits = [random_logits(2000, E, seed) for seed in range(layers)]
    sample = router_sample(gates_of(model))
    null = replace(null_of(*logits, kind="efron"), router_sample=sample)
    routers = [name for name in REGISTRY if _runs(model, given, name, top_k(family), null)]
    return Parity(family, paths(model), ours, stock, routers)


def _runs(
    model: PreTrainedModel, given: dict[str, torch.Tensor], name: str, k: int, null: moeprof.Null
) -> bool:
    router = routing.make(name, E, **({"k": k} if name == "topk" else {}))
    try:
        with moeprof.patch(model, router, null=null if router.wants_null else None):
            return bool(run(model, given).isfinite().all())
    except ValueError:
        return False


def table() -> str:
    """Markdown, a row a family."""
    lines = [
        f"transformers {transformers.__version__}, {date.today():%d %B %Y}",
        "",
        "| family | path | error patched | error by itself | routers |",
        "|---|---|---|---|---|",
    ]
    for row in map(parity, [name for name in families() if name not in NOT_BUILT]):
        ours = "–" if row.ours is None else f"{row.ours:.1e}"
        missing = [name for name in REGISTRY if name not in row.routers]
        routers = f"all but {', '.join(missing)}" if missing else "all"
        routers = routers if row.routers else "its own"
        lines.append(f"| {row.family} | {row.paths} | {ours} | {row.stock:.1e} | {routers} |")
    return "\n".join(lines)


def rows() -> dict[str, str]:
    """{family: paths} of the page's table for the installed transformers."""
    text = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    return dict(re.findall(r"^\| (\S+) \| ([^|]+) \| [\d–]", text, re.M))


def main() -> None:
    before, start, rest = PAGE.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{PAGE}: no {START} with {END} after it")
    text = f"{before}{start}\n{table()}\n{end}{after}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
