# SPDX-License-Identifier: Apache-2.0
"""Codes in a form that nobody can take for a float weight, for folders that say `quant_method: octavo`.

transformers without octavo only warns of a quant_method that it does not know, and would fill float layers with codes,
or leave them uninitialized. So each quantized layer has a tensor `weight` of a shape that its float layer does not
have, and transformers raises: codes of that name are [n, k, 1], and where codes have another name, `weight` is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..nn import QuantLinear

WEIGHT = "weight"


def guarded(state: Mapping[str, torch.Tensor], layers: Mapping[str, QuantLinear]) -> dict[str, torch.Tensor]:
    """A state_dict of a model whose quantized layers are `layers`, with their guards."""
    result = dict(state)
    for name, layer in layers.items():
        result[f"{name}.{WEIGHT}"] = guard(layer, state.get(f"{name}.{WEIGHT}"))
    return result


def guard(layer: QuantLinear, codes: torch.Tensor | None) -> torch.Tensor:
    """What stands for `weight` of `layer`, whose codes of that name are `codes`."""
    if codes is None:
        return torch.empty(0, dtype=torch.uint8)
    return codes.reshape(layer.out_features, -1, 1)


def unguard_(tensors: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    """Takes the guards of the layers `names` away, where there are any."""
    for name in names:
        key = f"{name}.{WEIGHT}"
        tensor = tensors.get(key)
        if tensor is not None and tensor.dim() == 3 and tensor.shape[2] == 1:
            tensors[key] = tensor[:, :, 0]
        elif tensor is not None and tensor.shape == (0,):
            del tensors[key]
