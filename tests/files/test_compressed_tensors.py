# SPDX-License-Identifier: Apache-2.0
"""The compressed-tensors format: theirs is read here, ours there, and what octavo cannot compute is refused."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import octavo
from octavo.files import compressed_tensors
from octavo.files.compressed_tensors import CompressedTensors
from octavo.files.renaming import own_names
from octavo.formats.int8 import ARGUMENTS
from octavo.huggingface import models as pretrained
from octavo.nn import QuantLinear, StaticQuantLinear

GOLDEN = np.load(
    Path(__file__).parents[1] / "data/compressed_tensors_int8.npz"
)  # written by compressed-tensors 0.20.0
PER_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
STATIC = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": False, "dynamic": False}


def golden(name: str) -> torch.Tensor:
    array = torch.from_numpy(GOLDEN[name].copy())
    return array.view(torch.bfloat16) if array.dtype == torch.uint16 else array


def entry(weights=(), activations=None, **options) -> dict:
    weights = {**ARGUMENTS, **dict(weights)}
    group = {"targets": ["Linear"], "format": None, "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": [],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        **options,
    }


def folder_with(folder, config: object, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def one_layer(name: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a golden case as those of layer "0"."""
    found = {key.split("/")[1]: golden(key) for key in GOLDEN.files if key.startswith(name + "/")}
    found.pop("deq")
    return {f"0.{leaf}": tensor for leaf, tensor in {**found, **more}.items()}


def skeleton() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(64, 24, bias=False))


# Reading theirs


@pytest.mark.parametrize("name", ["int8_sym_channel", "int8_sym_tensor", "int8_sym_channel_bf16"])
@pytest.mark.parametrize("activations", [None, PER_TOKEN])
def test_golden_weights_are_read_bit_for_bit(tmp_path, name, activations):
    strategy = {"strategy": "tensor"} if "tensor" in name else {}
    layer = octavo.load(folder_with(tmp_path, entry(strategy, activations), one_layer(name)), skeleton())[0]
    expected = golden(name + "/deq")
    assert torch.equal(layer.dequantize(expected.dtype), expected)
    assert layer.codes().min() == -128 or "tensor" in name  # their range is one code wider than ours
    assert layer.scheme == (octavo.Int8WeightOnly() if activations is None else octavo.Int8Dynamic())


def test_their_code_minus_128_is_computed_exactly(tmp_path):
    layer = octavo.load(folder_with(tmp_path, entry(), one_layer("int8_sym_channel")), skeleton())[0]
    # Int8WeightOnly has codes for 0 and for the largest value of a row: what is left are three float roundings.
    assert torch.allclose(layer(torch.eye(64)), golden("int8_sym_channel/deq").T, rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize("zero_point", [None, 0, -7])
def test_a_static_layer_gets_its_input_scale_and_zero_point(tmp_path, zero_point):
    more = {"input_scale": torch.tensor([0.25]).bfloat16()}
    if zero_point is not None:
        more["input_zero_point"] = torch.tensor([zero_point], dtype=torch.int8)
    activations = {**STATIC, "symmetric": zero_point is None}
    folder = folder_with(tmp_path, entry((), activations), one_layer("int8_sym_channel", **more))
    layer = octavo.load(folder, skeleton())[0]
    assert isinstance(layer, StaticQuantLinear) and layer.scheme.symmetric == (zero_point is None)
    assert layer.input_scale.dtype == torch.float32 and layer.input_scale.tolist() == [0.25]
    assert layer.input_zero_point.dtype == torch.int32 and layer.input_zero_point.tolist() == [
        zero_point or 0
    ]


def test_zero_points_of_weights_are_refused_unless_they_are_zero(tmp_path):
    zero = torch.zeros(24, 1, dtype=torch.int8)
    folder = folder_with(tmp_path, entry(), one_layer("int8_sym_channel", weight_zero_point=zero))
    assert isinstance(octavo.load(folder, skeleton())[0], QuantLinear)
    folder = folder_with(tmp_path, entry(), one_layer("int8_asym_channel"))
    with pytest.raises(
        ValueError, match="0.weight has zero points; octavo computes with symmetric weights only"
    ):
        octavo.load(folder, skeleton())


def test_targets_and_ignore_are_names_patterns_or_classes_and_names_come_first(tmp_path):
    def group(target, activations):
        return {"targets": target, "weights": ARGUMENTS, "input_activations": activations}

    groups = {"a": group(["Linear"], None), "b": group(["re:.*up", "down"], PER_TOKEN)}
    config = entry(config_groups=groups, ignore=["re:he.d", "Bilinear"])
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("in", "x_up", "down", "head")})
    quantized = octavo.quantized(model, {"head": None, "*": octavo.Int8Dynamic()})
    folder = folder_with(tmp_path, config, quantized.state_dict())
    schemes = CompressedTensors().read(folder, model).schemes
    dynamic, weight_only = octavo.Int8Dynamic(), octavo.Int8WeightOnly()
    assert schemes == {"in": weight_only, "x_up": dynamic, "down": dynamic}


