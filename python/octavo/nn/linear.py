# SPDX-License-Identifier: Apache-2.0
"""QuantLinear: a linear layer that holds an int8 weight and calls one operator.

It is in one of two states. Canonical: `weight` is an ordinary frozen int8 Parameter [n, k], so that any loader can fill
it. Packed: `weight` has left the parameters and the buffer `packed` holds the kernels' layout of it. The first forward
packs. Files only ever see the canonical form, memory holds only one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from .. import ops
from ..cpu import cpu_info
from ..qparams import FLOAT_DTYPES, Granularity
from . import packed_memory
from .scales import SCALES, is_scale_of


class LinearScheme(Protocol):
    """What a QuantLinear asks of its scheme."""

    granularity: ClassVar[Granularity]

    @property
    def name(self) -> str: ...

    @property
    def weight_bits(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...

    def linear(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        column_sum: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str | None,
    ) -> torch.Tensor: ...


class QuantLinear(nn.Module):
    """y = x @ (weight_scale * codes).T + bias, computed in integers as `scheme` says.

    in_features, out_features   k and n
    scheme                      an octavo scheme, for example octavo.Int8Dynamic()
    device                      "meta" makes a layer without memory, to be filled by load_state_dict(assign=True)

    A new layer is unfilled (zero codes): `from_codes`, a state_dict or `octavo.quantize_` fills it. Its state_dict has
    `weight` int8 [n, k], `weight_scale` float32 [n, 1] and, if there is one, `bias` [n]. All of them are frozen; the
    gradient reaches x. Once packed, `.weight` reads as the dequantized float32 matrix, a copy.

    `activation` is None or one of octavo.ops.ACTIVATIONS, which then is part of the call. It says how a layer is used,
    as the modules around it do, so it is in no state_dict and no file; copies and pickles have it.
    """

    activation: str | None = None

    weight_scale: nn.Parameter
    packed: torch.Tensor  # None while canonical, as column_sum is
    column_sum: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: LinearScheme,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.weight = frozen(torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.weight_scale = frozen(torch.ones(out_features, 1, dtype=torch.float32, device=device))
        default = torch.get_default_dtype()
        bias_dtype = default if default in FLOAT_DTYPES else torch.float32
        zeros = torch.zeros(out_features, dtype=bias_dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else frozen(zeros))
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("column_sum", None, persistent=False)

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, scheme: LinearScheme
    ) -> QuantLinear:
        """The canonical layer that holds these tensors themselves, not copies.

        codes    int8 [n, k]; weight_scale float32 [n, 1]; bias [n] float32, bfloat16, float16 or None
        raises   TypeError, ValueError for other dtypes and shapes
        """
        _check_codes(codes, weight_scale, bias)
        n, k = codes.shape
        layer = cls(k, n, bias is not None, scheme=scheme, device="meta")
        layer.weight = frozen(codes)
        layer.weight_scale = frozen(weight_scale)
        if bias is not None:
            layer.bias = frozen(bias)
        return layer

    # `input` is nn.Linear's name for it, so that keyword calls work.
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] float32, bfloat16 or float16 to [..., out_features] in its dtype."""
        packed, column_sum = self._packed_for(input)
        parameters: dict[str, Any] = self._parameters
        weight_scale, bias = parameters["weight_scale"], parameters["bias"]
        return self.scheme.linear(input, packed, column_sum, weight_scale, bias, self.activation)

    @property
    def is_packed(self) -> bool:
        return "weight" not in self._parameters

    def pack_(self) -> QuantLinear:
        """Goes to the packed state, in place; does nothing if it is there already or on the meta device."""
        codes = self._parameters.get("weight")
        if codes is not None and not codes.is_meta:
            # Inference tensors could not be saved for backward.
            with torch.inference_mode(False), torch.no_grad():
                packed = packed_memory.empty(ops.packed_shape(self.out_features, self.in_features))
                self.column_sum = ops.pack_weight_into(codes.detach(), packed)
                self.packed = packed
            self._parameters.pop("weight", None)
        return self

    def unpack_(self) -> QuantLinear:
        """Goes back to the canonical state, in place: for loaders that set one tensor after the other by name, as
        accelerate's load_checkpoint_and_dispatch does. `load_state_dict` does not need it."""
        if self.is_packed:
            with torch.inference_mode(False), torch.no_grad():
                codes = self.codes()
                self._buffers.update(packed=None, column_sum=None)
                self.weight = frozen(codes)
        return self

    def codes(self) -> torch.Tensor:
        """The weight's codes, int8 [n, k]: the Parameter's data, or unpacked into a new tensor."""
        weight = self._parameters.get("weight")
        if weight is None:
            return ops.unpack_weight(self.packed, self.out_features, self.in_features)
        return weight.detach()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a new float matrix [n, k] in `dtype` (float32, bfloat16, float16)."""
        scale = self.weight_scale.detach().reshape(-1)
        return ops.dequantize(self.codes(), scale, torch.zeros_like(scale, dtype=torch.int32), dtype)

    def take_shapes_(self, state: dict[str, Any], prefix: str) -> None:
        """Makes room for what `state`, a state_dict of names with `prefix`, has and the float layer has not: a bias."""
        add_bias_(self, state.get(prefix + "bias"))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, bits={self.scheme.weight_bits}, granularity={self.scheme.granularity.name}, "
            f"isa={cpu_info().active}" + (f", activation={self.activation}" if self.activation else "")
        )

    def _packed_for(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """packed and column_sum, once the input's width is known to fit them."""
        shape = input.shape
        if not shape or shape[-1] != self.in_features:  # the operator only knows k rounded up to 64
            raise ValueError(
                f"QuantLinear: input has shape {list(shape)}, its last axis must be in_features = "
                f"{self.in_features}"
            )
        # Reading these dicts costs half of what attributes do, each of which goes through nn.Module.__getattr__.
        parameters: dict[str, Any] = self._parameters
        weight = parameters.get("weight")
        if weight is not None:
            return self._pack_on_use(weight)
        buffers: dict[str, Any] = self._buffers
        return buffers["packed"], buffers["column_sum"]

    def _pack_on_use(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Packs for good, except on the meta device and while a graph is traced, where a module must stay as it is."""
        if weight.is_meta or torch.compiler.is_compiling():
            return ops.pack_weight(weight.detach())
        self.pack_()
        return self.packed, self.column_sum

    def __getattr__(self, name: str) -> Any:  # reached only when the ordinary lookup fails
        if name == "weight" and self.__dict__.get("_buffers", {}).get("packed") is not None:
            return self.dequantize()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self.__dict__.get("_buffers", {}).get("packed") is not None:
            raise AttributeError(
                "QuantLinear.weight is read-only once packed: what it returns is a dequantized copy. "
                "Load int8 codes with load_state_dict, or make a new layer with QuantLinear.from_codes"
            )
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """.half(), .to(dtype) and the like change the bias only, and that to what the operators take: a scale keeps
        all its bits, and .double() does nothing."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            is_bias = tensor.is_floating_point() and not is_scale_of(self, tensor)
            if result.dtype == tensor.dtype or (is_bias and result.dtype in FLOAT_DTYPES):
                return result
            return tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_packed:
            destination[prefix + "weight"] = self.codes()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """torch would cast floats into int8 codes silently, so dtypes are checked; a refused layer stays as it is."""
        key = prefix + "weight"
        errors = _loading_errors(self, state_dict, prefix)
        if errors:
            error_msgs.extend(errors)
            return
        was_packed = self.is_packed
        if was_packed and key in state_dict:
            assign = local_metadata.get("assign_to_params_buffers", False)
            device = "meta" if assign else self.packed.device
            # First, so that the two forms are never both in memory.
            self._buffers.update(packed=None, column_sum=None)
            self.weight = frozen(
                torch.empty(self.out_features, self.in_features, dtype=torch.int8, device=device)
            )
        elif was_packed and strict:
            missing_keys.append(key)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with torch.inference_mode(False):
            self._restore_dtypes()
        if was_packed:
            self.pack_()

    def _restore_dtypes(self) -> None:
        """load_state_dict(assign=True) takes a bfloat16 scale as it comes."""
        for name in SCALES:
            scale = self._parameters.get(name)
            if scale is not None and scale.dtype != torch.float32:
                setattr(self, name, frozen(scale.float()))

    def _expected_state(self) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
        """The shape and the dtypes that each name in a state_dict may have."""
        n, k = self.out_features, self.in_features
        return {
            "weight": ((n, k), (torch.int8,)),
            "weight_scale": ((n, 1), FLOAT_DTYPES),
            "bias": ((n,), FLOAT_DTYPES),
        }


def add_bias_(layer: nn.Module, bias: Any) -> None:
    """Gives a layer without bias one like `bias`, on the meta device, if that is a tensor: to be filled."""
    if isinstance(bias, torch.Tensor) and layer.bias is None:
        layer.bias = frozen(torch.empty_like(bias, device="meta"))


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """`tensor` as a Parameter that is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def _check_codes(codes: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> None:
    if codes.dtype != torch.int8 or weight_scale.dtype != torch.float32:
        raise TypeError(
            f"QuantLinear: codes must be int8 and weight_scale float32, got {codes.dtype} and "
            f"{weight_scale.dtype}"
        )
    if bias is not None and bias.dtype not in FLOAT_DTYPES:
        raise TypeError(f"QuantLinear: bias is {bias.dtype}, accepted are float32, bfloat16 and float16")
    if codes.dim() != 2:
        raise ValueError(f"QuantLinear: codes must be a matrix [n, k], got shape {tuple(codes.shape)}")
    n = codes.shape[0]
    if tuple(weight_scale.shape) != (n, 1):
        raise ValueError(
            f"QuantLinear: weight_scale has shape {tuple(weight_scale.shape)}, "
            f"codes of shape {tuple(codes.shape)} need {(n, 1)}"
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(
            f"QuantLinear: bias has shape {tuple(bias.shape)}, "
            f"codes of shape {tuple(codes.shape)} need {(n,)}"
        )


def _loading_errors(layer: QuantLinear, state_dict: dict[str, Any], prefix: str) -> list[str]:
    errors = []
    for name, (shape, dtypes) in layer._expected_state().items():
        value = state_dict.get(prefix + name)
        if not isinstance(value, torch.Tensor):
            continue
        if value.dtype not in dtypes:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            remedy = (
                "; load a float checkpoint into the float model, then quantize that"
                if name == "weight"
                else ""
            )
            errors.append(f"{prefix}{name} is {value.dtype}, QuantLinear needs {accepted}{remedy}")
        if tuple(value.shape) != shape:
            errors.append(f"{prefix}{name} has shape {tuple(value.shape)}, QuantLinear needs {shape}")
    return errors
