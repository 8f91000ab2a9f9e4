# SPDX-License-Identifier: Apache-2.0
"""octavo as a quantization backend of transformers: the same bits as quantize_, through from_pretrained and back."""

import json

import pytest
import torch

import octavo
from octavo.integrations import transformers as integration
from octavo.nn import QuantLinear

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
IDS = torch.tensor([[5, 17, 99, 0, 3, 8, 42], [1, 2, 3, 4, 5, 6, 7]])


def llama(tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SIZES,
        intermediate_size=96,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=100, **ends)
    ).eval()


def classifier():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, intermediate_size=96, num_labels=3)
    ).eval()


MODELS = {"llama": llama, "tied llama": lambda: llama(tied=True), "gpt2": gpt2, "bert": classifier}
SCHEMES = ["int8-dynamic", "int4-weight-only:group_size=64", "nf4", octavo.Int8Dynamic(group_size=32)]


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}


@pytest.fixture
def float_folder(tmp_path):
    llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def quantized_folder(float_folder, tmp_path):
    config = octavo.OctavoConfig("int8-dynamic")
    model = transformers.AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_loading_quantizes_as_quantize_does_and_a_saved_folder_gives_the_same_bits(make, scheme, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "float")
    octavo.quantize_(model, scheme)
    config = octavo.OctavoConfig(scheme)
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    assert quantized_layers(loaded) == quantized_layers(model)
    assert torch.equal(outputs(loaded), outputs(model))

    loaded.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert torch.equal(outputs(again), outputs(model))
    assert torch.equal(outputs(octavo.load(tmp_path / "quantized")), outputs(model))
    assert not any(parameter.requires_grad for parameter in layer_parameters(again))


def layer_parameters(model):
    return [
        each for module in model.modules() if isinstance(module, QuantLinear) for each in module.parameters()
    ]


def test_a_second_save_writes_the_same_bytes(quantized_folder, tmp_path):
    again = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)
    again.save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (quantized_folder / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_exclude_and_patterns_choose_layers_and_the_report_says_why(float_folder):
    config = octavo.OctavoConfig({"*.mlp.*": octavo.Int4WeightOnly(), "*": "int8-dynamic"}, exclude="lm_head")
    model = transformers.AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.scheme == octavo.Int4WeightOnly()
    assert model.model.layers[0].self_attn.q_proj.scheme == octavo.Int8Dynamic()
    rows = {row.name: row for row in model.hf_quantizer.report.rows}
    assert (rows["lm_head"].action, rows["lm_head"].reason) == ("kept", "excluded by 'lm_head'")
    assert rows["model.layers.0.mlp.up_proj"].action == "quantized"


def test_transformers_without_octavo_raises_instead_of_computing_with_codes(
    float_folder, tmp_path, monkeypatch
):
    for scheme in ("int8-dynamic", "nf4"):
        config = octavo.OctavoConfig(scheme)
        model = transformers.AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
        model.save_pretrained(tmp_path / scheme)
    auto = transformers.quantizers.auto
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "octavo")
    for scheme in ("int8-dynamic", "nf4"):
        with pytest.raises(RuntimeError, match="size mismatch|ignore_mismatched_sizes"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / scheme)


def test_the_base_model_of_a_folder_with_a_head_and_the_same_outputs(quantized_folder):
    whole = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)
    base = transformers.AutoModel.from_pretrained(quantized_folder)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_bfloat16_keeps_scales_and_codes(quantized_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)
    half = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder, dtype=torch.bfloat16)
    ours, theirs = model.model.layers[0].mlp.up_proj, half.model.layers[0].mlp.up_proj
    assert half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(ours.weight_scale, theirs.weight_scale) and ours.weight_scale.dtype == torch.float32
    assert torch.equal(ours.packed, theirs.packed)


def test_dequantize_gives_float_layers_with_the_weights_that_were_multiplied(tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = octavo.OctavoConfig("int8-weight-only")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    weight = model.transformer.h[0].mlp.c_fc.dequantize()
    before = outputs(model)
    model.dequantize()
    assert not quantized_layers(model) and not hasattr(model, "hf_quantizer")
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, weight.T)
    # 16-bit activations differ from float ones by at most half a step of 1 / 32,512 in each product.
    torch.testing.assert_close(outputs(model), before, atol=1e-3, rtol=0)


def test_generate_writes_the_same_tokens_after_reloading(quantized_folder, float_folder):
    config = octavo.OctavoConfig(octavo.Int8Dynamic)
    model = transformers.AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
    again = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)
    tokens = [each.generate(IDS, max_new_tokens=5, do_sample=False) for each in (model, again)]
    assert torch.equal(*tokens)


def test_quantizing_a_loaded_model_further_is_saved_as_what_it_is(float_folder, tmp_path):
    config = octavo.OctavoConfig("int8-dynamic", exclude="lm_head")
    model = transformers.AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)
    octavo.quantize_(model, octavo.NF4())
    assert isinstance(model.lm_head, QuantLinear)
    model.save_pretrained(tmp_path / "more")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "more")
    assert torch.equal(outputs(again), outputs(model))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"scheme": None}, "scheme is missing"),
        ({"scheme": "int9"}, "'int9' is unknown"),
        ({"scheme": octavo.Int8Static()}, "needs data, which from_pretrained does not have"),
        ({"scheme": octavo.Int8Dynamic(), "modules": ["lm_head"]}, r"unknown fields \['modules'\]"),
    ],
)
def test_configs_that_cannot_be_right_are_refused_at_once(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        octavo.OctavoConfig(**arguments)


def test_a_pattern_that_matches_nothing_is_refused(float_folder):
    config = octavo.OctavoConfig("nf4", exclude="head")
    with pytest.raises(ValueError, match="pattern 'head' matches no layer"):
        transformers.AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_maps_of_the_cpu_are_accepted(device_map, quantized_folder):
    pytest.importorskip("accelerate")
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder, device_map=device_map)
    plain = transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)
    assert torch.equal(outputs(model), outputs(plain))


def test_other_devices_are_refused(float_folder):
    pytest.importorskip("accelerate")
    config = octavo.OctavoConfig("nf4")
    with pytest.raises(ValueError, match="octavo's layers run on the CPU"):
        transformers.AutoModelForCausalLM.from_pretrained(
            float_folder, quantization_config=config, device_map={"model": "disk", "lm_head": "cpu"}
        )


def test_a_folder_that_lacks_a_scale_is_refused(quantized_folder):
    safetensors = pytest.importorskip("safetensors.torch")
    file = quantized_folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="up_proj.weight_scale is missing"):
        transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)


def test_a_folder_whose_scale_is_nan_is_refused(quantized_folder):
    safetensors = pytest.importorskip("safetensors.torch")
    file = quantized_folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][0] = float("nan")
    safetensors.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weight_scale"):
        transformers.AutoModelForCausalLM.from_pretrained(quantized_folder)


def test_the_config_is_plain_json(quantized_folder):
    entry = json.loads((quantized_folder / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "octavo"
    assert integration.OctavoConfig.from_dict(entry).octavo == entry["octavo"]
