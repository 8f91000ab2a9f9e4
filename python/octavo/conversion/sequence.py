# SPDX-License-Identifier: Apache-2.0
"""Takes a model block by block, so that the layers of each block see what the quantized blocks before it give.

A block is an item of a list of modules of one class, such as the layers of a transformer. The inputs of the first block
are kept; they are run through it while its layers watch, the layers are frozen, and the inputs are run through again:
what comes out are the inputs of the next block. So the statistics of one block alone are in memory, and no block
computes more than twice. Where blocks do not hand on one tensor to each other, the model is run from its beginning for
each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..base.batches import is_cache, output_of
from ..base.forward_arguments import parameters_of
from ..base.hooks import hooked
from ..methods.statistics import Positions
from ..nn import PreparedLinear

Batch = tuple[tuple, dict[str, Any]]
LEAST_BLOCKS = 2


class Part:
    """Some prepared layers that can be calibrated together, and how to run what computes their inputs.

    root     the module that `run` calls: the block, or the whole model
    layers   prepared
    """

    def __init__(self, root: nn.Module, layers: list[PreparedLinear], run: Callable[[Positions], None]):
        self.root, self.layers = root, layers
        self.run = run  # once over the data; tells the Positions which of each batch count


class _Stop(Exception):
    """What was wanted of the model has run."""


class BlockSequence:
    """The parts of `model`, in the order in which they run. Those of one part are frozen before the next is asked for.

    batches   of the data, which all stay in memory; what blocks read of them does too
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]):
        self.model = model
        accepts = any(parameter.name == "use_cache" for parameter in parameters_of(model))
        quiet = {"use_cache": False} if accepts else {}  # a cache would remember the first of two runs
        self.batches = [(args, {**quiet, **kwargs}) for args, kwargs in batches]
        self.positions = Positions(model)
        self.masks = []
        for args, kwargs in self.batches:
            self.positions.find(args, kwargs)
            self.masks.append(self.positions.masks)
        self.lists = self._lists_of_blocks()
        inside = {layer for blocks in self.lists for block in blocks for layer in _prepared(block)}
        self.outside = [layer for layer in _prepared(model) if layer not in inside]
        self.before = [self._run_before(blocks[0]) for blocks in self.lists]  # layers outside of all blocks

    def __len__(self) -> int:
        blocks = sum(bool(_prepared(block)) for blocks in self.lists for block in blocks)
        return blocks + sum(map(bool, self.before)) + bool(self.outside)

    def __iter__(self) -> Iterator[Part]:
        for blocks, before in zip(self.lists, self.before, strict=True):
            if before:
                yield Part(self.model, before, partial(self._run, before=blocks[0]))
            yield from self._parts_of(blocks)
        if self.outside:
            yield Part(self.model, self.outside, self._run)

    def _lists_of_blocks(self) -> list[list[nn.Module]]:
        """The outermost lists, in the order in which their first blocks run; lists that do not run are left out."""
        found: dict[str, list[nn.Module]] = {}
        for name, module in self.model.named_modules():
            items = list(module.children())
            is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(items) >= LEAST_BLOCKS
            is_inside = any(name.startswith(f"{outer}.") for outer in found)
            if is_list and not is_inside and len(set(map(type, items))) == 1 and any(map(_prepared, items)):
                if not isinstance(items[0], PreparedLinear):
                    found[name] = items
        ran: dict[nn.Module, None] = {}
        firsts = [(blocks[0], lambda module, *_: ran.setdefault(module)) for blocks in found.values()]
        with hooked(firsts, before=True):
            args, kwargs = self.batches[0]
            output_of(self.model, args, kwargs)
        lists = {blocks[0]: blocks for blocks in found.values()}
        return [lists[first] for first in ran]

    # --- the whole model --------------------------------------------------------------------------------------------

    def _run(
        self, positions: Positions, before: nn.Module | None = None, after: nn.Module | None = None
    ) -> None:
        """Runs all batches, until `before` is called or `after` has run."""
        for (args, kwargs), positions.masks in zip(self.batches, self.masks, strict=True):
            with _stopping(before, after):
                output_of(self.model, args, kwargs)

    def _run_before(self, block: nn.Module) -> list[PreparedLinear]:
        """Takes the layers that run before `block` does out of those outside."""
        ran: set[nn.Module] = set()
        with hooked([(layer, lambda module, *_: ran.add(module)) for layer in self.outside], before=True):
            args, kwargs = self.batches[0]
            with _stopping(block, None):
                output_of(self.model, args, kwargs)
        found = [layer for layer in self.outside if layer in ran]
        self.outside = [layer for layer in self.outside if layer not in ran]
        return found

    # --- a list of blocks -------------------------------------------------------------------------------------------

    def _parts_of(self, blocks: list[nn.Module]) -> Iterator[Part]:
        calls = self._calls(blocks)
        for i, block in enumerate(blocks):
            layers = _prepared(block)
            if calls is None:
                yield Part(block, layers, partial(self._run, after=block))
                continue

            def run(positions: Positions, block: nn.Module = block, i: int = i) -> None:
                for call, positions.masks in zip(calls, self.masks, strict=True):
                    call.run(block, i)

            if layers:
                yield Part(block, layers, run)
            for call in calls:
                call.advance(block, i)

    def _calls(self, blocks: list[nn.Module]) -> list[_Call] | None:
        """How the blocks are called on each batch; None if one is called otherwise than with the output of the last."""
        calls = []
        for args, kwargs in self.batches:
            call = _Call(blocks)
            before = [(block, call.enter) for block in blocks]
            after = [(block, call.leave) for block in blocks]
            with hooked(before, before=True), hooked(after), _stopping(None, blocks[-1]):
                output_of(self.model, args, kwargs)
            if not call.is_chain or len(call.arguments) != len(blocks):
                return None
            calls.append(call)
        return calls


