# SPDX-License-Identifier: Apache-2.0
"""prepare_, calibrating, freeze_: a state machine. Models go from state to state, saved and loaded in any, or stay."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from torch import nn

import octavo
from octavo.nn import PreparedLinear, QuantLinear, StaticQuantLinear
from octavo.observers import MinMax, MovingAverage, Percentile

STATIC, CLIPPING = octavo.Int8Static(MinMax()), Percentile(95.0)
SCHEMES = {
    "dynamic": (octavo.Int8Dynamic(), {}),
    "weight-only": (octavo.Int8WeightOnly(), {}),
    "static": (STATIC, {}),
    "static affine, pure": (octavo.Int8Static(MovingAverage(0.5), symmetric=False), {"estimator": "pure"}),
    "static, int32 bias": (octavo.Int8Static(MinMax(), int32_bias=True), {}),
    "static 4 bit": (octavo.Int8Static(Percentile(99.0, bins=128), weights=octavo.formats.CoarseInt8(4)), {}),
    "dynamic 4 bit, learned": (
        octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4)),
        {"learn_scales": True},
    ),
    "static, learned": (STATIC, {"learn_scales": True}),
    "static affine, learned": (
        octavo.Int8Static(CLIPPING, symmetric=False, int32_bias=True),
        {"learn_scales": True},
    ),
    "smooth": (octavo.Int8Dynamic(method=octavo.SmoothQuant()), {}),
    "smooth, not folded": (
        octavo.Int8Dynamic(
            weights=octavo.formats.CoarseInt8(4), method=octavo.SmoothQuant((0.3, 0.6), fold=False)
        ),
        {},
    ),
    "smooth, static, learned": (replace(STATIC, method=octavo.SmoothQuant()), {"learn_scales": True}),
    "smooth, static affine, learned": (
        octavo.Int8Static(CLIPPING, symmetric=False, method=octavo.SmoothQuant()),
        {"learn_scales": True},
    ),
    "outliers": (octavo.LLMInt8(1.1, relative=True), {}),
}
every_scheme = pytest.mark.parametrize("scheme, options", SCHEMES.values(), ids=SCHEMES)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = seeded(64, 12), seeded(64, 5, seed=1)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24, bias=False), nn.ReLU(), nn.Linear(24, 5)
    )


def prepared(scheme=STATIC, **options) -> nn.Module:
    model = mlp()
    octavo.prepare_(model, scheme, **options)
    return model


def calibrate(model: nn.Module) -> None:
    for _ in range(model[0].scheme.calibration_passes):
        with octavo.calibrating(model):
            for batch in X.split(16):
                model(batch)


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X), Y).backward()
        optimizer.step()


STEPS = {"prepared": lambda model: None, "calibrated": calibrate, "trained": train, "frozen": octavo.freeze_}
STATES = list(STEPS)


def model_in(state: str, scheme, options) -> nn.Module:
    model = prepared(scheme, **options)
    for each in STATES[: STATES.index(state) + 1]:
        STEPS[each](model)
    return model


def output(model: nn.Module) -> torch.Tensor | str:
    """What the model computes, or what it complains of."""
    try:
        with torch.no_grad():
            return model(X)
    except ValueError as error:
        return str(error)


def assert_same_output(model: nn.Module, other: nn.Module, case: str = "") -> None:
    expected, found = output(model), output(other)
    if isinstance(expected, str):
        assert found == expected and "not calibrated" in expected, case
    else:
        assert isinstance(found, torch.Tensor) and found.equal(expected), case
        assert_bits_equal(found, expected)


# --- the state machine: state x eval or train x way of saving -------------------------------------------------------


def by_state_dict(model, state, scheme, options, tmp_path):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = model_in("frozen" if state == "frozen" else "prepared", scheme, options)
    for parameter in other.parameters():
        parameter.data.fill_(1)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def by_octavo_save(model, state, scheme, options, tmp_path):
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = mlp()
    return octavo.load(tmp_path, skeleton)


def by_pickle(model, state, scheme, options, tmp_path):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_deepcopy(model, state, scheme, options, tmp_path):
    return copy.deepcopy(model)


@pytest.mark.parametrize("state", STATES)
@every_scheme
def test_a_model_saved_in_any_state_goes_on_with_the_same_bits(scheme, options, state, tmp_path):
    """In training mode and in eval mode, by each way of saving; all of them go on beside the one that was saved."""
    model, others = model_in(state, scheme, options), {}
    for training in (True, False):
        for reload in (by_state_dict, by_octavo_save, by_pickle, by_deepcopy):
            other = reload(model.train(training), state, scheme, options, tmp_path)
            others[f"{reload.__name__}, training={training}"] = other.train(training)
    for step in (None, *STATES[STATES.index(state) + 1 :]):
        for each in (model, *others.values()) if step else ():
            STEPS[step](each)
        for name, other in others.items():
            assert_same_output(model, other, f"{name}, after {step}")
    assert all(isinstance(layer, QuantLinear) for other in others.values() for layer in other[::2])


@every_scheme
@pytest.mark.parametrize("state", STATES[1:])
def test_training_and_eval_mode_compute_the_same(scheme, options, state):
    model = model_in(state, scheme, options)
    assert_bits_equal(model.train()(X).detach(), model.eval()(X).detach())


@every_scheme
def test_in_steps_and_in_one_call_give_the_same_bits(scheme, options):
    """Learned scales start at the calibrated ones, so they change nothing either."""
    model = model_in("calibrated", scheme, options)
    octavo.freeze_(model)
    at_once = mlp()
    octavo.quantize_(at_once, scheme, data=list(X.split(16)))
    copied = octavo.quantized(mlp(), scheme, data=list(X.split(16)))
    assert_bits_equal(model(X), at_once(X))
    assert_bits_equal(model(X), copied(X))


@every_scheme
def test_gradients_reach_the_float_weights_before_freezing_and_nothing_but_the_input_after(scheme, options):
    model = model_in("calibrated", scheme, options)
    model(X).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained.keys() == dict(model.named_parameters()).keys()
    octavo.freeze_(model)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert x.grad.any() and not any(p.requires_grad or p.grad is not None for p in model.parameters())


# --- prepare_ -------------------------------------------------------------------------------------------------------


def test_a_prepared_layer_holds_the_very_parameters_so_that_an_older_optimizer_trains_it():
    model = mlp()
    before = dict(model.named_parameters())
    octavo.prepare_(model, STATIC)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_every_layer_is_reported():
    model = mlp()
    report = octavo.prepare_(model, {"0": STATIC, "2": None, "4": octavo.Int8Dynamic()})
    assert [(row.name, row.kind, row.action, row.scheme) for row in report.rows] == [
        ("0", "Linear", "prepared", octavo.schemes.label(STATIC)),
        ("2", "Linear", "kept", ""),
        ("4", "Linear", "prepared", "Int8Dynamic"),
    ]
    assert "2 of 3 layers with weights prepared" in str(report)
    again = octavo.prepare_(model, {"4": STATIC, "*": None})
    assert [row.reason for row in again.rows][2] == "already prepared: octavo.freeze_ quantizes it"
    calibrate(model)
    frozen = octavo.freeze_(model)
    assert [(row.name, row.action, row.reason) for row in frozen.rows] == [
        ("0", "quantized", ""),
        ("2", "kept", "not prepared"),
        ("4", "quantized", ""),
    ]
    assert frozen.bytes_after == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(
    "call, text",
    [
        (
            lambda m: octavo.prepare_(m, STATIC, estimator="soft"),
            "estimator must be one of clipped, pure, got 'soft'",
        ),
        (lambda m: octavo.prepare_(m, STATIC, include="3"), "pattern '3' matches no layer"),
        (lambda m: octavo.freeze_(nn.Sequential(m, PreparedLinear(m[0], STATIC))[1]), "layer.scheme.freeze"),
        (lambda m: octavo.prepare_(m[0], STATIC), "wrap it"),
        (lambda m: octavo.calibrating(m).__enter__(), "no prepared layers; call octavo.prepare_"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_stays(call, text):
    model = mlp()
    before = model_state(model)
    with pytest.raises(ValueError, match=text):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call",
    [lambda m: octavo.prepare_(m, STATIC), octavo.freeze_, lambda m: octavo.calibrating(m).__enter__()],
)
def test_only_modules_are_taken(call):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        call({})


# --- calibrating ----------------------------------------------------------------------------------------------------


def test_while_calibrating_the_model_is_the_float_model():
    model = prepared()
    with octavo.calibrating(model):
        assert_bits_equal(model(X), mlp()(X))
        assert "calibrating" in repr(model[0])


def test_blocks_add_up_and_the_scale_is_set_on_leaving():
    whole, halves = prepared(), prepared()
    for model, parts in ((whole, [X]), (halves, [X[:20], X[20:]])):
        for part in parts:
            with octavo.calibrating(model):
                model(part)
    assert_bits_equal(whole[0].input_scale, X.abs().max().reshape(1) / 127)
    assert_bits_equal(halves(X), whole(X))


def test_after_an_error_in_the_block_the_layers_are_no_longer_calibrating_and_know_what_they_saw():
    model = prepared()
    with pytest.raises(RuntimeError), octavo.calibrating(model):
        model(X)
        model(X[:, :3])
    assert not model[0].is_calibrating and model[0].is_calibrated
    assert model(X).isfinite().all()


def test_a_fused_transformer_layer_is_calibrated_as_well():
    """torch's fused path reads weights without calling the layers: their observers would see nothing."""
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True, dropout=0.0).eval()
    octavo.prepare_(layer, STATIC)
    with torch.no_grad(), octavo.calibrating(layer):
        layer(seeded(2, 7, 12))
    assert layer.linear1.is_calibrated and layer.linear2.is_calibrated


