# SPDX-License-Identifier: Apache-2.0
"""What a fused block runs: operations that read tensors from slots and put what they compute into slots.

An operation holds the block's own layers, or the dicts of their parameters, so that it computes with what they hold
now. It runs as little Python as possible: with short sequences, Python is most of what a block costs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ... import ops
from ..linear import QuantLinear
from .shared_input import Joined, SharedInput

Slots = list[Any]


class BlockOperation:
    """One operation: it reads the slots `inputs` and fills the slots `outputs`, which are numbers of slots."""

    def __init__(self, inputs: tuple[int, ...], outputs: tuple[int, ...]):
        self.inputs, self.outputs = inputs, outputs

    # Not __call__: calling an object of a class costs 0.3 us more than calling its method.
    def run(self, slots: Slots) -> None:
        """Reads the input slots and fills the output slots. Raises: LayersChanged."""
        raise NotImplementedError

    def forget(self) -> None:
        """Frees what the operation has copied of the layers' tensors."""


class LayersChanged(Exception):
    """Layers can no longer be computed as the operation would do it; the block's own forward can."""


class LinearOperation(BlockOperation):
    """Calls the forward of any linear layer, and then an activation, unless the layer computes that itself."""

    def __init__(
        self,
        inputs: tuple[int],
        outputs: tuple[int],
        layers: list[nn.Module],
        activation: str | None = None,
    ):
        super().__init__(inputs, outputs)
        (self.x,), (self.y,), (self.layer,) = inputs, outputs, layers
        own = getattr(self.layer, "activation", None)
        self.activation = None if own == activation else activation

    def run(self, slots: Slots) -> None:
        y = self.layer.forward(slots[self.x])
        slots[self.y] = y if self.activation is None else ops.activate(y, self.activation)


class DynamicLinearOperation(BlockOperation):
    """Multiplies x, or the codes and the scale of x, by one layer of Int8Dynamic or by several side by side."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int],
        layers: list[QuantLinear],
        activation: str | None = None,
    ):
        super().__init__(inputs, outputs)
        self.x, *scale = inputs
        self.scale = scale[0] if scale else None
        (self.y,) = outputs
        self.layer, self.activation = layers[0], activation
        self.shared = SharedInput(layers) if len(layers) > 1 else None
        weights, activations = layers[0].scheme.weights, layers[0].scheme.activations
        self.product: Any = weights.codes_kernel(activations) if scale else weights.kernel(activations)

    def run(self, slots: Slots) -> None:
        tensors = self._own() if self.shared is None else self.shared.joined()
        if tensors is None:
            raise LayersChanged
        x, (operands, bias) = slots[self.x], tensors
        if self.scale is None:
            slots[self.y] = self.product(x, operands, bias, self.activation)
        else:
            slots[self.y] = self.product(x, slots[self.scale], operands, bias, self.activation)

    def forget(self) -> None:
        if self.shared is not None:
            self.shared.forget()

    def _own(self) -> Joined:
        parameters: dict[str, Any] = self.layer._parameters
        return self.layer.scheme.weights.operands_of(self.layer), parameters["bias"]


class HeadsOperation(BlockOperation):
    """Makes of [batch, length, heads * head_dim] a view [batch, heads, length, head_dim] for each of `counts`."""

    def __init__(self, inputs: tuple[int], outputs: tuple[int, ...], head_dim: int, counts: tuple[int, ...]):
        super().__init__(inputs, outputs)
        (self.x,) = inputs
        self.head_dim, self.counts = head_dim, counts

    def run(self, slots: Slots) -> None:
        x = slots[self.x]
        batch, length, _ = x.shape
        heads = x.view(batch, length, -1, self.head_dim).transpose(1, 2)
        parts = (heads,) if len(self.counts) == 1 else heads.split_with_sizes(self.counts, 1)
        for output, part in zip(self.outputs, parts, strict=True):
            slots[output] = part


class ColumnsOperation(BlockOperation):
    """Makes of [..., sum of widths] a view [..., width] for each of `widths`."""

    def __init__(self, inputs: tuple[int], outputs: tuple[int, ...], widths: tuple[int, ...]):
        super().__init__(inputs, outputs)
        (self.x,) = inputs
        self.widths = widths

    def run(self, slots: Slots) -> None:
        parts = slots[self.x].split_with_sizes(self.widths, -1)
        for output, part in zip(self.outputs, parts, strict=True):
            slots[output] = part


class RopeOperation(BlockOperation):
    """Rotates q and k by the angles whose cosines and sines are cos and sin."""

    def run(self, slots: Slots) -> None:
        q, k, cos, sin = self.inputs
        slots[self.outputs[0]], slots[self.outputs[1]] = ops.rope(slots[q], slots[k], slots[cos], slots[sin])


class AttentionOperation(BlockOperation):
    """Attention of q, k, v and perhaps a mask: [batch, length, heads * head_dim]; by torch if there is no precision."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int],
        causal: bool,
        scale: float | None,
        precision: str | None,
    ):
        super().__init__(inputs, outputs)
        self.q, self.k, self.v, *mask = inputs
        self.mask = mask[0] if mask else None
        (self.y,) = outputs
        self.causal, self.scale, self.precision = causal, scale, precision

    def run(self, slots: Slots) -> None:
        q, k, v = slots[self.q], slots[self.k], slots[self.v]
        mask = None if self.mask is None else slots[self.mask]
        if self.precision is None:
            options: Any = {"is_causal": self.causal, "scale": self.scale, "enable_gqa": True}
            y = F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2).flatten(2)
        else:
            y = ops.attention(q, k, v, mask, causal=self.causal, scale=self.scale, precision=self.precision)
        slots[self.y] = y


