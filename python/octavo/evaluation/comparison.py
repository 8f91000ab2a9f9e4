# SPDX-License-Identifier: Apache-2.0
"""How far a quantized model is from its float reference, layer by layer and end to end.

Each batch runs through the reference first: a hook on every counterpart of a quantized layer feeds the same
input to the quantized layer (local error) and keeps the output until the quantized model has run the batch
(propagated error). So one batch's outputs are all that is ever held.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..base.batches import evaluating, float_tensors, labelled_calls, output_of
from ..base.hooks import hooked
from ..base.padding import Padding
from ..base.progress import with_bar
from ..methods.rescaling import UNCHANGED, Factors, Rescaling, first_argument
from ..metrics import ErrorAccumulator
from ..nn import OurEmbedding, OurLinear, without_nested_tensors
from ..nn.replacements import embedding_of, features_of, replacement_of
from .comparison_result import Comparison, LayerComparison, OutputFigures
from .labels import Labels

logger = logging.getLogger("octavo")


def compare(reference: nn.Module, model: nn.Module, batches: Any, *, progress: bool = False) -> Comparison:
    """Runs both models on the same batches; returns how they differ, as a `Comparison`.

    reference  the float model
    model      the quantized or prepared one, with the same module names
    batches    one batch or an iterable of them. A batch is a tensor, a tuple (positional arguments) or a dict
               (keyword arguments); within an iterable, a list is one too. Labels behind the inputs, and entries of a
               dict that forward does not take, are left out, and `notes` says so
    progress   show a tqdm bar
    Padded positions are left out if the model is given a mask that names them, `attention_mask` or
    `src_key_padding_mask`, and so are those labelled -100, in a causal language model those that would predict it;
    `notes` says how many. Figures of layers that SmoothQuant's folding or `equalize_` has rescaled are in the
    reference's units, and each such layer reads the reference's input rescaled.
    Both models run in eval mode without gradients; their training flags come back as they were. Outputs may be any
    objects: every floating-point tensor in them counts. Without quantized layers, `layers` is empty.

    Raises: TypeError if a model is not a module or a batch is none of the above; ValueError if no batch or no position
    counts, if the models do not match in layers, calls or output shapes, or if one has weights on meta.
    Source: ours; figures as in docs/numerics.md, eq. 12 to 14.
    """
    probes = _match(reference, model)
    output, count = ErrorAccumulator(), 0
    notes = exchanged("compare", reference, model)
    with torch.no_grad(), evaluating(reference, model), without_nested_tensors(reference, model):
        padding, labels = Padding(reference), Labels(reference)
        linears = {probe.name: (probe.reference, probe.layer) for probe in probes if not probe.is_embedding}
        rescaling = Rescaling(reference, model, linears)
        fitted = labelled_calls(batches, "compare: batches", reference, notes)
        for args, kwargs, given in with_bar(fitted, "comparing", "batch", progress):
            masks = padding.masks(args, kwargs, labels.mask(given, args, kwargs))
            rescaling.look_at(args, kwargs)
            rows = partial(padding.rows, masks=masks, has_channels=True)
            for probe in probes:
                factors = UNCHANGED if probe.is_embedding else rescaling.factors(probe.name)
                probe.begin_batch(factors, rows)
            with hooked((probe.reference, probe.on_reference) for probe in probes):
                expected = list(float_tensors(output_of(reference, args, kwargs)))
            with hooked((probe.layer, probe.on_layer) for probe in probes):
                found = list(float_tensors(output_of(model, args, kwargs)))
            for probe in probes:
                probe.end_batch()
            _check_outputs(expected, found)
            for x, y in zip(expected, found, strict=True):
                output.update(padding.rows(x, masks), padding.rows(y, masks))
            count += 1
    if count == 0:
        raise ValueError("compare: batches is empty; give at least one batch (a used-up generator is empty)")
    if output.count == 0:
        raise ValueError(
            "compare: no position counts: the outputs are empty, or the mask leaves out all of them"
        )
    return Comparison(
        layers=[probe.result() for probe in probes if probe.calls and not probe.is_unclear],
        output=OutputFigures.of(output),
        bytes_before=model_bytes(reference),
        bytes_after=model_bytes(model),
        not_run=[probe.name for probe in probes if not probe.calls],
        unclear=[probe.name for probe in probes if probe.is_unclear],
        notes=[*notes, *padding.notes(), *rescaling.notes()],
    )


def model_bytes(model: nn.Module) -> int:
    """Bytes of memory of all parameters and buffers, shared ones counted once."""
    return sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))


class _LayerProbe:
    """A quantized layer beside the layer of the same name in the reference."""

    def __init__(self, name: str, reference: nn.Module, layer: OurLinear) -> None:
        self.name, self.reference, self.layer = name, reference, layer
        self.is_embedding = isinstance(layer, OurEmbedding)
        self.calls = 0
        self.local, self.propagated = ErrorAccumulator(), ErrorAccumulator()
        self.pending: deque[torch.Tensor] = deque()  # outputs of the reference in this batch
        self.factors: Factors = UNCHANGED
        self.is_unclear = False

    def begin_batch(self, factors: Factors | None, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """factors: None if they are unknown; rows: what takes the padding out of an output."""
        self.is_unclear = self.is_unclear or factors is None
        self.factors, self.rows = factors or UNCHANGED, rows

    def on_reference(self, _: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        x = self.factors.read(first_argument(args, kwargs))
        # forward, not __call__: hooks that users have put on their layer must not see these extra runs.
        found = self.factors.given(self.layer.forward(x))
        self.local.update(self.rows(output), self.rows(found))
        self.pending.append(output.clone())  # an in-place activation may overwrite the output next

    def on_layer(self, _: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        if not self.pending:
            raise _mismatch(f"{self.name!r} runs more often in model")
        self.propagated.update(self.rows(self.pending.popleft()), self.rows(self.factors.given(output)))
        self.calls += 1

    def end_batch(self) -> None:
        if self.pending:
            raise _mismatch(f"{self.name!r} runs more often in reference")

    def result(self) -> LayerComparison:
        figures = self.propagated
        return LayerComparison(
            self.name, figures.sqnr_db, figures.cosine, figures.max_abs_error, self.local.sqnr_db
        )


def _match(reference: nn.Module, model: nn.Module) -> list[_LayerProbe]:
    for name, module in (("reference", reference), ("model", model)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"compare: {name} is {type(module).__name__}, a torch.nn.Module is needed")
        if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
            raise ValueError(f"compare: {name} has weights on the meta device; load them first")
    counterparts = dict(reference.named_modules(remove_duplicate=False))
    probes = []
    for name, layer in model.named_modules():
        if isinstance(layer, OurLinear):
            _check_counterpart(name, layer, counterparts.get(name))
            probes.append(_LayerProbe(name, counterparts[name], layer))
    return probes


def exchanged(who: str, reference: nn.Module, model: nn.Module) -> list[str]:
    """A note for the result, logged as well, if the quantized model was given in the place of the float one."""
    has_ours = [any(isinstance(part, OurLinear) for part in each.modules()) for each in (reference, model)]
    if has_ours != [True, False]:
        return []
    note = (
        "reference has quantized layers and model has none; were the two exchanged? "
        f"The float model comes first: octavo.{who}(reference, quantized, ...)"
    )
    logger.warning("%s: %s", who, note)
    return [note]


def _check_counterpart(name: str, layer: OurLinear, counterpart: nn.Module | None) -> None:
    if counterpart is None:
        raise _mismatch(f"reference has no layer {name!r}")
    found = (layer.in_features, layer.out_features)
    if isinstance(counterpart, OurLinear):
        expected = (counterpart.in_features, counterpart.out_features)
    elif (embedding_of if isinstance(layer, OurEmbedding) else replacement_of)(counterpart) is not None:
        expected = features_of(counterpart)
    else:
        needed = "an embedding" if isinstance(layer, OurEmbedding) else "a linear layer"
        raise _mismatch(f"{name!r} is {type(counterpart).__name__} in reference, {needed} is needed")
    if expected != found:
        raise _mismatch(f"{name!r} has (in, out) features {expected} in reference and {found} in model")


def _mismatch(text: str) -> ValueError:
    return ValueError(f"compare: the models do not match: {text}")


def _check_outputs(expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    if not expected:
        raise ValueError("compare: the output of reference holds no floating-point tensor to compare")
    shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise _mismatch(f"the output shapes are {shapes[0]} in reference and {shapes[1]} in model")
