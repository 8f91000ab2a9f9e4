# SPDX-License-Identifier: Apache-2.0
"""Where a file of transformers has other names or forms than its model: the changes that transformers makes on loading.

Classes hold old checkpoints under newer names, and the experts of a mixture in one tensor where files have one for
each. transformers keeps a list of such changes for each class; for other models there are none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import nn


class Conversions:
    """What transformers, 5.0 or later, changes while it loads a file into `model`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        if not hasattr(type(model), "config_class"):  # told as in compressed_tensors.set_quantization_config
            return
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError as error:
            raise ImportError(f"files of {_name()} cannot be read; 5.0 or later is needed") from error
        for change in get_model_conversion_mapping(model):
            if not isinstance(change, WeightConverter | WeightRenaming):
                raise ValueError(
                    f"{_name()} changes files of {type(model).__name__} by a {type(change).__name__}, which octavo "
                    "does not know; use an older transformers"
                )
            (self.converters if isinstance(change, WeightConverter) else self.renamings).append(change)

    def renamed(self, stored: str) -> str | None:
        """The model's name of a tensor of a file; None if the model holds it in another form, too."""
        name, converter, _ = self._target(stored)
        return name if converter is None else None

    def only_renamed(self, stored: str) -> str:
        """The name of a tensor of a file that the model holds as the file does, whatever others of such names do."""
        for renaming in self.renamings:
            stored, _ = renaming.rename_source_key(stored)
        return stored

    def converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's tensors, by its names, that are made of the file's tensors for which `renamed` is None."""
        pending: dict[str, Any] = {}
        for stored in sorted(tensors, key=_natural):  # experts are stacked in the order of their numbers
            name, converter, source = self._target(stored)
            pending.setdefault(name, deepcopy(converter)).add_tensor(name, stored, source, tensors[stored])
        result: dict[str, torch.Tensor] = {}
        for name, converter in pending.items():
            result |= self._convert(name, converter)
        return result

    def _convert(self, name: str, converter: Any) -> dict[str, torch.Tensor]:
        """Raises ValueError, and not what transformers raises, which may be anything, or a sign to itself."""
        try:
            found = converter.convert(name, model=self.model, config=self.model.config)
        except Exception as error:
            raise ValueError(
                f"the tensors of the file do not become {name!r}: {_name()} stops with {type(error).__name__} ({error})"
            ) from error
        if isinstance(found, tuple):  # of 5.0: the tensors, and errors where they were asked for
            found = next(iter(found), None)
        tensors = {
            key: value[0] if isinstance(value, list) and len(value) == 1 else value
            for key, value in (found.items() if isinstance(found, dict) else ())
        }
        if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError(
                f"what {_name()} makes of the file for {name!r} is no tensor; octavo does not know this conversion, "
                "another version of transformers may do"
            )
        return tensors

    def _target(self, stored: str) -> tuple[str, Any, str | None]:
        """The new name and, for another form, the converter and which of its sources this is."""
        name = self.only_renamed(stored)
        for converter in self.converters:
            target, source = converter.rename_source_key(name)
            if source is not None:
                return target, converter, source
        return name, None, None


def own_names(skeleton: nn.Module, names: Iterable[str], layers: Collection[str] = ()) -> dict[str, str]:
    """{name in a file: name in `skeleton`}, without tensors that transformers brings into another form on loading.

    layers   names of quantized layers, whose tensors keep their form: a layer for each expert is not joined with others
    A model's names may be newer ones, or have a prefix that the names of its base model lack.
    """
    conversions, modules = Conversions(skeleton), dict(skeleton.named_modules(remove_duplicate=False))
    prefix = getattr(skeleton, "base_model_prefix", "") + "."
    result = {}
    for name in names:
        plain = conversions.only_renamed(name)
        renamed = plain if plain.rpartition(".")[0] in layers else conversions.renamed(name)
        if renamed is not None:
            candidates = (renamed, prefix + renamed, renamed.removeprefix(prefix), name)
            fitting = (other for other in candidates if other.rpartition(".")[0] in modules)
            result[name] = next(fitting, name)
    return result


def possible_layers(skeleton: nn.Module, layers: Iterable[str]) -> set[str]:
    """The names that layers of a file may have in `skeleton`."""
    conversions, prefix = Conversions(skeleton), getattr(skeleton, "base_model_prefix", "") + "."
    found = set(layers)
    for layer in list(found):
        name = conversions.only_renamed(f"{layer}.weight").rpartition(".")[0]
        found |= {name, prefix + name, name.removeprefix(prefix)}
    return found


def by_name_of(
    skeleton: nn.Module, tensors: dict[str, torch.Tensor], layers: set[str]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """`tensors` of a file by the skeleton's names, and the names of those that it has no place for.

    layers   names of quantized layers, which may hold any tensor
    A file holds one of the names of a tied tensor; here the others have the same tensor. Values are not looked at.
    """
    state = skeleton.state_dict(keep_vars=True)
    names = own_names(skeleton, tensors, layers)
    others = {name: tensor for name, tensor in tensors.items() if name not in names}
    converted = Conversions(skeleton).converted(others)
    placed = own_names(skeleton, converted)
    found = {name: tensors[stored] for stored, name in names.items()}
    found |= {placed.get(name, name): tensor for name, tensor in converted.items()}
    unknown = {name for name in found if name not in state and name.rpartition(".")[0] not in layers}
    found = {name: tensor for name, tensor in found.items() if name not in unknown}
    found |= _of_tied_layers(state, found, layers)
    holder = {id(value): name for name, value in state.items() if name in found}
    tied = {name: found[holder[id(value)]] for name, value in state.items() if id(value) in holder}
    return tied | found, unknown


def _of_tied_layers(
    state: dict[str, Any], found: dict[str, torch.Tensor], layers: set[str]
) -> dict[str, torch.Tensor]:
    """The tensors of quantized `layers` that a file has under the name of another one, whose float weight in `state` is
    the same Parameter. A bias belongs to its layer alone."""
    weights = {name: state.get(f"{name}.weight") for name in sorted(layers)}
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for name, weight in weights.items():
        own = {
            key.rpartition(".")[2]: value for key, value in found.items() if key.rpartition(".")[0] == name
        }
        tensors.setdefault(id(weight), {}).update(
            (leaf, value) for leaf, value in own.items() if leaf != "bias"
        )
    return {
        f"{name}.{leaf}": value
        for name, weight in weights.items()
        if weight is not None
        for leaf, value in tensors[id(weight)].items()
        if f"{name}.{leaf}" not in found
    }


def missing_from(skeleton: nn.Module, tensors: Iterable[str], layers: set[str]) -> set[str]:
    """Names of the skeleton's tensors that are not among `tensors`; tensors of `layers` are not looked for."""
    return {
        name for name in skeleton.state_dict().keys() - set(tensors) if name.rpartition(".")[0] not in layers
    }


def _name() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


def _natural(name: str) -> list[str | int]:
    return [int(part) if index % 2 else part for index, part in enumerate(re.split(r"(\d+)", name))]
