# SPDX-License-Identifier: Apache-2.0
"""torch's fused transformer layers do not call the modules that they hold; this file makes them call ours.

In eval mode nn.TransformerEncoderLayer hands `linear1.weight` to one fused float operator. On a quantized layer that
would be a dequantized copy at every call: not wrong, but slow, and nothing would be computed in integers. A prepared
layer would see nothing of its input.

With padding, nn.TransformerEncoder goes further: its layers get nested tensors without the padded positions, which
come back as zeros. Models average over positions and rely on it, so an encoder that leaves this path still gives zeros.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...base.hooks import hooked
from ..linear import QuantLinear
from ..prepared import PreparedLinear


def leave_fused_paths(model: nn.Module) -> None:
    """Switches the fused path off in every nn.TransformerEncoderLayer of `model` that has a layer of ours inside."""
    for module in model.modules():
        if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            continue
        if not any(isinstance(inner, QuantLinear | PreparedLinear) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # torch reads it for nothing else
        elif module.use_nested_tensor:
            module.use_nested_tensor = False  # nested tensors exist only for the fused path
            _hook(module)


@contextmanager
def without_nested_tensors(*models: nn.Module) -> Iterator[None]:
    """Inside, no nn.TransformerEncoder of `models` makes nested tensors, which layers with hooks cannot compute with.

    What the encoders give stays what it was, zeros at padded positions included.
    """
    modules: Any = {module for model in models for module in model.modules()}
    encoders = [m for m in modules if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    with hooked((encoder, _zero_padding) for encoder in encoders):
        try:
            for encoder in encoders:
                encoder.use_nested_tensor = False
            yield
        finally:
            for encoder in encoders:
                encoder.use_nested_tensor = True


def _hook(encoder: nn.TransformerEncoder) -> None:
    # New dicts: what undoes a failed quantization puts the old ones back.
    encoder._forward_hooks = OrderedDict(encoder._forward_hooks)
    encoder._forward_hooks_with_kwargs = OrderedDict(encoder._forward_hooks_with_kwargs)
    encoder.register_forward_hook(_zero_padding, with_kwargs=True)


def _zero_padding(encoder: Any, args: tuple, kwargs: dict[str, Any], y: torch.Tensor) -> torch.Tensor:
    """A hook that puts zeros, or what the last norm makes of zeros, where torch's own encoder would give them."""
    given = inspect.signature(nn.TransformerEncoder.forward).bind(encoder, *args, **kwargs).arguments
    src, padding = given["src"], given.get("src_key_padding_mask")
    if encoder.layers[0].training or padding is None or given.get("mask") is not None or src.dim() != 3:
        return y
    if not torch.backends.mha.get_fastpath_enabled():
        return y
    if torch.compiler.is_compiling() or torch.is_autocast_enabled() or _trains(encoder):
        return y
    is_padding = padding if padding.dtype == torch.bool else padding != 0
    if encoder.mask_check and not torch._nested_tensor_from_mask_left_aligned(src, ~is_padding):
        return y
    zeros = torch.zeros(y.shape[-1], dtype=y.dtype, device=y.device)
    return torch.where(is_padding[..., None], zeros if encoder.norm is None else encoder.norm(zeros), y)


def _trains(encoder: nn.TransformerEncoder) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for p in encoder.layers[0].parameters())
