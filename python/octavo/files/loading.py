# SPDX-License-Identifier: Apache-2.0
"""Fills a float model, the skeleton, with what a file format has read: the same for every format.

Every name, shape, dtype and value is checked before the skeleton is touched, and no float copy of a quantized weight
ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..base.float_types import FLOAT_DTYPES
from ..base.modules import undone_on_error
from ..nn import OurLinear, QuantEmbedding, QuantLinear, leave_fused_paths
from ..nn.replacements import bias_of, embedding_of, features_of, kind_of, replacement_of
from ..nn.shared_weight import share_equal_
from ..schemes import Scheme
from . import computed
from .format import Checkpoint


def fill(skeleton: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """`skeleton` with the layers and tensors of `checkpoint`, in place; a skeleton that is one layer stays as it is,
    and the QuantLinear is returned. Codes leave `checkpoint.tensors` layer by layer, as they are packed.

    Raises: ValueError if the two do not fit, or if something would stay on the meta device. The skeleton is then as it
    was.
    """
    tensors, buffers = checkpoint.tensors, checkpoint.buffers
    if buffers is None:
        buffers = computed.transient_buffers(skeleton)
    layers = _unfilled_layers(skeleton, checkpoint)
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QuantLinear)}
    for name, layer in layers.items():
        layer.take_shapes_(tensors, prefix_of(name))
    for name, layer in quantized.items():
        layer.weight_dtype = _weight_dtype(name, checkpoint, skeleton.get_submodule(name))
    _check_tensors(_expected_tensors(skeleton, layers), tensors, set(layers))
    check_values("load", quantized, tensors)
    with undone_on_error(skeleton):
        model = _swap(skeleton, layers)
        model.load_state_dict(_own_parameters(model, tensors, _replaced_in(quantized)), assign=True)
        _fill_left_out_buffers(model, buffers)
        _check_nothing_on_meta(model)
    share_equal_(quantized.values())
    for name, layer in quantized.items():
        layer.pack_()
        for leaf in layer.scheme.weights.replaced:  # if it was a copy, nobody needs it any more
            tensors.pop(prefix_of(name) + leaf, None)
    for name, value in checkpoint.attributes.items():
        setattr(model, name, value)
    leave_fused_paths(model)
    return model.eval() if checkpoint.evaluating else model


def check_values(function: str, layers: dict[str, QuantLinear], state: dict[str, Any]) -> None:
    """Asks the layers whether their values are possible; saving and loading call it alike. Raises: ValueError."""
    for name, layer in layers.items():
        for error in layer.value_errors(state, prefix_of(name)):
            raise ValueError(f"{function}: {error}")


def left_out_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that state_dict leaves out, by name; the packed form of our layers is not one of them."""
    return {
        prefix_of(prefix) + name: module._buffers[name]
        for prefix, module in model.named_modules()
        for name in sorted(module._non_persistent_buffers_set - _computed_buffers(module))
        if module._buffers.get(name) is not None
    }


def _computed_buffers(module: nn.Module) -> set[str]:
    """The buffers that a layer of ours makes of what its state_dict has: all but the scale of an embedding."""
    return module._non_persistent_buffers_set - {"embed_scale"} if isinstance(module, QuantLinear) else set()


def prefix_of(name: str) -> str:
    """What stands before the names of the tensors of module `name`; the model itself has no name."""
    return f"{name}." if name else ""


# --- layers without values ------------------------------------------------------------------------------------------


def unfilled(linear: Any, scheme: Scheme) -> QuantLinear:
    """A layer for `linear`, which may be on the meta device, whose tensors are on the meta device: to be filled."""
    has_bias = bias_of(linear) is not None
    layer = scheme.layer_for(linear)(*features_of(linear), has_bias, scheme=scheme, device="meta")
    layer.replaces = kind_of(linear)
    if isinstance(layer, QuantEmbedding):
        layer.take_settings_(linear)
    return layer.train(linear.training)


def _unfilled_prepared(name: str, linear: Any, checkpoint: Checkpoint) -> OurLinear:
    scheme, options = checkpoint.prepared[name]
    try:
        layer = scheme.prepare_linear(linear, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"load: layer {name!r} in {checkpoint.source}: {error}") from error
    layer.name = name
    return layer


