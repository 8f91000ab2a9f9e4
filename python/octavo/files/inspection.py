# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, layer by layer, as the headers of its files tell it: no tensor is ever loaded.

File formats read the headers, group the tensors into layers, and make a row of each. A layer is what shares a name up
to the last dot: `encoder.0.weight` and `encoder.0.weight_scale` are one.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..base.tables import as_html, as_text

HEADER = ("name", "kind", "scheme", "shape", "dtype", "bytes", "bits per weight")
PACKED = ("weight_packed", "qweight")  # compressed-tensors; GPTQ and AWQ: several codes in one integer
_DTYPES = {"F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2", "BF16": "bf16", "BOOL": "bool"}
_KINDS = {0: "scalar", 1: "vector", 2: "matrix", 3: "convolution", 4: "convolution", 5: "convolution"}


class Entry(NamedTuple):
    """What a file's header says of a tensor. `dtype` is safetensors' name for it, which octavo need not know."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class CheckpointLayer:
    """The tensors of one layer.

    kind      "QuantLinear" (octavo's), "quantized" (others'), "buffer", "tied" (another layer's tensor under a second
              name), else the shape of its weight in a word: a file does not say which class it came from
    scheme    how it is quantized, empty for float layers; for a tied tensor the name of the other one
    shape, dtype   of its weight as stored: packed codes of 4 bits lie 8 to an int32
    bytes     of all its tensors: weight, scales, zero points, bias
    weights   how many reals the weight stands for, for float layers all tensors; None if the file does not tell
    bits_per_weight   8 * bytes / weights, scales and zero points included, the bias of a quantized layer not
    """

    name: str
    kind: str
    scheme: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    weights: int | None
    bits_per_weight: float | None


@dataclass(frozen=True)
class CheckpointContents:
    """What `inspect_checkpoint` returns. `print` shows a table.

    format    the name of the format, such as "octavo", "transformers" or "safetensors"
    files     [(name, bytes on disk)] of the files that hold tensors
    metadata  what else the files say, by name; of long lists how many items they have
    """

    path: str
    format: str
    files: list[tuple[str, int]]
    layers: list[CheckpointLayer]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The bytes of all tensors, each of which counts once."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def quantized(self) -> list[CheckpointLayer]:
        return [layer for layer in self.layers if layer.scheme and layer.kind != "tied"]

    @property
    def bits_per_weight(self) -> float | None:
        """The bits per weight of all quantized layers together; None if there are none, or if a file does not tell."""
        bits = [layer.bits_per_weight for layer in self.quantized]
        weights = [layer.weights for layer in self.quantized]
        if not weights or None in weights or None in bits:
            return None
        return sum(map(math.prod, zip(bits, weights, strict=True))) / sum(weights)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """All fields and totals; JSON."""
        totals = {"bytes": self.bytes, "bits_per_weight": self.bits_per_weight}
        return {**asdict(self), **totals}

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One row of texts for each layer, in the order of HEADER."""
        return [_cells(layer) for layer in self.layers]

    @property
    def summary(self) -> str:
        bits = self.bits_per_weight
        quantized = f"{len(self.quantized)} of {len(self.layers)} layers quantized"
        if bits is not None:
            quantized += f" to {bits:.3g} bits per weight, scales included"
        files = ", ".join(f"{name} {size:,} bytes" for name, size in self.files)
        return f"{self.format} checkpoint: {quantized}; {self.bytes:,} bytes of tensors\n{files}"

    def __str__(self) -> str:
        return f"{as_text(HEADER, self.rows)}\n{self.summary}"

    def _repr_html_(self) -> str:
        notes = "".join(f"<div>{html.escape(line)}</div>" for line in self.summary.split("\n"))
        return as_html(HEADER, self.rows) + notes


# --- for file formats -----------------------------------------------------------------------------------------------


def contents_of(
    path: Path, format: str, files: Sequence[Path], layers: list[CheckpointLayer]
) -> CheckpointContents:
    """`layers` of `path`, with the sizes of its `files`."""
    return CheckpointContents(str(path), format, [(file.name, file.stat().st_size) for file in files], layers)


def by_layer(tensors: Mapping[str, Entry]) -> dict[str, dict[str, Entry]]:
    """The tensors of each layer, in the order of their names: layers.2 before layers.10."""
    layers: dict[str, dict[str, Entry]] = {}
    for name in sorted(tensors, key=_natural):
        layers.setdefault(_owner(name, tensors), {})[name] = tensors[name]
    return layers


def row(
    name: str,
    tensors: Mapping[str, Entry],
    kind: str = "",
    scheme: str = "",
    weights: int | None = None,
    codes: str = "weight",
) -> CheckpointLayer:
    """The row of one layer.

    kind      "": a word for the shape of its weight
    weights   how many reals the weight of a quantized layer stands for; None: each element is one, unless several lie
              in one integer
    codes     the tensor of a weight format that holds the codes
    """
    main_name = main_of(name, tensors, codes)
    main = tensors[main_name]
    total = sum(tensor.bytes for tensor in tensors.values())
    counted = total
    if scheme:
        counted = sum(tensor.bytes for key, tensor in tensors.items() if leaf_of(key) != "bias")
        if weights is None and leaf_of(main_name) not in PACKED:
            weights = math.prod(main.shape)
    else:
        weights = sum(math.prod(tensor.shape) for tensor in tensors.values())
    bits = 8 * counted / weights if weights else None
    kind = kind or _KINDS.get(len(main.shape), "tensor")
    dtype = _DTYPES.get(main.dtype) or main.dtype.replace("F", "fp").replace("U", "uint").replace("I", "int")
    return CheckpointLayer(name, kind, scheme, main.shape, dtype, total, weights or None, bits)


def main_of(owner: str, tensors: Mapping[str, Entry], codes: str = "weight") -> str:
    """The name of the layer's weight, `codes` of a weight format, else of its largest tensor."""
    for leaf in (codes, "weight", *PACKED):
        name = f"{owner}.{leaf}" if owner else leaf
        if name in tensors:
            return name
    return max(tensors, key=lambda name: tensors[name].bytes)


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2]


def _owner(name: str, tensors: Mapping[str, Entry]) -> str:
    """The layer of a tensor. bitsandbytes hangs `weight.absmax` under `weight`: that is of weight's layer."""
    parts = name.split(".")
    end = next(end for end in range(1, len(parts) + 1) if ".".join(parts[:end]) in tensors)
    return ".".join(parts[: end - 1])


def _cells(layer: CheckpointLayer) -> tuple[str, ...]:
    return (
        layer.name or "(the model)",
        layer.kind,
        layer.scheme or "-",
        "x".join(map(str, layer.shape)) or "-",
        layer.dtype or "-",
        f"{layer.bytes:,}",
        "-" if layer.bits_per_weight is None else f"{layer.bits_per_weight:.4g}",
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
