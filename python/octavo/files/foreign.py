# SPDX-License-Identifier: Apache-2.0
"""Rows for the quantized layers that other packages store: compressed-tensors, GPTQ, AWQ, bitsandbytes, fp8.

None of them says in its files how many weights a packed tensor stands for. So this file knows how codes are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .inspection import PACKED, CheckpointLayer, Entry, by_layer, leaf_of, main_of, row

_BITSANDBYTES = {"bitsandbytes__nf4": "bitsandbytes nf4", "bitsandbytes__fp4": "bitsandbytes fp4"}


def rows(tensors: Mapping[str, Entry], entry: Mapping[str, Any]) -> list[CheckpointLayer]:
    """One row for each layer of `tensors`; `entry` is what config.json says of the weights, and may be anything."""
    return [_row(name, own, entry) for name, own in by_layer(tensors).items()]


def _row(name: str, tensors: Mapping[str, Entry], entry: Mapping[str, Any]) -> CheckpointLayer:
    if not _is_quantized(name, tensors):
        return row(name, tensors)
    bits = _code_bits(entry, tensors)
    weights = tensors[main_of(name, tensors)].bytes * 8 // bits if bits else None
    return row(name, tensors, "quantized", _method(entry, tensors), weights)


def _is_quantized(owner: str, tensors: Mapping[str, Entry]) -> bool:
    """Whether the layer has a weight of integers or fp8, and a tensor that scales it."""
    main = main_of(owner, tensors)
    narrow = tensors[main].dtype in ("I8", "U8", "I32") or tensors[main].dtype.startswith(("F8", "F4"))
    scaled = any(word in name for name in tensors for word in ("scale", "absmax", "SCB"))
    return leaf_of(main) in ("weight", *PACKED) and narrow and scaled


def _code_bits(entry: Mapping[str, Any], tensors: Mapping[str, Entry]) -> int | None:
    """How many bits a code takes where several share an integer; None where each element is one code."""
    leaves = set(map(leaf_of, tensors))
    if leaves & set(_BITSANDBYTES):
        return 4
    return _bits_of(entry) if leaves & set(PACKED) else None


def _bits_of(entry: Mapping[str, Any]) -> int | None:
    groups = _object(entry.get("config_groups")).values()
    found = [
        entry.get("bits"),
        *(_object(_object(group).get("weights")).get("num_bits") for group in groups),
    ]
    bits = {value for value in found if type(value) is int and 1 <= value <= 64}
    return bits.pop() if len(bits) == 1 else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _method(entry: Mapping[str, Any], tensors: Mapping[str, Entry]) -> str:
    for name in tensors:
        if leaf_of(name) in _BITSANDBYTES:
            return _BITSANDBYTES[leaf_of(name)]
    name, bits = str(entry.get("quant_method", "unknown")), _bits_of(entry)
    return f"{name}, {bits} bits" if bits else name
