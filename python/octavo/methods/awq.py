# SPDX-License-Identifier: Apache-2.0
"""AWQ: input channels that are large in use get a finer grid, at the cost of the others, before codes are chosen.

Columns of a weight are multiplied by s, and whoever gives the input divides by it, as SmoothQuant has it; how much is
tried out on what reads the input as a whole, an attention or a perceptron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..base.batches import float_tensors
from ..base.configs import require_flags, require_int
from ..base.hooks import hooked
from ..tensors.qparams import QuantizedTensor
from .clip_search import ClipSearch
from .smoothing import LARGEST, SMALLEST, smoothing
from .smoothquant import ChannelMethod, unsmoothed
from .statistics import Positions, gram_of, inputs_recorded


@dataclass(frozen=True)
class AWQ(ChannelMethod):
    """Activation-aware scales: s = mean|x|^r / mean|w|^(1 - r) for the r that leaves the outputs closest.

    steps    how many r are tried, 0, 1 / steps, ...; s = 1 is tried as well
    duo      False: s = mean|x|^r alone
    rows     of the data on which they are tried out, at most; the means are of all rows
    then     chooses the codes of the rescaled weight. ClipSearch(), the default of integers of few bits, then counts
             errors as the inputs do
    Where a norm or a linear layer before can divide by s, it does; else the layer multiplies its input in every call.
    source   Lin et al. 2023 (arXiv:2306.00978), section 3.2; AutoAWQ, `_search_best_scale`, in which s = 1 is missing;
             docs/numerics.md, eq. 93 and 94
    """

    steps: int = 20
    duo: bool = True
    rows: int = 2048

    fold: ClassVar[bool] = True
    is_sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flags(self, "duo")
        for name in ("steps", "rows"):
            require_int(f"AWQ: {name}", getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"AWQ: {name} must be at least 1, got {getattr(self, name)}")

    @classmethod
    @contextmanager
    def watching(
        cls, model: nn.Module, layers: Sequence[Any], *, in_place: bool, positions: Positions | None = None
    ) -> Iterator[None]:
        learning = unsmoothed(layers)
        calls = _Calls(model, learning)
        with smoothing(model, layers, in_place=in_place, choose=calls.best_scales):
            with inputs_recorded(model, learning, positions), calls.kept():
                yield

    def choose_codes(self, prepared: Any) -> QuantizedTensor:
        weights = prepared.scheme.weights
        then = self.then_for(weights)
        if not isinstance(then, ClipSearch) or prepared.statistics is None or not prepared.statistics.rows:
            return then.choose_codes(prepared)
        weight = prepared.float_weight().detach()
        return then.qparams(weights, weight, gram_of(prepared)).quantize(weight)


def channel_scales(
    mean_input: torch.Tensor, mean_weight: torch.Tensor, ratio: float, *, duo: bool = True
) -> torch.Tensor:
    """s [k] for one ratio: eq. 93. Channels that are always zero, and what is not finite, get 1.

    mean_input    [k], the mean |x|; mean_weight [k], the mean |w| in units of the largest of its group
    """
    s = mean_input**ratio
    if duo:
        s = s / (mean_weight ** (1 - ratio) + 1e-4)
    s = s.clamp_min(1e-4)
    s = s / (s.max() * s.min()).sqrt()
    return torch.where(s.isfinite() & (mean_input > 0), s, 1.0).clamp(SMALLEST, LARGEST)


def mean_weight(layers: Sequence[Any]) -> torch.Tensor:
    """The mean over all rows of `layers` of |w|, in units of the largest |w| of each group, float32 [k]."""
    total, count = torch.zeros(layers[0].in_features), 0
    for layer in layers:
        weight = layer.weight_matrix.detach().float().abs()
        granularity = layer.scheme.weights.granularity
        rows = granularity.to_rows(weight)
        total += granularity.from_rows(rows / (rows.amax(1, keepdim=True) + 1e-6), weight.shape).sum(0)
        count += len(weight)
    return total / count


class _Calls:
    """The first calls of the modules that read one input as a whole, kept so that they can be made again."""

    def __init__(self, model: nn.Module, layers: Sequence[Any]):
        self.layers = set(layers)
        self.names = {module: name for name, module in model.named_modules()}
        self.modules = dict(model.named_modules())
        inside = {module: self.layers & set(module.modules()) for module in self.names}
        self.readers = [module for module, found in inside.items() if found]
        self.kept_calls: dict[nn.Module, list[tuple[tuple, dict[str, Any], torch.Tensor]]] = {}
        self.rows: dict[nn.Module, int] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, calls are kept, with their outputs, until there are enough rows."""
        most = max((layer.scheme.method.rows for layer in self.layers), default=0)

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            x = next(float_tensors((args, kwargs)), None)
            y = next(float_tensors(output), None)
            if x is None or y is None or self.rows.get(module, 0) >= most:
                return
            self.rows[module] = self.rows.get(module, 0) + x.numel() // x.shape[-1]
            with torch._C.DisableTorchFunction():  # else tracing sees the copies as readers
                call = (*_cloned((args, kwargs)), y.detach().clone())
            self.kept_calls.setdefault(module, []).append(call)

        with hooked((module, keep) for module in self.readers):
            yield

    def best_scales(self, layers: Sequence[Any]) -> torch.Tensor:
        """One s [k] for `layers`, which read the same input: eq. 94."""
        method, statistics = layers[0].scheme.method, layers[0].statistics
        ones = torch.ones(layers[0].in_features)
        calls = self._calls_of(layers)
        if not statistics.rows or not calls:
            return ones
        mean_input, weight = (statistics.absolute / statistics.rows).float(), mean_weight(layers)
        ratios = [step / method.steps for step in range(method.steps)]
        candidates = [ones, *(channel_scales(mean_input, weight, ratio, duo=method.duo) for ratio in ratios)]
        module, kept = calls
        errors = [reader_error(module, layers, s, kept) for s in candidates]
        return candidates[min(range(len(errors)), key=errors.__getitem__)]

    def _calls_of(self, layers: Sequence[Any]) -> Any:
        """The innermost module that holds all of `layers`, and its calls; of a single layer itself."""
        name = self.names[layers[0]] if len(layers) == 1 else _common([self.names[layer] for layer in layers])
        while name and self.modules[name] not in self.kept_calls:  # a list of modules is not called itself
            name = name.rpartition(".")[0]
        module = self.modules[name]
        return (module, self.kept_calls[module]) if module in self.kept_calls else None


