# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch count by its labels: those labelled -100 do not.

A causal language model is scored one position earlier than its labels stand: its logits for a token say what the next
one is. What a model is, is tried out and not guessed (kinds.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..metrics.distribution import NO_TARGET
from .kinds import is_causal


class Labels:
    """Finds the positions that count for each batch of `model`."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._is_shifted: bool | None = None  # unknown until a batch has a label of -100

    def mask(self, labels: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
        """bool, in the shape of `labels`, True where a position of the output counts; None if all of them do.

        labels   of the batch, or None. The first -100 runs the model: call it in eval mode and without gradients
        """
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() == 0:
            return None
        counts = labels != NO_TARGET
        if counts.all():
            return None
        if self._is_shifted is None:
            self._is_shifted = _predicts_the_next(self.model, labels, args, kwargs)
        if self._is_shifted:
            counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
        return counts


def _predicts_the_next(model: nn.Module, labels: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether labels are the tokens themselves, and the model gives logits that do not change with later ones."""
    ids: Any = args[0] if args else kwargs.get("input_ids")
    is_text = isinstance(ids, torch.Tensor) and ids.dtype == torch.int64 and ids.dim() == 2
    if not is_text or ids.shape != labels.shape or ids.shape[1] < 2:
        return False
    try:
        return is_causal(model, args, kwargs)
    except TypeError:  # its output has no logits
        return False
