# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training on real input: what fewer bits cost after training, and what training wins back."""

import copy

import pytest
import torch
from torch import nn

import octavo
from octavo.lab.demo_data import Digits, load_digits, train_digit_classifier

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def model(digits) -> nn.Module:
    return train_digit_classifier(digits)


def scheme(bits: int, symmetric: bool = True) -> octavo.Int8Static:
    return octavo.Int8Static(symmetric=symmetric, weights=octavo.formats.CoarseInt8(bits))


def loss(model: nn.Module, digits: Digits) -> torch.Tensor:
    return nn.functional.cross_entropy(model(digits.train_x), digits.train_labels)


def divergence(reference: nn.Module, model: nn.Module, digits: Digits) -> float:
    """KL(reference || model) over the test images, in nats."""
    with torch.no_grad():
        expected, found = (m(digits.test_x).log_softmax(-1) for m in (reference, model))
    return nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()


def trained(
    model: nn.Module, digits: Digits, bits: int, epochs: int = 5, symmetric: bool = True, **options
) -> nn.Module:
    """A copy of `model`, calibrated, trained through its rounding and frozen."""
    model = copy.deepcopy(model)
    octavo.prepare_(model, scheme(bits, symmetric), **options)
    with torch.no_grad(), octavo.calibrating(model):
        model(digits.train_x)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    shuffle = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits.train_x), generator=shuffle).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(digits.train_x[batch]), digits.train_labels[batch]).backward()
            optimizer.step()
    octavo.freeze_(model)
    return model


def test_each_bit_less_of_the_weights_moves_the_outputs_further(model, digits):
    found = [
        divergence(model, octavo.quantized(model, scheme(bits), data=digits.train_x), digits)
        for bits in (8, 6, 4, 3, 2)
    ]
    assert found == sorted(found) and found[0] < 1e-3 < found[-1]


@pytest.mark.parametrize("options", [{}, {"estimator": "pure"}, {"learn_scales": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 2])
def test_training_through_the_rounding_lowers_the_loss_that_rounding_has_raised(model, digits, bits, options):
    """W4A8 and W2A8: the loss is the one that is trained, so its order does not hang on 540 test images."""
    after_rounding = octavo.quantized(model, scheme(bits), data=digits.train_x)
    after_training = trained(model, digits, bits, **options)
    assert loss(after_training, digits) < loss(after_rounding, digits)
    if bits == 2:
        lost = digits.accuracy(model) - digits.accuracy(after_rounding)
        assert lost > 0.05
        assert digits.accuracy(model) - digits.accuracy(after_training) < lost / 2


def test_learned_scales_and_zero_points_train_as_well(model, digits):
    """W2A8 with affine inputs, whose zero points move."""
    after_rounding = octavo.quantized(model, scheme(2, symmetric=False), data=digits.train_x)
    after_training = trained(model, digits, 2, symmetric=False, learn_scales=True)
    assert loss(after_training, digits) < loss(after_rounding, digits)
    lost = digits.accuracy(model) - digits.accuracy(after_rounding)
    assert digits.accuracy(model) - digits.accuracy(after_training) < lost / 2


def test_eight_bits_need_no_training_and_lose_nothing_by_it(model, digits):
    """W8A8: rounding costs nothing that 540 images could show, and training goes on as in float."""
    after_rounding = octavo.quantized(model, scheme(8), data=digits.train_x)
    assert abs(digits.accuracy(after_rounding) - digits.accuracy(model)) <= 3 / 540
    assert loss(trained(model, digits, 8), digits) < loss(after_rounding, digits)
