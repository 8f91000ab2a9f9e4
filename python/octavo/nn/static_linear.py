# SPDX-License-Identifier: Apache-2.0
"""StaticQuantLinear: a QuantLinear whose input has one scale, known beforehand from calibration.

So no pass over the input is needed to find it, and the scale travels with the weight: in state_dict, in files.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from .. import ops
from ..qparams import FLOAT_DTYPES, QParams
from .linear import LinearScheme, QuantLinear, frozen


class StaticScheme(LinearScheme, Protocol):
    """What a StaticQuantLinear asks of its scheme."""

    @property
    def symmetric(self) -> bool: ...


class StaticQuantLinear(QuantLinear):
    """A QuantLinear with `input_scale` float32 [1], frozen, and `input_zero_point` int32 [1], a buffer.

    Its state_dict has `input_scale` and, unless the scheme is symmetric, `input_zero_point` as int8, for that is how
    compressed-tensors stores them. Codes of the input are -128 .. 127. Arguments and the rest as QuantLinear.
    """

    input_zero_point: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: StaticScheme,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, bias, scheme=scheme, device=device)
        self.input_scale = frozen(torch.ones(1, dtype=torch.float32, device=device))
        # A buffer, for an integer Parameter would make model.requires_grad_(True) raise.
        zero = torch.zeros(1, dtype=torch.int32, device="cpu" if scheme.symmetric else device)
        self.register_buffer("input_zero_point", zero, persistent=not scheme.symmetric)

    def set_input_qparams_(self, qparams: QParams) -> None:
        """`qparams` of the input: per tensor, codes -128 .. 127."""
        self.input_scale = frozen(qparams.scale.reshape(1).clone())
        self.input_zero_point = qparams.zero_point.reshape(1).clone()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] float32, bfloat16 or float16 to [..., out_features] in its dtype."""
        packed, column_sum = self._packed_for(input)
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return ops.linear_static(
            input,
            packed,
            column_sum,
            parameters["weight_scale"],
            parameters["bias"],
            parameters["input_scale"],
            buffers["input_zero_point"],
            self.activation,
        )

    def _expected_state(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        return {
            **super()._expected_state(),
            "input_scale": ((1,), FLOAT_DTYPES),
            "input_zero_point": ((1,), (torch.int8,)),
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "input_zero_point"
        if key in destination:
            destination[key] = destination[key].to(torch.int8)

    def _restore_dtypes(self) -> None:
        super()._restore_dtypes()
        self.input_zero_point = self.input_zero_point.to(torch.int32)
