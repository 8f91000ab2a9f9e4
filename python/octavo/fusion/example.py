# SPDX-License-Identifier: Apache-2.0
"""The example that fusions are held against: its batches, and what the model gave for them before anything changed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..base.batches import calls, float_tensors
from .decoding import decodings
from .paths import Proofs
from .perturbed import perturbed


class Example:
    """Batches and the model they are for.

    batches    the arguments of each call: [(args, kwargs), ...], at least one
    proofs     what the steps found out about modules' paths (paths.py)
    outputs    floating-point tensors of each batch's output, of the model as it was when the example was made
    others     batches that are made from the given ones (perturbed.py), and the model's outputs for them
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
        self.others = [other for args, kwargs in self.batches for other in self._other(args, kwargs)]
        self.decodings = decodings(model, self.run)
        self.proofs: Proofs = {}

    def run(self) -> list[list[torch.Tensor]]:
        """Runs the model, as it is now, on all batches; returns the floating-point tensors of each output."""
        return [self._outputs(args, kwargs) for args, kwargs in self.batches]

    def run_others(self) -> list[list[torch.Tensor]]:
        """Does the same with the other batches."""
        return [self._outputs(args, kwargs) for args, kwargs, _ in self.others]

    def _outputs(self, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
        # A cache among the arguments grows with each run, so each gets a fresh copy.
        args, kwargs = copy.deepcopy((args, kwargs))
        with torch.no_grad():
            return [tensor.clone() for tensor in float_tensors(self.model(*args, **kwargs))]

    def _other(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> list[tuple[tuple, dict[str, Any], list[torch.Tensor]]]:
        """The first of the perturbed batches that the model takes, with its outputs; an empty list if it takes none."""
        for other in perturbed(args, kwargs):
            try:
                return [(*other, self._outputs(*other))]
            except Exception:  # values that mean something, or more positions than there are
                continue
        return []
