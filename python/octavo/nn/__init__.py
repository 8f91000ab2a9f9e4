# SPDX-License-Identifier: Apache-2.0
"""Layers: quantized ones, ordinary nn.Modules that hold integer weights, and those on the way to it."""

from typing import Any

from .embedding import PreparedEmbedding, QuantEmbedding
from .fused.fused_block import FusedBlock, fused_block
from .fused.fused_paths import leave_fused_paths, without_nested_tensors
from .fused.gated_mlp import GatedMLP
from .fused.rms_norm import RMSNorm
from .fused.rotary_attention import RotaryAttention
from .fused.shared_input import SharedInput
from .linear import QuantLinear
from .outlier import OutlierLinear, PreparedOutliers
from .prepared import PreparedLinear
from .smoothed import PreparedSmoothed, SmoothedLinear, StaticSmoothedLinear
from .static import StaticQuantLinear

OurLinear = QuantLinear | PreparedLinear
OurEmbedding = QuantEmbedding | PreparedEmbedding  # each of them is an OurLinear, too

__all__ = [
    "FusedBlock",
    "GatedMLP",
    "KVCache",
    "OurEmbedding",
    "OurLinear",
    "OutlierLinear",
    "PreparedEmbedding",
    "PreparedLinear",
    "PreparedOutliers",
    "PreparedSmoothed",
    "QuantEmbedding",
    "QuantLinear",
    "RMSNorm",
    "RotaryAttention",
    "SharedInput",
    "SmoothedLinear",
    "StaticQuantLinear",
    "StaticSmoothedLinear",
    "fused_block",
    "leave_fused_paths",
    "without_nested_tensors",
]


def __getattr__(name: str) -> Any:
    """KVCache derives from a class of transformers, which is imported when it is asked for and not before."""
    if name != "KVCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .kv_cache import KVCache
    except ImportError as error:
        raise ImportError(
            "octavo.nn.KVCache is for models of transformers: pip install transformers"
        ) from error
    return KVCache
