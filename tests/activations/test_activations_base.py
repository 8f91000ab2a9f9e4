# SPDX-License-Identifier: Apache-2.0
"""Another way to read the input, and a scheme that names it, need no edit of the package."""

import copy

import pytest
import torch
from asserts import assert_bits_equal
from models import IDS, LINEARS, model
from torch import nn
from torch.nn import functional as F
from toys import FourBits, ToyScheme

import octavo
from octavo.files.compressed_tensors import quantization_config
from octavo.nn.fused.shared_input import can_be_joined
from octavo.schemes import by_name, from_dict

X = torch.linspace(-2, 2, 5 * 64).reshape(5, 64).sin() * 2


@pytest.fixture
def layer():
    return octavo.quantized(nn.Linear(64, 32), ToyScheme())


def test_int8_weights_are_packed_and_multiplied_as_floats_where_there_is_no_kernel(layer):
    """The values that the codes stand for: five rows of at most 15 different ones."""
    assert layer.is_packed and layer.codes().dtype == torch.int8
    x = FourBits().fake_quantize(X, layer)
    assert all(len(row.unique()) <= 15 for row in x) and not torch.equal(x, X)
    assert_bits_equal(layer(X), F.linear(x, layer.dequantize(), layer.bias))
    layer.activation = "relu"
    assert_bits_equal(layer(X), F.linear(x, layer.dequantize(), layer.bias).relu())
    assert not can_be_joined([layer, copy.deepcopy(layer)])


def test_training_sees_what_freezing_gives():
    m = nn.Sequential(nn.Linear(64, 32))
    octavo.prepare_(m, ToyScheme())
    with torch.no_grad():
        expected = m(X)
        octavo.freeze_(m)
        assert_bits_equal(m(X), expected)


def test_the_scheme_has_a_name_in_python_in_json_and_on_the_command_line():
    scheme = ToyScheme(method=octavo.SmoothQuant())
    assert from_dict(scheme.to_dict()) == scheme
    assert by_name("toy-scheme") == ToyScheme()


def test_a_model_is_quantized_saved_and_loaded(tmp_path):
    m = octavo.quantized(model().eval(), "toy-scheme")
    octavo.save(m, tmp_path)
    loaded = octavo.load(tmp_path, model().eval())
    assert_bits_equal(loaded(IDS), m(IDS))
    assert [layer.name for layer in octavo.compare(model().eval(), m, IDS).layers] == LINEARS


def test_activations_that_compressed_tensors_has_no_words_for_are_not_passed_off_as_floats():
    assert "quant_method" not in quantization_config(octavo.quantized(model(), ToyScheme()))
    written = quantization_config(octavo.quantized(model(), octavo.Int8WeightOnly()))
    assert written["config_groups"]["group_0"]["input_activations"] is None
