# SPDX-License-Identifier: Apache-2.0
"""A block of a model that computes by a short list of operators, and by its own forward where that does not apply.

A fused block is the original block once more: it shares its dicts of parameters and children, so names, state_dict and
hooks are the same, and its class derives from the block's class. Only `forward` differs: it runs the list if the call
is one the list was made for and nothing was hung into the block since; else what it inherits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn

from ...ops.checks import wants_gradient
from .block_call import BlockCall
from .block_operations import BlockOperation, LayersChanged
from .capturing import are_idle

_is_grad_enabled, _is_autocast_enabled = torch.is_grad_enabled, torch.is_autocast_enabled
_is_compiling = torch.compiler.is_compiling
_ALL_MODULES = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)


@dataclass
class BlockProgram:
    """Operations over `size` slots, of which the first ones are the call's tensors; `output` is the slot of the result.

    A large batch goes through all of them in parts. `batched` has the tensors to be cut: slot -> number of axes, the
    first of which is the batch, or 1 where all items share the tensor. Empty: batches are not cut.
    `guards` are conditions on the shapes of slots, in Python: the block computes something else where one is not met.
    """

    operations: Sequence[BlockOperation]
    size: int
    output: int
    batched: dict[int, int] = field(default_factory=dict)
    guards: tuple[str, ...] = ()

    # Rows for each thread. A part's tensors then nearly fit its L2 cache, and reuse the memory of the part before:
    # large batches take 2 to 11 % less time. With 256, reading weights more often costs as much (BERT base, Zen 4).
    rows_at_a_time: ClassVar[int] = 512

    def fits(self, slots: list[Any]) -> bool:
        """Whether the program computes what the block does for tensors of these shapes."""
        return not self.guards or bool(_condition(self.guards)(slots))

    def run(self, slots: list[Any]) -> Any:
        """Runs the operations and returns the result; `slots` holds the call's tensors, and is used up.

        Raises: LayersChanged.
        """
        parts = self._parts(slots)
        return self._run(slots) if parts <= 1 else self._run_in_parts(slots, parts)

    def _parts(self, slots: list[Any]) -> int:
        """Into how many parts to cut the batch; it is not cut if that is 1 or less."""
        batch, length, _ = slots[0].shape
        if batch * length < 2 * self.rows_at_a_time or not self.batched:
            return 1
        for slot, axes in self.batched.items():
            if slots[slot] is not None and slots[slot].dim() != axes:
                return 1
        return min(batch, batch * length // (self.rows_at_a_time * torch.get_num_threads()))

    def _run(self, slots: list[Any]) -> Any:
        slots += [None] * (self.size - len(slots))
        for operation in self.operations:
            operation.run(slots)
        return slots[self.output]

    def _run_in_parts(self, slots: list[Any], parts: int) -> Any:
        batch = slots[0].shape[0]
        cut = [slot for slot in self.batched if slots[slot] is not None and slots[slot].shape[0] == batch]
        whole: Any = None
        for part in range(parts):
            items = slice(part * batch // parts, (part + 1) * batch // parts)
            own = list(slots)
            for slot in cut:
                own[slot] = slots[slot][items]
            result = self._run(own)
            if whole is None:
                whole = result.new_empty(batch, *result.shape[1:])
            whole[items] = result
        return whole


@functools.cache
def _condition(guards: tuple[str, ...]) -> Callable[[list[Any]], bool]:
    """A function of the slots that says whether all `guards` hold. Blocks keep them as text, which can be pickled."""
    condition: Callable[[list[Any]], bool] = eval(f"lambda slots: {' and '.join(map('({})'.format, guards))}")
    return condition


class BlockPlan:
    """What a fused block runs, and when.

    call         the way to be called that it is for
    programs     with the mask, and without it: by whether the mask is None
    tuple_size   0: the block returns the tensor; n: a tuple of the tensor and n - 1 times None
    """

    def __init__(
        self, block: nn.Module, call: BlockCall, programs: dict[bool, BlockProgram], tuple_size: int
    ):
        self.call, self.programs, self.tuple_size = call, programs, tuple_size
        self.mask_slot = -1 if call.mask is None else call.tensors.index(call.mask)
        self._inner = list(block.modules())[1:]
        self._attributes = [vars(module) for module in self._inner]
        self._hooks = [
            hooks for module in self._inner for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._families = [module._modules for module in block.modules() if module._modules]
        self._children = self._children_now()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_attributes": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy of a module is given a dict of its own, unlike the dicts in there, which are copied with all else."""
        vars(self).update(state)
        self._attributes = [vars(module) for module in self._inner]

    def run(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The block's output, or NotImplemented if its own forward must give it."""
        slots = self.call.slots(args, kwargs)
        if slots is None or not self._applies(block, slots[0]):
            return NotImplemented
        program = self.programs.get(self.mask_slot >= 0 and slots[self.mask_slot] is None)
        if program is None or not program.fits(slots):
            return NotImplemented
        try:
            result = program.run(slots)
        except LayersChanged:
            return NotImplemented
        return (result, *[None] * (self.tuple_size - 1)) if self.tuple_size else result

    def forget(self) -> None:
        """Lets go of copies of the layers' tensors."""
        for program in self.programs.values():
            for operation in program.operations:
                operation.forget()

    def _applies(self, block: nn.Module, x: torch.Tensor) -> bool:
        return (
            not block.training
            and x.dtype == torch.float32
            and x.dim() == 3
            and not (_is_grad_enabled() and wants_gradient(x, *block.parameters()))
            and not _is_autocast_enabled("cpu")
            and (not any(self._hooks) or are_idle(self._hooks))
            and not any(_ALL_MODULES)
            and self._children_now() == self._children
            and not any(["forward" in attributes for attributes in self._attributes])
        )

    def _children_now(self) -> list[nn.Module | None]:
        return [*chain.from_iterable(map(dict.values, self._families))]


class FusedBlock(nn.Module):
    """The first base class of every fused block's class; the second one is the block's own class."""

    block_plan: BlockPlan

    def extra_repr(self) -> str:
        operations = next(iter(self.block_plan.programs.values())).operations
        return ", ".join(filter(None, [super().extra_repr(), f"fused into {len(operations)} operations"]))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FusedBlock:
        self.block_plan.forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.block_plan.forget()  # else the old weights would stay beside the new ones
        super()._load_from_state_dict(*args)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, original = type(self).__bases__
        return _new, (original,), self.__dict__


def fused_block(block: nn.Module, plan: BlockPlan) -> FusedBlock:
    """A module that differs from `block` only in its forward; `block` stays as it is."""
    original: Any = type(block)
    fused = _new(original)
    fused.__dict__.update(block.__dict__)
    fused.__dict__["block_plan"] = plan
    return fused


@functools.cache
def fused_class(original: Any) -> type[FusedBlock]:
    """The class of the fused blocks that are made from blocks of a class."""

    @functools.wraps(original.forward)
    def forward(self: FusedBlock, *args: Any, **kwargs: Any) -> Any:
        result = NotImplemented if _is_compiling() else self.__dict__["block_plan"].run(self, args, kwargs)
        return original.forward(self, *args, **kwargs) if result is NotImplemented else result

    return type(f"Fused{original.__name__}", (FusedBlock, original), {"forward": forward})


def _new(original: Any) -> FusedBlock:
    cls = fused_class(original)
    return cls.__new__(cls)
