# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format: how config.json says which layers hold which integers, written and read.

Our layers' tensors have the format's names, shapes and dtypes already, so writing is a matter of `quantization_config`.
Without that entry transformers fills float layers with integer codes and says nothing. Schemes that the format has no
words for get an entry without quant_method: octavo reads it, transformers refuses to load such a folder.
"""

from __future__ import annotations

import gc
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import compress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..base import configs
from ..base.float_types import FLOAT_DTYPES
from ..formats import WeightFormat, differs
from ..nn import QuantLinear
from ..nn.embedding import obstacle_of
from ..nn.replacements import embedding_of, replacement_of
from ..schemes import Scheme, from_dict
from ..tensors.forms import TensorForm, positive
from . import computed, safetensors
from .config_json import CONFIG, ENTRY, quantization_entry
from .format import Checkpoint, FileFormat
from .guard import unguard_
from .inspection import CheckpointContents
from .renaming import by_name_of, missing_from

# What the format can say of a layer; a scheme whose layers hold more, or an integer bias, has no words in it.
TENSORS = {"bias", "input_scale", "input_zero_point"}  # beside those of the weight format
INPUT_SCALE = TensorForm((1,), torch.float32, FLOAT_DTYPES, check=positive)

_log = logging.getLogger("octavo")


class CompressedTensors(FileFormat):
    """Folders of transformers whose config.json says that compressed-tensors, or octavo, has quantized them."""

    description: ClassVar[str] = "a folder of transformers quantized by octavo or compressed-tensors"

    def recognize(self, path: Path) -> bool:
        try:
            entry = quantization_entry(path) or {}
        except (OSError, ValueError):
            return False
        return "octavo" in entry or entry.get("quant_method") == "compressed-tensors"

    def inspect(self, path: Path) -> CheckpointContents:
        return safetensors.contents(path)

    def read(self, path: Path, skeleton: nn.Module) -> Checkpoint:
        """Raises: FileNotFoundError if a file is missing; ValueError if one is damaged, or if it asks for arithmetic
        that octavo does not have.
        Source: compressed-tensors 0.20.0, formats int-quantized and pack-quantized.
        """
        try:
            schemes = schemes_of(quantization_entry(path) or {}, skeleton)
        except (TypeError, KeyError, AttributeError, re.error) as error:
            raise ValueError(f"load: {ENTRY} of {path / CONFIG} is damaged ({error!r})") from error
        tensors, unknown = by_name_of(skeleton, safetensors.read_folder(path), set(schemes))
        unguard_(tensors, schemes)
        unknown -= computed.may_be_left_over(skeleton, unknown)
        if unknown:
            _log.warning("load: the model has no place for these tensors: %s", sorted(unknown))
        for name, scheme in schemes.items():
            weights = _adapt(name, scheme.weights, tensors)
            schemes[name] = scheme if weights == scheme.weights else scheme.with_weights(weights)
        tensors |= computed.may_be_missing(skeleton, missing_from(skeleton, tensors, set(schemes)))
        return Checkpoint(schemes, tensors, source=CONFIG, evaluating=True)

    def model_changed(self, model: nn.Module) -> None:
        """Then save_pretrained of transformers writes a folder of this format."""
        set_quantization_config(model)


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` under which the tensors of `model` are read, by transformers as well.

    Source: compressed-tensors 0.20.0, `QuantizationConfig`.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
    schemes: dict[str, Any] = {name: layer.scheme for name, layer in layers.items()}
    if not all(map(_has_words, layers.values())):
        return {"octavo": layers_entry(model)}
    classes = {each.__name__ for kind in set(map(type, modules.values())) for each in kind.__mro__}
    groups: dict[str, tuple[WeightFormat, Any, list[str]]] = {}
    for name, scheme in schemes.items():
        activations = scheme.activations.compressed_tensors()
        key = json.dumps([scheme.weights.compressed_tensors(), scheme.weights.stored_as, activations])
        groups.setdefault(key, (scheme.weights, activations, []))[2].append(_target(name, classes))
    if len(groups) == 1:
        # The usual way to say it, and the one that a part of the model can be saved with, too.
        groups = {
            key: (weights, activations, ["Linear"]) for key, (weights, activations, _) in groups.items()
        }
    return {
        "quant_method": "compressed-tensors",
        "format": _stored_as(groups.values()),
        "quantization_status": "compressed",
        "ignore": [_target(name, classes) for name, module in modules.items() if _has_class_target(module)],
        "config_groups": {f"group_{i}": _group(*group) for i, group in enumerate(groups.values())},
    }


def layers_entry(model: nn.Module) -> dict[str, Any]:
    """The entry "octavo", which says in our words what the layers of `model` are."""
    modules = model.named_modules(remove_duplicate=False)
    return {
        "layers": {name: layer.scheme.to_dict() for name, layer in modules if isinstance(layer, QuantLinear)}
    }


def set_quantization_config(model: nn.Module) -> None:
    """Tells the config of each transformers model that holds quantized layers of `model` what its layers are now.

    Then `save_pretrained` writes a folder that loads as what it is. Such models lie in `model`, or around it if it is a
    part of one. Each gets a copy of its config to hold the entry, because another model may have been made of the same
    object. Within one model, modules that shared a config share the copy. transformers is not imported: a model of it
    is what has a `config` and a `config_class`, and its config is told from others by `to_diff_dict`.
    """
    if "transformers" not in sys.modules or not _has_quantized(model):
        return
    for outermost in _models_around(model) or [model]:
        _own_configs(outermost)
        told: set[int] = set()
        for module in filter(_is_transformers, outermost.modules()):
            config: Any = module.config
            if id(config) not in told and _has_quantized(module):
                entry: Any = getattr(config, "quantization_config", None)
                if getattr(entry, "quant_method", None) == "octavo":  # from_pretrained was asked for that
                    entry.octavo = layers_entry(module)
                else:
                    config.quantization_config = quantization_config(module)
            told.add(id(config))  # of the models that share a config, the outermost one's names count


# Writing


def _has_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantLinear) for module in model.modules())


def _own_configs(model: nn.Module) -> None:
    """Gives `model` copies of its transformers configs, in every module that holds one, and in one another."""
    copies: dict[int, Any] = {}
    for module in filter(_is_transformers, model.modules()):
        deepcopy(module.config, copies)
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if hasattr(value, "to_diff_dict") and id(value) in copies:
                vars(module)[name] = copies[id(value)]


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(type(module), "config_class") and hasattr(getattr(module, "config", None), "to_diff_dict")


def _models_around(model: nn.Module) -> list[nn.Module]:
    """The transformers models alive that `model` is a part of or is, without those that lie in others of them.

    A module does not know what it is a part of, so all objects that the garbage collector knows are looked through:
    there may be a million of them, which is why no line of Python runs for each.
    """
    kinds = set(_transformers_kinds(nn.Module))
    objects = gc.get_objects() if kinds else []
    models = filter(_is_transformers, compress(objects, map(kinds.__contains__, map(type, objects))))
    around = [each for each in models if any(inner is model for inner in each.modules())]
    return [
        each
        for each in around
        if not any(each is not other and each in set(other.modules()) for other in around)
    ]


def _transformers_kinds(kind: type) -> Iterator[type]:
    """The classes derived from `kind` whose instances may have a config of transformers, as far as they are loaded."""
    derived: list[type] = kind.__subclasses__()
    for each in derived:
        if hasattr(each, "config_class"):
            yield each
        yield from _transformers_kinds(each)


def _has_words(layer: QuantLinear) -> bool:
    """Whether the format can say what is in the layer's state_dict, which is not asked: it would unpack codes."""
    weights = layer.scheme.weights
    names = layer._parameters.keys() | (layer._buffers.keys() - layer._non_persistent_buffers_set)
    known = TENSORS | weights.tensors(layer.out_features, layer.in_features).keys()
    has_float_bias = layer.bias is None or layer.bias.is_floating_point()
    words = weights.compressed_tensors(), layer.scheme.activations.compressed_tensors()
    has_target = bool(layer.replaces.target)  # else the format's readers would put W [n, k] where W.T belongs
    sizes = [each.get("group_size") for each in words if each]  # they know no group that is not full
    are_full = all(size is None or layer.in_features % size == 0 for size in sizes)
    return None not in words and names <= known and has_float_bias and has_target and are_full


