# SPDX-License-Identifier: Apache-2.0
"""Every registered scheme, in all its variants, on the same models: error bound, files, flags, refusals.

All are given data; those that need none do not look at it.
"""

import copy
import dataclasses
import importlib
import io
import json
import pkgutil

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, assert_within, assert_within_scale, model_state
from models import every_scheme, input_multiplier, rounding_bound
from torch import nn

import octavo
from octavo.schemes import SCHEMES, from_dict


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(37, 65), nn.GELU(), nn.Linear(65, 20, bias=False), nn.ReLU(), nn.Linear(20, 3)
    )


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(36, 2, 50, batch_first=True, dropout=0.0)


MODELS = {"mlp": (mlp, (5, 37)), "transformer": (transformer, (2, 7, 36))}
every_model = pytest.mark.parametrize("model, shape", MODELS.values(), ids=MODELS)


def test_registry_is_the_folder():
    """Class CamelCase lives in camel_case.py, is registered under its name, and is public."""
    files = {module.name for module in pkgutil.iter_modules(octavo.schemes.__path__)} - {"base"}
    assert {scheme.__module__.rpartition(".")[2] for scheme in SCHEMES.values()} == files
    for name, scheme in SCHEMES.items():
        assert scheme.__module__.rpartition(".")[2].replace("_", "") == name.lower()
        assert getattr(octavo, name) is getattr(importlib.import_module(scheme.__module__), name) is scheme


@every_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_is_within_half_a_step_and_the_largest_is_exact(scheme, dtype):
    linear = nn.Linear(70, 33).to(dtype)
    layer = octavo.quantized(linear, scheme, data=seeded(2, 70).to(dtype))
    weight, restored, multiplier = linear.weight.detach().float(), layer.dequantize(), input_multiplier(layer)
    assert_within_scale(restored, weight, layer.weight_scale.detach() * multiplier.expand(70))
    rows, largest = torch.arange(33), (weight / multiplier).abs().argmax(1)
    roundings = 2 if multiplier.dim() == 0 else 5  # of scale and product; of s, 1 / s and products with them
    assert_within(
        restored[rows, largest], weight[rows, largest], weight[rows, largest].abs() * roundings * 2**-24
    )
    assert layer(seeded(2, 70).to(dtype)).dtype == dtype


@every_scheme
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_output_is_within_the_bound_that_the_scales_give(scheme, bits):
    scheme = dataclasses.replace(scheme, weights=octavo.formats.CoarseInt8(bits))
    linear, x = nn.Linear(130, 40), seeded(9, 130)
    layer = octavo.quantized(linear, scheme, data=x)
    assert layer.codes().abs().max() == 2 ** (bits - 1) - 1
    assert_within(layer(x), copy.deepcopy(linear).double()(x.double()), rounding_bound(linear, layer, x))


@every_scheme
@every_model
def test_a_state_dict_brings_a_new_model_to_the_same_bits(scheme, model, shape):
    x, file = seeded(*shape), io.BytesIO()
    source = octavo.quantized(model(), scheme, data=x).eval()
    torch.save(source.state_dict(), file)
    file.seek(0)
    other = model().eval()
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    octavo.quantize_(other, scheme, data=x + 1)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert_bits_equal(other(x), source(x))


@every_scheme
@every_model
def test_octavo_save_and_load_give_the_same_bits(scheme, model, shape, tmp_path):
    x = seeded(*shape)
    source = octavo.quantized(model(), scheme, data=x).eval()
    octavo.save(source, tmp_path / "model")
    with torch.device("meta"):
        skeleton = model().eval()
    loaded = octavo.load(tmp_path / "model", skeleton)
    with torch.no_grad():
        assert_bits_equal(loaded(x), source(x))


@every_scheme
def test_quantizing_a_layer_leaves_it_alone_and_keeps_its_training_flag(scheme):
    linear, x = nn.Linear(5, 6).eval(), seeded(3, 5)
    before = model_state(linear)
    layer = octavo.quantized(linear, scheme, data=x)
    assert_unchanged(linear, before)
    assert layer.training is False and layer.is_packed and layer.scheme is scheme
    layer.bias.data.zero_()
    assert linear.bias.any()
    assert octavo.quantized(linear.train(), scheme, data=x).training is True