# --- freeze_ --------------------------------------------------------------------------------------------------------


def test_freezing_twice_changes_nothing():
    model = model_in("frozen", STATIC, {})
    before = model_state(model)
    report = octavo.freeze_(model)
    assert_unchanged(model, before)
    assert {row.reason for row in report.rows} == {"already quantized"}


def test_a_static_layer_is_made_for_a_static_scheme_and_only_for_it():
    model = mlp()
    octavo.quantize_(model, {"0": STATIC, "*": octavo.Int8Dynamic()}, data=X)
    assert [type(layer) for layer in model[::2]] == [StaticQuantLinear, QuantLinear, QuantLinear]


def test_an_uncalibrated_layer_is_named_by_forward_and_by_freezing():
    model = prepared()
    with octavo.calibrating(model):
        model[:1](X)
    with pytest.raises(ValueError, match="layer '2' is not calibrated: Int8Static.*exclude='2'"):
        model(X)
    before = model_state(model)
    with pytest.raises(ValueError, match="layer '2' is not calibrated"):
        octavo.freeze_(model)
    assert_unchanged(model, before)


def test_batches_with_nan_do_not_calibrate():
    model = prepared()
    with octavo.calibrating(model):
        model(torch.full((3, 12), torch.nan))
    with pytest.raises(ValueError, match="layer '0' is not calibrated: .*no finite batch"):
        octavo.freeze_(model)


