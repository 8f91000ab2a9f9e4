# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds, layer by layer, read from the headers of its files: no tensor is ever loaded.

Folders of `octavo.save`, folders of transformers (sharded and quantized ones included) and single safetensors files.
A layer is what shares a name up to the last dot: `encoder.0.weight` and `encoder.0.weight_scale` are one.
"""

from __future__ import annotations

import html
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..base.tables import as_html, as_text
from ..formats import WeightFormat
from ..schemes import from_dict
from . import manifest, safetensors
from .disk import current, folder_argument, read_json
from .octavo import BUFFERS, CONFIG, WEIGHTS

HEADER = ("name", "kind", "scheme", "shape", "dtype", "bytes", "bits per weight")
PACKED = ("weight_packed", "qweight")  # compressed-tensors; GPTQ and AWQ: several codes in one integer
_BITSANDBYTES = {"bitsandbytes__nf4": "bitsandbytes nf4", "bitsandbytes__fp4": "bitsandbytes fp4"}
_DTYPES = {"F8_E4M3": "fp8_e4m3fn", "F8_E5M2": "fp8_e5m2", "BF16": "bf16", "BOOL": "bool"}
_KINDS = {0: "scalar", 1: "vector", 2: "matrix", 3: "convolution", 4: "convolution", 5: "convolution"}


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

    format    "octavo", "transformers" or "safetensors"
    files     [(name, bytes on disk)] of the files that hold tensors
    """

    path: str
    format: str
    files: list[tuple[str, int]]
    layers: list[CheckpointLayer]

    @property
    def bytes(self) -> int:
        """Of all tensors, each counted once."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def quantized(self) -> list[CheckpointLayer]:
        return [layer for layer in self.layers if layer.scheme and layer.kind != "tied"]

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized layers together, None if there are none or one does not tell."""
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


def inspect_checkpoint(path: str | os.PathLike[str]) -> CheckpointContents:
    """What is in `path`, a folder of octavo.save or of transformers, or one safetensors file.

    Only the headers of the files are read, so a checkpoint of any size takes milliseconds and no memory.
    Raises: FileNotFoundError if path or one of its files is missing, PermissionError if one cannot be read; ValueError
    if a file is truncated, damaged, of a newer format, of another kind (pickle, GGUF) or no regular file, and if an
    index names anything but safetensors files of its folder; TypeError if path is none.
    Source: ours; the header as in the safetensors format description.
    """
    path = folder_argument("inspect_checkpoint", path)
    try:
        return _contents(path)
    except ValueError as error:
        raise ValueError(f"inspect_checkpoint: {error}") from error
    except OSError as error:
        raise type(error)(f"inspect_checkpoint: {error}") from error


def _contents(path: Path) -> CheckpointContents:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a checkpoint's folder or a safetensors file")
    if not path.is_dir():
        return _of_files(path, "safetensors", [path], _grouped(_read_header(path), {}, {}))
    if current(path, CONFIG).exists():
        return _octavo_contents(path)
    files = _transformers_files(path)
    tensors = {name: tensor for file in files for name, tensor in _read_header(file).items()}
    if not (path / "config.json").exists():
        return _of_files(path, "safetensors", files, _grouped(tensors, {}, {}))
    method = read_json(path / "config.json").get("quantization_config") or {}
    return _of_files(path, "transformers", files, _grouped(tensors, {}, _object(method)))


def _octavo_contents(folder: Path) -> CheckpointContents:
    config = manifest.read(folder)
    files = [current(folder, WEIGHTS)]
    layers = _grouped(_read_header(files[0]), config["layers"], {})
    buffers = current(folder, BUFFERS)
    if buffers.exists():
        files.append(buffers)
        layers += [_layer(name, "buffer", "", {name: t}) for name, t in _read_header(buffers).items()]
    for alias, name in config["aliases"].items():
        layers.append(CheckpointLayer(alias, "tied", name, (), "", 0, None, None))
    return _of_files(folder, "octavo", files, layers)


# --- files ----------------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> dict[str, safetensors.Entry]:
    try:
        return safetensors.header(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    if path.suffix in safetensors.PICKLES:
        return "a pickle can run code when it is read: load it with torch and save it with octavo.save or safetensors"
    return "give a file of safetensors, or the folder it came in"


def _transformers_files(folder: Path) -> list[Path]:
    index = safetensors.weight_map(folder)
    if index is not None:
        return [folder / name for name in sorted(set(index.values()))]
    weights = current(folder, WEIGHTS)
    files = [weights] if weights.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (*safetensors.PICKLES, ".gguf")
        )
        found = f"only {', '.join(others)}; " if others else ""
        raise ValueError(
            f"{folder} holds no safetensors file; {found}{_remedy(folder / ''.join(others[:1]))}"
        )
    return files


# --- layers ---------------------------------------------------------------------------------------------------------


