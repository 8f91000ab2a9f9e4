# SPDX-License-Identifier: Apache-2.0
"""Layers of LLM.int8(): a few columns of the input hold outliers and are multiplied apart, in 16 bits, the rest in 8.

OutlierLinear keeps the weights of those columns as floats and multiplies them as two planes of 8 bits by the integer
kernels, which is finer than bfloat16 and, unlike a float product, has the same bits for every batch and every number of
threads. PreparedOutliers is the way there: it watches the columns and then does the same in floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from .. import ops
from ..base.float_types import FLOAT_DTYPES
from ..tensors.forms import TensorForm, ascending_below, finite
from .float_input import fits, in_float32
from .layer_state import Expected, frozen
from .linear import LinearScheme, QuantLinear
from .prepared_channels import PreparedChannels

Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # packed, column_sum, weight_scale
LOW_STEPS = 254  # steps of the low plane in one of the high plane: half a step is 127


class OutlierLinear(QuantLinear):
    """A QuantLinear with `outlier_columns` int64 [o], ascending, and `outlier_weight` float32 [n, o], both frozen.

    y = rest(x) @ (weight_scale * codes).T + x[outlier_columns] @ outlier_weight.T + bias, where rest(x) has zeros in
    the outlier columns, and so do the codes. With o = 0 it is a QuantLinear and costs no more.
    """

    outlier_columns: torch.Tensor
    outlier_packed: torch.Tensor | None  # None without columns, as the two below
    outlier_column_sum: torch.Tensor | None
    outlier_scale: torch.Tensor | None

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
        for name in ("outlier_packed", "outlier_column_sum", "outlier_scale"):
            self.register_buffer(name, None, persistent=False)
        self._resize_(0, "cpu")

    def _resize_(self, count: int, device: torch.device | str | None) -> None:
        """Room for `count` columns."""
        self.outlier_weight = frozen(torch.zeros(self.out_features, count, device=device))
        self.register_buffer("outlier_columns", torch.zeros(count, dtype=torch.int64, device=device))

    def set_outliers_(self, columns: torch.Tensor, weight: torch.Tensor) -> None:
        """`columns` int64 [o], ascending; `weight` float [n, o]."""
        self.outlier_columns, self.outlier_weight = columns, frozen(weight.float())
        self._pack_outliers_()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] float32, bfloat16 or float16 to [..., out_features] in its dtype."""
        columns: Any = self._buffers["outlier_columns"]
        if not len(columns) or not fits(input, self.in_features):
            return super().forward(input)
        return in_float32(self._both_parts, input)

    def _both_parts(self, x: torch.Tensor) -> torch.Tensor:
        columns = self.outlier_columns
        y = self.scheme.weights.multiply(self, x.index_fill(-1, columns, 0.0), None)
        outliers = x.index_select(-1, columns)
        both = torch.cat([outliers, outliers / LOW_STEPS], dim=-1)
        y = y + ops.linear_weight_only(both, *self._planes())
        return y if self.activation is None else ops.activate(y, self.activation)

    def _planes(self) -> Planes:
        buffers: dict[str, Any] = self._buffers
        if buffers["outlier_packed"] is None:
            return planes(self.outlier_weight)
        return buffers["outlier_packed"], buffers["outlier_column_sum"], buffers["outlier_scale"]

    def pack_(self) -> OutlierLinear:
        super().pack_()
        self._pack_outliers_()
        return self

    def _pack_outliers_(self) -> None:
        """The planes of `outlier_weight` as it is now; none without columns and on the meta device."""
        weight = self.outlier_weight
        made: Planes | tuple[None, None, None] = (None, None, None)
        if weight.numel() and not weight.is_meta:
            with torch.inference_mode(False), torch.no_grad():
                made = planes(weight)
        self.outlier_packed, self.outlier_column_sum, self.outlier_scale = made

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        result = super().dequantize(dtype)
        result[:, self.outlier_columns] = self.outlier_weight.detach().to(dtype)
        return result

    def dequantize_rows(self, begin: int, end: int) -> torch.Tensor:
        rows = super().dequantize_rows(begin, end)
        rows[:, self.outlier_columns] = self.outlier_weight.detach()[begin:end]
        return rows

    def take_shapes_(self, state: dict[str, Any], prefix: str) -> None:
        super().take_shapes_(state, prefix)
        self._take_columns_(state, prefix)

    def _take_columns_(self, state: dict[str, Any], prefix: str) -> None:
        """Makes room for as many outlier columns as `state` has; a layer that is filled already forgets its own."""
        columns = state.get(prefix + "outlier_columns")
        if (
            isinstance(columns, torch.Tensor)
            and columns.dim() == 1
            and len(columns) != len(self.outlier_columns)
        ):
            self._resize_(len(columns), columns.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        before, errors = (self.outlier_columns, self.outlier_weight), len(error_msgs)
        self._take_columns_(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) > errors:  # refused: the layer stays as it was
            self.outlier_columns, self.outlier_weight = before

    def _expected_state(self) -> Expected:
        count = len(self.outlier_columns)
        return {
            **super()._expected_state(),
            "outlier_columns": TensorForm(
                (count,), torch.int64, (torch.int64,), check=ascending_below(self.in_features)
            ),
            "outlier_weight": TensorForm(
                (self.out_features, count), torch.float32, FLOAT_DTYPES, check=finite
            ),
        }


def planes(weight: torch.Tensor) -> Planes:
    """`weight` [n, o] as 8-bit codes [n, 2 o] for `linear_weight_only`: scale * (high + low / 254), within scale / 508.

    Source: ours; docs/numerics.md, eq. 39
    """
    weight = weight.detach()
    scale, zero_point = ops.choose_qparams(weight, -127, 127, True)
    high = ops.quantize(weight, scale, zero_point, -127, 127, torch.int8)
    rest = weight - ops.dequantize(high, scale, zero_point)
    low = ops.quantize(rest, scale / LOW_STEPS, zero_point, -127, 127, torch.int8)
    return *ops.pack_weight(torch.cat([high, low], dim=1)), scale[:, None]


class PreparedOutliers(PreparedChannels):
    """A PreparedLinear that leaves the columns that `is_outlier` bool [k] marks as they are, in x and in the weight.

    Calibration sees the largest |x| of each column; the scheme then says which of them are outliers.
    """

    is_outlier: torch.Tensor

    def add_findings_(self) -> None:
        none = torch.zeros(self.in_features, dtype=torch.bool, device=self.weight.device)
        self.register_buffer("is_outlier", none)

    def fake_quantized_product(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        y = F.linear(self.fake_quantized_input(x), self.fake_quantized_weight(), bias)
        if torch.compiler.is_compiling():  # a graph must not depend on how many columns there are
            rest = ~self.is_outlier
            return y + F.linear(x.masked_fill(rest, 0.0), self.weight_matrix.float().masked_fill(rest, 0.0))
        columns = self.outlier_columns
        if not len(columns):
            return y
        weight = self.weight_matrix.index_select(1, columns).float()
        return y + F.linear(x.index_select(-1, columns), weight)

    # --- the views --------------------------------------------------------------------------------------------------

    @property
    def outlier_columns(self) -> torch.Tensor:
        """Their indices, int64 [o], ascending."""
        return self.is_outlier.nonzero().flatten()

    def float_weight(self) -> torch.Tensor:
        """The weight, float32 [n, k], with zeros in the outlier columns; gradients reach the others."""
        return self.weight_matrix.float().masked_fill(self.is_outlier, 0.0)

    def fake_quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the integer layer reads of x [..., k] in 8 bits, as floats; gradients reach x."""
        return super().fake_quantized_input(x.masked_fill(self.is_outlier, 0.0))

    # --- calibration ------------------------------------------------------------------------------------------------

    def _calibrated(self) -> torch.Tensor | None:
        return self.channel_observer.batches > 0

    def take_input_qparams_(self) -> None:
        """Marks the columns that hold outliers in all that was seen so far."""
        if self.is_calibrated:
            found = self.scheme.activations.find_outliers(self.input_absmax)
            if not torch.equal(found, self.is_outlier):
                self.is_outlier = found
                self.reset_weight_scale_()
