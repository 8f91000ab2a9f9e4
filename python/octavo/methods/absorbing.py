# SPDX-License-Identifier: Apache-2.0
"""The one answer to "may this layer be changed, or absorb a factor?", for everybody who asks.

A layer may be changed if it computes what its class says, from Parameters that it holds itself. Pruning,
parametrizations, weight norm, hooks and a forward on the instance put something between the Parameters and the output,
so a change of the Parameters would do something else than it should.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..nn import PreparedLinear, PreparedOutliers, PreparedSmoothed
from ..nn.replacements import has_other_forward, is_plain

LAYER_HAS_HOOKS = "has hooks: remove them, quantize, and register them on the new layer"
PREPARED = (PreparedLinear, PreparedSmoothed, PreparedOutliers)


def reason_to_stay(module: nn.Module) -> str:
    """Why `module`, which has a weight, is not what its class and its Parameters say; "" if it is."""
    if parametrize.is_parametrized(module):
        return "parametrized: torch.nn.utils.parametrize.remove_parametrizations makes it an ordinary layer"
    weight: Any = module._parameters.get("weight")
    if is_lazy(weight):
        return "not initialized yet: run the model once"
    if has_own_forward(module):
        name = type(module).__name__
        remedy = ": if it computes x @ W.T + bias, octavo.nn.replacements.register makes the class known"
        return f"{name} has a forward of its own{remedy if has_other_forward(module) else ''}"
    if weight is None or "weight" in vars(module):
        return "its weight is no parameter: remove weight_norm, spectral_norm or pruning first"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    return LAYER_HAS_HOOKS if has_hooks(module) else reason_to_keep_bias(module)


def reason_to_keep_bias(module: nn.Module) -> str:
    """Why the output of `module` would not follow a change of its bias; "" if it would.

    What happens to the input or to the weight does not matter here.
    """
    if has_own_forward(module):
        return f"{type(module).__name__} has a forward of its own"
    buffer = module._buffers.get("bias")  # int32 in layers that are quantized so
    is_float_buffer = buffer is not None and buffer.is_floating_point()
    is_attribute = vars(module).get("bias") is not None  # classes without a bias may say so in an attribute
    if is_attribute or is_float_buffer or parametrize.is_parametrized(module, "bias"):
        return "its bias is no parameter: remove pruning or the parametrization first"
    return LAYER_HAS_HOOKS if module._forward_hooks else ""


def may_absorb(module: nn.Module) -> bool:
    """Whether a factor for each output could go into the Parameters of `module`, as far as can be told by looking."""
    return (is_plain_linear(module) or is_norm_like(module)) and not reason_to_stay(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is a float layer of a registered class or a prepared one. Subclasses may compute otherwise."""
    return is_plain(module) or type(module) in PREPARED


def is_norm_like(module: nn.Module) -> bool:
    """Whether `module` has a weight [k], perhaps a bias [k], and nothing else, as LayerNorm and RMSNorm have."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    has_more = bool(module._modules or any(b is not None for b in module._buffers.values()))
    vectors = all(not is_lazy(p) and p.dim() == 1 and not p.is_meta for p in parameters.values())
    return "weight" in parameters and parameters.keys() <= {"weight", "bias"} and vectors and not has_more


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance itself has a forward or a __call__, or the class of a linear layer another forward."""
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return True
    return has_other_forward(module)


def has_hooks(module: nn.Module) -> bool:
    return any(
        (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    )


def has_global_hooks() -> bool:
    """Whether torch.nn.modules.module has hooks, which see the inputs and outputs of every module of the process."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return any(getattr(torch_module, name, None) for name in (*names, "_global_backward_pre_hooks"))
