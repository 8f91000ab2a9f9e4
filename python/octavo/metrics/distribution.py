# SPDX-License-Identifier: Apache-2.0
"""How far a model's predicted distributions are from the reference's, token by token.

Both models see the same tokens; their logits at one position are two distributions over the vocabulary. Three float64
numbers and a few flags are kept for each token, so medians are exact, errors are paired and the order or size of
batches changes nothing; the logits are gone after `update`. A token whose logits hold NaN or +inf, or nothing above
-inf, has figures of NaN and makes all figures of the whole NaN: nothing is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .error import check_pair
from .paired import mcnemar

# Logits converted to float64 at a time; a few arrays of this size exist at once: 8 MB each.
CHUNK = 1 << 20
NO_TARGET = -100  # as torch.nn.functional.cross_entropy and transformers mark it


@dataclass(frozen=True)
class Distribution:
    """How a model's predicted distributions differ from the reference's. KLD, log likelihoods and errors are in nats.

    tokens                        positions compared
    kld                           mean over tokens of KL(reference || model), and its standard error, median, 99th and
                                  99.9th percentile, largest. Text is correlated: the error is a lower bound.
    top1_agreement                share of tokens for which both models would choose the same
    targets                       tokens whose right answer was given. The rest is None without them:
    perplexity(_reference)        exp(mean negative log likelihood of the target)
    ln_perplexity_ratio           ln(perplexity / perplexity_reference), above 0 if the model is worse, and its paired
                                  standard error
    accuracy(_reference)          share of targets with the highest logit
    flips                         share of targets that one model gets right and the other wrong; mcnemar_p: how likely
                                  so uneven a split of them is by chance
    delta_p_mean, delta_p_rms     of p_model(target) - p_reference(target)
    bits_per_byte(_reference)     if it was said how many bytes a token stands for
    """

    tokens: int
    kld: float
    kld_standard_error: float
    kld_median: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1_agreement: float
    targets: int = 0
    perplexity_reference: float | None = None
    perplexity: float | None = None
    ln_perplexity_ratio: float | None = None
    ln_perplexity_ratio_standard_error: float | None = None
    accuracy_reference: float | None = None
    accuracy: float | None = None
    flips: float | None = None
    only_reference_correct: int | None = None
    only_model_correct: int | None = None
    mcnemar_p: float | None = None
    delta_p_mean: float | None = None
    delta_p_rms: float | None = None
    bits_per_byte_reference: float | None = None
    bits_per_byte: float | None = None


class DistributionAccumulator:
    """Streaming figures of logits against reference logits.

    Source: docs/numerics.md, eq. 16 to 22.
    """

    def __init__(self) -> None:
        self._tokens: dict[str, list[torch.Tensor]] = {"kld": [], "same": []}
        self._targets: dict[str, list[torch.Tensor]] = {
            "nll_reference": [], "nll": [], "right_reference": [], "right": [],
        }  # fmt: skip

    def update(
        self,
        reference_logits: torch.Tensor,
        logits: torch.Tensor,
        targets: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> None:
        """Adds every position of two tensors of logits [..., vocabulary]; -inf is a token that cannot come.

        targets   int64 [...], the right token of each position, -100 where there is none
        mask      bool [...], False at positions that do not count at all (padding)
        Raises: TypeError, ValueError for what does not fit; nothing has been added then.
        """
        for rows in _checked_rows(reference_logits, logits, targets, mask):
            self._add(*rows)

    def _add(self, x: torch.Tensor, y: torch.Tensor, targets: torch.Tensor | None) -> None:
        log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
        undefined = (log_p.isnan() | log_q.isnan()).any(-1)
        choice_reference, choice = x.argmax(-1), y.argmax(-1)
        self._tokens["kld"].append(divergence(log_p, log_q))
        self._tokens["same"].append(_share(choice_reference == choice, undefined))
        if targets is None:
            return
        given = targets != NO_TARGET
        index = targets[given, None]
        found = {
            "nll_reference": -log_p[given].gather(-1, index)[:, 0],
            "nll": -log_q[given].gather(-1, index)[:, 0],
            "right_reference": _share(choice_reference == targets, undefined)[given],
            "right": _share(choice == targets, undefined)[given],
        }
        for name, values in found.items():
            self._targets[name].append(values)

    def klds(self) -> torch.Tensor:
        """The divergence of each token so far, in the order seen: float64 [tokens], nats."""
        return _joined(self._tokens["kld"])

    def same(self) -> torch.Tensor:
        """1 for each token so far on which both models' first choice agrees, else 0; NaN where undefined."""
        return _joined(self._tokens["same"])

    def result(self, bytes_per_token: float | None = None) -> Distribution:
        """The figures so far. bytes_per_token: bytes of text for each token, 1 for a model of bytes; for bits per byte.

        Raises: ValueError if there is no token yet, or bytes_per_token is not above 0.
        """
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise ValueError(f"metrics: bytes_per_token is {bytes_per_token}, a number above 0 is needed")
        klds = self.klds()
        if len(klds) == 0:
            raise ValueError("metrics: there is no token yet; update first")
        ordered = klds.sort().values
        return Distribution(
            tokens=len(klds),
            kld=_mean(klds),
            kld_standard_error=_standard_error(klds),
            kld_median=quantile(ordered, 0.5),
            kld_p99=quantile(ordered, 0.99),
            kld_p999=quantile(ordered, 0.999),
            kld_max=ordered[-1].item(),  # NaN sorts last
            top1_agreement=_mean(self.same()),
            **self._target_figures(bytes_per_token),
        )

    def _target_figures(self, bytes_per_token: float | None) -> dict[str, Any]:
        values = {name: _joined(parts) for name, parts in self._targets.items()}
        nll_reference, nll = values["nll_reference"], values["nll"]
        right_reference, right = values["right_reference"], values["right"]
        if len(nll) == 0:
            return {}
        # Equal infinite values differ by nothing.
        increase = torch.where(nll == nll_reference, 0.0, nll - nll_reference)
        delta_p = (-nll).exp() - (-nll_reference).exp()
        lost, won = int((right_reference > right).sum()), int((right_reference < right).sum())
        figures: dict[str, Any] = {
            "targets": len(nll),
            "perplexity_reference": _exp(_mean(nll_reference)),
            "perplexity": _exp(_mean(nll)),
            "ln_perplexity_ratio": _mean(increase),
            "ln_perplexity_ratio_standard_error": _standard_error(increase),
            "accuracy_reference": _mean(right_reference),
            "accuracy": _mean(right),
            "flips": _mean((right - right_reference).abs()),
            "only_reference_correct": lost,
            "only_model_correct": won,
            "mcnemar_p": mcnemar(lost, won),
            "delta_p_mean": _mean(delta_p),
            "delta_p_rms": math.sqrt(_mean(delta_p.square())),
        }
        if bytes_per_token is not None:
            bits = bytes_per_token * math.log(2.0)
            figures["bits_per_byte_reference"] = _mean(nll_reference) / bits
            figures["bits_per_byte"] = _mean(nll) / bits
        return figures


