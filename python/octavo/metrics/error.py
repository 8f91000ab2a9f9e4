# SPDX-License-Identifier: Apache-2.0
"""How far a tensor is from its reference, element by element.

One accumulator holds five float64 numbers; each figure is read off them. So a figure over many batches is the
figure of the batches put together, and nothing but those numbers is kept. The formulas stand in
docs/numerics.md ("Error figures").
"""

from __future__ import annotations

import math

import torch

# Elements converted to float64 at a time: bounds the extra memory to a few megabytes.
CHUNK = 1 << 18


class ErrorAccumulator:
    """Streaming error figures of an approximation against its reference.

    `update` takes pairs of tensors of one shape, any number of times; the properties are the figures so far.
    A NaN or infinite value makes the figures it enters NaN or infinite: nothing is dropped.

    Source: docs/numerics.md, eq. 12 to 15.
    """

    def __init__(self) -> None:
        self.count = 0  # elements seen
        self.max_abs_error = 0.0
        self._signal = 0.0  # sum of reference^2
        self._approximation = 0.0  # sum of approximation^2
        self._dot = 0.0  # sum of reference * approximation
        self._noise = 0.0  # sum of (reference - approximation)^2

    def update(self, reference: torch.Tensor, approximation: torch.Tensor) -> None:
        """Adds every element of two tensors of the same shape.

        Raises: TypeError if one is not a tensor, or is complex; ValueError if the shapes differ.
        """
        check_pair(reference, approximation, "approximation")
        # A copy on reshape happens only for strided views, one tensor at a time.
        references = reference.detach().reshape(-1).split(CHUNK)
        approximations = approximation.detach().reshape(-1).split(CHUNK)
        for x, y in zip(references, approximations, strict=True):
            self._add(x.to(torch.float64), y.to(torch.float64))

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        error = x - y
        self.count += x.numel()
        self._signal += torch.dot(x, x).item()
        self._approximation += torch.dot(y, y).item()
        self._dot += torch.dot(x, y).item()
        self._noise += torch.dot(error, error).item()
        largest = error.abs().max().item()
        if math.isnan(largest) or largest > self.max_abs_error:  # once NaN, no comparison changes it back
            self.max_abs_error = largest

    @property
    def sqnr_db(self) -> float:
        """10 log10(sum x^2 / sum (x - y)^2), dB. inf when equal, -inf when the noise is all there is."""
        if self._noise == 0.0:
            return math.inf
        ratio = self._signal / self._noise
        return -math.inf if ratio == 0.0 else 10.0 * math.log10(ratio)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two flattened, in [-1, 1]. 1 when both are zero, 0 when one is."""
        if self._noise == 0.0:
            return 1.0  # also where rounding of the sums would miss it
        if self._signal == 0.0 or self._approximation == 0.0:
            return 0.0
        # Two roots: the product of the squared lengths may leave float64's range where the lengths do not.
        value = self._dot / (math.sqrt(self._signal) * math.sqrt(self._approximation))
        return value if math.isnan(value) else max(-1.0, min(1.0, value))

    @property
    def relative_error(self) -> float:
        """sqrt(sum (x - y)^2 / sum x^2). 0 when equal; inf when only the reference is all zero."""
        if self._noise == 0.0:
            return 0.0
        return math.inf if self._signal == 0.0 else math.sqrt(self._noise / self._signal)


def sqnr_db(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB: 10 log10(sum x^2 / sum (x - y)^2).

    inf when equal, -inf when the reference is all zero and the approximation is not. 6.02 dB is one bit.
    Raises: TypeError for what is not a real tensor; ValueError if the shapes differ.
    Source: docs/numerics.md, eq. 12.
    """
    return _accumulate(reference, approximation).sqnr_db


def cosine(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Cosine similarity of the two tensors flattened, in [-1, 1]; 1 when both are all zero, 0 when one is.

    Raises: TypeError for what is not a real tensor; ValueError if the shapes differ.
    Source: docs/numerics.md, eq. 13.
    """
    return _accumulate(reference, approximation).cosine


def max_abs_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """max |x - y|, in the units of the input; 0 for empty tensors, NaN if a difference is NaN.

    Raises: TypeError for what is not a real tensor; ValueError if the shapes differ.
    Source: docs/numerics.md, eq. 14.
    """
    return _accumulate(reference, approximation).max_abs_error


def relative_error(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Relative Frobenius error, |x - y| / |x|; 0 when equal, inf when only the reference is all zero.

    Raises: TypeError for what is not a real tensor; ValueError if the shapes differ.
    Source: docs/numerics.md, eq. 15.
    """
    return _accumulate(reference, approximation).relative_error


def _accumulate(reference: torch.Tensor, approximation: torch.Tensor) -> ErrorAccumulator:
    accumulator = ErrorAccumulator()
    accumulator.update(reference, approximation)
    return accumulator


def check_pair(reference: torch.Tensor, approximation: torch.Tensor, name: str) -> None:
    """Raises unless both are real tensors of one shape; `name` is what the caller's user calls the second."""
    first = "reference" if name == "approximation" else f"reference_{name}"
    for argument, value in ((first, reference), (name, approximation)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"metrics: {argument} is {type(value).__name__}, a torch.Tensor is needed")
        if value.is_complex():
            raise TypeError(f"metrics: {argument} is {value.dtype}, a real dtype is needed")
    if reference.shape != approximation.shape:
        raise ValueError(
            f"metrics: {name} has shape {tuple(approximation.shape)}, "
            f"{first} {tuple(reference.shape)}; they must be the same"
        )
