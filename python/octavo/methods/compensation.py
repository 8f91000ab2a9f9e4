# SPDX-License-Identifier: Apache-2.0
"""GPTQ's arithmetic: column after column is rounded, and what rounding adds to the output is taken off the columns
that are still to come.

With H = X^T X of the inputs, and H^-1 = U^T U with U upper triangular, rounding column j by e moves the best values of
the later columns by -e U_j / U_jj. docs/numerics.md, eq. 89 to 91.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..tensors.granularity import PerGroup
from ..tensors.qparams import QParams, QuantizedTensor

BLOCK = 128  # columns whose effect on all later ones is one matrix product
ATTEMPTS = 8  # to factor H; each has ten times the damping
LEAST_DAMPING = 1e-6  # of the second attempt

FindQParams = Callable[[torch.Tensor], QParams]  # those for some neighbouring columns [n, group size]


def compensated(
    weight: torch.Tensor,
    gram: torch.Tensor,
    qparams: QParams | FindQParams,
    *,
    damping: float = 0.01,
    by_activation: bool = True,
    group_size: int = 0,
    block: int = BLOCK,
) -> QuantizedTensor:
    """The codes of `weight` [n, k] with which the outputs for inputs of this `gram` [k, k] change little.

    weight    float32, or float64, in which everything but the rounding then is computed
    qparams   those of the whole weight, per channel or per group; or what gives those of `group_size` neighbouring
              columns, which is asked when their block of columns begins, with what has been taken off them so far
    damping   times the mean of the diagonal is added to it, and ten times more as long as that is not enough
    by_activation   columns in the order of their inputs' energy, the largest first; else as they lie
    block     how many columns are taken off together; with qparams of the whole weight it changes nothing but the time
    source    Frantar et al. 2022 (arXiv:2210.17323), algorithm 1; the order and groups that stay neighbours: its code,
              `--act-order --static-groups`
    """
    n, k = weight.shape
    energy = living(gram).diagonal()
    order = energy.argsort(descending=True, stable=True) if by_activation else torch.arange(k)
    u = inverse_factor(living(gram)[order][:, order], damping).to(weight.dtype)
    columns = weight.T[order].clone()  # [k, n], so that a column lies in one piece
    rounding = _Rounding(qparams, n, k, group_size, weight.dtype)
    for start in range(0, k, block):
        end = min(start + block, k)
        now, u_now = columns[start:end], u[start:end, start:end]
        if callable(qparams):
            rounding.find(now, start)
        errors = torch.empty_like(now)
        for i in range(end - start):
            value = rounding.value(now[i], int(order[start + i]))
            errors[i] = (now[i] - value) / u_now[i, i]
            now[i + 1 :].addr_(u_now[i, i + 1 :], errors[i], alpha=-1)
        columns[end:].addmm_(u[start:end, end:].T, errors, alpha=-1)
    return rounding.result()


class _Rounding:
    """Rounds single columns, and keeps the codes."""

    def __init__(
        self, qparams: QParams | FindQParams, n: int, k: int, group_size: int, dtype: torch.dtype
    ) -> None:
        self.find_qparams = None if isinstance(qparams, QParams) else qparams
        self.whole = qparams if isinstance(qparams, QParams) else None
        self.parts: list[QParams] = []
        self.dtype, self.n, self.k, self.group_size = dtype, n, k, group_size
        if self.whole is not None:
            groups = self.whole.scale.numel() // n
            self.group_size = getattr(self.whole.granularity, "group_size", k)
            self.parts = [self.whole.part(slice(group, None, groups)) for group in range(groups)]
        self.codes: torch.Tensor | None = None

    def find(self, columns: torch.Tensor, start: int) -> None:
        """Finds the qparams of the groups in `columns` [columns, n], which begin at `start`."""
        assert self.find_qparams is not None and start % self.group_size == 0
        for group in columns.T.float().split(self.group_size, dim=1):
            self.parts.append(self.find_qparams(group.contiguous()))

    def value(self, column: torch.Tensor, j: int) -> torch.Tensor:
        """What the codes of `column` [n], the j-th of the weight, stand for."""
        part = self.parts[j // self.group_size]
        codes = part.quantize_rows(column.float()[:, None])
        if self.codes is None:
            self.codes = torch.empty(self.k, self.n, dtype=codes.dtype)
        self.codes[j] = codes[:, 0]
        return part.dequantize_rows(codes, torch.float32)[:, 0].to(self.dtype)

    def result(self) -> QuantizedTensor:
        codes = torch.empty(0) if self.codes is None else self.codes.T.contiguous()
        if self.whole is not None:
            return QuantizedTensor(codes, self.whole)
        scale = torch.stack([part.scale.reshape(-1) for part in self.parts], 1)
        zero_point = torch.stack([part.zero_point.reshape(-1) for part in self.parts], 1)
        granularity = PerGroup(self.group_size)
        q = replace(self.parts[0], scale=scale, zero_point=zero_point, granularity=granularity)
        return QuantizedTensor(codes, q)


def living(gram: torch.Tensor) -> torch.Tensor:
    """`gram` as float64, in which channels that were always zero have the mean energy of the others: their weights are
    rounded to nearest, for nothing is known of them."""
    gram = gram.double()
    energy = gram.diagonal()
    is_dead = energy <= 0
    if not is_dead.any():
        return gram
    mean = energy[~is_dead].mean() if not is_dead.all() else torch.ones((), dtype=torch.float64)
    return gram + torch.diag(torch.where(is_dead, mean - energy, 0.0))


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """U float64 [k, k], upper triangular, U^T U the inverse of the damped `gram`: eq. 89.

    Of the reversed gram the Cholesky factor, reversed, is upper triangular with gram = R R^T, so U is the inverse of R:
    one factorization and no inverse of H, which would square its condition.
    """
    mean = gram.diagonal().mean()
    for _ in range(ATTEMPTS):
        damped = gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            r = lower.flip(0, 1)
            u = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype), upper=True)
            if u.isfinite().all():
                return u
        damping = max(10 * damping, LEAST_DAMPING)
    return torch.diag(gram.diagonal().rsqrt())  # nothing is compensated
