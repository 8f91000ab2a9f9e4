# SPDX-License-Identifier: Apache-2.0
"""Compares a replacement with the original on the example's tensors before it is put in, and whole models' outputs.

A hook hands what a module is called with to the replacement as well, and another one compares what both give. So the
original's tensors are all that the replacement is judged by, and errors of other places do not add up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..base.batches import float_tensors
from ..base.hooks import hooked
from ..evaluation.comparison_result import OutputFigures
from ..metrics import ErrorAccumulator
from .example import Example
from .step import Bound, Candidate

# Two ways to compute the same in float32 may differ by this much of the result: 16 roundings of 2^-24 on each side,
# which is more than the stated bounds of our operators and of torch's.
FLOAT32_ERROR = 2.0**-19


def verify(candidates: list[Candidate], example: Example) -> None:
    """Fills in `error` of each candidate, and `reason` where the replacement fails or is off by more than its bound."""
    probes = [_CandidateProbe(candidate) for candidate in candidates if candidate.compute is not None]
    if not probes:
        return
    with ExitStack() as stack:
        for probe in probes:
            stack.enter_context(probe.watching())
        example.run()
        for probe in probes:
            probe.run_trials()
    for probe in probes:
        probe.conclude()
    for candidate in candidates:
        if not candidate.reason and any(partner.reason for partner in candidate.partners):
            candidate.reason = "shares a module with a place that is kept"


def compare_outputs(
    expected: list[list[torch.Tensor]], found: list[list[torch.Tensor]]
) -> tuple[OutputFigures | None, str]:
    """How far a model's outputs have moved; None and the reason if they cannot be compared."""
    figures = ErrorAccumulator()
    for before, after in zip(expected, found, strict=True):
        if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
            return None, "the model's output has other tensors then"
        for x, y in zip(before, after, strict=True):
            if not torch.equal(x.isfinite(), y.isfinite()):
                return None, "other elements of the model's output are NaN or infinite then"
            finite = x.isfinite()
            figures.update(x[finite], y[finite])
    return OutputFigures.of(figures), ""


def relative(factor: float) -> Bound:
    """The bound that allows `factor` times the magnitude of each element."""
    return lambda expected, *args, **kwargs: factor * expected.float().abs()


class _CandidateProbe:
    """Watches the places of one candidate while the example runs."""

    def __init__(self, candidate: Candidate):
        self.candidate = candidate
        self.pending: deque[tuple[tuple, dict, list[torch.Tensor]]] = deque()
        self.calls, self.error, self.reason = 0, 0.0, ""
        self.last: Any = None  # what `gives` returned
        self.place = "the example"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, calls of the original are compared with the replacement, as they are without the user's hooks."""
        reads, gives = self.candidate.reads, self.candidate.gives
        assert reads is not None and gives is not None
        with ExitStack() as stack:
            stack.enter_context(hooked([(reads, self._on_call)], before=True, first=True))
            if self.candidate.of_input:
                stack.enter_context(hooked([(gives, self._on_input)], before=True))
                stack.enter_context(hooked([(gives, self._on_last), (reads, self._on_end)]))
            else:
                stack.enter_context(hooked([(gives, self._on_output)], first=True))
            yield

    def _on_call(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        compute: Callable[..., Any] | None = self.candidate.compute
        if self.reason or compute is None:
            return
        try:
            found = compute(*args, **kwargs)
        except Exception as error:  # whatever a replacement does not take is a reason to keep the original
            self.reason = failure(error)
            return
        self.pending.append((args, kwargs, list(float_tensors(found))))

    def _on_input(self, _: nn.Module, args: tuple, kwargs: dict) -> None:
        self._compare(args)

    def _on_last(self, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.last = output

    def _on_end(self, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output  # attention has its weights beside it
        if first is not self.last:
            self.reason = self.reason or "it gives something else than its last layer"
        self.last = None

    def _on_output(self, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._compare(output)

    def _compare(self, output: Any) -> None:
        if self.reason or not self.pending:
            return
        args, kwargs, found = self.pending.popleft()
        expected = list(float_tensors(output))
        self.calls += 1
        if [(x.shape, x.dtype) for x in expected] != [(y.shape, y.dtype) for y in found]:
            self.reason = "the replacement gives other shapes or dtypes"
            return
        for x, y in zip(expected, found, strict=True):
            self._add(x, y, args, kwargs)

    def _add(self, expected: torch.Tensor, found: torch.Tensor, args: tuple, kwargs: dict) -> None:
        same = (expected == found) | (expected.isnan() & found.isnan())  # infinite ones as well
        difference = (expected.float() - found.float()).abs().masked_fill(same, 0.0)
        largest = difference.amax().item() if difference.numel() else 0.0
        self.error = max(self.error, largest)
        bound = self.candidate.bound
        if bound is not None and not bool((difference <= bound(expected, *args, **kwargs)).all()):
            self.reason = f"differs by {largest:.1e} on {self.place}, more than rounding explains"

    def run_trials(self) -> None:
        """Runs the original on the step's own values, if the example reaches it."""
        self.place = "random inputs"
        assert self.candidate.reads is not None
        for args in self.candidate.trials:
            if self.calls and not self.reason:
                with torch.no_grad():
                    self.candidate.reads(*args)

    def conclude(self) -> None:
        candidate = self.candidate
        if not self.calls and not self.reason:
            self.reason = "the example does not reach it"
        candidate.reason = candidate.reason or self.reason
        candidate.error = self.error if self.calls else None


def failure(error: Exception) -> str:
    """The error as one line for the report."""
    lines = str(error).strip().splitlines() or [""]
    return f"the replacement raises {type(error).__name__}: {lines[0]}"
