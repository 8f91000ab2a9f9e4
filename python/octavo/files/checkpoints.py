# SPDX-License-Identifier: Apache-2.0
"""The three calls of users: `save`, `load` and `inspect_checkpoint`. The last two ask the list of file formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.modules import undone_on_error
from ..nn.experts import holds_experts, split_experts_, split_in
from .disk import folder_argument
from .format import errors_naming, format_of, model_changed
from .inspection import CheckpointContents
from .loading import fill
from .octavo import Octavo
from .renaming import possible_layers
from .skeleton import tie_weights_on_meta_


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes `model` to `folder`, which is made if missing; its other files stay as they are.

    The files take their places all at once when all are complete, so an interrupted save, even one that was killed,
    leaves the old checkpoint or the new one (disk.py says how). What a killed save left behind is removed by the next
    one. Packed codes are unpacked, all at once, while the file is written.

    Raises: TypeError if model is not a module or folder is not a path; ValueError if folder is "", if the model holds
    tensors on the meta device or state that is not a tensor, and if a quantized layer holds a bias with NaN or a scale
    that is none, which `load` would refuse; OSError if the files cannot be written. Then `folder` is as it was.
    Source: ours; tensor names as in compressed-tensors' int-quantized format.
    """
    save_with(model, folder, None)


def save_with(model: nn.Module, folder: str | os.PathLike[str], others: Callable[[Path], Any] | None) -> None:
    """`save`, and in the same moment what `others` writes into the folder that it is given. Raises: as `save`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: model is {type(model).__name__}, a torch.nn.Module is needed")
    Octavo().write(model, folder_argument("save", folder), others)


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
    if skeleton is not None and not isinstance(skeleton, nn.Module):
        raise TypeError(f"load: skeleton is {type(skeleton).__name__}, a torch.nn.Module is needed")
    with errors_naming("load"):
        format = format_of(folder, to_load=True)
    if skeleton is None:
        with errors_naming("load"):
            skeleton = format.skeleton(folder)
    with undone_on_error(skeleton):
        tie_weights_on_meta_(skeleton)
        if holds_experts(skeleton):
            stored = format.inspect(folder).layers
            quantized = possible_layers(skeleton, (layer.name for layer in stored if layer.scheme))
            split_experts_(skeleton, split_in(quantized, skeleton))
        model = fill(skeleton, format.read(folder, skeleton))
    model_changed(model)
    return model


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointContents:
    """What is in `path`, a folder of octavo.save or of transformers, or one safetensors file.

    Only the headers of the files are read, so a checkpoint of any size takes milliseconds and no memory.
    Raises: FileNotFoundError if path or one of its files is missing, PermissionError if one cannot be read; ValueError
    if a file is truncated, damaged, of a newer format, of another kind (pickle, GGUF) or no regular file, and if an
    index names anything but safetensors files of its folder; TypeError if path is none.
    Source: ours; the header as in the safetensors format description.
    """
    path = folder_argument("inspect_checkpoint", path)
    with errors_naming("inspect_checkpoint"):
        return format_of(path).inspect(path)
