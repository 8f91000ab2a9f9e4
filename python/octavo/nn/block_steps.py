# SPDX-License-Identifier: Apache-2.0
"""What a fused block runs: steps that read tensors from slots and put what they compute into slots.

A step holds the block's own layers, or the dicts of their parameters, so that it computes with what they hold now. It
is made for little Python: with short sequences, that is what a block costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from .linear import QuantLinear
from .shared_input import Joined, side_by_side

Slots = list[Any]


class BlockStep:
    """One call. `inputs` and `outputs` are numbers of slots; an input that is None stands for no tensor."""

    def __init__(self, inputs: tuple, outputs: tuple):
        self.inputs, self.outputs = inputs, outputs

    def __call__(self, slots: Slots) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """Lets go of copies of the layers' tensors."""


class LinearStep(BlockStep):
    """Any linear layer, by its own forward; an activation that the layer does not have itself comes after it."""

    def __init__(self, inputs: tuple, outputs: tuple, layers: list[nn.Module], activation: str | None = None):
        super().__init__(inputs, outputs)
        (self.layer,) = layers
        own = getattr(self.layer, "activation", None)
        self.activation = None if own == activation else activation

    def __call__(self, slots: Slots) -> None:
        y = self.layer.forward(slots[self.inputs[0]])
        slots[self.outputs[0]] = y if self.activation is None else ops.activate(y, self.activation)


class DynamicLinearStep(BlockStep):
    """A layer of Int8Dynamic, or several side by side, of x or of its codes and scale."""

    def __init__(
        self, inputs: tuple, outputs: tuple, layers: list[QuantLinear], activation: str | None = None
    ):
        super().__init__(inputs, outputs)
        self.layers, self.activation = layers, activation
        self.symmetric = layers[0].scheme.symmetric  # type: ignore[attr-defined]
        self.forget()

    def __call__(self, slots: Slots) -> None:
        tensors = self._own() if len(self.layers) == 1 else self._joined()
        if len(self.inputs) == 2:
            codes, scale = self.inputs
            y = ops.linear_codes(slots[codes], slots[scale], *tensors, self.activation)
        else:
            y = ops.linear_dynamic(slots[self.inputs[0]], *tensors, self.symmetric, self.activation)
        slots[self.outputs[0]] = y

    def forget(self) -> None:
        self._together: Joined | None = None
        self._parts: list[tuple[dict[str, Any], str, Any]] = []

    def _own(self) -> Joined:
        (layer,) = self.layers
        parameters: dict[str, Any] = layer._parameters
        buffers: dict[str, Any] = layer._buffers
        if buffers["packed"] is None:
            layer.pack_()
        return buffers["packed"], buffers["column_sum"], parameters["weight_scale"], parameters["bias"]

    def _joined(self) -> Joined:
        """The layers' tensors side by side; anew after one of them was given another tensor."""
        for owner, name, tensor in self._parts:
            if owner[name] is not tensor:
                self.forget()
                break
        if self._together is None:
            self._together = side_by_side(self.layers)
            for layer in self.layers:
                owners: list[Any] = [layer._buffers, layer._parameters, layer._parameters]
                names = ["packed", "weight_scale", "bias"]
                self._parts += [(owner, name, owner[name]) for owner, name in zip(owners, names, strict=True)]
        return self._together


class HeadsStep(BlockStep):
    """[batch, length, heads * head_dim] to one view [batch, heads, length, head_dim] for each of `counts`."""

    def __init__(self, inputs: tuple, outputs: tuple, head_dim: int, counts: tuple[int, ...]):
        super().__init__(inputs, outputs)
        self.head_dim, self.counts = head_dim, counts

    def __call__(self, slots: Slots) -> None:
        x = slots[self.inputs[0]]
        batch, length, _ = x.shape
        heads = x.view(batch, length, -1, self.head_dim).transpose(1, 2)
        if len(self.counts) == 1:
            slots[self.outputs[0]] = heads
            return
        for output, part in zip(self.outputs, heads.split_with_sizes(self.counts, 1), strict=True):
            slots[output] = part


