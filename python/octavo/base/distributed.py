# SPDX-License-Identifier: Apache-2.0
"""Models in several processes: whatever each process finds out by itself must be found before the model is wrapped.

DistributedDataParallel gives every process the tensors of rank 0 when it wraps a model. From then on it keeps only
gradients alike: ranges that are calibrated later, and Parameters that are added later, would differ between processes.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import torch
from torch import nn


def require_unwrapped(who: str, model: nn.Module, what: str) -> None:
    """Raises ValueError if several processes share `model`: `what` would silently differ between them."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    for wrapper in _wrappers(model):
        raise ValueError(
            f"{who}: the model is in a {wrapper} of {distributed.get_world_size()} processes, each of which would have "
            f"{what}. Prepare and calibrate the model first and wrap it then: {wrapper} gives all processes what "
            "rank 0 has found"
        )


def _wrappers(model: nn.Module) -> Iterator[str]:
    """The names of the wrappers inside `model` and around it: `model` may be the `module` of a wrapper."""
    kinds: list[type] = [nn.parallel.DistributedDataParallel]
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it is not imported only to answer a question
    if fsdp is not None:
        kinds += [fsdp.FullyShardedDataParallel, fsdp.FSDPModule]
    modules = set(model.modules())
    # There is no way from a module to what wraps it, and this is asked once for a calibration of several processes.
    gc.collect()  # lets go of wrappers that nobody holds any more
    for thing in gc.get_objects():
        if issubclass(type(thing), tuple(kinds)) and not modules.isdisjoint(thing.modules()):
            yield next(kind.__name__ for kind in kinds if issubclass(type(thing), kind))
