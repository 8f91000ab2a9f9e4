# SPDX-License-Identifier: Apache-2.0
"""Quantized layers: ordinary nn.Modules that hold integer weights."""

from .fused_paths import leave_fused_paths
from .linear import QuantLinear

__all__ = ["QuantLinear", "leave_fused_paths"]
