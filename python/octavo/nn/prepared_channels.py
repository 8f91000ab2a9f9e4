# SPDX-License-Identifier: Apache-2.0
"""PreparedChannels: a prepared layer that watches each channel of its input, for schemes that tell channels apart."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .. import observers
from ..observers import Observer
from .float_input import in_float32
from .prepared import PreparedLinear, PreparedScheme


class PreparedChannels(PreparedLinear):
    """A PreparedLinear whose calibration sees the smallest and the largest x of each channel.

    Once calibrated it computes in float32 and gives its input's dtype, as its integer layer does. A subclass says what
    it finds out (`add_findings_`), what it computes with that (`fake_quantized_product`), and, if it is not the plain
    layer while calibrating, what it watches and which weight it has then.
    """

    channel_observer: Observer

    def __init__(
        self,
        linear: nn.Module,
        scheme: PreparedScheme,
        *,
        observer: Observer | None = None,
        estimator: str = "clipped",
        learn_scales: bool = False,
    ):
        super().__init__(linear, scheme, observer=observer, estimator=estimator, learn_scales=learn_scales)
        self.channel_observer = observers.MinMax().make(axis=-1)
        self.channel_observer.reset(channels=self.in_features)
        self.add_findings_()

    def add_findings_(self) -> None:
        """Adds the buffers for what calibration finds out; they start with what changes nothing."""
        raise NotImplementedError

    def fake_quantized_product(self, x: torch.Tensor) -> torch.Tensor:
        """What the integer layer gives for x float32 [..., k], as floats [..., n]."""
        raise NotImplementedError

    def watch(self, input: torch.Tensor) -> None:
        """Looks at an input while calibrating."""
        self.channel_observer.update(input)

    def calibrating_weight(self) -> torch.Tensor:
        """The weight [n, k] that multiplies inputs while calibrating."""
        return self.weight_matrix

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.is_calibrating:
            if self.is_watching:
                self.watch(input)
            return F.linear(input, self.calibrating_weight(), self.bias)
        self.require_calibrated()
        return in_float32(self.fake_quantized_product, input)

    @property
    def input_absmax(self) -> torch.Tensor:
        """The largest |x| of each channel in all inputs so far, float32 [k]."""
        return torch.maximum(self.channel_observer.low.abs(), self.channel_observer.high.abs())
