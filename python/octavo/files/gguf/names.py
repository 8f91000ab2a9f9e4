# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a GGUF file is which tensor of the model, and what happens to it on the way.

Names are those of the package gguf's table. Rows change places as codes: a row is a whole number of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...nn import QuantLinear
from .config import Architecture
from .header import package

# Of all experts of a layer in one Parameter, or of one expert that has become a layer.
_EXPERTS = re.compile(r"(?:.*\.)?layers\.(\d+)\.mlp\.experts\.(?:(\d+)\.)?(gate_up|down)_proj(?:\.weight)?")
_ROTATED = re.compile(r"blk\.\d+\.attn_(q|k)\.(weight|bias)")


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the model lies in the file.

    sources      the names in the file: one, or several whose rows are joined
    heads        0, or how many heads have rows in llama.cpp's order, which `order` undoes
    offset       what the file's values are larger by
    is_expert    whether the tensor of the file holds all experts of a layer, [experts, n, k]
    expert       which of them this is; None: all of them
    """

    sources: tuple[str, ...]
    heads: int = 0
    offset: float = 0.0
    is_expert: bool = False
    expert: int | None = None

    def order(self, rows: int) -> torch.Tensor:
        """Row i of the model is row order[i] of the file, int64 [rows].

        llama.cpp rotates row 2 i of a head with row 2 i + 1, transformers row i with row i + rows / 2.
        """
        return torch.arange(rows).view(self.heads, -1, 2).transpose(1, 2).reshape(-1)

    def to_model(self, content: torch.Tensor) -> torch.Tensor:
        """Rows of the file, [rows, ...], in the model's order: a copy if they move."""
        return content[self.order(len(content))] if self.heads else content

    def to_file(self, content: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_model`."""
        return content[self.order(len(content)).argsort()] if self.heads else content


def placements(name: str, architecture: Architecture, model: Any) -> dict[str, Placement]:
    """{tensor of `model`: where it lies in a file of the architecture `name`}, of those that GGUF has names for.

    Several names of one tensor, as those of tied embeddings, have a placement each.
    """
    gguf = package()
    kind = next(each for each, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    table = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    found = {}
    for full_name in tensor_names(model):
        placement = _placement(full_name, table, architecture, model)
        if placement is not None:
            found[full_name] = placement
    return found


def _placement(full_name: str, table: Any, architecture: Architecture, model: Any) -> Placement | None:
    experts = _EXPERTS.fullmatch(full_name)
    if experts:
        parts = ("gate", "up") if experts[3] == "gate_up" else ("down",)
        names = tuple(f"blk.{experts[1]}.ffn_{part}_exps.weight" for part in parts)
        return Placement(names, is_expert=True, expert=None if experts[2] is None else int(experts[2]))
    stem, _, leaf = full_name.rpartition(".")
    if leaf not in ("weight", "bias"):
        stem, leaf = (
            full_name,
            "weight",
        )  # transformers' experts are Parameters of a module without a name of theirs
    source = table.get_name(stem)
    if source is None:
        return None
    source = f"{source}.{leaf}"
    rotated = _ROTATED.fullmatch(source) if architecture.rotates_rows else None
    heads = 0
    if rotated:
        config = model.config
        heads = config.num_attention_heads if rotated[1] == "q" else config.num_key_value_heads
    offset = architecture.norm_offset if source.endswith("norm.weight") else 0.0
    return Placement((source,), heads, offset)


def unplaced(found: Mapping[str, Placement], tensors: Mapping[str, Any]) -> list[str]:
    """Tensors of the file that the model has no place for."""
    used = {source for placement in found.values() for source in placement.sources}
    return [name for name in tensors if name not in used]


def tensor_names(model: nn.Module) -> list[str]:
    """The names of what a float model of this kind has in its state_dict; of a quantized layer `weight` and `bias`."""
    found = []
    for prefix, module in model.named_modules(remove_duplicate=False):
        leaves = [name for name, value in module._parameters.items() if value is not None]
        leaves += [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        if isinstance(module, QuantLinear):
            leaves = ["weight"] if module.bias is None else ["weight", "bias"]
        found += [f"{prefix}.{leaf}" if prefix else leaf for leaf in leaves]
    return found


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """{name of `tensor_names`: the module that it belongs to}."""
    return {name: model.get_submodule(name.rpartition(".")[0]) for name in tensor_names(model)}
