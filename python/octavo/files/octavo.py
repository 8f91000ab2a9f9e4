# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a folder of ordinary files, and back without a float copy ever existing.

    model.safetensors     the state_dict: int8 codes `weight` [n, k] and `weight_scale` [n, 1] under the names
                          that compressed-tensors uses, everything else as it is; never the packed form
    buffers.safetensors   non-persistent buffers (rotary tables, position ids), so that a skeleton on the meta
                          device can be filled whole; absent if there are none
    octavo.json           the scheme of each quantized and each prepared layer, names that share one tensor, a checksum

`load` checks every name, shape, dtype and checksum of the files before it touches the skeleton. A folder of
transformers without octavo.json, written by compressed-tensors, is read as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.modules import undone_on_error
from ..nn import OurLinear, PreparedLinear, QuantLinear, leave_fused_paths
from ..schemes import Scheme, from_dict
from ..tensors.qparams import FLOAT_DTYPES
from . import compressed_tensors, computed, manifest, safetensors
from .disk import current, folder_argument, save_into
from .skeleton import skeleton as skeleton_of

Maker = Callable[[nn.Linear], OurLinear]
_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES}
WEIGHTS, BUFFERS, CONFIG = safetensors.WEIGHTS, "buffers.safetensors", manifest.NAME


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `model` to `folder`, which is made if missing; its other files stay as they are.

    The files take their places all at once when all are complete, so an interrupted save, even one that was killed,
    leaves the old checkpoint or the new one (files.py says how). What a killed save left behind is removed by the next
    one. Packed codes are unpacked, all at once, while the file is written.

    Raises: TypeError if model is not a module or folder is not a path; ValueError if folder is "", if the model holds
    tensors on the meta device or state that is not a tensor, and if a quantized layer holds a bias with NaN or a scale
    that is none, which `load` would refuse; OSError if the files cannot be written. Then `folder` is as it was.
    Source: ours; tensor names as in compressed-tensors' int-quantized format.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model is {type(model).__name__}, a torch.nn.Module is needed")
    folder = folder_argument("save", folder)
    state = model.state_dict(keep_vars=True)
    tensors, aliases = _without_duplicates(state)
    modules = dict(model.named_modules(remove_duplicate=False))
    quantized = {name: module for name, module in modules.items() if isinstance(module, QuantLinear)}
    _check_values("save", quantized, state)
    layers = {name: layer.scheme.to_dict() for name, layer in quantized.items()}
    dtypes = {name: _NAMES[layer.weight_dtype] for name, layer in quantized.items()}
    dtypes = {name: dtype for name, dtype in dtypes.items() if dtype != "float32"}
    prepared = {name: m.to_dict() for name, m in modules.items() if isinstance(m, PreparedLinear)}
    buffers = {name: _storable(name, buffer).clone() for name, buffer in _transient_buffers(model).items()}
    with save_into(folder, (WEIGHTS, BUFFERS, CONFIG)) as temporary:
        safetensors.write(temporary / WEIGHTS, tensors, tensors.items())
        if buffers:
            safetensors.write(temporary / BUFFERS, buffers, buffers.items())
        files = {path.name: safetensors.fingerprint(path) for path in sorted(temporary.iterdir())}
        config = {"layers": layers, "prepared": prepared, "aliases": aliases, "files": files}
        manifest.write(temporary, {**config, "weight_dtypes": dtypes})


