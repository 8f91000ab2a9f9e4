# SPDX-License-Identifier: Apache-2.0
"""HalfWeightOnly goes through everything that the package does with a model: training, files, figures, graphs."""

import copy
import json
import pickle

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from models import IDS, LINEARS, model
from torch import nn

import octavo
from octavo.nn import QuantLinear
from octavo.schemes import by_name, from_dict

X = torch.randn(5, 37, generator=torch.Generator().manual_seed(0))


def mlp(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(37, 65), nn.ReLU(), nn.Linear(65, 20, bias=False)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_product_is_that_of_the_float_layer_added_up_in_float32(dtype):
    """docs/numerics.md: k roundings, each below sum |x| |w|, one of the bias, and one to the type of x."""
    linear = nn.Linear(37, 65).to(dtype)
    layer = octavo.quantized(linear, octavo.HalfWeightOnly())
    x, weight, bias = X.to(dtype).double(), layer.dequantize().double(), linear.bias.double()
    exact, u = x @ weight.T + bias, 2**-24
    sums = x.abs() @ weight.abs().T * (38 * u) + u * exact.abs()
    assert_within(layer(X.to(dtype)), exact, sums + (exact.abs() + sums) * torch.finfo(dtype).eps / 2)
    kept = "float16" if dtype == torch.float16 else "bfloat16"
    assert layer.scheme.weights.dtype == kept


def test_same_bits_on_every_isa(isa):
    layer = octavo.quantized(nn.Linear(383, 129), octavo.HalfWeightOnly())
    x = torch.randn(11, 383)
    y = layer(x)
    with octavo.use_isa("scalar"):
        assert_bits_equal(y, layer(x))


def test_a_scheme_survives_json_and_has_a_name():
    for scheme in (octavo.HalfWeightOnly(), octavo.HalfWeightOnly("float16")):
        assert from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert by_name("half-weight-only") == octavo.HalfWeightOnly()
    assert by_name("half-weight-only:dtype=float16") == octavo.HalfWeightOnly(dtype="float16")
    assert octavo.HalfWeightOnly() != octavo.HalfWeightOnly("float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_file_brings_back_the_same_bits_and_holds_the_weights_themselves(dtype, tmp_path):
    source = octavo.quantized(mlp(dtype), octavo.HalfWeightOnly())
    octavo.save(source, tmp_path)
    with torch.device("meta"):
        skeleton = mlp(dtype)
    loaded = octavo.load(tmp_path, skeleton)
    assert_bits_equal(loaded(X.to(dtype)), source(X.to(dtype)))
    contents = octavo.inspect_checkpoint(tmp_path)
    assert contents.bits_per_weight == 16 and len(contents.quantized) == 2
    assert loaded[0].scheme == source[0].scheme


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same_bits(copied):
    layer = octavo.quantized(mlp(), octavo.HalfWeightOnly())
    assert_bits_equal(copied(layer)(X), layer(X))


def test_training_sees_what_freezing_gives_and_passes_straight_through_the_rounding():
    m = mlp()
    octavo.prepare_(m, octavo.HalfWeightOnly())
    assert_bits_equal(m[0].fake_quantized_weight(), m[0].weight.bfloat16().float())
    x = X.clone().requires_grad_()
    m(x).square().sum().backward()
    plain = mlp()
    with torch.no_grad():
        for linear in (plain[0], plain[2]):
            linear.weight.copy_(linear.weight.bfloat16())
    plain(X).square().sum().backward()
    assert_bits_equal(m[0].weight.grad, plain[0].weight.grad)
    torch.optim.SGD(m.parameters(), 1e-3).step()
    with torch.no_grad():
        expected = m(X)
        octavo.freeze_(m)
        assert isinstance(m[0], QuantLinear)
        assert_within(m(X), expected, 2**-18 * 65)
    x.grad = None
    m(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no scales; use learn_scales=False"):
        octavo.prepare_(mlp(), octavo.HalfWeightOnly(), learn_scales=True)


def test_a_model_is_quantized_reported_compared_corrected_and_chosen_from():
    reference = model().eval()
    m = octavo.quantized(reference, octavo.HalfWeightOnly())
    found = octavo.compare(reference, m, IDS)
    assert [layer.name for layer in found.layers] == LINEARS
    assert all(
        layer.local_sqnr_db > 40 for layer in found.layers
    )  # a rounding of at most 2^-8 of each weight
    octavo.correct_bias_(m, reference, IDS)
    schemes = [octavo.Int8Dynamic(), octavo.HalfWeightOnly()]
    rows = octavo.sensitivity(reference, data=IDS, schemes=schemes, figure="error")
    # Padding makes Int8 larger than floats where layers are as small as these; in Half they take 2304 bytes.
    octavo.quantize_(reference, octavo.choose(rows, budget=2400))
    layers = [reference.get_submodule(name) for name in LINEARS]
    assert octavo.HalfWeightOnly() in {getattr(layer, "scheme", None) for layer in layers}


def test_smoothing_and_equalization_go_with_it():
    m = model().eval()
    octavo.quantize_(m, octavo.HalfWeightOnly(method=octavo.SmoothQuant()), data=IDS)
    assert_within(m(IDS), model().eval()(IDS), 0.05)


def test_fusion_leaves_the_bits_as_they_are():
    m = octavo.quantized(mlp(), octavo.HalfWeightOnly())
    expected = m(X)
    octavo.fuse_(m, X, blocks=True)
    assert m[0].activation == "relu"
    assert_bits_equal(m(X), expected)


def test_compile_and_export_give_the_same_bits():
    m = octavo.quantized(mlp(), octavo.HalfWeightOnly())
    compiled = torch.compile(m, fullgraph=True, backend="eager")
    exported = torch.export.export(m, (X,)).module()
    with torch.no_grad():
        assert_bits_equal(compiled(X), m(X))
        assert_bits_equal(exported(X), m(X))


def test_a_layer_that_is_not_packed_multiplies_in_a_graph_and_on_meta():
    m = octavo.quantized(mlp(), octavo.HalfWeightOnly())
    expected = m(X)
    m[0].unpack_()
    with torch.no_grad():
        assert_bits_equal(torch.compile(m, fullgraph=True, backend="eager")(X), expected)
    assert not m[0].is_packed
    assert_bits_equal(m(X), expected)
    assert m[0].is_packed
    assert copy.deepcopy(m[0].unpack_()).to("meta")(X.to("meta")).shape == (5, 65)
