# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors: error bounds, the edge cases, parity with packages people know, and refusals."""

import math

import pytest
import strategies
import torch
from asserts import assert_bits_equal, assert_equal, assert_within_scale
from hypothesis import given, settings
from hypothesis import strategies as st

import octavo

ALL_RANGES = [
    (torch.int8, True, -127, 127),
    (torch.int8, False, -128, 127),
    (torch.uint8, True, 1, 255),
    (torch.uint8, False, 0, 255),
]
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
moderate_floats = st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126)


def per_element(values: torch.Tensor, granularity, shape) -> torch.Tensor:
    """Each element's scale (or zero point), by plain indexing: independent of Granularity.to_rows."""
    if isinstance(granularity, octavo.PerChannel):
        other = [1] * len(shape)
        other[granularity.axis] = shape[granularity.axis]
        return values.reshape(other).expand(shape)
    if isinstance(granularity, octavo.PerGroup):
        return values.repeat_interleave(granularity.group_size, dim=-1)[..., : shape[-1]]
    if isinstance(granularity, octavo.PerToken):
        return values[..., None].expand(shape)
    return values.expand(shape)


@st.composite
def quantized_tensors(draw, elements=moderate_floats):
    """x and octavo.quantize(x, ...) for any shape, dtype, granularity and range."""
    shape = draw(strategies.shapes())
    x = draw(strategies.tensors(shape=shape, elements=elements))
    return x, octavo.quantize(x, **draw(strategies.quantization(shape)))


# --- properties ---------------------------------------------------------------------------------------------------


@given(quantized_tensors())
def test_error_is_at_most_half_a_step(case):
    x, q = case
    assert q.shape == x.shape
    assert_within_scale(q.dequantize(), x.float(), per_element(q.scale, q.qparams.granularity, x.shape))


@given(quantized_tensors())
def test_codes_stay_in_range_and_scales_have_a_finite_inverse(case):
    _, q = case
    if q.codes.numel():
        assert q.qparams.qmin <= int(q.codes.min()) <= int(q.codes.max()) <= q.qparams.qmax
    assert (q.scale >= SMALLEST_NORMAL).all() and (1 / q.scale).isfinite().all()
    assert ((q.zero_point >= q.qparams.qmin) & (q.zero_point <= q.qparams.qmax)).all()


@given(quantized_tensors())
def test_quantizing_again_changes_nothing(case):
    _, q = case
    assert_equal(q.qparams.quantize(q.dequantize()).codes, q.codes)


@given(quantized_tensors())
def test_zero_is_exact(case):
    x, q = case
    zeros = q.qparams.quantize(torch.zeros(x.shape))
    assert_equal(zeros.codes.int(), per_element(q.zero_point, q.qparams.granularity, x.shape))
    assert_bits_equal(zeros.dequantize(), torch.zeros(x.shape))


@given(
    st.lists(moderate_floats, min_size=2, max_size=30),
    st.sampled_from([torch.int8, torch.uint8]),
    st.booleans(),
)
def test_codes_are_monotone_in_the_values(values, dtype, symmetric):
    q = octavo.quantize(torch.tensor(sorted(values)), dtype=dtype, symmetric=symmetric)
    assert (q.codes.int().diff() >= 0).all()


@given(
    st.lists(
        st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40, allow_subnormal=False),
        min_size=1,
        max_size=20,
    ),
    st.integers(-30, 30),
    st.booleans(),
)
def test_a_power_of_two_moves_the_scale_and_no_code(values, exponent, symmetric):
    x = torch.tensor(values)
    x = torch.where(x.abs() < 2**-40, 0.0, x)  # far from the smallest scale
    q, moved = (octavo.quantize(x * factor, symmetric=symmetric) for factor in (1.0, 2.0**exponent))
    assert_equal(moved.codes, q.codes)
    if x.any():
        assert_bits_equal(moved.scale, q.scale * 2.0**exponent)


