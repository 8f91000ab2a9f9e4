# SPDX-License-Identifier: Apache-2.0
"""An evaluation drawn with matplotlib."""

from __future__ import annotations

import math
from typing import Any

from ..base.plots import new_axes

KLDS = {
    "median": "kld_median",
    "mean": "kld",
    "99 %": "kld_p99",
    "99.9 %": "kld_p999",
    "largest": "kld_max",
}


def plot_evaluation(evaluation: Any, ax: Any) -> Any:
    """Draws divergences on a logarithmic axis, or cosines."""
    ax = new_axes("Evaluation.plot", 7, 2.6) if ax is None else ax
    if evaluation.distribution is not None:
        _plot_distribution(evaluation.distribution, ax)
    else:
        _plot_cosines(evaluation, ax)
    ax.invert_yaxis()
    return ax


def plot_generation(generation: Any, ax: Any) -> Any:
    """Draws the divergence at each new token, and the share of completions that are still the same text."""
    ax = new_axes("Generation.plot", 7, 2.6) if ax is None else ax
    count = len(generation.kld_by_position)
    positions = range(1, count + 1)
    ax.plot(positions, generation.kld_by_position, color="tab:blue")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("KL divergence, nats", color="tab:blue")
    ax.set_xlabel("new token (divergence: both models read the reference's text)")
    same = [
        sum(first > i for first in generation.first_differences) / generation.prompts for i in range(count)
    ]
    right = ax.twinx()
    right.step(positions, same, where="mid", color="tab:orange")
    right.set_ylim(0, 1.02)
    right.set_ylabel("share still identical", color="tab:orange")
    title = f"{generation.prompts} prompts: {generation.identical:.0%} identical"
    ax.set_title(
        f"{title}, {generation.mean_first_difference:.1f} tokens to the first difference",
        fontsize=10,
        loc="left",
    )
    return ax


def _plot_distribution(distribution: Any, ax: Any) -> None:
    values = [getattr(distribution, name) for name in KLDS.values()]
    # A logarithmic axis has no place for 0 (equal models), inf and NaN: they get no bar.
    ax.barh(
        list(KLDS),
        [v if math.isfinite(v) and v > 0 else math.nan for v in values],
        color="tab:blue",
        alpha=0.7,
    )
    ax.set_xscale("log")
    ax.set_xlabel("KL divergence of a token, nats (lower is closer to the reference)")
    title = f"{distribution.tokens:,} tokens, same first choice {distribution.top1_agreement:.2%}"
    if distribution.perplexity is not None:
        title += f", perplexity {distribution.perplexity_reference:.4g} -> {distribution.perplexity:.4g}"
    ax.set_title(title, fontsize=10, loc="left")


def _plot_cosines(evaluation: Any, ax: Any) -> None:
    values = {"all outputs": evaluation.output.cosine}
    if evaluation.vectors is not None:
        values |= {
            "mean vector": evaluation.vectors.mean_cosine,
            "worst vector": evaluation.vectors.worst_cosine,
        }
    # What is missing to 1: cosines of good models differ in the fourth digit only.
    ax.barh(list(values), [1 - value for value in values.values()], color="tab:blue", alpha=0.7)
    ax.set_xlabel("1 - cosine (lower is closer to the reference)")
    ax.set_title(f"output: {evaluation.output.sqnr_db:.1f} dB", fontsize=10, loc="left")
