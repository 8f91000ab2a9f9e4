# SPDX-License-Identifier: Apache-2.0
"""The laptop study: every registered scheme on one small language model, with the figures that tell schemes apart.

Accuracy and perplexity hardly move at 8 bits; the KL divergence from the float model does. All figures but the times
are computed on one thread, so that they do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ...base import configs
from ...base.progress import with_bar
from ...conversion.convert import quantized
from ...evaluation import Prompts, bits_per_weight, bytes_on_disk
from ...evaluation.evaluator import evaluate
from ...methods import Method
from ...runtime.timing import interleaved, machine, torch_threads
from ...schemes import SCHEMES, Scheme, by_name, label
from . import byte_lm, byte_text
from .study_result import StudyResult, StudyRow

CONTEXT = 128
BATCH = 40  # windows of one forward pass
# Figures that `evaluate` calls as the study does.
SHARED = ("perplexity", "kld", "kld_standard_error", "top1_agreement", "accuracy", "flips")


@dataclass(frozen=True)
class StudySettings:
    """How much the study measures.

    calibration_windows   of training text, 128 bytes each, that schemes with needs_data see
    windows       of held-out text, 128 predicted bytes each
    prompts       of held-out text, prompt_bytes each, continued by new_bytes greedy bytes
    shapes        windows x bytes of the timed calls
    rounds        timed calls of each model at each shape, the models taking turns
    """

    calibration_windows: int = 64
    windows: int = byte_text.WINDOWS
    prompts: int = 48
    prompt_bytes: int = 64
    new_bytes: int = 64
    shapes: tuple[tuple[int, int], ...] = ((1, 128), (16, 128))
    rounds: int = 15


QUICK = StudySettings(calibration_windows=16, windows=32, prompts=8, new_bytes=16, rounds=3)


def registered_schemes() -> list[Scheme]:
    """What is studied by default: every registered scheme in its variants, and every method that needs data, with
    rows of a scale each and with one scale for all, found by min-max as SmoothQuant's paper has it."""
    plain = [variant for scheme in SCHEMES.values() for variant in scheme.study_variants()]
    methods = [kind() for kind in configs.kinds(Method).values() if kind.needs_data]
    schemes = by_name("int8-dynamic"), by_name("int8-static:observer=min-max")
    return plain + [replace(scheme, method=method) for method in methods for scheme in schemes]


def run(
    schemes: Sequence[Scheme] | None = None,
    *,
    settings: StudySettings = StudySettings(),
    progress: bool = False,
) -> StudyResult:
    """Quantizes the byte language model with each scheme and measures what that does.

    schemes   None: `registered_schemes()`
    settings  how much is measured; QUICK takes seconds and is too coarse to rank 8-bit schemes
    progress  a tqdm bar over the schemes

    Times are taken with torch's current number of threads, which is the same afterwards.
    Raises: FileNotFoundError if this Python was installed without its library's sources.
    Source: ours; docs/study.md.
    """
    chosen = {label(scheme): scheme for scheme in (registered_schemes() if schemes is None else schemes)}
    reference = byte_lm.load()
    models: dict[str, nn.Module] = {"fp32": reference}
    with torch_threads(1):
        data = byte_text.calibration(settings.calibration_windows, CONTEXT)
        models |= {name: quantized(reference, scheme, data=data) for name, scheme in chosen.items()}
        measure = _Measure(reference, settings)
        named = with_bar(models.items(), "studying", "model", progress)
        rows = [measure(name, model, chosen.get(name)) for name, model in named]
    return StudyResult(_with_times(rows, models, settings), _counts(settings), machine())


# Measuring


class _Measure:
    """The figures of one model against the reference, on the text that the settings ask for."""

    def __init__(self, reference: nn.Module, settings: StudySettings) -> None:
        self.reference = reference
        self.batches = list(byte_text.held_out(settings.windows).split(BATCH))
        ids = byte_text.held_out(settings.prompts)[:, : settings.prompt_bytes]
        self.prompts = Prompts(ids, new_tokens=settings.new_bytes)

    def __call__(self, name: str, model: nn.Module, scheme: Scheme | None) -> StudyRow:
        result = evaluate(
            self.reference,
            model,
            self.batches,
            kind="language_model",
            prompts=self.prompts,
            resources=(),
        )
        figures, completions = result.distribution, result.generation
        assert figures is not None and completions is not None  # a language model with prompts has both
        return StudyRow(
            name=name,
            scheme={} if scheme is None else scheme.to_dict(),
            **{figure: getattr(figures, figure) for figure in SHARED},
            first_difference=completions.mean_first_difference,
            identical=completions.identical,
            prefill_kld=completions.prefill.kld,
            prefill_rejection_rate=completions.prefill.rejection_rate,
            generation_kld=completions.generation.kld,
            generation_rejection_rate=completions.generation.rejection_rate,
            bits_per_weight=bits_per_weight(model) or 0.0,
            bytes_on_disk=bytes_on_disk(model),
        )


def _with_times(
    rows: list[StudyRow], models: dict[str, nn.Module], settings: StudySettings
) -> list[StudyRow]:
    medians: dict[str, dict[str, float]] = {name: {} for name in models}
    for windows, length in settings.shapes:
        ids = byte_text.held_out(windows)[:, :length]
        with torch.inference_mode():
            times = interleaved(
                {name: partial(model, ids) for name, model in models.items()}, rounds=settings.rounds
            )
        for name in models:
            medians[name][f"{windows}x{length}"] = times[name].median
    float_medians = medians["fp32"]
    return [
        replace(
            row,
            milliseconds={shape: 1e3 * seconds for shape, seconds in medians[row.name].items()},
            speedup={shape: float_medians[shape] / seconds for shape, seconds in medians[row.name].items()},
        )
        for row in rows
    ]


def _counts(settings: StudySettings) -> dict[str, int]:
    return {
        "calibration_windows": settings.calibration_windows,
        "windows": settings.windows,
        "context": CONTEXT,
        "prompts": settings.prompts,
        "prompt_bytes": settings.prompt_bytes,
        "new_bytes": settings.new_bytes,
        "rounds": settings.rounds,
    }