@given(st.data())
def test_permuting_the_channels_permutes_codes_and_scales(data):
    x = data.draw(strategies.tensors(shape=(5, 8), elements=moderate_floats))
    order = torch.tensor(data.draw(st.permutations(range(5))))
    q, permuted = (octavo.quantize(t, granularity=octavo.PerChannel(0)) for t in (x, x[order]))
    assert_equal(permuted.codes, q.codes[order])
    assert_bits_equal(permuted.scale, q.scale[order])


@given(st.lists(moderate_floats, min_size=1, max_size=12))
def test_symmetric_codes_of_minus_x_are_mirrored(values):
    x = torch.tensor(values)
    assert_equal(octavo.quantize(-x).codes, -octavo.quantize(x).codes)


# --- edge rows: algorithms "linear quantizer", column "ours" --------------------------------------------------------


@pytest.mark.parametrize("dtype, symmetric, qmin, qmax", ALL_RANGES)
class TestEdgeRows:
    def test_zero_row_has_scale_one_and_codes_zero_point(self, isa, dtype, symmetric, qmin, qmax):
        q = octavo.quantize(
            torch.zeros(3, 5), dtype=dtype, symmetric=symmetric, granularity=octavo.PerChannel(0)
        )
        assert_bits_equal(q.scale, torch.ones(3))
        assert_equal(q.codes.int(), q.zero_point[:, None].expand(3, 5))

    @pytest.mark.parametrize("value", [0.3, -0.3, 1e30, -1e30, 1e-6, 1e-9, 1e-30], ids=str)
    def test_constant_row_comes_back_to_one_rounding_at_full_precision(
        self, isa, dtype, symmetric, qmin, qmax, value
    ):
        """No floor under the scale: 1e-9 keeps all its codes, as 0.3 does."""
        x = torch.full((4,), value)
        q = octavo.quantize(x, dtype=dtype, symmetric=symmetric)
        assert set(q.codes.tolist()) == ({qmax} if value > 0 else {qmin})
        assert ((q.dequantize() - x).abs() <= x.abs() * 2**-23).all()

    def test_row_without_zero_in_its_range_keeps_its_values_apart(self, isa, dtype, symmetric, qmin, qmax):
        x = torch.tensor([1.0, 1.5, 2.0])
        q = octavo.quantize(x, dtype=dtype, symmetric=symmetric)
        assert_within_scale(q.dequantize(), x, q.scale)
        assert q.scale.item() <= 2 / 127
        assert len(set(q.codes.tolist())) == 3

    def test_largest_of_a_one_sided_row_is_not_clipped(self, isa, dtype, symmetric, qmin, qmax):
        q = octavo.quantize(torch.tensor([0.1, 0.4, 1.0]), dtype=dtype, symmetric=symmetric)
        assert q.codes[-1] == qmax
        assert abs(q.dequantize()[-1].item() - 1.0) <= 2**-24

    def test_row_below_the_smallest_scale_becomes_zero(self, isa, dtype, symmetric, qmin, qmax):
        q = octavo.quantize(torch.tensor([1e-40, -1e-40]), dtype=dtype, symmetric=symmetric)
        assert q.scale.item() == 1.0
        assert_bits_equal(q.dequantize(), torch.zeros(2))

    def test_range_wider_than_float32_does_not_overflow(self, isa, dtype, symmetric, qmin, qmax):
        x = torch.tensor([3e38, -3e38])
        q = octavo.quantize(x, dtype=dtype, symmetric=symmetric)
        assert q.scale.isfinite()
        assert_within_scale(q.dequantize(), x, q.scale)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_nan_and_inf_are_refused_by_row(self, isa, dtype, symmetric, qmin, qmax, bad):
        x = torch.zeros(4, 6)
        x[2, 3] = bad
        with pytest.raises(ValueError, match="row 2"):
            octavo.quantize(x, dtype=dtype, symmetric=symmetric, granularity=octavo.PerChannel(0))


@given(
    st.lists(moderate_floats, min_size=1, max_size=20).filter(lambda values: max(map(abs, values)) > 1e-30)
)
def test_largest_value_of_a_row_gets_code_127_and_comes_back_within_one_rounding(values):
    """scale is absmax / 127, never / 127.5: +127 and -127 are in use, and nothing is clipped."""
    x = torch.tensor(values)
    largest = x.abs().argmax()
    q = octavo.quantize(x)
    assert q.codes[largest] == (127 if x[largest] > 0 else -127)
    assert abs(q.dequantize()[largest].double() - x[largest].double()) <= x[largest].abs().double() * 2**-23


