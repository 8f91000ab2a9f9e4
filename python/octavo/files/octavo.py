# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a folder of ordinary files, and back without a float copy ever existing.

    model.safetensors     the state_dict: the tensors of each layer's weight format under the names that
                          compressed-tensors uses, everything else as it is; never the packed form
    buffers.safetensors   non-persistent buffers (rotary tables, position ids), so that a skeleton on the meta
                          device can be filled whole; absent if there are none
    octavo.json           the scheme of each quantized and each prepared layer, names that share one tensor, a checksum

manifest.py reads and writes octavo.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..base.float_types import FLOAT_DTYPES
from ..formats import WeightFormat
from ..nn import PreparedLinear, QuantLinear
from ..nn.adapters import AdaptedLinear
from ..schemes import Scheme, from_dict, label
from . import manifest, safetensors
from .disk import current, save_into
from .format import Checkpoint, FileFormat
from .inspection import CheckpointContents, CheckpointLayer, Entry, by_layer, contents_of, main_of, row
from .loading import check_values, left_out_buffers

_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES}
WEIGHTS, BUFFERS, CONFIG = safetensors.WEIGHTS, "buffers.safetensors", manifest.NAME


class Octavo(FileFormat):
    """The format of `octavo.save`."""

    description: ClassVar[str] = "a folder of octavo.save"

    def recognize(self, path: Path) -> bool:
        return current(path, CONFIG).exists()

    def inspect(self, path: Path) -> CheckpointContents:
        config = manifest.read(path)
        files = [current(path, WEIGHTS)]
        layers = [
            _row(name, own, config["layers"]) for name, own in by_layer(safetensors.header(files[0])).items()
        ]
        buffers = current(path, BUFFERS)
        if buffers.exists():
            files.append(buffers)
            layers += [
                row(name, {name: entry}, "buffer") for name, entry in safetensors.header(buffers).items()
            ]
        for alias, name in config["aliases"].items():
            layers.append(CheckpointLayer(alias, "tied", name, (), "", 0, None, None))
        return contents_of(path, "octavo", files, layers)

    def read(self, path: Path, skeleton: nn.Module) -> Checkpoint:
        config = manifest.read(path)
        _check_files(path, config["files"])
        tensors = safetensors.read_file(current(path, WEIGHTS))
        for alias, name in config["aliases"].items():
            if name not in tensors:
                raise ValueError(f"load: {path / CONFIG} names {name!r}, which {WEIGHTS} does not hold")
            tensors[alias] = tensors[name]
        schemes = {name: _scheme(name, fields) for name, fields in config["layers"].items()}
        prepared = {}
        for name, fields in config["prepared"].items():
            options = dict(fields)
            prepared[name] = (_scheme(name, options.pop("scheme", {})), options)
        buffers = current(path, BUFFERS)
        return Checkpoint(
            schemes,
            tensors,
            prepared,
            safetensors.read_file(buffers) if buffers.exists() else None,
            _dtypes(config.get("weight_dtypes")),
            CONFIG,
        )

    def write(self, model: nn.Module, folder: Path, others: Callable[[Path], Any] | None = None) -> None:
        """Writes the folder.

        others   writes what else shall take its place together with the model's files, into the folder it is given
        raises   as `octavo.save`
        """
        _require_no_adapters(model)
        state = model.state_dict(keep_vars=True)
        tensors, aliases = _without_duplicates(state)
        modules = dict(model.named_modules(remove_duplicate=False))
        quantized = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
        check_values("save", quantized, state)
        layers = {name: layer.scheme.to_dict() for name, layer in quantized.items()}
        dtypes = {name: _NAMES[layer.weight_dtype] for name, layer in quantized.items()}
        dtypes = {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}
        prepared = {name: m.to_dict() for name, m in modules.items() if isinstance(m, PreparedLinear)}
        buffers = {name: _storable(name, buffer).clone() for name, buffer in left_out_buffers(model).items()}
        with save_into(folder, (WEIGHTS, BUFFERS, CONFIG)) as temporary:
            safetensors.write(temporary / WEIGHTS, tensors, tensors.items())
            if buffers:
                safetensors.write(temporary / BUFFERS, buffers, buffers.items())
            files = {path.name: safetensors.fingerprint(path) for path in sorted(temporary.iterdir())}
            if others is not None:
                others(temporary)
            config = {"layers": layers, "prepared": prepared, "aliases": aliases, "files": files}
            manifest.write(temporary, {**config, "weight_dtypes": dtypes})


# --- inspecting -----------------------------------------------------------------------------------------------------


def _row(name: str, tensors: Mapping[str, Entry], layers: Mapping[str, Any]) -> CheckpointLayer:
    if name not in layers:
        return row(name, tensors)
    text, format = _text(layers[name]), _format(layers[name])
    if format is None:
        return row(name, tensors, "QuantLinear", text)
    codes = format.replaced[0]
    weights = tensors[main_of(name, tensors, codes)].bytes * 8 // format.stored_bits
    return row(name, tensors, "QuantLinear", text, weights, codes)


def _format(fields: dict[str, Any]) -> WeightFormat | None:
    """The weight format of a layer's scheme; None if nobody has registered such a scheme."""
    try:
        return from_dict(fields).weights
    except (AttributeError, TypeError, ValueError, LookupError):
        return None


def _text(fields: dict[str, Any]) -> str:
    """What is not at its default, as one writes it; the fields as they are, if this version does not know them."""
    try:
        return label(from_dict(fields))
    except (AttributeError, TypeError, ValueError):
        options = ", ".join(f"{key}={value!r}" for key, value in fields.items() if key != "name")
        return f"{fields.get('name')}({options})"


# --- reading --------------------------------------------------------------------------------------------------------


def _check_files(folder: Path, fingerprints: Mapping[str, str]) -> None:
    for name, fingerprint in fingerprints.items():
        path = current(folder, name)
        if name in (WEIGHTS, BUFFERS) and path.exists() and safetensors.fingerprint(path) != fingerprint:
            raise ValueError(
                f"load: {path} was not written together with {CONFIG}: the folder holds files of two checkpoints; save "
                "the model again"
            )


def _scheme(layer: str, fields: dict[str, Any]) -> Scheme:
    try:
        return from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: layer {layer!r} in {CONFIG}: {error}") from error


def _dtypes(saved: Mapping[str, str] | None) -> dict[str, torch.dtype] | None:
    known = {text: dtype for dtype, text in _NAMES.items()}
    for name, text in (saved or {}).items():
        if text not in known:
            raise ValueError(f"load: {CONFIG} gives {name!r} the dtype {text!r}; the file is damaged")
    return None if saved is None else {name: known[text] for name, text in saved.items()}


# --- writing --------------------------------------------------------------------------------------------------------


def _require_no_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            raise ValueError(
                f"save: {name!r} has adapters, which have files of their own: octavo.save_adapter(model, folder). To "
                "save the model, take them off with octavo.remove_adapters_(model), or merge them with octavo.merge_"
            )


def _without_duplicates(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to write, and {alias: name} for those that are another one's memory."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        tensor = _storable(name, value)
        same = (value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else (name,)
        storage = value.untyped_storage().data_ptr()
        if same in names:
            aliases[name] = names[same]
            continue
        names[same] = name
        # Two different views of one storage: safetensors refuses them, so each is written out by itself.
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, aliases


def _storable(name: str, value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"save: {name!r} in the state_dict is {type(value).__name__}; only tensors can be saved"
        )
    if value.is_meta:
        raise ValueError(f"save: {name!r} is on the meta device and has no values; load the model first")
    return value.detach().contiguous()
