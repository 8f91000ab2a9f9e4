# SPDX-License-Identifier: Apache-2.0
"""What `octavo.evaluate` found: numbers only, and the ways to read, show and check them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..metrics import Distribution, Vectors
from .comparison_result import OutputFigures
from .figures import FIGURES, Figure
from .generation import Generation
from .resources import Resources
from .resources import to_dict as resources_to_dict
from .views import evaluation_html, evaluation_markdown, evaluation_text, headline


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What `octavo.evaluate` returns. A part that does not apply, or was not asked for, is None.

    kind           "language_model", "classifier", "encoder" or "module"
    batches        how many were compared
    schemes        quantized layers of the model for each scheme, by name
    output         the logits, the vectors, or every floating-point tensor put out
    distribution   of language models and classifiers: KL divergence, perplexity, accuracy, flips
    vectors        of encoders
    generation     if there were prompts
    resources      if they were asked for
    notes          what a reader must know to judge the figures
    """

    kind: str
    batches: int
    schemes: dict[str, int]
    output: OutputFigures
    distribution: Distribution | None = None
    vectors: Vectors | None = None
    generation: Generation | None = None
    resources: Resources | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers. Infinite and NaN values stay: strict JSON cannot hold them, see `to_json`."""
        fields = asdict(self)
        if self.resources is not None:
            fields["resources"] = resources_to_dict(self.resources)
        return fields

    def to_json(self, indent: int | None = 2) -> str:
        """Strict JSON for programs. null: not measured; "inf", "-inf", "nan" are strings, as `float` reads them."""
        return json.dumps(_strict(self.to_dict()), indent=indent, allow_nan=False)

    def to_markdown(self) -> str:
        """A table for a pull request."""
        return evaluation_markdown(self)

    def __repr__(self) -> str:
        return f"Evaluation({headline(self)})"

    def __str__(self) -> str:
        return evaluation_text(self)

    def _repr_html_(self) -> str:
        return evaluation_html(self)

    def plot(self, ax: Any = None) -> Any:
        """Draws what says most about this kind of model on `ax` or a new figure; returns the Axes. Nothing is shown.

        With distributions: median, mean, 99 %, 99.9 % and largest divergence. Else: the cosines.
        Raises: ImportError if matplotlib is missing.
        """
        from .plots import plot_evaluation

        return plot_evaluation(self, ax)

    def assert_close(self, **limits: float) -> None:
        """Raises AssertionError, with what was measured and what was allowed, unless every limit is kept.

        limits   figures by name: `kld=0.01` is the most allowed, `cosine=0.999` the least, each by what is better.
                 The names are those of this class's parts; for generation "prefill_kld", "generation_rejection_rate"
                 and so on, for the model's resources "bytes_on_disk", "bytes_in_memory", ... NaN keeps no limit.
        Raises: TypeError for no limit or an unknown name; ValueError for a figure that was not measured.
        """
        if not limits:
            raise TypeError(
                "assert_close: no limit given; give one or more, such as kld=0.01 or cosine=0.999"
            )
        unknown = sorted(limits.keys() - FIGURES.keys())
        if unknown:
            raise TypeError(f"assert_close: {', '.join(unknown)} unknown; known are {', '.join(FIGURES)}")
        missed = [line for name, limit in limits.items() if (line := self._missed(FIGURES[name], limit))]
        if missed:
            raise AssertionError(f"{len(missed)} of {len(limits)} limits missed: " + "; ".join(missed))

    def _missed(self, figure: Figure, limit: float) -> str:
        value = figure.value(self)
        if value is None:
            raise ValueError(
                f"assert_close: {figure.name} was not measured for this {self.kind}; leave it out, or give "
                "evaluate what it needs (targets, prompts, resources)"
            )
        kept = value <= limit if figure.lower_is_better else value >= limit
        word = "most" if figure.lower_is_better else "least"
        return "" if kept else f"{figure.name} is {value:.6g}, allowed at {word} {limit:.6g}"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
