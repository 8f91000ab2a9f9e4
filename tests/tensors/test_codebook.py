# SPDX-License-Identifier: Apache-2.0
"""Codebooks: nearest values and ties, integers for kernels, gradients, double quantization."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo.tensors.codebook import (
    E2M1_VALUES,
    FP4_VALUES,
    IQ4_NL_VALUES,
    NF4_VALUES,
    codebook_qparams,
)
from octavo.tensors.double_quantization import DYNAMIC_MAP, double_quantize

CODEBOOKS = [NF4_VALUES, FP4_VALUES, E2M1_VALUES, IQ4_NL_VALUES]
NORMALIZED = [NF4_VALUES, FP4_VALUES]  # their largest value is 1


def test_tables_are_those_of_other_programs():
    golden = np.load(Path(__file__).parents[1] / "data/bitsandbytes_4bit.npz")
    assert torch.equal(NF4_VALUES.table, torch.from_numpy(golden["table/nf4"]))
    assert torch.equal(FP4_VALUES.table, torch.from_numpy(golden["table/fp4"]))
    assert torch.equal(DYNAMIC_MAP, torch.from_numpy(golden["table/dynamic"]))
    e2m1 = octavo.dtypes.decode(torch.arange(16), "fp4_e2m1").float()
    assert torch.equal(E2M1_VALUES.table, e2m1) and torch.equal(E2M1_VALUES.table.signbit(), e2m1.signbit())


def test_no_value_is_nearer_than_the_one_that_is_chosen():
    x = torch.cat([torch.linspace(-1.5, 1.5, 20001), torch.tensor([-math.inf, math.inf, 0.0, -0.0])])
    for book in CODEBOOKS:
        scaled = x * book.largest
        chosen = book.lookup(book.nearest(scaled)).double()
        finite = scaled.clamp(-1e30, 1e30).double()[:, None]
        best = (finite - book.table.double()).abs().amin(1)
        # Thresholds are rounded to float32.
        assert ((finite[:, 0] - chosen).abs() <= best + 2**-23 * book.largest).all(), book.name
        assert torch.equal(book.nearest(book.table)[book.table != 0], torch.arange(16)[book.table != 0])
        assert book.nearest(torch.tensor(math.nan)) == book.zero


def test_ties_go_where_the_codebook_says():
    middle = torch.tensor([-5.0, -0.25, 0.25, 5.0])
    assert E2M1_VALUES.lookup(E2M1_VALUES.nearest(middle)).tolist() == [-4.0, 0.0, 0.0, 4.0]
    assert not E2M1_VALUES.lookup(E2M1_VALUES.nearest(middle)).signbit()[1]
    assert IQ4_NL_VALUES.lookup(IQ4_NL_VALUES.nearest(torch.tensor([-4.5, 7.0]))).tolist() == [1.0, 13.0]
    # bitsandbytes' two zeros: 0 itself is code 0, a small positive number code 8.
    assert FP4_VALUES.nearest(torch.tensor([0.0, 1e-3, -1e-3])).tolist() == [0, 8, 0]
    values = NF4_VALUES.table
    exact = (values[1:] + values[:-1]) / 2
    assert torch.equal(NF4_VALUES.nearest(exact), torch.arange(15).to(torch.uint8))


def test_integers_stand_for_the_values_as_nearly_as_the_tables_say():
    for book, error in zip(CODEBOOKS, [0.5 / 63, 1 / 192, 0.0, 0.0], strict=True):
        integers = torch.tensor(book.integers, dtype=torch.float64)
        assert ((integers * book.step - book.table.double()).abs() <= error + 1e-7).all(), book.name
        assert -64 <= min(book.integers) and max(book.integers) <= 63 or book is IQ4_NL_VALUES
    exact = torch.tensor(FP4_VALUES.integers) != 0
    assert torch.equal(FP4_VALUES.table[exact], (torch.tensor(FP4_VALUES.integers) / 12)[exact])
    assert {1.0, -1.0} <= {integer * NF4_VALUES.step for integer in NF4_VALUES.integers}


# --- qparams --------------------------------------------------------------------------------------------------------


def quantized(book, x: torch.Tensor, block: int = 16) -> octavo.QuantizedTensor:
    granularity = octavo.PerGroup(block)
    absmax = granularity.to_rows(x).abs().amax(1).reshape(granularity.qparams_shape(x.shape))
    return codebook_qparams(book, absmax / book.largest, granularity).quantize(x)


def test_a_codebook_is_a_quantized_tensor_like_any_other():
    pytest.importorskip("matplotlib")
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(0))
    q = quantized(NF4_VALUES, x)
    assert q.codes.dtype == torch.uint8 and q.shape == x.shape and q.nbytes == 3 * 37 + 4 * 9
    assert "codes of NF4" in repr(q) and "codes of NF4" in repr(q.qparams)
    scale = q.scale.repeat_interleave(16, dim=1)[:, :37]
    assert torch.equal(q.dequantize(), NF4_VALUES.table[q.codes.long()] * scale)
    assert torch.equal(q.dequantize(torch.bfloat16), q.dequantize().bfloat16())
    assert torch.equal(q.qparams.quantize(q.dequantize()).codes, q.codes)
    assert "values[code]" in q.plot(x).axes[2].get_title(loc="left")
    with pytest.raises(ValueError, match="choose qparams for x"):
        q.qparams.quantize(x[:2])


def test_zeros_stay_zeros_with_a_scale_of_zero():
    for book in CODEBOOKS[:3]:
        q = quantized(book, torch.zeros(2, 16))
        assert (q.codes == book.zero).all() and (q.dequantize() == 0).all()
        q = q.qparams.quantize(torch.ones(2, 16))  # a scale that has vanished
        assert (q.codes == book.zero).all() and (q.dequantize() == 0).all()


def test_fake_quantization_has_the_values_and_a_gradient():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for book in CODEBOOKS[:3]:
        q = quantized(book, x.detach()).qparams
        for estimator in ("clipped", "pure"):
            y = q.fake_quantize_rows(x, estimator)
            assert torch.equal(y, q.quantize(x).dequantize())
            (gradient,) = torch.autograd.grad((y * 3).sum(), x)
            assert (gradient == 3).all()
    halves = codebook_qparams(NF4_VALUES, q.scale, q.granularity)  # of e2m1, which reaches six times as far
    (gradient,) = torch.autograd.grad(halves.fake_quantize_rows(x, "clipped").sum(), x)
    step = 1 - NF4_VALUES.values[-2]
    assert torch.equal(gradient.bool(), x.abs() <= halves.scale * (1 + step / 2))
    assert not gradient.all() and gradient.any()


def test_the_gradient_of_a_learned_scale_is_that_of_the_formula():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    scale = torch.tensor([0.5, 1.0, -2.0, 4.0], requires_grad=True)
    for book in NORMALIZED:
        q = codebook_qparams(book, scale.detach().abs()[:, None], octavo.PerGroup(16))
        y = q.learned_rows(x, scale)
        assert torch.equal(y, q.quantize(x).dequantize())
        seed = torch.linspace(-1, 1, 64).reshape(4, 16)
        grad_x, grad_scale = torch.autograd.grad((y * seed).sum(), (x, scale))
        ratio = x.detach().double() / scale.detach().abs().double()[:, None]
        values = book.lookup(book.nearest(ratio.float())).double()
        inside = book.covers(ratio.float())
        slope = torch.where(inside, values - ratio, values)
        expected = (slope * seed).sum(1) * scale.detach().sign() / math.sqrt(16)
        assert ((grad_scale - expected).abs() <= 2**-18).all()
        assert ((grad_x - seed * inside).abs() <= 2**-22).all()


# --- double quantization --------------------------------------------------------------------------------------------


def test_double_quantization_is_nearest_but_for_the_grid():
    scale = torch.randn(40, 50, generator=torch.Generator().manual_seed(0)).abs() + 1
    q = double_quantize(scale)
    assert q.codes.shape == scale.shape and len(q.absmax) == 8
    assert abs(q.offset.item() - scale.double().mean().item()) <= 2**-22
    rest = (scale - q.offset).reshape(-1)
    absmax = q.absmax.repeat_interleave(256)[:2000]
    nearest = (rest[:, None] - DYNAMIC_MAP * absmax[:, None]).abs().amin(1)
    # A number is moved to the grid first, half a node at most, before the nearest value is looked up.
    assert ((q.dequantize().reshape(-1) - scale.reshape(-1)).abs() <= nearest + absmax * 2**-15).all()
    assert torch.equal(q.codes.reshape(-1), double_quantize(scale.reshape(-1)).codes)


def test_the_mean_does_not_depend_on_the_number_of_threads():
    scale = torch.rand(3, 2**17, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(double_quantize(scale))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_equal_scales_come_back_exactly():
    """The mean of seven may be rounded; the difference is one number for all and comes back."""
    for count in (1, 7, 256):
        assert torch.equal(double_quantize(torch.full((count,), 0.3)).dequantize(), torch.full((count,), 0.3))
    assert double_quantize(torch.empty(0, 4)).dequantize().shape == (0, 4)
