# SPDX-License-Identifier: Apache-2.0
"""One call that says what quantization did to a model: its outputs, its predictions, its texts, and what it costs.

Both models run on the same batches, one batch after the other; accumulators keep numbers, never outputs. What the
figures mean is metrics/, what a batch means to each kind of model is evaluation/kinds.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..base.batches import calls, evaluating, float_tensors, output_of
from ..base.padding import Masks, Padding
from ..metrics import DistributionAccumulator, ErrorAccumulator, VectorsAccumulator
from .comparison import exchanged
from .comparison_result import OutputFigures
from .generation import Prompts, evaluate_generation
from .kinds import (
    KINDS,
    Call,
    choose_kind,
    is_causal,
    logits_of,
    take_apart,
    vectors_of,
)
from .resources import RESOURCES, Resources, measure_resources
from .result import Evaluation


def evaluate(
    reference: nn.Module,
    model: nn.Module,
    data: Any,
    *,
    kind: str = "auto",
    prompts: Prompts | Sequence[Any] | torch.Tensor | None = None,
    resources: str | Sequence[str] = ("size", "speed"),
    bytes_per_token: float | None = None,
) -> Evaluation:
    """Compares a quantized model with its float reference; returns an `Evaluation`.

    data       one batch or an iterable of them (wrap it in tqdm for a progress bar), by kind:
               language_model  int64 [batch, length + 1], or a dict with input_ids; the model reads all but the last
                               token and is scored on all but the first. `evaluation.windows` cuts text
               classifier      (x, labels) or a dict with labels; logits [..., classes]. Labels may be left out
               encoder         vectors [batch, dim], sentence_embedding, or last_hidden_state averaged over the mask
               module          every floating-point tensor that the model puts out is compared
               The model gets all of a batch that its forward takes, and `notes` says what it does not. Padding (by
               attention_mask or key_padding_mask) and labels of -100 do not count
    kind       "auto" tries the reference on the first batch: a label beside each x makes a classifier; logits for each
               token that do not change with later tokens a language model; hidden states or vectors of length 1 an
               encoder; the rest is a module. What can be read in two ways is refused. `notes` says what was found
    prompts    texts to complete, for language models: `Prompts`, or token ids; adds `generation`
    resources  some of "size", "speed" (time, tokens/s, energy) and "peak_memory" (slow: new processes), or "all"; ()
    bytes_per_token   bytes of text that a token stands for, for bits per byte; 1 for a model of bytes

    Both models run in eval mode without gradients. A model compared with itself: KLD 0, SQNR inf, cosine 1, exactly.
    Raises: TypeError if a model is not a module or a batch or output is not of the kind; ValueError if no batch or no
    position counts, the kind is unknown or not clear, shapes differ, or a "language_model" looks at later tokens.
    Source: ours; figures as in docs/numerics.md, eq. 12 to 27.
    """
    wanted = _checked(reference, model, kind, resources)
    asked = prompts if prompts is None or isinstance(prompts, Prompts) else Prompts(prompts)
    batches = calls(data, "evaluate: data")
    first = next(batches, None)
    if first is None:
        raise ValueError("evaluate: data is empty; give at least one batch (a used-up generator is empty)")
    is_alone = isinstance(data, tuple)
    with torch.no_grad(), evaluating(reference, model):
        kind, notes = _kind(reference, kind, first, is_alone)
        if asked is not None and kind != "language_model":
            raise ValueError(f"evaluate: prompts are for a language_model; this is evaluated as {kind}")
        figures = _Run(kind, reference, model)
        for args, kwargs in chain([first], batches):
            figures.add(take_apart(kind, args, kwargs, reference, is_alone))
        figures.require_any()
        generation = None if asked is None else evaluate_generation(reference, model, asked)
        found = _resources(reference, model, take_apart(kind, *first, reference), kind, asked, wanted)
    return Evaluation(
        kind=kind,
        batches=figures.batches,
        schemes=_schemes(model),
        output=figures.output_figures(),
        distribution=figures.distribution.result(bytes_per_token) if figures.has_logits else None,
        vectors=figures.vectors.result() if kind == "encoder" else None,
        generation=generation,
        resources=found,
        notes=exchanged("evaluate", reference, model) + notes + figures.notes() + _unavailable(found),
    )


class _Run:
    """The figures of all batches so far."""

    def __init__(self, kind: str, reference: nn.Module, model: nn.Module) -> None:
        self.kind, self.reference, self.model, self.batches = kind, reference, model, 0
        self.has_logits = kind in ("language_model", "classifier")
        self.output = ErrorAccumulator()
        self.distribution = DistributionAccumulator()
        self.vectors = VectorsAccumulator()
        self._padding = Padding(reference)
        self._unused: dict[str, None] = {}  # sentences, each once
        self._counted, self._positions = 0, 0

    def add(self, call: Call) -> None:
        masks = self._masks(call)
        expected = self._compared(output_of(self.reference, call.args, call.kwargs), masks)
        found = self._compared(output_of(self.model, call.args, call.kwargs), masks)
        shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
        if not expected or shapes[0] != shapes[1]:
            raise ValueError(
                f"evaluate: the outputs to compare have shapes {shapes[0]} in reference and {shapes[1]} in model; "
                "at least one floating-point tensor, and the same of both, is needed"
            )
        if self.has_logits:
            mask = self._logits_mask(expected[0], call, masks)
            self.distribution.update(expected[0], found[0], call.targets, mask)
            self.output.update(*_both(expected[0], found[0], mask))
        else:
            for x, y in zip(expected, found, strict=True):
                self.output.update(x, y)
        if self.kind == "encoder":
            self.vectors.update(expected[0], found[0])
        self.batches += 1
        if call.note:
            self._unused[call.note] = None

    def output_figures(self) -> OutputFigures:
        return OutputFigures.of(self.output)

    def require_any(self) -> None:
        if self.output.count == 0:
            raise ValueError(
                "evaluate: no position counts: the outputs are empty, or mask and labels (-100) leave out all"
            )

    def notes(self) -> list[str]:
        if self._positions == self._counted:
            return [*self._unused, *self._padding.notes()]
        left_out = self._positions - self._counted
        return [
            *self._unused,
            f"{left_out:,} of {self._positions:,} positions are left out: padding, or labels of -100",
        ]

    def _masks(self, call: Call) -> Masks:
        return [] if self.kind == "language_model" else self._padding.masks(call.args, call.kwargs)

    def _logits_mask(self, logits: torch.Tensor, call: Call, masks: Masks) -> torch.Tensor | None:
        """The positions that count: they hold text, and their label is not -100."""
        fitting = [
            mask for mask in (call.mask, *masks) if mask is not None and mask.shape == logits.shape[:-1]
        ]
        if not fitting:
            return None
        mask = torch.stack(fitting).all(0)
        self._positions, self._counted = self._positions + mask.numel(), self._counted + int(mask.sum())
        return mask

    def _compared(self, output: Any, masks: Masks) -> list[torch.Tensor]:
        if self.has_logits:
            return [logits_of(output)]
        if self.kind == "encoder":
            mask = next((mask for mask in masks if mask.dim() == 2), None)
            vectors = vectors_of(output, mask)
            if mask is None:
                return [vectors]
            if vectors.dim() == 2 and len(vectors) == len(mask):  # a text without a token has no vector
                return [vectors[mask.any(1)]]
            return [self._padding.rows(vectors, masks)]
        return [self._padding.rows(tensor, masks) for tensor in float_tensors(output)]


def _both(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that count, without tokens that both models exclude: -inf minus -inf says nothing."""
    if mask is not None:
        x, y = x[mask], y[mask]
    excluded = x.isneginf() & y.isneginf()
    return (x[~excluded], y[~excluded]) if excluded.any() else (x, y)


