"""Where the experts of a model lie in a checkpoint, under any of the names that files have.

Transformers 4.57 has a module for each expert and its files name each matrix. Transformers 5 has
tensors of all experts; it reads the same files, and puts them together by its own table of
names. Here that table is asked for one expert at a time.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends.tables import LayerMatrices
from ..models.blocks import Block
from . import mxfp4
from .checkpoint import Checkpoint


class Target(NamedTuple):
    """What a name in a checkpoint stands for."""

    name: str  # of the parameter
    pattern: str = ""  # by which transformers 5 found it
    converter: Any = None  # and what makes the parameter of all that have such names


class Names:
    """What the names in a checkpoint stand for in a model, which may be on the meta device."""

    def __init__(self, model: Any):
        self._prefix = model.base_model_prefix
        self.known = model.state_dict()
        self._target = self._direct
        try:
            from transformers import conversion_mapping
            from transformers import core_model_loading as loading
        except ImportError:  # transformers 4
            return
        table = conversion_mapping.get_model_conversion_mapping(model)
        renamings = [entry for entry in table if isinstance(entry, loading.WeightRenaming)]
        converters = [entry for entry in table if isinstance(entry, loading.WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}

        def target(name: str) -> Target:
            renamed, pattern = loading.rename_source_key(
                name, renamings, converters, self._prefix, self.known
            )
            if renamed not in self.known and name in self.known:
                return Target(name)
            return Target(renamed, pattern or "", by_pattern.get(pattern or ""))

        self._target = target

    def __call__(self, name: str) -> Target:
        return self._target(name)

    def _direct(self, name: str) -> Target:
        """Files may have the names of the model without its head, or with it."""
        with_prefix, without = f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")
        return Target(next((n for n in (name, with_prefix, without) if n in self.known), name))


def experts_name(block: Block) -> str:
    """The qualified name of the module that holds a block's experts."""
    return f"{block.name}.{block.family.family.experts_at}".lstrip(".")


# A function of an expert's number: one of the parameters of a module that holds it alone.
Piece = Callable[[int], Tensor]


