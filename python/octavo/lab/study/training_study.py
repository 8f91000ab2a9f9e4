# SPDX-License-Identifier: Apache-2.0
"""What training through the rounding wins back: the byte language model with few bits, just rounded, and then trained.

Beside each result stands the float model after as many steps of training, and the same one rounded: what these gain as
well is gained by more training, not by training through the rounding.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from ...base.progress import with_bar
from ...conversion.convert import quantized
from ...conversion.prepare import calibrating, freeze_, prepare_
from ...evaluation.evaluator import evaluate
from ...formats import CoarseInt8
from ...runtime.timing import machine, torch_threads
from ...schemes import SCHEMES, Scheme, label
from . import byte_lm, byte_text
from .byte_training import TrainingConfig, train
from .training_result import FLOAT, LEARNED_SCALES, NONE, STRAIGHT_THROUGH, TrainingResult, TrainingRow

CONTEXT = 128
BATCH = 40  # windows of one forward pass without training
BITS = (8, 4, 3, 2)
LAST = 30  # steps whose mean is the training loss


@dataclass(frozen=True)
class TrainingStudySettings:
    """How much is trained and measured.

    training              steps, windows of each, and what else is the same for all; another seed than the model's own
                          training had, so other windows
    learning_rates        in float and with 4 bits and more, and with fewer. Chosen by the loss on training text: float
                          loses by more than the first, 2 bits gain
    calibration_windows   of training text, for schemes with needs_data
    windows               of held-out text, 128 predicted bytes each
    """

    training: TrainingConfig = TrainingConfig(steps=150, batch=16, warmup=10, seed=1)
    learning_rates: tuple[float, float] = (5e-4, 2e-3)
    calibration_windows: int = 64
    windows: int = byte_text.WINDOWS


QUICK = TrainingStudySettings(
    TrainingConfig(steps=10, batch=8, warmup=2, seed=1), calibration_windows=16, windows=32
)


def run(
    schemes: Sequence[Scheme] | None = None,
    *,
    settings: TrainingStudySettings = TrainingStudySettings(),
    progress: bool = False,
) -> TrainingResult:
    """Measures each scheme without training, after training in float, and after training through its rounding.

    schemes   None: Int8Dynamic with weights of 8, 4, 3 and 2 bits
    settings  how much; QUICK takes seconds and shows no more than that it runs
    progress  a tqdm bar over the models

    Training sees the training text only; the figures are measured on held-out text with the integer layers that
    `freeze_` makes. All of it runs on one thread, so the figures do not depend on the number of threads.
    Raises: FileNotFoundError if this Python was installed without its library's sources; ValueError for a scheme whose
    scales cannot be learned.
    Source: straight-through: Bengio et al. 2013 (arXiv:1308.3432), section 4; learned scales: Esser et al. 2020
    (arXiv:1902.08153); the study: ours, docs/study.md.
    """
    chosen = variants([SCHEMES["Int8Dynamic"]]) if schemes is None else list(schemes)
    with torch_threads(1):
        study = _Study(settings)
        rows = [
            row
            for scheme in with_bar([None, *chosen], "training", "scheme", progress)
            for row in study(scheme)
        ]
    return TrainingResult(rows, _counts(settings), machine())


def variants(schemes: Sequence[type[Scheme]]) -> list[Scheme]:
    """Each of `schemes` with its defaults and weights of BITS bits."""
    return [
        scheme() if bits == 8 else scheme(weights=CoarseInt8(bits)) for scheme in schemes for bits in BITS
    ]


@dataclass(frozen=True)
class _Trained:
    model: byte_lm.ByteLM
    learning_rate: float = 0.0
    loss: float = 0.0
    cpu_seconds: float = 0.0


class _Study:
    """The float models, untrained and trained, and the rows of each scheme."""

    def __init__(self, settings: TrainingStudySettings) -> None:
        self.settings = settings
        self.reference = byte_lm.load()
        self.text = byte_text.training_bytes()
        self.calibration = byte_text.calibration(settings.calibration_windows, CONTEXT)
        self.held_out = list(byte_text.held_out(settings.windows, CONTEXT).split(BATCH))
        self.trained_float = self._trained(self._copy(), settings.learning_rates[0])
        self.trained_perplexity = self._figures(self.trained_float.model).perplexity

    def __call__(self, scheme: Scheme | None) -> Iterator[TrainingRow]:
        """Rows of the float model, or of one scheme."""
        if scheme is None:
            yield self._row(None, NONE, _Trained(self.reference))
            yield self._row(None, FLOAT, self.trained_float)
            return
        for training, trained in ((NONE, _Trained(self.reference)), (FLOAT, self.trained_float)):
            rounded: Any = quantized(trained.model, scheme, data=self.calibration)
            yield self._row(scheme, training, replace(trained, model=rounded, cpu_seconds=0.0))
        for training in (STRAIGHT_THROUGH, LEARNED_SCALES):
            prepared = self._prepared(scheme, training == LEARNED_SCALES)
            trained = self._trained(prepared, self.settings.learning_rates[scheme.weights.bits < 4])
            freeze_(trained.model)
            yield self._row(scheme, training, trained)

    def _copy(self) -> byte_lm.ByteLM:
        return copy.deepcopy(self.reference).requires_grad_(True)

    def _prepared(self, scheme: Scheme, learn_scales: bool) -> byte_lm.ByteLM:
        """The float model, ready to be trained through its rounding."""
        model = self._copy()
        prepare_(model, scheme, learn_scales=learn_scales)
        for _ in range(scheme.calibration_passes):
            with torch.no_grad(), calibrating(model):
                model(self.calibration)
        return model

    def _trained(self, model: byte_lm.ByteLM, learning_rate: float) -> _Trained:
        losses: list[float] = []
        config = replace(self.settings.training, learning_rate=learning_rate)
        start = time.process_time()
        train(model, self.text, config, lambda step, loss: losses.append(loss))
        return _Trained(model, learning_rate, fmean(losses[-LAST:]), time.process_time() - start)

    def _row(self, scheme: Scheme | None, training: str, trained: _Trained) -> TrainingRow:
        figures = self._figures(trained.model)
        return TrainingRow(
            name="fp32" if scheme is None else label(scheme),
            scheme={} if scheme is None else scheme.to_dict(),
            training=training,
            learning_rate=trained.learning_rate,
            training_loss=trained.loss,
            perplexity=figures.perplexity,
            excess=figures.perplexity / self.trained_perplexity - 1,
            kld=figures.kld,
            kld_standard_error=figures.kld_standard_error,
            top1_agreement=figures.top1_agreement,
            accuracy=figures.accuracy,
            cpu_seconds=trained.cpu_seconds,
        )

    def _figures(self, model: nn.Module) -> Any:
        found = evaluate(self.reference, model, self.held_out, kind="language_model", resources=())
        return found.distribution


def _counts(settings: TrainingStudySettings) -> dict[str, Any]:
    return {
        "steps": settings.training.steps,
        "batch": settings.training.batch,
        "warmup": settings.training.warmup,
        "seed": settings.training.seed,
        "learning_rates": list(settings.learning_rates),
        "calibration_windows": settings.calibration_windows,
        "windows": settings.windows,
        "context": CONTEXT,
    }
