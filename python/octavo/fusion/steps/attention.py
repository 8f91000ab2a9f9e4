# SPDX-License-Identifier: Apache-2.0
"""Models of transformers told to use octavo's attention, by transformers' own way to choose an implementation.

The given model alone is told: its configs are copied first, for models made from one config share it. To find out what
the model asks for, torch's SDPA is run through the same interface once, with octavo's attention beside it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from ..example import Example
from ..step import Candidate, Changes
from ..verify import failure
from .interface import NAMES, Registration, attention_forward, is_native, register_attention, running, sdpa

WATCHED = "octavo_watched"  # torch's SDPA, and what it was asked
LENGTH = 24  # of random keys
DIFFERS = "differs on the example by more than rounding explains"


class Attention:
    """Gives models of transformers the attention implementation "octavo"."""

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
        if not getattr(each, "_supports_attention_backend", False):
            return f"{type(each).__name__} does not let its attention be chosen"
        if not getattr(each, "_supports_sdpa", False):
            return f"transformers has no torch SDPA for {type(each).__name__}, whose attention is of another kind"
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
    """Runs torch's SDPA through the interface and ours beside it: the largest difference and a reason to keep."""
    calls: list[float | str] = []
    forms: set[tuple] = set()

    def watched(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        expected = sdpa(module, query, key, value, attention_mask, **options)
        if not is_native(query, key, value, options):
            calls.append(f"its attention is of a kind that only torch computes: {tuple(query.shape)}")
            return expected
        found, _ = attention_forward(
            module, query, key, value, attention_mask, precision=precision, **options
        )
        calls.append(_difference(expected[0], found, precision))
        form = query.shape[1], key.shape[1], query.shape[3], options.get("scaling"), options.get("is_causal")
        if form not in forms:
            forms.add(form)
            calls.extend(_on_random(module, query, key, precision, options))
        return expected

    changes = Changes()
    try:
        register_attention(WATCHED, watched)
        _use(model, WATCHED, changes)
        example.run()
    except Exception as error:
        return None, failure(error)
    finally:
        changes.undo()
    errors = [call for call in calls if isinstance(call, float)]
    reasons = [call for call in calls if isinstance(call, str)]
    if not calls:
        return None, "no attention of the example passes through transformers' interface"
    # Calls of which only torch computes some are fused: each is looked at when it comes.
    return (max(errors), "") if errors and DIFFERS not in reasons else (None, reasons[0])


def _on_random(
    module: Any, query: torch.Tensor, key: torch.Tensor, precision: str, options: dict[str, Any]
) -> Iterator[float | str]:
    """The differences for random heads: with all keys, with one query, and with a mask that hides some keys.

    From one query the mask hides all keys.
    """
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, length: int) -> torch.Tensor:
        return torch.randn(2, heads, length, query.shape[-1], generator=generator).to(query.dtype)

    mask = torch.rand(2, 1, LENGTH, LENGTH, generator=generator) < 0.5
    mask[:, :, 0] = False
    for length, look in ((LENGTH, None), (1, None), (LENGTH, mask)):
        q, k, v = random(query.shape[1], length), random(key.shape[1], LENGTH), random(key.shape[1], LENGTH)
        expected = sdpa(module, q, k, v, look, **options)[0]
        found = attention_forward(module, q, k, v, look, precision=precision, **options)[0]
        first = 0 if look is None else 1  # the query that sees nothing has no result to agree on
        yield _difference(expected[:, first:], found[:, first:], precision)


def _difference(expected: torch.Tensor, found: torch.Tensor, precision: str) -> float | str:
    """The largest difference; DIFFERS if all of them together are more than rounded products explain.

    For usual scores, rounded products are off by 3e-3 of the result in bfloat16 and by 1.5e-2 in int8. A bound of about
    ten times that leaves room for unusual ones; how much it must be is judgement.
    """
    rounding = 4 * torch.finfo(expected.dtype).eps
    expected, found = expected.float(), found.float()
    finite = expected.isfinite()  # torch gives NaN to a query that may look at nothing, in some cases
    difference, expected = (found - expected)[finite], expected[finite]
    bound = max(rounding, {"float32": 2.0**-12, "int8": 2.0**-3}.get(running(precision), 2.0**-4))
    if not bool(difference.norm() <= bound * expected.norm()):
        return DIFFERS
    return difference.abs().max().item() if difference.numel() else 0.0
