# SPDX-License-Identifier: Apache-2.0
"""TokenRooms: tensors that get tokens at the end and lose them at both ends, without a copy of what they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

SPARE = 64  # tokens for which a new room has place


class TokenRooms:
    """Tensors [B, H, length, ...], each in a room [B, H, capacity, ...] that doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self._start = 0  # tokens before it were dropped
        self._rooms: list[torch.Tensor] = []

    def tensors(self) -> list[torch.Tensor]:
        """Views of what is filled."""
        return [room.narrow(2, self._start, self.length) for room in self._rooms]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens that are kept; a room's spare places are not counted."""
        return sum(each.numel() * each.element_size() for each in self.tensors())

    def append(self, added: Sequence[torch.Tensor]) -> None:
        """Tokens behind the others: one tensor [B, H, n, ...] for each room."""
        count = added[0].shape[2]
        end = self._start + self.length
        if not self._rooms or self._rooms[0].shape[2] < end + count:
            self._move(self.tensors() or [each.narrow(2, 0, 0) for each in added], count)
            end = self.length
        for room, states in zip(self._rooms, added, strict=True):
            room.narrow(2, end, count).copy_(states)
        self.length += count

    def drop(self, *, first: int = 0, last: int = 0) -> None:
        """Forgets the `first` tokens and the `last`."""
        self._start, self.length = self._start + first, self.length - first - last

    def replace(self, of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Puts `of(tensor)`, which has as many tokens, into the place of each tensor."""
        if self._rooms:
            self._move([of(each) for each in self.tensors()], 0)

    def _move(self, filled: list[torch.Tensor], added: int) -> None:
        capacity = max(2 * self.length, self.length + added + SPARE)
        # Inference tensors could not be written to outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self._rooms = [_room(each, capacity) for each in filled]
        self._start = 0


def _room(states: torch.Tensor, capacity: int) -> torch.Tensor:
    room = states.new_empty(*states.shape[:2], capacity, *states.shape[3:])
    room.narrow(2, 0, states.shape[2]).copy_(states)
    return room