def test_tensors_without_a_place_are_named_in_a_warning(tmp_path, caplog):
    folder = folder_with(
        tmp_path, entry(), {**one_layer("int8_sym_channel"), "position_ids": torch.arange(3)}
    )
    with caplog.at_level(logging.WARNING, "octavo"):
        octavo.load(folder, skeleton())
    assert "position_ids" in caplog.text


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "has no quantization_config"),
        ([], "has no quantization_config"),
        ({}, "quant_method is None; octavo reads compressed-tensors"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": "compressed-tensors"}, "is damaged"),
        (entry(config_groups=[]), "is damaged"),
        (entry(config_groups={"W8A8": ["Linear"]}), "is damaged"),
        (entry(ignore=["re:("]), "is damaged"),
        (entry(ignore=[7]), "is damaged"),
        (
            entry(format="float-quantized"),
            "format 'float-quantized' is not read; int-quantized and pack-quantized are",
        ),
        (entry({"num_bits": 1, "strategy": "channel"}, format="pack-quantized"), "weights .* are not read"),
        (entry({"strategy": "group", "group_size": 24}, format="pack-quantized"), "weights .* are not read"),
        (entry(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (entry(transform_config={"config_groups": {}}), "transform_config"),
        (entry(sparsity_config={"format": "sparse-24-bitmask"}), "stored sparse"),
        (entry({"num_bits": 9}), "weights .* are not read as int-quantized; integers of 2 to 8 bits"),
        (entry({"type": "float"}), "weights .* are not read as int-quantized; integers"),
        (entry({"strategy": "group", "group_size": 40}), "weights .* are not read as int-quantized"),
        (entry({"block_structure": [128, 128]}), "weights .* are not read as int-quantized"),
        (entry((), {**PER_TOKEN, "num_bits": 4}), "input_activations .* are not read"),
        (
            entry((), {**PER_TOKEN, "strategy": "group", "group_size": 24}),
            "input_activations .* are not read",
        ),
        (entry((), {**STATIC, "strategy": "channel"}), "input_activations .* are not read"),
        ({"octavo": {"layers": {"0": {"name": "Int3"}}}}, "Int3"),
        ({"octavo": {}}, "is damaged"),
    ],
    ids=range(24),
)
def test_a_config_that_octavo_cannot_mean_is_refused(tmp_path, config, message):
    given = skeleton()
    with pytest.raises(ValueError, match=message):
        octavo.load(folder_with(tmp_path, config, one_layer("int8_sym_channel")), given)
    assert type(given[0]) is nn.Linear


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("0.weight_scale"), "lacks tensors: 0.weight_scale"),
        (
            lambda t: t.update({"0.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
            "unexpected tensors: 0.weight_g_idx",
        ),
        (
            lambda t: t.update({"0.weight": torch.zeros(24, 64)}),
            "torch.float32 in the checkpoint, torch.int8",
        ),
        (
            lambda t: t.update({"0.weight": torch.zeros(24, 32, dtype=torch.int8)}),
            r"\(24, 32\) in the checkpoint",
        ),
        (lambda t: t.update({"0.weight_scale": torch.ones(24)}), r"\(24,\) in the checkpoint"),
        (lambda t: t.update({"0.weight_scale": torch.ones(24, 1).int()}), "torch.int32 in the checkpoint"),
        (lambda t: t["0.weight_scale"].fill_(float("nan")), "0.weight_scale holds values that are no scales"),
        (lambda t: t["0.weight_scale"][3].fill_(-1), "0.weight_scale holds values that are no scales"),
    ],
)
def test_tensors_that_are_no_layer_are_refused(tmp_path, change, message):
    tensors = one_layer("int8_sym_channel")
    change(tensors)
    given = skeleton()
    with pytest.raises(ValueError, match=message):
        octavo.load(folder_with(tmp_path, entry(), tensors), given)
    assert type(given[0]) is nn.Linear