@every_scheme
def test_a_scheme_that_needs_data_says_so_and_the_others_do_not_look_at_it(scheme):
    m = mlp()
    before = model_state(m)
    if scheme.needs_data:
        for convert in (octavo.quantize_, octavo.quantized):
            with pytest.raises(ValueError, match="calibrates the input of '0' and needs data: give batches"):
                convert(m, scheme)
        assert_unchanged(m, before)
        with pytest.raises(ValueError, match="not calibrated"):
            scheme.quantize_linear(m[0])
    else:
        assert scheme.quantize_linear(m[0]).scheme is scheme
        octavo.quantize_(m, scheme, data=iter([torch.ones(1, 1)]))  # would not fit


@every_scheme
def test_same_bits_on_every_isa(scheme, isa):
    x = seeded(11, 383)
    layer = octavo.quantized(nn.Linear(383, 129), scheme, data=x)
    y = layer(x)
    with octavo.use_isa("scalar"):
        assert_bits_equal(y, layer(x))


@every_scheme
def test_to_dict_is_json_and_from_dict_reads_it_back(scheme):
    fields = json.loads(json.dumps(scheme.to_dict()))
    assert fields["name"] == scheme.name == type(scheme).__name__
    assert from_dict(fields) == scheme
    assert hash(from_dict(fields)) == hash(scheme)


@every_scheme
def test_schemes_are_frozen(scheme):
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.symmetric = None


@every_scheme
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: nn.Linear(3, 4).double(), "the weight is float64: float32, bfloat16 and float16 are served"),
        (lambda: nn.Linear(3, 4, device="meta"), "the weight is on the meta device: load it first"),
        (lambda: nn.Linear(0, 4), r"the weight is empty: \[4, 0\]"),
        (lambda: nn.Linear(3, 0), r"the weight is empty: \[0, 3\]"),
    ],
    ids=["float64", "meta", "k = 0", "n = 0"],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_a_scheme_cannot_serve_is_named(scheme, make, reason):
    import re

    assert re.fullmatch(reason, scheme.reason_to_keep(make()))
    assert scheme.reason_to_keep(nn.Linear(1, 1)) is None


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: octavo.Int8Dynamic(symmetric=1), TypeError, "symmetric must be True or False, got 1"),
        (lambda: octavo.Int8Dynamic(symetric=True), TypeError, "symetric"),
        (
            lambda: octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(4.0)),
            TypeError,
            "CoarseInt8: bits must be an int, got 4.0",
        ),
        (
            lambda: octavo.Int8WeightOnly(weights=octavo.formats.CoarseInt8(9)),
            ValueError,
            r"CoarseInt8: bits must be in 2 .. 8, got 9",
        ),
        (lambda: octavo.Int8Static(symmetric=0), TypeError, "Int8Static: symmetric must be True or False"),
        (lambda: octavo.Int8Static(int32_bias=1), TypeError, "int32_bias must be True or False, got 1"),
        (lambda: octavo.Int8Static("minmax"), TypeError, "observer is 'minmax'.*MSE, MinMax, MovingAverage"),
        (lambda: from_dict({"name": "Int8Static", "observer": {"name": "X"}}), ValueError, "observer 'X'"),
        (lambda: octavo.Int8Dynamic(weights=8), TypeError, "weights is 8, accepted are .*Int8"),
        (lambda: from_dict({"name": "Int3"}), ValueError, "'Int3' is unknown.*Int8Dynamic, Int8Static"),
        (lambda: from_dict({}), ValueError, "None is unknown"),
        (
            lambda: from_dict({"name": "Int8Dynamic", "bits": 4}),
            ValueError,
            "bits must be 7 or 8, got 4; Int4Dynamic",
        ),
        (lambda: octavo.Int8WeightOnly(bits=7.0), TypeError, "Int8: bits must be an int, got 7.0"),
        (
            lambda: octavo.Int8Dynamic(bits=7, weights=octavo.formats.CoarseInt8(4)),
            ValueError,
            r"bits is 7 and the weights are CoarseInt8\(4\)",
        ),
    ],
)
def test_bad_input_is_refused(call, error, text):
    with pytest.raises(error, match=text):
        call()


