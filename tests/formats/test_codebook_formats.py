# SPDX-License-Identifier: Apache-2.0
"""Codebook formats: the bytes of bitsandbytes and ggml, published errors, odd shapes, extreme weights, files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from asserts import assert_bits_equal
from torch import nn

import octavo
from octavo.formats import FP4, MXFP4, NF4, NVFP4

DATA = Path(__file__).parents[1] / "data"
FORMATS = [NF4(), NF4(64, False), NF4(16), FP4(), FP4(128, False), MXFP4(), NVFP4()]


def linear(k: int = 77, n: int = 21) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n)


def stored(format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return format.store(format.qparams(weight).quantize(weight))


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """torch.equal, which torch does not have for 8-bit floats."""
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


# --- bytes of other programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [NF4, FP4])
def test_bytes_and_values_are_those_of_bitsandbytes(kind):
    """Its blocks of 64 run through the flattened weight: an odd one is a row."""
    golden, name = np.load(DATA / "bitsandbytes_4bit.npz"), kind.__name__.lower()
    cases = {path.split("/")[1] for path in golden.files if path.startswith(name)}
    assert len(cases) == 5
    for case in sorted(cases):
        x = torch.from_numpy(golden[f"in/{case}"])
        x = x.reshape(1, -1) if case.startswith("odd") else x.reshape(-1, 64)
        for double_quant in (False, True):
            format, found = kind(64, double_quant), {}
            for part in ("packed", "absmax", "absmax2", "offset", "deq"):
                path = f"{name}/{case}/{int(double_quant)}/{part}"
                if path in golden.files:
                    found[part] = torch.from_numpy(golden[path])
            tensors = stored(format, x)
            assert torch.equal(tensors["weight_packed"].reshape(-1), found["packed"]), case
            assert torch.equal(tensors["weight_absmax"].reshape(-1), found["absmax"]), case
            if double_quant:
                assert torch.equal(tensors["weight_nested_absmax"], found["absmax2"]), case
                assert torch.equal(tensors["weight_nested_offset"], found["offset"]), case
            if "deq" in found:
                assert_bits_equal(format.dequantize(tensors, *x.shape).reshape(-1), found["deq"])


def halves(blocks: torch.Tensor) -> torch.Tensor:
    """The codes of ggml's blocks: the low halves of all bytes, then the high ones."""
    return torch.cat([blocks & 15, blocks >> 4], dim=-1)


