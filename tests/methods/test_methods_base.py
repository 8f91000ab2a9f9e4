# SPDX-License-Identifier: Apache-2.0
"""Other methods need no edit of the package: one that chooses scales, and one that learns from data first."""

import pytest
import torch
from asserts import assert_bits_equal
from models import IDS, model
from torch import nn
from toys import AFFINE, SYMMETRIC, Halved, Watching, ZeroIdle

import octavo
from octavo.nn import QuantLinear
from octavo.schemes import from_dict

X = torch.linspace(-2, 2, 5 * 16).reshape(5, 16).sin()
IDLE = torch.tensor([3, 4, 15])
X[:, IDLE] = 0.0
FORMATS = [octavo.formats.Int8(), SYMMETRIC, AFFINE]
every_format = pytest.mark.parametrize("weights", FORMATS, ids=octavo.schemes.label)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 8)


@every_format
def test_what_a_method_says_of_scales_holds_in_training_and_in_the_frozen_layer(weights):
    m, scheme = nn.Sequential(linear()), octavo.Int8WeightOnly(weights=weights, method=Halved())
    octavo.prepare_(m, scheme)
    covering = weights.qparams(linear().weight)
    assert torch.equal(m[0].weight_qparams.scale, covering.scale / 2)
    expected = m[0].fake_quantized_weight().detach()
    octavo.freeze_(m)
    assert_bits_equal(m[0].dequantize(), expected)
    assert type(m[0]) is QuantLinear and from_dict(scheme.to_dict()) == scheme


@every_format
def test_a_method_that_needs_data_sees_it_before_codes_are_chosen(weights):
    scheme = octavo.Int8Dynamic(weights=weights, method=ZeroIdle())
    assert scheme.needs_data and scheme.calibration_passes == 1
    with pytest.raises(ValueError, match="needs data"):
        octavo.quantized(linear(), scheme)
    layer = octavo.quantized(linear(), scheme, data=X)
    assert (layer.dequantize()[:, IDLE] == 0).all()
    assert layer.dequantize().count_nonzero() > 0 and type(layer) is QuantLinear


def test_it_goes_with_activations_that_calibrate_and_says_with_which_it_does_not():
    layer = octavo.quantized(linear(), octavo.Int8Static(method=ZeroIdle()), data=X)
    assert (layer.codes()[:, IDLE] == 0).all() and layer.input_scale != 1
    with pytest.raises(ValueError, match="ZeroIdle does not go with LLMInt8"):
        octavo.LLMInt8(method=ZeroIdle())


def test_what_was_learned_is_saved_with_the_prepared_layer(tmp_path):
    m = nn.Sequential(linear())
    octavo.prepare_(m, octavo.Int8Dynamic(method=ZeroIdle()))
    with torch.no_grad(), octavo.calibrating(m):
        m(X)
    octavo.save(m, tmp_path)
    loaded = octavo.load(tmp_path, nn.Sequential(nn.Linear(16, 8)))
    assert isinstance(loaded[0], Watching) and torch.equal(loaded[0].is_used, m[0].is_used)
    octavo.freeze_(loaded)
    assert (loaded[0].codes()[:, IDLE] == 0).all()


def test_models_with_it_are_compared_with_their_reference_as_others_are():
    """A layer whose codes are what the method makes of the reference's weight was not trained."""
    reference = model().eval()
    m = octavo.quantized(reference, octavo.Int8WeightOnly(method=Halved()))
    found = octavo.compare(reference, m, IDS)
    assert not any("differ" in note or "rescaled" in note for note in found.notes)
