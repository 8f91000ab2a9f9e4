# SPDX-License-Identifier: Apache-2.0
"""RMSNorm modules, which are a class of their own in every model, replaced by the operator.

A class is known by its name and attributes, and by what it computes for random rows, which also says whether the
weight is multiplied as it is or with 1 added to it. The example then decides.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from ...conversion.plan import has_hooks
from ...methods.tracing import is_norm_like
from ...nn import RMSNorm
from ..example import Example
from ..paths import Proofs, other_paths
from ..step import MODULE_HAS_HOOKS, Candidate, Changes, ModuleStep
from ..verify import FLOAT32_ERROR, failure, relative

EPS_NAMES = ("eps", "variance_epsilon", "epsilon")
OFFSETS = (0.0, 1.0)


class Norms(ModuleStep):
    """Replaces modules of RMSNorm classes by octavo.nn.RMSNorm with the same Parameter."""

    name = "norms"

    def concerns(self, module: nn.Module) -> bool:
        return "RMSNorm" in type(module).__name__ and not isinstance(module, RMSNorm)

    def look_at(self, candidate: Candidate, module: nn.Module, example: Example) -> None:
        replacement, candidate.reason = _replacement(module, example.proofs)
        if replacement is not None:
            candidate.apply = partial(Changes.replace, model=example.model, old=module, new=replacement)
            candidate.reads = candidate.gives = module
            candidate.compute = replacement.forward
            candidate.bound = relative(_error(module))


def _replacement(module: nn.Module, proofs: Proofs) -> tuple[RMSNorm | None, str]:
    """The RMSNorm that computes the same for random rows, or None and the reason why there is none."""
    if not is_norm_like(module) or module._parameters.get("bias") is not None:
        return None, "not one weight of one axis and nothing else"
    if has_hooks(module):
        return None, MODULE_HAS_HOOKS
    weight: Any = module.weight
    x = torch.randn(5, len(weight), generator=torch.Generator().manual_seed(0))
    # Small rows tell one eps from another.
    x = (x * torch.tensor([1e3, 30.0, 1.0, 1e-2, 1e-4])[:, None]).to(weight.dtype)
    try:
        expected = module.forward(x)
    except Exception as error:
        return None, failure(error).replace("the replacement", type(module).__name__)
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None, "gives other shapes or dtypes than it takes"
    for eps, offset in product(_eps_of(module), OFFSETS):
        replacement = RMSNorm(weight, eps, offset)
        difference = (replacement.forward(x).float() - expected.float()).abs()
        if bool((difference <= _error(module) * expected.float().abs()).all()):
            reason = other_paths(module, {"": torch.stack([x, x])}, proofs)
            return (None, reason) if reason else (replacement, "")
    return None, "computes something else than x / rms(x) * weight"


def _eps_of(module: nn.Module) -> list[float]:
    """The eps that the module may add. nn.RMSNorm(eps=None) takes that of x's dtype or of the dtype it computes in."""
    weight: Any = module.weight
    eps = next((vars(module)[name] for name in EPS_NAMES if name in vars(module)), 0.0)
    return (
        [torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32)] if eps is None else [float(eps)]
    )


def _error(module: nn.Module) -> float:
    """The relative error that is allowed: modules in half precision round twice on the way, ours rounds once."""
    weight: Any = module.weight
    return FLOAT32_ERROR if weight.dtype == torch.float32 else 2 * torch.finfo(weight.dtype).eps
