# SPDX-License-Identifier: Apache-2.0
"""How an attention module of transformers is called, and how it calls its cache and the attention function.

transformers gives arguments new names and caches new arguments from one version to the next. So nothing is assumed: a
run of the module itself shows what it hands on (fusion/steps/attention_call.py), and that is written down here as data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# What transformers has called the cache, the newest name first.
CACHES = ("cache", "past_key_values")


def cache_parameter(forward: Callable[..., Any]) -> str:
    """The name of the argument by which `forward` takes transformers' cache; "" if it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHES if name in parameters), "")


def cache_of(output: Any) -> Any:
    """The cache in a model's output, or None."""
    fields = getattr(
        output, "__dict__", {}
    )  # asking for an attribute by its older name makes transformers warn
    return next((fields[name] for name in CACHES if fields.get(name) is not None), None)


@dataclass(frozen=True)
class Given:
    """Stands for the argument `name` of the call; "cos" and "sin" are the parts of position_embeddings."""

    name: str


@dataclass(frozen=True)
class Options:
    """Stands for a dict of all arguments that the module has no name for."""


@dataclass
class AttentionCall:
    """How one attention module is called, and how it calls its cache and the attention function.

    parameters     names of its forward's parameters, in order
    has_options    whether its forward also takes arguments without a name here; the attention function is given them
    update         what it hands to cache.update after keys, values and the layer's number: Given, Options, plain
                   values, and dicts of those
    update_named   the same for arguments by name
    handed_on      what it hands to the attention function by name, beside the arguments without a name here
    """

    parameters: list[str]
    has_options: bool = False
    update: tuple[Any, ...] = ()
    update_named: dict[str, Any] = field(default_factory=dict)
    handed_on: dict[str, Any] = field(default_factory=dict)

    @property
    def cache(self) -> str:
        """The cache's name among the parameters; "" if there is none."""
        return next((name for name in CACHES if name in self.parameters), "")

    def named(self, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arguments of a call by name, and those that the module has no name for.

        An older name of the cache stands for the cache, as transformers has it.
        raises   TypeError for an argument that the module would not take
        """
        given = dict(zip(self.parameters, args, strict=False))
        options: dict[str, Any] = {}
        for name, value in kwargs.items():
            name = self.cache or name if name in CACHES else name
            target = given if name in self.parameters else options
            if name in target and target[name] is not None:
                raise TypeError(f"RotaryAttention: {name} is given twice")
            target[name] = value
        if len(args) > len(self.parameters):
            raise TypeError(
                f"RotaryAttention: {len(args)} arguments without a name, at most {len(self.parameters)}"
            )
        if options and not self.has_options:
            raise TypeError(
                f"RotaryAttention: {', '.join(options)} is no argument of the module it stands for; accepted are "
                f"{', '.join(self.parameters)}"
            )
        return given, options

    def options_of(self, given: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments that the attention function is given by name."""
        return {**{name: _filled(value, given, options) for name, value in self.handed_on.items()}, **options}

    def updated(self, cache: Any, given: dict[str, Any], options: dict[str, Any], *states: Any) -> Any:
        """What `cache` returns for `states`: keys, values and the layer's number."""
        extra = [_filled(value, given, options) for value in self.update]
        named = {name: _filled(value, given, options) for name, value in self.update_named.items()}
        return cache.update(*states, *extra, **named)


def _filled(value: Any, given: dict[str, Any], options: dict[str, Any]) -> Any:
    if isinstance(value, Given):
        return given.get(value.name)
    if isinstance(value, Options):
        return options
    if isinstance(value, dict):
        return {name: _filled(item, given, options) for name, item in value.items()}
    return value
