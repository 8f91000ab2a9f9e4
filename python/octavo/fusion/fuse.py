# SPDX-License-Identifier: Apache-2.0
"""fuse_ and unfuse_: the steps one after another, each place verified, the model's output looked at after each step.

What was changed is noted in the model itself, as references to what was there before. So unfuse_ brings back the very
same modules, and a copy of a fused model can be unfused as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from .. import ops
from ..base.hooks import hooked
from ..base.modules import undone_on_error
from ..conversion.prepare import require_module
from ..evaluation.comparison_result import OutputFigures
from ..nn.fused.capturing import forget_capturing
from .blocks.blocks import Blocks
from .example import Example
from .report import FusionReport, FusionRow
from .step import Candidate, Changes, Step
from .steps.activations import ActivationFunctions
from .steps.attention import Attention
from .steps.gated import Gated
from .steps.norms import Norms
from .steps.plain_attention import PlainAttention
from .steps.rotary import Rotary
from .verify import compare_outputs, failure, verify

_log = logging.getLogger("octavo")

RECORD = "octavo_fusion"  # the attribute in which a fused model keeps its Changes


def fuse_(
    model: nn.Module,
    example: Any,
    *,
    attention: str | None = "auto",
    plain_attention: bool = False,
    blocks: bool = False,
    min_cosine: float = 0.98,
) -> FusionReport:
    """Replaces parts of `model`, in place, by fewer and larger operators, and reports on every place it looked at.

    model        in eval mode, on the CPU; quantized or not; to have both, quantize first
    example      one batch or an iterable of them, as `compare` takes; every part is verified on its tensors
    attention    precision of the products of attention in transformers models: "auto" (bfloat16 where the CPU
                 multiplies that), "float32", "bfloat16", "int8"; None leaves attention as it is
    plain_attention   octavo's attention for modules that call F.scaled_dot_product_attention themselves, too
    blocks       repeated blocks, such as the layers of an encoder, become short lists of operators, too
    min_cosine   a step after which the model's output has a lower cosine to the one before fusing is taken back
    returns      FusionReport: "fused" or "kept" with the reason, and the error on the example
    raises       TypeError and ValueError for bad arguments and a model in training mode. The model is then unchanged
    source       ours; docs/fusion.md has the table of steps
    """
    _check_model(model)
    _check_options(attention, plain_attention, blocks, min_cosine)
    steps: list[Step] = [] if attention is None else [Attention(attention), Rotary()]
    if attention is not None and plain_attention:
        steps.append(PlainAttention(attention))
    steps += [Gated(), ActivationFunctions(), Norms()]
    if blocks:
        steps.append(Blocks(attention))
    return run_steps(model, example, steps, min_cosine)


def unfuse_(model: nn.Module) -> nn.Module:
    """Puts everything that fuse_ replaced in `model` back, in place; returns the model.

    The modules are the same objects as before. Does nothing to a model that is not fused.
    raises   TypeError if it is no module
    """
    require_module("unfuse_", model)
    while fused := [module for module in model.modules() if RECORD in vars(module)]:
        vars(fused[0]).pop(RECORD).undo()
        forget_capturing(model)
    return model


def run_steps(model: nn.Module, example: Any, steps: Sequence[Step], min_cosine: float) -> FusionReport:
    """Runs `steps` in order on `model`, in place. After an error the model is what it was."""
    changes, report = Changes(), FusionReport()
    with undone_on_error(model), torch.no_grad():
        held = Example(model, example)
        for step in steps:
            forget_capturing(model)
            candidates = step.find(model, held)
            verify([candidate for candidate in candidates if not candidate.reason], held)
            output = _apply(candidates, changes, held, min_cosine)
            report.rows.extend(_row(step, candidate) for candidate in candidates)
            if output is not None:
                report.outputs[step.name] = output
        forget_capturing(model)
        if changes.done:
            _remember(model, changes)
    if not report.fused:
        _log.warning("nothing was fused; the reasons: %s", sorted({row.reason for row in report.rows}))
    return report


def _apply(
    candidates: list[Candidate], changes: Changes, example: Example, min_cosine: float
) -> OutputFigures | None:
    """Applies the candidates that have no reason against them; takes them back if the model's output moved too far."""
    accepted = [candidate for candidate in candidates if not candidate.reason]
    if not accepted:
        return None
    before = len(changes.done)
    for candidate in accepted:
        assert candidate.apply is not None
        candidate.apply(changes)
    replaced = [old for _, _, old, _ in changes.done[before:] if isinstance(old, nn.Module)]
    try:
        output, reason = _look_at_output(example, replaced)
        reason = reason or _look_at_others(example, min_cosine) or _look_at_decoding(example, min_cosine)
    except Exception as error:  # a path through the model that the parts alone did not show
        output, reason = None, failure(error)
    if not reason and output is not None and not output.cosine >= min_cosine:  # NaN is too low as well
        reason = f"the output's cosine falls to {output.cosine:.4f}, below min_cosine"
    if not reason:
        return output
    changes.undo(keep=before)
    for candidate in accepted:
        candidate.reason = reason
    return None


