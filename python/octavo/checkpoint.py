# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a folder of ordinary files, and back without a float copy ever existing.

    model.safetensors     the state_dict: int8 codes `weight` [n, k] and `weight_scale` [n, 1] under the names
                          that compressed-tensors uses, everything else as it is; never the packed form
    buffers.safetensors   non-persistent buffers (rotary tables, position ids), so that a skeleton on the meta
                          device can be filled whole; absent if there are none
    octavo.json           format version, the scheme of each quantized and each prepared layer, names that share one
                          tensor

`load` checks every name, shape, dtype and checksum of the files before it touches the skeleton. A folder of
transformers without octavo.json, written by compressed-tensors, is read as well.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import compressed_tensors, computed, shards
from .nn import OurLinear, PreparedLinear, QuantLinear, leave_fused_paths
from .schemes import Scheme, from_dict
from .skeleton import skeleton as skeleton_of
from .swap import undone_on_error

FORMAT_VERSION = 1
Maker = Callable[[nn.Linear], OurLinear]
WEIGHTS, BUFFERS, CONFIG = shards.WEIGHTS, "buffers.safetensors", "octavo.json"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `model` to `folder`, which is made if missing; its other files stay as they are.

    The files are written under temporary names and renamed when all are complete, octavo.json last, so an
    interrupted save leaves an incomplete checkpoint, which `load` refuses, never a mixed one. Packed codes
    are unpacked, all at once, while the file is written.

    Raises: TypeError if model is not a module; ValueError if it holds tensors on the meta device or state
    that is not a tensor.
    Source: ours; tensor names as in compressed-tensors' int-quantized format.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model is {type(model).__name__}, a torch.nn.Module is needed")
    tensors, aliases = _without_duplicates(model.state_dict(keep_vars=True))
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: m.scheme.to_dict() for name, m in modules.items() if isinstance(m, QuantLinear)}
    prepared = {name: m.to_dict() for name, m in modules.items() if isinstance(m, PreparedLinear)}
    buffers = {name: _storable(name, buffer).clone() for name, buffer in _transient_buffers(model).items()}
    config = {
        "format": "octavo",
        "format_version": FORMAT_VERSION,
        "octavo_version": version("octavo"),
        "layers": layers,
        "prepared": prepared,
        "aliases": aliases,
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    with _replacing(Path(folder)) as temporary:
        shards.write(temporary / WEIGHTS, tensors, tensors.items())
        if buffers:
            shards.write(temporary / BUFFERS, buffers, buffers.items())
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load(folder: str | os.PathLike[str], skeleton: nn.Module | None = None) -> nn.Module:
    """Fills `skeleton` with the checkpoint in `folder`, in place, and returns it.

    folder     of `save`, or of transformers with integer weights in the compressed-tensors format
    skeleton   the float model that was quantized, with any weights or, best, none: built under
               `with torch.device("meta")`, so that no float copy of a quantized weight ever exists.
               None: the model of transformers that config.json in `folder` describes, as `octavo quantize`,
               `save_pretrained` and `pretrained.save_quantized` leave one there
    The Linear layers that the checkpoint holds as integers become QuantLinear, those that were prepared are
    prepared again, calibration and learned scales included; every other tensor is
    replaced by the saved one, in the saved float dtype. A skeleton that is itself one Linear stays as it is,
    and the QuantLinear is returned. Buffers that state_dict leaves out are filled if they are on meta.
    A model from a folder of transformers is in eval mode then, as from_pretrained leaves it; otherwise the modes are
    the skeleton's.

    Raises: FileNotFoundError if a file is missing; ValueError if one is damaged, foreign, of a newer
    format, or does not fit the skeleton, or if something would stay on the meta device; TypeError if
    skeleton is not a module. On an error the skeleton is as it was.
    Source: ours.
    """
    folder = Path(folder)
    if skeleton is None:
        skeleton = _skeleton_in(folder)
    if not isinstance(skeleton, nn.Module):
        raise TypeError(f"load: skeleton is {type(skeleton).__name__}, a torch.nn.Module is needed")
    is_foreign = (folder / compressed_tensors.CONFIG).exists() and not (folder / CONFIG).exists()
    if is_foreign:
        schemes, tensors = compressed_tensors.read(folder, skeleton)
        makers = {name: _frozen_maker(scheme) for name, scheme in schemes.items()}
    else:
        makers, tensors = _read_ours(folder)
    if (folder / BUFFERS).exists():
        buffers = shards.read_file(folder / BUFFERS)
    else:
        buffers = computed.transient_buffers(skeleton)
    layers = _unfilled_layers(skeleton, makers)
    for name, layer in layers.items():
        layer.take_shapes_(tensors, f"{name}." if name else "")
    _check_tensors(_expected_tensors(skeleton, layers), tensors, set(layers))
    with undone_on_error(skeleton):
        model = _swap(skeleton, layers)
        model.load_state_dict(_own_parameters(model, tensors, set(layers)), assign=True)
        _fill_transient_buffers(model, buffers)
        _check_nothing_on_meta(model)
    for layer in layers.values():
        if isinstance(layer, QuantLinear):
            layer.pack_()
    leave_fused_paths(model)
    compressed_tensors.set_quantization_config(model)
    return model.eval() if is_foreign else model


# Writing


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


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files replace those in `folder` if all goes well."""
    temporary = Path(tempfile.mkdtemp(prefix=".octavo-", dir=folder))
    try:
        yield temporary
        for stale in (CONFIG, BUFFERS):
            (folder / stale).unlink(missing_ok=True)
        for name in (WEIGHTS, BUFFERS, CONFIG):
            if (temporary / name).exists():
                os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)


# Reading


def _skeleton_in(folder: Path) -> nn.Module:
    if not (folder / compressed_tensors.CONFIG).exists():
        raise FileNotFoundError(
            f"load: {folder} holds no {compressed_tensors.CONFIG} that says what the model is; give the float model "
            "that was quantized, as skeleton"
        )
    return skeleton_of(folder)


def _read_ours(folder: Path) -> tuple[dict[str, Maker], dict[str, torch.Tensor]]:
    config = _read_config(folder / CONFIG)
    tensors = shards.read_file(folder / WEIGHTS)
    for alias, name in config["aliases"].items():
        if name not in tensors:
            raise ValueError(f"load: {folder / CONFIG} names {name!r}, which {WEIGHTS} does not hold")
        tensors[alias] = tensors[name]
    return _makers(config), tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"load: {path} does not exist; give a folder written by octavo.save"
        ) from None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors
        raise ValueError(f"load: {path} is not JSON ({error}); save the model again") from error
    if not isinstance(config, dict) or config.get("format") != "octavo":
        raise ValueError(f"load: {path} is not a file written by octavo.save")
    found = config.get("format_version")
    if not isinstance(found, int) or not 1 <= found <= FORMAT_VERSION:
        raise ValueError(
            f"load: {path} has format version {found}, written by octavo "
            f"{config.get('octavo_version')}; this octavo reads up to {FORMAT_VERSION}: upgrade it"
        )
    config.setdefault("prepared", {})  # files of before there were any
    for key in ("layers", "prepared", "aliases"):
        if not isinstance(config.get(key), dict):
            raise ValueError(f"load: {path} has no {key!r}; the file is damaged, save the model again")
    return config


def _makers(config: dict[str, Any]) -> dict[str, Maker]:
    """What makes the unfilled layer of each name from the skeleton's Linear."""
    makers: dict[str, Maker] = {}
    for name, fields in {**config["layers"], **config["prepared"]}.items():
        is_prepared = name in config["prepared"]
        try:
            makers[name] = _prepared_maker(name, fields) if is_prepared else _frozen_maker(from_dict(fields))
        except (TypeError, ValueError) as error:
            raise ValueError(f"load: layer {name!r} in {CONFIG}: {error}") from error
    return makers


def _frozen_maker(scheme: Scheme) -> Maker:
    def make(linear: nn.Linear) -> OurLinear:
        has_bias = linear.bias is not None
        layer = scheme.layer(linear.in_features, linear.out_features, has_bias, scheme=scheme, device="meta")
        return layer.train(linear.training)

    return make


def _prepared_maker(name: str, fields: dict[str, Any]) -> Maker:
    options = dict(fields)
    scheme = from_dict(options.pop("scheme", {}))

    def make(linear: nn.Linear) -> OurLinear:
        layer = scheme.prepare_linear(linear, **options)
        layer.name = name
        return layer

    return make


def _unfilled_layers(skeleton: nn.Module, makers: dict[str, Maker]) -> dict[str, OurLinear]:
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    made: dict[int, OurLinear] = {}  # by id of the Linear: one that has several names becomes one layer
    layers = {}
    for name, make in makers.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "missing" if linear is None else f"a {type(linear).__name__}"
            raise ValueError(
                f"load: layer {name!r} is {found} in skeleton, a Linear is needed; "
                "give the float model that was quantized"
            )
        if id(linear) not in made:
            made[id(linear)] = make(linear)
        layers[name] = made[id(linear)]
    return layers


def _expected_tensors(skeleton: nn.Module, layers: dict[str, OurLinear]) -> dict[str, torch.Tensor]:
    state = skeleton.state_dict(keep_vars=True)
    expected = {name: tensor for name, tensor in state.items() if _owner(name) not in layers}
    for prefix, layer in layers.items():
        expected.update(layer.state_dict(prefix=prefix + "." if prefix else ""))
    return expected


def _check_tensors(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], layers: set[str]
) -> None:
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    for kind, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            some = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(
                f"load: the checkpoint {kind} tensors: {some}; skeleton must be the float model "
                "that was quantized"
            )
    for name, tensor in found.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise ValueError(
                f"load: {name!r} has shape {tuple(tensor.shape)} in the checkpoint "
                f"and {tuple(wanted.shape)} in skeleton"
            )
        # The float dtype of the file wins (a bfloat16 model fits a float32 skeleton), but scales are float32.
        exact = _owner(name) in layers and name.endswith(("_scale", "_offset"))
        both_float = tensor.is_floating_point() and wanted.is_floating_point()
        if tensor.dtype != wanted.dtype and (exact or not both_float):
            raise ValueError(f"load: {name!r} is {tensor.dtype} in the checkpoint, {wanted.dtype} is needed")


