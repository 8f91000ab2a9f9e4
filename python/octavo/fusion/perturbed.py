# SPDX-License-Identifier: Apache-2.0
"""A second example, made from the user's: other values of the same kind, and a text of more than a few tokens.

An example of one token has one position and nothing to attend to, a mask of ones hides nothing, and zeros stay zero in
whatever is computed. So each step is tried on inputs that nobody chose because they are simple.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

LENGTH = 24  # tokens of a text that is made longer


def perturbed(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """Gives other arguments for the same call, the most telling ones first: a model may refuse some of them."""
    flat = [*args, *kwargs.values()]
    texts = [x.shape for x in flat if _is_text(x)]
    names = list(kwargs)
    for times in dict.fromkeys([-(-LENGTH // texts[0][1]) if texts and texts[0][1] else 1, 1]):
        generator = torch.Generator().manual_seed(len(flat))
        values = [_other(value, texts[0] if texts else None, times, generator) for value in flat]
        yield tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))


def _is_text(value: Any) -> bool:
    """Whether `value` is [batch, length] of whole numbers: token ids, positions, or a mask."""
    return isinstance(value, torch.Tensor) and value.dim() == 2 and not _is_float(value)


def _is_float(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _other(value: Any, text: torch.Size | None, times: int, generator: torch.Generator) -> Any:
    """Another value of the same kind: floats get noise; tokens are repeated and mixed; a mask hides more."""
    if not isinstance(value, torch.Tensor) or value.is_complex() or not value.numel():
        return value
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator).to(value.dtype)
        return value + noise * (value.float().std(correction=0).to(value.dtype) or 1.0)
    if value.shape != text:
        return value
    value = value.repeat(1, times)
    if bool(((value == 0) | (value == 1)).all()):
        return _padded(value)
    return value[:, torch.randperm(value.shape[1], generator=generator)]


def _padded(mask: torch.Tensor) -> torch.Tensor:
    """`mask`, in which also the last third of the first text is hidden."""
    mask = mask.clone()
    mask[0, mask.shape[1] - mask.shape[1] // 3 :] = 0
    return mask
