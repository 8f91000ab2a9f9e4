# SPDX-License-Identifier: Apache-2.0
"""Schemes of groups: names, JSON, what follows from a group size, and a model that goes through everything."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import octavo
from octavo.activations import Dynamic, SixteenBits
from octavo.formats import Int8, IntGroup
from octavo.schemes import by_name, from_dict, label

NAMES = {
    "int4-weight-only": octavo.Int4WeightOnly(),
    "int4-weight-only:bits=3,group_size=64": octavo.Int4WeightOnly(64, 3),
    "Int4Dynamic:symmetric=false,group_size=null": octavo.Int4Dynamic(None, symmetric=False),
    "int4-dynamic:scale_dtype=bfloat16": octavo.Int4Dynamic(scale_dtype="bfloat16"),
    "int8-dynamic:group_size=32": octavo.Int8Dynamic(group_size=32),
    "int8-dynamic:activation_group_size=64": octavo.Int8Dynamic(activation_group_size=64),
}


def test_a_scheme_survives_its_name_json_and_its_label():
    for text, scheme in NAMES.items():
        assert by_name(text) == scheme and hash(by_name(text)) == hash(scheme)
        assert from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
        assert eval(f"octavo.{label(scheme)}" + ("" if "(" in label(scheme) else "()")) == scheme
    assert label(octavo.Int8Dynamic(group_size=32)) == "Int8Dynamic(group_size=32)"
    assert label(octavo.Int4WeightOnly(64, 3)) == "Int4WeightOnly(64, bits=3)"


def test_weights_and_activations_follow_from_the_fields():
    assert octavo.Int8Dynamic(group_size=32).weights == IntGroup(8, 32)
    assert octavo.Int8Dynamic(activation_group_size=32).weights == Int8()
    assert octavo.Int4WeightOnly(64, 3).weights == IntGroup(3, 64)
    assert octavo.Int4WeightOnly().activations == SixteenBits()
    # Kernels cut the input at multiples of 32.
    sizes = {16: 32, 32: 32, 48: 64, 128: 128, None: None}
    for group_size, expected in sizes.items():
        assert octavo.Int4Dynamic(group_size).activations == Dynamic(group_size=expected)
        assert octavo.Int8Dynamic(group_size=group_size).activations == Dynamic(group_size=expected)
    both = octavo.Int8Dynamic(group_size=128, activation_group_size=32)
    assert (both.weights, both.activations) == (IntGroup(8, 128), Dynamic(group_size=32))


def test_a_scheme_takes_other_weights():
    weights = IntGroup(5, 48, False, "float32")
    assert octavo.Int4Dynamic().with_weights(weights) == octavo.Int4Dynamic(
        48, 5, False, scale_dtype="float32"
    )
    assert octavo.Int8Dynamic().with_weights(weights) == octavo.Int8Dynamic(weights=weights)
    assert dataclasses.replace(octavo.Int4Dynamic(64), bits=3).weights == IntGroup(3, 64)


@pytest.mark.parametrize(
    "options, text",
    [
        (
            {"group_size": 24},
            "Int8Dynamic: group_size must be a multiple of 16, got 24; None is the whole row",
        ),
        ({"activation_group_size": 16}, "activation_group_size must be a multiple of 32, got 16"),
        (
            {"group_size": 32, "symmetric": False},
            "groups of activations have symmetric codes; use symmetric=True",
        ),
        (
            {"group_size": 32, "weights": IntGroup(4, 64)},
            r"group_size is 32 and the weights are IntGroup\(group_size=64\)",
        ),
        ({"group_size": 32, "weights": octavo.formats.CoarseInt8(4)}, "give one of the two"),
    ],
)
def test_what_contradicts_itself_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        octavo.Int8Dynamic(**options)


def test_activations_in_groups_have_symmetric_codes():
    with pytest.raises(ValueError, match="symmetric codes"):
        Dynamic(False, 32)
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        Dynamic(group_size=48)


def test_sensitivity_weighs_bits_and_choose_mixes_them():
    """Layers whose packed form has no padding, so that fewer bits are fewer bytes."""
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)
    ).eval()
    schemes = [
        octavo.Int8Dynamic(group_size=32),
        octavo.Int4WeightOnly(16),
        octavo.Int4WeightOnly(16, 2, symmetric=False),
    ]
    x = torch.randn(8, 64)
    found = octavo.sensitivity(reference, data=x, schemes=schemes, figure="error")
    sizes = [sum(row.packed_bytes for row in found.rows if row.scheme == scheme) for scheme in schemes]
    assert sizes[0] > sizes[1] > sizes[2]
    octavo.quantize_(reference, octavo.choose(found, budget=(sizes[0] + sizes[2]) // 2))
    assert len({reference[i].scheme for i in (0, 2, 4)}) > 1


def test_groups_of_activations_keep_an_outlier_to_themselves():
    """An input a thousand times as large as the others costs them their codes, or those of its own group only."""
    torch.manual_seed(0)
    linear, x = nn.Linear(256, 64, bias=False), torch.randn(8, 256)
    x[:, 5] *= 1000
    linear.weight.data[:, :32] = 0
    y = linear(x)
    errors = [
        (octavo.quantized(linear, scheme)(x) - y).norm() / y.norm()
        for scheme in (octavo.Int8Dynamic(), octavo.Int8Dynamic(activation_group_size=32))
    ]
    assert errors[0] > 0.5 and errors[1] < 0.01
