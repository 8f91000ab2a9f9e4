# SPDX-License-Identifier: Apache-2.0
"""GGUF as a format of files: what it holds, and its blocks as the layers of a model of transformers.

Matrices of blocks become QuantLinear with the bytes of the file, mapped until they are packed. Matrices of 16 bits stay
what they are. What no layer of ours computes with becomes float32, and `Origin` says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ... import ops
from ...base.tables import as_text
from ...formats import BLOCK_TYPES
from ...nn.embedding import obstacle_of
from ...nn.replacements import embedding_of, replacement_of
from ...schemes import Scheme
from ...schemes.ggml import GGML
from ...schemes.half_weight_only import HalfWeightOnly
from ..format import Checkpoint, FileFormat, errors_naming
from ..inspection import CheckpointContents, CheckpointLayer
from .config import ROPE_FACTORS, architecture_of, gguf_skeleton
from .header import TensorInfo, is_gguf, package
from .names import Placement, owners, placements, unplaced
from .parts import GGUFFile, read_gguf

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_HALVES = {"F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Origin:
    """What a model keeps of the file that it was read from.

    source       the file, its header above all
    placements   {tensor of the model: where it lies in the file}
    floats       {tensor of the model: why it is no block of the file any more}
    kept         {tensor of the file: its bytes, and the values that they became}, where values were rounded on the way
    """

    source: GGUFFile
    placements: Mapping[str, Placement]
    floats: dict[str, str] = field(default_factory=dict)
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.floats:
            return f"{self.source.path.name}: every tensor has the file's bytes"
        return as_text(("tensor", "became float because"), list(self.floats.items()))


class GGUF(FileFormat):
    """A file of llama.cpp, or the first one of several.

    activations   what products read of their inputs, as octavo.GGML takes it
    """

    description: ClassVar[str] = "a GGUF file"

    def __init__(self, activations: str = "int8") -> None:
        self.activations = activations

    def recognize(self, path: Path) -> bool:
        return is_gguf(path)

    def inspect(self, path: Path) -> CheckpointContents:
        model = read_gguf(path)
        files = [(part.path.name, part.path.stat().st_size) for part in model.parts]
        layers = [_row(info) for info in model.tensors.values()]
        metadata = {key: _shown(value) for key, value in model.first.metadata.items()}
        return CheckpointContents(str(path), "GGUF", files, layers, metadata)

    def skeleton(self, path: Path) -> nn.Module:
        with errors_naming("load"):
            return gguf_skeleton(read_gguf(path))

    def read(self, path: Path, skeleton: nn.Module) -> Checkpoint:
        with errors_naming("load"):
            return checkpoint_of(read_gguf(path), skeleton, self.activations)


def checkpoint_of(
    model: GGUFFile, skeleton: Any, activations: str = "int8", as_floats: bool = False
) -> Checkpoint:
    """All of `model`, by the names of `skeleton`; as_floats: every block decoded to float32.

    Raises: ValueError if the two do not fit.
    """
    found = placements(model.first.architecture, architecture_of(model), skeleton)
    found = {name: each for name, each in found.items() if set(each.sources) <= model.tensors.keys()}
    _require_all_placed(model, found)
    origin = Origin(model, found)
    reader = _TensorReader(model, origin, skeleton, None if as_floats else activations)
    for name, placement in found.items():
        reader.add(name, placement)
    reader.share_tied()
    reader.keep(ROPE_FACTORS)
    return Checkpoint(
        reader.schemes,
        reader.tensors,
        source=model.path.name,
        evaluating=True,
        attributes={"gguf_origin": origin},
    )


def _require_all_placed(model: GGUFFile, found: Mapping[str, Placement]) -> None:
    left = [name for name in unplaced(found, model.tensors) if name != ROPE_FACTORS]
    if left:
        some = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise ValueError(
            f"{model.path} holds tensors that a {model.first.architecture} of transformers has no place for: "
            f"{some}"
        )


class _TensorReader:
    """Collects the tensors and schemes of a Checkpoint."""

    def __init__(self, model: GGUFFile, origin: Origin, skeleton: Any, activations: str | None) -> None:
        self.infos, self.contents, self.origin = model.tensors, model.mapped(), origin
        self.skeleton, self.owners, self.activations = skeleton, owners(skeleton), activations
        self.schemes: dict[str, Scheme] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, name: str, placement: Placement) -> None:
        layer, _, leaf = name.rpartition(".")
        infos = [self.infos[source] for source in placement.sources]
        first, types = infos[0], {info.type for info in infos}
        scheme = self._scheme(name, leaf, first, placement) if len(types) == 1 else None
        if scheme is None:
            values = [self._floats(name, info, placement) for info in infos]
            value = values[0] if len(values) == 1 else torch.cat(values, dim=-2)
            self.tensors[name] = self._fitted(name, leaf, value)
            return
        contents = [self._content(info, placement) for info in infos]
        content = contents[0] if len(contents) == 1 else torch.cat(contents)
        content = content.view(FLOATS[first.type]) if first.type in FLOATS else content
        self.schemes[layer] = scheme
        self.tensors[f"{layer}.{scheme.weights.replaced[0]}"] = placement.to_model(content)

    def _content(self, info: TensorInfo, placement: Placement) -> torch.Tensor:
        """The bytes of the tensor, or of the one expert of it."""
        content = self.contents[info.name]
        return content if placement.expert is None else content[placement.expert]

    def _scheme(self, name: str, leaf: str, info: TensorInfo, placement: Placement) -> Scheme | None:
        """What multiplies a matrix as it lies in the file; None for what stays, or becomes, float."""
        owner = self.owners[name]
        is_layer = replacement_of(owner) is not None or (embedding_of(owner) and not obstacle_of(owner))
        axes = len(info.shape) - (placement.expert is not None)
        if self.activations is None or leaf != "weight" or not is_layer or axes != 2:
            return None
        if info.type in _HALVES:
            return HalfWeightOnly(_HALVES[info.type])
        is_known = info.type in BLOCK_TYPES
        return GGML(info.type, activations=self.activations) if is_known else None

    def _floats(self, name: str, info: TensorInfo, placement: Placement) -> torch.Tensor:
        """The values in float32, in the model's order."""
        content = self._content(info, placement)
        shape = info.shape if placement.expert is None else info.shape[1:]
        if info.type in FLOATS:
            is_aligned = content.storage_offset() % 8 == 0
            value = (content if is_aligned else content.clone()).view(FLOATS[info.type]).view(shape).float()
        else:
            value = decoded_blocks(content.reshape(-1, content.shape[-1]), info.type, shape[-1]).view(shape)
            self._note_floats(name, info, placement)
        if placement.offset:
            value = value - placement.offset
            self.origin.kept[info.name] = content.clone(), value
        return placement.to_model(value)

    def _note_floats(self, name: str, info: TensorInfo, placement: Placement) -> None:
        if self.activations is None:
            reason = "floats were asked for"
        elif info.type not in BLOCK_TYPES:
            reason = "a type that is decoded only"
        elif len(placement.sources) > 1:
            reason = "it is joined with a tensor of another type"
        else:
            reason = f"a {type(self.owners[name]).__name__} computes with floats"
        self.origin.floats[name] = f"{info.type}: {reason}"

    def keep(self, name: str) -> None:
        """Keeps a tensor of the file that the model computes itself, for the next file."""
        if name in self.infos:
            content = self.contents[name].clone()
            self.origin.kept[name] = content, content

    def _fitted(self, name: str, leaf: str, value: torch.Tensor) -> torch.Tensor:
        """The value in the shape of the model's tensor, if it differs by an axis of one, or as a Conv1D has it."""
        owner = self.owners[name]
        entry = replacement_of(owner)
        if leaf == "weight" and entry is not None:
            value = entry.weight(value)
        wanted: Any = getattr(owner, leaf, None)
        if (
            isinstance(wanted, torch.Tensor)
            and value.dim() != wanted.dim()
            and value.numel() == wanted.numel()
        ):
            return value.view(wanted.shape)
        return value

    def share_tied(self) -> None:
        """Names of one tensor in the skeleton share what was read under one of them, blocks or floats."""
        state = self.skeleton.state_dict(keep_vars=True)
        first = {
            id(tensor): name for name, tensor in reversed(state.items()) if name in self.origin.placements
        }
        for name, tensor in state.items():
            other = first.get(id(tensor))
            if other is None or name in self.origin.placements:
                continue
            layer, other_layer = name.rpartition(".")[0], other.rpartition(".")[0]
            if other_layer in self.schemes:
                scheme = self.schemes[layer] = self.schemes[other_layer]
                codes = scheme.weights.replaced[0]
                self.tensors[f"{layer}.{codes}"] = self.tensors[f"{other_layer}.{codes}"]
            else:
                self.tensors[name] = self.tensors[other]


