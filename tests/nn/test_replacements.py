# SPDX-License-Identifier: Apache-2.0
"""Float layers of other classes than nn.Linear become what their twins become: nn.Linear layers with the same numbers.

GPT-2 has transformers' Conv1D, whose weight is [k, n]; a class of this file stands for what users register.
"""

import copy
import json

import pytest
import torch
from asserts import assert_bits_equal
from models import every_scheme
from torch import nn

import octavo
from octavo.nn import replacements
from octavo.nn.replacements import matrix_of, register, replacement_of

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

IDS = {"input_ids": torch.arange(24).reshape(2, 12)}
LAYERS = [f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


class Columns(nn.Module):
    """A user's linear layer: a weight [k, n], perhaps no bias, no attribute that says its sizes."""

    def __init__(self, k: int, n: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, n) / k**0.5)
        self.bias = nn.Parameter(torch.randn(n)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class Bare(nn.Module):
    """Without any attribute `bias`, and a weight [n, k]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Doubled(Columns):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.fixture
def columns(monkeypatch):
    monkeypatch.setattr(replacements, "REGISTRY", dict(replacements.REGISTRY))
    return register(Columns, transposed=True)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Columns(12, 24), nn.ReLU(), Columns(24, 20), Columns(20, 6, bias=False)).eval()


BATCH = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def twin(model: nn.Module) -> nn.Module:
    """A copy with nn.Linear layers of the same weights and biases."""
    result = copy.deepcopy(model)
    for name, layer in list(result.named_modules()):
        if isinstance(layer, Conv1D | Columns):
            k, n = layer.weight.shape
            linear = nn.Linear(k, n, bias=layer.bias is not None).train(layer.training)
            linear.weight.data.copy_(layer.weight.T)
            if layer.bias is not None:
                linear.bias.data.copy_(layer.bias.data)
            result.set_submodule(name, linear)
    return result


def output(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits if isinstance(batch, dict) else model(batch)


def assert_same_model(found: nn.Module, expected: nn.Module, batch):
    """The same layers under the same names, of the same bits, and the same output."""
    assert [(name, type(each)) for name, each in found.named_modules()] == [
        (name, type(each)) for name, each in expected.named_modules()
    ]
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert_bits_equal(output(found, batch), output(expected, batch))


# --- quantize_ ------------------------------------------------------------------------------------------------------


@every_scheme
def test_gpt2_becomes_what_its_twin_becomes(scheme):
    model, expected = gpt2(), twin(gpt2())
    report = octavo.quantize_(model, scheme, data=[IDS])
    octavo.quantize_(expected, scheme, data=[IDS])
    assert_same_model(model, expected, IDS)
    assert [(row.name, row.kind) for row in report.quantized] == [(name, "Conv1D") for name in LAYERS]


@every_scheme
def test_a_registered_class_becomes_what_its_twin_becomes(columns, scheme):
    model, expected = mlp(), twin(mlp())
    report = octavo.quantize_(model, scheme, data=[BATCH])
    octavo.quantize_(expected, scheme, data=[BATCH])
    assert_same_model(model, expected, BATCH)
    assert [row.kind for row in report.quantized] == ["Columns"] * 3


def test_a_copy_leaves_the_model_and_one_layer_is_a_model(columns):
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    fast = octavo.quantized(model, octavo.Int8Dynamic())
    assert_same_model(fast, octavo.quantized(twin(model), octavo.Int8Dynamic()), IDS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer = Columns(12, 24)
    expected = octavo.quantized(twin(nn.Sequential(layer)), octavo.Int8Dynamic())[0]
    assert_bits_equal(octavo.quantized(layer, octavo.Int8Dynamic())(BATCH), expected(BATCH))
    with pytest.raises(ValueError, match="of the kind Columns, which cannot be replaced in place"):
        octavo.quantize_(layer, octavo.Int8Dynamic())


def test_a_class_need_not_know_of_a_bias(columns, tmp_path):
    register(f"{Bare.__module__}.Bare")
    model = nn.Sequential(Bare())
    linear = nn.Linear(12, 24, bias=False)
    linear.weight = model[0].weight
    octavo.save(octavo.quantized(model, octavo.Int8Dynamic()), tmp_path)
    loaded = octavo.load(tmp_path, nn.Sequential(Bare()))
    assert_bits_equal(loaded(BATCH), octavo.quantized(linear, octavo.Int8Dynamic())(BATCH))


def test_classes_that_nobody_registered_and_other_forwards_stay(columns):
    model = nn.Sequential(Columns(4, 4), Doubled(4, 4), nn.Bilinear(4, 4, 4))
    report = octavo.quantize_(model, octavo.Int8Dynamic())
    reasons = [row.reason for row in report.rows]
    remedy = "if it computes x @ W.T + bias, octavo.nn.replacements.register makes the class known"
    assert reasons == ["", f"Doubled has a forward of its own: {remedy}", "no scheme for this kind"]
    assert replacement_of(nn.Bilinear(4, 4, 4)) is None


def test_tied_and_nan_weights_are_seen_through_the_transposition(columns):
    model = nn.Sequential(Columns(4, 4), nn.Linear(4, 4), Columns(4, 4))
    model[1].weight = model[0].weight
    report = octavo.quantize_(model, octavo.Int8Dynamic())
    assert [row.action for row in report.rows] == ["kept", "kept", "quantized"]
    with torch.no_grad():
        bad = gpt2()
        bad.transformer.h[0].mlp.c_fc.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="mlp.c_fc.weight holds NaN"):
        octavo.quantize_(bad, octavo.Int8Dynamic())


def test_a_layer_that_contradicts_its_registration_stays_float(columns):
    """Also one with a square weight, of which no shape tells the axes, and one that computes something else."""
    layers = {"square": Columns(12, 12), "wide": Columns(12, 24), "doubled": Doubled(12, 12)}
    for transposed, wrong in ((True, {"doubled"}), (False, {"square", "wide", "doubled"})):
        register(Columns, transposed=transposed)
        register(Doubled, transposed=transposed)
        for name, layer in layers.items():
            model = nn.Sequential(layer)
            (row,) = octavo.quantize_(copy.deepcopy(model), octavo.Int8Dynamic()).rows
            assert (row.action == "kept") == (name in wrong), (transposed, name)
            formula = f"x @ {'weight' if transposed else 'weight.T'} + bias"
            assert row.reason.startswith(f"registered as {formula}, it " if name in wrong else ""), row.reason
        for dtype in (torch.bfloat16, torch.float16):
            model = nn.Sequential(Columns(200, 30)).to(dtype)
            report = octavo.quantize_(model, octavo.Int8Dynamic())
            assert report.rows[0].action == ("quantized" if transposed else "kept"), dtype


def test_falcons_layers_are_linear_layers(tmp_path):
    """Their class has a forward of its own, which computes what nn.Linear's does."""
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon").FalconLinear
    layer, linear = falcon(12, 24), nn.Linear(12, 24)
    linear.load_state_dict(layer.state_dict())
    model, expected = (
        octavo.quantized(nn.Sequential(each), octavo.Int8Dynamic()) for each in (layer, linear)
    )
    assert_bits_equal(model(BATCH), expected(BATCH))
    octavo.save(model, tmp_path)
    assert_bits_equal(octavo.load(tmp_path, nn.Sequential(falcon(12, 24)))(BATCH), expected(BATCH))


@pytest.mark.parametrize(
    "bad", [3, int, "Columns", Columns(2, 2)], ids=["number", "int", "short name", "layer"]
)
def test_what_is_no_class_is_not_registered(bad):
    before = dict(replacements.REGISTRY)
    with pytest.raises(TypeError, match="a subclass of torch.nn.Module, or its full name"):
        register(bad)
    assert before == replacements.REGISTRY


# --- files ----------------------------------------------------------------------------------------------------------


@every_scheme
def test_a_saved_gpt2_fills_a_skeleton_without_weights(tmp_path, scheme):
    model = octavo.quantized(gpt2(), scheme, data=[IDS])
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = gpt2()
    assert_same_model(octavo.load(tmp_path, skeleton), model, IDS)


@pytest.mark.parametrize("step", [octavo.quantize_, octavo.prepare_])
def test_a_saved_registered_class_fills_a_skeleton(columns, tmp_path, step):
    model = mlp()
    step(model, octavo.Int8Dynamic())
    octavo.save(model, tmp_path)
    with torch.device("meta"):
        skeleton = mlp()
    loaded = octavo.load(tmp_path, skeleton)
    assert_same_model(loaded, model, BATCH)
    octavo.freeze_(loaded)
    assert_bits_equal(output(loaded, BATCH), output(octavo.quantized(mlp(), octavo.Int8Dynamic()), BATCH))


@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(), octavo.Int8WeightOnly()], ids=repr)
@pytest.mark.parametrize("shard_size", [10**9, 4000])
def test_a_folder_of_gpt2_is_quantized_without_the_model(tmp_path, scheme, shard_size):
    from octavo.conversion.folder import quantize_folder

    gpt2().save_pretrained(tmp_path / "float")
    report = quantize_folder(tmp_path / "float", tmp_path / "int8", scheme, shard_size=shard_size)
    assert [(row.name, row.kind) for row in report.quantized] == [(name, "Conv1D") for name in LAYERS]
    expected = octavo.quantized(gpt2(), scheme)
    assert_same_model(octavo.load(tmp_path / "int8"), expected, IDS)
    expected.save_pretrained(tmp_path / "saved")
    assert_same_model(octavo.load(tmp_path / "saved"), expected, IDS)


