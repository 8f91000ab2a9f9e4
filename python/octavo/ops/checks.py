# SPDX-License-Identifier: Apache-2.0
"""What operators accept: dtypes, and the errors that name what came instead. Importing it registers the operators."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .. import _C  # noqa: F401  loading it registers the operators

CODE_TYPES = frozenset({torch.int8, torch.uint8})
HALF_TYPES = frozenset({torch.bfloat16, torch.float16})
WIDE_CODE_TYPES = frozenset({torch.int16, torch.uint16})  # no kernel multiplies them


def check(op: str, name: str, tensor: torch.Tensor, accepted: Collection[torch.dtype]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__}, a torch.Tensor is needed")
    if tensor.dtype not in accepted:
        raise TypeError(
            f"{op}: {name} is {_short(tensor.dtype)}, accepted: {_names(accepted)}; convert with .to(dtype)"
        )


def check_dtype(op: str, dtype: torch.dtype, accepted: Collection[torch.dtype]) -> None:
    if dtype not in accepted:
        raise TypeError(f"{op}: dtype is {_short(dtype)}, accepted: {_names(accepted)}")


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether one of them needs a gradient. To be asked only while gradients are recorded at all."""
    for tensor in tensors:  # half the time of any(...)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Collection[torch.dtype]) -> str:
    return ", ".join(sorted(map(_short, dtypes)))