# Filling


def _swap(skeleton: nn.Module, layers: dict[str, OurLinear]) -> nn.Module:
    for name, layer in layers.items():
        if name == "":
            return layer
        skeleton.get_submodule(_owner(name))._modules[name.rpartition(".")[2]] = layer
    return skeleton


def _own_parameters(
    model: nn.Module, tensors: dict[str, torch.Tensor], layers: set[str]
) -> dict[str, torch.Tensor]:
    """Copies, so that the model outlives its file. Names of one tensor get one Parameter: still tied.

    The codes of `layers` are not copied: packing, which follows, is their copy.
    """
    copies: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            is_codes = tensor.dtype == torch.int8 and _owner(name) in layers
            copies[id(tensor)] = nn.Parameter(tensor if is_codes else tensor.clone(), requires_grad=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: copies[id(tensor)] if name in parameters else copies[id(tensor)].data
        for name, tensor in tensors.items()
    }


def _transient_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that state_dict leaves out, by name; the packed form of our layers is not one of them."""
    return {
        f"{prefix}.{name}" if prefix else name: module._buffers[name]
        for prefix, module in model.named_modules()
        if not isinstance(module, QuantLinear)
        for name in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(name) is not None
    }


def _fill_transient_buffers(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, buffer in _transient_buffers(model).items():
        if buffer.is_meta and name in saved:
            if saved[name].shape != buffer.shape:
                shapes = f"{tuple(saved[name].shape)} in the checkpoint and {tuple(buffer.shape)} in skeleton"
                raise ValueError(f"load: buffer {name!r} has shape {shapes}")
            model.get_submodule(_owner(name))._buffers[name.rpartition(".")[2]] = saved[name].clone()


def _check_nothing_on_meta(model: nn.Module) -> None:
    for prefix, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                full_name = f"{prefix}.{name}" if prefix else name
                raise ValueError(
                    f"load: {full_name!r} of skeleton is on the meta device and the checkpoint has no values "
                    "for it; build the skeleton on the CPU, or fill that tensor before loading"
                )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
