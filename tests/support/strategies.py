# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: small float tensors of every shape and magnitude, and options to quantize them with."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st

import octavo

settings.register_profile("octavo", deadline=None)  # time is not what these tests are about
settings.load_profile("octavo")

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def finite_floats() -> st.SearchStrategy[float]:
    """Every finite float32: zeros of both signs, denormals and the largest among them."""
    return st.floats(width=32, allow_nan=False, allow_infinity=False)


def shapes(min_dims: int = 1, max_dims: int = 3, max_side: int = 9) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes, empty ones included."""
    return st.lists(st.integers(0, max_side), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def tensors(draw, shape=None, dtypes=FLOAT_TYPES, elements=None) -> torch.Tensor:
    """A finite tensor; without `shape`, of any from `shapes()`."""
    shape = draw(shapes()) if shape is None else shape
    count = math.prod(shape)
    values = draw(st.lists(finite_floats() if elements is None else elements, min_size=count, max_size=count))
    dtype = draw(st.sampled_from(dtypes))
    largest = torch.finfo(dtype).max
    return torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype).reshape(shape)


@st.composite
def granularities(draw, shape: tuple[int, ...]) -> octavo.tensors.qparams.Granularity:
    """A granularity that fits `shape`."""
    return draw(
        st.one_of(
            st.just(octavo.PerTensor()),
            st.integers(-len(shape), len(shape) - 1).map(octavo.PerChannel),
            st.integers(1, 12).map(octavo.PerGroup),
            st.just(octavo.PerToken()),
        )
    )


@st.composite
def quantization(draw, shape: tuple[int, ...]) -> dict[str, object]:
    """Keyword arguments for octavo.quantize on a tensor of `shape`."""
    return {
        "dtype": draw(st.sampled_from([torch.int8, torch.uint8])),
        "symmetric": draw(st.booleans()),
        "granularity": draw(granularities(shape)),
    }
