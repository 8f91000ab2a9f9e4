# SPDX-License-Identifier: Apache-2.0
"""Which singular values AdaLoRA keeps while it is trained. docs/numerics.md, eq. 125 to 127."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.adapters import AdaLoRA, AdaLoRALayer
from .adapt import adapter_layers

PARTS = ("A", "B", "E")


class RankAllocator:
    """Takes the less important values of an AdaLoRA adapter away, step by step.

    model   with an adapter `name` of octavo.AdaLoRA
    raises  ValueError if the adapter is missing or of another kind

    A training step is

        loss = criterion(model(x), y) + allocator.loss()
        loss.backward()
        optimizer.step()
        allocator.step()        # before the gradients are gone
        optimizer.zero_grad()

    `budget` is how many values all layers have together after the last decision. Between two decisions an optimizer
    may move values that were taken away; in the `final` steps they are set to 0 in each.
    source  Zhang et al. 2023 (arXiv:2303.10512), section 3.2 and 3.3, with the rules of PEFT 0.21
    """

    def __init__(self, model: nn.Module, name: str = "default"):
        adapter, layers = adapter_layers("RankAllocator", model, name)
        if not isinstance(adapter, AdaLoRA):
            raise ValueError(
                f"RankAllocator: {name!r} is an adapter of {adapter.name}, whose rank is fixed; octavo.AdaLoRA is "
                "needed"
            )
        self.adapter = adapter
        self._layers: dict[str, AdaLoRALayer] = layers
        self._start_budget = sum(len(layer.E) for layer in layers.values())
        self._target_budget = adapter.target_r * len(layers)
        self.steps, self.budget = 0, self._start_budget
        self._mean: dict[str, torch.Tensor] = {}
        self._uncertainty: dict[str, torch.Tensor] = {}

    def schedule(self, step: int) -> tuple[int, bool]:
        """How many values there are after `step` steps, and whether a decision falls on it."""
        adapter, start, target = self.adapter, self._start_budget, self._target_budget
        if step <= adapter.warm_up:
            return start, False
        end = adapter.total_step - adapter.final
        if step > end:
            return target, True
        left = 1 - (step - adapter.warm_up) / (end - adapter.warm_up)
        return int((start - target) * left**3 + target), step % adapter.interval == 0

    def loss(self) -> torch.Tensor:
        """What keeps the rows of A and the columns of B at right angles and of length 1: to be added to the loss."""
        distances = []
        for layer in self._layers.values():
            for gram in (layer.A @ layer.A.T, layer.B.T @ layer.B):
                distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram))))
        return self.adapter.orthogonality * torch.stack(distances).mean()

    def step(self) -> None:
        """After optimizer.step(), before the gradients are gone. Raises ValueError without gradients."""
        step, end = self.steps + 1, self.adapter.total_step - self.adapter.final
        if step < end:
            self._update_importance()
        budget, decides = self.schedule(step)
        if step > end:
            for layer in self._layers.values():
                layer.keep_(layer.kept)
        elif decides or step == end:
            if not self._mean:
                raise ValueError(
                    "RankAllocator: no gradients have been seen, so no value can be called unimportant"
                )
            self._decide(budget)
            self.budget = budget
        self.steps = step

    def state_dict(self) -> dict[str, Any]:
        """What a training needs to go on where it stopped, beside the state_dicts of the model and the optimizer."""
        return {
            "steps": self.steps,
            "budget": self.budget,
            "mean": dict(self._mean),
            "uncertainty": dict(self._uncertainty),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for the state of another model; nothing is changed then."""
        means, uncertainties = dict(state["mean"]), dict(state["uncertainty"])
        shapes = {key: parameter.shape for key, parameter in self._parameters().items()}
        for found in (means, uncertainties):
            if found and {key: value.shape for key, value in found.items()} != shapes:
                raise ValueError(
                    "RankAllocator: the state belongs to a model with other layers or another init_r"
                )
        self.steps, self.budget = int(state["steps"]), int(state["budget"])
        self._mean, self._uncertainty = means, uncertainties

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{name}.{part}": getattr(layer, part) for name, layer in self._layers.items() for part in PARTS
        }

    def _update_importance(self) -> None:
        beta1, beta2 = self.adapter.beta1, self.adapter.beta2
        parameters = self._parameters()
        if all(parameter.grad is None for parameter in parameters.values()):
            raise ValueError(
                "RankAllocator: the adapter has no gradients; call step() after loss.backward() and before "
                "optimizer.zero_grad()"
            )
        with torch.no_grad():
            for key, parameter in parameters.items():
                if key not in self._mean:
                    self._mean[key] = torch.zeros_like(parameter)
                    self._uncertainty[key] = torch.zeros_like(parameter)
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                importance = (parameter * gradient).abs()
                self._mean[key] = mean = beta1 * self._mean[key] + (1 - beta1) * importance
                self._uncertainty[key] = (
                    beta2 * self._uncertainty[key] + (1 - beta2) * (importance - mean).abs()
                )

    def _scores(self, name: str) -> torch.Tensor:
        """The importance of each value of a layer [init_r]: of E, and the means of its row of A and column of B."""
        a, b, e = (self._mean[f"{name}.{part}"] * self._uncertainty[f"{name}.{part}"] for part in PARTS)
        vectors = torch.stack([a.mean(dim=1), b.mean(dim=0)], dim=1).sum(dim=1)
        return e.view(-1) + vectors

    def _decide(self, budget: int) -> None:
        if budget == self._start_budget:
            return
        scores = {name: self._scores(name) for name in self._layers}
        together = torch.cat(list(scores.values()))
        threshold = torch.kthvalue(together, self._start_budget - budget).values
        for name, layer in self._layers.items():
            layer.keep_(~(scores[name] <= threshold))
