# SPDX-License-Identifier: Apache-2.0
"""PreparedLinear: a linear layer on its way to integers, which holds the float weight and shows what will become of it.

While calibrating it is the float layer, and an observer watches its input. Otherwise it computes with fake-quantized
weight and input: the numbers of the integer layer that freezing makes of it, and gradients pass through to the floats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ..formats import WeightFormat
from ..observers import Observer
from ..reference import SMALLEST_SCALE
from ..tensors.fake_quantize import (
    ESTIMATORS,
    offset_zero_point,
    positive_scale,
    straight_through,
)
from ..tensors.granularity import PerTensor
from ..tensors.qparams import QParams, QuantizedTensor
from .linear import add_bias_
from .replacements import LINEAR, Replacement, bias_of, features_of, kind_of
from .scales import INPUT_QMAX, INPUT_QMIN, keep_scales


class PreparedScheme(Protocol):
    """What a PreparedLinear asks of its scheme."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> WeightFormat: ...

    @property
    def activations(self) -> Any: ...

    @property
    def method(self) -> Any: ...

    def to_dict(self) -> dict[str, Any]: ...


class PreparedLinear(nn.Module):
    """y = fake_quantized(x) @ fake_quantized(weight).T + bias; while calibrating, y = x @ weight.T + bias.

    linear         the layer to prepare, of a class in nn/replacements.py; its own Parameters are held, so an optimizer
                   that has them keeps training them
    observer       for schemes whose input scale is found by calibration, else None
    estimator      the gradient of rounding: "clipped" is 0 where a value is out of range, "pure" is 1 everywhere
    learn_scales   scales become Parameters and are trained with the rest; the input's scale starts at its calibrated
                   value, the weight's scales as `first_weight_scale` says
    raises         ValueError for another estimator, TypeError for a layer of another class

    The state_dict has `weight` and `bias` as the float layer has them, with an observer its state, `input_scale` [1]
    and `input_zero_point` [1], and with learn_scales `weight_scale`, one for each row or group; a zero point is then
    learned as `input_offset` [1], which is what code 0 stands for. Training and eval mode compute the same.
    source         straight-through: Bengio et al. 2013 (arXiv:1308.3432), section 4; learned scales: Esser et al. 2020
                   (arXiv:1902.08153); learned zero point: Bhalgat et al. 2020 (arXiv:2004.09576)
    """

    replaces: Replacement = LINEAR  # the class of the float layer whose place it took
    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_scale: nn.Parameter
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    input_offset: nn.Parameter | None  # in the place of input_zero_point if that is learned

    def __init__(
        self,
        linear: nn.Module,
        scheme: PreparedScheme,
        *,
        observer: Observer | None = None,
        estimator: str = "clipped",
        learn_scales: bool = False,
    ):
        super().__init__()
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        self.name = ""  # in the model, for errors
        self.statistics: Any = None  # of the inputs, if the method asks for some: methods/statistics.py
        self.remark = ""  # what the report says of how it was frozen
        self.in_features, self.out_features = features_of(linear)
        self.replaces = kind_of(linear)
        self.scheme = scheme
        self.estimator, self.learn_scales = estimator, learn_scales
        self.is_calibrating = False
        self.weight = linear.weight  # type: ignore[assignment]
        self.register_parameter("bias", bias_of(linear))
        self.input_observer = observer
        self._add_scales()
        self.train(linear.training)

    def _add_scales(self) -> None:
        device = self.weight.device
        if self.learn_scales:
            shape = self.scheme.weights.scale_shape(self.out_features, self.in_features)
            start = torch.ones(shape, dtype=torch.float32, device=device)
            if not self.weight.is_meta:
                start = self._first_weight_scale(self.weight_matrix).reshape(shape)
            self.weight_scale = nn.Parameter(start)
        if self.input_observer is not None:
            one = torch.ones(1, dtype=torch.float32, device=device)
            if self.learn_scales:
                self.input_scale = nn.Parameter(one)
            else:
                self.register_buffer("input_scale", one)
            is_learned = self.learn_scales and self.scheme.activations.has_zero_point
            self.register_parameter(
                "input_offset", nn.Parameter(torch.zeros_like(one)) if is_learned else None
            )
            if not is_learned:
                self.register_buffer("input_zero_point", torch.zeros(1, dtype=torch.int32, device=device))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] to [..., out_features], float32, bfloat16 or float16 as the weight is.

        raises   ValueError if the scheme needs calibration and no batch has been seen
        """
        if self.is_calibrating:
            if self.input_observer is not None:
                self.input_observer.update(input)
            return F.linear(input, self.weight_matrix, self.bias)
        if torch.is_autocast_enabled("cpu"):  # as the integer layers do, so that the codes are the same
            input = input.to(torch.get_autocast_dtype("cpu"))
        x, bias = self.fake_quantized_input(input), self.fake_quantized_bias()
        return F.linear(x, self.fake_quantized_weight(), bias)

    # --- the views --------------------------------------------------------------------------------------------------

    @property
    def weight_matrix(self) -> torch.Tensor:
        """The float weight [n, k], a view of the Parameter, which some classes of layers have as [k, n]."""
        return self.replaces.matrix(self.weight)

    def float_weight(self) -> torch.Tensor:
        """What becomes codes [n, k]: the weight, or what a scheme that calibrates makes of it."""
        return self.weight_matrix

    @property
    def weight_qparams(self) -> QParams:
        """The QParams of the present weight: from its range, or learned. Raises: ValueError if it holds NaN or Inf."""
        weight = self.float_weight()
        try:
            # Learned scales need no search for better ones.
            choose = self.scheme.weights.qparams if self.learn_scales else self._range_of
            qparams = choose(weight)
        except ValueError as error:
            if weight.isfinite().all():
                raise ValueError(f"layer {self.name!r}: {error}") from error
            raise ValueError(
                f"layer {self.name!r} has NaN or Inf in its weight: training has diverged, or it was loaded so"
            ) from error
        if self.learn_scales:
            qparams = replace(qparams, scale=positive_scale(self.weight_scale).reshape(qparams.scale.shape))
        return self.scheme.weights.stored_qparams(qparams)

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight's codes [n, k] and their qparams, as freezing would take them now."""
        return self.weight_qparams.quantize(self.float_weight())

    def fake_quantized_weight(self) -> torch.Tensor:
        """`quantized_weight` as floats [n, k] in the weight's dtype; gradients reach the weight and a learned scale."""
        q, weight = self.weight_qparams, self.float_weight()
        rows = q.granularity.to_rows(weight)
        if self.learn_scales:
            learned = self.weight_scale.reshape(-1)
            rows = q.learned_rows(rows, straight_through(learned, self.scheme.weights.stored_scale(learned)))
        else:
            rows = q.fake_quantize_rows(rows, self.estimator)
        return q.granularity.from_rows(rows, weight.shape)

    @property
    def input_qparams(self) -> QParams:
        """The QParams of the calibrated input, per tensor. Raises: ValueError if no batch has been seen."""
        self.require_calibrated()
        scale = positive_scale(self.input_scale)
        if self.input_offset is None:
            zero_point = self.input_zero_point
        else:
            zero_point = offset_zero_point(scale, self.input_offset, INPUT_QMIN, INPUT_QMAX)
        return QParams(scale.reshape(()), zero_point.reshape(()), INPUT_QMIN, INPUT_QMAX, PerTensor())

    def fake_quantized_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the integer layer reads of x [..., k], as floats in x's dtype; gradients reach x."""
        return self.scheme.activations.fake_quantize(x, self)

    def fake_quantized_bias(self) -> torch.Tensor | None:
        """What the integer layer adds for the bias, in its dtype; gradients reach the bias.

        raises   ValueError if that shall be an int32 and does not fit
        """
        return None if self.bias is None else self.scheme.activations.fake_quantize_bias(self.bias, self)

    # --- calibration ------------------------------------------------------------------------------------------------

    @property
    def is_calibrated(self) -> bool:
        """True if the scheme needs no calibration, or if its observer has seen a finite value."""
        calibrated = self._calibrated()
        return calibrated is None or bool(calibrated)

    def _calibrated(self) -> torch.Tensor | None:
        """The same as a bool tensor, for graphs; None if the scheme needs no calibration."""
        return None if self.input_observer is None else self.input_observer.batches > 0

    def require_calibrated(self) -> None:
        """Raises: ValueError if the layer is not calibrated; in a compiled graph RuntimeError, when it runs."""
        if torch.compiler.is_compiling():
            calibrated = self._calibrated()
            if calibrated is not None:
                torch._assert_async(calibrated, self._not_calibrated())
        elif not self.is_calibrated:
            raise ValueError(self._not_calibrated())

    def _not_calibrated(self) -> str:
        return (
            f"layer {self.name!r} is not calibrated: {self.scheme.name} needs its input's range, and no finite "
            "batch has reached it. Give batches that do, as data or inside `with octavo.calibrating(model):`, or "
            f"keep the layer float with exclude={self.name!r}"
        )

    def require_scales(self) -> None:
        """Raises ValueError for a scale or an offset that no codes can have. Of a negative scale |scale| counts."""
        for name in ("weight_scale", "input_scale", "input_offset"):
            values = getattr(self, name, None)
            if values is None:
                continue
            values = values.detach().reshape(-1)
            steps = values.abs()
            fits = (steps * -INPUT_QMIN).isfinite()
            if name != "input_offset":
                fits &= steps >= SMALLEST_SCALE
            if not fits.all():
                at = int((~fits).nonzero()[0])
                raise ValueError(
                    f"layer {self.name!r}: {name}[{at}] is {values[at].item():g}, with which nothing can be quantized; "
                    "training has diverged. Go back to an earlier state, train scales with a smaller learning rate, or "
                    "calibrate anew; layer.reset_weight_scale_() starts the scales of a weight anew"
                )

    def take_input_qparams_(self) -> None:
        """Sets the scale and zero point of the input to what the observer has found; without a find they stay."""
        if self.input_observer is not None and self.input_observer.is_initialized:
            q = self.scheme.activations.qparams(self.input_observer)
            with torch.no_grad():
                self.input_scale.copy_(q.scale.reshape(1))
                if self.input_offset is None:
                    self.input_zero_point.copy_(q.zero_point.reshape(1))
                else:
                    self.input_offset.copy_(-q.scale.reshape(1) * q.zero_point)

    def reset_weight_scale_(self) -> None:
        """A learned scale starts anew, for `float_weight` as it is now; without one there is nothing to do."""
        if self.learn_scales:
            with torch.no_grad():
                scale = self._first_weight_scale(self.float_weight())
                self.weight_scale.copy_(scale.reshape(self.weight_scale.shape))

    def share_scales_(self, other: PreparedLinear) -> None:
        """Learned scales become those of `other`, which has the same weight."""
        if self.learn_scales:
            self.weight_scale = other.weight_scale

    def _first_weight_scale(self, weight: torch.Tensor) -> torch.Tensor:
        q = self._range_of(weight)
        return q.first_scale(q.granularity.to_rows(weight))

    def _range_of(self, weight: torch.Tensor) -> QParams:
        return self.scheme.method.qparams(self.scheme.weights, weight)

    def to_dict(self) -> dict[str, Any]:
        """What `scheme.prepare_linear` needs to make such a layer again, JSON."""
        return {
            "scheme": self.scheme.to_dict(),
            "estimator": self.estimator,
            "learn_scales": self.learn_scales,
        }

    # --- nn.Module --------------------------------------------------------------------------------------------------

    def take_shapes_(self, state: dict[str, Any], prefix: str) -> None:
        """As QuantLinear.take_shapes_."""
        add_bias_(self, state.get(prefix + "bias"))

    def extra_repr(self) -> str:
        state = (
            "calibrating" if self.is_calibrating else "calibrated" if self.is_calibrated else "not calibrated"
        )
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, estimator={self.estimator}, learn_scales={self.learn_scales}, {state}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PreparedLinear:
        return super()._apply(keep_scales(self, fn), recurse)

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
        """torch would take the codes of a frozen layer for a float weight and say nothing."""
        weight = state_dict.get(prefix + "weight")
        if isinstance(weight, torch.Tensor) and not weight.is_floating_point():
            error_msgs.append(
                f"{prefix}weight is {weight.dtype}, the codes of a frozen layer, and this one is prepared: it needs "
                "floats; load into the frozen model"
            )
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
