# SPDX-License-Identifier: Apache-2.0
"""Blocks of GGML: bytes are those of ggml, values those of gguf-py, and packing loses no bit of any block.

tests/data/ggml_blocks.npz holds what ggml 0.25 made, compiled without fma: sixteen rows of 512 floats, their blocks of
every type, with and without importance, and the values of three of these rows.
"""

from functools import lru_cache
from pathlib import Path

import numpy
import pytest
import torch
from operator_arguments import FLOATS, assert_same_bits

from octavo import cpu_info, ops, reference, use_isa
from octavo.formats import BLOCK_TYPES

TYPES = list(BLOCK_TYPES)
every_type = pytest.mark.parametrize("type", TYPES)
VALUED = [0, 4, 10]  # the rows whose values are there


@lru_cache
def golden() -> dict[str, torch.Tensor]:
    with numpy.load(Path(__file__).parents[1] / "data/ggml_blocks.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "rows"}


def any_blocks(type: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Random bytes; of TQ1_0 those that stand for digits."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (n, BLOCK_TYPES[type].row_bytes(k)), dtype=torch.uint8, generator=generator)
    return as_written(type, blocks, k)


def as_written(type: str, blocks: torch.Tensor, k: int) -> torch.Tensor:
    return (
        ops.ggml_unpack(*ops.ggml_pack(blocks, type, k), type, len(blocks), k) if type == "TQ1_0" else blocks
    )


# --- from floats ----------------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("with_importance", [False, True])
def test_bytes_are_those_of_ggml(type, with_importance):
    importance = golden()["importance"] if with_importance else None
    expected = golden().get(f"{type}/importance" if with_importance else type, golden()[type])
    overflows = scales_overflow(type, expected)
    x = golden()["x"][~overflows]
    assert len(x) >= 15
    for module in (ops, reference):
        assert torch.equal(module.ggml_quantize(x, type, importance), expected[~overflows]), module.__name__
    for row in golden()["x"][overflows]:
        with pytest.raises(ValueError, match=r"65504, which float16 and so \w+ do not have"):
            ops.ggml_quantize(row[None], type, importance)


def scales_overflow(type: str, blocks: torch.Tensor) -> torch.Tensor:
    """Which rows have float16 scales that are no numbers."""
    kind = BLOCK_TYPES[type]
    parts = reference.ggml_blocks.disassembled(kind, blocks.reshape(-1, kind.size))
    return ~parts.halves.isfinite().all(1).reshape(len(blocks), -1).all(1)


@every_type
def test_reference_and_kernel_agree_on_weights_of_any_size(type):
    torch.manual_seed(3)
    x = torch.randn(24, 512) * torch.logspace(-6, 3, 24)[:, None]
    x[5, :40], x[6], x[7] = 0, 0.25, x[7].abs()
    importance = torch.rand(512)
    assert torch.equal(ops.ggml_quantize(x, type), reference.ggml_quantize(x, type))
    assert torch.equal(ops.ggml_quantize(x, type, importance), reference.ggml_quantize(x, type, importance))


@every_type
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_halves_are_encoded_as_the_floats_that_they_are(type, dtype):
    x = torch.randn(5, 512).to(dtype)
    assert torch.equal(ops.ggml_quantize(x, type), ops.ggml_quantize(x.float(), type))
    spread = torch.randn(5, 1024).to(dtype)[:, ::2]
    assert torch.equal(ops.ggml_quantize(spread, type), ops.ggml_quantize(spread.contiguous(), type))


@every_type
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused_wherever_they_are(type, bad):
    for row, column in ((0, 0), (3, 511), (1, 300)):
        x = torch.randn(4, 512)
        x[row, column] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            ops.ggml_quantize(x, type)


@every_type
def test_encoding_what_was_decoded_changes_little(type):
    """Not beyond what a type does to the floats in the first place."""
    x = torch.randn(8, 512)
    once = ops.ggml_dequantize(ops.ggml_quantize(x, type), type, 512)
    twice = ops.ggml_dequantize(ops.ggml_quantize(once, type), type, 512)
    assert (twice - once).norm() <= (once - x).norm()


# --- to floats ------------------------------------------------------------------------------------------------------


@every_type
def test_values_are_those_of_ggml(type):
    blocks = golden()[type][VALUED]
    for module in (ops, reference):
        assert_same_bits(module.ggml_dequantize(blocks, type, 512), golden()[f"{type}/values"])


@every_type
def test_values_of_any_blocks_are_those_of_gguf(type):
    gguf = pytest.importorskip("gguf")
    known = getattr(gguf.GGMLQuantizationType, type, None)
    if type in ("Q1_0", "Q2_0"):
        pytest.skip(f"gguf-py does not decode {type}")
    blocks = any_blocks(type, 64, 512)
    if type == "MXFP4":
        blocks[blocks == 255] = 254  # as an exponent it is NaN, which gguf-py reads as 2^127
    with numpy.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(blocks.numpy(), known))
    assert_same_bits(ops.ggml_dequantize(blocks, type, 512), expected)


@every_type
@pytest.mark.parametrize("dtype", FLOATS)
def test_reference_and_kernel_decode_alike(type, dtype):
    blocks = any_blocks(type, 37, 512)
    actual = ops.ggml_dequantize(blocks, type, 512, dtype)
    assert_same_bits(actual, reference.ggml_dequantize(blocks, type, 512, dtype))


# --- packed ---------------------------------------------------------------------------------------------------------


@every_type
@pytest.mark.parametrize("n, blocks_in_row", [(1, 1), (16, 3), (37, 2), (0, 1), (3, 0)])
def test_packing_keeps_every_bit_and_is_that_of_the_reference(type, n, blocks_in_row):
    k = BLOCK_TYPES[type].elements * blocks_in_row
    blocks = any_blocks(type, n, k, seed=n)
    packed = ops.ggml_pack(blocks, type, k)
    for isa in cpu_info().isas:
        with use_isa(isa):
            assert torch.equal(ops.ggml_unpack(*packed, type, n, k), blocks)
    if blocks.numel():  # the reference is written for what is there
        for actual, expected in zip(packed, reference.ggml_pack(blocks, type, k), strict=True):
            assert actual.shape == expected.shape and torch.equal(actual, expected)
        assert torch.equal(reference.ggml_unpack(*packed, type, n, k), blocks)


@every_type
def test_every_bit_of_a_block_comes_back(type):
    """One bit after the other, alone and missing."""
    kind = BLOCK_TYPES[type]
    bits = torch.eye(8 * kind.size, dtype=torch.uint8).reshape(-1, kind.size, 8)
    single = (bits << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)
    for blocks in (single, 255 - single):
        blocks = as_written(type, blocks, kind.elements)
        packed = ops.ggml_pack(blocks, type, kind.elements)
        assert torch.equal(ops.ggml_unpack(*packed, type, len(blocks), kind.elements), blocks)


@every_type
def test_every_float16_of_a_scale_comes_back(type):
    kind = BLOCK_TYPES[type]
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    blocks = any_blocks(type, len(patterns), kind.elements)
    parts = reference.ggml_blocks.disassembled(kind, blocks)
    halves = patterns[:, None].expand(-1, kind.halves)
    blocks = reference.ggml_blocks.assembled(kind, parts._replace(halves=halves.contiguous()))
    packed = ops.ggml_pack(blocks, type, kind.elements)
    assert torch.equal(ops.ggml_unpack(*packed, type, len(blocks), kind.elements), blocks)


@every_type
def test_the_packed_form_is_worth_what_the_blocks_are(type):
    import octavo

    blocks = ops.ggml_quantize(torch.randn(37, 512), type)
    layer = octavo.nn.QuantLinear.from_tensors({"weight_blocks": blocks}, None, octavo.GGML(type)).pack_()
    weight = layer.scheme.weights.group_weight(*layer.scheme.weights.operands_of(layer))
    for actual in (ops.dequantize_groups(weight, 512), reference.dequantize_groups(weight, 512)):
        assert torch.equal(actual, ops.ggml_dequantize(blocks, type, 512))  # -0 is 0 here


def test_an_unknown_type_is_refused_by_name():
    with pytest.raises(ValueError, match="type is 'Q9_K', accepted are Q4_0, "):
        ops.ggml_quantize(torch.randn(2, 256), "Q9_K")
