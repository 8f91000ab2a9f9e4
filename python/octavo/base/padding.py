# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch count: those of text, by the mask that the model was given, but none of padding.

What a model computes at padded positions means nothing, and two ways to compute it may give anything: torch's fused
transformer layers give zeros there, others give what the attention makes of them. So figures leave those positions out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .batches import output_of
from .forward_arguments import arguments_by_name, parameters_of
from .hooks import hooked

LABELS = "labels"  # what positions are left out by, if no mask says so
Masks = list[torch.Tensor]  # each is bool [batch, length], True at positions that count


class Padding:
    """Finds the masks of each batch: among the arguments of `model`, or else among the arguments of modules inside it.

    names     the names of the masks that were found
    counted, left_out   how many positions count in all batches so far, and how many do not
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.names: set[str] = set()
        self.counted = self.left_out = 0
        inside = [module for module in model.modules() if module is not model]
        # None: some could be given a mask; the first batch shows whether they are
        self._looks_inside = None if any(_takes_a_mask(module) for module in inside) else False
        attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
        self.length_first = any(not m.batch_first for m in attention)

    def masks(self, args: tuple, kwargs: dict[str, Any], labelled: torch.Tensor | None = None) -> Masks:
        """The masks of a batch, one for each shape. This may run the model: call it in eval mode and without gradients.

        labelled   one more: the positions that count by the labels of the batch
        """
        found = _masks_in(arguments_by_name(self.model, args, kwargs))
        if not found and self._looks_inside is not False:
            found = self._masks_inside(args, kwargs)
            self._looks_inside = bool(found)
        if labelled is not None:
            found[LABELS] = labelled
        self.names.update(found)
        masks: dict[torch.Size, torch.Tensor] = {}
        for mask in found.values():  # modules hand on one mask under several names
            masks[mask.shape] = masks[mask.shape] & mask if mask.shape in masks else mask
        self.counted += sum(int(mask.sum()) for mask in masks.values())
        self.left_out += sum(int((~mask).sum()) for mask in masks.values())
        return list(masks.values())

    def given_masks(self, args: tuple, kwargs: dict[str, Any]) -> Masks:
        """The masks among the arguments of `model` itself, each as it is."""
        return list(_masks_in(arguments_by_name(self.model, args, kwargs)).values())

    def rows(self, tensor: torch.Tensor, masks: Masks, *, has_channels: bool = False) -> torch.Tensor:
        """`tensor` without the positions that a mask of its shape leaves out; all of it where no mask fits.

        has_channels   whether the last dimension holds channels and not positions, as in a layer's output [..., n]
        """
        for view, dims in _layouts(tensor, self.length_first, has_channels):
            shape = view.shape[:dims]
            fitting = [
                fitted for mask in masks if (fitted := _fitted(mask, shape, self.length_first)) is not None
            ]
            if fitting:
                return view[torch.stack(fitting).all(0)]
        return tensor

    def notes(self) -> list[str]:
        """A sentence about how many positions were left out, if any were."""
        if not self.left_out:
            return []
        names, total = " and ".join(sorted(self.names)), self.counted + self.left_out
        verb = "say" if len(self.names) > 1 or LABELS in self.names else "says"
        what = "labels of -100" if self.names == {LABELS} else "padding"
        return [f"{what}: {self.left_out:,} of {total:,} positions are left out, as {names} {verb}"]

    def _masks_inside(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            for name, mask in _masks_in(arguments_by_name(module, args, kwargs)).items():
                found.setdefault(name, mask)

        takers = filter(_takes_a_mask, self.model.modules())
        with hooked(((module, note) for module in takers), before=True):
            output_of(self.model, args, kwargs)
        return found


# --- masks ----------------------------------------------------------------------------------------------------------


def _is_mask(name: str) -> bool:
    return name.endswith(("attention_mask", "key_padding_mask"))


def _takes_a_mask(module: nn.Module) -> bool:
    return any(_is_mask(parameter.name) for parameter in parameters_of(module))


def _masks_in(arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
    found = {}
    for name, mask in arguments.items():
        if _is_mask(name) and isinstance(mask, torch.Tensor) and not mask.is_nested:
            kept = key_padding(mask) if name.endswith("key_padding_mask") else attended(mask)
            if kept is not None:
                found[name] = kept
    return found


def key_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """torch's `key_padding_mask`, [batch, length] or [length], True or a large negative number at padding."""
    if mask.dim() > 2:
        return None
    return mask > _lowest(mask) / 2 if mask.is_floating_point() else mask == 0


def attended(mask: torch.Tensor) -> torch.Tensor | None:
    """transformers' `attention_mask` as bool [batch, length], True at text.

    mask   [batch, length], 1 at text; or [batch, (heads,) queries, keys], where a key counts that some query may see:
           True or 1 there, or, in a mask that is added to scores, anything but a large negative number
    """
    if mask.dim() not in (1, 2, 3, 4):
        return None
    is_added = mask.is_floating_point() and (mask.dim() > 2 or bool((mask < 0).any()))
    kept = mask > _lowest(mask) / 2 if is_added else mask != 0
    while kept.dim() > 2:
        kept = kept.any(1)
    return kept


def _lowest(mask: torch.Tensor) -> float:
    return torch.finfo(mask.dtype).min


# --- shapes ---------------------------------------------------------------------------------------------------------


def _layouts(
    tensor: torch.Tensor, length_first: bool, has_channels: bool
) -> Iterator[tuple[torch.Tensor, int]]:
    """Pairs (view of `tensor`, d), the likeliest first: the first d dimensions of the view may be those of a mask."""
    if tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3] and not has_channels:
        yield tensor.movedim(2, 1), 2  # attention [batch, heads, queries, keys]
    if tensor.dim() > 2:
        views = [tensor, tensor.transpose(0, 1)]
        for view in views[::-1] if length_first else views:
            yield view, 2
    if tensor.dim() == 2:
        yield tensor, 1
        if not has_channels:
            yield tensor, 2


def _fitted(mask: torch.Tensor, shape: torch.Size, length_first: bool) -> torch.Tensor | None:
    if mask.shape == shape:
        return mask
    if mask.dim() == 2 and len(mask) == 1 and len(shape) == 2 and mask.shape[1] == shape[1]:
        return mask.expand(shape)  # one mask for the whole batch
    if mask.dim() == 2 and len(shape) == 1 and mask.numel() == shape[0]:
        return (mask.T if length_first else mask).flatten()  # tokens of all rows, one after the other
    return None
