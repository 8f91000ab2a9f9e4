# SPDX-License-Identifier: Apache-2.0
"""What is registered of an operator beside the CPU kernel: the fake, and a refusal of tensors that no kernel takes.

A fake gives shapes and dtypes without data, for torch.compile, torch.export and tensors on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

_library = torch.library.Library("octavo", "FRAGMENT")
_OTHER_KINDS = (
    *("SparseCPU", "SparseCsrCPU", "QuantizedCPU", "MkldnnCPU", "NestedTensorCPU", "AutogradNestedTensor"),
    *("CUDA", "XPU", "MPS", "HPU", "PrivateUse1"),
)


def register_fake(name: str) -> Callable[[Callable], Callable]:
    """Registers the function below it as the fake of `name`, and that dense tensors of one device are needed."""
    op = name.removeprefix("octavo::")

    def register(fake: Callable) -> Callable:
        schema = getattr(torch.ops.octavo, op).default._schema

        @wraps(fake)
        def checked(*arguments: Any, **options: Any) -> Any:
            tensors = _tensors(schema, arguments, options)
            first, device = next((name, tensor.device) for name, tensor in tensors.items())
            for name, tensor in tensors.items():
                if tensor.device != device:
                    raise ValueError(
                        f"{op}: {first} is on {device} and {name} on {tensor.device}; all tensors must be on one device"
                    )
            return fake(*arguments, **options)

        def refuse(*arguments: Any, **options: Any) -> Any:
            for name, tensor in _tensors(schema, arguments, options).items():
                _check_kind(op, name, tensor)
            raise TypeError(f"{op}: dense CPU tensors are needed")

        torch.library.register_fake(name)(checked)
        for kind in _OTHER_KINDS:
            _library.impl(op, refuse, kind)
        return fake

    return register


def _tensors(schema: torch.FunctionSchema, arguments: tuple, options: dict) -> dict[str, torch.Tensor]:
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, arguments, strict=False)), **options}
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def _check_kind(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{op}: {name} is on {tensor.device}, Octavo computes on the CPU; use {name}.cpu()")
    if tensor.is_quantized:
        raise TypeError(f"{op}: {name} is quantized by torch; use {name}.dequantize() or {name}.int_repr()")
    if tensor.is_nested:
        raise TypeError(f"{op}: {name} is nested; use torch.nested.to_padded_tensor")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{op}: {name} has the layout {layout}; use {name}.to_dense()")
