# SPDX-License-Identifier: Apache-2.0
"""Repeated blocks, such as the layers of an encoder, each replaced by one that runs a short list of our operators.

Blocks are the items of a ModuleList of one class. One of each structure is exported with the arguments that the example
calls it with, and once more without its mask, or with one. Each block is then verified with its own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...base.hooks import hooked
from ...conversion.plan import has_hooks
from ...nn import FusedBlock, fused_block
from ...nn.fused.block_call import BlockCall, ForwardParameters
from ...nn.fused.fused_block import BlockPlan
from ..example import Example
from ..step import MODULE_HAS_HOOKS, Candidate, Changes, own_forward
from ..structure import comparable, structure_of
from .graph import NotUnderstood, export_block, is_leaf
from .lowering import normal_form
from .patterns import Pattern, find_pattern

MASKS = ("attention_mask", "attn_mask", "mask")


class Blocks:
    """Replaces each block of a ModuleList by a FusedBlock."""

    name = "blocks"

    def __init__(self, precision: str | None = "auto"):
        self.precision = precision

    def find(self, model: nn.Module, example: Example) -> list[Candidate]:
        blocks = dict(_repeated(model))
        calls = _watch(list(blocks), example)
        plans = _Plans(self.precision)
        plans.look_at_numbers(calls)
        return [_candidate(model, name, block, calls.get(block), plans) for block, name in blocks.items()]


@dataclass
class _SeenCall:
    """How a block was called first, and what it gave."""

    args: tuple
    kwargs: dict[str, Any]
    output: Any = None

    def with_argument(self, names: ForwardParameters, name: str, value: Any) -> _SeenCall:
        if name in names.positional[: len(self.args)]:
            index = names.positional.index(name)
            return _SeenCall((*self.args[:index], value, *self.args[index + 1 :]), self.kwargs, self.output)
        return _SeenCall(self.args, {**self.kwargs, name: value}, self.output)


@dataclass
class _Plan:
    """What blocks of one structure have in common."""

    call: BlockCall
    patterns: dict[bool, Pattern]
    tuple_size: int

    def of(self, block: nn.Module) -> BlockPlan:
        programs = {no_mask: pattern.bind(block) for no_mask, pattern in self.patterns.items()}
        return BlockPlan(block, self.call, programs, self.tuple_size)


class _Plans:
    """A plan, or the reason why there is none, for each structure that was met."""

    def __init__(self, precision: str | None):
        self.precision = precision
        self.known: dict[Any, _Plan | str] = {}
        # Whether blocks that differ only in their number in the model may compute differently.
        self.with_numbers = False

    def look_at_numbers(self, calls: dict[nn.Module, _SeenCall]) -> None:
        """Blocks know their number in the model. If the last one of a structure has the plan of the first, numbers are
        names and nothing else; otherwise each block is exported."""
        ends: dict[Any, list[nn.Module]] = {}
        for block, call in calls.items():
            ends.setdefault(_structure(block, call, with_numbers=False), []).append(block)
        for first, *_, last in (blocks for blocks in ends.values() if len(blocks) > 2):
            plans = [self._plan_or_reason(block, calls[block]) for block in (first, last)]
            self.known[_structure(first, calls[first], with_numbers=False)] = plans[0]
            self.with_numbers |= plans[0] != plans[1]

    def plan_of(self, block: nn.Module, call: _SeenCall) -> _Plan:
        key = _structure(block, call, self.with_numbers)
        if key not in self.known:
            self.known[key] = self._plan_or_reason(block, call)
        plan = self.known[key]
        if isinstance(plan, str):
            raise NotUnderstood(plan)
        return plan

    def _plan_or_reason(self, block: nn.Module, call: _SeenCall) -> _Plan | str:
        """For calls with and without the mask, if both are understood; else for those that the example has."""
        mask = _mask_of(block, call)
        plan = "" if mask is None else _or_reason(self._plan_with_mask, block, call, mask)
        return plan if isinstance(plan, _Plan) else _or_reason(self._plan, block, call)

    def _plan(self, block: nn.Module, call: _SeenCall) -> _Plan:
        tuple_size = _tuple_size(call.output)
        block_call = _block_call(block, call)
        return _Plan(block_call, {False: self._pattern(block, call, block_call)}, tuple_size)

    def _plan_with_mask(self, block: nn.Module, call: _SeenCall, mask: str) -> _Plan:
        tuple_size = _tuple_size(call.output)
        names = ForwardParameters.of(block.forward)
        given = names.named(call.args, call.kwargs)
        with_mask, without = call, call.with_argument(names, mask, None)
        if not isinstance(given.get(mask), torch.Tensor):
            length = next(value for value in given.values() if isinstance(value, torch.Tensor)).shape[1]
            look_at_all = torch.ones(1, 1, length, length, dtype=torch.bool)
            with_mask = call.with_argument(names, mask, look_at_all)
        block_call = _block_call(block, with_mask)
        block_call.mask = mask
        patterns = {
            False: self._pattern(block, with_mask, block_call),
            True: self._pattern(block, without, block_call),
        }
        return _Plan(block_call, patterns, tuple_size)

    def _pattern(self, block: nn.Module, call: _SeenCall, block_call: BlockCall) -> Pattern:
        exported = export_block(block, call.args, call.kwargs)
        nodes = normal_form(exported)
        if len(nodes) != 1 or nodes[0] is None:
            raise NotUnderstood("returns more than one tensor")
        pattern = find_pattern(nodes[0], block, block_call.slot_names(), self.precision)
        pattern.guards = _of_slots(exported.guards, block_call.slot_names())
        return pattern


def _or_reason(make: Callable[..., _Plan], *arguments: Any) -> _Plan | str:
    """What `make` gives, or why it does not understand the block."""
    try:
        return make(*arguments)
    except NotUnderstood as error:
        return str(error)


def _mask_of(block: nn.Module, call: _SeenCall) -> str | None:
    """The name of the block's attention mask, whether the call gives one or not; None if it has none."""
    names = ForwardParameters.of(block.forward)
    given = names.named(call.args, call.kwargs)
    return next((name for name in MASKS if name in names.positional or name in given), None)