class _Call:
    """The calls of blocks on one batch: what the first one reads, and what each reads besides."""

    def __init__(self, blocks: list[nn.Module]):
        self.blocks = blocks
        self.arguments: list[Batch] = []
        self.slots: list[int | str] = []  # where in the arguments what the block before gave is
        self.is_chain = True
        self.x: Any = None  # what the next block reads
        self.versions: list[tuple[Any, int]] = []

    # --- while the whole model runs

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        i = len(self.arguments)
        in_order = i < len(self.blocks) and self.blocks[i] is block
        slots = [slot for slot, value in given.items() if value is self.x] if i else list(given)[:1]
        if not in_order or len(slots) != 1 or any(map(is_cache, given.values())):
            self.is_chain = False
            return
        self.versions.append((given[slots[0]], given[slots[0]]._version))
        if i == 0:
            self.first = given[slots[0]].clone()
        empty = tuple(None if slot == slots[0] else value for slot, value in enumerate(args))
        self.arguments.append((empty, {key: value for key, value in kwargs.items() if key != slots[0]}))
        self.slots.append(slots[0])

    def leave(self, block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = _handed_on(output)
        is_kept = bool(self.versions) and all(tensor._version == version for tensor, version in self.versions)
        if x is None or not is_kept:  # it writes into what it reads
            self.is_chain = False
        self.versions, self.x = [], x
        if block is self.blocks[-1]:
            self.x = getattr(self, "first", None)

    # --- block by block

    def run(self, block: nn.Module, i: int) -> Any:
        (args, kwargs), slot = self.arguments[i], self.slots[i]
        if isinstance(slot, int):
            args = (*args[:slot], self.x, *args[slot + 1 :])
            return block(*args, **kwargs)
        return block(*args, **{**kwargs, slot: self.x})

    def advance(self, block: nn.Module, i: int) -> None:
        """Puts what `block` gives now into the place of what it read."""
        self.x = _handed_on(self.run(block, i))


def _handed_on(output: Any) -> Any:
    """The tensor among a block's outputs that the next one reads: the first."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if hasattr(first, "_version") else None


@contextmanager
def _stopping(before: nn.Module | None, after: nn.Module | None) -> Iterator[None]:
    """Inside, a model runs until `before` is called or `after` has run."""

    def stop(*_: Any) -> None:
        raise _Stop

    stops_before = [] if before is None else [(before, stop)]
    stops_after = [] if after is None else [(after, stop)]
    with hooked(stops_before, before=True), hooked(stops_after):
        try:
            yield
        except _Stop:
            pass


def _prepared(module: nn.Module) -> list[PreparedLinear]:
    return [each for each in module.modules() if isinstance(each, PreparedLinear)]
