# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant: what s is, who divides by it, and that the float model computes what it did."""

import copy
from dataclasses import replace

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, assert_within, model_state
from torch import nn

import octavo
from octavo.methods.smoothing import choose_smoothing, output_error, smoothing_scales
from octavo.nn import QuantLinear, SmoothedLinear, StaticQuantLinear, StaticSmoothedLinear
from octavo.observers import MinMax

STATIC = octavo.Int8Static(MinMax())
K = 24


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def data(k: int = K) -> torch.Tensor:
    """Two channels of which are 30 times the others."""
    x = seeded(64, k, seed=1)
    x[:, [3, 11]] *= 30
    return x


class RMSNorm(nn.Module):
    """As models write it; with `offset` 1 as Gemma does; `bend`: a weight that scales by something else."""

    def __init__(self, k: int, offset: float = 0.0, bend=lambda weight: weight):
        super().__init__()
        self.weight = nn.Parameter(seeded(k, seed=2).abs() + 0.5 - offset)
        self.offset, self.bend = offset, bend

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (self.offset + self.bend(self.weight))


def layer_norm() -> nn.Module:
    norm = nn.LayerNorm(K)
    norm.weight.data, norm.bias.data = seeded(K, seed=3), seeded(K, seed=4)
    return norm


PRODUCERS = {
    "LayerNorm": layer_norm,
    "LayerNorm without bias": lambda: nn.LayerNorm(K, bias=False),
    "nn.RMSNorm": lambda: nn.RMSNorm(K),
    "RMSNorm": lambda: RMSNorm(K),
    "1 + weight": lambda: RMSNorm(K, offset=1.0),
    "Linear": lambda: nn.Linear(K, K),
    "Linear without bias": lambda: nn.Linear(K, K, bias=False),
    "Linear, ReLU": lambda: nn.Sequential(nn.Linear(K, K), nn.ReLU()),
}


class Attention(nn.Module):
    """What comes before, and three layers that read it."""

    def __init__(self, producer: nn.Module, use=lambda h: 0.0):
        super().__init__()
        self.before, self.use = producer, use
        self.q, self.k, self.v = nn.Linear(K, 16), nn.Linear(K, 16, bias=False), nn.Linear(K, 16)

    def forward(self, x):
        h = self.before(x)
        return self.q(h) * torch.sigmoid(self.k(h)) + self.v(h) + self.use(h)


READERS = ["q", "k", "v"]


def attention(producer: str = "LayerNorm", **options) -> Attention:
    torch.manual_seed(0)
    model = Attention(PRODUCERS[producer](), **options)
    model.q.weight.data[:, 5] *= 10  # so that the maximum over q, k and v is not that of each
    return model


def calibrated(
    model: nn.Module, scheme=octavo.Int8Dynamic(method=octavo.SmoothQuant()), passes: int = 1
) -> nn.Module:
    octavo.prepare_(model, scheme, include=READERS)
    for _ in range(passes):
        with octavo.calibrating(model):
            model(data())
    return model


