# SPDX-License-Identifier: Apache-2.0
"""How much the errors of each column of a weight count: mean squares of what the layer reads, from data.

llama.cpp calls a file of such numbers an imatrix. Encoders weigh the errors of a block's columns with them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...base.batches import calls, evaluating, output_of
from ...base.hooks import hooked
from ...base.padding import Padding
from ...base.progress import with_bar
from ...nn import OurLinear
from ...nn.replacements import replacement_of


def importance_matrix(model: nn.Module, data: Any, *, progress: bool = False) -> dict[str, torch.Tensor]:
    """{layer: mean square of each of its inputs, float32 [k]}, for `octavo.save_gguf(imatrix=)`.

    model      with float or quantized linear layers; it is not changed
    data       batches as octavo.quantize_ takes them; positions of padding do not count
    progress   a tqdm bar over the batches

    Layers that saw nothing are left out. Sums are added in float64.
    Raises: TypeError if model is no module, ValueError if it has no linear layers or data has no batches.
    Source: llama.cpp, tools/imatrix; docs/numerics.md.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"importance_matrix: model is {type(model).__name__}, a torch.nn.Module is needed")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OurLinear) or replacement_of(module) is not None
    }
    if not layers:
        raise ValueError("importance_matrix: the model has no linear layers; give a model with some")
    sums = _Squares(Padding(model))
    batches = list(calls(data, "importance_matrix: data", model))
    with torch.no_grad(), evaluating(model):
        for args, kwargs in with_bar(batches, "watching", "batch", progress):
            masks = sums.padding.masks(args, kwargs)
            with hooked((layer, partial(sums.add, name, masks)) for name, layer in layers.items()):
                output_of(model, args, kwargs)
    return {name: (total / sums.rows[name]).float() for name, total in sums.totals.items() if sums.rows[name]}


class _Squares:
    """Sums of squares of what each layer reads, in float64, and how many rows they are of."""

    def __init__(self, padding: Padding) -> None:
        self.padding = padding
        self.totals: dict[str, torch.Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, name: str, masks: Any, _: nn.Module, args: tuple, kwargs: dict[str, Any], y: Any) -> None:
        x = args[0] if args else kwargs["input"]
        rows = self.padding.rows(x, masks, has_channels=True).detach().reshape(-1, x.shape[-1])
        self.totals[name] = self.totals.get(name, 0) + rows.double().square().sum(0)
        self.rows[name] = self.rows.get(name, 0) + len(rows)
