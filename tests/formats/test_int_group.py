# SPDX-License-Identifier: Apache-2.0
"""Integers in groups: codes are chosen for the scale as it is stored, nothing is clipped, every form leads back."""

import copy
import math
import pickle

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import octavo
from octavo.formats import IntGroup
from octavo.formats.int_group import SCALE_DTYPES
from octavo.nn import QuantLinear

# What rounding a scale to its dtype may take from it.
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10}
SCHEMES = [
    octavo.Int4WeightOnly(),
    octavo.Int4WeightOnly(16, 3, symmetric=False),
    octavo.Int4WeightOnly(None, 2),
    octavo.Int4Dynamic(64, symmetric=False, scale_dtype="bfloat16"),
    octavo.Int4Dynamic(None, 5, scale_dtype="float32"),
    octavo.Int8Dynamic(group_size=32),
    octavo.Int8Dynamic(weights=IntGroup(6, 32, symmetric=False)),
    octavo.Int8Static(weights=IntGroup()),
    octavo.LLMInt8(1.5, weights=IntGroup(7, 48)),
    octavo.Int4Dynamic(method=octavo.SmoothQuant(fold=False)),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=octavo.schemes.label)
X = torch.linspace(-2, 2, 5 * 70).reshape(5, 70).sin() * 2


def linear() -> nn.Linear:
    """70 inputs: the last group is short, or the only one is longer than the row."""
    torch.manual_seed(0)
    return nn.Linear(70, 19)


def frozen(scheme) -> QuantLinear:
    return octavo.quantized(linear(), scheme, data=X)


def step_of(q) -> torch.Tensor:
    """The scale of each element."""
    return q._spread(q.scale)


formats = st.builds(
    IntGroup,
    st.integers(2, 8),
    st.sampled_from([16, 32, 48, 128, None]),
    st.booleans(),
    st.sampled_from(list(SCALE_DTYPES)),
)