def _checked(
    reference: nn.Module, model: nn.Module, kind: str, resources: str | Sequence[str]
) -> tuple[str, ...]:
    """The resources that were asked for. Raises, before any model runs, for arguments that are wrong."""
    for name, module in (("reference", reference), ("model", model)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"evaluate: {name} is {type(module).__name__}, a torch.nn.Module is needed")
        if any(tensor.is_meta for tensor in chain(module.parameters(), module.buffers())):
            raise ValueError(f"evaluate: {name} has weights on the meta device; load them first")
    if kind not in ("auto", *KINDS):
        raise ValueError(f"evaluate: kind is {kind!r}; accepted are 'auto', {', '.join(map(repr, KINDS))}")
    wanted = (resources,) if isinstance(resources, str) else tuple(resources)
    unknown = [name for name in wanted if name not in (*RESOURCES, "all")]
    if unknown:
        raise ValueError(f"evaluate: resources {unknown} unknown; accepted are {', '.join(RESOURCES)}, all")
    return RESOURCES if "all" in wanted else wanted


def _kind(
    reference: nn.Module, kind: str, first: tuple[tuple, dict[str, Any]], is_alone: bool
) -> tuple[str, list[str]]:
    if kind == "auto":
        found, why = choose_kind(reference, *first, is_alone)
        return found, [f"kind: {found}, because {why}"]
    if kind == "language_model":
        call = take_apart(kind, *first, reference)
        ids = call.kwargs["input_ids"] if call.kwargs else call.args[0]
        if ids.shape[1] > 1 and not is_causal(reference, call.args, call.kwargs):
            raise ValueError(
                "evaluate: the reference's logits depend on later tokens: it is no causal language model, and its "
                "perplexity would mean nothing. kind='module' compares its outputs"
            )
    return kind, []


def _resources(
    reference: nn.Module,
    model: nn.Module,
    call: Call,
    kind: str,
    prompts: Prompts | None,
    wanted: Sequence[str],
) -> Resources | None:
    if not wanted:
        return None
    models = {"reference": reference, "model": model}
    tokens = None
    if kind == "language_model":
        tokens = (call.kwargs["input_ids"] if call.kwargs else call.args[0]).numel()
    return measure_resources(models, (call.args, call.kwargs), wanted, tokens, prompts)


def _unavailable(resources: Resources | None) -> list[str]:
    missing = resources.unavailable if resources else {}
    return [f"{figure}: not available, {why}" for figure, why in missing.items()]


def _schemes(model: nn.Module) -> dict[str, int]:
    layers: Iterator[Any] = (module for module in model.modules() if hasattr(module, "scheme"))
    return dict(Counter(layer.scheme.name for layer in layers))
