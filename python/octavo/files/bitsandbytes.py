# SPDX-License-Identifier: Apache-2.0
"""Folders of transformers whose layers bitsandbytes has quantized to 4 bits, as `save_pretrained` writes them.

Everything of a layer hangs under its weight: `weight` holds the codes, `weight.absmax` the scales, and bytes of JSON in
`weight.quant_state.bitsandbytes__nf4` say what the shape was.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..base.float_types import FLOAT_DTYPES
from ..formats import FP4, NF4
from ..schemes import Scheme, from_dict
from . import computed, safetensors
from .config_json import quantization_entry
from .disk import parse_json
from .format import Checkpoint, FileFormat
from .inspection import CheckpointContents
from .renaming import by_name_of, missing_from, own_names

KINDS = {".quant_state.bitsandbytes__nf4": NF4, ".quant_state.bitsandbytes__fp4": FP4}
WEIGHT = ".weight"


class BitsAndBytes(FileFormat):
    """Layers become octavo.NF4 or FP4, with activations of 16 bits: the weights are what was quantized there."""

    description: ClassVar[str] = "a folder of transformers quantized by bitsandbytes to 4 bits"

    def recognize(self, path: Path) -> bool:
        try:
            entry = quantization_entry(path) or {}
        except (OSError, ValueError):
            return False
        return entry.get("quant_method") == "bitsandbytes"

    def inspect(self, path: Path) -> CheckpointContents:
        return safetensors.contents(path)

    def read(self, path: Path, skeleton: nn.Module) -> Checkpoint:
        """Raises: FileNotFoundError if a file is missing; ValueError if one is damaged, for 8 bits, and for blocks that
        straddle rows, by name.
        Source: bitsandbytes 0.50, `QuantState.as_dict`.
        """
        stored = safetensors.read_folder(path)
        schemes, dtypes = _take_layers(stored)
        names = own_names(skeleton, [layer + WEIGHT for layer in schemes])
        of = {layer: names.get(layer + WEIGHT, layer + WEIGHT).removesuffix(WEIGHT) for layer in schemes}
        tensors, unknown = by_name_of(skeleton, stored, set(of.values()))
        unknown -= computed.may_be_left_over(skeleton, unknown)
        if any(name.endswith(".SCB") for name in unknown):
            raise ValueError(
                "load: bitsandbytes' 8 bits are not read; quantize the float model with octavo.LLMInt8()"
            )
        tensors |= computed.may_be_missing(skeleton, missing_from(skeleton, tensors, set(of.values())))
        return Checkpoint(
            {of[layer]: scheme for layer, scheme in schemes.items()},
            tensors,
            dtypes={of[layer]: dtype for layer, dtype in dtypes.items()},
            source="its quant_state",
            evaluating=True,
        )


def _take_layers(stored: dict[str, torch.Tensor]) -> tuple[dict[str, Scheme], dict[str, torch.dtype]]:
    """The scheme and dtype of each layer; its tensors in `stored` become those of octavo, in place."""
    schemes: dict[str, Scheme] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name in list(stored):
        kind = next((end for end in KINDS if name.endswith(WEIGHT + end)), None)
        if kind is None:
            continue
        weight = name.removesuffix(kind)
        layer, state = weight.removesuffix(WEIGHT), _state(name, stored.pop(name))
        under = {key: stored.pop(key) for key in list(stored) if key.startswith(weight + ".")}
        tensors = {key.removeprefix(weight + "."): tensor for key, tensor in under.items()}
        try:
            tensors["codes"] = stored.pop(weight)
            format, found = KINDS[kind].from_bitsandbytes(tensors, state)
            dtype = getattr(torch, state["dtype"])
        except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            why = error if isinstance(error, ValueError) else f"it is damaged ({error!r})"
            raise ValueError(f"load: {weight} cannot be read: {why}") from error
        stored |= {f"{layer}.{leaf}": tensor for leaf, tensor in found.items()}
        schemes[layer] = from_dict({**format.to_dict(), "activations": "int16"})
        dtypes[layer] = dtype if dtype in FLOAT_DTYPES else torch.float32
    return schemes, dtypes


def _state(name: str, text: torch.Tensor) -> dict[str, Any]:
    return parse_json(bytes(text.to(torch.uint8).flatten().tolist()), name)
