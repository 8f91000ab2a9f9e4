# SPDX-License-Identifier: Apache-2.0
"""Bias correction: no output is off on average any more, in any layer, with any scheme, and the rest is as it was."""

import copy

import pytest
import torch
from asserts import assert_equal, assert_unchanged, assert_within, model_state
from models import bias_error, every_scheme
from torch import nn

import octavo


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BATCHES = [
    seeded(30, 12, seed=i).abs() for i in range(3)
]  # not centred: errors of the weights add up to a shift


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.ReLU(), nn.Linear(24, 5)
    )


def coarse(scheme=octavo.Int8Dynamic()) -> tuple[nn.Sequential, nn.Sequential]:
    """The float model and one with weights of 3 bits."""
    import dataclasses

    reference = mlp()
    return reference, octavo.quantized(
        reference, dataclasses.replace(scheme, weights=octavo.formats.CoarseInt8(3)), data=BATCHES
    )


def outputs(model: nn.Sequential) -> dict[str, torch.Tensor]:
    """What each layer gives for all batches, float64."""
    x, result = torch.cat(BATCHES), {}
    with torch.no_grad():
        for name, layer in model.named_children():
            x = layer(x)
            result[name] = x.double()
    return {name: result[name] for name in ("0", "2", "4")}


def output_factors(reference: nn.Sequential, scheme) -> dict[str, torch.Tensor | float]:
    """What a layer of the float model gives, over what the same layer gives once calibration has folded s into it."""
    folded = copy.deepcopy(reference)
    octavo.prepare_(folded, scheme)
    if scheme.needs_data:
        with octavo.calibrating(folded), torch.no_grad():
            for x in BATCHES:
                folded(x)
    ratios = {
        name: reference.get_submodule(name).weight / folded.get_submodule(name).weight
        for name in ("0", "2", "4")
    }
    return {name: ratio[:, 0].detach().double() for name, ratio in ratios.items()}


def oracle(reference: nn.Sequential, model: nn.Sequential) -> dict[str, torch.Tensor]:
    """E[y' - y] of each layer, with the layers before it corrected already; `model` is changed."""
    shifts = {}
    for name in ("0", "2", "4"):
        shifts[name] = (outputs(model)[name] - outputs(reference)[name]).mean(0)
        layer = model.get_submodule(name)
        old = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        layer.bias = nn.Parameter((old - shifts[name]).float(), requires_grad=False)
    return shifts


@every_scheme
def test_no_layer_is_off_on_average_and_errors_do_not_grow(scheme):
    """The mean of 90 outputs after one rounding of the bias: 1e-6 and more is a mistake, half a step if it is an int32.
    What a layer gives is closer, by the square of the shift, on inputs that stay the same: those of the first. A shift
    that is off by d gains d^2 less."""
    reference, model = coarse(scheme)
    factors = output_factors(reference, scheme)
    before, exact = outputs(model), {name: y / factors[name] for name, y in outputs(reference).items()}
    shifts = octavo.correct_bias_(model, reference, BATCHES)
    after = outputs(model)
    assert list(shifts) == ["0", "2", "4"]
    for name in shifts:
        bound = 1e-6 + bias_error(model.get_submodule(name))
        assert_within((after[name] - exact[name]).mean(0), torch.zeros(len(shifts[name])), bound)
    gained = (before["0"] - exact["0"]).square().mean(0) - (after["0"] - exact["0"]).square().mean(0)
    assert_within(gained, shifts["0"].double().square(), 1e-6 + bias_error(model[0]).square())


def test_shifts_are_those_of_the_oracle_layer_by_layer():
    reference, model = coarse()
    expected = oracle(reference, copy.deepcopy(model))
    shifts = octavo.correct_bias_(model, reference, iter(BATCHES))
    for name, shift in shifts.items():
        assert shift.abs().max() > 1e-3, "there should be something to correct"
        assert_within(shift, expected[name], 1e-6)


