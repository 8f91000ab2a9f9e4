# SPDX-License-Identifier: Apache-2.0
"""A second weight format goes through everything that the package does with a model, and no file of it is touched."""

import copy
import pickle

import pytest
import torch
from asserts import assert_bits_equal
from models import IDS, LINEARS, model
from torch import nn
from toys import AFFINE, GROUP_SCHEMES, SYMMETRIC, Group4

import octavo
from octavo.evaluation.resources import bits_per_weight, memory_of
from octavo.nn import OutlierLinear, QuantLinear
from octavo.nn.fused.shared_input import can_be_joined
from octavo.schemes import from_dict

every_scheme = pytest.mark.parametrize("scheme", GROUP_SCHEMES, ids=octavo.schemes.label)
both_formats = pytest.mark.parametrize("weights", [SYMMETRIC, AFFINE], ids=["symmetric", "affine"])
X = torch.linspace(-2, 2, 5 * 21).reshape(5, 21).sin() * 2


def linear() -> nn.Linear:
    """21 inputs: an odd number, with a last group of 5."""
    torch.manual_seed(0)
    return nn.Linear(21, 6)


def frozen(scheme) -> QuantLinear:
    return octavo.quantized(linear(), scheme, data=X)


@both_formats
def test_a_layer_multiplies_what_its_codes_stand_for(weights):
    """16-bit activations are read as they are, so the product is that of the dequantized weight."""
    layer, float_layer = frozen(octavo.Int8WeightOnly(weights=weights)), linear()
    q = weights.qparams(float_layer.weight).quantize(float_layer.weight)
    assert torch.equal(layer.dequantize(), q.dequantize())
    assert_bits_equal(layer(X), nn.functional.linear(X, q.dequantize(), float_layer.bias))
    step = q.scale.repeat_interleave(weights.group_size, 1)[:, :21]
    assert ((layer.dequantize() - float_layer.weight).abs() <= step / 2 * (1 + 2**-12)).all()
    assert layer.weight.shape == (6, 21) and torch.equal(layer.weight.clone(), layer.dequantize())


@every_scheme
def test_training_sees_what_freezing_gives(scheme):
    m = nn.Sequential(linear())
    octavo.prepare_(m, scheme)
    with torch.no_grad():
        for _ in range(scheme.calibration_passes):
            with octavo.calibrating(m):
                m(X)
        expected = m(X)
        octavo.freeze_(m)
        assert isinstance(m[0], QuantLinear) and m[0].scheme.weights == scheme.weights
        # Outliers are multiplied in 16 bits, and in floats while training: 2^-15 of each product.
        bound = 2**-15 * (X.abs() @ linear().weight.abs().T) if isinstance(m[0], OutlierLinear) else 0.0
        assert ((m(X) - expected).abs() <= bound).all()


@every_scheme
def test_gradients_reach_the_weight_while_preparing_and_the_input_afterwards(scheme):
    m, x = nn.Sequential(linear()), X.clone().requires_grad_()
    octavo.prepare_(m, scheme)
    for _ in range(scheme.calibration_passes):
        with torch.no_grad(), octavo.calibrating(m):
            m(X)
    m(x).sum().backward()
    assert m[0].weight.grad.abs().sum() > 0
    octavo.freeze_(m)
    x.grad = None
    m(x).sum().backward()
    assert x.grad.abs().sum() > 0
    m.requires_grad_(True)  # integer Parameters would raise


def test_scales_of_groups_can_be_learned():
    m = nn.Sequential(linear())
    octavo.prepare_(m, octavo.Int8WeightOnly(weights=SYMMETRIC), learn_scales=True)
    before = m[0].weight_scale.detach().clone()
    assert before.shape == (6, 3)
    m(X).square().sum().backward()
    torch.optim.SGD(m.parameters(), 1e-4).step()
    assert not torch.equal(m[0].weight_scale, before)
    with torch.no_grad():
        expected = m(X)
        octavo.freeze_(m)
        assert_bits_equal(m(X), expected)


def test_zero_points_cannot_be_learned():
    m = nn.Sequential(linear())
    before = m[0]
    with pytest.raises(ValueError, match="zero points, which cannot be learned; use learn_scales=False"):
        octavo.prepare_(m, octavo.Int8WeightOnly(weights=AFFINE), learn_scales=True)
    assert m[0] is before


def test_an_int32_bias_needs_one_scale_for_each_row():
    with pytest.raises(ValueError, match="rows of Group4 have several; use int32_bias=False"):
        octavo.Int8Static(int32_bias=True, weights=SYMMETRIC)


@every_scheme
def test_a_scheme_with_it_survives_json(scheme):
    assert from_dict(scheme.to_dict()) == scheme


@every_scheme
@pytest.mark.parametrize("prepared", [False, True], ids=["frozen", "prepared"])
def test_a_file_brings_back_the_same_bits(scheme, prepared, tmp_path):
    """Into a skeleton without memory; names and dtypes in the file are the format's."""
    m = nn.Sequential(linear())
    if prepared:
        octavo.prepare_(m, scheme)
        for _ in range(scheme.calibration_passes):
            with torch.no_grad(), octavo.calibrating(m):
                m(X)
    else:
        octavo.quantize_(m, scheme, data=X)
    octavo.save(m, tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(21, 6))
    loaded = octavo.load(tmp_path, skeleton)
    assert type(loaded[0]) is type(m[0]) and loaded[0].scheme == m[0].scheme
    with torch.no_grad():
        assert_bits_equal(loaded(X), m(X))
    for name, tensor in m.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@every_scheme
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_compute_the_same_bits(scheme, copied):
    layer = frozen(scheme)
    assert_bits_equal(copied(layer)(X), layer(X))


