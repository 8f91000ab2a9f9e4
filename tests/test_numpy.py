# SPDX-License-Identifier: Apache-2.0
"""octavo.numpy means what octavo means for tensors, bit for bit, and copies nothing it need not copy."""

import itertools
import sys
import threading

import numpy as np
import pytest
import torch
from asserts import in_case

import octavo
from octavo import _C, PerChannel, PerGroup, PerTensor, PerToken

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerChannel(1), PerGroup(4), PerToken()]
SHAPES = [(3, 7), (2, 3, 10), (1, 1), (0, 5)]


def random_array(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_quantize_is_that_of_tensors(isa):
    dtypes = ["int8", "uint8", "int16", "uint16"]
    for case in itertools.product(SHAPES, GRANULARITIES, dtypes, [True, False]):
        with in_case(*case):
            check_quantize(*case)


def check_quantize(shape, granularity, dtype, symmetric):
    x = random_array(*shape)
    q = octavo.numpy.quantize(x, dtype=dtype, granularity=granularity, symmetric=symmetric)
    expected = octavo.quantize(
        torch.from_numpy(x), dtype=getattr(torch, dtype), granularity=granularity, symmetric=symmetric
    )
    for name in ("codes", "scale", "zero_point"):
        actual, tensor = getattr(q, name), getattr(expected, name)
        assert actual.shape == tuple(tensor.shape)
        np.testing.assert_array_equal(actual, tensor.numpy(), strict=True)
    np.testing.assert_array_equal(octavo.numpy.dequantize(q), expected.dequantize().numpy(), strict=True)
    assert (q.shape, q.nbytes) == (tuple(expected.shape), expected.nbytes)


def test_error_is_at_most_half_a_step():
    x = random_array(50, 60)
    q = octavo.numpy.quantize(x, granularity=PerToken())
    # Half a step, and the rounding of 1 / scale, of x / scale and of the product: each 2^-24 of at most 127 steps.
    bound = q.scale[:, None] * (0.5 + 3 * 127 * 2.0**-24)
    assert (np.abs(q.dequantize() - x) <= bound).all()


def test_granularity_class_stands_for_its_default():
    x = random_array(3, 7)
    assert octavo.numpy.quantize(x, granularity=PerToken).granularity == PerToken()


@pytest.mark.parametrize("a_dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (7, 17, 65), (0, 3, 2), (3, 2, 0)])
def test_int8_mm_is_exact(isa, a_dtype, m, n, k):
    generator, limits = np.random.default_rng(0), np.iinfo(a_dtype)
    a = generator.integers(limits.min, limits.max, (m, k), a_dtype, endpoint=True)
    b = generator.integers(-128, 127, (k, n), np.int8, endpoint=True)
    expected = (a.astype(np.int64) @ b.astype(np.int64)).astype(np.int32)
    np.testing.assert_array_equal(octavo.numpy.int8_mm(a, b), expected, strict=True)
    np.testing.assert_array_equal(octavo.numpy.int8_mm(np.asfortranarray(a), b[::1]), expected, strict=True)


def test_strided_reversed_and_read_only_arrays_are_fine():
    x = random_array(6, 8)
    expected = octavo.numpy.quantize(np.ascontiguousarray(x[::-1, ::2])).codes
    np.testing.assert_array_equal(octavo.numpy.quantize(x[::-1, ::2]).codes, expected)
    x.flags.writeable = False
    octavo.numpy.quantize(x)


@pytest.mark.parametrize("granularity", [PerTensor(), PerToken(), PerChannel(0), PerGroup(4)], ids=str)
def test_contiguous_input_is_not_copied(monkeypatch, granularity):
    x, seen = random_array(6, 8), []

    def choose_qparams(rows, *arguments):
        seen.append(np.shares_memory(rows, x))
        return real(rows, *arguments)

    real = _C.choose_qparams
    monkeypatch.setattr(_C, "choose_qparams", choose_qparams)
    octavo.numpy.quantize(x, granularity=granularity)
    assert seen == [True]


@pytest.mark.parametrize(
    "array", [np.zeros((2, 2)), np.zeros((2, 2), ">f4"), np.zeros((4, 2), "f4").T, [[1.0]]]
)
def test_the_module_converts_nothing_silently(array):
    with pytest.raises(TypeError):
        _C.choose_qparams(array, -127, 127, True)


def test_the_gil_is_released():
    """A thread that only needs the GIL gets it during the call; nothing else here would hand it over."""
    a, b = np.ones((300, 4096), np.int8), np.ones((4096, 300), np.int8)
    go, ran = threading.Event(), []
    thread = threading.Thread(target=lambda: (go.wait(), ran.append(True)))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        go.set()
        _C.int8_mm(a, b)
        assert ran == [True]
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize(
    "error, text, call",
    [
        (TypeError, "x is float64", lambda: octavo.numpy.quantize(np.zeros((2, 2)))),
        (TypeError, "x is byte-swapped float32", lambda: octavo.numpy.quantize(np.zeros((2, 2), ">f4"))),
        (TypeError, "octavo.quantize", lambda: octavo.numpy.quantize(torch.zeros(2, 2))),
        (TypeError, "int8, uint8, int16", lambda: octavo.numpy.quantize(random_array(2, 2), dtype=np.int32)),
        (TypeError, "is byte-swapped int16", lambda: octavo.numpy.quantize(random_array(2, 2), dtype=">i2")),
        (
            TypeError,
            "granularity",
            lambda: octavo.numpy.quantize(random_array(2, 2), granularity="per_token"),
        ),
        (ValueError, "row 0", lambda: octavo.numpy.quantize(np.float32([[np.nan]]))),
        (ValueError, "axis", lambda: octavo.numpy.quantize(random_array(2, 2), granularity=PerChannel(2))),
        (TypeError, "QuantizedArray", lambda: octavo.numpy.dequantize(np.zeros(3))),
        (
            TypeError,
            "b is ",
            lambda: octavo.numpy.int8_mm(np.ones((1, 1), np.int8), np.ones((1, 1), np.uint8)),
        ),
        (
            ValueError,
            "equal",
            lambda: octavo.numpy.int8_mm(np.ones((1, 2), np.int8), np.ones((1, 2), np.int8)),
        ),
        (
            ValueError,
            "dimensions",
            lambda: octavo.numpy.int8_mm(np.ones(2, np.int8), np.ones((1, 2), np.int8)),
        ),
    ],
)
def test_bad_input_is_named(error, text, call):
    with pytest.raises(error, match=text):
        call()


# --- kinds of arrays ------------------------------------------------------------------------------------------------


class WithUnit(np.ndarray):
    """As packages make them that give numbers a unit."""


MASKED = np.ma.masked_array(np.ones((2, 3), np.float32), np.eye(2, 3, dtype=bool))


@pytest.mark.parametrize("function", [octavo.numpy.quantize, lambda x: octavo.numpy.int8_mm(x, x)])
@pytest.mark.parametrize("dtype", ["f4", "i1"])
def test_arrays_that_mean_more_than_their_values_are_refused_with_the_remedy(function, dtype):
    """The values under a mask would set the scale, and a unit would be lost."""
    with pytest.raises(TypeError, match=r"is a masked array.*\.filled\(0\).*\.compressed\(\)"):
        function(MASKED.astype(dtype))
    with pytest.raises(TypeError, match=r"is a WithUnit.*np\.asarray"):
        function(np.ones((2, 3), dtype).view(WithUnit))


@pytest.mark.parametrize(
    "dtype", ["f2", "f8", "g", "c8", "i4", "O", "M8[s]", "m8[s]", "?", "U3", [("a", "f4")]]
)
def test_other_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match="x is .*, accepted: float32; use x.astype"):
        octavo.numpy.quantize(np.zeros((2, 3), dtype))


def test_a_matrix_and_a_mapped_file_are_their_values(tmp_path):
    x = random_array(4, 8)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    for granularity in GRANULARITIES:
        expected = octavo.numpy.quantize(x, granularity=granularity)
        for array in (mapped, np.asmatrix(x)):
            q = octavo.numpy.quantize(array, granularity=granularity)
            np.testing.assert_array_equal(q.codes, expected.codes, strict=True)
            np.testing.assert_array_equal(q.dequantize(), expected.dequantize(), strict=True)
            by_hand = octavo.numpy.QuantizedArray(np.asmatrix(q.codes), q.scale, q.zero_point, granularity)
            np.testing.assert_array_equal(by_hand.dequantize(), expected.dequantize(), strict=True)


def test_an_array_without_axes_is_one_value():
    q = octavo.numpy.quantize(np.array(-2.0, np.float32))
    assert (q.shape, q.codes.item(), q.dequantize().item()) == ((), -127, -2.0)


PARTS = {
    "codes": np.ones((2, 3), np.int8),
    "scale": np.ones(2, np.float32),
    "zero_point": np.zeros(2, np.int32),
    "granularity": PerToken(),
}


@pytest.mark.parametrize(
    "error, text, change",
    [
        (TypeError, "codes is int32, accepted: int8", {"codes": PARTS["codes"].astype(np.int32)}),
        (TypeError, "codes is a masked array", {"codes": MASKED.astype(np.int8)}),
        (TypeError, "codes is a list", {"codes": [[1]]}),
        (TypeError, "scale is float64, accepted: float32", {"scale": np.ones(2)}),
        (TypeError, "scale is byte-swapped float32", {"scale": np.ones(2, ">f4")}),
        (TypeError, "zero_point is int64, accepted: int32", {"zero_point": np.zeros(2, np.int64)}),
        (TypeError, "granularity is 'token'", {"granularity": "token"}),
        (ValueError, r"scale has shape \(3,\), .* need \(2,\)", {"scale": np.ones(3, np.float32)}),
        (ValueError, r"zero_point has shape \(\), ", {"zero_point": np.zeros((), np.int32)}),
        (ValueError, "scale has shape", {"granularity": PerTensor()}),
    ],
)
def test_a_quantized_array_made_by_hand_is_checked(error, text, change):
    octavo.numpy.QuantizedArray(**PARTS).dequantize()
    with pytest.raises(error, match=f"QuantizedArray: {text}"):
        octavo.numpy.QuantizedArray(**PARTS | change)
