"""What to measure."""

from __future__ import annotations

from typing import Any, NamedTuple

DTYPES = ("float32", "bfloat16", "float16")


class Shape(NamedTuple):
    """The experts of a layer."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    @property
    def flop(self) -> int:
        """Of one token in one expert: three products."""
        return 6 * self.hidden * self.intermediate

    @property
    def size(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden * self.intermediate

    def __str__(self) -> str:
        text = f"E {self.experts}, H {self.hidden}, I {self.intermediate}, top-{self.top_k}"
        return f"{self.name} ({text})" if self.name in SHAPES else text


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe", 64, 2048, 1024, 8),
        Shape("mixtral", 8, 4096, 14336, 2),
        Shape("qwen3-30b", 128, 2048, 768, 8),
        Shape("deepseek-v2-lite", 64, 2048, 1408, 6),
        Shape("gpt-oss-20b", 32, 2880, 2880, 4),
        Shape("granite-3b", 40, 1536, 512, 8),
        Shape("demo", 64, 96, 48, 8),
    )
}


class BlockFamily(NamedTuple):
    """A family of models, the block of which is to be measured."""

    sizes: tuple[str, str, str, str]  # what its config calls E, H, I and K
    others: dict[str, Any]  # of its config: what the block is beyond that
    shapes: tuple[str, ...]  # of its models


_QWEN = ("num_experts", "hidden_size", "moe_intermediate_size", "num_experts_per_tok")
_LOCAL = ("num_local_experts", "hidden_size", "intermediate_size", "num_experts_per_tok")
_DEEPSEEK = dict(
    n_shared_experts=2,
    first_k_dense_replace=0,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
)
FAMILIES = {
    "olmoe": BlockFamily(
        ("num_experts", "hidden_size", "intermediate_size", "num_experts_per_tok"),
        {},
        ("olmoe", "demo"),
    ),
    "qwen3_moe": BlockFamily(_QWEN, dict(norm_topk_prob=True), ("qwen3-30b",)),
    "mixtral": BlockFamily(_LOCAL, {}, ("mixtral",)),
    "deepseek_v2": BlockFamily(("n_routed_experts", *_QWEN[1:]), _DEEPSEEK, ("deepseek-v2-lite",)),
    "gpt_oss": BlockFamily(_LOCAL, {}, ("gpt-oss-20b",)),
    "granitemoe": BlockFamily(_LOCAL, {}, ("granite-3b",)),
}


def family_of(shape: Shape) -> str:
    """The family of a named shape; OLMoE's for any other."""
    return next((name for name, family in FAMILIES.items() if shape.name in family.shapes), "olmoe")


class Settings(NamedTuple):
    benchmark: str
    shape: Shape
    dtype: str | None  # None: all
    tokens: tuple[int, ...]
    repeats: int
    threads: int | None  # None: as torch chooses
    peers: bool
    family: str | None = None  # of the benchmark of a block

    @property
    def one_dtype(self) -> str:
        """Of a benchmark that measures in one."""
        assert self.dtype is not None  # its argument has a default
        return self.dtype

    @property
    def one_family(self) -> str:
        """Of a benchmark that measures in one; the shape's where none is said."""
        return self.family or family_of(self.shape)

    def rounds(self, tokens: int) -> int:
        """Above 128 tokens a call is long, and its time steady."""
        return self.repeats if tokens <= 128 else -(-self.repeats // 3)
