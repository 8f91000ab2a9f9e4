# SPDX-License-Identifier: Apache-2.0
"""PEFT's LoRA, AdaLoRA and IA3 on quantized layers.

PEFT looks up by class what becomes of a layer: LoRA's config takes a mapping of classes, and the other two have a
model class of their own for each kind of config. `configured` fills in both; nothing in PEFT is patched. What is saved
are PEFT's ordinary files.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import nn

from ..adaptation.merge import requantized
from ..nn import OutlierLinear, QuantLinear

try:
    _peft: Any = importlib.import_module("peft")
    _lora: Any = importlib.import_module("peft.tuners.lora.layer")
    _ia3: Any = importlib.import_module("peft.tuners.ia3")
    _adalora: Any = importlib.import_module("peft.tuners.adalora")
    _tuners: Any = importlib.import_module("peft.tuners.tuners_utils")
except ImportError as error:
    raise ImportError("octavo.integrations.peft needs PEFT: pip install 'peft>=0.21'") from error

STARTS = (True, False, "gaussian", "orthogonal", "eva")  # all others write to the weight of the base layer


def configured(config: Any, model: nn.Module | None = None) -> Any:
    """`config`, a peft.LoraConfig, AdaLoraConfig or IA3Config, so that `peft.get_peft_model` serves quantized layers.

    model    needed for target_modules="all-linear", by which PEFT finds float layers only
    returns  the config, changed in place
    raises   TypeError for a config of another kind; ValueError for "all-linear" without a model, and for DoRA and ways
             to start that write to the base weight: PiSSA, OLoRA, LoftQ and others; octavo.LoRA(dora=True) has DoRA
    """
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    if kind not in ("LORA", "ADALORA", "IA3"):
        raise TypeError(
            f"configured: config is {type(config).__name__}; peft.LoraConfig, AdaLoraConfig and IA3Config are served"
        )
    if config.target_modules == "all-linear":
        if model is None:
            raise ValueError(
                'configured: target_modules="all-linear" needs the model: configured(config, model)'
            )
        config.target_modules = {
            name for name, each in model.named_modules() if isinstance(each, QuantLinear)
        }
    if kind == "LORA":
        _require_served(config)
        config._register_custom_module({QuantLinear: LoraQuantLinear})
        return config
    config.__class__ = _with_stock_name(type(config), kind)
    config.peft_type = f"OCTAVO_{kind}"  # a key of our own: the models of others are made as before
    models = {"IA3": QuantIA3Model, "ADALORA": QuantAdaLoraModel}
    _peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type] = models[kind]
    return config


def load(model: nn.Module, folder: str | os.PathLike[str], **options: Any) -> Any:
    """peft.PeftModel.from_pretrained(model, folder, **options) on quantized layers. Raises as `configured`."""
    config = configured(_peft.PeftConfig.from_pretrained(os.fspath(folder)))
    return _peft.PeftModel.from_pretrained(model, os.fspath(folder), config=config, **options)


def _require_served(config: Any) -> None:
    if config.use_dora:
        raise ValueError(
            "configured: use_dora would need the float weight in every call; octavo.adapt_(model, "
            "octavo.LoRA(dora=True)) dequantizes it in parts, and reads and writes the same files"
        )
    start = config.init_lora_weights
    if start not in STARTS:
        raise ValueError(
            f"configured: init_lora_weights={start!r} writes to the base weight, which is packed; use True or "
            "'gaussian'"
        )


def _with_stock_name(kind: type, name: str) -> type:
    """A class like `kind`, whose files say what PEFT calls it."""

    class Configured(kind):
        def to_dict(self) -> dict[str, Any]:
            return {**super().to_dict(), "peft_type": name}

    Configured.__name__ = kind.__name__
    return Configured


class LoraQuantLinear(nn.Module, _lora.LoraLayer):
    """PEFT's LoRA on a QuantLinear. Merging requantizes, as octavo.merge_ does; unmerging gives the very layer back."""

    # Of LoraLayer, which type checkers cannot see.
    active_adapters: Any
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_bias: Any
    lora_dropout: Any
    merged_adapters: Any
    scaling: Any
    get_base_layer: Any
    _cast_input_dtype: Any
    _check_forward_args: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: int = 1,
        **options: Any,
    ):
        super().__init__()
        _lora.LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._unmerged: list[nn.Module] = []  # a list, so that the layer is not a child twice
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        _require_served(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **options)
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                a, b = self.lora_A[name], self.lora_B[name]
                seen = self.lora_dropout[name](self._cast_input_dtype(x, a.weight.dtype))
                y = (y + b(a(seen)) * self.scaling[name]).to(y.dtype)
        return y

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """scaling * B @ A, float32 [n, k]."""
        return (self.lora_B[adapter].weight @ self.lora_A[adapter].weight).float() * self.scaling[adapter]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = _tuners.check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        base = self.get_base_layer()
        if isinstance(base, OutlierLinear) or any(self.lora_bias[name] for name in names):
            raise ValueError("octavo: layers with outlier columns and adapters with lora_bias are not merged")
        weight = base.dequantize()
        for name in names:
            weight += self.get_delta_weight(name)
        bias = base.float_bias()
        merged = requantized(base, weight, None if bias is None else bias.detach().float())
        self._unmerged = self._unmerged or [base]
        self.base_layer = merged
        self.merged_adapters += names

    def unmerge(self) -> None:
        if self._unmerged:
            self.base_layer = self._unmerged.pop()
        self.merged_adapters.clear()


class _NotMerged:
    def merge(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError(
            "octavo: PEFT does not merge this adapter; save it, then octavo.load_adapter(model, folder) and "
            "octavo.merge_(model)"
        )


class IA3QuantLinear(_NotMerged, _ia3.layer.Linear):
    """PEFT's IA3 on a QuantLinear."""

    def __init__(
        self, base_layer: Any, adapter_name: str, config: Any, is_feedforward: bool = False, **options: Any
    ):
        # What IA3Layer.__init__ does for the classes that it knows; it raises for all others.
        nn.Module.__init__(self)
        self.base_layer, self.is_feedforward = base_layer, is_feedforward
        self.ia3_l = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.fan_in_fan_out, self.is_target_conv_1d_layer = False, False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)


class QuantIA3Model(_ia3.IA3Model):
    """PEFT's IA3Model, for quantized layers as well."""

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        if isinstance(_base_of(target), QuantLinear):
            return IA3QuantLinear(
                target, adapter_name, config=config, is_feedforward=options["is_feedforward"]
            )
        return _ia3.IA3Model._create_new_module(config, adapter_name, target, **options)


class SVDQuantLinear(_NotMerged, _adalora.layer.SVDLinear):
    """PEFT's AdaLoRA on a QuantLinear."""


class QuantAdaLoraModel(_adalora.AdaLoraModel):
    """PEFT's AdaLoraModel, for quantized layers as well."""

    @staticmethod
    def _create_new_module(
        config: Any, adapter_name: str, target: Any, device_map: Any = None, **options: Any
    ) -> Any:
        if isinstance(_base_of(target), QuantLinear):
            numbers = {name: options[name] for name in ("r", "lora_alpha")}
            return SVDQuantLinear(target, adapter_name, config=config, **numbers)
        stock = _adalora.AdaLoraModel
        return stock._create_new_module(config, adapter_name, target, device_map=device_map, **options)


def _base_of(target: Any) -> Any:
    return target.get_base_layer() if hasattr(target, "get_base_layer") else target