def test_a_layer_without_bias_gets_one_which_files_keep(tmp_path):
    reference, model = coarse()
    octavo.correct_bias_(model, reference, BATCHES)
    assert model[2].bias is not None and not model[2].bias.requires_grad
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = mlp()
    loaded = octavo.load(tmp_path, skeleton)
    assert torch.equal(loaded(BATCHES[0]), model(BATCHES[0]))


def test_only_biases_change():
    reference, model = coarse()
    codes, reference_before = [layer.codes() for layer in model[::2]], model_state(reference)
    octavo.correct_bias_(model.train(), reference, BATCHES)
    for layer, before in zip(model[::2], codes, strict=True):
        assert_equal(layer.codes(), before)
    assert_unchanged(reference, reference_before)
    assert model.training and all(module.training for module in model.modules())


def test_a_prepared_model_is_corrected_before_it_is_trained_or_frozen():
    reference, model = mlp(), mlp()
    octavo.prepare_(model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)))
    octavo.correct_bias_(model, reference, BATCHES)
    assert model[2].bias.requires_grad
    expected = model(BATCHES[0]).detach()
    octavo.freeze_(model)
    assert_within(model(BATCHES[0]), expected, 2**-18)  # float rounding of 24 products of about 1


def test_a_prepared_layer_keeps_the_bias_that_an_optimizer_has():
    reference, model = mlp(), mlp()
    octavo.prepare_(model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)))
    bias, before = model[0].bias, model[0].bias.detach().clone()
    shifts = octavo.correct_bias_(model, reference, BATCHES)
    assert model[0].bias is bias
    assert_within(bias.detach(), before - shifts["0"], 2**-22)


def test_a_bias_that_is_tied_to_another_is_not_written_to():
    reference, model = mlp(), mlp()
    reference[2].bias = reference[0].bias
    model[2].bias = model[0].bias
    octavo.prepare_(model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)))
    shifts = octavo.correct_bias_(model, reference, BATCHES)
    for name in ("0", "2"):
        found = model.get_submodule(name).bias.detach()
        assert_within(found, reference[0].bias.detach() - shifts[name], 2**-22)


def test_an_error_on_the_way_takes_the_corrections_back():
    reference, model = mlp(), mlp()
    octavo.prepare_(model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)))
    with torch.no_grad():
        model[4].weight[0] *= 1e38
    before = model_state(model)
    with pytest.raises(ValueError, match="layer '4' gives NaN or Inf"):
        octavo.correct_bias_(model, reference, [batch * 1e10 for batch in BATCHES])
    assert_unchanged(model, before)


def test_quantizing_every_output_of_all_positive_inputs_gains():
    reference, model = coarse()
    before = octavo.compare(reference, model, BATCHES).output.sqnr_db
    octavo.correct_bias_(model, reference, BATCHES)
    assert octavo.compare(reference, model, BATCHES).output.sqnr_db > before + 1


def bad_data():
    reference, model = coarse()
    return model, reference, [BATCHES[0], torch.full((2, 12), torch.nan)]


def other_reference():
    _, model = coarse()
    return model, nn.Sequential(nn.Linear(12, 23)), BATCHES


def empty_data():
    reference, model = coarse()
    return model, reference, []


@pytest.mark.parametrize(
    "make, text",
    [
        (bad_data, "layer '0' gives NaN or Inf on this data"),
        (other_reference, "reference has no linear layer '0' with 24 outputs"),
        (empty_data, "data is empty"),
        (lambda: (mlp(), mlp(), BATCHES), "model has no quantized layers"),
    ],
)
def test_what_cannot_be_corrected_is_refused_and_the_model_stays(make, text):
    model, reference, data = make()
    before = model_state(model)
    with pytest.raises(ValueError, match=text):
        octavo.correct_bias_(model, reference, data)
    assert_unchanged(model, before)


def test_only_modules_are_taken_and_progress_shows_a_bar(capsys):
    with pytest.raises(TypeError, match="reference is list"):
        octavo.correct_bias_(mlp(), [], BATCHES)
    reference, model = coarse()
    octavo.correct_bias_(model, reference, BATCHES, progress=True)
    assert "correcting biases" in capsys.readouterr().err


# --- rescaled layers ------------------------------------------------------------------------------------------------

X = seeded(256, 8) * 3


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


