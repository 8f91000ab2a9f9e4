# SPDX-License-Identifier: Apache-2.0
"""A KVCache as one safetensors file: the tensors of each layer by its number, and what the cache was made with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import DynamicSlidingWindowLayer

from .growing import GrowingLayer
from .quantized import QuantizedCacheLayer

KEY = "octavo.KVCache"
FLOATS = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def write_cache(cache: Any, path: Path) -> None:
    """As KVCache.save says."""
    tensors: dict[str, torch.Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        described, parts = _written(index, layer)
        layers.append(described)
        tensors |= {f"{index}.{name}": part.contiguous().clone() for name, part in parts.items()}
    codes = cache.codes
    options = {} if codes is None else {name: getattr(codes, name) for name in ("rotate", "first", "recent")}
    made = {"dtype": None if cache.dtype is None else str(cache.dtype), "options": options, "layers": layers}
    save_file(tensors, path, metadata={KEY: json.dumps(made)})


def _written(index: int, layer: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a layer is and its tensors by name."""
    if isinstance(layer, QuantizedCacheLayer):
        described = {"kind": "codes", "window": layer.window, "length": layer.get_seq_length()}
        if not layer.is_initialized:
            return described, {}
        described["float"] = str(layer.dtype)
        rooms = zip(("first", "codes", "recent"), layer.rooms(), strict=True)
        return described, {
            f"{name}.{part}": tensor for name, each in rooms for part, tensor in enumerate(each.tensors())
        }
    if type(layer) not in (GrowingLayer, DynamicSlidingWindowLayer):
        raise TypeError(f"KVCache.save: layer {index} is a {type(layer).__name__}, which has another state")
    described = {"kind": "floats", "length": layer.get_seq_length()}
    described["window"] = getattr(layer, "sliding_window", None)
    filled = {"keys": layer.keys, "values": layer.values} if layer.is_initialized else {}
    return described, filled


def read_cache(kind: type, path: Path) -> Any:
    """As KVCache.load says; `kind` is KVCache, which this file cannot import."""
    try:
        with safe_open(path, framework="pt") as file:
            made = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        name = made["dtype"]
        cache = kind(dtype=FLOATS.get(name, name), **made["options"])
        cache.layers = [_read(cache, index, each, tensors) for index, each in enumerate(made["layers"])]
    except (KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(f"KVCache.load: {path} is no cache that KVCache.save wrote ({error})") from error
    return cache


def _read(cache: Any, index: int, described: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    own = {
        name.split(".", 1)[1]: tensor
        for name, tensor in tensors.items()
        if name.split(".", 1)[0] == str(index)
    }
    window = described["window"]
    if described["kind"] == "codes":
        coded = QuantizedCacheLayer(cache.codes, window)
        if own:
            coded.cumulative_length, coded.is_initialized = described["length"], True
            coded.dtype, coded.device = FLOATS[described["float"]], own["codes.0"].device
            for name, rooms in zip(("first", "codes", "recent"), coded.rooms(), strict=True):
                count = sum(each.startswith(f"{name}.") for each in own)
                rooms.append([own[f"{name}.{part}"] for part in range(count)])
        return coded
    layer = GrowingLayer(cache.float_dtype) if window is None else DynamicSlidingWindowLayer(window)
    if own:
        layer.lazy_initialization(own["keys"], own["values"])
        layer.keys, layer.values = own["keys"], own["values"]
        if window is not None:
            layer.cumulative_length = described["length"]
    return layer