def assert_relative(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert_within(actual, expected, tolerance * expected.abs().max().item())


# --- s --------------------------------------------------------------------------------------------------------------


def oracle(x: torch.Tensor, weight: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4 of the paper, in float64: s, and the smoothed weight in units of its scales, before it is rounded."""
    x, weight = x.double(), weight.detach().double()
    s = x.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
    smoothed = weight * s
    return s, smoothed / (smoothed.abs().amax(1, keepdim=True) / 127)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_s_and_codes_are_those_of_the_paper(alpha):
    """s is rounded once and the codes are the nearest ones, but for 2^-20 of a step in 127."""
    linear, x = nn.Linear(K, 16), data()
    layer = octavo.quantized(linear, octavo.Int8Dynamic(method=octavo.SmoothQuant(alpha)), data=x)
    s, unrounded = oracle(x, linear.weight, alpha)
    assert_within(layer.input_multiplier, 1 / s, 2**-22 / s)
    assert_within(layer.codes().float(), unrounded, 0.5 + 127 * 2**-20)


@pytest.mark.parametrize("then", [octavo.Int8Dynamic(symmetric=False), octavo.Int8WeightOnly(), STATIC])
def test_the_layer_is_that_of_the_scheme_that_follows_on_smoothed_input(then):
    linear, x = nn.Linear(K, 16), data()
    layer = octavo.quantized(linear, replace(then, method=octavo.SmoothQuant()), data=x)
    smoothed = x * layer.input_multiplier.detach()
    plain = then.layer.from_codes(layer.codes(), layer.weight_scale, layer.bias, then)
    if then.needs_data:
        plain.input_scale, plain.input_zero_point = layer.input_scale, layer.input_zero_point
        assert_within(layer.input_scale, smoothed.abs().max().reshape(1) / 127, 2**-23)
    assert_bits_equal(layer(x), plain(smoothed))


def test_a_channel_that_is_always_zero_is_left_alone_and_units_do_not_matter():
    x, w = seeded(K).abs(), seeded(K, seed=1).abs()
    x[2] = w[5] = 0.0
    s = smoothing_scales(x, w, 0.5)
    assert s[2] == 1.0 and s.isfinite().all() and (s > 0).all()
    assert_bits_equal(smoothing_scales(x * 2.0**-20, w, 0.5)[s != 1.0], s[s != 1.0] * 2.0**-10)
    assert_bits_equal(smoothing_scales(x, torch.zeros(K), 0.5), torch.ones(K))
    assert_bits_equal(smoothing_scales(x, w * 2.0**-20, 0.5)[s != 1.0], s[s != 1.0] * 2.0**10)


def test_of_several_alphas_the_one_with_the_closest_output_is_taken():
    grid = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)
    linear, x = nn.Linear(K, 16), data()
    prepared = replace(STATIC, method=octavo.SmoothQuant(grid)).prepare_linear(linear)
    prepared.is_calibrating = True
    prepared(x)
    weight_absmax = linear.weight.detach().abs().amax(0)
    candidates = [smoothing_scales(prepared.input_absmax, weight_absmax, alpha) for alpha in grid]
    errors = [output_error(prepared, s) for s in candidates]
    best = errors.index(min(errors))
    assert 0 < best < len(grid) - 1, "the ends should lose: they smooth one side only"
    assert_bits_equal(choose_smoothing([prepared]), candidates[best])
    layer = octavo.quantized(linear, replace(STATIC, method=octavo.SmoothQuant(grid)), data=x)
    assert_bits_equal(layer.input_multiplier.detach(), 1 / candidates[best])


def test_smoothing_helps_where_there_are_outliers():
    model = attention()
    model.before.weight.data[[3, 11]] *= 30
    for then in (octavo.Int8Dynamic(), STATIC):
        plain, smooth = (
            octavo.quantized(model, s, data=data())
            for s in (then, replace(then, method=octavo.SmoothQuant()))
        )
        figures = [octavo.compare(model, each, data()).output.sqnr_db for each in (plain, smooth)]
        assert figures[1] > figures[0] + 3


# --- who divides by it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("producer", PRODUCERS)
def test_the_producer_absorbs_s_and_the_float_output_stays(producer):
    model = attention(producer)
    expected = model(data()).detach()
    calibrated(model)
    assert all(model.get_submodule(name).is_folded for name in READERS)
    assert not torch.equal(model.q.smoothing, torch.ones(K))
    with octavo.calibrating(model):
        assert_relative(model(data()), expected, 1e-5)


def test_a_folded_layer_is_an_ordinary_one_of_the_scheme_that_follows():
    for then, kind in ((octavo.Int8Dynamic(), QuantLinear), (STATIC, StaticQuantLinear)):
        model = attention()
        scheme = replace(then, method=octavo.SmoothQuant())
        report = octavo.quantize_(model, scheme, data=data())
        assert [type(model.get_submodule(name)) for name in READERS] == [kind] * 3
        assert model.q.scheme == then
        assert {row.scheme for row in report.quantized} == {octavo.schemes.label(scheme)}


def test_layers_that_share_an_input_share_the_s_of_their_common_maximum():
    model = attention()
    weights = torch.cat([model.get_submodule(name).weight.detach() for name in READERS])
    with torch.no_grad():
        s, _ = oracle(model.before(data()), weights, 0.5)
    calibrated(model)
    for name in READERS:
        assert_within(model.get_submodule(name).smoothing, s, s * 2**-22)


def tied() -> nn.Module:
    """Folding would untie the norm from the other module that has its weight."""
    model = attention()
    model.other = nn.RMSNorm(K)
    model.other.weight = model.before.weight
    return calibrated(model)


NOT_FOLDED = {
    "a tied norm": tied,
    "another reader": lambda: calibrated(attention(use=lambda h: h.sum(-1, keepdim=True))),
    "one is kept float": lambda: octavo.quantized(
        attention(), octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=data(), exclude="v"
    ),
    "not wanted": lambda: calibrated(attention(), octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=False))),
    "two schemes": lambda: octavo.quantized(
        attention(),
        {
            "q": octavo.Int8Dynamic(method=octavo.SmoothQuant(0.3)),
            "*": octavo.Int8Dynamic(method=octavo.SmoothQuant()),
        },
        data=data(),
    ),
    "an unknown norm": lambda: calibrated(Attention(RMSNorm(K, bend=torch.tanh))),
    "a norm of another kind": lambda: calibrated(Attention(nn.LayerNorm(K, elementwise_affine=False))),
    "a norm that is an RMSNorm times something": lambda: calibrated(Attention(RMSNorm(K, offset=0.5))),
}


@pytest.mark.parametrize("make", NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_where_nobody_can_absorb_s_each_layer_divides_its_input(make):
    model = make()
    octavo.freeze_(model)
    frozen = [layer for layer in map(model.get_submodule, READERS) if isinstance(layer, QuantLinear)]
    assert frozen and all(type(layer) is SmoothedLinear for layer in frozen)


def test_a_norm_that_does_not_fit_stays_as_it_was():
    model = Attention(RMSNorm(K, bend=torch.tanh))
    before = model_state(model.before)
    calibrated(model)
    assert_unchanged(model.before, before)


def test_told_groups_are_folded_and_only_those():
    """The view hides from tracing that nobody else reads the norm."""
    model = Attention(nn.Sequential(layer_norm(), nn.Unflatten(-1, (1, K)), nn.Flatten(-2)))
    expected = model(data()).detach()
    assert not calibrated(copy.deepcopy(model)).q.is_folded
    calibrated(model, octavo.Int8Dynamic(method=octavo.SmoothQuant(fold={"before.0": READERS})))
    assert all(model.get_submodule(name).is_folded for name in READERS)
    with octavo.calibrating(model):
        assert_relative(model(data()), expected, 1e-5)
    assert not calibrated(
        attention(), octavo.Int8Dynamic(method=octavo.SmoothQuant(fold={"q": ["k"]}))
    ).v.is_folded


@pytest.mark.parametrize(
    "fold, text",
    [
        ({"nrom": READERS}, "fold names 'nrom', which the model does not have"),
        ({"before": ["q", "x"]}, "fold names 'x'"),
        ({"": READERS}, "fold names '', a Attention; it must be a linear layer, or a norm"),
        ({"q": ["before"]}, r"not all of \['before'\] are layers that it smooths"),
    ],
)
def test_a_wrong_mapping_is_refused_and_the_model_stays(fold, text):
    model = attention()
    before = model_state(model)
    with pytest.raises(ValueError, match=text):
        octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=fold)), data=data())
    assert_unchanged(model, before)


@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_copy_leaves_the_original_alone_and_errors_undo_the_fold(producer):
    model = attention(producer)
    before = model_state(model)
    octavo.quantized(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=data())
    assert_unchanged(model, before)
    model.unused = nn.Linear(K, 3)  # no batch reaches it, which is found out after folding
    before = model_state(model)
    with pytest.raises(ValueError, match="layer 'unused' is not calibrated"):
        octavo.quantize_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=data())
    assert_unchanged(model, before)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_after_an_error_in_the_block_nothing_is_smoothed_but_what_was_seen_counts():
    model = attention()
    octavo.prepare_(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), include=READERS)
    with pytest.raises(RuntimeError), octavo.calibrating(model):
        model(data() * 2)
        raise RuntimeError
    assert not model.q.is_smoothed and torch.equal(model.before.weight, attention().before.weight)
    with pytest.raises(ValueError, match="layer 'q' is not calibrated"):
        model(data())
    with octavo.calibrating(model):
        model(data())
    assert model.q.is_folded


def test_a_static_scheme_needs_a_second_block_and_says_so():
    model = calibrated(attention(), replace(STATIC, method=octavo.SmoothQuant()))
    with pytest.raises(ValueError, match="layer 'q' is not calibrated: .*run the data a second time"):
        octavo.freeze_(model)
    with octavo.calibrating(model):
        model(data())
    octavo.freeze_(model)
    at_once = attention()
    octavo.quantize_(
        at_once, replace(STATIC, method=octavo.SmoothQuant()), include=READERS, data=iter([data()])
    )
    assert_bits_equal(model(data()), at_once(data()))


def test_frozen_codes_are_those_of_the_prepared_layer():
    for scheme in (
        replace(STATIC, method=octavo.SmoothQuant()),
        replace(STATIC, method=octavo.SmoothQuant(fold=False)),
    ):
        model = calibrated(attention(), scheme, passes=2)
        codes = model.q.quantized_weight.codes
        expected = model(data()).detach()
        octavo.freeze_(model)
        assert torch.equal(model.q.codes(), codes)
        assert_relative(model(data()), expected, 2**-18)  # rounding of k = 24 sums and a sigmoid


def test_a_layer_that_divides_itself_survives_half_precision_and_files(tmp_path):
    model = octavo.quantized(attention(), replace(STATIC, method=octavo.SmoothQuant(fold=False)), data=data())
    assert type(model.q) is StaticSmoothedLinear
    multiplier = model.q.input_multiplier.detach().clone()
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = Attention(nn.LayerNorm(K))
    assert_bits_equal(octavo.load(tmp_path, skeleton)(data()), model(data()))
    assert_bits_equal(model.bfloat16().q.input_multiplier.detach(), multiplier)
    with torch.autocast("cpu"):
        assert model.q(data()).dtype == torch.bfloat16


# --- parity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85])
def test_parity_with_torchao(alpha):
    """It adds float32's eps to both ranges; 2^-21 is for a few roundings in float32."""
    core = pytest.importorskip("torchao.prototype.smoothquant.core")
    linear, x = nn.Linear(K, 16), data()
    observer = core.SmoothQuantObserver(linear.weight, alpha)
    observer(x)
    theirs = observer.calculate_qparams()[0].detach()
    layer = octavo.quantized(linear, octavo.Int8Dynamic(method=octavo.SmoothQuant(alpha)), data=x)
    eps = torch.finfo(torch.float32).eps
    relative = (
        alpha * eps / x.abs().amax(0) + (1 - alpha) * eps / linear.weight.detach().abs().amax(0) + 2**-21
    )
    assert_within(1 / layer.input_multiplier, theirs, relative * theirs)
