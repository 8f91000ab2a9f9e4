# SPDX-License-Identifier: Apache-2.0
"""What calibration and conversion leave behind: tensors that can be trained, in any mode and with any default device;
scales that are numbers; errors that name every layer."""

import pytest
import torch
from asserts import assert_bits_equal, assert_equal, assert_unchanged, model_state
from models import every_scheme
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

import octavo
from octavo.base import configs
from octavo.nn import StaticQuantLinear
from octavo.observers import ObserverConfig
from octavo.schemes import Scheme

X = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
OBSERVING = [octavo.Int8Static(observer()) for observer in configs.kinds(ObserverConfig).values()]
every_option = pytest.mark.parametrize("options", [{}, {"learn_scales": True}], ids=str)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()


def calibrated(scheme: Scheme, **options) -> nn.Module:
    m = mlp()
    octavo.prepare_(m, scheme, **options)
    calibrate(m, scheme)
    return m


def calibrate(m: nn.Module, scheme: Scheme) -> None:
    for _ in range(scheme.calibration_passes):
        with octavo.calibrating(m):
            m(X)


def assert_can_be_trained(m: nn.Module) -> None:
    """No inference tensor is left, which torch would refuse to save for backward and to write to."""
    left = [name for name, tensor in [*m.named_parameters(), *m.named_buffers()] if tensor.is_inference()]
    assert not left
    m(X.clone().requires_grad_()).sum().backward()


# --- inference mode -------------------------------------------------------------------------------------------------


@every_option
@every_scheme
def test_a_model_prepared_and_calibrated_in_inference_mode_can_be_trained(scheme, options):
    m = mlp()
    with torch.inference_mode():
        octavo.prepare_(m, scheme, **options)
        calibrate(m, scheme)
    assert_can_be_trained(m)
    calibrate(m, scheme)
    assert_can_be_trained(m)
    with torch.inference_mode():
        octavo.freeze_(m)
    assert_can_be_trained(m)


@every_scheme
def test_what_is_copied_loaded_and_corrected_in_inference_mode_can_be_trained(scheme, tmp_path):
    skeleton = mlp().to("meta")
    source, other = mlp(), mlp()
    with torch.inference_mode():
        copied = octavo.quantized(source, scheme, data=[X])
        octavo.save(copied, tmp_path)
        loaded = octavo.load(tmp_path, skeleton)
        filled = octavo.quantized(other, scheme, data=[X])
        filled.load_state_dict(copied.state_dict())
    for m in (copied, loaded, filled):
        assert_can_be_trained(m)
        assert_bits_equal(m(X).detach(), copied(X).detach())


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=OBSERVING, ids=repr)
def observing(request):
    """A scheme and what it computes while the default device is the CPU."""
    return request.param, octavo.quantized(mlp(), request.param, data=[X])(X).detach()


def test_every_observer_works_whatever_the_default_device_is(observing, meta_by_default):
    scheme, expected = observing
    assert_bits_equal(octavo.quantized(mlp(), scheme, data=[X])(X).detach(), expected)


@every_option
@every_scheme
def test_training_works_whatever_the_default_device_is(scheme, options, meta_by_default):
    m = calibrated(scheme, **options)
    assert_can_be_trained(m)
    octavo.freeze_(m)
    assert_can_be_trained(m)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_static_layer_is_whole_after_to_empty_and_load_state_dict(symmetric):
    """A symmetric zero point is in no file, so loading has to set it."""
    scheme = octavo.Int8Static(symmetric=symmetric)
    m = octavo.quantized(mlp(), scheme, data=[X])
    expected, state = m(X).detach(), m.state_dict()
    for layer in (m[0], m[2]):
        assert isinstance(layer, StaticQuantLinear)
        layer.to_empty(device="cpu")
        layer.input_zero_point.fill_(77)
    m.load_state_dict(state)
    assert_bits_equal(m(X).detach(), expected)
    if symmetric:
        assert_equal(m[0].input_zero_point, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(), octavo.Int8Static(), octavo.LLMInt8()], ids=repr)
