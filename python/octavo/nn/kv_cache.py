# SPDX-License-Identifier: Apache-2.0
"""KVCache: keys and values of past tokens in rooms that grow by doubling, where transformers joins tensors anew.

Its DynamicCache copies all keys and values for every token, 13.7 ms of a token's time at context 2048 (Llama-like, 8
layers of 1024, Zen 5). Here a token is written behind the others, and attention reads a view of what is filled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .caches import snapshot
from .caches.codes import BITS
from .caches.growing import GrowingLayer
from .caches.quantized import CacheCodes, QuantizedCacheLayer

DTYPES = (None, torch.float32, torch.bfloat16, *BITS)


class KVCache(DynamicCache):
    """A transformers Cache for `generate(cache=octavo.nn.KVCache(...))` and for calls of a model.

    Before transformers 5.24 the argument is called `past_key_values`.

    config   of the model; layers with a sliding window then forget what is outside of it, and layers with a state of
             another kind are transformers' own. Without it every layer keeps all tokens
    dtype    of keys and values in here: None as they come, torch.float32, or torch.bfloat16, half the bytes to read for
             each token; keys of another dtype than the queries need octavo's attention: octavo.fuse_(model, example).
             "int8" and "int4": codes, about a half and a third of bfloat16's bytes, in any model; each call reads them
             back to floats, which costs time. docs/fusion.md has what they cost in accuracy
    rotate   codes only: a Hadamard rotation of keys and values first; None: yes
    first    codes only: so many tokens at the start stay float; layers with a window have none
    recent   codes only: so many tokens at the end stay float. With 0, what a token reads does not depend on how many
             tokens came with it: assisted decoding then writes what greedy decoding writes

    crop, reset, beam search and selecting batches work as for DynamicCache. Where keys need a gradient they are joined;
    codes refuse it. A copy (copy.deepcopy) of a cache that has read a prompt is a start for each of several answers.
    raises   TypeError, ValueError for other arguments
    """

    def __init__(
        self,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        *,
        rotate: bool | None = None,
        first: int = 0,
        recent: int = 0,
    ):
        if dtype not in DTYPES:
            raise ValueError(
                f"KVCache: dtype is {dtype!r}, accepted are None, torch.float32, torch.bfloat16, 'int8' and 'int4'"
            )
        if config is not None and not hasattr(config, "get_text_config"):
            raise TypeError(f"KVCache: config is a {type(config).__name__}, a transformers config is needed")
        _check_options(dtype, rotate, first, recent)
        super().__init__(config=config)
        self.dtype = dtype
        self.codes: CacheCodes | None = None
        if isinstance(dtype, str):
            self.codes = CacheCodes(dtype, rotate is not False, first, recent)
        self.layers = [self._ours(layer) for layer in self.layers]

    def _ours(self, layer: Any) -> Any:
        # Exactly these classes: their subclasses have a state of their own.
        if type(layer) is DynamicLayer:
            return QuantizedCacheLayer(self.codes) if self.codes else GrowingLayer(self.float_dtype)
        if type(layer) is DynamicSlidingWindowLayer and self.codes is not None:
            return QuantizedCacheLayer(self.codes, layer.sliding_window)
        return layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while self.layer_class_to_replicate is not None and len(self.layers) <= layer_idx:
            self.layers.append(self._ours(DynamicLayer()))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Of the layers that keep floats: None as they come."""
        return None if isinstance(self.dtype, str) else self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are kept: codes, scales and floats. Spare places of rooms are not counted."""
        return sum(_bytes_of(layer) for layer in self.layers)

    def save(self, path: str | Path) -> None:
        """Writes the cache as one safetensors file, from which `KVCache.load` goes on with a conversation.

        The file says nothing about the tokens: keep their ids, of which generate wants all.

        raises   TypeError for a layer of another kind than full attention or a sliding window
        """
        snapshot.write_cache(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> KVCache:
        """The cache that `save` wrote, with the same bits. raises   ValueError for another file"""
        return snapshot.read_cache(cls, Path(path))


def _check_options(dtype: Any, rotate: Any, first: Any, recent: Any) -> None:
    for name, value in (("first", first), ("recent", recent)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"KVCache: {name} is {value!r}, a number of tokens, 0 or more, is needed")
    if rotate is not None and not isinstance(rotate, bool):
        raise TypeError(f"KVCache: rotate is {rotate!r}, accepted are True, False and None")
    if not isinstance(dtype, str) and (rotate is not None or first or recent):
        raise ValueError("KVCache: rotate, first and recent are for dtype='int8' and 'int4'")


def _bytes_of(layer: Any) -> int:
    if isinstance(layer, QuantizedCacheLayer):
        return layer.nbytes
    states = [getattr(layer, name, None) for name in ("keys", "values")]
    return sum(each.numel() * each.element_size() for each in states if each is not None)
