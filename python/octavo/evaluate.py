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

from .batches import calls, evaluating, float_tensors
from .evaluation.generation import Prompts, evaluate_generation
from .evaluation.kinds import (
    KINDS,
    Call,
    choose_kind,
    is_causal,
    logits_of,
    take_apart,
    vectors_of,
)
from .evaluation.resources import RESOURCES, Resources, measure
from .evaluation.result import Evaluation, OutputFigures
from .metrics import DistributionAccumulator, ErrorAccumulator, VectorsAccumulator


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
               language_model  int64 [batch, length + 1], or a dict of input_ids and attention_mask; the model reads all
                               but the last token and is scored on all but the first. `evaluation.windows` cuts text
               classifier      (x, labels) or a dict with labels; logits [..., classes]. Labels may be left out
               encoder         whatever the model takes; vectors [batch, dim], sentence_embedding, or
                               last_hidden_state averaged over attention_mask
               module          whatever the model takes; every floating-point tensor it puts out is compared
    kind       "auto" tries the reference on the first batch: a label beside each x makes a classifier; logits for each
               token that do not change with later tokens a language model; hidden states or vectors of length 1 an
               encoder; the rest is a module. What can be read in two ways is refused. `notes` says what was found
    prompts    texts to complete, for language models: `Prompts`, or token ids; adds `generation`
    resources  some of "size", "speed" (time, tokens/s, energy) and "peak_memory" (slow: new processes), or "all"; ()
    bytes_per_token   bytes of text that a token stands for, for bits per byte; 1 for a model of bytes

    Both models run in eval mode without gradients. A model compared with itself: KLD 0, SQNR inf, cosine 1, exactly.

    Raises: TypeError if a model is not a module or a batch or output is not of the kind; ValueError if there is no
    batch, the kind is unknown or not clear, shapes differ, or a "language_model" looks at later tokens.
    Source: ours; figures as in docs/numerics.md, eq. 12 to 27.
    """
    wanted = _checked(reference, model, kind, resources)
    asked = prompts if prompts is None or isinstance(prompts, Prompts) else Prompts(prompts)
    batches = calls(data, "evaluate: data")
    first = next(batches, None)
    if first is None:
        raise ValueError("evaluate: data is empty; give at least one batch (a used-up generator is empty)")
    with torch.no_grad(), evaluating(reference, model):
        kind, notes = _kind(reference, kind, first)
        if asked is not None and kind != "language_model":
            raise ValueError(f"evaluate: prompts are for a language_model; this is evaluated as {kind}")
        run = _Run(kind)
        for args, kwargs in chain([first], batches):
            run.add(reference, model, take_apart(kind, args, kwargs))
        generation = None if asked is None else evaluate_generation(reference, model, asked)
        found = _resources(reference, model, take_apart(kind, *first), kind, asked, wanted)
    unavailable = found.unavailable if found else {}
    return Evaluation(
        kind=kind,
        batches=run.batches,
        schemes=_schemes(model),
        output=run.output_figures(),
        distribution=run.distribution.result(bytes_per_token) if run.has_logits else None,
        vectors=run.vectors.result() if kind == "encoder" else None,
        generation=generation,
        resources=found,
        notes=notes + [f"{figure}: not available, {why}" for figure, why in unavailable.items()],
    )


class _Run:
    """The figures of all batches so far."""

    def __init__(self, kind: str) -> None:
        self.kind, self.batches = kind, 0
        self.has_logits = kind in ("language_model", "classifier")
        self.output = ErrorAccumulator()
        self.distribution = DistributionAccumulator()
        self.vectors = VectorsAccumulator()

    def add(self, reference: nn.Module, model: nn.Module, call: Call) -> None:
        expected = self._compared(reference(*call.args, **call.kwargs), call)
        found = self._compared(model(*call.args, **call.kwargs), call)
        shapes = [tuple(tensor.shape) for tensor in expected], [tuple(tensor.shape) for tensor in found]
        if not expected or shapes[0] != shapes[1]:
            raise ValueError(
                f"evaluate: the outputs to compare have shapes {shapes[0]} in reference and {shapes[1]} in model; "
                "at least one floating-point tensor, and the same of both, is needed"
            )
        if self.has_logits:
            self.distribution.update(expected[0], found[0], call.targets, call.mask)
        elif self.kind == "encoder":
            self.vectors.update(expected[0], found[0])
        for x, y in zip(expected, found, strict=True):
            self.output.update(*self._counted(x, y, call))
        self.batches += 1

    def output_figures(self) -> OutputFigures:
        figures = self.output
        return OutputFigures(figures.sqnr_db, figures.cosine, figures.relative_error, figures.max_abs_error)

    def _compared(self, output: Any, call: Call) -> list[torch.Tensor]:
        if self.has_logits:
            return [logits_of(output)]
        if self.kind == "encoder":
            return [vectors_of(output, call.mask)]
        return list(float_tensors(output))

    def _counted(self, x: torch.Tensor, y: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits without padding, and without tokens that both models exclude: -inf minus -inf says nothing."""
        if not self.has_logits:
            return x, y
        if call.mask is not None:
            x, y = x[call.mask], y[call.mask]
        excluded = x.isneginf() & y.isneginf()
        return (x[~excluded], y[~excluded]) if excluded.any() else (x, y)


def _checked(
    reference: nn.Module, model: nn.Module, kind: str, resources: str | Sequence[str]
) -> tuple[str, ...]:
    """The resources asked for. Raises for what is wrong before any model runs."""
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


def _kind(reference: nn.Module, kind: str, first: tuple[tuple, dict[str, Any]]) -> tuple[str, list[str]]:
    if kind == "auto":
        found, why = choose_kind(reference, *first)
        return found, [f"kind: {found}, because {why}"]
    if kind == "language_model":
        call = take_apart(kind, *first)
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
    return measure(models, (call.args, call.kwargs), wanted, tokens, prompts)


def _schemes(model: nn.Module) -> dict[str, int]:
    layers: Iterator[Any] = (module for module in model.modules() if hasattr(module, "scheme"))
    return dict(Counter(layer.scheme.name for layer in layers))
