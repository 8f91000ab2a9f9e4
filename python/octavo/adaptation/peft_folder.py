# SPDX-License-Identifier: Apache-2.0
"""Adapters as the folders that PEFT writes and reads; PEFT itself is not needed.

adapter_config.json          the kind of adapter, its numbers, and which layers it is on
adapter_model.safetensors    what was trained, under "base_model.model.", the layer's name and the tensor's, such as
                             "base_model.model.fc1.lora_A.weight"; the adapter's own name is not in it
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.configs import kinds
from ..base.modules import undone_on_error
from ..files import safetensors
from ..files.disk import current, folder_argument, read_json, save_into
from ..files.format import errors_naming
from ..nn.adapters import AdaptedLinear, Adapter, LayerAdapter
from .adapt import adapter_layers, adapter_report, attach, linear_layers, new_layers, require_free
from .report import AdapterReport

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
BIAS, BASE_BIAS = "bias", "base_layer.bias"  # of a layer without and with other parts of the adapter
OLDER_NAMES = {"lora_magnitude_vector.weight": "lora_magnitude_vector", BASE_BIAS: BIAS}

LayerTensors = dict[str, dict[str, torch.Tensor]]


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Writes the adapter `name` of `model` to `folder`, which is made if missing; its other files stay.

    PEFT reads it on the float model, or on the model quantized by others, and `octavo.load_adapter` on any.
    raises   ValueError for a name that the model has not; TypeError if folder is no path; OSError if the files cannot
             be written. Then `folder` is as it was
    source   PEFT 0.21, `save_pretrained`
    """
    adapter, layers = adapter_layers("save_adapter", model, name)
    folder = folder_argument("save_adapter", folder)
    tensors = {}
    for layer, own in layers.items():
        for key, tensor in own.tensors().items():
            key = BASE_BIAS if key == BIAS and len(own.tensors()) > 1 else key
            tensors[f"{PREFIX}{layer}.{key}"] = tensor.contiguous()
    targets = {layer: own for layer, own in layers.items() if own.tensors().keys() != {BIAS}}
    fields = {
        "peft_type": adapter.peft_type,
        "target_modules": _target_modules(model, list(targets)),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": None,
        **adapter.to_peft(targets),
    }
    with save_into(folder, (WEIGHTS, CONFIG)) as temporary:
        safetensors.write(temporary / WEIGHTS, tensors, tensors.items())
        text = json.dumps(fields, indent=2, sort_keys=True)
        (temporary / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> AdapterReport:
    """Puts the adapter in `folder`, of `save_adapter` or of PEFT, on the layers of `model` that it names, in place.

    The layers may be quantized or float. It is then what counts, as after `octavo.adapt_`, and may be trained further.
    returns  AdapterReport
    raises   FileNotFoundError, PermissionError for missing files; ValueError for damaged ones, for a kind of adapter or
             an option that is not computed, for layers that the model has not, for tensors of other shapes and for NaN
             and Inf; otherwise as `octavo.adapt_`. The model is then unchanged
    """
    layers = linear_layers("load_adapter", model)
    require_free("load_adapter", model, name)
    folder = folder_argument("load_adapter", folder)
    with errors_naming("load_adapter"):
        adapter, tensors = _read(folder)
        known = {each: layer for layer, names in layers.items() for each in names}
        _require_layers(folder, tensors, known)
        made = new_layers(adapter, layers)
        trained = {known[each]: own for each, own in tensors.items()}
        made = {layer: own for layer, own in made.items() if layer in trained}
        for layer, own in made.items():
            _check(layers[layer][0], own, trained[layer])
    with undone_on_error(model):
        for layer, own in made.items():
            own.fill_(trained[layer])
        attach(model, name, adapter, made)
    return adapter_report(name, adapter, layers, made)


# --- reading --------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[Adapter, LayerTensors]:
    fields = read_json(current(folder, CONFIG))
    known: dict[Any, type[Adapter]] = {kind.peft_type: kind for kind in kinds(Adapter).values()}
    kind = known.get(fields.get("peft_type"))
    if kind is None:
        raise ValueError(
            f"{folder / CONFIG} holds an adapter of the kind {fields.get('peft_type')!r}; read are {', '.join(known)}"
        )
    if fields.get("fan_in_fan_out") and fields["peft_type"] == "IA3":
        raise ValueError("fan_in_fan_out of IA3 is not read: its vectors lie in another way then")
    tensors: LayerTensors = {}
    for key, tensor in safetensors.read_file(current(folder, WEIGHTS)).items():
        layer, own = _parts_of(key)
        tensors.setdefault(layer, {})[own] = tensor
    try:
        adapter = kind.from_peft(fields, tensors)
        return adapter, kind.peft_tensors(fields, tensors)
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} has no {error.args[0]!r}; the file is damaged") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _parts_of(key: str) -> tuple[str, str]:
    """The name of the layer and that of the tensor in it."""
    for name in _tensor_names():
        if key.startswith(PREFIX) and key.endswith(f".{name}"):
            return key[len(PREFIX) : -len(name) - 1], OLDER_NAMES.get(name, name)
    raise ValueError(
        f"{WEIGHTS} holds {key!r}, which is no part of an adapter of linear layers; adapters of embeddings and modules "
        "that were trained as a whole are read by peft, with the float model"
    )


