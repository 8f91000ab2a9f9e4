# SPDX-License-Identifier: Apache-2.0
"""Codes of 16 bits, for exchange with other programs: the definition of 8 bits, computed by torch."""

import pytest
import torch
from asserts import assert_bits_equal, assert_equal

import octavo
from octavo import PerChannel, PerGroup, PerTensor, PerToken, ops

RANGES = {
    (torch.int16, True): (-32767, 32767),
    (torch.int16, False): (-32768, 32767),
    (torch.uint16, True): (1, 65535),
    (torch.uint16, False): (0, 65535),
}
every_range = pytest.mark.parametrize("dtype, symmetric", RANGES, ids=str)


@every_range
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(4), PerToken()], ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_half_a_step(dtype, symmetric, granularity, of):
    x = torch.randn(5, 10).to(of)
    q = octavo.quantize(x, dtype=dtype, granularity=granularity, symmetric=symmetric)
    assert (q.codes.dtype, q.qparams.dtype, q.shape) == (dtype, dtype, x.shape)
    assert (q.qparams.qmin, q.qparams.qmax) == RANGES[dtype, symmetric]
    assert q.nbytes == 2 * x.numel() + 8 * q.scale.numel()
    # Half a step, and the rounding of 1 / scale, of x / scale and of the product: each 2^-24 of at most 65,535 steps.
    bound = q._spread(q.scale).double() * (0.5 + 3 * 65535 * 2.0**-24)
    assert ((q.dequantize().double() - x.double()).abs() <= bound).all()


@every_range
def test_the_definition_is_that_of_bytes(dtype, symmetric):
    """What QuantizeLinear and DequantizeLinear of ONNX compute: round half to even, clamp, and the line back."""
    qmin, qmax = RANGES[dtype, symmetric]
    zero_point = torch.tensor([(qmin + qmax) // 2], dtype=torch.int32)
    x = torch.tensor([[0.0, 1.0, 3.0, -5.0, 1e9, -1e9, torch.inf, -torch.inf, torch.nan]])
    codes = ops.quantize(x, torch.tensor([2.0]), zero_point, qmin, qmax, dtype)
    expected = zero_point + torch.tensor([[0, 0, 2, -2, 2**20, -(2**20), 2**20, -(2**20), 0]])
    assert_equal(codes.long(), expected.clamp(qmin, qmax).long())
    real = ops.dequantize(codes, torch.tensor([2.0]), zero_point)
    assert_bits_equal(real, 2.0 * (codes.long() - zero_point).float())


@every_range
def test_extremes_come_back_exactly(dtype, symmetric):
    x = torch.tensor([-3.0, 0.0, 3.0])
    q = octavo.quantize(x, dtype=dtype, symmetric=symmetric)
    assert q.dequantize()[1] == 0.0
    if symmetric:
        assert q.codes.long().tolist() == [
            q.qparams.qmin,
            (q.qparams.qmin + q.qparams.qmax) // 2,
            q.qparams.qmax,
        ]


def test_bad_arguments_are_named():
    x, scale, zero_point = torch.randn(3, 5), torch.rand(3), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="qmin and qmax are -32769 and 7"):
        ops.quantize(x, scale, zero_point, -32769, 7, torch.int16)
    with pytest.raises(ValueError, match="scale must be float32 with one value for each of the 3 rows"):
        ops.quantize(x, scale[:2], zero_point, -7, 7, torch.int16)
    with pytest.raises(ValueError, match="zero_point must be int32"):
        ops.dequantize(torch.zeros(3, 5, dtype=torch.uint16), scale, zero_point.long())
    with pytest.raises(TypeError, match="codes are torch.int8, uint8, int16 or uint16"):
        octavo.quantize(x, dtype=torch.int32)
