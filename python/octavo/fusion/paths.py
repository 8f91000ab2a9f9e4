# SPDX-License-Identifier: Apache-2.0
"""Whether a module computes by one formula for all inputs: then random inputs prove what it computes.

A module is exported, and its graph may hold smooth operators only, such as sums, products and powers, and no condition
on sizes. Two such formulas that agree on random inputs agree everywhere. A limit, a comparison or a rounding is another
path, which no example need take: a module with such an operator is left alone.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .blocks.graph import NotUnderstood, export_block
from .structure import NUMBERS, structure_of

SHAPES = """stack alias cat chunk clone contiguous detach detach_ dropout expand flatten getitem lift_fresh_copy permute
    repeat_interleave reshape select slice split split_with_sizes squeeze sym_size to _to_copy transpose type_as
    unbind unflatten unsafe_split unsqueeze view _unsafe_view add_int mul_int _assert_tensor_metadata _assert_scalar"""
ARITHMETIC = """add add_ sub rsub mul mul_ div div_ neg pow square mean sum rsqrt sqrt exp tanh sigmoid erf linear
    matmul gelu silu mish layer_norm rms_norm softmax scaled_dot_product_attention"""
SMOOTH = frozenset([*SHAPES.split(), *ARITHMETIC.split()])
# Of these the values at a few points say all that there is to know: they have no settings.
KINKS = frozenset({"relu", "relu_"})

# (structure of a module, what it was called with) -> why it has other paths, or "".
Proofs = dict[Any, str]


class _Unread:
    """Stands for a module's number in the model. It can be handed on, to a cache for instance, and that is all:
    whatever asks for its value raises. So what is found out with it holds for modules of every number."""

    __class__ = int  # type: ignore[assignment]  # what isinstance is told

    def __init__(self, name: str):
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(f"{attribute} of the module's {self.name} is asked for")


def _refuse(number: _Unread, *_: Any) -> Any:
    raise TypeError(f"the value of the module's {number.name} is asked for")


_COMPARED_OR_SHOWN = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __hash__ __str__ __repr__ __format__".split()
_ARITHMETIC = [
    name for name in dir(int) if name.startswith("__") and name not in (*dir(object), "__getnewargs__")
]
for _method in (*_COMPARED_OR_SHOWN, *_ARITHMETIC):
    setattr(_Unread, _method, _refuse)


def other_paths(module: nn.Module, inputs: dict[str, Any], proofs: Proofs, *, kinks: bool = False) -> str:
    """Why `module`, called with `inputs`, may compute by another formula for other values or sizes; "" if it does not.

    proofs   what is known already, for modules that exist at this time
    kinks    ReLU is accepted, too
    """
    kinds = tuple((name, type(value)) for name, value in inputs.items())
    key = structure_of(module, with_numbers=False), kinds
    if key not in proofs:
        proofs[key] = _look(module, inputs, kinks, without=NUMBERS)
    if not any(name in proofs[key] for name in NUMBERS):
        return proofs[key]
    # The module asks for its number in the model: modules of every number are looked at.
    key = structure_of(module, with_numbers=True), kinds
    if key not in proofs:
        proofs[key] = _look(module, inputs, kinks, without=())
    return proofs[key]


def _look(module: nn.Module, inputs: dict[str, Any], kinks: bool, without: tuple[str, ...]) -> str:
    hidden = {name: value for name, value in vars(module).items() if without and name.endswith(without)}
    vars(module).update({name: _Unread(name) for name in hidden})
    try:
        exported = export_block(module, (), _named(module, inputs))
    except NotUnderstood as error:
        return str(error)
    finally:
        vars(module).update(hidden)
    for node in exported.program.graph.nodes:
        name = _operator(node)
        is_known = name in SMOOTH or (kinks and name in KINKS)
        if name and (not is_known or _rounds(node)):
            return f"operator {name} may take another path for other inputs"
    guards = [guard for guard in exported.guards if not guard.startswith("len(") and "==" not in guard]
    return f"it computes something else for other sizes than {_readable(guards[0])}" if guards else ""


def _named(module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """`inputs` by name; one without a name, "", is the first argument."""
    first = next(iter(inspect.signature(module.forward).parameters), "")
    return {name or first: value for name, value in inputs.items()}


def _operator(node: Any) -> str:
    """The name of the node's operator; "" if it has none, and for operators of Octavo, whose formula is known."""
    if node.op != "call_function":
        return ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(getattr(node.target, "__name__", node.target))
    name = node.target._schema.name
    return "" if name.startswith("octavo::") else str(name).removeprefix("aten::")


def _rounds(node: Any) -> bool:
    """Whether the operator rounds to whole numbers, as a division or a conversion may do."""
    value, sources = node.meta.get("val"), [source.meta.get("val") for source in node.all_input_nodes]
    to_integers = isinstance(value, torch.Tensor) and not value.is_floating_point()
    from_floats = any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in sources)
    return (to_integers and from_floats) or "rounding_mode" in node.kwargs


def _readable(guard: str) -> str:
    return guard.replace("{", "").replace("}", ".shape")
