# SPDX-License-Identifier: Apache-2.0
"""Factors that move from a module into the layers that read it, and the trials which show that nobody else notices.

A trial uses factors that are powers of two: floats carry them without rounding, so the model must give the same numbers
as before (docs/numerics.md, eq. 58). Parameters are written in place, for optimizers have them, and put back unless
everything was as it should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ..nn.replacements import matrix_of, weight_of
from .absorbing import is_plain_linear
from .replay import Replay
from .tracing import Shapes

MOST_RUNS = 16  # of the kept calls, while looking for the folds that are wrong
LARGEST_EXPONENT = 2  # of the powers of two that are tried
LARGEST_TOLERANCE = 2.0**-10  # 60 dB: rounding to 8 bits is 10 times as far off


class Fold(Protocol):
    """Something that can be tried on a model."""

    def try_(self) -> bool:
        """Moves powers of two between the weights; returns False if that cannot be done."""

    def undo_(self) -> None:
        """Puts everything back."""


AnyFold = TypeVar("AnyFold", bound=Fold)


def proven(model: nn.Module, folds: Sequence[AnyFold], replay: Replay) -> list[AnyFold]:
    """The folds with which the calls in `replay` give what they gave without folds.

    All folds are tried at once, and if that fails by halves, in at most MOST_RUNS runs. A fold that is not shown to be
    right is left out.
    """
    tolerance, runs = _tolerance(model), 0

    def agrees(tried: Sequence[AnyFold]) -> bool:
        nonlocal runs
        runs += 1
        try:
            # The last one first: a layer divides before its weight is hidden by the fold that it reads.
            return (
                all([fold.try_() for fold in reversed(tried)])
                and runs <= MOST_RUNS
                and replay.agrees(tolerance)
            )
        finally:
            for fold in tried:
                fold.undo_()

    def halves(tried: Sequence[AnyFold]) -> list[AnyFold]:
        half = len(tried) // 2
        parts = (tried[:half], tried[half:]) if half else ()
        return [fold for part in parts for fold in (part if agrees(part) else halves(part))]

    if not folds or agrees(folds):
        return list(folds)
    return halves(folds) if agrees([]) else []  # a model that does not repeat itself shows nothing


def _tolerance(model: nn.Module) -> float:
    """The relative tolerance: each layer may add its sums of k products in another order, eq. 58."""
    columns = {
        id(p): (matrix_of(module) if is_plain_linear(module) else p).shape[-1]
        for module in model.modules()
        for p in module._parameters.values()
        if p is not None and p.dim() == 2
    }
    return min(2.0**-23 * max(columns.values(), default=1) ** 0.5 * len(columns), LARGEST_TOLERANCE)


def powers_of_two(k: int, seed: int) -> torch.Tensor:
    """Random powers of two, float32 [k], above and below 1; the same ones for the same seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    exponents = torch.randint(
        -LARGEST_EXPONENT, LARGEST_EXPONENT + 1, (k,), generator=generator, device="cpu"
    )
    return torch.exp2(torch.where(exponents == 0, LARGEST_EXPONENT, exponents).float())


