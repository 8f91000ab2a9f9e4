# SPDX-License-Identifier: Apache-2.0
"""The example that fusions are held against: its batches, and what the model gave for them before anything changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..batches import calls, float_tensors
from .decoding import decodings


class Example:
    """Batches and the model they are for.

    batches    the arguments of each call: [(args, kwargs), ...], at least one
    outputs    floating-point tensors of each batch's output, of the model as it was when the example was made
    decodings  models in it that write with a cache, and what they wrote then
    """

    def __init__(self, model: nn.Module, example: Any):
        self.model = model
        self.batches = list(calls(example, "fuse_: example", model))
        if not self.batches:
            raise ValueError(
                "fuse_: example is empty; give at least one batch (a used-up generator is empty)"
            )
        self.outputs = self.run()
        self.decodings = decodings(model, self.run)

    def run(self) -> list[list[torch.Tensor]]:
        """Runs the model, as it is now, on all batches; returns the floating-point tensors of each output."""
        outputs = []
        for args, kwargs in self.batches:
            # A cache among the arguments grows with each run, so each gets a fresh copy.
            args, kwargs = copy.deepcopy((args, kwargs))
            with torch.no_grad():
                outputs.append([tensor.clone() for tensor in float_tensors(self.model(*args, **kwargs))])
        return outputs