# transformers


def test_a_model_quantized_in_memory_is_saved_as_what_it_is(tmp_path):
    """Its own save_pretrained, without a word to it: the folder loads equal, or is refused, but is never garbage."""
    from tiny_models import check_equal_states, llama, logits, transformers

    model = llama()
    octavo.quantize_(model, octavo.Int8Dynamic(), exclude="lm_head")
    model.save_pretrained(tmp_path)
    loaded = pretrained.load_quantized(tmp_path)
    check_equal_states(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    if importlib.util.find_spec("compressed_tensors") is None:
        with pytest.raises(ImportError, match="compressed"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    check_dequantized(stock, model)


def check_dequantized(stock: nn.Module, ours: nn.Module):
    """compressed-tensors decompresses, at the first forward, to what our layers dequantize to, bit for bit."""
    from tiny_models import IDS

    with torch.no_grad():
        stock(IDS)
    modules, compared = dict(stock.named_modules()), 0
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(modules[name].weight, layer.dequantize(modules[name].weight.dtype)), name
            compared += 1
    assert compared


@pytest.mark.parametrize(
    "scheme",
    [
        octavo.Int8WeightOnly(),
        octavo.Int8Dynamic(symmetric=False),
        octavo.Int8Static(),
        octavo.Int8Static(symmetric=False),
    ],
    ids=repr,
)
def test_every_scheme_that_has_words_is_read_by_their_package(tmp_path, scheme):
    pytest.importorskip("compressed_tensors")
    from tiny_models import IDS, llama, transformers

    model = llama()
    octavo.quantize_(model, {"*.q_proj": octavo.Int8Dynamic(), "*": scheme}, data=IDS)
    model.save_pretrained(tmp_path)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    check_dequantized(stock, model)
    for name, layer in model.named_modules():
        if isinstance(layer, StaticQuantLinear):
            theirs = stock.get_submodule(name)
            assert torch.equal(theirs.input_scale, layer.input_scale), name
            assert scheme.symmetric or theirs.input_zero_point.tolist() == layer.input_zero_point.tolist()


@pytest.mark.parametrize(
    "activations", [None, PER_TOKEN, STATIC, {**STATIC, "symmetric": True}], ids=range(4)
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_their_package_wrote_is_read(tmp_path, activations, dtype):
    pytest.importorskip("compressed_tensors")
    from tiny_models import llama, transformers

    write_with_their_package(llama(dtype=dtype).to(dtype), activations, tmp_path)
    ours = pretrained.load_quantized(tmp_path)
    check_dequantized(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), ours)
    assert ours.lm_head.weight.dtype == dtype and isinstance(ours.lm_head, nn.Linear)
    if activations and not activations["dynamic"]:
        stored = load_file(tmp_path / "model.safetensors")
        for name, layer in ours.named_modules():
            if isinstance(layer, StaticQuantLinear):
                assert torch.equal(layer.input_scale, stored[f"{name}.input_scale"].float())
                assert (
                    activations["symmetric"] or layer.input_zero_point == stored[f"{name}.input_zero_point"]
                )


def write_with_their_package(model, activations, folder):
    """As llm-compressor does: scales from their own calculate_qparams, lm_head left float."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    config = entry((), activations, ignore=["lm_head"], quantization_status="frozen")
    config = {key: config[key] for key in ("format", "ignore", "quantization_status", "config_groups")}
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    apply_quantization_config(model, QuantizationConfig(**config))
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            scheme, weight = layer.quantization_scheme, layer.weight.detach()
            scale, _ = calculate_qparams(*weight.aminmax(dim=1, keepdim=True), scheme.weights)
            layer.weight_scale.data = scale.to(weight.dtype)
        if hasattr(layer, "input_scale"):
            ends = torch.tensor([-1.0]), torch.tensor([3.0])
            scale, zero_point = calculate_qparams(*ends, scheme.input_activations)
            layer.input_scale.data = scale.to(weight.dtype)
            if hasattr(layer, "input_zero_point"):
                layer.input_zero_point.data = zero_point.to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def test_a_scheme_without_words_is_refused_by_transformers_and_read_by_octavo(tmp_path, monkeypatch):
    from tiny_models import check_equal_states, llama, transformers

    monkeypatch.setattr(compressed_tensors, "TENSORS", {"weight"})  # as if the format knew no scales
    model = llama()
    octavo.quantize_(model, octavo.Int8Dynamic(symmetric=False))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `quant_method`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = pretrained.load_quantized(tmp_path)
    check_equal_states(loaded, model)
    assert loaded.lm_head.scheme == octavo.Int8Dynamic(symmetric=False)


def test_an_int32_bias_has_no_words_either(tmp_path):
    """Others would take the codes for floats."""
    from tiny_models import IDS, check_equal_states, llama, transformers

    model = llama(attention_bias=True)
    octavo.quantize_(model, octavo.Int8Static(int32_bias=True), data=IDS)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no `quant_method`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    check_equal_states(pretrained.load_quantized(tmp_path), model)


def test_a_model_that_was_loaded_is_saved_as_what_it_is(tmp_path):
    from tiny_models import check_equal_states, llama

    octavo.save(octavo.quantized(llama(), octavo.Int8Dynamic()), tmp_path / "ours")
    model = octavo.load(tmp_path / "ours", llama())
    model.save_pretrained(tmp_path / "theirs")
    check_equal_states(pretrained.load_quantized(tmp_path / "theirs"), model)


def test_a_part_of_a_model_is_saved_as_what_it_is(tmp_path):
    """LlamaModel shares its config with the LlamaForCausalLM around it, and its layers have shorter names."""
    from tiny_models import check_equal_states, llama

    model = llama()
    octavo.quantize_(model, octavo.Int8Dynamic())
    model.model.save_pretrained(tmp_path)
    check_equal_states(pretrained.load_quantized(tmp_path), model.model)


def test_a_transformers_model_inside_another_module_is_told_too(tmp_path):
    from tiny_models import bert, check_equal_states, transformers

    encoder = pretrained.SentenceEncoder(bert(transformers.BertModel))
    copy = octavo.quantized(encoder, octavo.Int8Dynamic())
    assert not hasattr(encoder.transformer.config, "quantization_config")
    copy.transformer.save_pretrained(tmp_path)
    check_equal_states(pretrained.load_quantized(tmp_path), copy.transformer)


def test_a_base_model_reads_the_names_of_the_whole_one_and_back(tmp_path):
    from tiny_models import bert, transformers

    whole = bert()
    base = {name: f"bert.{name}" for name in whole.bert.state_dict()}
    assert own_names(whole, base) == base
    assert own_names(bert(transformers.BertModel), base.values()) == {b: a for a, b in base.items()}
    assert own_names(whole, ["elsewhere.weight"]) == {"elsewhere.weight": "elsewhere.weight"}
