# SPDX-License-Identifier: Apache-2.0
"""QuantizedCacheLayer: one layer's keys and values as codes, with the first and the recent tokens in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .codes import BITS, StateCodes, check_head_size
from .rooms import TokenRooms


@dataclass(frozen=True)
class CacheCodes:
    """How a KVCache keeps tokens in codes: its arguments.

    dtype   "int8" or "int4"; rotate: whether keys and values are rotated; first, recent: tokens that stay float
    """

    dtype: str
    rotate: bool
    first: int = 0
    recent: int = 0

    @property
    def states(self) -> StateCodes:
        return StateCodes(BITS[self.dtype], self.rotate)


class QuantizedCacheLayer(DynamicLayer):
    """Codes of keys and values [B, H, length, D], read as floats of the dtype in which they came.

    options   how they are kept
    window    of a layer with a sliding window: the last window - 1 tokens stay, as in transformers' layer of that kind;
              while `record_past` is set, the others stay until the next `crop`
    """

    is_croppable = True

    def __init__(self, options: CacheCodes, window: int | None = None):
        # Not DynamicLayer's, which sets keys and values.
        self.options, self.window, self.record_past = options, window, False
        self.is_sliding = window is not None
        self.device: Any = None
        self._forget()

    def _forget(self) -> None:
        self.is_initialized, self.cumulative_length = False, 0
        # Floats, codes, floats, in the order of tokens.
        self.first_tokens, self.coded_tokens, self.recent_tokens = TokenRooms(), TokenRooms(), TokenRooms()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        for states in (key_states, value_states):
            check_head_size(BITS[self.options.dtype], states.shape[-1])
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        nothing = [states.narrow(2, 0, 0).detach() for states in (key_states, value_states)]
        self.first_tokens.append(nothing)
        self.recent_tokens.append(nothing)
        self.coded_tokens.append(self._encoded(nothing))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [B, H, n, D] tokens; returns all keys and values that they may look at, their own among them, as read.

        raises   RuntimeError where a gradient is needed
        """
        added = [key_states, value_states]
        if torch.is_grad_enabled() and any(states.requires_grad for states in added):
            raise RuntimeError(
                f"KVCache: codes of {self.options.dtype} pass no gradient; call the model under "
                "torch.no_grad(), or use KVCache() with dtype=None"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        with torch.no_grad():
            self._append(added)
            self.cumulative_length += count
            keys, values = self.read()
        if self.window is not None:
            visible = min(self.window - 1 + count, keys.shape[2])
            keys, values = (states.narrow(2, states.shape[2] - visible, visible) for states in (keys, values))
            if not self.record_past:
                self._slide()
        return keys, values

    def _append(self, added: list[torch.Tensor]) -> None:
        count = added[0].shape[2]
        is_at_start = self.window is None and self.coded_tokens.length + self.recent_tokens.length == 0
        first = min(max(self.options.first - self.first_tokens.length, 0), count) if is_at_start else 0
        if first:
            self.first_tokens.append([states.narrow(2, 0, first) for states in added])
        added = [states.narrow(2, first, count - first) for states in added]
        if not self.options.recent:
            self.coded_tokens.append(self._encoded(added))
            return
        self.recent_tokens.append(added)
        older = self.recent_tokens.length - self.options.recent
        if older > 0:
            recent = self.recent_tokens.tensors()
            self.coded_tokens.append(self._encoded([states.narrow(2, 0, older) for states in recent]))
            self.recent_tokens.drop(first=older)

    def _encoded(self, states: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part for each in states for part in self.options.states.encode(each)]

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values that are kept, as floats [B, H, length, D]."""
        parts = self.coded_tokens.tensors()
        half = len(parts) // 2
        states = []
        for index, codes in enumerate((parts[:half], parts[half:])):
            decoded = self.options.states.decode(codes, self.dtype)
            floats = [rooms.tensors()[index] for rooms in (self.first_tokens, self.recent_tokens)]
            around = any(each.shape[2] for each in floats)
            states.append(torch.cat([floats[0], decoded, floats[1]], 2) if around else decoded)
        return states[0], states[1]

    @property
    def keys(self) -> Any:  # type: ignore[override]
        """The keys as floats, decoded by each call; None before the first update."""
        return self.read()[0] if self.is_initialized else None

    @property
    def values(self) -> Any:  # type: ignore[override]
        """The values as floats, decoded by each call; None before the first update."""
        return self.read()[1] if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and floats of the tokens that are kept."""
        return sum(rooms.nbytes for rooms in self.rooms())

    def rooms(self) -> tuple[TokenRooms, TokenRooms, TokenRooms]:
        """Where the first, the coded and the recent tokens are."""
        return self.first_tokens, self.coded_tokens, self.recent_tokens

    def _kept(self) -> int:
        return sum(rooms.length for rooms in self.rooms())

    # --- what transformers asks for ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys `update` returns for so many tokens, and the position of the first of them."""
        past = self.cumulative_length if self.window is None else min(self.cumulative_length, self.window - 1)
        return past + query_length, self.cumulative_length - past

    def activate_past_recording(self) -> None:
        """Keeps all tokens from one `crop` to the next, so that a window can be put back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -tokens_to_remove tokens; of a window also what it no longer sees.

        raises   ValueError for a positive number, RuntimeError for a window whose past was not recorded
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop: {tokens_to_remove}; minus the number of tokens to remove is needed")
        if self.window is not None and not self.record_past and self.cumulative_length >= self.window:
            raise RuntimeError("crop: the window has moved; call activate_past_recording before")
        left = min(-tokens_to_remove, self._kept())
        self.cumulative_length -= left
        for rooms in reversed(self.rooms()):
            removed = min(left, rooms.length)
            rooms.drop(last=removed)
            left -= removed
        if self.window is not None:
            self._slide()

    def _slide(self) -> None:
        left = max(self._kept() - (self.window or 0) + 1, 0)
        for rooms in self.rooms():
            removed = min(left, rooms.length)
            rooms.drop(first=removed)
            left -= removed

    def reset(self) -> None:
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._replace(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._replace(lambda states: states[indices, ...])

    def _replace(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for rooms in self.rooms():
            rooms.replace(of)