class Source:
    """The experts of one block in a checkpoint.

    Parameters
    ----------
    block
        Of a model on the meta device. Its experts are changed: they become those of one expert.
    checkpoint
        Where they are read.
    """

    def __init__(self, block: Block, checkpoint: Checkpoint):
        self.block = block
        self.name = experts_name(block)
        self.num_experts = block.num_experts
        self._checkpoint = checkpoint
        self._keys: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        self._converters: dict[str, Any] = {}
        experts: Any = block.family.experts_of(block.module)
        self.config = getattr(experts, "config", None)
        self._is_list = isinstance(experts, nn.ModuleList)
        self._one: nn.Module = nn.ModuleList([experts[0]]) if self._is_list else experts
        self._wanted = dict(self._one.named_parameters())
        self._pieces: dict[str, Piece] = {}

    def take(self, key: str, target: Target) -> bool:
        """Is this name in the checkpoint of these experts? Then it is remembered."""
        if not target.name.startswith(self.name + "."):
            return False
        own = target.name.removeprefix(self.name + ".")
        pattern = target.pattern
        for end in (mxfp4.BLOCKS, mxfp4.SCALES):
            if own.endswith(end) and own.removesuffix(end) in self._wanted:
                own, pattern = own.removesuffix(end), end
        if self._is_list and (found := re.fullmatch(r"(\d+)\.(.+)", own)):
            own, pattern = f"0.{found[2]}", "*"
        if own not in self._wanted:
            return False
        self._keys[own][pattern].append(key)
        self._converters[own] = target.converter
        return True

    @property
    def is_mxfp4(self) -> bool:
        """Is some of it in MXFP4?"""
        return any(mxfp4.BLOCKS in keys for keys in self._keys.values())

    def prepare(self) -> None:
        """Look whether all is there, before any of it is read.

        Raises ValueError, naming what is missing.
        """
        for own in self._wanted:
            self._pieces[own] = self._piece(own)

    def _piece(self, own: str) -> Piece:
        keys = self._keys.get(own)
        title = f"{self.name}.{own.removeprefix('0.') if self._is_list else own}"
        if not keys:
            raise ValueError(f"the checkpoint lacks the experts' {title}")
        for pattern, names in keys.items():
            names.sort(key=_natural)
            expected = self.num_experts if "*" in pattern else 1
            if len(names) != expected:
                raise ValueError(
                    f"the checkpoint has {len(names)} of {expected} matrices for {title}, such as "
                    f"{names[0]}"
                )
        read = self._checkpoint
        if self._is_list:
            return lambda number: read.tensor(keys["*"][number])
        if mxfp4.BLOCKS in keys or mxfp4.SCALES in keys:
            return self._mxfp4_piece(title, keys)
        if converter := self._converters[own]:
            return self._converted_piece(own, converter, keys)
        (name,) = keys[""]
        return lambda number: read.part(name, number)

    def _mxfp4_piece(self, title: str, keys: dict[str, list[str]]) -> Piece:
        if keys.keys() != {mxfp4.BLOCKS, mxfp4.SCALES}:
            raise ValueError(f"the checkpoint has only one of blocks and scales for {title}")
        (blocks,), (scales,) = keys[mxfp4.BLOCKS], keys[mxfp4.SCALES]
        read = self._checkpoint

        def piece(number: int) -> Tensor:
            rows = mxfp4.decoded(read.part(blocks, number), read.part(scales, number))
            return rows.transpose(1, 2)  # as the parameter has it

        return piece

    def _converted_piece(self, own: str, converter: Any, keys: dict[str, list[str]]) -> Piece:
        """By the operations of transformers 5, as of a model with one expert."""
        name, shape = f"{self.name}.{own}", self._shape(own)
        model = SimpleNamespace(get_parameter=lambda _: torch.empty(shape, device="meta"))
        absent = [p for p in converter.source_patterns if p not in keys]
        if absent:
            raise ValueError(f"the checkpoint lacks {absent[0]} for {name}")

        def piece(number: int) -> Tensor:
            given: dict[str, Any] = {
                pattern: [
                    self._checkpoint.tensor(names[number])
                    if "*" in pattern
                    else self._checkpoint.part(names[0], number)
                ]
                for pattern, names in keys.items()
            }
            for operation in converter.operations:
                given = operation.convert(
                    given,
                    source_patterns=converter.source_patterns,
                    target_patterns=converter.target_patterns,
                    full_layer_name=name,
                    model=model,
                    config=self.config,
                )
            (made,) = given.values()
            result: Tensor = made[0] if isinstance(made, list) else made
            return result

        return piece

    def _shape(self, own: str) -> tuple[int, ...]:
        shape = self._wanted[own].shape
        return tuple(shape) if self._is_list else (1, *shape[1:])

    def read(self, number: int) -> LayerMatrices:
        """The matrices of one expert, as of a layer that has no other."""
        for own, piece in self._pieces.items():
            tensor = piece(number)
            if tuple(tensor.shape) != self._shape(own):
                raise ValueError(
                    f"the shape of {self.name}.{own} is another one in the checkpoint than by the "
                    f"config: {tuple(tensor.shape)}, expected {self._shape(own)}"
                )
            tensor = tensor.to(self._wanted[own].dtype).contiguous()
            parent, _, leaf = own.rpartition(".")
            parameter = nn.Parameter(tensor, requires_grad=False)
            self._one.get_submodule(parent)._parameters[leaf] = parameter
        read, reason = self.block.family.read_experts(self._one)
        if reason:
            raise ValueError(f"{self.name}: can't be quantised: {reason}")
        return read


def _natural(name: str) -> list[tuple[int, str]]:
    """An order of names in which 10 follows 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
