# SPDX-License-Identifier: Apache-2.0
"""Layers of SmoothQuant: (x / s) @ (W * s).T is x @ W.T, and an s for each input channel moves outliers from x to W.

Where nothing before the layer can absorb 1 / s, the layer multiplies its input by it: SmoothedLinear, which otherwise
is the layer of the scheme that follows. PreparedSmoothed is the way there: it watches the channels, is given s, and
from then on quantizes the smoothed weight and the smoothed input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from ..base.float_types import FLOAT_DTYPES
from ..tensors.forms import TensorForm, positive
from .float_input import fits, in_float32
from .layer_state import Expected, frozen
from .linear import LinearScheme, QuantLinear
from .prepared_channels import PreparedChannels
from .static import StaticQuantLinear

SAMPLE_ROWS, ROWS_OF_A_BATCH = 256, 32  # of the input, kept while calibrating for the search of alpha


class SmoothedLinear(QuantLinear):
    """A QuantLinear with `input_multiplier` float32 [k], frozen: y = (x * input_multiplier) @ (weight_scale * codes).T.

    `dequantize` is what x is multiplied by in all: weight_scale * codes * input_multiplier.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: LinearScheme,
        device: torch.device | str | None = None,
    ):
        kind: Any = super()
        kind.__init__(in_features, out_features, bias, scheme=scheme, device=device)
        self.input_multiplier = frozen(torch.ones(in_features, dtype=torch.float32, device=device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] float32, bfloat16 or float16 to [..., out_features] in its dtype."""
        forward = super().forward
        if not fits(input, self.in_features):
            return forward(input)
        multiplier: Any = self._parameters["input_multiplier"]
        return in_float32(lambda x: forward(x * multiplier), input)

    def set_input_multiplier_(self, multiplier: torch.Tensor) -> None:
        """`multiplier` float32 [k], 1 / s."""
        self.input_multiplier = frozen(multiplier)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (super().dequantize() * self.input_multiplier.detach()).to(dtype)

    def dequantize_rows(self, begin: int, end: int) -> torch.Tensor:
        return super().dequantize_rows(begin, end) * self.input_multiplier.detach()

    def _expected_state(self) -> Expected:
        form = TensorForm((self.in_features,), torch.float32, FLOAT_DTYPES, check=positive)
        return {**super()._expected_state(), "input_multiplier": form}


class StaticSmoothedLinear(SmoothedLinear, StaticQuantLinear):
    """A SmoothedLinear whose smoothed input has one scale, known beforehand."""


class PreparedSmoothed(PreparedChannels):
    """A PreparedLinear whose weight is smoothed by `smoothing` float32 [k], ones until `smooth_` is called.

    Calibration takes two steps. First the largest |x| of each channel is seen, from which s is chosen. Then, if the
    scheme has an observer, the observer sees the smoothed input. `is_folded` says that x comes divided by s already.
    The float weight stays what it is: the smoothed one is made when it is needed.
    """

    smoothing: torch.Tensor
    is_smoothed: torch.Tensor
    is_folded: torch.Tensor

    def add_findings_(self) -> None:
        self.register_buffer("smoothing", torch.ones(self.in_features, device=self.weight.device))
        self.register_buffer("is_smoothed", torch.tensor(False, device="cpu"))
        self.register_buffer("is_folded", torch.tensor(False, device="cpu"))
        self.sample: list[torch.Tensor] = []  # rows of the input, until s is chosen

    def fake_quantized_product(self, x: torch.Tensor) -> torch.Tensor:
        x, bias = self.fake_quantized_input(x), self.fake_quantized_bias()
        return F.linear(x, self.fake_quantized_weight(), None if bias is None else bias.float())

    def calibrating_weight(self) -> torch.Tensor:
        matrix = self.weight_matrix
        return self.float_weight().to(matrix.dtype) if self.is_folded else matrix

    def watch(self, input: torch.Tensor) -> None:
        if self.is_smoothed:
            if self.input_observer is not None:
                self.input_observer.update(self.smoothed_input(input.detach()))
            return
        super().watch(input)
        if self.scheme.method.keeps_sample and sum(map(len, self.sample)) < SAMPLE_ROWS:
            rows = input.detach().reshape(-1, self.in_features)
            rows = rows[:: max(1, len(rows) // ROWS_OF_A_BATCH)][:ROWS_OF_A_BATCH].float()
            self.sample.append(rows[rows.isfinite().all(1)])

    def smooth_(self, smoothing: torch.Tensor, *, folded: bool) -> None:
        """Takes `smoothing` float32 [k]; `folded`: what comes before the layer gives x / smoothing from now on."""
        self.smoothing = smoothing
        self.is_smoothed = torch.tensor(True, device="cpu")
        self.is_folded = torch.tensor(folded, device="cpu")
        self.sample = []
        self.reset_weight_scale_()

    # --- trials -----------------------------------------------------------------------------------------------------

    def try_smoothing_(self, smoothing: torch.Tensor) -> None:
        """Until `end_trial_`, whoever reads `weight` gets the smoothed one, made anew each time: a copy would stay."""
        self.__dict__["tried"] = (self._parameters.pop("weight"), smoothing)

    def end_trial_(self) -> None:
        weight, _ = self.__dict__.pop("tried")
        self._parameters = {"weight": weight, **self._parameters}

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "tried" in self.__dict__:
            weight, smoothing = self.__dict__["tried"]
            replaces = self.replaces
            return replaces.weight(replaces.matrix(weight) * smoothing).to(weight.dtype)
        return super().__getattr__(name)

    # --- the views --------------------------------------------------------------------------------------------------

    @property
    def input_multiplier(self) -> torch.Tensor:
        """1 / smoothing, float32 [k]."""
        return 1 / self.smoothing

    def float_weight(self) -> torch.Tensor:
        """The smoothed weight, float32 [n, k]; gradients reach the weight."""
        return self.weight_matrix.float() * self.smoothing

    def smoothed_input(self, x: torch.Tensor) -> torch.Tensor:
        """x / smoothing; x itself if the module before already gives it so."""
        if torch.compiler.is_compiling():  # a graph must not depend on the value; x * 1 is x
            return x.float() * torch.where(self.is_folded, 1.0, self.input_multiplier)
        return x if self.is_folded else x.float() * self.input_multiplier

    def fake_quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the integer layer reads of x [..., k] once it is smoothed, as floats; gradients reach x."""
        return super().fake_quantized_input(self.smoothed_input(x))

    # --- calibration ------------------------------------------------------------------------------------------------

    def _calibrated(self) -> torch.Tensor | None:
        calibrated = super()._calibrated()
        return self.is_smoothed if calibrated is None else self.is_smoothed & calibrated

    def _not_calibrated(self) -> str:
        if torch.compiler.is_compiling() or not self.is_smoothed:
            return super()._not_calibrated()
        return (
            f"layer {self.name!r} is not calibrated: {self.scheme.name} has found its smoothing, and now needs the "
            "range of the smoothed input: run the data a second time in `with octavo.calibrating(model):`, or use "
            "octavo.quantize_(model, scheme, data=batches), which does"
        )