def _has_class_target(module: nn.Module) -> bool:
    """Whether the target "Linear" means `module`, a float layer."""
    replacement = replacement_of(module)
    return replacement is not None and bool(replacement.target)


def _stored_as(groups: Iterable[tuple[WeightFormat, Any, list[str]]]) -> str:
    """The layout of all groups, or the word for several."""
    found = {weights.stored_as for weights, _, _ in groups}
    return found.pop() if len(found) == 1 else "mixed-precision"


def _target(name: str, classes: set[str]) -> str:
    """What matches this layer alone: its name, unless that would be read as a class or a regular expression."""
    return f"re:{re.escape(name)}$" if name in classes or name.startswith("re:") else name


def _group(weights: WeightFormat, activations: dict[str, Any] | None, targets: list[str]) -> dict[str, Any]:
    # A group without a format of its own is taken for a packed one if its activations are float.
    return {
        "targets": targets,
        "format": weights.stored_as,
        "weights": weights.compressed_tensors(),
        "input_activations": activations or None,
    }


# Reading


def schemes_of(entry: dict[str, Any], skeleton: nn.Module) -> dict[str, Scheme]:
    """The scheme of each layer of `skeleton` that `entry`, a quantization_config, says is quantized, by name."""
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    outer = _outer_prefix(skeleton)
    if "octavo" in entry:
        named = {name: from_dict(fields) for name, fields in entry["octavo"]["layers"].items()}
        if outer and not named.keys() <= modules.keys():  # what the head has is not in this folder
            named = {name[len(outer) :]: each for name, each in named.items() if name.startswith(outer)}
        return named
    for key in ("kv_cache_scheme", "transform_config"):
        if entry.get(key):
            raise ValueError(f"load: {ENTRY} has a {key}, which octavo does not compute")
    if (entry.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise ValueError("load: the weights are stored sparse, octavo reads dense ones")
    by_target: dict[str, Scheme] = {}  # a target that is repeated means what the last group says
    for group in entry["config_groups"].values():
        by_target.update(dict.fromkeys(_strings(group["targets"]), _scheme(group, entry)))
    ignore = _strings(entry.get("ignore") or [])
    schemes: dict[str, Scheme] = {}
    first: dict[nn.Module, str] = {}  # a module of several names is matched by its first one
    for name, module in modules.items():
        names = [first.setdefault(module, name)]
        names += [outer + names[0]] if outer else []
        targets = _matching(names, module, by_target)
        if not targets or _matching(names, module, ignore):
            continue
        is_embedding = embedding_of(module) is not None
        if is_embedding and obstacle_of(module):
            raise ValueError(f"load: {targets[0]!r} wants {name} quantized, and {obstacle_of(module)}")
        if is_embedding or _has_class_target(
            module
        ):  # other classes are passed over by compressed-tensors, too
            schemes[name] = by_target[targets[0]]
    return schemes


def _outer_prefix(skeleton: nn.Module) -> str:
    """What the names of a base model of transformers begin with in the model with a head that it may be a part of: the
    two share a config, so its layers have those names in the entry even if it was saved alone. "" for other models."""
    prefix = getattr(type(skeleton), "base_model_prefix", "")
    return f"{prefix}." if prefix and not hasattr(skeleton, prefix) else ""


def _strings(found: Any) -> list[str]:
    """A list of texts. Raises TypeError for anything else: a text is many letters, and each would be a pattern."""
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{found!r} is no list of names")
    return found


def _scheme(group: dict[str, Any], entry: dict[str, Any]) -> Scheme:
    """Raises ValueError for a group that octavo cannot compute exactly as it is meant."""
    weights, activations = group["weights"], group.get("input_activations")
    stored = group.get("format") or entry.get("format")
    formats = [kind for kind in configs.kinds(WeightFormat).values() if kind.stored_as]
    if stored not in {layout for kind in formats for layout in (kind.stored_as, *kind.read_as)}:
        raise ValueError(
            f"load: the format {stored!r} is not read; int-quantized and pack-quantized are. Quantize the float model "
            "with `octavo quantize`, or have it exported anew as one of them"
        )
    formats = [kind for kind in formats if stored in (kind.stored_as, *kind.read_as)]
    ours_first = sorted(formats, key=lambda kind: kind.stored_as != stored)
    format = next(filter(None, (kind.from_compressed_tensors(weights) for kind in ours_first)), None)
    if format is None:
        raise ValueError(
            f"load: weights {weights} are not read as {stored}; integers of 2 to 8 bits are, per channel, per tensor "
            "or in groups of a multiple of 16"
        )
    if group.get("output_activations"):
        raise ValueError("load: output_activations are quantized, which octavo does not compute")
    for scheme in _schemes_of(format, activations):
        if not differs(activations or {}, scheme.activations.compressed_tensors() or {}):
            return scheme
    raise ValueError(
        f"load: input_activations {activations} are not read; 8 bits per token, in groups of a multiple of 32, or "
        "static are"
    )


def _schemes_of(format: WeightFormat, activations: dict[str, Any] | None) -> Iterator[Scheme]:
    """Schemes with such weights that may read their input as `activations` say, the shortest name first."""
    kind = "WeightOnly" if activations is None else "Dynamic" if activations.get("dynamic") else "Static"
    own = configs.kinds(Scheme).get(format.name)  # a codebook has a scheme of its own
    if own is not None:
        yield from_dict({"name": own.__name__, "activations": "int16" if activations is None else "int8"})
    elif format.bits < 8 and kind != "Static":
        yield from_dict({"name": f"Int4{kind}"}).with_weights(format)
    options: dict[str, Any] = {"name": f"Int8{kind}", "weights": format.to_dict()}
    if activations is not None:
        options["symmetric"] = activations.get("symmetric", True)
    size = (activations or {}).get("group_size")
    if kind == "Dynamic" and isinstance(size, int) and size > 0 and size % 32 == 0:
        options["activation_group_size"] = size
    yield from_dict(options)


def _matching(names: Sequence[str], module: nn.Module, targets: Iterable[str]) -> list[str]:
    """The targets that mean this module, the one that counts first: one of its names, regular expressions, its classes.

    Source: compressed-tensors 0.20.1, `match_targets`.
    """
    ordered = sorted(targets, key=lambda target: ("re:" in target, target))
    classes = {kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module)}
    named = [
        target
        for target in ordered
        if (
            any(re.match(target[3:], name) for name in names) if target.startswith("re:") else target in names
        )
    ]
    return named + [target for target in ordered if target in classes]


def _adapt(layer: str, weights: WeightFormat, tensors: dict[str, torch.Tensor]) -> WeightFormat:
    """Brings one layer's tensors from the forms that the files allow to the one that octavo's layers have, and returns
    their format."""
    weights = weights.adapt(layer, tensors)
    for leaf, form in {**weights.tensors(0, 0), "input_scale": INPUT_SCALE}.items():
        tensor = tensors.get(f"{layer}.{leaf}")
        if tensor is not None and tensor.is_floating_point() and form.check is not None:
            tensors[f"{layer}.{leaf}"] = tensor.to(form.dtype)
            if form.check(tensor):
                raise ValueError(f"load: {layer}.{leaf} holds {form.check(tensor)}")
    return weights