@torch.inference_mode(False)  # inference tensors could take no part in training later
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

    Raises: FileNotFoundError if a file is missing, PermissionError if one cannot be read; ValueError if one is damaged,
    foreign, of a newer format, or no regular file, if it holds scales that are none or does not fit the skeleton, or if
    something would stay on the meta device; TypeError if skeleton is not a module. Then the skeleton is as it was.
    Source: ours.
    """
    folder = folder_argument("load", folder)
    if skeleton is None:
        skeleton = _skeleton_in(folder)
    if not isinstance(skeleton, nn.Module):
        raise TypeError(f"load: skeleton is {type(skeleton).__name__}, a torch.nn.Module is needed")
    is_foreign = (folder / compressed_tensors.CONFIG).exists() and not current(folder, CONFIG).exists()
    dtypes: dict[str, str] | None = None
    if is_foreign:
        schemes, tensors = compressed_tensors.read(folder, skeleton)
        makers = {name: _frozen_maker(scheme) for name, scheme in schemes.items()}
    else:
        makers, tensors, dtypes = _read_ours(folder)
    buffers_file = current(folder, BUFFERS)
    if buffers_file.exists():
        buffers = safetensors.read_file(buffers_file)
    else:
        buffers = computed.transient_buffers(skeleton)
    layers = _unfilled_layers(skeleton, makers)
    for name, layer in layers.items():
        layer.take_shapes_(tensors, f"{name}." if name else "")
        if isinstance(layer, QuantLinear):
            layer.weight_dtype = _weight_dtype(name, dtypes, tensors, skeleton.get_submodule(name))
    _check_tensors(_expected_tensors(skeleton, layers), tensors, set(layers))
    _check_values(
        "load", {n: layer for n, layer in layers.items() if isinstance(layer, QuantLinear)}, tensors
    )
    with undone_on_error(skeleton):
        model = _swap(skeleton, layers)
        model.load_state_dict(_own_parameters(model, tensors, _codes_of(layers)), assign=True)
        _fill_transient_buffers(model, buffers)
        _check_nothing_on_meta(model)
    for layer in layers.values():
        if isinstance(layer, QuantLinear):
            layer.pack_()
    leave_fused_paths(model)
    compressed_tensors.set_quantization_config(model)
    return model.eval() if is_foreign else model


def _check_values(function: str, layers: dict[str, QuantLinear], state: dict[str, Any]) -> None:
    """What `save` writes `load` takes: both ask the layers whether the values can be theirs."""
    for name, layer in layers.items():
        for error in layer.value_errors(state, f"{name}." if name else ""):
            raise ValueError(f"{function}: {error}")


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


# Reading


def _skeleton_in(folder: Path) -> nn.Module:
    if not (folder / compressed_tensors.CONFIG).exists():
        raise FileNotFoundError(
            f"load: {folder} holds no {compressed_tensors.CONFIG} that says what the model is; give the float model "
            "that was quantized, as skeleton"
        )
    return skeleton_of(folder)


def _read_ours(folder: Path) -> tuple[dict[str, Maker], dict[str, torch.Tensor], dict[str, str] | None]:
    """What makes each layer, all tensors, and the dtypes that weights read as, if the file says so."""
    config = manifest.read(folder)
    for name, fingerprint in config["files"].items():
        path = current(folder, name)
        if name in (WEIGHTS, BUFFERS) and path.exists() and safetensors.fingerprint(path) != fingerprint:
            raise ValueError(
                f"load: {path} was not written together with {CONFIG}: the folder holds files of two checkpoints; save "
                "the model again"
            )
    tensors = safetensors.read_file(current(folder, WEIGHTS))
    for alias, name in config["aliases"].items():
        if name not in tensors:
            raise ValueError(f"load: {folder / CONFIG} names {name!r}, which {WEIGHTS} does not hold")
        tensors[alias] = tensors[name]
    return _makers(config), tensors, config.get("weight_dtypes")


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
        try:
            layer = scheme.prepare_linear(linear, **options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"load: layer {name!r} in {CONFIG}: {error}") from error
        layer.name = name
        return layer

    return make


def _weight_dtype(
    name: str, saved: dict[str, str] | None, tensors: dict[str, torch.Tensor], linear: Any
) -> torch.dtype:
    """What the weight of a layer read as when it was saved. Where no file says it, as the bias, else the skeleton's."""
    if saved is not None:
        found = {text: dtype for dtype, text in _NAMES.items()}.get(saved.get(name, "float32"))
        if found is None:
            raise ValueError(f"load: {CONFIG} gives {name!r} the dtype {saved[name]!r}; the file is damaged")
        return found
    bias = tensors.get(f"{name}.bias" if name else "bias")
    candidates = (bias.dtype if bias is not None else None, linear.weight.dtype)
    return next((dtype for dtype in candidates if dtype in FLOAT_DTYPES), torch.float32)


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


def _codes_of(layers: dict[str, OurLinear]) -> set[str]:
    """The names of the codes that packing will copy."""
    frozen = {name: layer for name, layer in layers.items() if isinstance(layer, QuantLinear)}
    return {
        f"{name}.{layer.scheme.weights.codes}" if name else layer.scheme.weights.codes
        for name, layer in frozen.items()
    }


def _own_parameters(
    model: nn.Module, tensors: dict[str, torch.Tensor], packed: set[str]
) -> dict[str, torch.Tensor]:
    """Copies, so that the model outlives its file. Names of one tensor get one Parameter: still tied.

    Codes that are `packed`, by name, are not copied: packing, which follows, is their copy.
    """
    copies: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            kept = tensor if name in packed else tensor.clone()
            copies[id(tensor)] = nn.Parameter(kept, requires_grad=False)
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
