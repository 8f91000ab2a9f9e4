# SPDX-License-Identifier: Apache-2.0
"""The normal form of an exported block: aten operators are read in order, and what they amount to is put together.

A rule makes the node for one operator out of the nodes of its arguments, so a pattern is recognized where its last
operator is read: x / rms(x) * weight at the second product, a rotation at the sum. What was only needed on the way is
nobody's input then. Shapes are compared as formulas of batch and length, never as the numbers of the example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node as FxNode

from ... import ops
from .graph import Exported, Node, NotUnderstood, Shape

Rule = Callable[..., Any]  # (shape of the result, *arguments, **options) -> Node; None: not understood
RULES: dict[str, Rule] = {}
_NO_VALUE = object()  # of operators that only look at shapes


def normal_form(exported: Exported) -> list[Node | None]:
    """What the block returns, one node for each tensor. Raises: NotUnderstood."""
    values: dict[FxNode, Any] = {}
    operators = [_name(fx) for fx in exported.program.graph.nodes if fx.op == "call_function"]
    for name in operators:
        if name not in RULES:
            raise NotUnderstood(f"operator {name} is not understood")
    for fx in exported.program.graph.nodes:
        if fx.op == "placeholder":
            kind, name = exported.names[fx.name]
            is_float = fx.meta["val"].is_floating_point()
            values[fx] = Node(kind, (), _shape(fx), {"name": name, "is_float": is_float})
        elif fx.op == "call_function":
            values[fx] = _read(fx, values)
    output = next(fx for fx in exported.program.graph.nodes if fx.op == "output")
    return [values.get(fx) if isinstance(fx, FxNode) else None for fx in output.args[0]]


def _read(fx: FxNode, values: dict[FxNode, Any]) -> Any:
    def value(argument: Any) -> Any:
        if isinstance(argument, FxNode):
            return values[argument]
        return [value(item) for item in argument] if isinstance(argument, list | tuple) else argument

    name = _name(fx)
    _require_float32(fx)
    options = {key: value(item) for key, item in fx.kwargs.items()}
    node = RULES[name](_shape(fx), *(value(item) for item in fx.args), **options)
    if node is None:
        raise NotUnderstood(f"operator {name} is not understood where it stands")
    return node


def _name(fx: FxNode) -> str:
    if isinstance(fx.target, torch._ops.OpOverload):
        return fx.target._schema.name.removeprefix("aten::")
    return getattr(fx.target, "__name__", str(fx.target))


def _require_float32(fx: FxNode) -> None:
    """Raises NotUnderstood unless all floats are float32: then a conversion to float32 changes nothing."""
    for node in (fx, *fx.all_input_nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float32:
            raise NotUnderstood(f"computes in {str(value.dtype).removeprefix('torch.')}, float32 is served")


def _shape(fx: FxNode) -> Shape:
    value = fx.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(size if isinstance(size, int) else size.node.expr for size in value.shape)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


# --- what changes no values -----------------------------------------------------------------------------------------


@_rule("sym_size", "_assert_tensor_metadata", "_assert_scalar", "mul_int", "add_int")
def _of_shapes(shape: Shape, *args: Any, **options: Any) -> Any:
    return _NO_VALUE


@_rule("contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy")
def _same(shape: Shape, x: Node, *args: Any, **options: Any) -> Node | None:
    return x


@_rule("to", "_to_copy")
def _to(shape: Shape, x: Node, *args: Any, **options: Any) -> Node | None:
    dtypes = [value for value in (*args, *options.values()) if isinstance(value, torch.dtype)]
    # An input may be a mask of bools.
    return x if dtypes == [torch.float32] and (x.op != "input" or x.is_float) else None


@_rule("dropout")
def _dropout(shape: Shape, x: Node, p: float, train: bool) -> Node | None:
    return None if train and p else x


@_rule("getitem")
def _getitem(shape: Shape, nodes: list[Node], index: int) -> Node:
    return nodes[index]


# --- heads: split(x) is x as [batch, length, heads, head_dim]; in heads(x) length and heads have changed places -----


@_rule("view", "reshape", "_unsafe_view", "flatten", "unflatten")
def _view(shape: Shape, x: Node, *args: Any) -> Node | None:
    if shape == x.shape:
        return x
    if len(shape) == 4 and len(x.shape) == 3 and shape[:2] == x.shape[:2]:
        return Node("split", (x,), shape)
    if x.op == "split" and shape == x.inputs[0].shape:
        return x.inputs[0]
    if x.op == "expanded" and len(shape) == 4:
        source = x.inputs[0]
        batch, heads, length, head_dim = source.shape
        if shape == (batch, heads * x.shape[2], length, head_dim):
            return Node("repeated", (source,), shape)
    return None


@_rule("transpose")
def _transpose(shape: Shape, x: Node, a: int, b: int) -> Node | None:
    if {a % len(x.shape), b % len(x.shape)} != {1, 2}:
        return None
    if x.op == "split":
        return Node("heads", x.inputs, shape)
    return Node("split", x.inputs, shape) if x.op == "heads" else None


@_rule("permute")
def _permute(shape: Shape, x: Node, dims: list[int]) -> Node | None:
    """Only the permutation that exchanges length and heads, as `_transpose` does."""
    return _transpose(shape, x, 1, 2) if list(dims) == [0, 2, 1, 3] else None


@_rule("unsqueeze")
def _unsqueeze(shape: Shape, x: Node, dim: int) -> Node | None:
    """one_more(x): an axis beside heads, along which keys are repeated; for_all_heads(x): an axis for the heads."""
    if len(x.shape) == 4 and dim == 2:
        return Node("one_more", (x,), shape)
    return Node("for_all_heads", (x,), shape) if len(x.shape) == 3 and dim == 1 else None


@_rule("expand")
def _expand(shape: Shape, x: Node, *args: Any, **options: Any) -> Node | None:
    """expanded(x): heads of keys or values, of which several queries read each; `_view` makes repeated(x) of it."""
    if shape == x.shape:
        return x
    if x.op == "one_more" and shape[:2] + shape[3:] == x.shape[:2] + x.shape[3:]:
        return Node("expanded", x.inputs, shape)
    return None


@_rule("slice")
def _slice(
    shape: Shape, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Node | None:
    if shape == x.shape and step == 1:
        return x
    last = len(shape) - 1
    if dim in (-1, last) and step == 1 and x.shape[-1] == 2 * shape[-1] and start in (0, None, shape[-1]):
        return Node("half", (x,), shape, {"second": start == shape[-1]})
    return None


# --- arithmetic -----------------------------------------------------------------------------------------------------


@_rule("linear")
def _linear(shape: Shape, x: Node, weight: Node, bias: Node | None = None) -> Node | None:
    if weight.op != "linear" or bias is not None:
        return None
    return Node("linear", (x,), shape, {"module": weight.name})


@_rule("add", "add_")
def _add(shape: Shape, a: Node, b: Any, alpha: float = 1) -> Node | None:
    if alpha != 1:
        return None
    if not isinstance(b, Node):
        known = a.op == "mean_square" and isinstance(b, float)
        return Node("mean_square", a.inputs, shape, {"eps": a.eps + b}) if known else None
    rope = _rope(shape, a, b) or _rope(shape, b, a)
    if rope is not None:
        return rope
    return Node("add", (a, b), shape) if a.shape == b.shape == shape else None


def _rope(shape: Shape, plain: Node, rotated: Node) -> Node | None:
    if plain.op != "times_angles" or rotated.op != "times_angles":
        return None
    x, cos = plain.inputs
    turned, sin = rotated.inputs
    known = turned.op == "turned" and turned.inputs[0] is x and x.op == "heads"
    return Node("rope", (x, cos, sin), shape) if known else None


@_rule("mul")
def _mul(shape: Shape, a: Node, b: Any) -> Node | None:
    if not isinstance(b, Node):
        return None
    for x, y in ((a, b), (b, a)):
        if y.op == "for_all_heads" and y.inputs[0].op == "input" and x.shape == shape:
            return Node("times_angles", (x, y.inputs[0]), shape)
        if y.op == "inverse_rms" and y.inputs[0] is x:
            return Node("normalized", (x,), shape, {"eps": y.eps})
        if y.op == "parameter" and x.op == "normalized" and y.shape == shape[-1:]:
            return _rms_norm(shape, x.inputs[0], y, x.eps)
        if x.op == "activation" and x.activation == "silu" and y.shape == x.shape:
            return Node("silu_mul", (x.inputs[0], y), shape)
    return None


@_rule("neg")
def _neg(shape: Shape, x: Node) -> Node | None:
    return Node("negative", (x,), shape) if x.op == "half" else None


@_rule("cat")
def _cat(shape: Shape, parts: list[Node], dim: int = 0) -> Node | None:
    if len(parts) != 2 or dim not in (-1, len(shape) - 1) or parts[0].op != "negative":
        return None
    second, first = parts[0].inputs[0], parts[1]
    same = first.op == "half" and first.inputs[0] is second.inputs[0]
    return Node("turned", first.inputs, shape) if same and second.second and not first.second else None


@_rule("pow")
def _pow(shape: Shape, x: Node, exponent: float) -> Node | None:
    return Node("square", (x,), shape) if exponent == 2 else None


@_rule("mean")
def _mean(shape: Shape, x: Node, dims: list[int], keepdim: bool = False) -> Node | None:
    known = x.op == "square" and list(dims) in ([-1], [len(x.shape) - 1]) and keepdim
    return Node("mean_square", x.inputs, shape, {"eps": 0.0}) if known else None


@_rule("rsqrt")
def _rsqrt(shape: Shape, x: Node) -> Node | None:
    return Node("inverse_rms", x.inputs, shape, {"eps": x.eps}) if x.op == "mean_square" else None


# --- norms, activations, attention ----------------------------------------------------------------------------------


@_rule("layer_norm")
def _layer_norm(
    shape: Shape, x: Node, axes: list, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Node | None:
    if not _is_vector(weight, shape) or (bias is not None and not _is_vector(bias, shape)) or len(axes) != 1:
        return None
    names = {"weight": weight.name, "bias": None if bias is None else bias.name}
    return Node("norm", (x,), shape, {**names, "eps": eps, "rms": False})


@_rule("rms_norm", "octavo::rms_norm")
def _rms_norm(shape: Shape, x: Node, *args: Any) -> Node | None:
    *_, weight, eps = args
    if not _is_vector(weight, shape) or not isinstance(eps, float):
        return None
    return Node("norm", (x,), shape, {"weight": weight.name, "bias": None, "eps": eps, "rms": True})


def _is_vector(parameter: Any, shape: Shape) -> bool:
    return isinstance(parameter, Node) and parameter.op == "parameter" and parameter.shape == shape[-1:]


def _activation(name: str) -> Rule:
    return lambda shape, x: Node("activation", (x,), shape, {"activation": name})


RULES.update({"relu": _activation("relu"), "silu": _activation("silu")})


@_rule("gelu")
def _gelu(shape: Shape, x: Node, approximate: str = "none") -> Node:
    name = "gelu" if approximate == "none" else "gelu_tanh"
    return Node("activation", (x,), shape, {"activation": name})


@_rule("octavo::activate")
def _activate(shape: Shape, x: Node, number: int) -> Node:
    return Node("activation", (x,), shape, {"activation": ops.ACTIVATIONS[number - 1]})


@_rule("octavo::silu_mul")
def _silu_mul(shape: Shape, gate: Node, up: Node) -> Node:
    return Node("silu_mul", (gate, up), shape)


@_rule("scaled_dot_product_attention")
def _sdpa(shape: Shape, *args: Any, **options: Any) -> Node | None:
    q, k, v = args[:3]
    given, defaults = list(args[3:]), [None, 0.0, False]
    mask, dropout, causal = given + defaults[len(given) :]
    mask = options.pop("attn_mask", mask)
    known = not dropout and options.keys() <= {"scale", "enable_gqa"}
    merged = _attention((q, k, v), mask, causal, options.get("scale")) if known else None
    return None if merged is None else Node("heads", (merged,), shape)


@_rule("octavo::attention")
def _octavo_attention(shape: Shape, *args: Any) -> Node | None:
    q, k, v, mask, causal, scale, precision = args
    node = _attention((q, k, v), mask, causal, scale)
    if node is not None:
        node.options["precision"] = ops.PRECISIONS[precision]
    return node


@_rule("octavo::rope")
def _octavo_rope(shape: Shape, q: Node, k: Node, cos: Node, sin: Node) -> list[Node] | None:
    if q.op != "heads" or k.op != "heads" or cos.op != "input" or sin.op != "input":
        return None
    return [Node("rope", (x, cos, sin), x.shape) for x in (q, k)]


def _attention(qkv: tuple[Node, Node, Node], mask: Any, causal: bool, scale: float | None) -> Node | None:
    """The node of the whole attention, [batch, length, heads * head_dim]; None if it is not understood."""
    q, k, v = qkv
    if k.op == v.op == "repeated":
        k, v = k.inputs[0], v.inputs[0]
    sources = [x.inputs[0] if x.op == "rope" else x for x in (q, k, v)]
    known = all(x.op == "heads" for x in sources) and v.op == "heads" and (mask is None or mask.op == "input")
    if not known or k.shape != v.shape or q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        return None
    batch, heads, length, head_dim = q.shape
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    options = {"causal": bool(causal), "scale": scale, "head_dim": head_dim}
    return Node("attention", inputs, (batch, length, heads * head_dim), options)
