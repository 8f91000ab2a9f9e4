# SPDX-License-Identifier: Apache-2.0
"""The float operators, computed in float64 and rounded once: kernels are within a stated bound of these."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """relu, gelu, gelu_tanh or silu of x, in its dtype.

    source   Hendrycks and Gimpel 2016 (arXiv:1606.08415)
    """
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "silu": F.silu,
    }
    return functions[activation](x.double()).to(x.dtype)
