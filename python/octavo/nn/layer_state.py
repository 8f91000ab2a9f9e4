# SPDX-License-Identifier: Apache-2.0
"""What the tensors of a quantized layer in a state_dict may be, and codes that no float weight takes for its values.

torch copies anything into anything that has the same shape: floats into codes, codes into floats, a NaN into a scale.
A layer asks here before it takes something, and `octavo.save` and `load` do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..base.float_types import FLOAT_DTYPES
from ..tensors.forms import TensorForm

Expected = dict[str, TensorForm]


def form_errors(expected: Expected, state: dict[str, Any], prefix: str) -> list[str]:
    """Dtypes and shapes in `state` that are not as `expected`."""
    errors = []
    for name, form in expected.items():
        value, shape, dtypes = state.get(prefix + name), form.shape, form.accepted
        if not isinstance(value, torch.Tensor):
            continue
        if value.dtype not in dtypes:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            remedy = (
                "; load a float checkpoint into the float model, then quantize that"
                if name == "weight"
                else ""
            )
            errors.append(f"{prefix}{name} is {value.dtype}, QuantLinear needs {accepted}{remedy}")
        if tuple(value.shape) != shape:
            errors.append(f"{prefix}{name} has shape {tuple(value.shape)}, QuantLinear needs {shape}")
    return errors


def value_errors(expected: Expected, state: dict[str, Any], prefix: str) -> list[str]:
    """Values in `state` that no quantized layer can have: scales that are none, NaN in a bias, columns out of order."""
    errors = []
    for name, form in expected.items():
        value = state.get(prefix + name)
        if form.check is not None and isinstance(value, torch.Tensor) and not value.is_meta:
            wrong = form.check(value.detach())
            if wrong:
                errors.append(
                    f"{prefix}{name} holds {wrong}; the file is damaged, or the model was never right"
                )
    return errors


def require_forms(
    forms: Mapping[str, TensorForm], tensors: Mapping[str, torch.Tensor], bias: torch.Tensor | None, n: int
) -> None:
    """Raises TypeError, ValueError for tensors of a layer with other names, dtypes or shapes than `forms`, and for a
    bias that does not go with n outputs."""
    if forms.keys() != tensors.keys():
        raise ValueError(f"QuantLinear: the tensors are {sorted(tensors)}, needed are {sorted(forms)}")
    for name, form in forms.items():
        if tensors[name].dtype != form.dtype:
            raise TypeError(
                f"QuantLinear: {name} must be {_plain(form.dtype)}, got {_plain(tensors[name].dtype)}"
            )
        if tuple(tensors[name].shape) != form.shape:
            raise ValueError(
                f"QuantLinear: {name} has shape {tuple(tensors[name].shape)}, {form.shape} is needed"
            )
    if bias is not None and bias.dtype not in FLOAT_DTYPES:
        raise TypeError(f"QuantLinear: bias is {bias.dtype}, accepted are float32, bfloat16 and float16")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"QuantLinear: bias has shape {tuple(bias.shape)}, {(n,)} is needed")


def _plain(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


class StoredCodes(torch.Tensor):
    """The codes of a layer in the state_dict that it gives. They are an ordinary tensor, but for one thing: no
    float tensor can be filled with them, so `load_state_dict` of a float model fails, with strict=False as well.

    What is computed from them, and what is read from a file, is an ordinary tensor: files have no place for the class.
    """

    @classmethod
    def of(cls, codes: torch.Tensor) -> StoredCodes:
        """`codes` themselves, not a copy."""
        return codes.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.copy_ and args[0].is_floating_point():
            raise TypeError(
                "these are the codes of a quantized layer, and this is a float weight: they mean nothing without "
                "their scale. Load them into the quantized model: octavo.load makes it of the float one"
            )
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, StoredCodes):
            with torch._C.DisableTorchFunctionSubclass():
                if result.dtype not in {each.dtype for each in args if isinstance(each, StoredCodes)}:
                    return result.as_subclass(torch.Tensor)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredCodes:
        copied = StoredCodes.of(self.as_subclass(torch.Tensor).clone())
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


def stored(codes: torch.Tensor) -> torch.Tensor:
    """`codes` as a state_dict has them: StoredCodes, unless they are values, which a float layer may take."""
    return codes if codes.is_floating_point() else StoredCodes.of(codes)