class ColumnsStep(BlockStep):
    """[..., sum of widths] to one view for each of `widths`."""

    def __init__(self, inputs: tuple, outputs: tuple, widths: tuple[int, ...]):
        super().__init__(inputs, outputs)
        self.widths = widths

    def __call__(self, slots: Slots) -> None:
        parts = slots[self.inputs[0]].split_with_sizes(self.widths, -1)
        for output, part in zip(self.outputs, parts, strict=True):
            slots[output] = part


class RopeStep(BlockStep):
    """q, k, cos, sin to q and k turned."""

    def __call__(self, slots: Slots) -> None:
        q, k, cos, sin = self.inputs
        slots[self.outputs[0]], slots[self.outputs[1]] = ops.rope(slots[q], slots[k], slots[cos], slots[sin])


class AttentionStep(BlockStep):
    """q, k, v and perhaps a mask to [batch, length, heads * head_dim]; without a precision by torch."""

    def __init__(
        self, inputs: tuple, outputs: tuple, causal: bool, scale: float | None, precision: str | None
    ):
        super().__init__(inputs, outputs)
        self.causal, self.scale, self.precision = causal, scale, precision

    def __call__(self, slots: Slots) -> None:
        q, k, v, *rest = (slots[number] for number in self.inputs)
        mask = rest[0] if rest else None
        if self.precision is None:
            options: Any = {"is_causal": self.causal, "scale": self.scale, "enable_gqa": True}
            y = F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2).flatten(2)
        else:
            options = {"causal": self.causal, "scale": self.scale, "precision": self.precision}
            y = ops.attention(q, k, v, mask, **options)
        slots[self.outputs[0]] = y


class NormStep(BlockStep):
    """LayerNorm or RMSNorm of x, or of x + residual; then it gives the sum as well, and the norm's codes if wanted."""

    def __init__(
        self,
        inputs: tuple,
        outputs: tuple,
        weight: tuple[dict, str],
        bias: tuple[dict, str] | None,
        eps: float,
        rms: bool,
    ):
        super().__init__(inputs, outputs)
        self.weight, self.bias, self.eps, self.rms = weight, bias, eps, rms

    def __call__(self, slots: Slots) -> None:
        owner, name = self.weight
        weight = owner[name]
        bias = None
        if self.bias is not None:
            owner, name = self.bias
            bias = owner[name]
        tensors = [slots[number] for number in self.inputs]
        if len(tensors) == 2:
            operator: Any = ops.add_norm if len(self.outputs) == 2 else ops.add_norm_codes
            results = operator(*tensors, weight, bias, self.eps, self.rms)
            for output, result in zip(self.outputs, results, strict=True):
                slots[output] = result
        elif self.rms:
            slots[self.outputs[0]] = ops.rms_norm(tensors[0], weight, self.eps)
        else:
            slots[self.outputs[0]] = F.layer_norm(tensors[0], weight.shape, weight, bias, self.eps)


class ActivationStep(BlockStep):
    """An activation on its own."""

    def __init__(self, inputs: tuple, outputs: tuple, activation: str):
        super().__init__(inputs, outputs)
        self.activation = activation

    def __call__(self, slots: Slots) -> None:
        slots[self.outputs[0]] = ops.activate(slots[self.inputs[0]], self.activation)


class SiluMulStep(BlockStep):
    """silu(gate) * up."""

    def __call__(self, slots: Slots) -> None:
        slots[self.outputs[0]] = ops.silu_mul(slots[self.inputs[0]], slots[self.inputs[1]])


class AddStep(BlockStep):
    """The sum of two tensors."""

    def __call__(self, slots: Slots) -> None:
        slots[self.outputs[0]] = torch.add(slots[self.inputs[0]], slots[self.inputs[1]])


KINDS: dict[str, type[BlockStep]] = {
    "linear": LinearStep,
    "dynamic_linear": DynamicLinearStep,
    "heads": HeadsStep,
    "columns": ColumnsStep,
    "rope": RopeStep,
    "attention": AttentionStep,
    "norm": NormStep,
    "activation": ActivationStep,
    "silu_mul": SiluMulStep,
    "add": AddStep,
}
