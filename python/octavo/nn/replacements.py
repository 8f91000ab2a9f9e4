# SPDX-License-Identifier: Apache-2.0
"""Which float layers become ours: the registry of the classes that compute x @ W.T + bias, and of how W lies in them.

Everybody who meets a float layer asks here what it is, and reads its weight here as the matrix W [n, k]. A class is
registered by its full name, so that nothing is imported to know it. A class of your own is one more entry:

    octavo.nn.replacements.register(MyLinear, transposed=True)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class Replacement:
    """A class of float layers: y = x @ W.T + bias, with the Parameters `weight`, which holds W [n, k], and `bias` [n].

    kind         the full name of the class, such as "torch.nn.modules.linear.Linear"
    transposed   whether `weight` is W.T [k, n]
    target       what compressed-tensors calls the class; "" if it would not find the class, or misread the weight
    unserved     why layers of this class stay float; "" if they become ours
    is_claimed   somebody else says what the class computes: each layer is tried before it is replaced
    """

    kind: str
    transposed: bool = False
    target: str = ""
    unserved: str = ""
    is_claimed: bool = False

    def matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """W [n, k] as a view of `weight`: what is written to it and its gradients reach the Parameter."""
        return weight.T if self.transposed else weight

    def weight(self, matrix: torch.Tensor) -> torch.Tensor:
        """The way back: what the Parameter holds for W = `matrix` [n, k], a view."""
        return matrix.T if self.transposed else matrix


LINEAR = Replacement("torch.nn.modules.linear.Linear", target="Linear")
_ENTRIES = (
    LINEAR,
    Replacement(
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        target="Linear",
        unserved="nn.MultiheadAttention reads its weight without calling it",
    ),
    Replacement(
        "transformers.pytorch_utils.Conv1D", transposed=True
    ),  # GPT-2, GPT, ImageGPT, CTRL, Decision Transformer
    # A forward of its own, which computes what nn.Linear's does.
    Replacement("transformers.models.falcon.modeling_falcon.FalconLinear", target="Linear"),
)
# Rows of its weight are read and nothing is multiplied, so it is not in the list of products below.
EMBEDDING = Replacement("torch.nn.modules.sparse.Embedding")
REGISTRY: dict[str, Replacement] = {entry.kind: entry for entry in _ENTRIES}


def register(kind: type[nn.Module] | str, *, transposed: bool = False) -> Replacement:
    """Makes `kind` known to `quantize_`, `prepare_`, `load` and everybody else, in this process.

    kind         a class whose layers compute y = x @ W.T + bias from the Parameters `weight` and `bias`, which may be
                 None or missing, and have no others; or its full name, "package.module.Class"
    transposed   whether `weight` is W.T [k, n], as in transformers' Conv1D, and not W [n, k]
    raises       TypeError for what is no class of modules and no full name
    Layers of subclasses are served as well, unless they have a forward of their own. A layer that gives something else
    for a row of random numbers stays float, and the report says so.
    """
    is_class = isinstance(kind, type) and issubclass(kind, nn.Module)
    if not is_class and not (isinstance(kind, str) and "." in kind):
        raise TypeError(
            f"register: kind is {kind!r}; give a subclass of torch.nn.Module, or its full name, 'package.module.Class'"
        )
    name = kind if isinstance(kind, str) else _full_name(kind)
    entry = Replacement(name, transposed, is_claimed=True)
    REGISTRY[entry.kind] = entry
    return entry


def replacement_of(module: nn.Module) -> Replacement | None:
    """The entry of a float layer, that of its nearest class; None for any other module, and for a layer of ours."""
    return next(filter(None, (REGISTRY.get(_full_name(each)) for each in type(module).__mro__)), None)


def embedding_of(module: nn.Module) -> Replacement | None:
    """The entry of a float embedding, of nn.Embedding or of a subclass; None for any other module."""
    return EMBEDDING if isinstance(module, nn.Embedding) else None


def kind_of(layer: nn.Module) -> Replacement:
    """The entry of a float layer that becomes ours, linear or an embedding; nn.Linear's for any other module."""
    return replacement_of(layer) or embedding_of(layer) or LINEAR


def contradiction(layer: Any) -> str:
    """How `layer`, a float layer with values, contradicts what was claimed of its class; "" if a row of random numbers
    does not show it: wrong axes of a square weight, above all.

    The bound is that of k products added in any order, in the weight's precision.
    """
    entry = _entry(layer)
    if not entry.is_claimed:
        return ""
    with torch.no_grad():
        matrix, bias = entry.matrix(layer.weight), bias_of(layer)
        generator = torch.Generator(device="cpu").manual_seed(0)
        x = torch.randn(1, matrix.shape[1], generator=generator, device="cpu").to(matrix.dtype)
        try:
            y = layer(x)
            expected = F.linear(x, matrix, bias)
            terms = F.linear(x.abs(), matrix.abs(), None if bias is None else bias.abs())
            bound = 2 * (matrix.shape[1] + 2) * torch.finfo(matrix.dtype).eps * terms
            if y.shape == expected.shape and bool(((y - expected).abs() <= bound).all()):
                return ""
            found = "gives something else"
        except Exception as error:
            found = f"raises {type(error).__name__}"
    formula = f"x @ {'weight' if entry.transposed else 'weight.T'} + bias"
    return f"registered as {formula}, it {found} for a row x: see `transposed` of octavo.nn.replacements.register"


def is_plain(module: nn.Module) -> bool:
    """Whether `module` is a float layer of a registered class itself: a subclass might compute something else."""
    entry = REGISTRY.get(_full_name(type(module)))
    return entry is not None and not entry.unserved


def has_other_forward(module: nn.Module) -> bool:
    """Whether `module` is of a subclass of a registered class, and the subclass has another forward."""
    kinds = type(module).__mro__
    registered: Any = next((each for each in kinds if _full_name(each) in REGISTRY), None)
    return registered is not None and getattr(type(module), "forward", None) is not registered.forward


def matrix_of(layer: Any) -> torch.Tensor:
    """The weight of a float or a prepared layer as W [n, k], a view of its Parameter."""
    return _entry(layer).matrix(layer.weight)


def weight_of(layer: Any, matrix: torch.Tensor) -> torch.Tensor:
    """What the Parameter `weight` of `layer` holds for W = `matrix` [n, k], a view."""
    return _entry(layer).weight(matrix)


def bias_of(layer: nn.Module) -> Any:
    """The bias [n] of a float layer; None if it has none, or its class knows of none."""
    return getattr(layer, "bias", None)


def features_of(layer: Any) -> tuple[int, int]:
    """k and n, the sizes of the input and the output of a float layer; zeros if it is not initialized yet."""
    weight = layer.weight
    if is_lazy(weight):
        return 0, 0
    n, k = _entry(layer).matrix(weight).shape
    return k, n


def with_tensors(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """A float layer like `layer`, which may be on the meta device; it holds these tensors themselves, frozen."""
    tensors = {"weight": weight, "bias": bias}
    result = copy.copy(layer)
    result.__dict__["_parameters"] = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in tensors.items()
    }
    return result


def _entry(layer: Any) -> Replacement:
    """What the layer replaced, if it is prepared."""
    found = layer.__dict__.get("replaces") or replacement_of(layer) or embedding_of(layer)
    if not isinstance(found, Replacement):
        raise TypeError(
            f"{type(layer).__name__} is no layer that octavo knows; octavo.nn.replacements.register makes a "
            "class known"
        )
    return found


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
