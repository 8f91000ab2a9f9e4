# SPDX-License-Identifier: Apache-2.0
"""Every figure of an evaluation that has a better direction: its name in `assert_close`, its label, where it stands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ..base.tables import megabytes

BYTES, SECONDS = "bytes", "seconds"  # texts whose unit depends on the value


@dataclass(frozen=True)
class Figure:
    """One figure: `path` leads to it in an Evaluation, `reference_path` to the reference's own value, if it has one.

    lower_is_better   a limit on it is the most that is allowed; else the least
    text              format of the value, with its unit; or BYTES or SECONDS
    bar               how long a bar is drawn: "share" of 1, "log" from 1e-6 to 1, "decibel" of 60, "ratio" to the
                      reference, or "" for none
    """

    name: str
    label: str
    path: str
    lower_is_better: bool
    text: str = "{:.4f}"
    bar: str = ""
    reference_path: str = ""

    def value(self, evaluation: Any) -> float | None:
        """The figure's value; None if it was not measured."""
        return _at(evaluation, self.path)

    def reference_value(self, evaluation: Any) -> float | None:
        return _at(evaluation, self.reference_path) if self.reference_path else None

    def shown(self, value: float) -> str:
        """The value as text, with its unit."""
        if self.text == BYTES:
            return megabytes(int(value))
        if self.text == SECONDS:
            return seconds_text(value)
        is_large = 1000 <= abs(value) < 1e6  # which three digits would show with an exponent
        return (self.text.replace(".3g", ",.0f") if is_large else self.text).format(value)

    def bar_share(self, evaluation: Any) -> float | None:
        """The length of the bar, 0 to 1; None if the figure has no bar."""
        value, reference = self.value(evaluation), self.reference_value(evaluation)
        if value is None or not self.bar or math.isnan(value):
            return None
        if self.bar == "log":
            share = 1 + math.log10(value) / 6 if value > 0 else 0.0
        elif self.bar == "ratio":
            share = value / reference / 2 if reference else math.nan  # full is twice the reference
        else:
            share = value / {"share": 1.0, "decibel": 60.0}[self.bar]
        return None if math.isnan(share) else min(max(share, 0.0), 1.0)


def seconds_text(seconds: float) -> str:
    """Three digits in a unit that needs no exponent: "1.83 s", "12.1 ms", "340 µs"."""
    for unit, per_second in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * per_second
        rounded = float(f"{value:.3g}")
        if rounded >= 1 or unit == "µs" or not math.isfinite(value):
            break
    digits = max(0, 2 - math.floor(math.log10(rounded))) if math.isfinite(value) and value > 0 else 0
    return f"{value:,.{digits}f} {unit}"


def _at(evaluation: Any, path: str) -> Any:
    return reduce(
        lambda part, name: None if part is None else getattr(part, name), path.split("."), evaluation
    )


def _resource(name: str, label: str, path: str, lower_is_better: bool, text: str) -> Figure:
    return Figure(
        name, label, f"resources.model.{path}", lower_is_better, text, "ratio", f"resources.reference.{path}"
    )


def _forced(part: str) -> list[Figure]:
    path = f"generation.{part}"
    return [
        Figure(f"{part}_kld", "KL divergence", f"{path}.kld", True, "{:.3g} nats", "log"),
        Figure(
            f"{part}_kld_top_n", "of the top N, renormalized", f"{path}.kld_top_n", True, "{:.3g} nats", "log"
        ),
        Figure(
            f"{part}_dropped_mass", "probability outside the top N", f"{path}.dropped_mass", True, "{:.2%}"
        ),
        Figure(f"{part}_rejection_rate", "rejected", f"{path}.rejection_rate", True, "{:.2%}", "share"),
    ]


SECTIONS: dict[str, list[Figure]] = {
    "Output": [
        Figure("sqnr_db", "SQNR", "output.sqnr_db", False, "{:.2f} dB", "decibel"),
        Figure("cosine", "cosine", "output.cosine", False, "{:.6f}"),
        Figure("relative_error", "relative error", "output.relative_error", True, "{:.3g}"),
        Figure("max_abs_error", "largest error", "output.max_abs_error", True, "{:.3g}"),
    ],
    "Vectors": [
        Figure("mean_cosine", "mean cosine", "vectors.mean_cosine", False, "{:.6f}"),
        Figure("worst_cosine", "worst cosine", "vectors.worst_cosine", False, "{:.6f}"),
        Figure("same_neighbour", "same nearest vector", "vectors.same_neighbour", False, "{:.2%}", "share"),
    ],
    "Distribution": [
        Figure("kld", "KL divergence, mean", "distribution.kld", True, "{:.3g} nats", "log"),
        Figure("kld_median", "median", "distribution.kld_median", True, "{:.3g} nats", "log"),
        Figure("kld_p99", "99 %", "distribution.kld_p99", True, "{:.3g} nats", "log"),
        Figure("kld_p999", "99.9 %", "distribution.kld_p999", True, "{:.3g} nats", "log"),
        Figure("kld_max", "largest", "distribution.kld_max", True, "{:.3g} nats", "log"),
        Figure("top1_agreement", "same first choice", "distribution.top1_agreement", False, "{:.2%}", "share"),
    ],
    "Right answers": [
        Figure("perplexity", "perplexity", "distribution.perplexity", True, "{:.4f}", "ratio",
               "distribution.perplexity_reference"),
        Figure("ln_perplexity_ratio", "ln of their ratio", "distribution.ln_perplexity_ratio", True, "{:+.5f}"),
        Figure("bits_per_byte", "bits per byte", "distribution.bits_per_byte", True, "{:.4f}", "ratio",
               "distribution.bits_per_byte_reference"),
        Figure("accuracy", "accuracy", "distribution.accuracy", False, "{:.2%}", "share",
               "distribution.accuracy_reference"),
        Figure("flips", "flips, right <-> wrong", "distribution.flips", True, "{:.2%}", "share"),
        Figure("mcnemar_p", "p that both are equally right", "distribution.mcnemar_p", False, "{:.3g}"),
        Figure("delta_p_rms", "RMS change of p(right)", "distribution.delta_p_rms", True, "{:.3g}"),
    ],
    "Generation": [
        Figure("identical", "identical completions", "generation.identical", False, "{:.1%}", "share"),
        Figure("mean_first_difference", "tokens to the first difference", "generation.mean_first_difference",
               False, "{:.1f}"),
    ],
    "Forced along the prompts": _forced("prefill"),
    "Forced along the reference's completions": _forced("generation"),
    "Resources": [
        _resource("bytes_on_disk", "on disk", "bytes_on_disk", True, BYTES),
        _resource("bytes_in_memory", "in memory", "memory.total", True, BYTES),
        _resource("bits_per_weight", "bits per weight", "bits_per_weight", True, "{:.2f}"),
        _resource("latency", "latency, median", "latency.median", True, SECONDS),
        _resource("latency_p90", "latency, 90 %", "latency.p90", True, SECONDS),
        _resource("prefill_tokens_per_second", "prefill", "prefill_tokens_per_second", False, "{:,.0f} tokens/s"),
        _resource("decode_tokens_per_second", "decode", "decode_tokens_per_second", False, "{:,.0f} tokens/s"),
        _resource("joules_per_call", "energy of a call", "joules_per_call", True, "{:.3g} J"),
        _resource("peak_rss", "peak of a fresh process", "peak_rss", True, BYTES),
    ],
}  # fmt: skip
FIGURES = {figure.name: figure for figures in SECTIONS.values() for figure in figures}
