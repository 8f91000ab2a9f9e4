# SPDX-License-Identifier: Apache-2.0
"""Layers of codebooks: what they multiply by, packed and canonical forms, training, files."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from models import IDS, LINEARS, model
from torch import nn

import octavo
from octavo import ops
from octavo.evaluation.resources import bits_per_weight, memory_of
from octavo.formats import FP4, MXFP4, NF4, NVFP4
from octavo.nn import QuantLinear
from octavo.nn.fused.shared_input import SharedInput, can_be_joined
from octavo.tensors.fake_quantize import fake_quantize_per_token

FORMATS = [NF4(), NF4(64, False), NF4(16), FP4(), FP4(128, False), MXFP4(), NVFP4()]
SCHEMES = [
    octavo.NF4(),
    octavo.NF4(32, False, activations="int16"),
    octavo.FP4(),
    octavo.MXFP4(activations="int16"),
    octavo.NVFP4(),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=octavo.schemes.label)
X = torch.linspace(-2, 2, 5 * 77).reshape(5, 77).sin() * 2


def linear(k: int = 77, n: int = 21) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """torch.equal, which torch does not have for 8-bit floats."""
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


# --- the product ----------------------------------------------------------------------------------------------------


def kernel_weight(layer: QuantLinear) -> torch.Tensor:
    """What the product multiplies by, float32 [n, k]: that of the table of integers."""
    weights = layer.scheme.weights
    return ops.dequantize_groups(weights.group_weight(*weights.operands_of(layer)), layer.in_features)


def read_by(scheme, x: torch.Tensor) -> torch.Tensor:
    """The codes of x [m, k] as reals, float64."""
    bits, group = scheme.activations.signed_codes
    if bits == 8:
        return fake_quantize_per_token(x, True, group or None).double()
    scale = (x.abs().amax(1, keepdim=True) / 32512).double()
    return (x.double() / scale).round() * scale


def test_integers_of_kernels_are_as_near_to_the_values_as_numerics_says():
    for format, error in ((NF4(), 0.5 / 63), (FP4(), 1 / 192), (MXFP4(), 0.0), (NVFP4(), 0.0)):
        layer = octavo.quantized(linear(), octavo.Int8WeightOnly(weights=format))
        exact = layer.dequantize()
        scale = format.granularity.to_rows(layer.weight.clone()).abs().amax(1, keepdim=True)
        rows = format.granularity.to_rows(kernel_weight(layer) - exact)
        assert (rows.abs() <= scale * (error * 1.01 + 2**-22)).all(), format
        if format == MXFP4():
            assert_bits_equal(kernel_weight(layer) + 0.0, exact + 0.0)


def test_a_layer_multiplies_what_its_codes_stand_for(isa):
    for format in FORMATS:
        for k, n in ((77, 21), (16, 3), (200, 40)):
            x = torch.randn(7, k, generator=torch.Generator().manual_seed(k))
            for scheme in (
                octavo.Int8Dynamic(weights=format, activation_group_size=32),
                octavo.Int8WeightOnly(weights=format),
            ):
                layer = octavo.quantized(linear(k, n), scheme)
                weight, read, bias = kernel_weight(layer).double(), read_by(scheme, x), layer.bias.double()
                sizes = read.abs() @ weight.abs().T + bias.abs()
                # As for integers in groups: each segment of 16 columns or more has a few roundings of its own.
                bound = sizes * (4 * (k // 16 + 1) + 8) * 2**-24
                assert_within(layer(x), nn.functional.linear(read, weight, bias), bound)


@every_scheme
def test_same_bits_on_every_isa_in_every_batch_and_with_every_number_of_threads(scheme, isa):
    layer, x = octavo.quantized(linear(), scheme), torch.randn(9, 77)
    x[4, 5], x[7, 3] = math.nan, math.inf
    with octavo.use_isa("scalar"):
        expected = layer(x)
    assert torch.equal(expected.isnan().all(1), ~x.isfinite().all(1))
    assert_bits_equal(layer(x), expected)
    assert_bits_equal(torch.cat([layer(row) for row in x.split(2)]), expected)


@every_scheme
def test_gradients_reach_the_input_and_layers_can_be_joined(scheme):
    layers = [octavo.quantized(linear(77, 16 * (i + 1)), scheme) for i in range(2)]
    expected = [layer(X) for layer in layers]
    x = X.clone().requires_grad_()
    layers[0](x).sum().backward()
    assert_within(x.grad, kernel_weight(layers[0]).sum(0).expand(5, 77), 1e-4)
    assert can_be_joined(layers)
    for y, own in zip(SharedInput(layers)(X), expected, strict=True):
        assert_bits_equal(y, own)


def test_graphs_of_layers_frozen_and_prepared_have_the_same_bits():
    """Tables are there before a graph is traced."""
    m, prepared = nn.Sequential(linear()), nn.Sequential(linear())
    octavo.quantize_(m, octavo.NF4())
    octavo.prepare_(prepared, octavo.NF4())
    assert_bits_equal(torch.export.export(m, (X,)).module()(X), m(X))
    for each in (m, prepared):
        assert_bits_equal(torch.compile(each, fullgraph=True, backend="eager")(X), each(X))


# --- the packed form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=repr)
def test_packing_loses_nothing(format):
    for k, n in ((77, 21), (1, 1), (300, 17)):
        layer = octavo.quantized(linear(k, n), octavo.Int8WeightOnly(weights=format))
        weight = linear(k, n).weight.detach()
        canonical = format.store(format.qparams(weight).quantize(weight))
        assert layer.is_packed and canonical.keys() == layer.canonical_tensors().keys()
        for name, tensor in layer.canonical_tensors().items():
            assert same(tensor, canonical[name]), name
        assert not {*canonical} & {*layer._parameters, *layer._buffers} & {*format.replaced}
        layer.unpack_()
        assert not layer.is_packed and all(layer._buffers.get(name) is None for name in format.held)
        assert all(same(layer.state_dict()[name], tensor) for name, tensor in canonical.items())


def test_bytes_that_do_not_follow_from_their_scales_are_kept():
    """Blocks that are nearly alike: values of the nested table fall together where the offset is added."""
    weight = torch.ones(64, 64) * (1 + torch.arange(64)[:, None] * 2**-22)
    tensors = NF4().store(NF4().qparams(weight).quantize(weight))
    held = NF4().pack(tensors, 64, 64)
    assert held["packed_absmax"] is not None
    assert torch.equal(NF4().unpack(held, 64, 64)["weight_absmax"], tensors["weight_absmax"])
    other = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert "packed_absmax" not in NF4().pack(NF4().store(NF4().qparams(other).quantize(other)), 64, 64)


def test_memory_and_files_have_the_bits_that_the_format_says(tmp_path):
    """512 outputs and inputs: no padding. Beside the codes: in memory a number for each block, 4 bytes for each row."""
    in_memory = {NF4(): 32 / 64, NF4(64, False): 32 / 64, MXFP4(): 8 / 32, NVFP4(): 8 / 16}
    in_files = {NF4(): 8 / 64 + 32 / 256 / 64, NF4(64, False): 32 / 64, MXFP4(): 8 / 32, NVFP4(): 8 / 16}
    for format in in_memory:
        m = octavo.quantized(nn.Sequential(linear(512, 512)), octavo.Int8WeightOnly(weights=format))
        extra = 32 / 512 + (32 / 256 / 64 if format == NF4() else 0)
        assert abs(bits_per_weight(m) - 4 - in_memory[format] - extra) < 1e-3, format
        assert memory_of(m).codes == 512 * 256
        octavo.save(m, tmp_path)
        found = octavo.inspect_checkpoint(tmp_path).bits_per_weight
        assert abs(found - 4 - in_files[format]) < 1e-3, format


# --- training, files, models ----------------------------------------------------------------------------------------


@every_scheme
def test_a_model_is_quantized_reported_and_compared(scheme):
    reference = model().eval()
    m = copy.deepcopy(reference)
    report = octavo.quantize_(m, scheme)
    assert [row.name for row in report.quantized] == LINEARS
    found = octavo.compare(reference, m, IDS)
    # The table of formats has 16 dB and more for Gaussian data, and blocks of 8 or 16 are finer.
    assert all(layer.local_sqnr_db > 14 for layer in found.layers), found


def test_schemes_have_names_and_survive_json():
    for text, scheme in {
        "nf4": octavo.NF4(),
        "fp4:double_quant=false": octavo.FP4(double_quant=False),
        "MXFP4:activations=int16": octavo.MXFP4(activations="int16"),
        "nv-fp4": octavo.NVFP4(),
        "nf4:block_size=128": octavo.NF4(128),
    }.items():
        assert octavo.schemes.by_name(text) == scheme
        assert octavo.schemes.from_dict(scheme.to_dict()) == scheme
    assert octavo.NF4().activations == octavo.activations.Dynamic(group_size=64)
    assert octavo.NVFP4().activations == octavo.activations.Dynamic(group_size=32)
    assert octavo.NF4(activations=octavo.activations.Dynamic()).activations.group_size is None
    with pytest.raises(TypeError, match="accepted are 'int8', 'int16' and what octavo.activations has"):
        octavo.NF4(activations="int4")


@every_scheme
def test_training_sees_what_freezing_gives(scheme):
    m = nn.Sequential(linear())
    octavo.prepare_(m, scheme)
    expected = m(X)
    expected.sum().backward()
    assert m[0].weight.grad.abs().sum() > 0
    octavo.freeze_(m)
    assert isinstance(m[0], QuantLinear) and m[0].scheme == scheme
    q = scheme.weights.qparams(linear().weight).quantize(linear().weight.detach())
    assert_bits_equal(m[0].dequantize(), q.dequantize())
    assert ((m(X) - expected).norm() / expected.norm()).item() < 0.02


def test_scales_of_a_block_can_be_learned_unless_they_are_quantized():
    m = nn.Sequential(linear())
    octavo.prepare_(m, octavo.NF4(double_quant=False, activations="int16"), learn_scales=True)
    before = m[0].weight_scale.detach().clone()
    m(X).square().sum().backward()
    with torch.no_grad():
        m[0].weight_scale -= 1e-4 * m[0].weight_scale.grad
    assert not torch.equal(m[0].weight_scale, before)
    expected = m[0].fake_quantized_weight()
    octavo.freeze_(m)
    assert_bits_equal(m[0].dequantize(), expected)
    for scheme in (octavo.NF4(), octavo.MXFP4(), octavo.NVFP4()):
        with pytest.raises(ValueError, match=r"cannot be learned.*NF4\(double_quant=False\)"):
            octavo.prepare_(nn.Sequential(linear()), scheme, learn_scales=True)


@every_scheme
def test_a_file_brings_back_the_same_bits(scheme, tmp_path):
    m = octavo.quantized(nn.Sequential(linear()), scheme)
    octavo.save(m, tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(77, 21))
    loaded = octavo.load(tmp_path, skeleton)
    assert loaded[0].scheme == scheme
    assert_bits_equal(loaded(X), m(X))
    for name, tensor in m.state_dict().items():
        assert same(loaded.state_dict()[name], tensor), name
    bits = octavo.inspect_checkpoint(tmp_path).bits_per_weight
    assert 4 < bits < 8


@pytest.mark.parametrize(
    "scheme, name, value",
    [
        (octavo.NF4(double_quant=False), "weight_absmax", -1.0),
        (octavo.NF4(), "weight_nested_absmax", math.inf),
        (octavo.NF4(), "weight_nested_offset", math.nan),
        (octavo.MXFP4(), "weight_scale", 255),
        (octavo.NVFP4(), "weight_scale", -1.0),
        (octavo.NVFP4(), "weight_global_scale", 0.0),
    ],
)
def test_a_layer_refuses_scales_that_are_none(scheme, name, value):
    layer = octavo.quantized(linear(), scheme)
    state = layer.state_dict()
    state[name] = torch.full(state[name].shape, value, dtype=state[name].dtype)
    with pytest.raises(RuntimeError, match=f"{name} holds"):
        layer.load_state_dict(state)


def test_scales_that_a_method_has_changed_are_stored_as_the_format_can():
    weight = linear().weight.detach()
    for format in FORMATS:
        q = format.qparams(weight)
        halved = format.stored_qparams(replace(q, scale=q.scale / 2))
        assert ((halved.scale / q.scale * 2 - 1).abs() <= 1 / 8).all(), format
        tensors = format.store(halved.quantize(weight))
        assert torch.equal(format.read(tensors, *weight.shape).scale, halved.scale)