def _unfilled_layers(skeleton: nn.Module, checkpoint: Checkpoint) -> dict[str, OurLinear]:
    modules = dict(skeleton.named_modules(remove_duplicate=False))
    made: dict[int, OurLinear] = {}  # by id of the float layer: one that has several names becomes one layer
    layers = {}
    for name in (*checkpoint.schemes, *checkpoint.prepared):
        linear = modules.get(name)
        if linear is None or replacement_of(linear) is None and embedding_of(linear) is None:
            found = "missing" if linear is None else f"a {type(linear).__name__}"
            raise ValueError(
                f"load: layer {name!r} is {found} in skeleton, a Linear or an Embedding is needed; "
                "give the float model that was quantized"
            )
        if id(linear) not in made:
            made[id(linear)] = (
                _unfilled_prepared(name, linear, checkpoint)
                if name in checkpoint.prepared
                else unfilled(linear, checkpoint.schemes[name])
            )
        layers[name] = made[id(linear)]
    return layers


def _weight_dtype(name: str, checkpoint: Checkpoint, linear: Any) -> torch.dtype:
    """The dtype of the layer's weight when it was saved; if no file tells, the dtype of the bias or of the skeleton."""
    if checkpoint.dtypes is not None:
        return checkpoint.dtypes.get(name, torch.float32)
    bias = checkpoint.tensors.get(f"{prefix_of(name)}bias")
    candidates = (bias.dtype if bias is not None else None, linear.weight.dtype)
    return next((dtype for dtype in candidates if dtype in FLOAT_DTYPES), torch.float32)


# --- checks ---------------------------------------------------------------------------------------------------------


def _expected_tensors(skeleton: nn.Module, layers: dict[str, OurLinear]) -> dict[str, torch.Tensor]:
    state = skeleton.state_dict(keep_vars=True)
    expected = {name: tensor for name, tensor in state.items() if _owner(name) not in layers}
    for prefix, layer in layers.items():
        expected.update(layer.state_dict(prefix=prefix_of(prefix)))
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


# --- filling --------------------------------------------------------------------------------------------------------


def _swap(skeleton: nn.Module, layers: dict[str, OurLinear]) -> nn.Module:
    for name, layer in layers.items():
        if name == "":
            return layer
        skeleton.get_submodule(_owner(name))._modules[name.rpartition(".")[2]] = layer
    return skeleton


def _replaced_in(layers: dict[str, QuantLinear]) -> set[str]:
    """The names of the tensors that packing copies anyway."""
    weights = {name: layer.scheme.weights for name, layer in layers.items()}
    return {
        prefix_of(name) + leaf for name, format in weights.items() if format.held for leaf in format.replaced
    }


def _own_parameters(
    model: nn.Module, tensors: dict[str, torch.Tensor], replaced: set[str]
) -> dict[str, torch.Tensor]:
    """Copies, so that the model outlives its file. Names of one tensor get one Parameter: still tied.

    Those that will be `replaced`, by name, are not copied: packing, which follows, is their copy.
    """
    copies: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            kept = tensor if name in replaced else tensor.clone()
            copies[id(tensor)] = nn.Parameter(kept, requires_grad=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: copies[id(tensor)] if name in parameters else copies[id(tensor)].data
        for name, tensor in tensors.items()
    }


def _fill_left_out_buffers(model: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    for name, buffer in left_out_buffers(model).items():
        if buffer.is_meta and name in saved:
            if saved[name].shape != buffer.shape:
                shapes = f"{tuple(saved[name].shape)} in the checkpoint and {tuple(buffer.shape)} in skeleton"
                raise ValueError(f"load: buffer {name!r} has shape {shapes}")
            model.get_submodule(_owner(name))._buffers[name.rpartition(".")[2]] = saved[name].clone()


def _check_nothing_on_meta(model: nn.Module) -> None:
    for prefix, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                full_name = prefix_of(prefix) + name
                raise ValueError(
                    f"load: {full_name!r} of skeleton is on the meta device and the checkpoint has no values "
                    "for it; build the skeleton on the CPU, or fill that tensor before loading"
                )


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
