# SPDX-License-Identifier: Apache-2.0
"""GPTQ: weights are rounded so that the layer's output, not the weight, stays close on the inputs that it has seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..base import configs
from ..formats import WeightFormat
from ..nn import PreparedLinear
from ..tensors.qparams import QParams, QuantizedTensor
from .base import Method, RoundToNearest
from .clip_search import ClipSearch, default_method, has_scales
from .compensation import BLOCK, compensated
from .statistics import Positions, gram_of, recorded

ORDERS, GROUPS = ("activation", "ascending"), ("static", "dynamic")
FEWEST_ROWS = 4  # a layer of k inputs needs k / FEWEST_ROWS rows


@dataclass(frozen=True)
class GPTQ(Method):
    """Each column that is rounded has its error taken off the columns after it, as far as the inputs allow.

    damping   times the mean of the diagonal of X^T X is added to that diagonal; ten times more where it is singular
    order     "activation": the columns with the largest inputs first, which is better on average. "ascending": as they
              lie, the original's default
    groups    "static": scales are found before anything is rounded, so that a group holds neighbours whatever the order
              is. "dynamic": when a block of 128 columns is reached, as the original does; with order="ascending" only
    scales    the method that finds them: RoundToNearest() or ClipSearch(). None: ClipSearch for integers of 4 bits and
              fewer, else RoundToNearest
    Data of a few thousand rows is enough, at least as many as the widest layer has inputs. A layer that has seen fewer
    than a quarter of that is rounded without data, and the report says so.
    source   Frantar et al. 2022 (arXiv:2210.17323); docs/numerics.md, eq. 89 to 91
    """

    damping: float = 0.01
    order: str = "activation"
    groups: str = "static"
    scales: Any = None

    needs_data: ClassVar[bool] = True
    is_sequential: ClassVar[bool] = True
    rounds_to_nearest: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.damping, int | float) or not 0 <= self.damping < float("inf"):
            raise ValueError(f"GPTQ: damping must be a number, 0 or more, got {self.damping!r}")
        for name, accepted in (("order", ORDERS), ("groups", GROUPS)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"GPTQ: {name} must be {' or '.join(map(repr, accepted))}, got {getattr(self, name)!r}"
                )
        if (self.order, self.groups) == ("activation", "dynamic"):
            raise ValueError(
                "GPTQ: dynamic groups in the order of activations would not be neighbours, which no format here "
                'holds; use groups="static", or order="ascending"'
            )
        if self.scales is not None:
            found = configs.instance("GPTQ: scales", Method, self.scales, "RoundToNearest() and ClipSearch()")
            if not isinstance(found, RoundToNearest | ClipSearch):
                raise ValueError(
                    f"GPTQ: scales are found by RoundToNearest() or ClipSearch(), not by {found.name}()"
                )
            object.__setattr__(self, "scales", found)

    def reason_to_refuse(self, scheme: Any) -> str:
        if not has_scales(scheme.weights):
            return f"GPTQ chooses codes, and {scheme.name} has none: its weights are rounded one by one"
        if scheme.activations.prepared.float_weight is not PreparedLinear.float_weight:
            return f"GPTQ does not go with {scheme.name}, whose layers read some columns apart"
        return ""

    def scales_for(self, weights: WeightFormat) -> Method:
        """The method that finds the scales of `weights`."""
        return default_method(weights) if self.scales is None else self.scales

    @classmethod
    @contextmanager
    def watching(
        cls, model: nn.Module, layers: Sequence[Any], *, in_place: bool, positions: Positions | None = None
    ) -> Iterator[None]:
        with recorded(model, layers, positions):
            yield

    def qparams(self, weights: WeightFormat, weight: torch.Tensor) -> QParams:
        return self.scales_for(weights).qparams(weights, weight)

    def require_ready(self, prepared: Any) -> None:
        if prepared.statistics is None:
            raise ValueError(
                f"layer {prepared.name!r} is not calibrated: GPTQ learns from its inputs. Give batches, as data or "
                "inside `with octavo.calibrating(model):`; what was learned is not in files"
            )

    def choose_codes(self, prepared: Any) -> QuantizedTensor:
        rows, k = prepared.statistics.rows, prepared.in_features
        if rows < k / FEWEST_ROWS:
            prepared.remark = f"rounded without data: {rows} rows reached it, fewer than {k} / {FEWEST_ROWS}"
            return prepared.quantized_weight
        return self.codes(
            prepared.scheme.weights, prepared.float_weight().detach().float(), gram_of(prepared)
        )

    def codes(self, weights: WeightFormat, weight: torch.Tensor, gram: torch.Tensor) -> QuantizedTensor:
        """The codes of `weight` float32 [n, k] for inputs whose X^T X is `gram` [k, k]."""
        scales = self.scales_for(weights)
        by_activation = self.order == "activation"
        group_size = getattr(weights.granularity, "group_size", weight.shape[1])
        if self.groups == "dynamic" and group_size < weight.shape[1]:

            def find(columns: torch.Tensor) -> QParams:
                return scales.qparams(weights, columns)

            block = -(-BLOCK // group_size) * group_size
            return compensated(
                weight,
                gram,
                find,
                damping=self.damping,
                by_activation=False,
                group_size=group_size,
                block=block,
            )
        # Scales that count errors by X^T X lose here, to those that count large weights more: KL divergences of .0277
        # and .0253 for 3 bits, .189 and .171 for 2. What such scales would save, compensation makes up for.
        qparams = scales.qparams(weights, weight)
        return compensated(weight, gram, qparams, damping=self.damping, by_activation=by_activation)
