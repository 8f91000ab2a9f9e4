# SPDX-License-Identifier: Apache-2.0
"""`octavo.save_gguf`: a model of transformers, float or quantized, as a GGUF file.

Each tensor is made, written and forgotten before the next one. What `load_gguf` has opened keeps its metadata and the
order of its tensors, so a file that nobody has changed is written again byte for byte.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import ops
from ...formats import GGML as Blocks
from ...formats import Half
from ...nn import QuantLinear
from ...nn.replacements import replacement_of
from ..disk import folder_argument
from ..format import errors_naming
from . import values
from .checkpoint import FLOATS, Origin
from .config import HEAD, ROPE_FACTORS
from .described import architecture_name, metadata_of, query_groups
from .header import ALIGNMENT, block_sizes, header_bytes, padded
from .imatrix import importance_argument
from .mixtures import Mixture
from .names import Placement, owners, placements
from .vocabulary import vocabulary_of


class _Planned(NamedTuple):
    """A tensor of the file before it is made.

    sources   the tensors of the model: one, or one for each expert
    part      which of how many parts of their rows belongs here
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sources: list[str]
    part: tuple[int, int]

    def bytes(self, sizes: Mapping[str, tuple[int, int, int]]) -> int:
        _, weights, size = sizes[self.type]
        return torch.Size(self.shape).numel() // weights * size


