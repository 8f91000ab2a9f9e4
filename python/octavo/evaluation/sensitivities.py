# SPDX-License-Identifier: Apache-2.0
"""What quantizing one layer alone does to the model's output: each layer with each scheme, all others left in float.

The quantized layer stands in a copy that shares every tensor with the model, so the model itself is never touched.
mixed_precision.py chooses by these figures.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..base.batches import calls, evaluating, float_tensors, labelled_calls, output_of
from ..base.padding import Masks, Padding
from ..base.plots import new_axes
from ..base.progress import with_bar
from ..base.tables import as_html, as_text
from ..conversion.convert import quantize_
from ..conversion.plan import Layer, plan_quantization
from ..conversion.prepare import require_root
from ..conversion.selection import Patterns, SchemeLike, Selection
from ..metrics import DistributionAccumulator, ErrorAccumulator
from ..nn.replacements import replacement_of
from ..schemes import Scheme, label
from .kinds import logits_of
from .labels import Labels
from .resources import memory_of

FIGURES = {"kld": "KL divergence, nats", "error": "relative error"}


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer with one scheme.

    scheme         None: the layer stays in float, and figure is 0
    figure         of the model's output, if this layer alone is quantized
    packed_bytes   of the weight as it lies in memory: packed codes with their padding, scales, zero points, the columns
                   that LLMInt8 keeps. Biases are not counted
    weights        how many the layer has
    """

    name: str
    scheme: Scheme | None
    figure: float
    packed_bytes: int
    weights: int


@dataclass(frozen=True)
class Sensitivity:
    """What `octavo.sensitivity` returns. `print(sensitivity)` shows a table.

    figure   "kld" or "error"
    rows     for each layer, in the model's order: float, then the schemes that serve it
    """

    figure: str
    rows: list[LayerSensitivity]

    @property
    def layers(self) -> dict[str, list[LayerSensitivity]]:
        """The rows of each layer, by its name."""
        found: dict[str, list[LayerSensitivity]] = {}
        for row in self.rows:
            found.setdefault(row.name, []).append(row)
        return found

    def to_dict(self) -> dict[str, Any]:
        """{"figure": ..., "rows": [...]} of plain values; a scheme is what its to_dict gives, or None."""
        return {
            "figure": self.figure,
            "rows": [
                {**vars(row), "scheme": None if row.scheme is None else row.scheme.to_dict()}
                for row in self.rows
            ],
        }

    def __str__(self) -> str:
        return as_text(self._header(), map(_cells, self.rows), right=self._header()[2:])

    def _repr_html_(self) -> str:
        return as_html(self._header(), map(_cells, self.rows))

    def plot(self, ax: Any = None) -> Any:
        """Draws each layer's figures, one mark for each scheme, on `ax` or a new figure; returns the Axes.

        Nothing is shown or saved. Figures of 0 have no place on a logarithmic axis and get no mark.
        Raises: ImportError if matplotlib is missing.
        """
        names = list(self.layers)
        ax = new_axes("Sensitivity.plot", 8, 1.6 + 0.2 * max(len(names), 3)) if ax is None else ax
        places = {name: place for place, name in enumerate(names)}
        for scheme in dict.fromkeys(row.scheme for row in self.rows if row.scheme is not None):
            rows = [row for row in self.rows if row.scheme == scheme and 0 < row.figure < math.inf]
            ax.plot(
                [row.figure for row in rows], [places[row.name] for row in rows], "o", label=label(scheme)
            )
        ax.set_xscale("log")
        ax.set_yticks(range(len(names)), names, fontsize=7)
        ax.invert_yaxis()
        ax.set_xlabel(f"{FIGURES[self.figure]} of the output, this layer alone quantized")
        ax.legend(fontsize=8)
        return ax

    def _header(self) -> tuple[str, ...]:
        return ("layer", "scheme", FIGURES[self.figure], "packed kB", "weights")


def sensitivity(
    model: nn.Module,
    data: Any,
    schemes: SchemeLike | Sequence[SchemeLike] | None = None,
    *,
    figure: str = "kld",
    include: Patterns = None,
    exclude: Patterns = None,
    progress: bool = False,
) -> Sensitivity:
    """Quantizes each layer alone with each scheme and measures what that does to the model's output.

    data               one batch or an iterable of them, as `quantize_` and `compare` take; schemes that calibrate get
                       the same
    schemes            a scheme, its class or its name, or a list of them
    figure             "kld": mean KL(float || quantized) of the logits over all positions. "error": relative error of
                       every floating-point tensor in the output. Padding does not count, nor what is labelled
                       -100, as in `compare`
    include, exclude   patterns of layer names, as in `quantize_`; layers that it would keep in float have no rows
    progress           a tqdm bar over the layers

    For n layers and s schemes the model runs n (s + 1) times on the data, and calibration comes on top. It stays as it
    was, bit for bit.

    Raises: as `quantize_`; ValueError for another figure, for data that is empty or all padding, for an output without
    floating-point tensors, or if no layer can be quantized; TypeError for "kld" if the output has no logits.
    Source: ours, in place of the Hessian traces of Dong et al. 2020 (HAWQ-V2, arXiv:1911.03852).
    """
    require_root("sensitivity", model, replacement_of, "wrap it: nn.Sequential(layer)")
    if figure not in FIGURES:
        raise ValueError(f"sensitivity: figure is {figure!r}; accepted are 'kld' and 'error'")
    served = _served(model, schemes, include, exclude)
    data = list(data) if isinstance(data, Iterator) else data  # it is needed several times
    if next(calls(data, "sensitivity: data", model), None) is None:
        raise ValueError("sensitivity: data is empty; give at least one batch (a used-up generator is empty)")
    rows = []
    for layer, found in with_bar(served, "measuring sensitivity", "layer", progress):
        weight = layer.module.weight
        rows.append(LayerSensitivity(layer.name, None, 0.0, weight.nbytes, weight.numel()))
        measured = _measure(model, layer.name, found, data, figure)
        for scheme, (value, size) in zip(found, measured, strict=True):
            rows.append(LayerSensitivity(layer.name, scheme, value, size, weight.numel()))
    return Sensitivity(figure, rows)


