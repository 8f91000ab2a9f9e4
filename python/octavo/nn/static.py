# SPDX-License-Identifier: Apache-2.0
"""StaticQuantLinear: a QuantLinear whose input has one scale, known beforehand from calibration.

So no pass over the input is needed to find it, and the scale travels with the weight: in state_dict, in files.
"""

from __future__ import annotations

from typing import Any

import torch

from ..base.float_types import FLOAT_DTYPES
from ..tensors.fake_quantize import quantize_bias
from ..tensors.forms import TensorForm, positive
from ..tensors.granularity import PerTensor
from ..tensors.qparams import QParams
from .layer_state import Expected, frozen
from .linear import LinearScheme, QuantLinear
from .scales import INPUT_QMAX, INPUT_QMIN


class StaticQuantLinear(QuantLinear):
    """A QuantLinear with `input_scale` float32 [1], frozen, and `input_zero_point` int32 [1], a buffer.

    Its state_dict has `input_scale` and, unless the scheme is symmetric, `input_zero_point` as int8, for that is how
    compressed-tensors stores them. Codes of the input are -128 .. 127. With int32_bias in the scheme, `bias` is a
    buffer of int32 codes, multiples of the input scale times the scale of a row. Arguments and the rest as QuantLinear.
    """

    input_names = ("input_scale", "input_zero_point")
    input_zero_point: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: LinearScheme,
        device: torch.device | str | None = None,
    ):
        super().__init__(in_features, out_features, bias, scheme=scheme, device=device)
        self.input_scale = frozen(torch.ones(1, dtype=torch.float32, device=device))
        # A buffer, for an integer Parameter would make model.requires_grad_(True) raise.
        zero = torch.zeros(1, dtype=torch.int32, device="cpu" if scheme.activations.symmetric else device)
        self.register_buffer("input_zero_point", zero, persistent=not scheme.activations.symmetric)
        if bias and scheme.activations.int32_bias:
            self._set_bias_codes_(torch.zeros(out_features, dtype=torch.int32, device=device))

    def set_input_qparams_(self, qparams: QParams) -> None:
        """`qparams` of the input: per tensor, codes -128 .. 127. They make the steps of an int32 bias."""
        self.input_scale = frozen(qparams.scale.reshape(1).clone())
        self.input_zero_point = qparams.zero_point.reshape(1).clone()
        self.quantize_bias_()

    def quantize_bias_(self) -> None:
        """A float bias becomes codes, if the scheme wants them. Raises: ValueError if they do not fit int32."""
        bias = self._parameters.get("bias")
        if bias is not None and self.scheme.activations.int32_bias:
            codes = quantize_bias(bias, self.input_scale, self.row_scales(), self.in_features)
            self._set_bias_codes_(codes)

    def float_bias(self) -> torch.Tensor | None:
        """The bias as floats [n]: itself, or what its codes stand for, float64."""
        bias = self.bias
        if bias is None or bias.is_floating_point():
            return bias
        return bias * self.input_scale.detach().double() * self.row_scales().double()

    def _set_bias_codes_(self, codes: torch.Tensor) -> None:
        del self.bias  # a Parameter until now; a buffer for the reason above
        self.register_buffer("bias", codes)

    def take_shapes_(self, state: dict[str, Any], prefix: str) -> None:
        super().take_shapes_(state, prefix)
        bias = self._parameters.get("bias")
        if bias is not None and not bias.is_floating_point():
            self._set_bias_codes_(bias.detach())

    def input_tensors(self) -> tuple[torch.Tensor, ...]:
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        return parameters["input_scale"], buffers["input_zero_point"]

    @property
    def input_qparams(self) -> QParams:
        """Of the input: per tensor, codes -128 .. 127."""
        scale, zero_point = self.input_scale.detach().reshape(()), self.input_zero_point.reshape(())
        return QParams(scale, zero_point, INPUT_QMIN, INPUT_QMAX, PerTensor())

    def _expected_state(self) -> Expected:
        expected = super()._expected_state()
        if self.scheme.activations.int32_bias:
            expected["bias"] = TensorForm((self.out_features,), torch.int32, (torch.int32,))
        return {
            **expected,
            "input_scale": TensorForm((1,), torch.float32, FLOAT_DTYPES, check=positive),
            "input_zero_point": TensorForm((1,), torch.int32, (torch.int8,)),
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "input_zero_point"
        if key in destination:
            destination[key] = destination[key].to(torch.int8)

    def _restore_dtypes(self) -> None:
        super()._restore_dtypes()
        if (
            self.scheme.activations.symmetric
        ):  # it is in no state_dict, and `to_empty` has made any number of it
            self.input_zero_point = torch.zeros(1, dtype=torch.int32, device="cpu")