def save_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    scheme: Any = None,
    *,
    tokenizer: Any = None,
    imatrix: Any = None,
) -> None:
    """Writes `model` to the file `path`, which takes its place when it is complete.

    scheme      None: each tensor in the type that it has. "Q4_K_M" and the like: a mixture of llama.cpp, by its rules.
                "Q8_0" or octavo.GGML("Q8_0"): one type for all matrices, or what llama.cpp takes instead where rows
                are no whole number of blocks. "F16", "BF16", "F32"
    tokenizer   of transformers; None: that of the file which the model comes from, or none
    imatrix     how much the errors of each column count: what octavo.importance_matrix has found, or the path of a
                file of llama.cpp's; None: all alike

    A model of `load_gguf` that nobody has changed is written byte for byte as it was, metadata included.
    Of other models, norms, biases, routers and tables of positions are written in float32.

    Raises: TypeError if model is no module or scheme is neither a name nor an octavo.GGML; ValueError for a model that
    GGUF has no names for, for a layer whose format it does not have if scheme is None, for a tokenizer that it has no
    words for, and for NaN or Inf; OSError. Then the file is as it was.
    Source: ours; rules of mixtures as in llama.cpp's llama-quant.cpp.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_gguf: model is {type(model).__name__}, a torch.nn.Module is needed")
    path = folder_argument("save_gguf", path)
    with errors_naming("save_gguf"), torch.no_grad():
        writer = _Writer(model, _mixture_name(scheme), importance_argument(imatrix))
        metadata = writer.metadata(tokenizer)
        writer.write(path, metadata)


def _mixture_name(scheme: Any) -> str | None:
    if scheme is None:
        return None
    if isinstance(scheme, str):
        return scheme.upper()
    found = getattr(scheme, "weights", None)
    if isinstance(found, Blocks):
        return found.type
    raise TypeError(
        f"save_gguf: scheme is {scheme!r}; a name such as 'Q4_K_M', octavo.GGML('Q4_K') or None is needed"
    )


class _Writer:
    """One model on the way into a file."""

    def __init__(self, model: Any, mixture: str | None, importance: Mapping[str, torch.Tensor]) -> None:
        self.model, self.importance, self.mixture_name = model, importance, mixture
        self.origin: Origin | None = getattr(model, "gguf_origin", None)
        self.architecture, traits = architecture_name(model)
        self.owners = owners(model)
        found = self.origin.placements if self.origin else placements(self.architecture, traits, model)
        if not self.origin and getattr(model.config, "tie_word_embeddings", False):
            found = {name: each for name, each in found.items() if each.sources != (HEAD,)}
        self.placements: dict[str, Placement] = dict(found)
        self.has_head = any(each.sources == (HEAD,) for each in self.placements.values())
        self.plan = self._planned()

    # --- what is written --------------------------------------------------------------------------------------------

    def metadata(self, tokenizer: Any) -> dict[str, values.MetadataValue]:
        if self.origin:
            first = self.origin.source.first.metadata
            found = {key: value for key, value in first.items() if not key.startswith("split.")}
        else:
            found = metadata_of(self.model, self.architecture)
        if tokenizer is not None:
            found = {key: value for key, value in found.items() if not key.startswith("tokenizer.")}
            found |= vocabulary_of(tokenizer)
        if self.mixture_name is not None:
            found["general.file_type"] = values.number(_file_type(self.mixture_name))
            found["general.quantization_version"] = values.number(2)
        return found

    def _planned(self) -> list[_Planned]:
        mixture = None
        if self.mixture_name is not None:
            config = self.model.config
            experts = getattr(config, "num_experts", 0) or 0
            mixture = Mixture(
                self.mixture_name,
                self.architecture,
                config.num_hidden_layers,
                experts,
                query_groups(config),
                self.has_head,
            )
        found: dict[str, _Planned] = {}
        for source, placement in self.placements.items():
            for index, name in enumerate(placement.sources):
                if name in found:  # the next expert; or a name of the same tensor
                    found[name].sources.extend([source] if placement.expert else [])
                    continue
                shape = self._shape(source, placement)
                type = self._own_type(source, name) if mixture is None else mixture.type_of(name, shape)
                found[name] = _Planned(name, type, shape, [source], (index, len(placement.sources)))
        if self.origin and ROPE_FACTORS in self.origin.kept:
            shape = self.origin.source.tensors[ROPE_FACTORS].shape
            found[ROPE_FACTORS] = _Planned(ROPE_FACTORS, "F32", shape, [], (0, 1))
        order = self.origin.source.tensors if self.origin else found
        return [found[name] for name in order if name in found]

    def _shape(self, source: str, placement: Placement) -> tuple[int, ...]:
        if self.origin:
            return self.origin.source.tensors[placement.sources[0]].shape
        layer = self.owners[source]
        if isinstance(layer, QuantLinear) and source.endswith("weight"):
            shape: tuple[int, ...] = (layer.out_features, layer.in_features)
        else:
            shape = tuple(self._float(source).shape)
        *outer, n, k = shape if len(shape) > 1 else (1, *shape)
        if len(placement.sources) > 1:
            n //= len(placement.sources)
        if placement.expert is not None:
            outer = [sum(each.sources == placement.sources for each in self.placements.values())]
        if len(shape) == 1 or "ffn_gate_inp_shexp" in placement.sources[0]:
            return (k,)
        return (*outer, n, k)

    def _own_type(self, source: str, name: str) -> str:
        """The type that the tensor has, or had in the file that the model comes from."""
        layer = self.owners[source]
        if isinstance(layer, QuantLinear) and source.endswith("weight"):
            format = layer.scheme.weights
            if isinstance(format, Blocks):
                return format.type
            if isinstance(format, Half):
                return "F16" if format.half == torch.float16 else "BF16"
            raise ValueError(
                f"layer {source.rpartition('.')[0]!r} is {format.name}, which GGUF has no type for; give a scheme such "
                "as octavo.GGML('Q8_0'), which encodes what its codes stand for"
            )
        if self.origin:
            return self.origin.source.tensors[name].type
        tensor = self._float(source)
        if Mixture("F16", self.architecture, 0).type_of(name, tensor.shape) == "F32":
            return "F32"
        return next((type for type, dtype in FLOATS.items() if dtype == tensor.dtype), "F32")

    def _float(self, source: str) -> torch.Tensor:
        """A tensor of the model as floats, in the file's axes but the model's order of rows."""
        module, leaf = self.owners[source], source.rpartition(".")[2]
        if isinstance(module, QuantLinear) and leaf == "weight":
            return module.dequantize()
        tensor: Any = getattr(module, leaf).detach()
        entry = replacement_of(module)
        return entry.matrix(tensor) if entry is not None and leaf == "weight" else tensor

    # --- bytes ------------------------------------------------------------------------------------------------------

    def _content(self, planned: _Planned) -> torch.Tensor:
        """The bytes of a tensor, uint8."""
        if not planned.sources:  # what the model computes itself
            assert self.origin is not None
            return self.origin.kept[planned.name][0]
        parts = [self._rows(planned, source).flatten() for source in planned.sources]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, planned: _Planned, source: str) -> torch.Tensor:
        """The bytes of what comes from one tensor of the model."""
        placement, layer = self.placements[source], self.owners[source]
        index, parts = planned.part
        if isinstance(layer, QuantLinear) and source.endswith("weight"):
            format = layer.scheme.weights
            if isinstance(format, Blocks) and format.type == planned.type:
                blocks = placement.to_file(layer.canonical_tensors()["weight_blocks"])
                return blocks.chunk(parts)[index].contiguous()
        value = self._float(source)
        value = placement.to_file(value.chunk(parts, dim=-2)[index] if parts > 1 else value)
        kept = self.origin.kept.get(planned.name) if self.origin else None
        if kept is not None and torch.equal(kept[1], value):
            return kept[0]
        value = value + placement.offset if placement.offset else value
        return self._encoded(planned, value, source, placement)

    def _encoded(
        self, planned: _Planned, value: torch.Tensor, source: str, placement: Placement
    ) -> torch.Tensor:
        if not torch.isfinite(value).all():
            raise ValueError(f"{source!r} holds NaN or Inf; finite values are needed")
        if planned.type in FLOATS:
            return value.to(FLOATS[planned.type]).contiguous().view(torch.uint8)
        rows = value.float().reshape(-1, planned.shape[-1])
        importance = self.importance.get(planned.name)
        if importance is not None and importance.dim() > 1:  # a row of numbers for each expert
            importance = None if placement.expert is None else importance[placement.expert]
        if importance is None:
            importance = self.importance.get(source.removesuffix(".weight"))
        return ops.ggml_quantize(rows, planned.type, importance)

    def write(self, path: Path, metadata: Mapping[str, values.MetadataValue]) -> None:
        """Writes a file beside `path` and gives it its name."""
        sizes = {name: (number, weights, size) for number, (name, weights, size) in block_sizes().items()}
        first = self.origin.source.first if self.origin else None
        alignment = first.alignment if first else ALIGNMENT
        infos = [(each.name, sizes[each.type][0], each.shape, each.bytes(sizes)) for each in self.plan]
        head = header_bytes(first.version if first else 3, metadata, infos, alignment)
        is_closed = first is None or len(self.origin.source.parts) > 1 or first.end > 0  # type: ignore[union-attr]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            with open(unfinished, "wb") as file:
                file.write(head)
                for index, planned in enumerate(self.plan):
                    content = self._content(planned).contiguous().flatten()
                    assert content.numel() == infos[index][3], planned
                    file.write(content.numpy().data)
                    if is_closed or index + 1 < len(self.plan):
                        file.write(bytes(padded(content.numel(), alignment) - content.numel()))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def _file_type(name: str) -> int:
    from .header import package

    kinds = package().LlamaFileType
    spelled = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S", "Q3_K": "MOSTLY_Q3_K_S"}
    found = kinds.__members__.get(spelled.get(name, f"MOSTLY_{name}"))
    return int(kinds.GUESSED if found is None else found)
