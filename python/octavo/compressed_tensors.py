# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format: how config.json says which layers hold which integers, written and read.

Our layers' tensors have the format's names, shapes and dtypes already, so writing is a matter of `quantization_config`.
Without that entry transformers fills float layers with integer codes and says nothing. Schemes that the format has no
words for get an entry without quant_method: octavo reads it, transformers refuses to load such a folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import shards
from .files import read_json
from .nn import QuantLinear
from .renaming import Conversions
from .schemes import Scheme, from_dict

CONFIG, ENTRY = "config.json", "quantization_config"
# What the format can say of a layer; a scheme whose layers hold more, or an integer bias, has no words in it.
TENSORS = {"weight", "weight_scale", "bias", "input_scale", "input_zero_point"}
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}

_log = logging.getLogger("octavo")


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` under which the tensors of `model` are read, by transformers as well.

    Source: compressed-tensors 0.20.0, `QuantizationConfig`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
    schemes: dict[str, Any] = {name: layer.scheme for name, layer in layers.items()}
    if not all(map(_has_words, layers.values())):
        return {"octavo": {"layers": {name: scheme.to_dict() for name, scheme in schemes.items()}}}
    groups: dict[str, tuple[Any, list[str]]] = {}
    for name, scheme in schemes.items():
        activations = scheme.activations.compressed_tensors()
        groups.setdefault(json.dumps(activations), (activations, []))[1].append(name)
    if len(groups) == 1:
        # The usual way to say it, and the one that a part of the model can be saved with, too.
        groups = {key: (activations, ["Linear"]) for key, (activations, _) in groups.items()}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name, module in modules.items() if isinstance(module, nn.Linear)],
        "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(groups.values())},
    }


def set_quantization_config(model: nn.Module) -> None:
    """Tells the config of each transformers model in `model` what its layers are now.

    Then `save_pretrained` writes a folder that loads as what it is. transformers is not imported: a model of it is what
    has a `config` and a `config_class`, and its config is told from others by `to_diff_dict`.
    """
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None) if hasattr(type(module), "config_class") else None
        if not hasattr(config, "to_diff_dict") or id(config) in seen:
            continue
        seen.add(id(config))  # of the models that share a config, the outermost one's names count
        if any(isinstance(inner, QuantLinear) for inner in module.modules()):
            config.quantization_config = quantization_config(module)


def read(folder: Path, skeleton: nn.Module) -> tuple[dict[str, Scheme], dict[str, torch.Tensor]]:
    """The schemes of the quantized layers and all tensors, by the names of `skeleton`, the float model.

    Tensors come as octavo's layers hold them: scales in float32, one for each row; a zero point for each static layer.

    Raises: FileNotFoundError if a file is missing; ValueError if one is damaged, or if it asks for arithmetic that
    octavo does not have, such as weights with zero points.
    Source: compressed-tensors 0.20.0, format int-quantized.
    """
    entry = read_config(folder).get(ENTRY)
    if not isinstance(entry, dict):
        raise ValueError(f"load: {folder / CONFIG} has no {ENTRY}; give a quantized folder")
    try:
        schemes = _schemes(entry, skeleton)
    except (TypeError, KeyError, AttributeError, re.error) as error:
        raise ValueError(f"load: {ENTRY} of {folder / CONFIG} is damaged ({error!r})") from error
    tensors = _by_name_of(skeleton, shards.read_folder(folder), set(schemes))
    for name in schemes:
        _adapt(name, tensors)
    _tie(skeleton, tensors)
    return schemes, tensors


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of `folder`. Raises: FileNotFoundError if there is none; otherwise as `read_json`."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {CONFIG}; give the folder of a transformers model")
    return read_json(path)


def own_names(skeleton: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """{name in a file: name in `skeleton`}, without tensors that transformers brings into another form on loading.

    A model's names may be newer ones, or have a prefix that those of its base model lack.
    """
    conversions, modules = Conversions(skeleton), dict(skeleton.named_modules(remove_duplicate=False))
    prefix = getattr(skeleton, "base_model_prefix", "") + "."
    result = {}
    for name in names:
        renamed = conversions.renamed(name)
        if renamed is not None:
            candidates = (renamed, prefix + renamed, renamed.removeprefix(prefix), name)
            fitting = (other for other in candidates if other.rpartition(".")[0] in modules)
            result[name] = next(fitting, name)
    return result


# Writing


def _has_words(layer: QuantLinear) -> bool:
    """Whether the format can say what is in the layer's state_dict, which is not asked: it would unpack codes."""
    names = layer._parameters.keys() | (layer._buffers.keys() - layer._non_persistent_buffers_set)
    return names <= TENSORS and (layer.bias is None or layer.bias.is_floating_point())


def _group(activations: dict[str, Any] | None, targets: list[str]) -> dict[str, Any]:
    # A group without a format of its own is taken for a packed one if its activations are float.
    return {
        "targets": targets,
        "format": "int-quantized",
        "weights": WEIGHTS,
        "input_activations": activations,
    }


# Reading


def _schemes(entry: dict[str, Any], skeleton: nn.Module) -> dict[str, Scheme]:
    if "octavo" in entry:
        return {name: from_dict(fields) for name, fields in entry["octavo"]["layers"].items()}
    if entry.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"load: quant_method is {entry.get('quant_method')!r}; octavo reads compressed-tensors"
        )
    for key in ("kv_cache_scheme", "transform_config"):
        if entry.get(key):
            raise ValueError(f"load: {ENTRY} has a {key}, which octavo does not compute")
    if (entry.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError("load: the weights are stored sparse, octavo reads dense ones")
    groups = [(group["targets"], group, _scheme(group, entry)) for group in entry["config_groups"].values()]
    schemes = {}
    for name, module in skeleton.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and not _matches(name, module, entry.get("ignore") or []):
            fitting = [scheme for targets, _, scheme in groups if _matches(name, None, targets)]
            fitting += [scheme for targets, _, scheme in groups if _matches(name, module, targets)]
            if fitting:
                schemes[name] = fitting[0]
    return schemes


def _scheme(group: dict[str, Any], entry: dict[str, Any]) -> Scheme:
    """Raises ValueError for a group that octavo cannot compute exactly as it is meant."""
    weights, activations = group["weights"], group.get("input_activations")
    stored = group.get("format") or entry.get("format")
    if stored != "int-quantized":
        raise ValueError(
            f"load: the format {stored!r} is not read; int-quantized is, a byte for each weight. Quantize the float "
            "model with `octavo quantize`, or have it exported anew as int-quantized"
        )
    strategy = "tensor" if weights.get("strategy") == "tensor" else "channel"
    if _differs(weights, {**WEIGHTS, "strategy": strategy}):
        raise ValueError(
            f"load: weights {weights} are not read; 8 bits, symmetric, per channel or tensor are"
        )
    if group.get("output_activations"):
        raise ValueError("load: output_activations are quantized, which octavo does not compute")
    if activations is None:
        return from_dict({"name": "Int8WeightOnly"})
    kind = "Int8Dynamic" if activations.get("dynamic") else "Int8Static"
    scheme = from_dict({"name": kind, "symmetric": activations.get("symmetric", True)})
    if _differs(activations, scheme.activations.compressed_tensors() or {}):
        raise ValueError(
            f"load: input_activations {activations} are not read; 8 bits per token or static are"
        )
    return scheme


def _differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Fields that are left out have the defaults of compressed-tensors' QuantizationArgs."""
    strategy = "token" if found.get("dynamic") else "tensor"
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "strategy": strategy}
    complete = {**defaults, **{key: value for key, value in found.items() if value is not None}}
    other = complete.get("group_size") not in (None, -1) or complete.get("block_structure") is not None
    return other or any(complete[key] != value for key, value in wanted.items())


def _matches(name: str, module: nn.Module | None, patterns: Iterable[str]) -> bool:
    """By exact name, by a regular expression after "re:" and, if `module` is given, by its class."""
    classes = {kind.__name__ for kind in type(module).__mro__} if module is not None else set()
    return any(
        bool(re.match(pattern[3:], name))
        if pattern.startswith("re:")
        else pattern == name or pattern in classes
        for pattern in patterns
    )


def _by_name_of(
    skeleton: nn.Module, tensors: dict[str, torch.Tensor], layers: set[str]
) -> dict[str, torch.Tensor]:
    """`tensors` by the skeleton's names, without those that it has no place for, as in transformers."""
    known = skeleton.state_dict().keys()
    names = own_names(skeleton, tensors)
    others = {name: tensor for name, tensor in tensors.items() if name not in names}
    converted = Conversions(skeleton).converted(others)
    placed = own_names(skeleton, converted)
    found = {name: tensors[stored] for stored, name in names.items()}
    found |= {placed.get(name, name): tensor for name, tensor in converted.items()}
    unknown = [name for name in found if name not in known and name.rpartition(".")[0] not in layers]
    if unknown:
        _log.warning("load: the model has no place for these tensors: %s", sorted(unknown))
    return {name: tensor for name, tensor in found.items() if name not in unknown}


def _adapt(layer: str, tensors: dict[str, torch.Tensor]) -> None:
    """Brings one layer's tensors from the forms that the format allows to the one that octavo's layers have."""
    zero_point = tensors.pop(f"{layer}.weight_zero_point", None)
    if zero_point is not None and zero_point.any():
        raise ValueError(f"load: {layer}.weight has zero points; octavo computes with symmetric weights only")
    for name in (f"{layer}.weight_scale", f"{layer}.input_scale"):
        if name in tensors and tensors[name].is_floating_point():
            tensors[name] = tensors[name].float()
            if not (tensors[name].isfinite() & (tensors[name] > 0)).all():
                raise ValueError(f"load: {name} holds values that are no scales")
    weight, scale = tensors.get(f"{layer}.weight"), tensors.get(f"{layer}.weight_scale")
    if weight is not None and scale is not None and scale.numel() == 1 and weight.dim() == 2:
        tensors[f"{layer}.weight_scale"] = scale.reshape(1, 1).expand(len(weight), 1)


def _tie(skeleton: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """A file holds one of the names of a tied tensor; the others get the same tensor."""
    holder = {
        id(value): name for name, value in skeleton.state_dict(keep_vars=True).items() if name in tensors
    }
    for name, value in skeleton.state_dict(keep_vars=True).items():
        if name not in tensors and id(value) in holder:
            tensors[name] = tensors[holder[id(value)]]
