# SPDX-License-Identifier: Apache-2.0
"""Activation functions: alone, multiplied by another tensor, and by the numbers that the linear operators take."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..base.float_types import FLOAT_DTYPES
from . import shapes
from .checks import check, wants_gradient
from .registration import register_fake

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
_NUMBERS: dict[str | None, int] = {None: 0, **{name: number for number, name in enumerate(ACTIVATIONS, 1)}}
_activate = torch.ops.octavo.activate.default
_silu_mul = torch.ops.octavo.silu_mul.default


def activation_number(op: str, activation: str | None) -> int:
    """What the operators call it. Raises: ValueError for an unknown name."""
    number = _NUMBERS.get(activation)
    if number is None:
        raise ValueError(
            f"{op}: activation is {activation!r}, accepted: None, {', '.join(map(repr, ACTIVATIONS))}"
        )
    return number


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """relu, gelu (with erf), gelu_tanh or silu of each element; NaN stays NaN, -Inf gives 0.

    x        float32, bfloat16 or float16, any shape
    returns  a new tensor like x. Where x needs a gradient, torch's own function computes it
    raises   TypeError for another dtype; ValueError for another name
    source   Hendrycks and Gimpel 2016 (arXiv:1606.08415); docs/numerics.md, eq. 48
    """
    check("activate", "x", x, FLOAT_DTYPES)
    number = activation_number("activate", activation)
    if torch.is_grad_enabled() and wants_gradient(x):
        return torch_activation(x, activation)
    return _activate(x, number)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, the middle of a Llama-like MLP, rounded once.

    gate, up   float32, bfloat16 or float16, of one shape and dtype; column slices of one tensor are read in place
    returns    a new contiguous tensor like gate. Where a gradient is needed, torch's own functions compute it
    raises     TypeError for another dtype; ValueError if they differ in shape or dtype
    source     SwiGLU: Shazeer 2020 (arXiv:2002.05202); docs/numerics.md, eq. 48
    """
    if getattr(gate, "dtype", None) not in FLOAT_DTYPES or getattr(up, "dtype", None) not in FLOAT_DTYPES:
        check("silu_mul", "gate", gate, FLOAT_DTYPES)
        check("silu_mul", "up", up, FLOAT_DTYPES)
    if torch.is_grad_enabled() and wants_gradient(gate, up):
        shapes.silu_mul(gate, up)
        return F.silu(gate) * up
    return _silu_mul(gate, up)


def torch_activation(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The same by torch's functions, with gradients. Raises: ValueError for an unknown name."""
    activation_number("activate", activation)
    match activation:
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "silu":
            return F.silu(x)
    return x


@register_fake("octavo::activate")
def _(x, activation):
    shapes.float_type("activate", "x", x)
    shapes.activation_in_range("activate", activation)
    return x.new_empty(x.shape)


@register_fake("octavo::silu_mul")
def _(gate, up):
    shapes.silu_mul(gate, up)
    return gate.new_empty(gate.shape)
