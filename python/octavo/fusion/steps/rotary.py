# SPDX-License-Identifier: Apache-2.0
"""Attention modules with rotary embeddings, replaced by octavo.nn.RotaryAttention: one product for queries, keys and
values, one operator for the rotation. They are found by the names of their parts, and replaced only if random inputs
and the example give equal results.
"""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from ...conversion.plan import has_hooks
from ...nn import QuantLinear, RotaryAttention
from ...nn.fused.rotary_attention import NORMS, PROJECTIONS
from ...nn.replacements import replacement_of
from ..blocks.graph import NotUnderstood
from ..example import Example
from ..paths import Proofs, other_paths
from ..step import MODULE_HAS_HOOKS, Candidate, Changes, ModuleStep
from ..verify import failure
from .attention_call import TRIALS, inputs_of, read_call, recorded
from .interface import NAMES, attention_forward, running

CHILDREN = {*PROJECTIONS, "o_proj"}
ATTRIBUTES = ("head_dim", "layer_idx", "config")


class Rotary(ModuleStep):
    """Replaces attention modules that take `position_embeddings`. This step comes after the step "attention"."""

    name = "rotary"

    def concerns(self, module: nn.Module) -> bool:
        return takes_rotations(module)

    def look_at(self, candidate: Candidate, module: Any, example: Example) -> None:
        candidate.reason = obstacle(module)
        if candidate.reason:
            return
        precision = next(key for key, value in NAMES.items() if value == module.config._attn_implementation)
        candidate.reads, candidate.gives, candidate.of_input = module, module.o_proj, True
        candidate.bound = partial(_bound, precision)
        attend = partial(attention_forward, precision=precision)
        replacement, candidate.reason = _replacement(module, attend, example.proofs)
        if replacement is not None:
            candidate.compute = partial(_compute, replacement)
            candidate.apply = partial(Changes.replace, model=example.model, old=module, new=replacement)


def takes_rotations(module: nn.Module) -> bool:
    """Whether `module` looks like an attention module that rotates queries and keys itself."""
    if not all(hasattr(module, name) for name in PROJECTIONS) or isinstance(module, RotaryAttention):
        return False
    return "position_embeddings" in inspect.signature(module.forward).parameters


def obstacle(module: Any) -> str:
    """Why RotaryAttention cannot take the place of `module`; "" if it may."""
    children = {name for name, _ in module.named_children()}
    if children not in (CHILDREN, CHILDREN | set(NORMS)):
        return f"its parts are {', '.join(sorted(children))}, known are {', '.join(sorted(CHILDREN))}"
    missing = [name for name in ATTRIBUTES if not hasattr(module, name)]
    if missing:
        return f"it has no attribute {missing[0]}"
    if not all(map(_is_linear, (getattr(module, name) for name in CHILDREN))):
        return "its projections are not linear layers"
    if getattr(module, "sliding_window", None) is not None:
        return "it looks through a sliding window"
    if module.config._attn_implementation not in NAMES.values():
        return "its model does not use octavo's attention"
    return MODULE_HAS_HOOKS if has_hooks(module) else ""


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) or replacement_of(module) is not None


def _replacement(module: Any, attend: Any, proofs: Proofs) -> tuple[RotaryAttention | None, str]:
    """The replacement of `module`, if both agree on random inputs; else None and the reason."""
    try:
        replacement = RotaryAttention(module, attend, read_call(module))
        for inputs in inputs_of(module, replacement.call):
            if reason := other_paths(module, inputs, proofs):
                return None, reason
        for size, position in TRIALS:
            run = recorded(module, replacement.call, size, position)
            (keys, values, *_), _ = run.updates[0]
            expected = (run.attended[0][0][0], keys, values)
            with torch.autocast("cpu", enabled=False):
                found = replacement.states(run.given["hidden_states"], run.given["position_embeddings"])
            if not all(map(_agrees, expected, found)):
                return None, "its queries, keys or values differ on random angles and positions"
    except NotUnderstood as error:
        return None, str(error)
    except Exception as error:  # whatever a replacement does not take is a reason to keep the original
        return None, failure(error)
    return replacement, ""


def _agrees(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Up to eight roundings on each side, of the row's largest element: two products and their sum make three."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    size = expected.abs().amax(-1, keepdim=True)
    return bool(((expected - found).abs() <= 8 * torch.finfo(expected.dtype).eps * size).all())


def _compute(replacement: RotaryAttention, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What o_proj is to read, computed with a copy of the cache, for the original writes into the cache itself.

    The output of o_proj is not compared: a difference of one rounding could move an int8 code there.
    """
    given, options = replacement.call.named(args, kwargs)
    cache = replacement.call.cache
    given[cache] = copy.deepcopy(given.get(cache))
    return replacement.attended(**given, **options)[0]


def _bound(precision: str, expected: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """A wide bound, which is to find another formula and not rounding: q and k in bfloat16 move scores of 16 by 1/8,
    whether attention rounds them or the model computes in such a type."""
    is_float32 = running(precision) == "float32" and expected.dtype == torch.float32
    return (2**-10 if is_float32 else 2**-3) * expected.abs().max()
