# SPDX-License-Identifier: Apache-2.0
"""How much the errors of each column of a weight count: mean squares of what the layer reads, from data.

llama.cpp calls a file of such numbers an imatrix. Encoders weigh the errors of a block's columns with them.
"""

from __future__ import annotations

from collections.abc import Callable
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


def importance(model: nn.Module, data: Any, *, progress: bool = False) -> dict[str, torch.Tensor]:
    """{layer: mean square of each of its inputs, float32 [k]}, for `octavo.save_gguf(imatrix=)`.

    model      with float or quantized linear layers; it is not changed
    data       batches as octavo.quantize_ takes them; positions of padding do not count
    progress   a tqdm bar over the batches

    Layers that saw nothing are left out. Sums are added in float64.
    Raises: TypeError if model is no module, ValueError if it has no linear layers or data has no batches.
    Source: llama.cpp, tools/imatrix; docs/numerics.md.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"importance: model is {type(model).__name__}, a torch.nn.Module is needed")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, OurLinear) or replacement_of(module) is not None
    }
    if not layers:
        raise ValueError("importance: the model has no linear layers; give a model with some")
    padding = Padding(model)
    sums: dict[str, tuple[torch.Tensor, int]] = {}
    batches = list(calls(data, "importance: data", model))
    with torch.no_grad(), evaluating(model):
        for args, kwargs in with_bar(batches, "watching", "batch", progress):
            masks = padding.masks(args, kwargs)
            rows_of = partial(padding.rows, masks=masks, has_channels=True)
            with hooked((layer, partial(_add, sums, rows_of, name)) for name, layer in layers.items()):
                output_of(model, args, kwargs)
    return {name: (total / rows).float() for name, (total, rows) in sums.items() if rows}


def _add(
    sums: dict[str, tuple[torch.Tensor, int]],
    rows_of: Callable[[torch.Tensor], torch.Tensor],
    name: str,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    x = args[0] if args else kwargs["input"]
    rows = rows_of(x).detach().reshape(-1, x.shape[-1])
    total, count = sums.get(name, (torch.zeros(x.shape[-1], dtype=torch.float64), 0))
    sums[name] = total + rows.double().square().sum(0), count + len(rows)