def test_an_unpacked_layer_takes_its_tensors_one_by_one(scheme):
    """As accelerate sets them: by name, into the dicts of parameters and buffers."""
    m, other = octavo.quantized(mlp(), scheme, data=[X]), octavo.quantized(mlp(), scheme, data=[X])
    with torch.no_grad():
        m[0].weight_scale *= 2
    other[0].unpack_()
    assert not other[0].is_packed and other[0].unpack_() is other[0]
    for name, tensor in m[0].state_dict().items():
        place = other[0]._parameters if name in other[0]._parameters else other[0]._buffers
        assert name in place
        is_parameter = place is other[0]._parameters
        place[name] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor.int()
    assert_bits_equal(other(X).detach(), m(X).detach())
    assert other[0].is_packed


# --- scales ---------------------------------------------------------------------------------------------------------

AFFINE = octavo.Int8Static(symmetric=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, 1e-40, 3e38])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "input_offset"])
def test_a_scale_with_which_nothing_can_be_quantized_is_refused_and_the_model_stays(name, value):
    if name == "input_offset" and abs(value) <= 1e-40:
        return  # an offset may be 0
    m = calibrated(AFFINE, learn_scales=True)
    getattr(m[2], name).data.reshape(-1)[-1] = value
    before = model_state(m)
    with pytest.raises(ValueError, match=rf"layer '2': {name}\[\d\] is .*training has diverged"):
        octavo.freeze_(m)
    assert_unchanged(m, before)
    with pytest.raises(ValueError, match=name):
        AFFINE.freeze(m[2])


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_a_scale_that_crossed_zero_is_frozen_as_what_training_computed_with(name):
    m = calibrated(AFFINE, learn_scales=True)
    expected = m(X).detach()
    getattr(m[2], name).data.neg_()
    codes = m[2].quantized_weight.codes
    assert_bits_equal(m(X).detach(), expected)
    octavo.freeze_(m)
    assert_equal(m[2].codes(), codes)
    assert (getattr(m[2], name) > 0).all()


def test_a_smoothed_weight_that_overflows_is_refused_before_anything_changes():
    m = calibrated(octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=False)))
    m[2].weight.data[0, 0] = 1e38
    m[2].smoothing[0] = 2.0**40
    before = model_state(m)
    with pytest.raises(ValueError, match="layer '2' has NaN or Inf in its weight"):
        octavo.freeze_(m)
    assert_unchanged(m, before)


# --- errors ---------------------------------------------------------------------------------------------------------


class Unused(nn.Module):
    """Of its layers only the first runs."""

    def __init__(self, count: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(count)])

    def forward(self, x):
        return self.layers[0](x)


@pytest.mark.parametrize(
    "scheme",
    [octavo.Int8Static(), octavo.Int8Dynamic(method=octavo.SmoothQuant()), octavo.LLMInt8()],
    ids=repr,
)
def test_all_layers_without_data_are_named_at_once(scheme):
    m = Unused(5)
    before = model_state(m)
    with pytest.raises(ValueError) as error:
        octavo.quantize_(m, scheme, data=[X])
    assert_unchanged(m, before)
    text = str(error.value)
    assert text.startswith(
        "4 of 5 layers are not calibrated: 'layers.1', 'layers.2', 'layers.3', 'layers.4'."
    )
    assert "exclude='layers.1'" in text


def test_of_many_layers_some_are_named_and_the_others_counted():
    m = Unused(64)
    octavo.prepare_(m, octavo.Int8Static())
    with octavo.calibrating(m):
        m(X)
    with pytest.raises(ValueError, match=r"63 of 64 layers .* 'layers\.8' and 55 others\. Of the first: "):
        octavo.freeze_(m)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("norm", [weight_norm, spectral_norm])
def test_a_model_that_torch_cannot_copy_is_refused_with_the_names_and_the_remedy(norm):
    m = nn.Sequential(nn.Linear(16, 16), norm(nn.Linear(16, 16)))
    m(X)
    with pytest.raises(ValueError) as error:
        octavo.quantized(m, octavo.Int8Dynamic())
    text = str(error.value)
    assert "'1.weight'" in text and "remove_weight_norm" in text and "octavo.quantize_" in text
    assert octavo.quantize_(m, octavo.Int8Dynamic()).quantized


def test_another_error_of_a_copy_is_torch_s_own():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        octavo.quantized(nn.Sequential(Stubborn(2, 2), nn.Linear(2, 2)), octavo.Int8Dynamic(), exclude="0")