# --- shapes, strides, dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "granularity, shape, expected",
    [
        (octavo.PerTensor(), (2, 3, 10), ()),
        (octavo.PerChannel(1), (2, 3, 10), (3,)),
        (octavo.PerChannel(-1), (2, 3, 10), (10,)),
        (octavo.PerGroup(4), (2, 3, 10), (2, 3, 3)),
        (octavo.PerGroup(128), (10,), (1,)),
        (octavo.PerToken(), (2, 3, 10), (2, 3)),
        (octavo.PerToken(), (10,), ()),
        (octavo.PerTensor(), (), ()),
        (octavo.PerChannel(0), (0, 4), (0,)),
        (octavo.PerToken(), (3, 0), (3,)),
        (octavo.PerGroup(4), (3, 0), (3, 0)),
    ],
    ids=str,
)
def test_scale_and_zero_point_have_the_granularity_s_shape(granularity, shape, expected):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = octavo.quantize(x, granularity=granularity, symmetric=False)
    assert q.scale.shape == q.zero_point.shape == torch.Size(expected)
    assert (q.scale.dtype, q.zero_point.dtype) == (torch.float32, torch.int32)
    assert q.shape == q.codes.shape == q.dequantize().shape == x.shape


def test_tail_group_is_quantized_by_its_own_values():
    x = torch.tensor([[8.0, 4.0, 2.0, 1.0, 0.5]])
    q = octavo.quantize(x, granularity=octavo.PerGroup(2))
    assert_bits_equal(q.scale, torch.tensor([[8.0, 2.0, 0.5]]) / 127)
    assert q.codes.tolist() == [[127, 64, 127, 64, 127]]


@given(st.data())
def test_strides_do_not_matter(data):
    x = data.draw(strategies.tensors(shape=(4, 6, 10), elements=moderate_floats))
    strided = x[::2, :, 1::3].transpose(0, 2)
    options = data.draw(strategies.quantization((3, 6, 2)))
    q, expected = octavo.quantize(strided, **options), octavo.quantize(strided.contiguous(), **options)
    assert_equal(q.codes, expected.codes)
    assert_bits_equal(q.scale, expected.scale)
    assert q.codes.is_contiguous() and q.dequantize().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_quantized_as_its_float32_values(dtype):
    x = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, expected = (octavo.quantize(t, granularity=octavo.PerToken()) for t in (x, x.float()))
    assert_equal(q.codes, expected.codes)
    assert_bits_equal(q.scale, expected.scale)
    assert_bits_equal(q.dequantize(dtype), q.dequantize().to(dtype))


def test_nbytes_counts_codes_scales_and_zero_points():
    q = octavo.quantize(torch.ones(10, 100), granularity=octavo.PerChannel(0))
    assert q.nbytes == 10 * 100 + 10 * 4 + 10 * 4


def test_repr_tells_shape_dtype_granularity_range_scale_and_size():
    q = octavo.quantize(torch.full((2, 4), 127.0), granularity=octavo.PerGroup(4))
    assert repr(q) == (
        "QuantizedTensor(shape [2, 4], int8, PerGroup(group_size=4), codes -127 .. 127, scale 1, 24 bytes)"
    )
    assert repr(q.qparams) == "QParams(PerGroup(group_size=4), codes -127 .. 127, scale 1)"
    assert "scale of []" in repr(octavo.quantize(torch.ones(3, device="meta")))


def test_quantize_needs_no_gradient_and_leaves_x_alone():
    x = torch.randn(3, 4, requires_grad=True)
    before = x.detach().clone()
    q = octavo.quantize(x)
    assert not q.scale.requires_grad and not q.dequantize().requires_grad
    assert_bits_equal(x.detach(), before)


def test_a_granularity_class_stands_for_its_default_instance():
    assert octavo.quantize(
        torch.ones(2, 3), granularity=octavo.PerChannel
    ).qparams.granularity == octavo.PerChannel(0)
    assert octavo.dequantize(octavo.quantize(torch.ones(2, 3))).shape == (2, 3)