@given(formats, st.integers(1, 20), st.integers(1, 130), st.integers(0, 2**16), st.floats(-8, 8))
def test_every_weight_is_within_half_a_step_and_every_form_leads_back(weights, n, k, seed, exponent):
    """The largest weights of both signs are as near as the others."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 2**exponent
    q = weights.qparams(weight).quantize(weight)
    steps = (2**weights.bits - 1) * ROUNDING[
        weights.scale_dtype
    ]  # by which the range may be too short, in all
    bound = step_of(q).double() * (0.5 + steps) * (1 + 2**-12)
    assert_within(q.dequantize(), weight.double(), bound)
    assert torch.equal(weights.stored_scale(q.scale), q.scale)
    tensors = weights.store(q)
    for name, form in weights.tensors(n, k).items():
        assert tensors[name].shape == form.shape and tensors[name].dtype == form.dtype
        assert form.check is None or not form.check(tensors[name])
    again = weights.read(tensors, n, k)
    assert torch.equal(again.codes, q.codes) and torch.equal(again.zero_point, q.zero_point)
    assert torch.equal(again.scale, q.scale) and weights.shape(tensors) == (n, k)
    unpacked = weights.unpack(weights.pack(tensors, n, k), n, k)
    assert unpacked.keys() == set(weights.replaced)
    for name, tensor in unpacked.items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype, name


@given(formats, st.integers(0, 2**16))
def test_symmetric_codes_clip_neither_end(weights, seed):
    """The scale covers both ends, and rounding it to 16 bits moves them by less than half a step."""
    weights = IntGroup(weights.bits, weights.group_size, True, weights.scale_dtype)
    weight = (
        torch.randn(3, 100, generator=torch.Generator().manual_seed(seed)).exp()
        * torch.tensor([-1, 1, 1])[:, None]
    )
    q = weights.qparams(weight).quantize(weight)
    steps = weight / step_of(q)
    assert (steps < weights.qmax + 0.5).all() and (steps >= weights.qmin - 0.5).all()
    used = [codes.unique() for codes in q.codes]
    assert used[0].min() == weights.qmin and used[1].max() == weights.qmax


def test_a_group_of_zeros_and_one_below_float16_stay_what_they_are_almost():
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 16:32], weight[0, 32:48], weight[1, :16] = 0.0, 1e-9, 3e-6
    for symmetric in (True, False):
        weights = IntGroup(4, 16, symmetric)
        q = weights.qparams(weight).quantize(weight)
        assert q.scale[0, 1] == 1 and not q.dequantize()[0, 16:32].any()
        assert (q.dequantize()[0, 32:48] - 1e-9).abs().max() <= 2**-25
        assert_within(
            q.dequantize()[1, :16],
            weight[1, :16].double(),
            torch.full((16,), 1.01 * q.scale[1, 0].item() / 2),
        )
        assert torch.equal(weights.store(q)["weight_scale"].float(), q.scale)


@pytest.mark.parametrize("factor", [1e-6, 1e7])
def test_a_weight_that_float16_scales_cannot_tell_is_refused_with_a_remedy(factor):
    layer = linear()
    layer.weight.data *= factor
    with pytest.raises(ValueError, match="layer '0'.*largest scale is .*use scale_dtype='float32'"):
        octavo.quantize_(nn.Sequential(layer), octavo.Int4WeightOnly())
    for name in ("float32", "bfloat16"):
        q = octavo.quantized(layer, octavo.Int4WeightOnly(scale_dtype=name))
        assert (q.dequantize() - layer.weight).norm() < 0.1 * layer.weight.norm()
    layer.weight.data[3, 5] = math.nan
    with pytest.raises(ValueError, match="NaN or Inf in its weight"):
        octavo.Int4WeightOnly().quantize_linear(layer)


# SQNR in dB on Gaussian, Laplace and Student-t5 data; affine: as other packages reach with the same groups.
TABLE = {
    IntGroup(4, 32, False): (21.85, 20.51, 20.65),
    IntGroup(4, 64, False): (20.81, 19.00, 19.03),
    IntGroup(3, 64, False): (14.19, 12.54, 12.44),
    IntGroup(2, 64, False): (6.80, 5.97, 5.66),
    IntGroup(4, 32): (20.73, 18.84, 18.77),
    IntGroup(8, 128): (43.81, 41.02, 40.48),
}


def test_errors_are_those_of_the_format_on_three_distributions():
    torch.manual_seed(0)
    kinds = (
        torch.distributions.Normal(0.0, 1.0),
        torch.distributions.Laplace(0.0, 1.0),
        torch.distributions.StudentT(5.0),
    )
    data = [kind.sample((256, 4096)) for kind in kinds]
    for weights, expected in TABLE.items():
        found = [octavo.metrics.sqnr_db(x, weights.qparams(x).quantize(x).dequantize()) for x in data]
        assert found == pytest.approx(expected, abs=0.06), weights


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"bits": 1}, ValueError, "bits must be in 2 .. 8, got 1"),
        ({"bits": 4.0}, TypeError, "bits must be an int, got 4.0"),
        (
            {"group_size": 24},
            ValueError,
            "group_size must be a multiple of 16, got 24; None is the whole row",
        ),
        ({"group_size": 0}, ValueError, "group_size must be a multiple of 16, got 0"),
        ({"group_size": True}, TypeError, "group_size must be an int, got True"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False"),
        (
            {"scale_dtype": "float8"},
            ValueError,
            "scale_dtype is 'float8', accepted are 'float32', 'bfloat16', 'float16'",
        ),
    ],
)
def test_other_values_are_refused(options, error, text):
    for make in (IntGroup, octavo.Int4Dynamic):
        with pytest.raises(error, match=text):
            make(**options)


# --- layers ---------------------------------------------------------------------------------------------------------


@every_scheme
def test_training_sees_what_freezing_gives(scheme):
    """Also with learned scales, which are rounded to their dtype; gradients reach them, the weight and the input."""
    for learn in {False, not scheme.weights.has_zero_points}:
        m = nn.Sequential(linear())
        octavo.prepare_(m, scheme, learn_scales=learn)
        for _ in range(scheme.calibration_passes):
            with torch.no_grad(), octavo.calibrating(m):
                m(X)
        x = X.clone().requires_grad_()
        m(x).square().sum().backward()
        assert m[0].weight.grad.any() and x.grad.any()
        if learn:
            assert (
                m[0].weight_scale.grad.shape
                == m[0].weight_scale.shape
                == (19, m[0].quantized_weight.scale.numel() // 19)
            )
            torch.optim.SGD([m[0].weight_scale], 1e-4).step()
        expected = m[0].fake_quantized_weight()
        octavo.freeze_(m)
        assert_bits_equal(m[0].code_weight(), expected)
        m.requires_grad_(True)  # integer Parameters would raise
        x.grad = None
        m(x).sum().backward()
        assert x.grad.any()


@every_scheme
def test_state_dicts_copies_and_files_bring_back_the_same_bits(scheme, tmp_path):
    m = nn.Sequential(frozen(scheme))
    expected, state = m(X), {name: tensor.clone() for name, tensor in m.state_dict().items()}
    assert {"0.weight_packed", "0.weight_scale", "0.weight_shape"} <= state.keys() and m[0].is_packed
    octavo.save(m, tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(70, 19))
    copies = [copy.deepcopy(m), pickle.loads(pickle.dumps(m)), octavo.load(tmp_path, skeleton)]
    for assign in (False, True):
        copies.append(nn.Sequential(octavo.quantized(nn.Linear(70, 19), scheme, data=X)))
        copies[-1].load_state_dict(state, assign=assign)
    m[0].unpack_()
    assert not m[0].is_packed and m.state_dict().keys() == state.keys()
    for each in (m, *copies):
        assert_bits_equal(each(X), expected)
        assert each[0].scheme == m[0].scheme and (each[0].is_packed or each is m)
        for name, tensor in each.state_dict().items():
            assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype, name


def test_a_part_of_the_tensors_is_loaded_into_a_packed_layer():
    layer = frozen(octavo.Int4WeightOnly(32, 4, symmetric=False))
    state = layer.state_dict()
    weight = layer.dequantize()
    layer.load_state_dict({"weight_scale": 2 * state["weight_scale"]}, strict=False)
    assert layer.is_packed and torch.equal(layer.dequantize(), 2 * weight)
    with pytest.raises(RuntimeError, match='Missing key.*"weight_packed"'):
        layer.load_state_dict({"bias": state["bias"]})


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("weight_scale", torch.full((19, 3), -1.0).half(), "values that are no scales"),
        ("weight_scale", torch.ones(19, 3), "weight_scale is torch.float32, QuantLinear needs float16"),
        ("weight_shape", torch.tensor([19, 71]), r"\(19, 71\) and not \(19, 70\)"),
        (
            "weight_packed",
            torch.zeros(19, 8, dtype=torch.int32),
            r"shape \(19, 8\), QuantLinear needs \(19, 9\)",
        ),
    ],
)
def test_a_layer_refuses_what_is_not_its_own_and_stays_as_it_was(name, value, text):
    layer = frozen(octavo.Int4WeightOnly())
    expected = layer(X)
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict({**layer.state_dict(), name: value})
    assert_bits_equal(layer(X), expected)
