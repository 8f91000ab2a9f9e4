# SPDX-License-Identifier: Apache-2.0
"""From a graph in normal form to the operations of a fused block.

Operations are emitted in the order in which their inputs are known. What belongs together is emitted once, where its
first part stands: layers of the same input as one product, a sum with the norm that reads it, a layer with its
activation. Codes are passed from a norm to layers that would compute the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...activations import Dynamic
from ...nn import QuantLinear
from ...nn.fused.block_operations import OPERATIONS, BlockOperation
from ...nn.fused.fused_block import BlockProgram
from ...nn.fused.shared_input import can_be_joined
from ..steps.interface import is_native_size
from .graph import Node, NotUnderstood

HIDDEN = ("heads", "rope")  # the attention that reads these nodes emits them


@dataclass
class OperationOutline:
    """An operation without modules: `layers` and parameters are names in the block."""

    kind: str
    inputs: list[int]
    outputs: list[int]
    layers: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pattern:
    """The operations of one block; the first slots are its inputs. Blocks of the same structure share it."""

    operations: list[OperationOutline]
    size: int
    output: int
    batched: dict[int, int] = field(default_factory=dict)
    guards: tuple[str, ...] = ()

    def bind(self, block: nn.Module) -> BlockProgram:
        """The operations with the layers and parameters of `block`."""
        return BlockProgram(
            [_bound(operation, block) for operation in self.operations],
            self.size,
            self.output,
            self.batched,
            self.guards,
        )


def find_pattern(output: Node, block: nn.Module, inputs: list[str], precision: str | None) -> Pattern:
    """The operations that compute `output`. `inputs` are the names of the first slots. Raises: NotUnderstood."""
    emitter = _Emitter(output, block, inputs, precision)
    for node in emitter.order:
        emitter.emit(node)
    pattern = _with_few_slots(emitter.operations, len(inputs), emitter.slots[output])
    pattern.batched = _batched(emitter)
    return pattern


def _bound(operation: OperationOutline, block: nn.Module) -> BlockOperation:
    options = dict(operation.options)
    if operation.layers:
        options["layers"] = [block.get_submodule(name) for name in operation.layers]
    for name in ("weight", "bias"):
        if options.get(name) is not None:
            owner, _, attribute = options[name].rpartition(".")
            options[name] = (block.get_submodule(owner)._parameters, attribute)
    return OPERATIONS[operation.kind](tuple(operation.inputs), tuple(operation.outputs), **options)


class _Emitter:
    """Emits the operations of one graph. Every value has a slot of its own; `_with_few_slots` reuses them later."""

    def __init__(self, output: Node, block: nn.Module, inputs: list[str], precision: str | None):
        self.output, self.block, self.precision = output, block, precision
        self.order = _in_order(output)
        self.users: dict[Node, list[Node]] = {node: [] for node in self.order}
        for node in self.order:
            for source in dict.fromkeys(node.inputs):
                self.users[source].append(node)
        self.inputs = {name: slot for slot, name in enumerate(inputs)}
        self.slots: dict[Node, int] = {
            node: self.inputs[node.name] for node in self.order if node.op == "input"
        }
        self.codes: dict[Node, tuple[int, int]] = {}
        self.operations: list[OperationOutline] = []
        self.size = len(inputs)

    def emit(self, node: Node) -> None:
        """Appends the operation that gives `node`, unless an earlier one gave it."""
        if node in self.slots or node.op in HIDDEN:
            return
        method = getattr(self, f"_emit_{node.op}", None)
        if method is None:
            raise NotUnderstood(f"{node.op.replace('_', ' ')} is not understood where it stands")
        method(node)

    def _operation(self, kind: str, inputs: Iterable[int], outputs: int, **fields: Any) -> list[int]:
        slots = list(range(self.size, self.size + outputs))
        self.size += outputs
        options = {name: value for name, value in fields.items() if name != "layers"}
        self.operations.append(OperationOutline(kind, list(inputs), slots, fields.get("layers", []), options))
        return slots

    # --- layers

    def _emit_linear(self, node: Node) -> None:
        (x,) = node.inputs
        siblings = [user for user in self.users[x] if user.op == "linear"]
        alone = [user for user in siblings if self._activation_of(user) is None]
        layers: list[Any] = [self.block.get_submodule(user.module) for user in alone]
        if node in alone and len(alone) > 1 and _is_dynamic(layers[0]) and can_be_joined(layers):
            self._emit_shared(alone, layers)
            return
        layer = self.block.get_submodule(node.module)
        user = self._activation_of(node)
        kind = "dynamic_linear" if _is_dynamic(layer) else "linear"
        activation = None if user is None else user.activation
        (slot,) = self._operation(
            kind, self._read_by(layer, x), 1, layers=[node.module], activation=activation
        )
        self.slots[node if user is None else user] = slot
        self.slots.setdefault(node, slot)

    def _emit_shared(self, nodes: list[Node], layers: list[Any]) -> None:
        (x,) = nodes[0].inputs
        inputs = self._read_by(layers[0], x)
        merged = self._operation("dynamic_linear", inputs, 1, layers=[node.module for node in nodes])
        readers = [self.users[node] for node in nodes]
        heads = [users[0] for users in readers if len(users) == 1 and users[0].op == "heads"]
        if len(heads) == len(nodes) and len({node.shape[-1] for node in heads}) == 1:
            counts = tuple(node.shape[1] for node in heads)
            slots = self._operation("heads", merged, len(heads), head_dim=heads[0].shape[-1], counts=counts)
            self.slots.update(zip(heads, slots, strict=True))
        else:
            widths = tuple(layer.out_features for layer in layers)
            slots = self._operation("columns", merged, len(nodes), widths=widths)
        self.slots.update(zip(nodes, slots, strict=True))

    def _activation_of(self, node: Node) -> Node | None:
        users = self.users[node]
        return users[0] if len(users) == 1 and users[0].op == "activation" else None

    def _read_by(self, layer: nn.Module, x: Node) -> tuple[int, ...]:
        """The slots that the layer reads: those of x's codes and scale if it can use them, else the slot of x."""
        if x in self.codes and _is_dynamic(layer, symmetric=True):
            return self.codes[x]
        return (self.slots[x],)

    # --- norms and sums

    def _emit_norm(self, node: Node) -> None:
        (self.slots[node],) = self._operation("norm", (self.slots[node.inputs[0]],), 1, **_norm_options(node))

    def _emit_add(self, node: Node) -> None:
        inputs = [self.slots[source] for source in node.inputs]
        norms = [user for user in self.users[node] if user.op == "norm"]
        if len(norms) != 1:
            (self.slots[node],) = self._operation("add", inputs, 1)
            return
        (norm,) = norms
        layers = [self.block.get_submodule(user.module) for user in self.users[norm] if user.op == "linear"]
        has_codes = any(_is_dynamic(layer, symmetric=True) for layer in layers)
        has_sum = node is self.output or len(self.users[node]) > 1
        slots = self._operation("add_norm", inputs, 1 + has_sum + 2 * has_codes, **_norm_options(norm))
        self.slots[norm] = slots[0]
        if has_sum:
            self.slots[node] = slots[1]
        if has_codes:
            self.codes[norm] = (slots[-2], slots[-1])

    # --- the rest

    def _emit_activation(self, node: Node) -> None:
        inputs = (self.slots[node.inputs[0]],)
        (self.slots[node],) = self._operation("activation", inputs, 1, activation=node.activation)

    def _emit_silu_mul(self, node: Node) -> None:
        (self.slots[node],) = self._operation("silu_mul", [self.slots[source] for source in node.inputs], 1)

    def _emit_attention(self, node: Node) -> None:
        q, k, v, *mask = node.inputs
        turned = [x for x in (q, k) if x.op == "rope"]
        for x in (q, k, v):
            self._emit_heads(x.inputs[0] if x.op == "rope" else x)
        if len(turned) == 2 and q.inputs[1:] == k.inputs[1:]:
            sources = (q.inputs[0], k.inputs[0], *q.inputs[1:])
            self.slots[q], self.slots[k] = self._operation(
                "rope", [self.slots[source] for source in sources], 2
            )
        elif turned:
            raise NotUnderstood("rotary embeddings of q and k differ")
        precision = node.options.get("precision", self.precision if is_native_size(node.head_dim) else None)
        options = {"causal": node.causal, "scale": node.scale, "precision": precision}
        inputs = [self.slots[source] for source in (q, k, v, *mask)]
        (self.slots[node],) = self._operation("attention", inputs, 1, **options)

    def _emit_heads(self, node: Node) -> None:
        if node not in self.slots:
            head_dim, inputs = node.shape[-1], (self.slots[node.inputs[0]],)
            (self.slots[node],) = self._operation(
                "heads", inputs, 1, head_dim=head_dim, counts=(node.shape[1],)
            )


