# SPDX-License-Identifier: Apache-2.0
"""What an attention module hands to its cache and to the attention function, found by running it with stand-ins.

The stand-ins give random tensors back. So it is seen, not assumed, that the module's keys and values go to the cache,
that what the cache returns goes to the attention function, and which other arguments each of the two is given.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ...base.hooks import hooked
from ...nn.fused.attention_call import CACHES, AttentionCall, Given, Options
from ..blocks.graph import NotUnderstood
from .interface import register_attention

# Parameters whose part is known. A module with another one is left alone.
REQUIRED = ("hidden_states", "position_embeddings", "attention_mask")
KNOWN = (*REQUIRED, *CACHES, "position_ids", "cache_position")
# Sizes of random inputs and first positions: a module that clips or scales only large ones differs at the second.
TRIALS = ((1.0, 0), (16.0, 1_000_000))
_STAND_IN = "octavo_stand_in"
_BATCH, _LENGTH, _PAST = 2, 5, 3


@dataclass
class Run:
    """One run with random inputs: what the module was given, and what it handed on."""

    given: dict[str, Any]
    options: dict[str, Any]
    updates: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    attended: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    cached: tuple[torch.Tensor, ...] = ()  # keys and values, as the cache returned them
    y: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the attention function
    projected: list[torch.Tensor] = field(default_factory=list)  # what o_proj was given
    output: Any = None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the `update` of a cache that holds a few tokens already."""
        self.updates.append(((keys, values, *args), kwargs))
        self.cached = tuple(_random(*x.shape[:2], _PAST + x.shape[2], x.shape[3]) for x in (keys, values))
        return self.cached

    def attend(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Stands in for a function of transformers' AttentionInterface."""
        names = ("query", "key", "value", "attention_mask")
        kwargs.update(zip(names, args, strict=False))
        given = tuple(kwargs.pop(name) for name in names)
        self.attended.append((given, kwargs))
        batch, heads, length, size = given[0].shape
        self.y = _random(batch, length, heads, size).to(given[0].dtype)
        return self.y, self.y


def read_call(module: Any) -> AttentionCall:
    """How `module` is called, and how it calls its cache and the attention function. Raises: NotUnderstood."""
    call = _signature(module)
    run = recorded(module, call)
    given = {**run.given, **dict(zip(("cos", "sin"), run.given["position_embeddings"], strict=True))}
    given.pop(call.cache, None)
    (_, _, layer, *update), named = run.updates[0]
    if type(layer) is not int or layer != module.layer_idx:
        raise NotUnderstood("it calls its cache in another way than with keys, values and its number")
    call.update = tuple(_template(value, given, run.options) for value in update)
    call.update_named = {name: _template(value, given, run.options) for name, value in named.items()}
    handed_on = run.attended[0][1]
    if any(handed_on.pop(name, None) is not value for name, value in run.options.items()):
        raise NotUnderstood("it does not hand all its arguments on to the attention function")
    call.handed_on = {name: _template(value, given, run.options) for name, value in handed_on.items()}
    return call


def inputs_of(module: Any, call: AttentionCall) -> Iterator[dict[str, Any]]:
    """Arguments for the module, without a cache and with one, with which its formula can be looked at."""
    run = _inputs(module, call, 1.0, 0)
    options = {name: value for name, value in run.options.items() if isinstance(value, torch.Tensor)}
    for cache, keys in ((None, _LENGTH), (_Doubling(), 2 * _LENGTH)):
        mask = torch.ones(_BATCH, 1, _LENGTH, keys, dtype=torch.bool)
        yield {**run.given, **options, "attention_mask": mask, call.cache: cache}


class _Doubling:
    """A cache that already holds the very keys and values that it is given."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.cat([keys, keys], 2), torch.cat([values, values], 2)


def recorded(module: Any, call: AttentionCall, size: float = 1.0, position: int = 0) -> Run:
    """One run of `module` on random inputs of this size, from this position on. Raises: NotUnderstood."""
    run = _inputs(module, call, size, position)

    def note(_: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        run.projected.append(args[0])
        run.output = output

    try:
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            hooked([(module.o_proj, note)]),
            _attending_by(module, run.attend),
        ):
            result = module.forward(**run.given, **run.options)
    except Exception as error:
        raise NotUnderstood(f"it fails on random inputs: {type(error).__name__}: {error}") from error
    _check(run, result)
    return run


def _signature(module: nn.Module) -> AttentionCall:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    others = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in KNOWN]
    if others:
        raise NotUnderstood(f"its forward takes {others[0]}, which is not known")
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise NotUnderstood(f"its forward takes no {missing[0]}")
    call = AttentionCall(names, any(p.kind is p.VAR_KEYWORD for p in parameters))
    if not call.cache:
        raise NotUnderstood(f"its forward takes no cache, whose known names are {', '.join(CACHES)}")
    return call


def _inputs(module: Any, call: AttentionCall, size: float, position: int) -> Run:
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    hidden = size * _random(_BATCH, _LENGTH, module.q_proj.in_features)
    angles = tuple(_random(_BATCH, _LENGTH, module.head_dim).to(dtype) for _ in range(2))
    positions = position + torch.arange(_LENGTH)
    values = {
        "hidden_states": hidden.to(dtype),
        "position_embeddings": angles,
        "attention_mask": torch.ones(_BATCH, 1, _LENGTH, _PAST + _LENGTH, dtype=torch.bool),
        "position_ids": positions.expand(_BATCH, _LENGTH),
        "cache_position": positions,
    }
    run = Run({name: value for name, value in values.items() if name in call.parameters}, {})
    if call.has_options:
        others = {name: value for name, value in values.items() if name not in call.parameters}
        run.options = {**others, "octavo_option": Given("octavo_option")}
    run.given[call.cache] = run
    return run


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@contextmanager
def _attending_by(module: Any, attend: Any) -> Iterator[None]:
    """Inside, `module` calls the attention function `attend`; it has a copy of its config, which others share."""
    config = module.config
    register_attention(_STAND_IN, attend)
    module.config = copy.copy(config)
    try:
        module.config._attn_implementation_internal = _STAND_IN
        yield
    finally:
        module.config = config


def _check(run: Run, result: Any) -> None:
    if len(run.updates) != 1 or len(run.attended) != 1 or len(run.projected) != 1:
        raise NotUnderstood("it does not call its cache, the attention function and o_proj once each")
    _, keys, values, mask = run.attended[0][0]
    if keys is not run.cached[0] or values is not run.cached[1]:
        raise NotUnderstood("it changes what its cache returns")
    if mask is not run.given["attention_mask"]:
        raise NotUnderstood("it changes its attention mask")
    batch, length = run.y.shape[:2]
    if not torch.equal(run.projected[0], run.y.reshape(batch, length, -1)):
        raise NotUnderstood("it changes what the attention function gives")
    if type(result) is not tuple or len(result) != 2 or result[0] is not run.output or result[1] is not run.y:
        raise NotUnderstood("it returns something else than o_proj's output and the attention weights")


def _template(value: Any, given: dict[str, Any], options: dict[str, Any]) -> Any:
    """`value`, in which everything that came from the call is replaced by the name it had there."""
    for name, argument in {**given, **options}.items():
        if value is argument:
            return Given(name)
    if isinstance(value, dict):
        if options and value.keys() == options.keys() and all(value[key] is options[key] for key in options):
            return Options()
        return {name: _template(item, given, options) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise NotUnderstood(f"it hands on a {type(value).__name__} of its own")
