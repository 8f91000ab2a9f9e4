# SPDX-License-Identifier: Apache-2.0
"""A block of a model as a small graph of values: exported by torch.export, with batch and length left open.

What is exported is a skeleton of the block, in which linear layers of every kind are the same leaf, a product with an
empty weight: so a graph says which layer multiplies, not how. Tensors among the block's arguments are the graph's
inputs, all other arguments are constants of it. `lowering.py` then reads the aten operators.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config

from ... import ops
from ...nn import OurEmbedding, QuantLinear
from ...nn.fused.block_call import ForwardParameters
from ...nn.fused.shared_input import SharedInput
from ...nn.replacements import features_of, is_plain

_SIZE = re.compile(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]")
Shape = tuple[Any, ...]  # sizes are ints, or sympy expressions of the batch size and the length


class NotUnderstood(Exception):
    """Why a block is left alone, in words for the report."""


@dataclass(eq=False)
class Node:
    """One value of the graph: the operator that gives it, and the values that the operator reads."""

    op: str
    inputs: tuple[Node, ...] = ()
    shape: Shape = ()
    options: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:  # node.heads for node.options["heads"]
        try:
            return self.__dict__["options"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Exported:
    """An aten graph, and what its placeholders are.

    names    placeholder -> ("linear", module), ("parameter", name) or ("input", leaf of the arguments)
    guards   what must hold for the sizes of the inputs, in Python, with {leaf} for the shape of an input: the block
             looked at them, and other sizes may take another path
    """

    program: ExportedProgram
    names: dict[str, tuple[str, str]]
    guards: tuple[str, ...] = ()


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` is a linear layer of any kind, which is called by an operation of the fused block."""
    return isinstance(module, QuantLinear) and not isinstance(module, OurEmbedding) or is_plain(module)


def export_block(block: nn.Module, args: tuple, kwargs: dict) -> Exported:
    """The graph of `block` called like this, for all batch sizes and lengths.

    raises   NotUnderstood if torch cannot export it, or the block is called with one token, of which nothing is learnt
    """
    tensors = _tensors(ForwardParameters.of(block.forward).named(args, kwargs))
    inputs = tuple(_at_least_two_items(tensors))
    if inputs and inputs[0].dim() == 3 and inputs[0].shape[1] == 1:
        raise NotUnderstood("the example has one token only, give a longer one")
    dims = tuple({i: Dim.AUTO for i, size in enumerate(x.shape[:-1]) if size > 1} for x in inputs)
    for x, sizes in zip(inputs, dims, strict=True):
        is_mask = not x.is_floating_point()  # its last axis is a length, too
        if is_mask and x.dim() and x.shape[-1] > 1:
            sizes[x.dim() - 1] = Dim.AUTO
    call = _CallWithTensors(_skeleton(block), args, kwargs)
    try:
        with torch.no_grad(), _export_settings():
            program = torch.export.export(call, inputs, dynamic_shapes=(dims,), strict=False)
    except Exception as error:  # whatever a block does that cannot be traced
        line = (str(error).strip().splitlines() or [""])[0]
        raise NotUnderstood(f"torch.export fails: {type(error).__name__}: {line[:120]}") from error
    names = _placeholders(program, block, list(tensors))
    return Exported(program, names, _guards(program, tensors))


@contextmanager
def _export_settings() -> Iterator[None]:
    # Else torch takes every size for more than 1, and a block that asks whether it is would not be found out.
    with _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        # torch remembers the shapes that operators gave. In one graph few calls are alike, and remembering took a third
        # of the time.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            yield


class _LinearLeaf(nn.Module):
    """Stands for a linear layer while a block is exported: the same shapes and attributes, but no real weight."""

    def __init__(self, layer: Any):
        super().__init__()
        is_ours = isinstance(layer, QuantLinear)
        k, n = (layer.in_features, layer.out_features) if is_ours else features_of(layer)
        self.in_features, self.out_features = k, n
        self.bias = layer._parameters.get("bias")
        self.activation = getattr(layer, "activation", None)
        weight = torch.zeros((), dtype=torch.float32).expand(n, k)
        self.register_buffer("weight", weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = F.linear(input, self.weight)  # type: ignore[arg-type]
        return y if self.activation is None else ops.torch_activation(y, self.activation)


class _CallWithTensors(nn.Module):
    """A block called with some tensors, and with everything else as it was in `args` and `kwargs`."""

    def __init__(self, block: nn.Module, args: tuple, kwargs: dict):
        super().__init__()
        self.block, self.args, self.kwargs = block, args, kwargs

    def forward(self, *tensors: torch.Tensor) -> Any:
        it = iter(tensors)
        args = [_filled(value, it) for value in self.args]
        kwargs = {name: _filled(value, it) for name, value in self.kwargs.items()}
        # Not __call__: what transformers wraps around it for training does nothing in eval mode.
        return self.block.forward(*args, **kwargs)


def _tensors(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors among the arguments, in their order; items of a tuple are called "name.0", "name.1", ..."""
    result = {}
    for name, value in arguments.items():
        items = {name: value}
        if isinstance(value, tuple | list):
            items = {f"{name}.{number}": item for number, item in enumerate(value)}
        result.update({key: item for key, item in items.items() if isinstance(item, torch.Tensor)})
    return result


def _filled(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """`value` with the next of `tensors` in the place of each tensor in it."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, tuple | list):
        return type(value)(_filled(item, tensors) for item in value)
    return value


def _skeleton(module: nn.Module, leaves: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy of `block` that shares its parameters; in the places of linear layers it has leaves."""
    leaves = {} if leaves is None else leaves
    if is_leaf(module):
        return leaves.setdefault(module, _LinearLeaf(module))
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    children = {name: child and _skeleton(child, leaves) for name, child in module._modules.items()}
    copy.__dict__["_modules"] = children
    for name, value in module.__dict__.items():
        if isinstance(value, SharedInput):
            copy.__dict__[name] = SharedInput([leaves[layer] for layer in value.layers])
    return copy


def _at_least_two_items(tensors: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Makes two items of a batch of one, whose size torch.export would take for a constant. Other inputs broadcast."""
    for number, tensor in enumerate(tensors.values()):
        alone = number == 0 and tensor.dim() == 3 and tensor.shape[0] == 1
        yield torch.cat([tensor, tensor]) if alone else tensor


def _guards(program: ExportedProgram, tensors: dict[str, torch.Tensor]) -> tuple[str, ...]:
    leaves = list(tensors)
    guards = [f"len({{{name}}}) == {x.dim()}" for name, x in tensors.items()]
    for text in program._guards_code:
        guard = _SIZE.sub(lambda match: f"{{{leaves[int(match[1])]}}}[{match[2]}]", text)
        if "L[" in guard:
            raise NotUnderstood(f"torch.export serves calls only where {text}")
        guards.append(guard)
    return tuple(guards)


def _placeholders(
    program: ExportedProgram, block: nn.Module, leaves: list[str]
) -> dict[str, tuple[str, str]]:
    signature = program.graph_signature
    names: dict[str, tuple[str, str]] = {}
    for placeholder, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
        name = name.removeprefix("block.")
        owner = name.rpartition(".")[0]
        is_linear = is_leaf(block.get_submodule(owner))
        names[placeholder] = ("linear", owner) if is_linear else ("parameter", name)
    for placeholder, leaf in zip(signature.user_inputs, leaves, strict=True):
        names[str(placeholder)] = ("input", leaf)
    return names