def _tensor_names() -> list[str]:
    """All names of tensors, those that end with another one before it."""
    names = {name for kind in _layer_kinds(LayerAdapter) for name in kind.file_names.values()}
    return sorted(names | OLDER_NAMES.keys(), key=len, reverse=True)


def _layer_kinds(kind: type[LayerAdapter]) -> list[type[LayerAdapter]]:
    return [each for own in kind.__subclasses__() for each in (own, *_layer_kinds(own))]


def _require_layers(folder: Path, tensors: LayerTensors, known: Mapping[str, nn.Module]) -> None:
    missing = [layer for layer in tensors if layer not in known]
    if missing:
        raise ValueError(
            f"{folder} is for other layers: the model has no linear layer {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; it has {', '.join(map(repr, list(known)[:3]))}, ..."
        )


def _check(layer: str, own: LayerAdapter, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for tensors that do not fit the new adapter of a layer."""
    needed = {own.file_names[name]: p for name, p in own.named_parameters() if name in own.file_names}
    for name, parameter in needed.items():
        tensor = tensors.get(name)
        if tensor is None:
            if name != BIAS:  # PEFT leaves those of adapted layers out of "lora_only"
                raise ValueError(f"{WEIGHTS} has no {name} for {layer!r}; the file is damaged")
            continue
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} of {layer!r} has shape {list(tensor.shape)}, the layer needs {list(parameter.shape)}; the "
                "adapter is for another model"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} of {layer!r} holds NaN or Inf; its training has diverged, or the file is damaged"
            )
    left = [name for name in tensors if name not in needed and tensors[name].is_floating_point()]
    if left:
        raise ValueError(f"{WEIGHTS} holds {left[0]} for {layer!r}, which {CONFIG} does not speak of")


# --- writing --------------------------------------------------------------------------------------------------------


def _target_modules(model: nn.Module, layers: list[str]) -> list[str] | str:
    """What finds these layers and no other module: endings of names if there are such, else a regular expression.

    PEFT takes a module for a target whose name, from some point on, is in the list.
    """
    adapted = {name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    names = [
        name
        for name, _ in model.named_modules()
        if name and not any(name.startswith(f"{each}.") for each in adapted)
    ]
    for endings in (sorted({layer.rpartition(".")[2] for layer in layers}), layers):
        found = [name for name in names if any(f".{name}".endswith(f".{each}") for each in endings)]
        if set(found) == set(layers):
            return endings
    return "|".join(map(re.escape, layers))