def decoded_blocks(rows: torch.Tensor, type: str, k: int) -> torch.Tensor:
    """Blocks uint8 [n, bytes of a row] as float32 [n, k]; those of types that only the package gguf knows by it."""
    if type in BLOCK_TYPES:
        return ops.ggml_dequantize(rows, type, k)
    gguf = package()
    values = gguf.quants.dequantize(rows.numpy(), gguf.GGMLQuantizationType[type])
    return torch.from_numpy(values.copy()).float().reshape(-1, k)


def _row(info: TensorInfo) -> CheckpointLayer:
    is_quantized = (
        info.type not in FLOATS
        and not info.type.startswith("I8")
        and info.type[0] != "I"
        or "IQ" in info.type
    )
    kinds = {1: "vector", 2: "matrix"}
    return CheckpointLayer(
        info.name,
        kinds.get(len(info.shape), "tensor"),
        info.type if is_quantized else "",
        info.shape,
        info.type,
        info.bytes,
        info.weights,
        8 * info.bytes / info.weights,
    )


def _shown(value: Any) -> Any:
    """A value of the metadata for JSON: of long arrays the number of items."""
    if value.length is not None and value.length > 16:
        return f"{value.length:,} items"
    try:
        return value.decode()
    except UnicodeDecodeError:
        return repr(value.raw)