def test_no_other_program_takes_the_codes_for_a_conv1d(tmp_path):
    """Its weight is [k, n], the codes are [n, k]: readers of compressed-tensors would take one for the other."""
    octavo.quantized(gpt2(), octavo.Int8Dynamic()).save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry.keys() == {"octavo"} and list(entry["octavo"]["layers"]) == LAYERS
    with pytest.raises(ValueError, match="quant"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# --- on the way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_scales", [False, True])
def test_an_optimizer_made_before_trains_the_users_own_parameters(learn_scales):
    model = gpt2().train()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    octavo.prepare_(model, octavo.Int8Dynamic(), learn_scales=learn_scales)
    loss = model(**IDS, labels=IDS["input_ids"]).loss
    loss.backward()
    optimizer.step()
    model.eval()
    for name in LAYERS:
        layer = model.get_submodule(name)
        parameter, value = before[f"{name}.weight"]
        assert layer.weight is parameter and parameter.grad.shape == value.shape
        assert layer.weight_matrix.shape == value.T.shape and not torch.equal(parameter, value)
    trained = copy.deepcopy(gpt2())
    trained.load_state_dict({name: p for name, (p, _) in before.items()}, strict=False)
    expected = output(octavo.quantized(trained, octavo.Int8Dynamic()), IDS)
    octavo.freeze_(model)
    if not learn_scales:
        assert_bits_equal(output(model, IDS), expected)


@every_scheme
def test_a_prepared_layer_computes_what_its_twin_does(columns, scheme):
    model, expected = mlp(), twin(mlp())
    results = []
    for each in (model, expected):
        octavo.prepare_(each, scheme)
        for _ in range(scheme.calibration_passes):
            with octavo.calibrating(each), torch.no_grad():
                each(BATCH)
        y = each(BATCH)
        y.square().sum().backward()
        results.append(
            (y.detach(), [matrix_of(layer).detach() for layer in each if hasattr(layer, "weight")])
        )
    torch.testing.assert_close(results[0][0], results[1][0])
    for found, wanted in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(found, wanted)
    for layer, other in zip(model, expected, strict=True):
        if hasattr(layer, "weight"):
            torch.testing.assert_close(layer.weight.grad.T, other.weight.grad)


def test_equalization_moves_the_same_factors(columns):
    model, expected = mlp(), twin(mlp())
    pairs = octavo.equalize_(model, BATCH)
    assert pairs == octavo.equalize_(expected, BATCH) and len(pairs) == 2
    for layer, other in zip(model, expected, strict=True):
        if isinstance(layer, Columns):
            assert torch.equal(layer.weight.T, other.weight)


# --- looking at it --------------------------------------------------------------------------------------------------


def test_figures_of_gpt2_are_those_of_its_twin():
    model = gpt2()
    fast, linear = (octavo.quantized(each, octavo.Int8Dynamic()) for each in (model, twin(model)))
    found, expected = octavo.compare(model, fast, [IDS]), octavo.compare(twin(model), linear, [IDS])
    assert [layer.name for layer in found.layers] == LAYERS
    for layer, other in zip(
        found.layers, expected.layers, strict=True
    ):  # the float outputs differ by roundings
        assert layer.local_sqnr_db == pytest.approx(other.local_sqnr_db, rel=1e-3)
    assert octavo.correct_bias_(fast, model, [IDS]).keys() == set(LAYERS)
    rows = octavo.sensitivity(model, [IDS], [octavo.Int8Dynamic()]).rows
    assert [row.name for row in rows if row.scheme is not None] == LAYERS


def test_most_bytes_of_gpt2_are_served():
    """Embeddings and norms stay: 0 % before Conv1D was known, 96 % of a GPT-2 that is not all vocabulary."""
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=128, n_layer=2, n_head=4, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    report = octavo.quantize_(transformers.GPT2LMHeadModel(config), octavo.Int8Dynamic())
    assert sum(row.bytes_before for row in report.quantized) / report.bytes_before > 0.96


def test_the_gelu_of_gpt2_is_fused_into_its_layer():
    model = octavo.quantized(gpt2(), octavo.Int8Dynamic())
    expected = output(model, IDS)
    report = octavo.fuse_(model, IDS)
    fused = [(row.step, row.name) for row in report.rows if row.action == "fused"]
    assert ("activations", "transformer.h.0.mlp.c_fc") in fused
    assert model.transformer.h[0].mlp.c_fc.activation == "gelu_tanh"
    octavo.unfuse_(model)
    assert_bits_equal(output(model, IDS), expected)