def test_a_weight_that_training_has_blown_up_is_refused_and_the_model_stays():
    model = model_in("calibrated", STATIC, {})
    model[4].weight.data[1, 1] = torch.inf
    before = model_state(model)
    with pytest.raises(ValueError, match="4.weight holds NaN or Inf"):
        octavo.freeze_(model)
    assert_unchanged(model, before)


def test_a_bias_that_does_not_fit_int32_is_refused_with_the_layer_s_name_and_the_model_stays():
    model = model_in("calibrated", octavo.Int8Static(MinMax(), int32_bias=True), {})
    model[4].bias.data[1] = 1e9
    before = model_state(model)
    with pytest.raises(ValueError, match=r"layer '4': bias\[1\] is 1e\+09, .*use int32_bias=False"):
        octavo.freeze_(model)
    assert_unchanged(model, before)


def test_freezing_inside_the_block_is_refused():
    model = model_in("calibrated", STATIC, {})
    with octavo.calibrating(model), pytest.raises(ValueError, match="calibration is not over"):
        octavo.freeze_(model)
    octavo.freeze_(model)


def test_a_layer_with_hooks_stays_prepared_and_the_report_says_why():
    model = model_in("calibrated", STATIC, {})
    handle = model[0].register_forward_hook(lambda *_: None)
    report = octavo.freeze_(model)
    assert [(row.name, row.reason[:9]) for row in report.kept] == [("0", "has hooks")]
    handle.remove()
    assert [row.name for row in octavo.freeze_(model).quantized] == ["0"]