class Change:
    """Gives the Parameters of `module` new values, and can put the old ones back.

    in_place   write into the Parameters; else new ones take their places, for somebody else has the old ones
    """

    def __init__(self, module: nn.Module, *, in_place: bool):
        self.module: Any = module
        names = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
        self.before: dict[str, Any] = {name: module._parameters[name] for name in names}
        # Inference tensors cannot be written to, and no optimizer trains them.
        self.in_place = in_place and not any(p.is_inference() for p in self.before.values())
        self.values = {name: p.detach().clone() if self.in_place else p for name, p in self.before.items()}

    def write_(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        for name, value in (("weight", weight), ("bias", bias)):
            if name not in self.before or value is None:
                continue
            old = self.before[name]
            if self.in_place:
                old.copy_(value)
            else:
                self.module._parameters[name] = nn.Parameter(
                    value.to(old.dtype), requires_grad=old.requires_grad
                )

    def is_finite(self) -> bool:
        return all(bool(self.module._parameters[name].isfinite().all()) for name in self.before)

    def undo_(self) -> None:
        for name, parameter in self.before.items():
            self.module._parameters[name] = parameter
            if self.in_place:
                parameter.copy_(self.values[name])


# --- what a module becomes that divides its output --------------------------------------------------------------------

Weight = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _times(weight: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return weight / s


def _times_one_more(weight: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The new weight of a norm like Gemma's, which multiplies by 1 + weight."""
    return (1 + weight) / s - 1


class Divided:
    """Makes `producer` give its output divided by s [k] on the last axis.

    calls   arguments that the model calls it with, on the meta device; without any, rows [16, k] are tried
    """

    def __init__(self, producer: Any, calls: Sequence[Shapes], *, in_place: bool):
        self.producer = producer
        self.in_place = in_place
        self.calls = list(calls)
        self.is_linear = is_plain_linear(producer)
        self.k: int = len(matrix_of(producer) if self.is_linear else producer.weight)
        self.form: Weight = _times  # a norm may have another one, which `find_form` sets
        self.change: Change | None = None

    def find_form(self) -> bool:
        """Whether the way in which `producer` is divided by powers of two was found, so that `by_` can do it."""
        if self.is_linear:
            return True
        for form in (_times, _times_one_more):
            self.form = form
            s = self.exact(powers_of_two(self.k, 0))
            if bool((s != 1).any()) and self.by_(s):
                self.undo_()
                return True
        return False

    def exact(self, s: torch.Tensor) -> torch.Tensor:
        """The powers of two `s`, with 1 for channels in which the new weight would have to be rounded."""
        if self.form is not _times_one_more:
            return s
        weight = self.producer.weight.detach()
        # (1 + weight) / s in [1/2, 2] minus 1 has no rounding in float32.
        exponent = torch.frexp((1 + weight.float()).abs())[1].float()
        s = torch.exp2(torch.where(s > 1, exponent, exponent - 1))
        new = self.form(weight.float(), s)
        is_exact = (new.to(weight.dtype).float() == new) & ((1 + new) * s == 1 + weight.float())
        return torch.where(is_exact & s.isfinite(), s, 1.0)

    def by_(self, s: torch.Tensor) -> bool:
        """Divides the output by `s`. Returns False, and changes nothing, if the output then is not what it should be.

        The output of a norm is tried; what a linear layer computes is known.
        """
        change = self.change = Change(self.producer, in_place=self.in_place)
        weight, bias = self.producer.weight.detach(), self.producer._parameters.get("bias")
        try:
            before = [] if self.is_linear else self._outputs()
            new = self._divided_matrix(s) if self.is_linear else self.form(weight, s)
            change.write_(new, None if bias is None else bias.detach() / s)
            after = self._outputs() if before else []
            is_right = change.is_finite() and all(map(self._is_right, before, after, [s] * len(before)))
        except Exception:  # a module that wants other arguments, or writes that are refused
            is_right = False
        except BaseException:
            self.undo_()
            raise
        if not is_right:
            self.undo_()
        return is_right

    def _divided_matrix(self, s: torch.Tensor) -> torch.Tensor:
        """The weight of a linear producer whose outputs are divided by s, as its Parameter holds it."""
        return weight_of(self.producer, matrix_of(self.producer).detach() / s[:, None])

    def undo_(self) -> None:
        if self.change is not None:
            self.change.undo_()
            self.change = None

    def _is_right(self, y: Any, divided: Any, s: torch.Tensor) -> bool:
        """|divided * s - y| <= 4 eps of what is added up in each channel, at most |y| + 2 |bias|."""
        if not isinstance(y, torch.Tensor) or y.shape[-1:] != s.shape or divided.shape != y.shape:
            return False
        bias = self.change.values.get("bias") if self.change is not None else None
        rows = y.double().reshape(-1, len(s))
        largest = rows.abs().amax(0) + (0.0 if bias is None else 2 * bias.double().abs())
        error = (divided.double().reshape(-1, len(s)) * s.double() - rows).abs()
        return bool((error <= 4 * torch.finfo(y.dtype).eps * largest).all())

    def _outputs(self) -> list[Any]:
        calls = self.calls or [
            ((torch.empty(16, self.k, dtype=self.producer.weight.dtype, device="meta"),), {})
        ]
        generator = torch.Generator("cpu").manual_seed(0)
        with torch.random.fork_rng(devices=[]):  # dropout, if there is any, must not move the user's numbers
            return [
                self.producer(*_filled(args, generator), **_filled(kwargs, generator))
                for args, kwargs in calls
            ]


def _filled(value: Any, generator: torch.Generator) -> Any:
    """Random numbers in the place of tensors on the meta device; of matrices 16 rows, of larger tensors the first."""
    if isinstance(value, torch.Tensor):
        rows = 16 if value.dim() == 2 else 1
        shape = value.shape if value.dim() < 2 else (min(len(value), rows), *value.shape[1:])
        if not value.is_floating_point():
            return torch.zeros(shape, dtype=value.dtype, device="cpu")
        return torch.randn(shape, generator=generator, device="cpu").to(value.dtype)
    if type(value) in (tuple, list):
        return type(value)(_filled(item, generator) for item in value)
    if type(value) is dict:
        return {key: _filled(item, generator) for key, item in value.items()}
    return value


@contextmanager
def undone(folds: Sequence[Any]) -> Iterator[None]:
    """After an exception, undoes `folds`, the last one first."""
    try:
        yield
    except BaseException:
        for fold in reversed(folds):
            fold.undo_()
        raise
