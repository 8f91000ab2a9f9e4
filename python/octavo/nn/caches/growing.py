# SPDX-License-Identifier: Apache-2.0
"""GrowingLayer: one layer's keys and values as floats, in rooms that are their own tensors' storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .rooms import SPARE


class GrowingLayer(DynamicLayer):
    """One layer's keys and values: `keys` and `values` [B, H, L, D] are views of rooms [B, H, capacity, D].

    Methods that it inherits put other tensors in their place: the next update moves those into new rooms.
    """

    def __init__(self, storage_dtype: torch.dtype | None = None):
        super().__init__()
        self.storage_dtype = storage_dtype
        self.keys: Any
        self.values: Any
        self._rooms: Any = None  # of keys and of values
        self._views: Any = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = self.storage_dtype or key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.empty(*states.shape[:2], 0, states.shape[3], dtype=self.dtype, device=self.device)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [B, H, n, D] tokens; returns all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states.to(self.dtype), value_states.to(self.dtype), *args, **kwargs)
        before, added = self.keys.shape[2], key_states.shape[2]
        keys, values = self._rooms_for(before + added)
        keys.narrow(2, before, added).copy_(key_states)
        values.narrow(2, before, added).copy_(value_states)
        self._view(before + added)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        is_ours = self._is_ours()
        super().crop(tokens_to_remove)
        if is_ours:
            self._view(self.keys.shape[2])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if not self._is_ours():
            super().reorder_cache(beam_idx)
            return
        length = self.keys.shape[2]
        self._set_rooms(self._rooms[0].shape[2], lambda states: states.index_select(0, beam_idx))
        self._view(length)

    def reset(self) -> None:
        super().reset()
        self._rooms = self._views = None

    def _is_ours(self) -> bool:
        """Whether `keys` and `values` are the views of the rooms."""
        views = self._views
        return views is not None and self.keys is views[0] and self.values is views[1]

    def _rooms_for(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rooms that begin with what `keys` and `values` hold, for at least `length` tokens."""
        if not self._is_ours() or self._rooms[0].shape[2] < length:
            self._set_rooms(max(2 * self.keys.shape[2], length + SPARE))
        return self._rooms

    def _set_rooms(
        self, capacity: int, of: Callable[[torch.Tensor], torch.Tensor] = lambda states: states
    ) -> None:
        # Inference tensors could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._rooms = _room(of(self.keys), capacity), _room(of(self.values), capacity)

    def _view(self, length: int) -> None:
        self._views = self._rooms[0].narrow(2, 0, length), self._rooms[1].narrow(2, 0, length)
        self.keys, self.values = self._views


def _room(states: torch.Tensor, capacity: int) -> torch.Tensor:
    batch, heads, length, size = states.shape
    room = states.new_empty(batch, heads, capacity, size)
    room.narrow(2, 0, length).copy_(states)
    return room
