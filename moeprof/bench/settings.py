"""What to measure."""

from __future__ import annotations

from typing import NamedTuple

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
        Shape("demo", 64, 96, 48, 8),
    )
}


class Settings(NamedTuple):
    benchmark: str
    shape: Shape
    dtype: str | None  # None: all
    tokens: tuple[int, ...]
    repeats: int
    threads: int | None  # None: as torch chooses
    peers: bool

    @property
    def one_dtype(self) -> str:
        """Of a benchmark that measures in one."""
        assert self.dtype is not None  # its argument has a default
        return self.dtype

    def rounds(self, tokens: int) -> int:
        """Above 128 tokens a call is long, and its time steady."""
        return self.repeats if tokens <= 128 else -(-self.repeats // 3)
