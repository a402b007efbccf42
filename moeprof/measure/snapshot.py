"""A model put back as it was, whatever was done to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from ..backends import cpu
from ..patching.state import Patched
from .bits import words_of
from .machine import check_memory

_LOOKED_INTO = (nn.Module, PretrainedConfig, GenerationConfig, Patched, Tensor)
_PART = 1 << 20  # words whose sums are taken at once: what is made of them stays in the cache
_SIDE = 1 << 10


@contextmanager
def undoing(model: nn.Module, *, weights: bool = True) -> Iterator[Snapshot]:
    """Whatever happens to the model in the block is undone at its end, after an error too.

    That is: the modules, their attributes, hooks and training flags; parameters and buffers,
    replaced, converted or changed in place; configs; moeprof's patches; the number of threads.
    Not what lies outside of the model: classes, global hooks, torch's global settings.

    Parameters
    ----------
    model : torch.nn.Module
    weights : bool
        False: nothing in the block changes a weight in place, so none needs to be looked at.

    Yields
    ------
    Snapshot
        ``snapshot.restore()`` puts the model back at once; as often as one likes.

    Raises
    ------
    RuntimeError
        At the end of the block, if weights were changed in place and there had been no memory
        to copy them; it names them.
    """
    snapshot = Snapshot(model, weights)
    try:
        yield snapshot
    finally:
        snapshot.restore()


class Snapshot:
    """What a model is now.

    Weights are copied where twice their size is free, for what comes may need as much again.
    Where it isn't, sums over rows and columns of their bits tell whether they were changed.
    """

    def __init__(self, model: nn.Module, weights: bool = True) -> None:
        self._threads = torch.get_num_threads(), cpu._threads
        self._classes: list[tuple[Any, type]] = []
        self._containers: list[tuple[Any, Any]] = []
        tensors = self._walk(model)
        kind = _Contents
        if weights:
            kind = _Copied if _fits(tensors) else _Summed
        named = chain(model.named_parameters(), model.named_buffers())
        names = {id(tensor): name for name, tensor in named}
        self._tensors = [
            _Kept(tensor, names.get(id(tensor), f"a tensor {tuple(tensor.shape)}"), kind)
            for tensor in tensors
        ]

    def _walk(self, model: nn.Module) -> list[Tensor]:
        """Keep what is in the model's modules, configs and containers; returns its tensors."""
        seen: set[int] = set()
        waiting: list[Any] = [model]
        tensors: list[Tensor] = []
        while waiting:
            value = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, _LOOKED_INTO):
                self._classes.append((value, type(value)))  # this also keeps its id its own
                if isinstance(value, Tensor):
                    tensors.append(value)
                waiting.append(vars(value))
            elif isinstance(value, dict | list | set):
                self._containers.append((value, value.copy()))
                waiting.extend(value.values() if isinstance(value, dict) else value)
            elif isinstance(value, tuple):
                waiting.extend(value)
        return tensors

    def restore(self) -> None:
        """Put everything back; RuntimeError, after the rest was, for weights that can't be."""
        for value, kind in self._classes:
            if type(value) is not kind:
                value.__class__ = kind
        for container, items in self._containers:
            container.clear()
            container.extend(items) if isinstance(items, list) else container.update(items)
        with torch.inference_mode():
            lost = [kept.name for kept in self._tensors if not kept.restore()]
        torch.set_num_threads(self._threads[0])
        cpu.set_num_threads(self._threads[1])
        if lost:
            raise RuntimeError(
                f"changed in place and not put back: {', '.join(lost)}. There was no memory for a "
                "copy of the weights; load the model again, and change copies of these"
            )


def _fits(tensors: list[Tensor]) -> bool:
    with suppress(ValueError):
        check_memory(2 * sum(tensor.nbytes for tensor in tensors))
        return True
    return False


class _Kept:
    """A tensor of the model: where its memory is, what is in it, its gradient."""

    def __init__(self, tensor: Tensor, name: str, contents: type[_Contents]) -> None:
        self.tensor, self.name = tensor, name
        self._same = tensor.detach()  # stays, and stays what it is, if `tensor` gets other data
        self._grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
        self._contents = contents(self._same)

    def restore(self) -> bool:
        """False if its contents were changed and are lost."""
        if _place(self.tensor) != _place(self._same):
            self.tensor.data = self._same
        if self.tensor.is_leaf:
            if self.tensor.requires_grad != self._grad[0]:
                self.tensor.requires_grad_(self._grad[0])
            self.tensor.grad = self._grad[1]
        return self._contents.restore(self._same)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class _Contents:
    """What is in a tensor, if nothing changes it."""

    def __init__(self, tensor: Tensor) -> None:
        pass

    def restore(self, tensor: Tensor) -> bool:
        return True


class _Copied(_Contents):
    def __init__(self, tensor: Tensor) -> None:
        self._words = words_of(tensor).clone()

    def restore(self, tensor: Tensor) -> bool:
        words = words_of(tensor)
        if not torch.equal(words, self._words):  # a write would un-share pages of a file
            words.copy_(self._words)
        return True


class _Summed(_Contents):
    def __init__(self, tensor: Tensor) -> None:
        self._sums = _sums(tensor)

    def restore(self, tensor: Tensor) -> bool:
        return torch.equal(_sums(tensor), self._sums)


def _sums(tensor: Tensor) -> Tensor:
    """Sums of a tensor's words over rows and columns of 1,024, modulo 2^64.

    They tell where a word stands, so experts that change places are seen too.
    """
    words = words_of(tensor).flatten()
    sums = []
    for part in words.split(_PART):
        whole = len(part) // _SIDE * _SIDE
        square = part[:whole].view(-1, _SIDE)
        sums += [square.sum(0), square.sum(1), part[whole:].long()]
    return torch.cat(sums) if sums else torch.zeros(0)
