# SPDX-License-Identifier: Apache-2.0
"""A quantization backend of transformers: `from_pretrained(..., quantization_config=octavo.OctavoConfig(...))`.

Importing this file registers it, which naming octavo.OctavoConfig does. A float checkpoint is quantized tensor by
tensor while transformers reads it: each weight becomes a packed layer as soon as it is there. A folder that such a
model has saved is read into layers of codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..conversion.plan import Layer, plan_skeleton, report_of, require_finite
from ..conversion.report import QuantizationReport
from ..conversion.selection import Patterns, SchemeLike, Selection
from ..files.compressed_tensors import layers_entry, schemes_of
from ..files.guard import guard, guarded
from ..files.loading import check_values, unfilled
from ..nn import QuantLinear, leave_fused_paths
from ..nn.experts import ExpertMatrices, join_experts_, split_experts_, split_in
from ..nn.replacements import with_tensors
from ..schemes import Scheme, from_dict

METHOD = "octavo"


@register_quantization_config(METHOD)
class OctavoConfig(QuantizationConfigMixin):
    """What `from_pretrained` shall quantize.

    scheme    a scheme such as octavo.Int8Dynamic(group_size=32), its class, its short name such as "int4-weight-only",
              or a dict {pattern: one of these, or None for layers that stay float}
    exclude   patterns of the names of layers that stay float, as `quantize_` takes them
    octavo    only in files: {"layers": {name: scheme}}, which layers are quantized
    raises    TypeError, ValueError for what is no scheme and no pattern, for a scheme that needs data, and for a field
              that this version does not know
    """

    def __init__(
        self,
        scheme: SchemeLike | Mapping[str, SchemeLike | None] | None = None,
        exclude: Patterns = None,
        octavo: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if unknown:
            raise TypeError(
                f"OctavoConfig: unknown fields {sorted(unknown)}; a newer octavo may know them, this one has scheme "
                "and exclude"
            )
        self.quant_method: Any = METHOD
        self.octavo = octavo
        self.scheme: Any = scheme
        self.exclude = exclude
        if octavo is None:
            self._choose(Selection(_read(scheme), exclude=exclude))

    def _choose(self, selection: Selection) -> None:
        for scheme in selection.schemes.values():
            if scheme is not None and scheme.needs_data:
                raise ValueError(
                    f"OctavoConfig: {scheme.name} needs data, which from_pretrained does not have; load the float "
                    "model and give octavo.quantize_(model, scheme, data=batches)"
                )
        fields = {pattern: scheme and scheme.to_dict() for pattern, scheme in selection.schemes.items()}
        self.scheme = fields if selection.is_mapping else fields["*"]  # plain values: they go to config.json
        self.exclude = selection.exclude

    def selection(self) -> Selection:
        """The choice, as `quantize_` has it."""
        return Selection(_read(self.scheme), exclude=self.exclude)


def _read(scheme: Any) -> Any:
    """A scheme, or a dict of schemes, out of what `to_dict` of schemes gives."""
    if not isinstance(scheme, Mapping):
        return scheme
    if "name" in scheme and isinstance(scheme["name"], str):
        return from_dict(scheme)
    return {pattern: _read(value) for pattern, value in scheme.items()}


@register_quantizer(METHOD)
class OctavoQuantizer(HfQuantizer):
    """The hooks by which transformers quantizes, loads and saves; `report` has a row for each layer with weights."""

    requires_calibration = False
    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.report = QuantizationReport([])
        self.schemes: dict[str, Scheme] = {}
        self.plan: list[Layer] = []
        self.made: dict[str, Any] = {}

    def validate_environment(self, *, device_map: Any = None, **options: Any) -> None:
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
        if devices - {"cpu"}:
            raise ValueError(
                f"device_map asks for {sorted(devices - {'cpu'})}, octavo's layers run on the CPU: device_map='cpu'"
            )

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map in (None, "auto") else device_map

    # --- loading ----------------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        if not self.pre_quantized:
            split_experts_(model)
            self.plan = [
                _kept_if_tied(layer, model)
                for layer in plan_skeleton(model, self.quantization_config.selection())
            ]
            self.schemes = {layer.name: layer.scheme for layer in self.plan if layer.scheme is not None}
            join_experts_(model)  # transformers looks for the names that its files have
            return
        entry = self.quantization_config.octavo or {"layers": {}}
        split_experts_(model, split_in(entry["layers"], model))
        self.schemes = schemes_of({METHOD: entry}, model)
        for name, scheme in self.schemes.items():
            linear = model.get_submodule(name)
            layer = unfilled(linear, scheme)
            layer.weight_dtype = linear.weight.dtype
            codes = layer._parameters.get("weight")
            if codes is not None:
                layer._parameters["weight"] = nn.Parameter(guard(layer, codes), requires_grad=False)
            model.set_submodule(name, layer)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())  # guards of codes with other names
        model._keys_to_ignore_on_load_unexpected = ignored | {rf"{name}\.weight$" for name in self.schemes}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Without the conversions that would join what the file has for each expert: the layers are apart here."""
        parts = [
            f"{prefix}.{value.name}"
            for prefix, module in model.named_modules()
            for value in vars(module).values()
            if isinstance(value, ExpertMatrices)
        ]
        return [
            each
            for each in super().update_weight_conversions(weight_conversions, model)
            if not isinstance(each, WeightConverter)
            or not any(re.search(target, part) for target in each.target_patterns for part in parts)
        ]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **options: Any) -> bool:
        return not self.pre_quantized and bool(self._layers_of(param_name))

    def _layers_of(self, parameter: str) -> list[Layer]:
        """The planned layers whose weight `parameter` is or, with experts, holds; none if all of them stay float."""
        name, _, leaf = parameter.rpartition(".")
        own = re.compile(re.escape(name) + ("" if leaf == "weight" else rf"\.\d+\.{re.escape(leaf)}"))
        layers = [layer for layer in self.plan if own.fullmatch(layer.name)]
        return layers if any(layer.scheme for layer in layers) else []

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOne(self)

    def quantize(self, parameter: str, weight: torch.Tensor) -> None:
        """Makes layers out of a float weight, and keeps them until all tensors are there."""
        layers = self._layers_of(parameter)
        matrices = [weight] if weight.dim() == 2 else list(weight)
        for layer, matrix in zip(layers, matrices, strict=True):
            is_turned = matrix.shape != layer.module.weight.shape  # of experts whose matrices are [k, n]
            layer.module = with_tensors(layer.module, matrix.T if is_turned else matrix, None)
            if layer.scheme is not None:
                obstacle = layer.scheme.reason_to_keep(layer.module)
                if obstacle:
                    raise ValueError(f"{layer.name}: {obstacle}")
                require_finite(layer)
                layer.becomes(layer.scheme.quantize_linear(layer.module), "quantized")
            self.made[layer.name] = layer.module

    def _process_model_after_weight_loading(self, model: nn.Module, **options: Any) -> nn.Module:
        if self.pre_quantized:
            self._finish_read(model)
        else:
            self._finish_quantized(model)
        leave_fused_paths(model)
        return model

    def _finish_quantized(self, model: nn.Module) -> None:
        missing = self.schemes.keys() - self.made.keys()
        if missing:
            raise ValueError(f"the checkpoint has no weight, or no usable one, for {sorted(missing)}")
        split_experts_(model, split_in(self.made, model))
        for name, layer in self.made.items():
            linear: Any = model.get_submodule(name)
            layer.bias = (
                None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
            )
            model.set_submodule(name, layer.train(linear.training))
        join_experts_(model)
        self.report = report_of(self.plan)
        self.made, self.plan = {}, []
        self.quantization_config.octavo = layers_entry(model)

    def _finish_read(self, model: nn.Module) -> None:
        layers = dict(quantized_layers(model))
        for name, layer in layers.items():
            for key, parameter in layer.named_parameters(recurse=False):
                if not getattr(parameter, "_is_hf_initialized", False):
                    raise ValueError(f"{name}.{key} is missing in the checkpoint")
                parameter.requires_grad_(False)
            codes = layer._parameters.get("weight")
            if codes is not None:
                shape = layer.out_features, layer.in_features
                layer._parameters["weight"] = nn.Parameter(codes.detach().reshape(shape), requires_grad=False)
            check_values("from_pretrained", {name: layer}, layer.state_dict(prefix=f"{name}."))
            layer.pack_()

    # --- saving and going back ----------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[Any, dict[str, str]]:
        entry = getattr(model.config, "quantization_config", None)
        if getattr(entry, "quant_method", None) != METHOD:
            return None, {}  # the layers have been quantized anew, for another file format
        return guarded(model.state_dict(), dict(quantized_layers(model))), {}

    def is_serializable(self, **options: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are: the layers give gradients to their inputs

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in list(quantized_layers(model)):
            model.set_submodule(name, _float_layer(name, layer, dtype or layer.weight_dtype))
        return model


class _QuantizeOne(ConversionOps):
    """One float weight of the checkpoint becomes one layer; the float layer keeps nothing of it."""

    def __init__(self, quantizer: OctavoQuantizer) -> None:
        self.hf_quantizer = quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: Any = None,
        target_patterns: Any = None,
        **options: Any,
    ) -> Any:
        ((key, value),) = input_dict.items()
        weight = value[0] if isinstance(value, list) else value
        self.hf_quantizer.quantize(key, weight)
        return {key: weight.new_zeros(()).expand(weight.shape)}  # of the right shape, without memory


def _kept_if_tied(layer: Layer, model: Any) -> Layer:
    """`layer`, without a scheme if its weight is another layer's, which transformers makes true after loading."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    weight = f"{layer.name}.weight"
    others = [tied[weight]] if weight in tied else [name for name, source in tied.items() if source == weight]
    if not others or layer.scheme is None:
        return layer
    reason = f"weight is tied to {', '.join(others)}"
    return replace(layer, scheme=None, row=replace(layer.row, reason=reason))


def _float_layer(name: str, layer: QuantLinear, dtype: torch.dtype) -> nn.Module:
    """A layer of torch or transformers with the dequantized weight."""
    kinds: dict[str, Any] = {
        "torch.nn.modules.linear.Linear": lambda k, n: nn.Linear(k, n, device="meta"),
        "transformers.pytorch_utils.Conv1D": lambda k, n: Conv1D(n, k),
    }
    make = kinds.get(layer.replaces.kind)
    if make is None:
        raise ValueError(f"{name} was a {layer.replaces.kind}, of which dequantize() cannot make a new one")
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    weight = layer.replaces.weight(layer.dequantize(dtype)).contiguous()
    return with_tensors(make(layer.in_features, layer.out_features), weight, bias).train(layer.training)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The quantized layers of `model` with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module
