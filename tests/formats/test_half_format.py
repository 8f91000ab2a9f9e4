# SPDX-License-Identifier: Apache-2.0
"""The format Half: weights keep their bits in memory and in files, and what a 16-bit float cannot hold is refused."""

import pytest
import torch
from asserts import assert_bits_equal
from torch import nn

import octavo
from octavo.formats import Half
from octavo.nn import QuantLinear

HALVES = [torch.bfloat16, torch.float16]
every_half = pytest.mark.parametrize("half", HALVES, ids=str)
X = torch.linspace(-2, 2, 5 * 21).reshape(5, 21).sin() * 2


def linear(dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(21, 6).to(dtype)


def frozen(dtype=torch.float32, to=None) -> QuantLinear:
    return octavo.quantized(linear(dtype), octavo.HalfWeightOnly(to))


@every_half
def test_a_half_weight_keeps_every_bit(half):
    layer, weight = frozen(half), linear(half).weight.detach()
    assert_bits_equal(layer.state_dict()["weight"], weight)
    assert_bits_equal(layer.codes(), weight)
    assert_bits_equal(layer.dequantize(), weight.float())
    assert_bits_equal(layer.weight.clone(), weight)
    assert layer.is_packed and layer.packed.shape == (1, 21, 16)


@every_half
def test_memory_is_two_bytes_for_a_weight(half):
    m = nn.Sequential(nn.Linear(64, 32, bias=False).to(half))
    report = octavo.quantize_(m, octavo.HalfWeightOnly())
    assert m[0].packed.nbytes == 2 * 64 * 32
    assert (report.rows[0].bytes_before, report.rows[0].bytes_after) == (4096, 4096)
    q = m[0].scheme.weights.read(m[0].canonical_tensors(), 32, 64)
    assert q.nbytes == 4096 and f"values of {str(half)[6:]}" in repr(q) and q.plot(q.dequantize())


def test_a_float32_weight_is_rounded_to_the_nearest_bfloat16_or_float16():
    weight = linear().weight.detach()
    assert_bits_equal(frozen().dequantize(), weight.bfloat16().float())
    assert_bits_equal(frozen(to="float16").dequantize(), weight.half().float())
    assert_bits_equal(frozen(torch.bfloat16, to="float16").codes(), weight.bfloat16().half())


def test_what_a_16_bit_float_cannot_hold_is_refused_before_anything_changes():
    m = nn.Sequential(linear(), linear())
    with torch.no_grad():
        m[1].weight[2, 3] = -7e4
    before = list(m)
    with pytest.raises(
        ValueError, match=r"1\.weight: the weight holds 70000, more than float16 can.*bfloat16"
    ):
        octavo.quantize_(m, octavo.HalfWeightOnly(dtype="float16"))
    assert list(m) == before
    octavo.quantize_(m, octavo.HalfWeightOnly())
    assert m[1].dequantize()[2, 3] == torch.tensor(-7e4).bfloat16()
    with torch.no_grad():
        (large := linear()).weight[0, 0] = 3.4e38
    with pytest.raises(ValueError, match="more than bfloat16 can.*keep the layer in float32"):
        octavo.quantized(large, octavo.HalfWeightOnly())
    prepared = octavo.HalfWeightOnly(dtype="float16").prepare_linear(before[1])
    with pytest.raises(ValueError, match="more than float16 can"):
        prepared(X)
    for value in (torch.nan, torch.inf):
        with torch.no_grad():
            large.weight[0, 0] = value
        with pytest.raises(ValueError, match="NaN or Inf"):
            octavo.quantized(large, octavo.HalfWeightOnly())


def test_other_dtypes_are_refused():
    for make in (Half, octavo.HalfWeightOnly):
        for dtype in ("float32", "int8", torch.float16):
            with pytest.raises(ValueError, match="must be 'bfloat16' or 'float16'"):
                make(dtype)


@every_half
def test_a_layer_takes_weights_of_its_own_dtype_only(half):
    layer = frozen(half)
    expected = layer(X)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for assign in (False, True):
        other = octavo.quantized(nn.Linear(21, 6).to(half), octavo.HalfWeightOnly())
        other.load_state_dict(state, assign=assign)
        assert other.is_packed
        assert_bits_equal(other(X), expected)
        for dtype in (torch.float32, HALVES[half is HALVES[0]]):
            wrong = {**state, "weight": state["weight"].to(dtype)}
            with pytest.raises(RuntimeError, match="QuantLinear needs"):
                other.load_state_dict(wrong, assign=assign)
        assert_bits_equal(other(X), expected)


def test_its_state_dict_is_one_that_a_float_layer_loads():
    """The values are the weights, and not codes that mean nothing without a scale."""
    other = nn.Linear(21, 6).bfloat16()
    other.load_state_dict(frozen(torch.bfloat16).state_dict())
    assert_bits_equal(other.weight, linear(torch.bfloat16).weight)


def test_casts_of_the_layer_leave_its_weight_alone():
    layer = frozen(torch.bfloat16)
    for dtype in (torch.float16, torch.float32, torch.float64):
        layer.to(dtype)
        assert_bits_equal(layer.codes(), linear(torch.bfloat16).weight)
    layer.to(torch.float16).unpack_()
    assert layer._parameters["weight"].dtype == torch.bfloat16
    assert layer(X.half()).dtype == torch.float16


def test_other_activations_multiply_it_as_floats():
    layer = octavo.quantized(linear(torch.bfloat16), octavo.Int8WeightOnly(weights=Half()))
    expected = nn.functional.linear(X, layer.dequantize(), linear(torch.bfloat16).bias.float())
    assert_bits_equal(layer(X), expected)
