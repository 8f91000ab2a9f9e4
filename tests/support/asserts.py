# SPDX-License-Identifier: Apache-2.0
"""Assertions on tensors. Each raises, says where the first difference is, and is shown to fail in test_asserts.py.

Bounds hold element by element, never as one number over a flattened tensor: an output twice too large has a perfect
cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_SAME_WIDTH = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@contextmanager
def in_case(*values: object) -> Iterator[None]:
    """What fails inside names these values: for tests that go through many cases in a loop."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"in the case {', '.join(map(str, values))}: {error}") from error


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Integer tensors of the same dtype, shape and values."""
    assert not actual.is_floating_point(), (
        f"assert_equal is for integers, got {actual.dtype}: use assert_bits_equal"
    )
    _assert_same_kind(actual, expected)
    _assert_all(actual == expected, actual, expected, "differs")


def assert_bits_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Float tensors of the same dtype, shape and bits: 0.0 is not -0.0; NaN equals NaN, whatever its payload."""
    _assert_same_kind(actual, expected)
    width = _SAME_WIDTH[actual.dtype]
    same_bits = actual.contiguous().view(width) == expected.contiguous().view(width)
    _assert_all(same_bits | (actual.isnan() & expected.isnan()), actual, expected, "has other bits")


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor | float) -> None:
    """|actual - expected| <= bound for every element, in float64; `bound` is broadcast. NaN is never within."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(expected.shape)
    _assert_all((actual - expected).abs() <= bound, actual, expected, "is too far", bound)


def assert_within_scale(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> None:
    """|actual - expected| <= scale / 2 (1 + 2^-13) element by element: rounding to the nearest code, and no more.

    2^-13: with u = 2^-24 and s = 255 steps, float32 may round scale by 2 u, min / scale by u, x * (1 / scale) by 2 u
    and scale * (code - zero_point) by u; the worst sum of these is 4 u s = 2^-14 steps, added to half a step.
    """
    assert_within(actual, expected, scale.double() / 2 * (1 + 2**-13))


def model_state(model: nn.Module) -> dict[str, object]:
    """What `assert_unchanged` compares: the modules themselves and a copy of every tensor."""
    return {
        "modules": dict(model.named_modules()),
        "tensors": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    """The very same modules, with the same flags and bit-equal tensors, as when `model_state` looked."""
    now = model_state(model)
    for part in ("modules", "training"):
        assert now[part] == before[part], f"{part} of the model changed"
    assert now["tensors"].keys() == before["tensors"].keys(), "state_dict has other keys"
    for name, tensor in now["tensors"].items():
        same = assert_bits_equal if tensor.is_floating_point() else assert_equal
        same(tensor, before["tensors"][name])


def _assert_same_kind(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"


def _assert_all(
    ok: torch.Tensor,
    actual: torch.Tensor,
    expected: torch.Tensor,
    what: str,
    bound: torch.Tensor | None = None,
) -> None:
    if ok.all():
        return
    at = tuple((~ok).nonzero()[0].tolist())
    limit = "" if bound is None else f", bound {bound[at].item():.9g}"
    raise AssertionError(
        f"{int((~ok).sum())} of {ok.numel()}: element {list(at)} {what}: {actual[at].item():.9g}, "
        f"expected {expected[at].item():.9g}{limit}"
    )