# A parameter that may be given another tensor: the dict that holds it, and its name there.
Place = tuple[dict[str, Any], str]
NO_PARAMETER: Place = ({"none": None}, "none")


class NormOperation(BlockOperation):
    """LayerNorm or RMSNorm of x."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        weight: Place,
        bias: Place | None,
        eps: float,
        rms: bool,
    ):
        super().__init__(inputs, outputs)
        self.eps, self.rms = eps, rms
        self.weights, self.weight = weight
        self.biases, self.bias = NO_PARAMETER if bias is None else bias

    def run(self, slots: Slots) -> None:
        x, weight, bias = slots[self.inputs[0]], self.weights[self.weight], self.biases[self.bias]
        if self.rms:
            slots[self.outputs[0]] = ops.rms_norm(x, weight, self.eps)
        else:
            slots[self.outputs[0]] = F.layer_norm(x, weight.shape, weight, bias, self.eps)


class AddNormOperation(NormOperation):
    """The norm of x + residual and, where there are slots for them, the sum, the norm's codes and their scale."""

    def __init__(self, inputs: tuple[int, int], outputs: tuple[int, ...], *options: Any, **names: Any):
        super().__init__(inputs, outputs, *options, **names)
        self.has_codes, self.keep_sum = len(outputs) > 2, len(outputs) in (2, 4)

    def run(self, slots: Slots) -> None:
        x, residual = self.inputs
        weight, bias = self.weights[self.weight], self.biases[self.bias]
        operator: Any = ops.add_norm_codes if self.has_codes else ops.add_norm
        y, total, *codes = operator(
            slots[x], slots[residual], weight, bias, self.eps, self.rms, self.keep_sum
        )
        results = (y, total, *codes) if self.keep_sum else (y, *codes)
        for output, result in zip(self.outputs, results, strict=True):
            slots[output] = result


class ActivationOperation(BlockOperation):
    """An activation on its own."""

    def __init__(self, inputs: tuple[int], outputs: tuple[int], activation: str):
        super().__init__(inputs, outputs)
        self.activation = activation

    def run(self, slots: Slots) -> None:
        slots[self.outputs[0]] = ops.activate(slots[self.inputs[0]], self.activation)


class SiluMulOperation(BlockOperation):
    """silu(gate) * up."""

    def run(self, slots: Slots) -> None:
        slots[self.outputs[0]] = ops.silu_mul(slots[self.inputs[0]], slots[self.inputs[1]])


class AddOperation(BlockOperation):
    """The sum of two tensors."""

    def run(self, slots: Slots) -> None:
        slots[self.outputs[0]] = torch.add(slots[self.inputs[0]], slots[self.inputs[1]])


OPERATIONS: dict[str, type[BlockOperation]] = {
    "linear": LinearOperation,
    "dynamic_linear": DynamicLinearOperation,
    "heads": HeadsOperation,
    "columns": ColumnsOperation,
    "rope": RopeOperation,
    "attention": AttentionOperation,
    "norm": NormOperation,
    "add_norm": AddNormOperation,
    "activation": ActivationOperation,
    "silu_mul": SiluMulOperation,
    "add": AddOperation,
}
