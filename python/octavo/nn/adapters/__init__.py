# SPDX-License-Identifier: Apache-2.0
"""Adapters: a few numbers beside a frozen linear layer, which are trained in the place of its weight."""

from .adalora import AdaLoRA, AdaLoRALayer
from .base import AdaptedLinear, Adapter, LayerAdapter
from .ia3 import IA3, IA3Layer
from .lora import LoRA, LoRALayer

__all__ = [
    "IA3",
    "AdaLoRA",
    "AdaLoRALayer",
    "AdaptedLinear",
    "Adapter",
    "IA3Layer",
    "LayerAdapter",
    "LoRA",
    "LoRALayer",
]
