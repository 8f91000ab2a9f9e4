# SPDX-License-Identifier: Apache-2.0
"""What the tensors of a quantized layer in a state_dict may be, and codes that no float weight takes for its values.

torch copies anything into anything that has the same shape: floats into codes, codes into floats, a NaN into a scale.
A layer asks here before it takes something, and `octavo.save` and `load` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .scales import SCALES

Expected = dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]  # name: shape, dtypes
NOT_POSITIVE = ("input_offset", "outlier_weight")  # of the scales


def form_errors(expected: Expected, state: dict[str, Any], prefix: str) -> list[str]:
    """Dtypes and shapes in `state` that are not as `expected`."""
    errors = []
    for name, (shape, dtypes) in expected.items():
        value = state.get(prefix + name)
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
    checks: dict[str, Callable[[torch.Tensor, Expected], str]] = {}
    checks |= {name: _finite if name in NOT_POSITIVE else _positive for name in SCALES}
    checks |= {"bias": _not_nan, "outlier_columns": _ascending}
    errors = []
    for name in expected:
        value = state.get(prefix + name)
        if name in checks and isinstance(value, torch.Tensor) and not value.is_meta:
            wrong = checks[name](value.detach(), expected)
            if wrong:
                errors.append(
                    f"{prefix}{name} holds {wrong}; the file is damaged, or the model was never right"
                )
    return errors


def _positive(scale: torch.Tensor, expected: Expected) -> str:
    return (
        ""
        if (scale.isfinite() & (scale > 0)).all()
        else "values that are no scales: NaN, Inf, 0 or negative ones"
    )


def _finite(values: torch.Tensor, expected: Expected) -> str:
    return "" if values.isfinite().all() else "NaN or Inf"


def _not_nan(bias: torch.Tensor, expected: Expected) -> str:
    return "NaN" if bias.isnan().any() else ""


def _ascending(columns: torch.Tensor, expected: Expected) -> str:
    k = expected["weight"][0][1]
    is_ordered = (columns.diff() > 0).all() and (columns >= 0).all() and (columns < k).all()
    return "" if is_ordered else f"values that are not ascending columns in 0 .. {k - 1}"


class StoredCodes(torch.Tensor):
    """The int8 codes of a layer in the state_dict that it gives. They are an ordinary tensor, but for one thing: no
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
                "these are int8 codes of a quantized layer, and this is a float weight: they mean nothing without "
                "their scale. Load them into the quantized model: octavo.load makes it of the float one"
            )
        result = super().__torch_function__(func, types, args, kwargs)
        if isinstance(result, StoredCodes) and result.dtype != torch.int8:
            return result.as_subclass(torch.Tensor)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredCodes:
        copied = StoredCodes.of(self.as_subclass(torch.Tensor).clone())
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)