def equalized(scheme):
    model = wide()
    octavo.equalize_(model, X)
    return octavo.quantized(model, scheme, data=X)


def loaded(scheme, folder):
    octavo.save(octavo.quantized(wide(), scheme, data=X), folder)
    return octavo.load(folder, wide())


def prepared(scheme):
    model = wide()
    octavo.prepare_(model, scheme)
    for _ in range(scheme.calibration_passes):
        with octavo.calibrating(model), torch.no_grad():
            model(X)
    return model


RESCALED = {
    "folded": lambda folder: octavo.quantized(
        wide(), octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant()), data=X
    ),
    "folded_static": lambda folder: octavo.quantized(
        wide(), octavo.Int8Static(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant()), data=X
    ),
    "folded_prepared": lambda folder: prepared(
        octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant())
    ),
    "folded_loaded": lambda folder: loaded(
        octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant()), folder
    ),
    "equalized": lambda folder: equalized(octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4))),
    "equalized_and_smoothed": lambda folder: equalized(
        octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant(fold=False))
    ),
    "equalized_and_folded": lambda folder: equalized(
        octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant())
    ),
    "equalized_with_outliers": lambda folder: equalized(octavo.LLMInt8(weights=octavo.formats.CoarseInt8(4))),
}
rescaled = pytest.mark.parametrize("make", RESCALED.values(), ids=RESCALED)


@rescaled
def test_a_rescaled_model_is_corrected_as_well_as_in_its_own_units(make, tmp_path):
    """The last layer reads x / s and gives y itself, so its mean over the data is exact afterwards: 1e-6 is what one
    rounding of the bias leaves of a mean below 1."""
    reference, model = wide(), make(tmp_path)
    before = octavo.compare(reference, model, X).output
    octavo.correct_bias_(model, reference, X)
    after = octavo.compare(reference, model, X).output
    with torch.no_grad():
        off = (model(X).double() - reference(X).double()).mean(0)
    assert_within(off, torch.zeros(8), 1e-6 + (bias_error(model[3]) if hasattr(model[3], "codes") else 0))
    assert after.sqnr_db > before.sqnr_db


def float_units(case: str) -> torch.Tensor:
    """What layer 1 of the float model gives, over what it gives once the float model is folded or equalized [32]."""
    model = wide()
    if "equalized" in case:
        octavo.equalize_(model, X)
    if "folded" in case:
        octavo.prepare_(
            model, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant())
        )
        with octavo.calibrating(model), torch.no_grad():
            model(X)
    return (wide()[1].weight / model[1].weight).detach()[:, 0]


@pytest.mark.parametrize("case", RESCALED)
@torch.no_grad()
def test_a_rescaled_producer_gets_the_references_mean_in_its_own_units(case, tmp_path):
    """Its input is what a norm gives of the data, so nothing before it is off. 2^-16 of the largest output: the factor
    is measured over 256 rows of float32."""
    reference, model = wide(), RESCALED[case](tmp_path)
    octavo.correct_bias_(model, reference, X)
    y, expected = (m[1](m[0](X)).double() for m in (model, reference))
    bound = 2**-16 * expected.abs().amax(0) + (bias_error(model[1]) if hasattr(model[1], "codes") else 0)
    assert_within((y * float_units(case) - expected).mean(0), torch.zeros(32), bound)


def test_factors_that_cannot_be_told_are_refused_and_the_model_stays():
    """A model that was folded and then trained by other means: no reference's weight explains what it holds."""
    reference = wide()
    model = octavo.quantized(reference, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=X)
    other = copy.deepcopy(reference)
    with torch.no_grad():
        other[1].weight.mul_(1 + 0.05 * seeded(32, 8))
    before = model_state(model)
    with pytest.raises(ValueError, match=r"correct_bias_: layer '1' seems rescaled .*cannot be told"):
        octavo.correct_bias_(model, other, X)
    assert_unchanged(model, before)
    result = octavo.compare(other, model, X)
    assert "1" in result.unclear and "1" not in [layer.name for layer in result.layers]
    assert "no figures" in str(result)