def _cloned(value: Any) -> Any:
    """`value` with copies of its tensors: what is kept itself, tracing would take for a use of it."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(map(_cloned, value))
    return {key: _cloned(item) for key, item in value.items()} if type(value) is dict else value


def _common(names: Sequence[str]) -> str:
    """The longest dotted name with which all of `names` begin."""
    parts = [name.split(".") for name in names]
    shared = [level[0] for level in zip(*parts, strict=False) if len(set(level)) == 1]
    return ".".join(shared)


def reader_error(
    module: nn.Module,
    layers: Sequence[Any],
    s: torch.Tensor,
    calls: Sequence[tuple[tuple, dict, torch.Tensor]],
) -> float:
    """The mean squared error of what `module` gives, if its `layers` were rescaled by `s` [k] and rounded."""
    with _rounded(layers, lambda weight, format: _divided(format, weight, s)):
        watching: list[Any] = [each for each in module.modules() if hasattr(each, "is_watching")]
        total, count = 0.0, 0
        for each in watching:
            each.is_watching = False
        try:
            for args, kwargs, y in calls:
                found = next(float_tensors(module(*args, **kwargs)))
                total += (found - y).float().square().sum().item()
                count += y.numel()
        finally:
            for each in watching:
                each.is_watching = True
    return total / count


def _divided(format: Any, weight: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    scaled = weight.float() * s
    return format.qparams(scaled).quantize(scaled).dequantize() / s


@contextmanager
def _rounded(layers: Sequence[Any], rounded: Callable[[torch.Tensor, Any], torch.Tensor]) -> Iterator[None]:
    """Inside, `layers` have other weights."""
    with ExitStack() as stack:
        for layer in layers:
            weight = layer._parameters["weight"]
            stack.callback(layer._parameters.__setitem__, "weight", weight)
            matrix = rounded(layer.weight_matrix.detach(), layer.scheme.weights)
            value = layer.replaces.weight(matrix).to(weight.dtype)
            layer._parameters["weight"] = nn.Parameter(value, requires_grad=False)
        yield