def _look_at_output(example: Example, replaced: list[nn.Module]) -> tuple[OutputFigures | None, str]:
    """The model's output now against the one before all steps, or why the step must be taken back."""
    called: list[nn.Module] = []
    with hooked(((module, lambda module, *_: called.append(module)) for module in replaced), before=True):
        found = example.run()
    called = [module for module in called if module in replaced]  # a fused block shares its original's hooks
    if called:
        return None, f"the model calls a {type(called[0]).__name__} by another way than its place"
    return compare_outputs(example.outputs, found)


def _look_at_others(example: Example, min_cosine: float) -> str:
    """Why the step must be taken back: the model gives something else for other inputs; "" if it does not."""
    output, reason = compare_outputs([before for *_, before in example.others], example.run_others())
    if not reason and output is not None and example.others and not output.cosine >= min_cosine:
        reason = f"for other inputs the output's cosine falls to {output.cosine:.4f}, below min_cosine"
    return reason


def _look_at_decoding(example: Example, min_cosine: float) -> str:
    """Why the step must be taken back: a model in there writes something else with its cache; "" if none does."""
    for decoding in example.decodings:
        output, reason = compare_outputs(decoding.outputs, decoding.run())
        if reason or output is None or not output.cosine >= min_cosine:
            kind = type(decoding.model).__name__
            return f"{kind} gives something else then for tokens that it reads with its cache"
    return ""


def _row(step: Step, candidate: Candidate) -> FusionRow:
    action = "kept" if candidate.reason else "fused"
    return FusionRow(step.name, candidate.name, candidate.kind, action, candidate.reason, candidate.error)


def _remember(model: nn.Module, changes: Changes) -> None:
    earlier = vars(model).get(RECORD, Changes())
    vars(model)[RECORD] = Changes([*earlier.done, *changes.done])


def _check_options(attention: str | None, plain_attention: bool, blocks: bool, min_cosine: float) -> None:
    if attention is not None and attention not in ops.PRECISIONS:
        raise ValueError(
            f"fuse_: attention is {attention!r}, accepted are {', '.join(map(repr, ops.PRECISIONS))} and None"
        )
    for name, flag in (("plain_attention", plain_attention), ("blocks", blocks)):
        if not isinstance(flag, bool):
            raise TypeError(f"fuse_: {name} must be True or False, got {flag!r}")
    if plain_attention and attention is None:
        raise ValueError(
            "fuse_: plain_attention=True needs a precision, attention is None; give attention='auto'"
        )
    if isinstance(min_cosine, bool) or not isinstance(min_cosine, int | float) or not -1 <= min_cosine <= 1:
        raise ValueError(f"fuse_: min_cosine must be a number in -1 .. 1, got {min_cosine!r}")


def _check_model(model: nn.Module) -> None:
    require_module("fuse_", model)
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(
                f"fuse_: {name or 'the model'} is in training mode, and fused modules are for inference; call "
                "model.eval() first"
            )
        if type(module).__name__ == "OptimizedModule":
            raise ValueError(f"fuse_: {name or 'the model'} is compiled; fuse the model, then compile it")
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"fuse_: {name} is on the meta device; load the weights first")
