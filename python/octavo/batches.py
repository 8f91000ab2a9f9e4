# SPDX-License-Identifier: Apache-2.0
"""What a batch is, how a model is called with it, and which tensors its output holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def calls(batches: Any, argument: str) -> Iterator[tuple[tuple, dict]]:
    """The positional and keyword arguments of each call.

    batches    one batch or an iterable of them. A batch is a tensor, a tuple or a dict; within an iterable, a list too
    argument   what errors call it, such as "compare: batches"
    Raises: TypeError for anything else.
    """
    if isinstance(batches, torch.Tensor | tuple | Mapping):
        batches = [batches]
    elif isinstance(batches, str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{argument} is {type(batches).__name__}; "
            "a tensor, a tuple, a dict or an iterable of those is needed"
        )
    for batch in batches:
        if isinstance(batch, torch.Tensor):
            yield (batch,), {}
        elif isinstance(batch, Mapping):
            yield (), dict(batch)
        elif isinstance(batch, tuple | list):
            yield tuple(batch), {}
        else:
            raise TypeError(
                f"{argument.split(':')[0]}: a batch is {type(batch).__name__}; a tensor, tuple or dict is needed"
            )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for all of `models`; every module's training flag comes back as it was."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in flags:
            module.training = training


def float_tensors(output: Any) -> Iterator[torch.Tensor]:
    """Every floating-point tensor in an output, in order: of tuples, dicts, dataclasses, nested or not."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):  # dicts and transformers' ModelOutput
        for value in output.values():
            yield from float_tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from float_tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from float_tensors(getattr(output, name))