def kld(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) at each position, in nats: logits [..., vocabulary] to float64 [...].

    0 where a position's logits are equal or differ by a constant; inf where the model excludes (-inf) what the
    reference does not; NaN for logits without a distribution.
    Raises: TypeError for what is not a float tensor; ValueError if the shapes differ.
    Source: docs/numerics.md, eq. 16.
    """
    parts = [
        divergence(x.double().log_softmax(-1), y.double().log_softmax(-1))
        for x, y, _ in _checked_rows(reference_logits, logits, None, None)
    ]
    return _joined(parts).reshape(reference_logits.shape[:-1])


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """sum p log(p / q) over the last axis of log probabilities, float64; a term with p = 0 is 0.

    Equal distributions may come out as -1e-17, which is rounding: nothing below 0 is returned. NaN stays.
    """
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp(min=0.0)


def quantile(ordered: torch.Tensor, share: float) -> float:
    """The quantile of a sorted, non-empty tensor, with linear interpolation (NumPy's default); NaN if it holds NaN."""
    if ordered[-1].isnan():
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    below, above = ordered[low].item(), ordered[min(low + 1, len(ordered) - 1)].item()
    return below if below == above or place == low else below + (above - below) * (place - low)


def _checked_rows(
    reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor | None, mask: torch.Tensor | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Chunks of positions, after everything was checked: logits [some, vocabulary] of both, targets [some]."""
    check_pair(reference, logits, "logits")
    for name, tensor in (("reference_logits", reference), ("logits", logits)):
        if not tensor.is_floating_point():
            raise TypeError(f"metrics: {name} is {tensor.dtype}, a float dtype is needed")
    if reference.dim() == 0 or reference.shape[-1] == 0:
        raise ValueError(f"metrics: logits have shape {tuple(reference.shape)}, [..., vocabulary] is needed")
    vocabulary = reference.shape[-1]
    _check_labels("targets", targets, reference, torch.int64)
    _check_labels("mask", mask, reference, torch.bool)
    if targets is not None and ((targets != NO_TARGET) & ((targets < 0) | (targets >= vocabulary))).any():
        raise ValueError(f"metrics: targets must be in 0 .. {vocabulary - 1}, or {NO_TARGET} for none")
    x, y = reference.detach().reshape(-1, vocabulary), logits.detach().reshape(-1, vocabulary)
    labels = None if targets is None else targets.reshape(-1)
    if mask is not None:
        kept = mask.reshape(-1)
        x, y, labels = x[kept], y[kept], None if labels is None else labels[kept]
    return _chunks(x, y, labels, max(1, CHUNK // vocabulary))


def _chunks(
    x: torch.Tensor, y: torch.Tensor, labels: torch.Tensor | None, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        yield x[part], y[part], None if labels is None else labels[part]


def _check_labels(name: str, labels: torch.Tensor | None, logits: torch.Tensor, dtype: torch.dtype) -> None:
    if labels is None:
        return
    if not isinstance(labels, torch.Tensor) or labels.dtype != dtype:
        found = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise TypeError(f"metrics: {name} is {found}, a tensor of {dtype} is needed")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"metrics: {name} has shape {tuple(labels.shape)}, logits of shape {tuple(logits.shape)} "
            f"need {tuple(logits.shape[:-1])}"
        )


def _share(condition: torch.Tensor, undefined: torch.Tensor) -> torch.Tensor:
    return condition.double().masked_fill(undefined, math.nan)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def _mean(values: torch.Tensor) -> float:
    return values.mean().item()


def _standard_error(values: torch.Tensor) -> float:
    """The standard error of the mean; NaN for fewer than two values."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 709.0 else value if math.isnan(value) else math.inf  # e^709.8 overflows
