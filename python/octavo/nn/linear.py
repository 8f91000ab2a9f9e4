# SPDX-License-Identifier: Apache-2.0
"""QuantLinear: a linear layer whose weight is quantized. It holds what its weight format says and calls one operator.

It is in one of two states. Canonical: the codes are an ordinary frozen Parameter, so that any loader can fill it.
Packed: the codes, with some formats the scales as well, have left it, and buffers hold the kernels' layout of them. The
first forward packs, if nobody has before. Files only ever see the canonical form, memory holds only one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from ..base.float_types import FLOAT_DTYPES
from ..formats import WeightFormat
from ..runtime.cpu import cpu_info
from ..tensors.forms import TensorForm, not_nan
from .layer_state import Expected, StoredCodes, form_errors, require_forms, stored, value_errors
from .packed_weight import PackedWeight
from .replacements import LINEAR, Replacement
from .shared_weight import SharedWeight


class LinearScheme(Protocol):
    """What a QuantLinear asks of its scheme."""

    @property
    def name(self) -> str: ...

    @property
    def weights(self) -> WeightFormat: ...

    @property
    def activations(self) -> Any: ...

    @property
    def method(self) -> Any: ...

    def to_dict(self) -> dict[str, Any]: ...


class QuantLinear(nn.Module):
    """y = x @ weight.T + bias with a quantized weight, computed as `scheme` says.

    in_features, out_features   k and n
    scheme                      an octavo scheme, for example octavo.Int8Dynamic()
    device                      "meta" makes a layer without memory, to be filled by load_state_dict(assign=True)

    A new layer is unfilled (zero codes): `from_tensors`, a state_dict or `octavo.quantize_` fills it. Its state_dict
    has the tensors of `scheme.weights`, a weight format, and `bias` [n] if there is one; those of octavo.formats.Int8
    are `weight` int8 [n, k] and `weight_scale` float32 [n, 1]. All of them are frozen; the gradient reaches x. Once
    packed, `.weight` reads as the float matrix in `weight_dtype`, which the float layer had: its values are dequantized
    for each operation that needs them, and it cannot be written to.

    `activation` is None or one of octavo.ops.ACTIVATIONS, which then is part of the call. It says how a layer is used,
    as the modules around it do, so it is in no state_dict and no file; copies and pickles have it.
    """

    replaces: Replacement = LINEAR  # the class of the float layer whose place it took
    activation: str | None = None
    weight_dtype: torch.dtype = torch.float32  # what `.weight` reads as
    shared: SharedWeight | None = None  # with the other layers that have this weight, if there are any

    input_names: ClassVar[tuple[str, ...]] = ()  # tensors of the layer that belong to its activations

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
        for name, form in scheme.weights.tensors(out_features, in_features).items():
            self._hold_(name, form.unfilled(device))
        default = torch.get_default_dtype()
        bias_dtype = default if default in FLOAT_DTYPES else torch.float32
        zeros = torch.zeros(out_features, dtype=bias_dtype, device=device) if bias else None
        self.register_parameter("bias", None if zeros is None else frozen(zeros))
        for name in scheme.weights.held:
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, torch.Tensor],
        bias: torch.Tensor | None,
        scheme: LinearScheme,
        *,
        shape: tuple[int, int] | None = None,
    ) -> QuantLinear:
        """The canonical layer that holds these tensors themselves, not copies.

        tensors  of the canonical form of `scheme.weights`, by name
        bias     [n] float32, bfloat16, float16 or None
        shape    (n, k) of the float weight; None: as the tensors tell it, which not every weight format's can
        raises   TypeError, ValueError for other names, dtypes and shapes
        """
        n, k = scheme.weights.shape(tensors) if shape is None else shape
        require_forms(scheme.weights.tensors(n, k), tensors, bias, n)
        layer = cls(k, n, bias is not None, scheme=scheme, device="meta")
        for name, tensor in tensors.items():
            layer._hold_(name, tensor)
        if bias is not None:
            layer.bias = frozen(bias)
        return layer

    @classmethod
    def sharing(cls, other: QuantLinear, bias: torch.Tensor | None, scheme: LinearScheme) -> QuantLinear:
        """A layer that holds the weight of `other` itself, not a copy; from now on what one of them loads both have.

        scheme   with the weight format of `other`
        """
        n, k = other.out_features, other.in_features
        layer = cls(k, n, bias is not None, scheme=scheme, device="meta")
        if bias is not None:
            layer.bias = frozen(bias)
        shared = other.shared or SharedWeight()
        shared.join(other)
        shared.join(layer)
        shared.give_to_all(other)
        return layer

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, scheme: LinearScheme
    ) -> QuantLinear:
        """`from_tensors` of a format whose tensors are codes and scales."""
        names = scheme.weights.tensors(0, 0)
        return cls.from_tensors(dict(zip(names, (codes, weight_scale), strict=True)), bias, scheme)

    def _hold_(self, name: str, tensor: torch.Tensor) -> None:
        """Codes are a Parameter, so that every loader finds them, until they are packed. Other integers are a buffer,
        for integer Parameters would make model.requires_grad_(True) raise."""
        if tensor.is_floating_point() or name == self._codes_name:
            self.register_parameter(name, frozen(tensor))
        else:
            self.register_buffer(name, tensor)

    @property
    def _codes_name(self) -> str:
        return self.scheme.weights.replaced[0]

    # `input` is nn.Linear's name for it, so that keyword calls work.
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [..., in_features] float32, bfloat16 or float16 to [..., out_features] in its dtype."""
        shape = input.shape
        if (
            not shape or shape[-1] != self.in_features
        ):  # an operator may only know k rounded up to whole lines
            raise ValueError(
                f"QuantLinear: input has shape {list(shape)}, its last axis must be in_features = "
                f"{self.in_features}"
            )
        return self.scheme.weights.multiply(self, input, self.activation)

    def input_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that `input_names` names, for the operator."""
        return tuple(getattr(self, name) for name in self.input_names)

    @property
    def is_packed(self) -> bool:
        return self._codes_name not in self._parameters

    def pack_(self) -> QuantLinear:
        """Goes to the packed state, in place. Does nothing to a layer that is packed or on the meta device."""
        weights = self.scheme.weights
        codes = self._parameters.get(self._codes_name)
        if codes is not None and not codes.is_meta:
            # Inference tensors could not be saved for backward.
            with torch.inference_mode(False), torch.no_grad():
                packed = weights.pack(self._weight_tensors(), self.out_features, self.in_features)
            self._buffers.update(packed)
            for name in weights.replaced:
                self._parameters.pop(name, None)
                self._buffers.pop(name, None)
            self._give_to_all()
        return self

    def unpack_(self) -> QuantLinear:
        """Goes back to the canonical state, in place: for loaders that set one tensor after the other by name, as
        accelerate's load_checkpoint_and_dispatch does. `load_state_dict` does not need it."""
        if self.is_packed:
            with torch.inference_mode(False), torch.no_grad():
                replaced = self._unpacked()
                self._buffers.update(dict.fromkeys(self.scheme.weights.held))
                for name, tensor in replaced.items():
                    self._hold_(name, tensor)
            self._give_to_all()
        return self

    def _give_to_all(self) -> None:
        if self.shared is not None:
            self.shared.give_to_all(self)

    def codes(self) -> torch.Tensor:
        """The weight's codes as files have them, int8 [n, k] for octavo.formats.Int8: the Parameter's data, or unpacked
        into a new tensor."""
        codes = self._parameters.get(self._codes_name)
        return self._unpacked()[self._codes_name] if codes is None else codes.detach()

    def canonical_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the weight's canonical form, by name; those that are packed are unpacked into new ones."""
        return {**(self._unpacked() if self.is_packed else {}), **self._weight_tensors()}

    def _unpacked(self) -> dict[str, torch.Tensor]:
        """The tensors that packing has replaced."""
        held: dict[str, Any] = self._buffers
        return self.scheme.weights.unpack(held, self.out_features, self.in_features)

    def _weight_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the canonical form that are in memory."""
        names = self.scheme.weights.tensors(self.out_features, self.in_features)
        held: dict[str, Any] = {**self._buffers, **self._parameters}
        return {name: held[name].detach() for name in names if name in held}

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a new float matrix [n, k] in `dtype` (float32, bfloat16, float16)."""
        return self.code_weight(dtype)

    def code_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What the codes alone stand for [n, k], where a layer does more than multiply by them."""
        return self.scheme.weights.layer_weight(self, dtype)

    def row_scales(self) -> Any:
        """The scale of each row of the weight, float32 [n]; None if rows have several."""
        return self.scheme.weights.row_scales(self._weight_tensors())

    def float_bias(self) -> torch.Tensor | None:
        """The bias as floats [n], None without one."""
        return self.bias

    def take_shapes_(self, state: dict[str, Any], prefix: str) -> None:
        """Makes room for what `state`, a state_dict of names with `prefix`, has and the float layer has not: a bias."""
        add_bias_(self, state.get(prefix + "bias"))

    def extra_repr(self) -> str:
        weights = self.scheme.weights
        activation = f", activation={self.activation}" if self.activation else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"scheme={self.scheme.name}, bits={weights.bits}, granularity={weights.granularity.name}, "
            f"isa={cpu_info().active}{activation}"
        )

    def __getattr__(self, name: str) -> Any:  # reached only when the ordinary lookup fails
        if name != "weight" or not self._computes_weight():
            return super().__getattr__(name)
        dtype = self.weight_dtype
        if torch.compiler.is_compiling():  # a graph has no place for a tensor that computes itself
            return self.dequantize(dtype)
        form = torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")
        weight: Any = PackedWeight(form, lambda: self.dequantize(dtype), torch.device("cpu"))
        weight.shared, weight._is_param = self.shared, self.shared is not None  # for those who tie Parameters
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and self._computes_weight():
            if self.shared is not None and getattr(value, "shared", None) is self.shared:
                return  # tied already, which transformers does not know
            raise AttributeError(
                "QuantLinear.weight is read-only once packed: its values are dequantized when they are read. "
                "Load codes with load_state_dict, or make a new layer with QuantLinear.from_tensors"
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.shared is not None:
            self.shared.join(self)

    def _computes_weight(self) -> bool:
        """Whether `.weight` is no tensor of the layer: it is packed, or the codes have another name."""
        scheme, buffers = self.__dict__.get("scheme"), self.__dict__.get("_buffers", {})
        if scheme is None or "_parameters" not in self.__dict__:
            return False
        weights = scheme.weights
        return "weight" not in weights.replaced or any(buffers.get(name) is not None for name in weights.held)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        """.half(), .to(dtype) and the like change the bias and what `.weight` reads as, and both to what the operators
        take: a scale keeps all its bits, and .double() does nothing."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            bias = self.bias
            is_bias = (
                bias is not None and (tensor is bias or tensor is bias.grad) and tensor.is_floating_point()
            )
            if result.dtype == tensor.dtype or (is_bias and result.dtype in FLOAT_DTYPES):
                return result
            return tensor.to(result.device)

        dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        self.weight_dtype = dtype if dtype in FLOAT_DTYPES else self.weight_dtype
        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.is_packed:
            shared = self.shared
            state = self._unpacked_state() if shared is None else shared.state_of(self, self._unpacked_state)
            destination.update({prefix + name: tensor for name, tensor in state.items()})
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + self._codes_name
        if not self.is_packed and not keep_vars:
            destination[key] = stored(destination[key])

    def _unpacked_state(self) -> dict[str, torch.Tensor]:
        """What packing has replaced, as a state_dict has it."""
        return {
            name: stored(value) if name == self._codes_name else value
            for name, value in self._unpacked().items()
        }

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
        """torch would cast floats into codes silently, so dtypes are checked; a refused layer stays as it is."""
        errors = form_errors(self._expected_state(), state_dict, prefix)
        errors = errors or self.value_errors(state_dict, prefix)
        if errors:
            error_msgs.extend(errors)
            return
        was_packed = self.is_packed
        given = [prefix + name in state_dict for name in self.scheme.weights.replaced]
        if was_packed and all(given):
            self._make_room_(local_metadata.get("assign_to_params_buffers", False))
        elif was_packed and any(given):
            self.unpack_()
        elif was_packed and strict:
            missing_keys.extend(prefix + name for name in self.scheme.weights.replaced)
        key = prefix + self._codes_name
        if isinstance(state_dict.get(key), StoredCodes):
            state_dict = {**state_dict, key: state_dict[key].as_subclass(torch.Tensor)}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        with torch.inference_mode(False):
            self._restore_dtypes()
        if was_packed:
            self.pack_()
        self._give_to_all()

    def _make_room_(self, assign: bool) -> None:
        """Lets go of the packed form for what will be loaded, so that the two are never both in memory."""
        weights = self.scheme.weights
        self._buffers.update(dict.fromkeys(weights.held))
        forms = weights.tensors(self.out_features, self.in_features)
        for name in weights.replaced:
            shape, dtype = forms[name].shape, forms[name].dtype
            self._hold_(name, torch.empty(shape, dtype=dtype, device="meta" if assign else "cpu"))

    def _restore_dtypes(self) -> None:
        """load_state_dict(assign=True) takes a bfloat16 scale as it comes."""
        for name, form in self._expected_state().items():
            for tensors in (self._parameters, self._buffers):
                tensor: Any = tensors.get(name)
                if tensor is not None and form.dtype not in (None, tensor.dtype):
                    tensor = tensor.to(form.dtype)
                    setattr(self, name, frozen(tensor) if name in self._parameters else tensor)

    def value_errors(self, state: dict[str, Any], prefix: str) -> list[str]:
        """What is wrong with the values of this layer's tensors in `state`, a state_dict of names with `prefix`: one
        sentence for each tensor, none if the layer can compute with them."""
        return value_errors(self._expected_state(), state, prefix)

    def _expected_state(self) -> Expected:
        """What the tensor of each name in a state_dict may be."""
        n, k = self.out_features, self.in_features
        return {
            **self.scheme.weights.tensors(n, k),
            "bias": TensorForm((n,), None, FLOAT_DTYPES, check=not_nan),
        }


def add_bias_(layer: nn.Module, bias: Any) -> None:
    """Gives a layer without bias one like `bias`, on the meta device, if that is a tensor: to be filled."""
    if isinstance(bias, torch.Tensor) and layer.bias is None:
        layer.bias = frozen(torch.empty_like(bias, device="meta"))


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    """`tensor` as a Parameter that is not trained."""
    return nn.Parameter(tensor.detach(), requires_grad=False)