def _norm_options(node: Node) -> dict[str, Any]:
    return {"weight": node.weight, "bias": node.bias, "eps": node.eps, "rms": node.rms}


def _is_dynamic(layer: Any, symmetric: bool | None = None) -> bool:
    """Whether a kernel multiplies the layer and its activations are dynamic.

    symmetric   True: whether it also takes codes, which only layers with symmetric activations do
    """
    if type(layer) is not QuantLinear:
        return False
    weights, activations = layer.scheme.weights, layer.scheme.activations
    kernel = weights.codes_kernel(activations) if symmetric else weights.kernel(activations)
    return kernel is not None and type(activations) is Dynamic


def _in_order(output: Node) -> list[Node]:
    """All nodes that `output` needs, each after its inputs."""
    order: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in order:
            for source in node.inputs:
                visit(source)
            order[node] = None

    visit(output)
    return list(order)


def _batched(emitter: _Emitter) -> dict[int, int]:
    """{slot: number of axes} of the inputs if the first axis of each is the batch, or 1; else an empty dict.

    A mask that attention reads then has 4 axes, and every other input has 3.
    """
    result = {}
    for node in emitter.order:
        if node.op == "input":
            is_mask = any(user.op == "attention" for user in emitter.users[node])
            if len(node.shape) != (4 if is_mask else 3):
                return {}
            result[emitter.inputs[node.name]] = len(node.shape)
    return result


def _with_few_slots(operations: Sequence[OperationOutline], input_count: int, output: int) -> Pattern:
    """The pattern, in which a slot is reused once its tensor was read for the last time; that frees the tensor, too."""
    last = {
        slot: number
        for number, operation in enumerate(operations)
        for slot in (*operation.outputs, *operation.inputs)
    }
    last[output] = len(operations)
    place = {slot: slot for slot in range(input_count)}
    free: list[int] = []
    size = input_count
    for number, operation in enumerate(operations):
        read, written = operation.inputs, operation.outputs
        operation.inputs, operation.outputs = [place[slot] for slot in read], []
        free += [place[slot] for slot in dict.fromkeys(read) if last[slot] == number]
        for slot in written:
            if not free:
                free.append(size)
                size += 1
            place[slot] = free.pop()
            operation.outputs.append(place[slot])
        free += [place[slot] for slot in written if last[slot] == number]  # nobody reads it
    return Pattern(list(operations), size, place[output])