# --- measuring ------------------------------------------------------------------------------------------------------


def _served(
    model: nn.Module, schemes: object, include: Patterns, exclude: Patterns
) -> list[tuple[Layer, list[Scheme]]]:
    """The layers that can be quantized, in the model's order, and with what."""
    asked = _schemes(schemes)
    plans = [plan_quantization(model, Selection(scheme, include, exclude)) for scheme in asked]
    served = []
    for layers in zip(*plans, strict=True):
        found = dict.fromkeys(layer.scheme for layer in layers if layer.scheme is not None)
        if found:
            served.append((layers[0], list(found)))
    if not served:
        reasons = sorted({layer.row.reason for layers in plans for layer in layers})
        raise ValueError(f"sensitivity: no layer can be quantized with {asked!r}; the reasons: {reasons}")
    return served


def _schemes(given: object) -> list[Any]:
    """The argument `schemes` as a list."""
    if isinstance(given, str | Scheme | type):
        return [given]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TypeError(
            f"sensitivity: schemes is {given!r}; give a scheme or a list of them: [octavo.Int8Dynamic(), "
            "octavo.Int8WeightOnly()]. Each layer is measured with each of them"
        )
    found = list(given)
    if not found:
        raise ValueError("sensitivity: schemes is empty; give at least one: [octavo.Int8Dynamic()]")
    return found


def _measure(
    model: nn.Module, name: str, schemes: list[Scheme], data: Any, figure: str
) -> list[tuple[float, int]]:
    """Figure and bytes of each scheme for the layer `name`; the float model runs once for all of them."""
    variants = [_with_one_layer(model, name, scheme, data) for scheme in schemes]
    padding, labels = Padding(model), Labels(model)
    measures = [_KLD(padding) if figure == "kld" else _RelativeError(padding) for _ in variants]
    with torch.no_grad(), evaluating(model, *variants):
        for args, kwargs, given in labelled_calls(data, "sensitivity: data", model, notes=[]):
            masks = padding.masks(args, kwargs, labels.mask(given, args, kwargs))
            expected = output_of(model, args, kwargs)
            for variant, measure in zip(variants, measures, strict=True):
                measure.update(expected, output_of(variant, args, kwargs), masks)
    if not all(measure.count for measure in measures):
        raise ValueError(
            "sensitivity: no position counts: the outputs are empty, or the mask leaves out all of them"
        )
    memories = [memory_of(variant.get_submodule(name)) for variant in variants]
    sizes = [memory.total - memory.other for memory in memories]
    return list(zip([measure.result() for measure in measures], sizes, strict=True))


def _with_one_layer(model: nn.Module, name: str, scheme: Scheme, data: Any) -> nn.Module:
    """`model` with that layer quantized. Modules are copied, tensors are not: quantize_ replaces, it never writes."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    variant = copy.deepcopy(model, memo)
    quantize_(variant, {name: scheme}, data=data)
    return variant


class _KLD:
    def __init__(self, padding: Padding) -> None:
        self.count = 0
        self._padding = padding
        self._figures = DistributionAccumulator()

    def update(self, expected: Any, found: Any, masks: Masks) -> None:
        try:
            x, y = logits_of(expected), logits_of(found)
        except TypeError as error:
            raise TypeError(
                f"sensitivity: the model's output, {type(expected).__name__}, has no logits to compare; "
                "figure='error' compares any tensors"
            ) from error
        x, y = (self._padding.rows(logits, masks, has_channels=True) for logits in (x, y))
        self.count += x.numel()
        self._figures.update(x, y)

    def result(self) -> float:
        return self._figures.result().kld


class _RelativeError:
    def __init__(self, padding: Padding) -> None:
        self._padding = padding
        self._figures = ErrorAccumulator()

    def update(self, expected: Any, found: Any, masks: Masks) -> None:
        tensors = list(float_tensors(expected)), list(float_tensors(found))
        if not tensors[0]:
            raise ValueError(
                f"sensitivity: the model's output, {type(expected).__name__}, holds no floating-point tensor to compare"
            )
        for x, y in zip(*tensors, strict=True):
            self._figures.update(self._padding.rows(x, masks), self._padding.rows(y, masks))

    @property
    def count(self) -> int:
        return self._figures.count

    def result(self) -> float:
        return self._figures.relative_error


# --- showing --------------------------------------------------------------------------------------------------------


def _cells(row: LayerSensitivity) -> tuple[str, ...]:
    scheme = "float" if row.scheme is None else label(row.scheme)
    return (row.name, scheme, f"{row.figure:.3g}", f"{row.packed_bytes / 1e3:.1f}", f"{row.weights:,}")
