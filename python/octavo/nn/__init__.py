# SPDX-License-Identifier: Apache-2.0
"""Layers: quantized ones, ordinary nn.Modules that hold integer weights, and those on the way to it."""

from .fused_paths import leave_fused_paths
from .linear import QuantLinear
from .outlier_linear import OutlierLinear, PreparedOutliers
from .prepared import PreparedLinear
from .smoothed_linear import PreparedSmoothed, SmoothedLinear, StaticSmoothedLinear
from .static_linear import StaticQuantLinear

OurLinear = QuantLinear | PreparedLinear

__all__ = [
    "OurLinear",
    "OutlierLinear",
    "PreparedLinear",
    "PreparedOutliers",
    "PreparedSmoothed",
    "QuantLinear",
    "SmoothedLinear",
    "StaticQuantLinear",
    "StaticSmoothedLinear",
    "leave_fused_paths",
]
