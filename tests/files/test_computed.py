# SPDX-License-Identifier: Apache-2.0
"""Tensors that files need not hold: computed as transformers computes them, never drawn."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert, check_equal_states, folder_of, llama, transformers
from torch import nn

import octavo
from octavo.conversion.folder import quantize_folder
from octavo.files import compressed_tensors, computed
from octavo.huggingface import models as pretrained

SIZES = dict(
    **dict(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
    ),
    **dict(encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=64, max_position_embeddings=16, pad_token_id=0),
)


def marian():
    torch.manual_seed(0)
    return transformers.MarianMTModel(transformers.MarianConfig(**SIZES, decoder_start_token_id=0)).eval()


def bart():
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES)).eval()


def without(folder, *words):
    """Takes tensors out of the folder's file, as older files lack them."""
    file = folder / "model.safetensors"
    kept = {
        name: tensor for name, tensor in load_file(file).items() if not any(word in name for word in words)
    }
    save_file(kept, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "make, words", [(marian, ["final_logits_bias", "embed_positions"]), (bart, ["final_logits_bias"])]
)
def test_tensors_that_transformers_does_not_miss_are_computed(tmp_path, make, words):
    folder = folder_of(make(), tmp_path / "source")
    without(folder, *words)
    quantize_folder(folder, tmp_path / "int8", octavo.Int8Dynamic())
    expected = pretrained.load_model(folder)
    octavo.quantize_(expected, octavo.Int8Dynamic())
    check_equal_states(octavo.load(tmp_path / "int8"), expected)
    with torch.device("meta"):
        given = make()
    check_equal_states(octavo.load(tmp_path / "int8", given), expected)


def test_a_tensor_that_would_be_drawn_at_random_stays_missing(monkeypatch):
    """Even if the class says that it may be missing."""
    model = bert()
    monkeypatch.setattr(
        model, "_keys_to_ignore_on_load_missing", ["word_embeddings", "LayerNorm"], raising=False
    )
    missing = [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.LayerNorm.bias",
        "cls.predictions.bias",
    ]
    found = computed.may_be_missing(model, missing)
    assert (
        found.keys() == {"bert.embeddings.LayerNorm.bias"}
        and not found["bert.embeddings.LayerNorm.bias"].any()
    )


def test_a_weight_that_transformers_would_miss_is_missed(tmp_path):
    """Ones are what a norm begins with, and not what it is."""
    folder = folder_of(bart(), tmp_path / "source")
    without(folder, "encoder.layernorm_embedding.weight")
    with pytest.raises(ValueError, match="do not hold model.encoder.layernorm_embedding.weight"):
        quantize_folder(folder, tmp_path / "int8", octavo.Int8Dynamic())


def test_neither_the_model_nor_the_random_numbers_change():
    model = marian()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    computed.values(model, ["model.encoder.embed_positions.weight", "final_logits_bias"])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_modules_compute_nothing():
    assert computed.values(nn.Sequential(nn.Linear(2, 2, device="meta")), ["0.weight", "0.bias"]) == {}
    assert computed.transient_buffers(nn.BatchNorm1d(3, device="meta")) == {}


def test_buffers_are_computed_for_a_model_inside_another_module():
    with torch.device("meta"):
        model = nn.ModuleDict({"inner": llama()})
    found = computed.transient_buffers(model)
    expected = dict(nn.ModuleDict({"inner": llama()}).named_buffers())
    assert found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def test_what_transformers_passes_over_is_not_warned_of(tmp_path, caplog):
    """Frequencies of every layer, as old Llama files hold them, and ids of positions."""
    model = llama()
    octavo.quantize_(model, octavo.Int8Dynamic())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"model.rotary_emb.inv_freq": torch.ones(4), "strange": torch.ones(1)}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    compressed_tensors.CompressedTensors().read(tmp_path, llama())
    assert "strange" in caplog.text and "inv_freq" not in caplog.text