def test_codes_scales_and_values_are_those_of_ggml():
    golden = {name: torch.from_numpy(array) for name, array in np.load(DATA / "ggml_4bit_floats.npz").items()}
    x = golden["x"]
    n, k = x.shape
    q = MXFP4().qparams(x).quantize(x)
    blocks = golden["mxfp4"].reshape(n, k // 32, 17)
    assert torch.equal(q.codes, halves(blocks[..., 1:]).reshape(n, k))
    assert torch.equal(stored(MXFP4(), x)["weight_scale"], blocks[..., 0])
    assert_bits_equal(q.dequantize() + 0.0, golden["mxfp4_deq"] + 0.0)

    # ggml has no scale for all of a tensor: a row with 6 * 448 in it makes ours 1.
    x = torch.cat([x, torch.full((1, k), 6 * 448.0)])
    tensors = stored(NVFP4(), x)
    assert tensors["weight_global_scale"].tolist() == [1.0]
    blocks = golden["nvfp4"].reshape(n, k // 64, 36)
    scales, codes = blocks[..., :4].reshape(n, -1), halves(blocks[..., 4:].reshape(n, -1, 4, 8))
    assert torch.equal(tensors["weight_scale"][:-1].view(torch.uint8), scales)
    q = NVFP4().read(tensors, n + 1, k)
    assert torch.equal(q.codes[:-1], codes.reshape(n, k))
    assert_bits_equal(q.dequantize()[:-1] + 0.0, golden["nvfp4_deq"] + 0.0)


def test_layouts_are_those_of_the_files():
    x = torch.tensor([[1.0, -1.0, 0.5, 0.0, 6.0]])
    assert stored(NF4(16, False), x)["weight_packed"].tolist() == [[0x95, 0x87, 0xF7]]
    assert stored(MXFP4(), x)["weight_packed"].tolist() == [[0xA2, 0x01, 0x07]]


# --- errors ---------------------------------------------------------------------------------------------------------


def sqnr(x: torch.Tensor, format) -> float:
    error = format.qparams(x).quantize(x).dequantize() - x
    return 10 * math.log10(x.square().sum() / error.square().sum())


def test_errors_are_the_published_ones():
    """bitsandbytes' tests give means over many draws of 2^20 values; a draw's own is within four deviations of them."""
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    for format, expected in ((NF4(), 0.072798), (NF4(64, False), 0.072798), (FP4(), 0.096543)):
        error = (format.qparams(x).quantize(x).dequantize() - x).abs().mean().item()
        assert abs(error - expected) <= 4 * 0.000074, format


def test_signal_to_noise_is_that_of_the_table_for_three_distributions():
    torch.manual_seed(0)
    uniform = torch.rand(1024, 1024, dtype=torch.float64) - 0.5
    laplace = -(uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    heavy = torch.distributions.StudentT(5.0).sample((1024, 1024))
    expected = {
        NF4(64, False): (20.73, 19.69, 19.61),
        FP4(64, False): (18.27, 16.45, 16.26),
        MXFP4(): (18.79, 17.95, 17.99),
        NVFP4(): (20.44, 20.66, 20.69),
    }
    for format, values in expected.items():
        for x, value in zip((torch.randn(1024, 1024), laplace, heavy), values, strict=True):
            assert abs(sqnr(x, format) - value) <= 0.05, (format, value, sqnr(x, format))


# --- shapes and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_what_is_stored_reads_back(format):
    for n, k in ((1, 1), (3, 16), (5, 77), (17, 300)):
        weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k))
        q = format.qparams(weight).quantize(weight)
        tensors = format.store(q)
        for name, form in format.tensors(n, k).items():
            assert (tuple(tensors[name].shape), tensors[name].dtype) == (form.shape, form.dtype), name
            assert form.check is None or not form.check(tensors[name])
        again = format.read(tensors, n, k)
        assert torch.equal(again.codes, q.codes)
        assert_bits_equal(again.dequantize(), q.dequantize())
        assert all(same(tensors[name], tensor) for name, tensor in format.store(again).items())
        assert again.nbytes == n * k + sum(
            tensors[name].nbytes for name in tensors if name != "weight_packed"
        )


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_extreme_weights_become_numbers_near_them_or_an_error(format):
    """The largest |weight| of a block, or where a scale is shared or quantized of all, bounds the error."""
    base = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    shared = format in (NF4(), NF4(16), FP4(), NVFP4())
    for factor in (0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e35, *([] if shared else [5e37])):
        weight = base * factor
        back = format.qparams(weight).quantize(weight).dequantize()
        rows = format.granularity.to_rows(weight)
        largest = weight.abs().max() if shared else rows.abs().amax(1, keepdim=True)
        # 1/3 is half the widest step of the tables, which e2m1 has between 4 and 6, or beyond 6.
        assert ((format.granularity.to_rows(back) - rows).abs() <= largest / 3 + 2e-38).all(), factor
    mixed = torch.cat([base, base * 1e-30, base * 0.0])
    back = format.qparams(mixed).quantize(mixed).dequantize()
    # A byte for a scale is off by 1 / 128 of the largest distance from the mean.
    assert (back[16:] == 0).all() and (
        back[8:16].abs() <= (base.abs().max() / 128 if shared else 1e-28)
    ).all()
    constant = torch.full((2, 128), -0.3)
    error = (format.qparams(constant).quantize(constant).dequantize() + 0.3).abs()
    assert (error <= (0.3 / 4 if isinstance(format, MXFP4) else 0.3 / 16)).all()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            format.qparams(base.index_fill(1, torch.tensor([5]), bad))


def test_a_mean_beyond_float32_is_refused():
    with pytest.raises(ValueError, match="use double_quant=False"):
        NF4().qparams(torch.full((64, 64), 3e38))


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"block_size": 24}, ValueError, "multiple of 16 in 16 .. 4096, got 24"),
        ({"block_size": 8192}, ValueError, "got 8192"),
        ({"block_size": "64"}, TypeError, "block_size must be an int"),
        ({"double_quant": 1}, TypeError, "double_quant must be True or False"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, error, words):
    for kind in (NF4, octavo.FP4):
        with pytest.raises(error, match=words):
            kind(**options)