def _candidate(
    model: nn.Module, name: str, block: nn.Module, call: _SeenCall | None, plans: _Plans
) -> Candidate:
    candidate = Candidate(name, type(block).__name__)
    try:
        if call is None:
            raise NotUnderstood("the example does not reach it")
        if "forward" in vars(block):
            raise NotUnderstood(own_forward(block))
        if any(map(has_hooks, list(block.modules())[1:])):
            raise NotUnderstood(MODULE_HAS_HOOKS)
        fused = fused_block(block, plans.plan_of(block, call).of(block))
    except NotUnderstood as error:
        candidate.reason = str(error)
        return candidate
    candidate.apply = partial(Changes.replace, model=model, old=block, new=fused)
    candidate.reads = candidate.gives = block
    candidate.compute = partial(_compute, fused)
    return candidate


def _compute(fused: FusedBlock, *args: Any, **kwargs: Any) -> Any:
    result = fused.block_plan.run(fused, args, kwargs)
    if result is NotImplemented:
        raise ValueError("the example also calls it in a way that is left to the original")
    return result


def _repeated(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The items, with their names, of every ModuleList whose items are of one class and have children."""
    for name, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or len({type(block) for block in modules}) != 1:
            continue
        for number, block in enumerate(modules):
            if list(block.children()) and not is_leaf(block) and not isinstance(block, FusedBlock):
                yield block, f"{name}.{number}"


def _watch(blocks: list[nn.Module], example: Example) -> dict[nn.Module, _SeenCall]:
    """The first call of each block while the example runs."""
    calls: dict[nn.Module, _SeenCall] = {}

    def note(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        calls.setdefault(block, _SeenCall(args, kwargs, output))

    with hooked((block, note) for block in blocks):
        example.run()
    return calls


def _block_call(block: nn.Module, call: _SeenCall) -> BlockCall:
    try:
        return BlockCall.like(block, call.args, call.kwargs)
    except TypeError as error:
        raise NotUnderstood(f"{error}: such calls are left to the original") from error


def _of_slots(guards: tuple[str, ...], names: list[str]) -> tuple[str, ...]:
    """The guards of a program, in which the shape of an input becomes the shape of its slot."""
    for slot, name in enumerate(names):
        guards = tuple(guard.replace(f"{{{name}}}", f"slots[{slot}].shape") for guard in guards)
    return guards


def _tuple_size(output: Any) -> int:
    """0 for a tensor; for a tuple that holds a tensor first and then nothing but None, its size."""
    if isinstance(output, torch.Tensor):
        return 0
    known = isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor)
    if not known or any(item is not None for item in output[1:]):
        raise NotUnderstood("returns more than one tensor")
    return len(output)


def _structure(block: nn.Module, call: _SeenCall, with_numbers: bool) -> Any:
    """A value that is equal for blocks which are called alike and differ only in weights, and perhaps in number."""
    values: dict[Any, Any] = {**dict(enumerate(call.args)), **call.kwargs}
    kinds = tuple((name, type(value), comparable(value)) for name, value in values.items())
    return structure_of(block, with_numbers), kinds, type(call.output)
