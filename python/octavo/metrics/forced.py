# SPDX-License-Identifier: Apache-2.0
"""How far a model is from its reference along tokens that the reference chose: the Fireworks method.

At each position the reference's N most likely tokens are kept and renormalized, as a service that returns only the top
log probabilities would allow; the model's probabilities of those same tokens are renormalized, too. What that leaves
out is reported beside it: the mass of the other tokens, and the divergence over the whole vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .distribution import DistributionAccumulator, kld


@dataclass(frozen=True)
class Forced:
    """Figures over positions; NaN if there is none.

    kld_top_n        mean divergence over the reference's top_n tokens, both sides renormalized, nats
    kld              the same over the whole vocabulary
    rejection_rate   share of positions where the model would choose another token than the reference
    dropped_mass     mean probability that the reference gives to tokens outside its top_n
    """

    positions: int
    top_n: int
    kld_top_n: float
    kld: float
    rejection_rate: float
    dropped_mass: float


class ForcedAccumulator:
    """Streaming figures of logits [..., vocabulary] against those of the reference at the same positions.

    top_n   tokens kept at each position; a smaller vocabulary is kept whole
    Raises: ValueError if top_n is below 1.
    Source: Fireworks AI 2024, "How Fireworks evaluates quantization precisely and interpretably"; docs/numerics.md,
    eq. 23 to 25.
    """

    def __init__(self, top_n: int = 16) -> None:
        if top_n < 1:
            raise ValueError(f"metrics: top_n is {top_n}, at least 1 is needed")
        self.top_n = top_n
        self._all = DistributionAccumulator()
        self._kld: list[torch.Tensor] = []
        self._dropped: list[torch.Tensor] = []

    def update(
        self, reference_logits: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor | None = None
    ) -> None:
        """Adds every position of two tensors of logits [..., vocabulary]; mask bool [...]: False does not count.

        Raises: TypeError, ValueError for what does not fit; nothing has been added then.
        """
        self._all.update(reference_logits, logits, mask=mask)
        if mask is not None:
            reference_logits, logits = reference_logits[mask], logits[mask]
        top, index = reference_logits.detach().topk(min(self.top_n, reference_logits.shape[-1]), dim=-1)
        self._kld.append(_renormalized_kld(top, logits.detach().gather(-1, index)).reshape(-1))
        log_p = top.double() - reference_logits.detach().double().logsumexp(-1, keepdim=True)
        self._dropped.append((1.0 - log_p.exp().sum(-1)).clamp(min=0.0).reshape(-1))

    def klds(self) -> torch.Tensor:
        """The divergence over the whole vocabulary at each position, in the order seen: float64 [positions], nats."""
        return self._all.klds()

    def rejections(self) -> torch.Tensor:
        """1 where the model would choose another token, 0 where not, NaN where undefined: float64 [positions]."""
        return 1.0 - self._all.same()

    def result(self) -> Forced:
        """The figures so far."""
        klds, dropped = (
            torch.cat(parts) if parts else torch.empty(0) for parts in (self._kld, self._dropped)
        )
        if len(klds) == 0:
            return Forced(0, self.top_n, math.nan, math.nan, math.nan, math.nan)
        whole = self._all.result()
        return Forced(
            positions=len(klds),
            top_n=self.top_n,
            kld_top_n=klds.mean().item(),
            kld=whole.kld,
            rejection_rate=1.0 - whole.top1_agreement,
            dropped_mass=dropped.mean().item(),
        )


def _renormalized_kld(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """kld over the tokens given; inf if the model excludes all of them, which has no distribution to compare."""
    excluded = logits.isneginf().all(-1) & ~reference.isnan().any(-1)
    return torch.where(excluded, math.inf, kld(reference, logits))
