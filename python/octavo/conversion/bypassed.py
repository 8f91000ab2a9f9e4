# SPDX-License-Identifier: Apache-2.0
"""Linear layers whose weight the module around them multiplies by itself, without calling them.

Quantized, such a layer would save no time and report a success: its weight would be dequantized for each product. Which
layers these are is read from the source of the module's forward and of what that calls on `self`. A layer that is
called there, or used in any way that cannot be followed, is none of them.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

from ..nn.replacements import embedding_of, replacement_of

# What can be asked of a weight without reading its values.
FORM = {
    "data_ptr",
    "device",
    "dim",
    "dtype",
    "element_size",
    "is_meta",
    "layout",
    "ndim",
    "numel",
    "shape",
    "size",
}


def bypassed_layers(model: nn.Module) -> dict[nn.Module, str]:
    """The layers, and why they are better kept float."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        children = {name: child for name, child in module._modules.items() if child is not None}
        layers = {
            name: child for name, child in children.items() if replacement_of(child) or embedding_of(child)
        }
        if layers and "forward" not in vars(module):
            kind: Any = type(module)
            read, called = _uses(kind)
            for name in read & layers.keys():
                if name not in called:
                    found[layers[name]] = f"{kind.__name__} reads its weight without calling it"
                elif embedding_of(layers[name]):
                    found[layers[name]] = f"{kind.__name__} reads its whole weight besides calling it"
    return found


def weights_read(kind: type) -> frozenset[str]:
    """The children of which forward reads the weight's values, and nothing else but the bias; none without a source."""
    read, called = _uses(kind)
    return read - called


@functools.cache
def _uses(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """The children of which forward reads the weight's values, and what it uses in another way; nothing without a
    source."""
    seen: set[str] = set()
    pending, uses = ["forward"], _Uses()
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            tree = _source(getattr(kind, name, None))
            if tree is None:
                return frozenset(), frozenset()
            uses.visit(tree)
            if uses.has_super:  # another forward, which may call them
                return frozenset(), frozenset()
            pending += [method for method in uses.others if inspect.isfunction(getattr(kind, method, None))]
    return frozenset(uses.read), frozenset(uses.others)


def _source(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (TypeError, OSError, SyntaxError, ValueError):
        return None


class _Uses(ast.NodeVisitor):
    """`read`: each name of which `self.name.weight` is used for its values. `others`: each other `self.name`."""

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.others: set[str] = set()
        self.has_super = False

    def visit_Name(self, node: ast.Name) -> None:
        self.has_super = self.has_super or node.id == "super"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if node.attr in FORM and _weight_of(inner):
            return
        if _weight_of(node):
            self.read.add(_weight_of(node))
        elif node.attr == "bias" and _child_of(inner):
            return
        elif _child_of(node):
            self.others.add(node.attr)
        else:
            self.generic_visit(node)


def _child_of(node: ast.AST) -> str:
    """`name` if the node is the expression `self.name`, else None."""
    is_child = (
        isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    )
    return node.attr if is_child else ""  # type: ignore[attr-defined]


def _weight_of(node: ast.AST) -> str:
    """`name` if the node is the expression `self.name.weight`, else None."""
    return _child_of(node.value) if isinstance(node, ast.Attribute) and node.attr == "weight" else ""
