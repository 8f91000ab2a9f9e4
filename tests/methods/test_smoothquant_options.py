# SPDX-License-Identifier: Apache-2.0
"""How SmoothQuant is written: which options it takes, which schemes it goes with, and what older files say."""

import math

import pytest
import torch
from torch import nn

import octavo


def attention() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))


def data() -> torch.Tensor:
    return torch.ones(2, 8)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda: octavo.Int8Dynamic(method=octavo.SmoothQuant(1.5)),
            ValueError,
            r"alpha must be a number in \[0, 1\] or several",
        ),
        (lambda: octavo.Int8Dynamic(method=octavo.SmoothQuant(())), ValueError, "alpha must be"),
        (
            lambda: octavo.Int8Dynamic(method=octavo.SmoothQuant("auto")),
            ValueError,
            "alpha must be.*got 'auto'",
        ),
        (lambda: octavo.Int8Dynamic(method=octavo.SmoothQuant(math.nan)), ValueError, "alpha must be"),
        (lambda: octavo.LLMInt8(method=octavo.SmoothQuant()), ValueError, "does not go with LLMInt8"),
        (lambda: octavo.Int8Dynamic(method=3), TypeError, "method is 3, accepted are .*octavo.SmoothQuant"),
        (
            lambda: octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=3)),
            TypeError,
            "fold must be True, False or a mapping",
        ),
        (lambda: octavo.Int8Dynamic(method=octavo.SmoothQuant(fold={})), TypeError, "fold must be"),
    ],
)
def test_bad_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_method_alone_is_no_scheme_and_the_error_says_how_to_write_it():
    message = r"goes with a scheme: octavo.Int8Dynamic\(method=octavo.SmoothQuant\(\)\)"
    for value in (octavo.SmoothQuant(), octavo.SmoothQuant):
        with pytest.raises(TypeError, match=message):
            octavo.quantize_(attention(), value, data=data())


def test_alphas_are_numbers_however_they_are_given():
    assert octavo.SmoothQuant((0.3, 1)).alpha == (0.3, 1.0)
    assert octavo.Int8Dynamic(method=octavo.SmoothQuant) == octavo.Int8Dynamic(method=octavo.SmoothQuant())


def test_files_from_when_smoothquant_was_a_scheme_around_another_are_read():
    then = {"name": "Int8Static", "weight_bits": 4, "symmetric": False}
    fields = {"name": "SmoothQuant", "weight_bits": 4, "alpha": [0.3, 0.5], "fold": True, "then": then}
    assert octavo.schemes.from_dict(fields) == octavo.Int8Static(
        symmetric=False, weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant((0.3, 0.5))
    )
