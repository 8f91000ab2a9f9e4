# SPDX-License-Identifier: Apache-2.0
"""Attention of transformers models through octavo.ops.attention, by transformers' own way to choose an implementation.

The function is registered under a name of ours, and the given model alone is told to use that name: its configs are
copied first, for models made from one config share it. What the operator does not know (a bias by position, attention
weights as a result, odd head sizes) goes on to the function for torch's SDPA, call by call; what neither knows is
refused.
"""

from __future__ import annotations

import copy
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import ops
from .example import Example
from .step import Candidate, Changes
from .verify import failure

NAMES = {name: "octavo" if name == "auto" else f"octavo_{name}" for name in ops.PRECISIONS}
WATCHED = "octavo_watched"  # torch's SDPA, and what it was asked


class Attention:
    """Models of transformers -> attention implementation "octavo"."""

    name = "attention"

    def __init__(self, precision: str):
        self.precision = precision

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        found = _outermost(model)
        if not found:
            reason = "no model of transformers, whose attention can be chosen"
            return [Candidate("", type(model).__name__, reason)]
        return [self._candidate(name, module, example) for name, module in found]

    def _candidate(self, name: str, model: Any, example: Example) -> Candidate:
        candidate = Candidate(name, type(model).__name__, _obstacle(model))
        if not candidate.reason:
            candidate.error, candidate.reason = _watch(model, self.precision, example)
            candidate.apply = partial(_use, model, NAMES[self.precision])
        return candidate


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    precision: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The signature is that of transformers' AttentionInterface: query [B, H, Lq, D], key and value [B, Hkv, Lk, D].

    returns  [B, Lq, H, D] and no weights
    raises   ValueError for dropout, attention sinks and a softcap
    """
    if options.get("dropout"):
        raise ValueError(
            "octavo's attention has no dropout: call model.eval(), or octavo.unfuse_(model) before training"
        )
    if options.get("s_aux") is not None:
        raise ValueError("octavo's attention has no sinks: call octavo.unfuse_(model)")
    if not is_native(query, key, value, options):
        return _sdpa(module, query, key.to(query.dtype), value.to(query.dtype), attention_mask, **options)
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # As SDPA's function reads these: one query looks at everything, and a mask says all there is to say.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    if causal and query.shape[2] != key.shape[2]:
        return _sdpa(module, query, key.to(query.dtype), value.to(query.dtype), attention_mask, **options)
    batch, heads, length, size = query.shape
    y = ops.attention(
        query, key, value, attention_mask, causal=causal, scale=options.get("scaling"), precision=precision
    )
    return y.view(batch, length, heads, size), None


def is_native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether ops.attention computes this call; options are those of the AttentionInterface."""
    size = query.shape[-1]
    is_plain = not any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
    return (
        is_plain
        and not options.get("output_attentions")
        and size % 16 == 0
        and size <= 128
        and value.shape[-1] == size
    )


def _sdpa(*args: Any, **options: Any) -> Any:
    return _interface()["sdpa"](*args, **options)


def _interface() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def _register(name: str, function: Any) -> None:
    """Makes `name` known to transformers, with masks as torch's SDPA takes them: bool or none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


class Registration:
    """Registers our functions when it is made; a part of fused models, so that unpickling one does it as well."""

    def __init__(self) -> None:
        for precision, name in NAMES.items():
            _register(name, partial(attention_forward, precision=precision))

    def __reduce__(self) -> tuple:
        return Registration, ()


# --- finding --------------------------------------------------------------------------------------------------------


def _outermost(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models of transformers in `model` that are in no other one. Without transformers there are none."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return []
    found: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, transformers.PreTrainedModel) and module not in inside:
            found.append((name, module))
            inside.update(module.modules())
    return found


def _obstacle(model: Any) -> str:
    import transformers

    inner = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    for each in inner:
        if each.config._attn_implementation in NAMES.values():
            return "octavo's attention already"
        if not getattr(each, "_supports_attention_backend", False) or not getattr(
            each, "_supports_sdpa", False
        ):
            return f"{type(each).__name__} does not let its attention be chosen"
    return ""


def _use(model: Any, name: str, changes: Changes) -> None:
    """Tells `model`, and no other one with the same configs, to use the implementation `name`."""
    from transformers import PretrainedConfig

    changes.set(model, "octavo_attention", Registration())
    memo: dict[int, Any] = {}
    for module in model.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, PretrainedConfig):
                changes.set(module, attribute, copy.deepcopy(value, memo))
    model.set_attn_implementation(name)


def _watch(model: Any, precision: str, example: Example) -> tuple[float | None, str]:
    """Runs torch's SDPA through the interface with ours beside it: the largest difference, and a reason to keep."""
    calls: list[float | str] = []

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        expected = _sdpa(module, query, key, value, mask, **options)
        if not is_native(query, key, value, options):
            calls.append(f"its attention is of a kind that only torch computes: {tuple(query.shape)}")
            return expected
        found, _ = attention_forward(module, query, key, value, mask, precision=precision, **options)
        finite = expected[0].isfinite()
        calls.append((found.float() - expected[0].float())[finite].abs().max().item())
        return expected

    changes = Changes()
    try:
        _register(WATCHED, watched)
        _use(model, WATCHED, changes)
        example.run()
    except Exception as error:
        return None, failure(error)
    finally:
        changes.undo()
    errors = [call for call in calls if isinstance(call, float)]
    if errors:
        return max(errors), ""
    return None, str(
        calls[0]
    ) if calls else "no attention of the example passed through transformers' interface"