# --- parity ---------------------------------------------------------------------------------------------------------


def beside_a_tie(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Whether x / scale is within 4 float32 ulp (of a value below 256) of a tie, where roundings may legally differ."""
    steps = x.double() / scale.double()
    return ((steps - steps.floor()) - 0.5).abs() < 4 * 2**-16


@settings(max_examples=50)
@given(st.data())
def test_dequantized_values_are_those_of_torch_fake_quantize(data):
    x = data.draw(strategies.tensors(shape=(4, 24), dtypes=(torch.float32,), elements=moderate_floats))
    dtype, symmetric, qmin, qmax = data.draw(st.sampled_from(ALL_RANGES))
    q = octavo.quantize(x, dtype=dtype, symmetric=symmetric, granularity=octavo.PerChannel(0))
    theirs = torch.fake_quantize_per_channel_affine(x, q.scale, q.zero_point, 0, qmin, qmax)
    assert ((q.dequantize() == theirs) | beside_a_tie(x, q.scale[:, None])).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_qparams_and_codes_are_those_of_torchao(symmetric):
    """torchao's SYMMETRIC divides by 127.5; its SYMMETRIC_NO_CLIPPING_ERR with the range -127 .. 127 is our rule."""
    torchao = pytest.importorskip("torchao.quantization.quant_primitives")
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    qmin = -127 if symmetric else -128
    mapping = torchao.MappingType.SYMMETRIC_NO_CLIPPING_ERR if symmetric else torchao.MappingType.ASYMMETRIC
    scale, zero_point = torchao.choose_qparams_affine(x, mapping, (1, 96), torch.int8, qmin, 127, eps=2**-126)
    codes = torchao.quantize_affine(x, (1, 96), scale, zero_point, torch.int8, qmin, 127)
    q = octavo.quantize(x, symmetric=symmetric, granularity=octavo.PerChannel(0))
    assert_bits_equal(q.scale, scale.reshape(-1))
    assert_equal(q.zero_point, zero_point.reshape(-1).int())
    assert ((q.codes == codes) | beside_a_tie(x, q.scale[:, None])).all()


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: octavo.quantize([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda: octavo.quantize(torch.ones(2, dtype=torch.float64)),
            TypeError,
            "x is torch.float64.*float32, bfloat16",
        ),
        (lambda: octavo.quantize(torch.ones(2, dtype=torch.int8)), TypeError, "x is torch.int8"),
        (lambda: octavo.quantize(torch.eye(2).to_sparse()), TypeError, "dense"),
        (
            lambda: octavo.quantize(torch.ones(2), dtype=torch.int32),
            TypeError,
            "dtype is torch.int32.*int8, uint8, int16 or uint16",
        ),
        (
            lambda: octavo.quantize(torch.ones(2), granularity="per_tensor"),
            TypeError,
            "granularity is 'per_tensor'",
        ),
        (lambda: octavo.quantize(torch.ones(2), granularity=octavo.PerChannel(1)), ValueError, "no axis 1"),
        (lambda: octavo.quantize(torch.ones(()), granularity=octavo.PerToken()), ValueError, "PerTensor"),
        (lambda: octavo.quantize(torch.ones(()), granularity=octavo.PerGroup(4)), ValueError, "PerTensor"),
        (lambda: octavo.PerGroup(0), ValueError, "group_size must be at least 1, got 0"),
        (lambda: octavo.PerGroup(2.5), TypeError, "group_size must be an int, got 2.5"),
        (lambda: octavo.PerChannel(None), TypeError, "axis must be an int, got None"),
        (lambda: octavo.dequantize(torch.ones(2)), TypeError, "must be a QuantizedTensor.*got Tensor"),
        (
            lambda: octavo.quantize(torch.ones(2)).dequantize(torch.float64),
            TypeError,
            "dtype is torch.float64",
        ),
        (
            lambda: octavo.choose_qparams(torch.ones(3, 4), granularity=octavo.PerToken()).quantize(
                torch.ones(5, 4)
            ),
            ValueError,
            r"needs scales of shape \(5,\).*have \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
