# SPDX-License-Identifier: Apache-2.0
"""Experts of transformers, which are Parameters [experts, n, k], as linear layers: one for each expert.

transformers 5 keeps the matrices of all experts of a layer in one Parameter, and the forward of the class multiplies by
`parameter[expert]`. Here `experts.3.down_proj` is the layer of expert 3, and `experts.down_proj[3]` stands for the
layer's matrix: the same forward multiplies by it, and the layer computes the product. So experts are layers like all
others, for every scheme, every method and every file, and only rows that the router sends to an expert are multiplied.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .replacements import replacement_of

EAGER = "eager"  # transformers' word for the loop over experts, which is the forward of the class
OWN_CONFIG, ORDER = "config_of_joined_experts", "order_of_joined_experts"


class ExpertMatrices:
    """What stands for the Parameter `name` of a module of experts: each index gives an ExpertMatrix.

    transposed   whether matrices are multiplied as x @ matrix [k, n] and not as x @ matrix.T
    joined       the Parameter; None once an expert is no float layer of it any more
    """

    _is_hf_initialized = True  # transformers draws random numbers for what does not say so

    def __init__(self, experts: nn.Module, name: str, transposed: bool, joined: nn.Parameter) -> None:
        self.experts, self.name, self.transposed = experts, name, transposed
        self.joined: nn.Parameter | None = joined

    def __getitem__(self, index: Any) -> ExpertMatrix:
        return ExpertMatrix(self.layer(operator.index(index)), self.transposed)

    def __len__(self) -> int:
        return sum(key.isdecimal() for key in self.experts._modules)

    def layer(self, index: int) -> Any:
        """The layer of an expert."""
        return getattr(self.experts._modules[str(index)], self.name)

    @property
    def is_float(self) -> bool:
        """Whether every expert is still the layer that was made of the Parameter."""
        if self.joined is None:
            return False
        layers = (self.layer(i) for i in range(len(self)))
        pairs = zip(layers, self.joined, strict=True)
        return all(replacement_of(a) is not None and a.weight.data_ptr() == b.data_ptr() for a, b in pairs)


class ExpertMatrix:
    """What stands for one expert's matrix in the forward of a class of experts: its layer multiplies.

    Everything else that torch is asked to do with it is done with the layer's weight.
    """

    def __init__(self, layer: nn.Module, transposed: bool) -> None:
        self.layer, self.transposed = layer, transposed

    def __getattr__(self, name: str) -> Any:  # shape, dtype, device, T ...
        return getattr(self.values(), name)

    def values(self) -> torch.Tensor:
        """The matrix as floats, as the Parameter had it."""
        weight: Any = self.layer.weight
        return weight.T if self.transposed else weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x, matrix = (*args[:2], None, None)[:2]
        if isinstance(matrix, cls) and not isinstance(x, cls) and len(args) == 2 and not kwargs:
            if func is F.linear and not matrix.transposed or func in _PRODUCTS and matrix.transposed:
                return matrix.layer(x)
        values = [each.values() if isinstance(each, cls) else each for each in args]
        return func(*values, **{k: v.values() if isinstance(v, cls) else v for k, v in kwargs.items()})


_PRODUCTS = (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__)


def _linear(weight: torch.Tensor, requires_grad: bool) -> nn.Linear:
    """A linear layer whose weight is `weight` itself."""
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return linear


def expert_parameters(module: nn.Module) -> list[str]:
    """The names of the Parameters [experts, n, k] of a module whose class is one of transformers' classes of experts.

    These classes are told by what transformers gives their instances: `is_transposed`, and a config that says which
    code multiplies.
    """
    if not isinstance(getattr(module, "is_transposed", None), bool) or not hasattr(module, "config"):
        return []
    return [name for name, each in module._parameters.items() if each is not None and each.dim() == 3]


def holds_experts(model: nn.Module) -> bool:
    """Whether `split_experts_` would find any."""
    return any(expert_parameters(module) for module in model.modules())


def split_in(layers: Iterable[str], model: nn.Module) -> set[str]:
    """The names of the modules of experts in `model` to which `layers`, names of quantized layers in a file, belong."""
    modules, found = dict(model.named_modules()), set()
    for layer in layers:
        expert, _, parameter = layer.rpartition(".")
        name = expert.rpartition(".")[0]
        if name in modules and parameter in expert_parameters(modules[name]):
            found.add(name)
    return found


def split_experts_(model: nn.Module, prefixes: Iterable[str] | None = None) -> list[str]:
    """Makes linear layers of the experts of `model`; returns the names of the modules that hold them.

    prefixes   only the modules of these names; None: all of them
    """
    wanted = None if prefixes is None else set(prefixes)
    found, configs = [], dict[int, Any]()
    for prefix, module in list(model.named_modules()):
        names = expert_parameters(module)
        if names and (wanted is None or prefix in wanted):
            _split_(module, names)
            _use_own_forward(module, configs)
            found.append(prefix)
    return found


def _split_(module: Any, names: list[str]) -> None:
    module.__dict__[ORDER] = list(module._parameters)
    for name in names:
        joined = module._parameters.pop(name)
        matrices = joined.detach().transpose(1, 2) if module.is_transposed else joined.detach()
        for index, matrix in enumerate(matrices):
            expert = module._modules.setdefault(str(index), nn.Module())
            expert.add_module(name, _linear(matrix, joined.requires_grad))
        module.__dict__[name] = ExpertMatrices(module, name, module.is_transposed, joined)


def join_experts_(model: nn.Module) -> None:
    """Puts the Parameters back of modules whose experts all have stayed float; lets go of the others."""
    for module in list(model.modules()):
        parts = [value for value in module.__dict__.values() if isinstance(value, ExpertMatrices)]
        if parts and all(part.is_float for part in parts):
            _join_(module, parts)
        for part in parts:
            part.joined = None


def _join_(module: Any, parts: list[ExpertMatrices]) -> None:
    for part in parts:
        del module.__dict__[part.name]
        module.register_parameter(part.name, part.joined)
    for name in module.__dict__.pop(ORDER):
        module._parameters[name] = module._parameters.pop(name)
    for key in [key for key in module._modules if key.isdecimal()]:
        del module._modules[key]
    module.config = module.__dict__.pop(OWN_CONFIG, module.config)


def joined_parameters(model: nn.Module, chosen: set[int]) -> dict[int, object]:
    """{id of a Parameter of experts: None} for modules that hold layers of `chosen`, ids of layers; other modules of
    experts are joined. With this as the memo of copy.deepcopy, a copy holds no floats of experts that become others."""
    none: dict[int, object] = {}
    for module in model.modules():
        parts = [value for value in module.__dict__.values() if isinstance(value, ExpertMatrices)]
        layers = {id(part.layer(i)) for part in parts for i in range(len(part))}
        if layers & chosen:
            none.update(dict.fromkeys((id(part.joined) for part in parts), None))
        elif parts:
            _join_(module, parts)
    return none


@contextmanager
def experts_as_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the experts of `model` are linear layers; on leaving, those that have stayed float are joined again."""
    split_experts_(model)
    try:
        yield
    finally:
        join_experts_(model)


def _use_own_forward(module: Any, configs: dict[int, Any]) -> None:
    """Gives `module` a config that asks for the forward of its class, one copy for all modules of a model."""
    config = module.config
    if getattr(config, "_experts_implementation", None) == EAGER:
        return
    if id(config) not in configs:
        configs[id(config)] = copy.copy(config)
        configs[id(config)]._experts_implementation = EAGER
    module.__dict__[OWN_CONFIG] = config
    module.config = configs[id(config)]