@every_scheme
@pytest.mark.parametrize(
    "x, error, text",
    [
        (torch.ones(2, 4), ValueError, r"input has shape \[2, 4\], its last axis must be in_features = 3"),
        (torch.ones(2, 2), ValueError, r"input has shape \[2, 2\]"),
        (torch.ones(()), ValueError, r"input has shape \[\]"),
        (torch.ones(2, 3).long(), TypeError, "x is int64"),
        (torch.ones(2, 3).double(), TypeError, "x is float64.*bfloat16, float16, float32"),
    ],
)
def test_a_layer_refuses_other_widths_and_dtypes(scheme, x, error, text):
    """Four features would fit the packed weight of three: it is padded to 64."""
    layer = octavo.quantized(nn.Linear(3, 4), scheme, data=torch.ones(2, 3))
    with pytest.raises(error, match=text):
        layer(x)


@pytest.mark.parametrize(
    "text, scheme",
    [
        ("int8-dynamic", octavo.Int8Dynamic()),
        ("INT8_Dynamic", octavo.Int8Dynamic()),
        ("Int8WeightOnly", octavo.Int8WeightOnly()),
        ("llm-int8:threshold=4", octavo.LLMInt8(4.0)),
        (
            "int8-static:observer=minmax,symmetric=False",
            octavo.Int8Static(octavo.observers.MinMax(), symmetric=False),
        ),
        ("int8-dynamic:bits=7", octavo.Int8Dynamic(bits=7)),
        ("int8-dynamic:method=smooth-quant", octavo.Int8Dynamic(method=octavo.SmoothQuant())),
    ],
)
def test_a_scheme_has_one_name_however_it_is_spelled(text, scheme):
    assert octavo.schemes.by_name(text) == scheme
    assert octavo.quantized(nn.Linear(4, 4), text, data=torch.ones(2, 4)).in_features == 4


@pytest.mark.parametrize(
    "text", ["int3", "int8-dynamic:symmetric", "int8-dynamic:bits=4", "int8-dynamic:method=awk"]
)
def test_an_unknown_name_is_refused_with_what_there_is(text):
    with pytest.raises(ValueError, match="Int8Dynamic|symmetric=|RoundToNearest"):
        octavo.schemes.by_name(text)


@pytest.mark.parametrize("kind", [octavo.Int8Dynamic, octavo.Int8WeightOnly])
def test_seven_bits_are_as_large_and_six_decibels_less_accurate(kind, tmp_path):
    """A step is 127 / 63 times as long, and so is the error of rounding: 6.1 dB, up to what chance adds in 32,768."""
    linear, errors = nn.Linear(512, 64), []
    for bits in (8, 7):
        layer = octavo.quantized(linear, kind(bits=bits))
        assert layer.codes().abs().max() == 2 ** (bits - 1) - 1
        assert layer.scheme.weights.stored_bits == 8
        errors.append((layer.dequantize() - linear.weight).double().square().mean().sqrt().item())
        octavo.save(nn.Sequential(layer), tmp_path / str(bits))
        loaded = octavo.load(tmp_path / str(bits), nn.Sequential(nn.Linear(512, 64)))[0]
        assert loaded.scheme == kind(bits=bits) == from_dict(kind(bits=bits).to_dict())
        assert torch.equal(loaded.codes(), layer.codes())
    assert abs(errors[1] / errors[0] / (127 / 63) - 1) < 0.02


def test_fewer_bits_of_older_files_are_the_format_that_has_them_now():
    assert from_dict({"name": "Int8Dynamic", "weight_bits": 8, "symmetric": True}) == octavo.Int8Dynamic()
    assert from_dict({"name": "Int8WeightOnly", "weight_bits": 3}) == octavo.Int8WeightOnly(
        weights=octavo.formats.CoarseInt8(3)
    )
