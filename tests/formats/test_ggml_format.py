# SPDX-License-Identifier: Apache-2.0
"""Layers of GGML blocks: rows as files have them, what is refused, products, packed and canonical forms, training."""

import copy

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from torch import nn

import octavo
from octavo import ops
from octavo.formats import BLOCK_TYPES, GGML, fallback_type
from octavo.nn import QuantLinear
from octavo.tensors.fake_quantize import fake_quantize_per_token

TYPES = list(BLOCK_TYPES)
every_type = pytest.mark.parametrize("type", TYPES)
GROWS = {"TQ1_0", "Q1_0"}  # into 2 bits for each weight


def linear(k: int = 512, n: int = 21) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n)


def blocks_of(layer: QuantLinear) -> torch.Tensor:
    return layer.canonical_tensors()["weight_blocks"]


# --- the product ----------------------------------------------------------------------------------------------------


@every_type
def test_a_layer_multiplies_what_its_blocks_are_worth(type, isa):
    x = torch.randn(7, 512)
    layer = octavo.quantized(linear(), octavo.GGML(type))
    read = fake_quantize_per_token(x, True, 32).double()
    weight, bias = layer.dequantize().double(), layer.bias.double()
    bound = (read.abs() @ weight.abs().T + bias.abs()) * (4 * (512 // 16 + 1) + 8) * 2**-24
    # Minima, and steps of codes before the offset is taken from them, are larger than the weights that they make.
    bound += read.abs().sum(1, keepdim=True) * weight.abs().max() * 2**-18
    assert_within(layer(x), nn.functional.linear(read, weight, bias), bound)


@every_type
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_same_bits_on_every_isa_and_in_every_batch(type, activations, isa):
    layer = octavo.quantized(linear(768, 40), octavo.GGML(type, activations=activations))
    x = torch.randn(11, 768)
    x[4, 5] = torch.nan
    with octavo.use_isa("scalar"):
        expected = layer(x)
    assert expected[4].isnan().all() and expected[:4].isfinite().all()
    for rows in (1, 2, 3, 4, 11):
        assert_bits_equal(torch.cat([layer(part) for part in x.split(rows)]), expected)


def test_sixteen_bits_of_activations_are_nearly_exact():
    x = torch.randn(5, 512)
    for type in TYPES:
        layer = octavo.quantized(linear(), octavo.GGML(type, activations="int16"))
        exact = nn.functional.linear(x, layer.dequantize(), layer.bias)
        assert (layer(x) - exact).norm() <= 1e-4 * exact.norm(), type


# --- the forms ------------------------------------------------------------------------------------------------------


@every_type
def test_blocks_come_back_from_a_packed_layer(type):
    layer = octavo.quantized(linear(), octavo.GGML(type))
    expected = ops.ggml_quantize(linear().weight.detach(), type)
    assert layer.is_packed and torch.equal(blocks_of(layer), expected)
    assert torch.equal(layer.state_dict()["weight_blocks"].as_subclass(torch.Tensor), expected)
    assert torch.equal(copy.deepcopy(layer).unpack_().weight_blocks, expected)
    again = QuantLinear.from_tensors({"weight_blocks": expected}, layer.bias, octavo.GGML(type))
    assert (again.out_features, again.in_features) == (21, 512)
    x = torch.randn(3, 512)
    assert_bits_equal(again(x), layer(x))


@every_type
def test_rows_are_permuted_by_indexing(type):
    layer = octavo.quantized(linear(), octavo.GGML(type))
    order = torch.randperm(21)
    other = QuantLinear.from_tensors(
        {"weight_blocks": blocks_of(layer)[order]}, layer.bias[order], octavo.GGML(type)
    )
    x = torch.randn(3, 512)
    assert_bits_equal(other(x), layer(x)[:, order])


@every_type
def test_a_packed_layer_is_hardly_larger_than_its_blocks(type):
    layer = octavo.quantized(linear(1024, 64), octavo.GGML(type))
    in_file = blocks_of(layer).nbytes
    in_memory = sum(buffer.nbytes for buffer in layer.buffers())
    assert in_memory <= in_file * 1.05 + 4 * 64 or type in GROWS


@every_type
def test_saving_and_loading_keep_every_bit(type, tmp_path):
    m = nn.Sequential(linear(), nn.ReLU())
    octavo.quantize_(m, octavo.GGML(type))
    octavo.save(m, tmp_path / "saved")
    loaded = octavo.load(tmp_path / "saved", nn.Sequential(linear(), nn.ReLU()))
    x = torch.randn(3, 512)
    assert torch.equal(blocks_of(loaded[0]), blocks_of(m[0]))
    assert_bits_equal(loaded(x), m(x))


def test_names_and_schemes():
    assert octavo.schemes.by_name("q4_k") == octavo.GGML("Q4_K") == octavo.GGML("q4-k")
    assert octavo.schemes.by_name("q8_0:activations=int16") == octavo.GGML("Q8_0", activations="int16")
    scheme = octavo.GGML("IQ4_NL")
    assert octavo.schemes.from_dict(scheme.to_dict()) == scheme and scheme.weights == GGML("IQ4_NL")
    with pytest.raises(ValueError, match="type is 'Q4_X', accepted are Q4_0, "):
        octavo.GGML("Q4_X")
    with pytest.raises(TypeError, match="type must be a name such as 'Q4_K', got 4"):
        octavo.GGML(4)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_rows_that_are_no_whole_blocks_keep_their_layer():
    m = nn.Sequential(nn.Linear(512, 64), nn.Linear(64, 40), nn.Linear(40, 3))
    report = octavo.quantize_(m, octavo.GGML("Q4_K"))
    reasons = [row.reason for row in report.rows]
    assert type(m[1]) is type(m[2]) is nn.Linear
    assert "llama.cpp takes Q5_0 there" in reasons[1] and "takes rows of any length" in reasons[2]


def test_fallbacks_are_those_of_llama_cpp():
    assert fallback_type("q4_k".upper(), 512) == "Q4_K"
    found = [fallback_type(type, 64) for type in ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "IQ4_XS", "TQ2_0")]
    assert found == ["Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_NL", "Q4_0"]
    assert {fallback_type(type, 40) for type in TYPES} == {"F16"}


@every_type
def test_scales_that_are_no_numbers_are_refused(type):
    kind = BLOCK_TYPES[type]
    blocks = ops.ggml_quantize(torch.randn(4, 512), type)
    assert not GGML(type).reason_for_blocks(blocks)
    parts = octavo.reference.ggml_blocks.disassembled(kind, blocks.reshape(-1, kind.size))
    for bad in (torch.nan, torch.inf, -torch.inf):
        for column in range(kind.halves):
            halves = parts.halves.clone()
            halves[-1, column] = bad
            broken = octavo.reference.ggml_blocks.assembled(kind, parts._replace(halves=halves))
            assert GGML(type).reason_for_blocks(broken) == "scales that are NaN or Inf"
    if type == "MXFP4":
        blocks[0, 0] = 255
        assert "255 as an exponent" in GGML(type).reason_for_blocks(blocks)


def test_bytes_of_tq1_0_that_no_writer_makes_are_refused():
    blocks = ops.ggml_quantize(torch.randn(1, 256), "TQ1_0")
    for at, count in ((3, 13), (50, 175)):  # five digits, 243 numbers; four digits, 81 of them
        refused = 0
        for byte in range(256):
            blocks[0, at] = byte
            is_kept = torch.equal(
                ops.ggml_unpack(*ops.ggml_pack(blocks, "TQ1_0", 256), "TQ1_0", 1, 256), blocks
            )
            assert bool(GGML("TQ1_0").reason_for_blocks(blocks)) != is_kept
            refused += not is_kept
        assert refused == count
        blocks[0, at] = 0


@pytest.mark.parametrize("type", [type for type in TYPES if type != "MXFP4"])
def test_weights_that_would_become_nothing_but_zeros_are_refused(type):
    layer = linear()
    with torch.no_grad():
        layer.weight.mul_(1e-12)
    with pytest.raises(ValueError, match=r"all would become 0; scale the weight up"):
        octavo.quantized(layer, octavo.GGML(type))
    octavo.quantized(layer, octavo.GGML("MXFP4"))
    with torch.no_grad():
        layer.weight.zero_()
    assert not octavo.quantized(layer, octavo.GGML(type)).dequantize().any()


@pytest.mark.parametrize("value, text", [(torch.nan, "NaN or Inf"), (1e30, "65504")])
def test_weights_that_no_block_holds_leave_the_model_as_it_was(value, text):
    m = nn.Sequential(linear())
    with torch.no_grad():
        m[0].weight[2, 3] = value
    with pytest.raises(ValueError, match=text):
        octavo.quantize_(m, octavo.GGML("Q4_K"))
    assert type(m[0]) is nn.Linear


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["Q4_K", "Q8_0", "MXFP4"])
def test_prepared_layers_compute_what_frozen_ones_do_and_can_be_trained(type):
    m = nn.Sequential(linear())
    octavo.prepare_(m, octavo.GGML(type))
    x = torch.randn(3, 512)
    y = m(x)
    y.sum().backward()
    assert m[0].weight.grad is not None and m[0].weight.grad.isfinite().all()
    octavo.freeze_(m)
    assert_within(m(x), y.detach(), 1e-5 * (1 + y.detach().abs()))
    with pytest.raises(ValueError, match="lie in blocks with the codes and cannot be learned"):
        octavo.prepare_(nn.Sequential(linear()), octavo.GGML(type), learn_scales=True)


def test_gradients_reach_the_input():
    layer = octavo.quantized(linear(), octavo.GGML("Q6_K"))
    x = torch.randn(3, 512, requires_grad=True)
    layer(x).sum().backward()
    assert_within(x.grad, layer.dequantize().sum(0).expand(3, 512), 1e-4)


def test_graphs_have_the_same_bits():
    m, x = nn.Sequential(linear()), torch.randn(3, 512)
    octavo.quantize_(m, octavo.GGML("Q4_K"))
    assert_bits_equal(torch.export.export(m, (x,)).module()(x), m(x))
    assert_bits_equal(torch.compile(m, fullgraph=True, backend="eager")(x), m(x))
