"""What rounding changes: a layer's outputs before and after, on what it was given by some texts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import Tokenizer, check_token_ids, check_tokenizer
from ..models.tokens import prompt_ids

TOKENS = 256  # of the texts together

Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = dict[nn.Module, list[Call]]


def recorded_calls(
    model: nn.Module,
    modules: Sequence[nn.Module],
    texts: Sequence[str | Tensor],
    tokenizer: Tokenizer | None,
) -> Calls:
    """What each of the modules is given while the texts run through the model, as it is."""
    if model.training:
        raise ValueError("quantize: texts: a model in training mode: call model.eval() first")
    ids = _token_ids(texts, tokenizer)
    check_token_ids(model, ids)
    calls: Calls = {module: [] for module in modules}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module].append((_kept(args), _kept(kwargs)))

    hooks = [m.register_forward_pre_hook(record, with_kwargs=True) for m in calls]
    try:
        with torch.inference_mode():
            for row in ids:
                model(input_ids=row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _kept(value: Any) -> Any:
    """The same with copies of its tensors: a model may write into them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_kept, value))
    return {k: _kept(v) for k, v in value.items()} if type(value) is dict else value


def _token_ids(texts: Sequence[str | Tensor], tokenizer: Tokenizer | None) -> list[Tensor]:
    """The first `TOKENS` tokens of the texts together, (1, n) each."""
    if isinstance(texts, str | Tensor):
        texts = [texts]
    rows: list[Tensor] = []
    left = TOKENS
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise TypeError("quantize: texts: strings need a tokenizer, tokenizer=...")
            check_tokenizer("quantize", tokenizer)
            text = prompt_ids(tokenizer, text)
        elif not isinstance(text, Tensor):
            kind = type(text).__name__
            raise TypeError(f"quantize: texts: expected strings or token ids (1, n), got {kind}")
        row = text.reshape(1, -1)[:, :left].long()
        if row.numel():
            rows.append(row)
            left -= row.shape[1]
    if not rows:
        raise ValueError("quantize: texts: no token in them")
    return rows


def outputs(module: nn.Module, calls: list[Call]) -> list[Tensor]:
    """What the module gives for these calls; of several values the first."""
    given = []
    with torch.inference_mode():
        for args, kwargs in calls:
            output = module(*_kept(args), **_kept(kwargs))
            given.append(output if isinstance(output, Tensor) else output[0])
    return given


def distance(before: list[Tensor], after: list[Tensor]) -> float | None:
    """||after - before|| / ||before||; None where nothing was given."""
    if not before:
        return None
    x, y = (torch.cat([t.flatten().double() for t in given]) for given in (before, after))
    return float((y - x).norm() / x.norm())
