# SPDX-License-Identifier: Apache-2.0
"""Factors that folding and equalization moved between layers are found again, exactly, or nothing is claimed."""

import copy

import pytest
import torch
from asserts import assert_within
from torch import nn

import octavo
from octavo.methods.rescaling import Factors, Rescaling


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = seeded(64, 8) * torch.tensor([1.0, 1, 1, 20, 1, 1, 0.1, 1])


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.ReLU(), nn.Linear(16, 5)
    ).to(dtype)


LAYERS = ("0", "2", "4")


def rescale_(model: nn.Sequential, seed: int = 1) -> dict[str, torch.Tensor]:
    """Moves known factors from layer to layer, powers of 2 so that nothing rounds; returns those of each pair."""
    factors = {}
    with torch.no_grad():
        for first, second in ((model[0], model[2]), (model[2], model[4])):
            s = 2.0 ** torch.randint(
                -3, 4, (first.out_features,), generator=torch.Generator().manual_seed(seed)
            )
            first.weight.div_(s[:, None])
            if first.bias is not None:
                first.bias.div_(s)
            second.weight.mul_(s)
            factors[len(factors)] = s
    return factors


def found(reference: nn.Module, model: nn.Module, x: torch.Tensor = X) -> dict[str, Factors | None]:
    pairs = {name: (reference.get_submodule(name), model.get_submodule(name)) for name in LAYERS}
    rescaling = Rescaling(reference, model, pairs)
    with torch.no_grad():
        rescaling.look_at((x,), {})
    return {name: rescaling.factors(name) for name in LAYERS}


SCHEMES = [
    octavo.Int8Dynamic(),
    octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(2)),
    octavo.Int8WeightOnly(weights=octavo.formats.CoarseInt8(4)),
    octavo.LLMInt8(),
    octavo.Int8Static(),
    octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=False)),
]
every_way = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)


@every_way
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "prepared"])
def test_known_factors_are_found_to_float_rounding(scheme, is_frozen):
    """2^-18: sums of up to 24 float32 products on either side of a ratio."""
    reference, model = mlp(), mlp()
    first, second = rescale_(model).values()
    if is_frozen:
        octavo.quantize_(model, scheme, data=X)
    else:
        octavo.prepare_(model, scheme)
        for _ in range(getattr(scheme, "calibration_passes", 1)):
            with octavo.calibrating(model), torch.no_grad():
                model(X)
    factors = found(reference, model)
    assert factors["0"].input is None and factors["4"].output is None
    for name, expected in (("0", first), ("2", second)):
        assert_within(factors[name].output, expected, 2**-18 * expected)
    for name, expected in (("2", first), ("4", second)):
        assert_within(factors[name].input, expected, 2**-18 * expected)


@every_way
def test_a_layer_that_was_made_of_its_counterpart_has_none(scheme):
    reference = mlp()
    model = octavo.quantized(reference, scheme, data=X)
    assert all(factors.are_ones for factors in found(reference, model).values())


def test_nothing_is_run_where_nothing_was_rescaled():
    reference = mlp()
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    runs = []
    reference.register_forward_hook(lambda *call: runs.append(call))
    found(reference, model)
    assert not runs


def test_channels_that_a_relu_keeps_at_zero_have_factors_too():
    reference, model = mlp(), mlp()
    with torch.no_grad():
        for each in (reference, model):
            each[0].bias[:4] = -1e4  # never above zero on the data
    first, _ = rescale_(model).values()
    octavo.quantize_(model, octavo.Int8Dynamic())
    factors = found(reference, model)
    assert_within(factors["0"].output, first, 2**-18 * first)
    assert_within(factors["2"].input, first, 2**-18 * first)


def test_one_row_is_enough():
    reference, model = mlp(), mlp()
    first, second = rescale_(model).values()
    octavo.quantize_(model, octavo.Int8Dynamic())
    factors = found(reference, model, X[:1])
    assert_within(factors["2"].input, first, 2**-18 * first)
    assert_within(factors["4"].input, second, 2**-18 * second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_found_as_closely_as_they_round(dtype):
    reference, model = mlp(dtype), mlp(dtype)
    first, _ = rescale_(model).values()
    octavo.quantize_(model, octavo.Int8Dynamic())
    factors = found(reference, model, X.to(dtype))
    assert_within(factors["0"].output, first, torch.finfo(dtype).eps * first)


def test_trained_weights_have_no_factors_and_the_result_says_that_they_differ():
    reference, model = mlp(), mlp()
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(0.9).add_(0.02 * seeded(*layer.weight.shape))
    octavo.quantize_(model, octavo.Int8Dynamic())
    assert all(factors.are_ones for factors in found(reference, model).values())
    assert (
        "the weights differ from the reference's by more than rounding: 0, 2, 4"
        in octavo.compare(reference, model, X).notes
    )


def test_models_are_left_as_they_were():
    reference, model = mlp(), mlp()
    rescale_(model)
    octavo.quantize_(model, octavo.Int8Dynamic())
    before = [copy.deepcopy(each.state_dict()) for each in (reference, model)]
    found(reference, model)
    for each, state in zip((reference, model), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in each.state_dict().items())
        assert not any(module._forward_hooks for module in each.modules())