@every_scheme
def test_state_dicts_hold_the_canonical_form_packed_or_not(scheme):
    layer = frozen(scheme)
    assert layer.is_packed
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert state["weight_packed"].dtype == torch.uint8 and state["weight_packed"].shape == (6, 11)
    expected = layer(X)
    layer.unpack_()
    assert not layer.is_packed and layer.state_dict().keys() == state.keys()
    assert_bits_equal(layer(X), expected)
    for assign in (False, True):
        other = frozen(scheme)
        other.load_state_dict(state, assign=assign)
        assert other.is_packed
        assert_bits_equal(other(X), expected)


@pytest.mark.parametrize("name, value", [("weight_scale", float("nan")), ("weight_scale", -1.0)])
def test_a_layer_refuses_scales_that_are_none_and_stays_as_it_was(name, value):
    layer = frozen(octavo.Int8Dynamic(weights=SYMMETRIC))
    expected, state = layer(X), layer.state_dict()
    state[name] = torch.full_like(state[name], value)
    with pytest.raises(RuntimeError, match="values that are no scales"):
        layer.load_state_dict(state)
    assert_bits_equal(layer(X), expected)


def test_scales_keep_their_dtype_and_the_bias_follows():
    layer = frozen(octavo.Int8Dynamic(weights=AFFINE)).to(torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert dtypes == {
        "weight_packed": torch.uint8,
        "weight_scale": torch.float32,
        "weight_zero_point": torch.uint8,
        "bias": torch.bfloat16,
    }
    assert layer(X.bfloat16()).dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16


def test_the_tensors_alone_do_not_tell_the_shape_so_it_must_be_given():
    layer = frozen(octavo.Int8Dynamic(weights=SYMMETRIC))
    tensors, bias = layer.canonical_tensors(), layer.bias
    with pytest.raises(ValueError, match="give shape="):
        QuantLinear.from_tensors(tensors, bias, layer.scheme)
    again = QuantLinear.from_tensors(tensors, bias, layer.scheme, shape=(6, 21))
    assert_bits_equal(again(X), layer(X))


# --- a whole model --------------------------------------------------------------------------------------------------


@every_scheme
def test_a_model_is_quantized_reported_compared_and_corrected(scheme):
    reference = model().eval()
    m = octavo.quantized(reference, scheme, data=IDS)
    found = octavo.compare(reference, m, IDS)
    assert [layer.name for layer in found.layers] == LINEARS
    assert all(layer.local_sqnr_db > 0 for layer in found.layers), found
    before = (m(IDS) - reference(IDS)).mean((0, 1)).norm()
    octavo.correct_bias_(m, reference, IDS)
    assert (m(IDS) - reference(IDS)).mean((0, 1)).norm() <= before


@both_formats
def test_bytes_are_those_of_the_format_in_memory_and_in_the_file(weights, tmp_path):
    m = model()
    report = octavo.quantize_(m, octavo.Int8Dynamic(weights=weights))
    assert [row.name for row in report.quantized] == LINEARS
    layers = [m.get_submodule(name) for name in LINEARS]
    counts = sum(layer.in_features * layer.out_features for layer in layers)
    groups = counts // weights.group_size
    memory = memory_of(m)
    assert (memory.codes, memory.scales, memory.zero_points) == (
        counts // 2,
        4 * groups,
        0 if weights.symmetric else groups,
    )
    bits = 4 + 8 * (4 + (not weights.symmetric)) / weights.group_size
    assert bits_per_weight(m) == bits
    octavo.save(m, tmp_path)
    contents = octavo.inspect_checkpoint(tmp_path)
    assert [layer.name for layer in contents.quantized] == LINEARS
    assert contents.bits_per_weight == bits


def test_sensitivity_and_choose_take_it_beside_int8():
    reference = model().eval()
    schemes = [octavo.Int8Dynamic(), octavo.Int8Dynamic(weights=SYMMETRIC)]
    found = octavo.sensitivity(reference, data=IDS, schemes=schemes, figure="error")
    assert len(found.rows) == 3 * len(LINEARS)
    # 720 bytes are the least. Layers as small as these take more in Int8, which pads them, than as floats.
    octavo.quantize_(reference, octavo.choose(found, budget=1000))
    layers = [reference.get_submodule(name) for name in LINEARS]
    assert {getattr(layer, "scheme", None) for layer in layers} == {None, schemes[1]}


def test_layers_of_several_formats_lie_in_one_model():
    m = model()
    octavo.quantize_(m, {"head": octavo.Int8Dynamic(weights=SYMMETRIC), "*": octavo.Int8Dynamic()})
    assert isinstance(m.head.scheme.weights, Group4)
    assert m(IDS).isfinite().all()


@every_scheme
def test_nothing_that_needs_a_kernel_takes_it(scheme):
    """Fusion puts an activation into the layer, whose own forward computes it, and changes nothing else."""
    layers = [frozen(scheme), frozen(scheme)]
    assert not can_be_joined(layers)
    m = octavo.quantized(nn.Sequential(linear(), nn.ReLU(), nn.Linear(6, 6)).eval(), scheme, data=X)
    expected = m(X)
    octavo.fuse_(m, X, blocks=True)
    assert_bits_equal(m(X), expected)


def test_a_format_that_compressed_tensors_has_no_words_for_is_not_passed_off_as_one_of_theirs():
    from octavo.files.compressed_tensors import quantization_config

    entry = quantization_config(octavo.quantized(model(), octavo.Int8Dynamic(weights=SYMMETRIC)))
    assert "quant_method" not in entry and "head" in entry["octavo"]["layers"]
