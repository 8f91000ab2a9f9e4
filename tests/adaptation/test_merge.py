# SPDX-License-Identifier: Apache-2.0
"""Merging: what is rounded, what is exact, what the receipt says of it, and what is refused."""

import math

import pytest
import torch
from adapted import (
    ADAPTERS,
    CASES,
    PEFT,
    SCHEMES,
    inputs,
    peft_base,
    peft_outputs,
    quantized_network,
    train_a_little_,
)

import octavo
from octavo.nn import QuantLinear


def adapted(scheme, adapter, size=0.1):
    model = quantized_network(SCHEMES[scheme])
    octavo.adapt_(model, ADAPTERS[adapter])
    train_a_little_(model, size=size)
    return model


@pytest.mark.parametrize("case", CASES)
def test_float_layers_become_those_of_peft(case):
    """The tensors that PEFT has merged; products of at most 6 terms, one addition, and for DoRA a length."""
    model, outputs = peft_base(), peft_outputs()
    octavo.load_adapter(model, PEFT / case)
    receipt = octavo.merge_(model)
    for name, value in model.state_dict().items():
        expected = outputs[f"{case}/merged/{name}"]
        assert (value - expected).abs().max() <= 16 * 2.0**-24 * expected.abs().max(), name
    assert receipt.survival == pytest.approx(1, abs=1e-6)
    assert {row.how for row in receipt.rows} == {"float"}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_merged_layer_is_the_nearest_one_and_the_receipt_is_right(scheme, adapter):
    model = adapted(scheme, adapter)
    before = quantized_network(SCHEMES[scheme])
    layers = {name: getattr(model, name) for name in ("fc1", "fc2")}
    weights = {}
    with torch.no_grad():
        for name, layer in layers.items():
            own, base = layer.adapters.default, layer.base
            weights[name] = own.merged(own.merged_input(base.dequantize(), 1.0), 1.0, base)
    receipt = octavo.merge_(model, min_survival=0)
    assert [row.name for row in receipt.rows] == ["fc1", "fc2"]
    for row in receipt.rows:
        new, old = getattr(model, row.name), getattr(before, row.name)
        assert type(new) is type(old) and new.is_packed and new.scheme == old.scheme
        change = (weights[row.name] - old.dequantize()).double()
        kept = (new.dequantize() - old.dequantize()).double()
        assert row.survival == pytest.approx(float((kept * change).sum() / change.square().sum()), rel=1e-6)
        if row.how == "requantized":
            weights_format = new.scheme.weights
            q = weights_format.stored_qparams(weights_format.qparams(weights[row.name])).quantize(
                weights[row.name]
            )
            assert torch.equal(new.dequantize(), q.dequantize())
    text = str(receipt)
    assert f"{receipt.survival:.1%} of the adapter survived" in text and "fc2" in text


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_factors_of_outputs_go_into_the_scales_of_int8(sign):
    """One rounding of each scale, one of each bias, and the output's own."""
    model = adapted("int8", "ia3")
    with torch.no_grad():
        model.fc1.adapters.default.factors[::2] *= sign
        model.fc2.adapters.default.factors[3] = 0
    x = inputs()
    expected = [model.fc1(x), model.fc2(torch.ones(1, 64))]
    receipt = octavo.merge_(model)
    assert {row.how for row in receipt.rows} == {"exact"}
    found = [model.fc1(x), model.fc2(torch.ones(1, 64))]
    for y, wanted in zip(found, expected, strict=True):
        assert (y - wanted).abs().max() <= 4 * 2.0**-24 * wanted.abs().max()
    assert isinstance(model.fc1, QuantLinear)
    assert torch.equal(found[1][:, 3], torch.zeros(1))


def test_little_changes_drown_in_four_bits_and_are_refused():
    """A change of a thousandth of a step moves few codes. The model stays as it was."""
    model = quantized_network(octavo.Int4WeightOnly(group_size=16, method=octavo.RoundToNearest()))
    octavo.adapt_(model, ADAPTERS["lora"])
    with torch.no_grad():
        for layer in (model.fc1, model.fc2):
            layer.adapters.default.B.normal_(std=1e-4)
    x = inputs()
    expected, before = model(x), repr(model)
    with pytest.raises(ValueError, match="would survive the rounding.*more bits.*min_survival=0"):
        octavo.merge_(model, min_survival=2.0)
    assert repr(model) == before and torch.equal(model(x), expected)


def test_the_receipt_has_the_divergences_on_data():
    model = adapted("int8", "lora", size=0.3)
    x = inputs(16)
    with_adapter = model(x)
    with octavo.use_adapters(model, None):
        without = model(x)
    receipt = octavo.merge_(model, data=x)
    expected = [octavo.metrics.kld(with_adapter, each).mean().item() for each in (without, model(x))]
    assert [receipt.kld_before, receipt.kld_after] == pytest.approx(expected)
    assert receipt.kld_after < receipt.kld_before
    assert "KL divergence" in str(receipt)
    assert math.isclose(receipt.to_dict()["survival"], receipt.survival)


def test_one_of_several_adapters_is_merged_by_name():
    model = adapted("half", "lora")
    octavo.adapt_(model, octavo.LoRA(r=1), "other")
    with octavo.use_adapters(model, "default"):
        expected = model(inputs())
    octavo.merge_(model, "default", min_survival=0)
    assert isinstance(model.fc1, QuantLinear)
    assert (model(inputs()) - expected).abs().max() < 0.05 * expected.abs().max()


def test_what_cannot_be_merged_is_refused():
    model = quantized_network()
    with pytest.raises(ValueError, match="no adapter counts"):
        octavo.merge_(model)
    octavo.adapt_(model, octavo.LoRA())
    with pytest.raises(ValueError, match="no adapter 'other'"):
        octavo.merge_(model, "other")
    outliers = quantized_network(octavo.LLMInt8(1.0))
    octavo.adapt_(outliers, octavo.LoRA(r=1))
    train_a_little_(outliers)
    with pytest.raises(ValueError, match="outlier columns"):
        octavo.merge_(outliers)
    with torch.no_grad():
        model.fc1.adapters.default.A[0, 0] = torch.nan
        model.fc1.adapters.default.B.fill_(1.0)
    with pytest.raises(ValueError, match="NaN"):
        octavo.merge_(model)