def _grouped(
    tensors: dict[str, safetensors.Entry], schemes: dict[str, Any], method: dict[str, Any]
) -> list[CheckpointLayer]:
    """One layer for each owner; `schemes` are octavo's by layer, `method` is transformers' quantization_config."""
    layers: dict[str, dict[str, safetensors.Entry]] = {}
    for name in sorted(tensors, key=_natural):
        layers.setdefault(_owner(name, tensors), {})[name] = tensors[name]
    found = []
    for owner, own in layers.items():
        if owner in schemes:
            scheme = schemes[owner]
            weights = _weights_of(scheme)
            bits, codes = (weights.stored_bits, weights.codes) if weights else (None, "weight")
            found.append(_layer(owner, "QuantLinear", _scheme_text(scheme), own, bits, codes))
        elif _is_quantized(owner, own):
            found.append(_layer(owner, "quantized", _method_text(method, own), own, _code_bits(method, own)))
        else:
            found.append(_layer(owner, "", "", own))
    return found


def _layer(
    name: str,
    kind: str,
    scheme: str,
    tensors: dict[str, safetensors.Entry],
    code_bits: int | None = None,
    codes: str = "weight",
) -> CheckpointLayer:
    main_name = _main(name, tensors, codes)
    main = tensors[main_name]
    total = sum(tensor.bytes for tensor in tensors.values())
    counted, weights = total, sum(math.prod(tensor.shape) for tensor in tensors.values())
    if scheme:
        counted = sum(tensor.bytes for key, tensor in tensors.items() if _leaf(key) != "bias")
        weights = 0 if _leaf(main_name) in PACKED else math.prod(main.shape)  # 0: unknown
        weights = main.bytes * 8 // code_bits if code_bits else weights
    bits = 8 * counted / weights if weights else None
    kind = kind or _KINDS.get(len(main.shape), "tensor")
    dtype = _DTYPES.get(main.dtype) or main.dtype.replace("F", "fp").replace("U", "uint").replace("I", "int")
    return CheckpointLayer(name, kind, scheme, main.shape, dtype, total, weights or None, bits)


def _owner(name: str, tensors: dict[str, safetensors.Entry]) -> str:
    """The layer of a tensor. bitsandbytes hangs `weight.absmax` under `weight`: that is of weight's layer."""
    parts = name.split(".")
    end = next(end for end in range(1, len(parts) + 1) if ".".join(parts[:end]) in tensors)
    return ".".join(parts[: end - 1])


def _main(owner: str, tensors: dict[str, safetensors.Entry], codes: str = "weight") -> str:
    """The weight, else the largest."""
    for leaf in (codes, "weight", *PACKED):
        name = f"{owner}.{leaf}" if owner else leaf
        if name in tensors:
            return name
    return max(tensors, key=lambda name: tensors[name].bytes)


def _is_quantized(owner: str, tensors: dict[str, safetensors.Entry]) -> bool:
    """A weight of integers or fp8 with something beside it that scales it."""
    main = _main(owner, tensors)
    narrow = tensors[main].dtype in ("I8", "U8", "I32") or tensors[main].dtype.startswith(("F8", "F4"))
    scaled = any(word in name for name in tensors for word in ("scale", "absmax", "SCB"))
    return _leaf(main) in ("weight", *PACKED) and narrow and scaled


def _weights_of(scheme: Any) -> WeightFormat | None:
    """The weight format of a layer's scheme; None if this version of octavo does not know it."""
    try:
        return from_dict(_object(scheme)).weights
    except (TypeError, ValueError):
        return None


def _code_bits(method: dict[str, Any], tensors: dict[str, safetensors.Entry]) -> int | None:
    """How many bits a code takes where several share an integer; None where each element is one code."""
    leaves = set(map(_leaf, tensors))
    if leaves & set(_BITSANDBYTES):
        return 4
    return _bits_of(method) if leaves & set(PACKED) else None


def _bits_of(method: dict[str, Any]) -> int | None:
    """What a file says may be anything: then nothing is known."""
    groups = _object(method.get("config_groups")).values()
    found = [
        method.get("bits"),
        *(_object(_object(group).get("weights")).get("num_bits") for group in groups),
    ]
    bits = {value for value in found if type(value) is int and 1 <= value <= 64}
    return bits.pop() if len(bits) == 1 else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _method_text(method: dict[str, Any], tensors: dict[str, safetensors.Entry]) -> str:
    for name in tensors:
        if _leaf(name) in _BITSANDBYTES:
            return _BITSANDBYTES[_leaf(name)]
    name, bits = str(method.get("quant_method", "unknown")), _bits_of(method)
    return f"{name}, {bits} bits" if bits else name


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _scheme_text(fields: dict[str, Any]) -> str:
    # 8 bits are those of the column; codes of fewer are stored as bytes, too.
    hidden = {"name"} | ({"weight_bits"} if fields.get("weight_bits") == 8 else set())
    shown = {key: value for key, value in fields.items() if key not in hidden}
    options = ", ".join(f"{key}={value!r}" for key, value in shown.items())
    return f"{fields.get('name')}({options})"


def _of_files(
    path: Path, format: str, files: Sequence[Path], layers: list[CheckpointLayer]
) -> CheckpointContents:
    return CheckpointContents(str(path), format, [(file.name, file.stat().st_size) for file in files], layers)


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
    """layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
