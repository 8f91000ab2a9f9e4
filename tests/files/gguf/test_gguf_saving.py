# SPDX-License-Identifier: Apache-2.0
"""GGUF files that are written: what was opened goes back byte for byte, and what is encoded reads as it should."""

import re

import pytest
import torch

import octavo
from octavo import ops
from octavo.files.gguf import values
from octavo.files.gguf.header import read_header

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_files import ARCHITECTURES, IDS, tiny, write

MIXED = {"attn_(q|qkv)": "Q4_1", "attn_k": "Q5_0", "attn_v": "F16", "ffn_down": "Q4_0", "": "Q8_0"}


def types_of(path):
    return {name: info.type for name, info in read_header(path).tensors.items()}


def joined(weights):
    """`weights`, those of experts, which are layers, as transformers has them: one tensor for all."""
    found, experts = {}, {}
    for name, weight in weights.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match:
            experts.setdefault(f"{match[1]}.{match[3]}", []).append(weight)
        else:
            found[name] = weight
    return found | {name: torch.stack(each) for name, each in experts.items()}


def output_of(model):
    with torch.no_grad():
        result = model(input_ids=IDS)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_was_opened_goes_back_byte_for_byte(architecture, tmp_path):
    path = write(architecture, tiny(architecture), tmp_path / "a.gguf", MIXED)
    model, _ = octavo.load_gguf(path, tokenizer=False)
    octavo.save_gguf(model, tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_tensors_and_values_that_no_layer_has_go_back_too(tmp_path):
    factors = {"rope_freqs.weight": torch.rand(8) + 1}
    path = write("llama", tiny("llama"), tmp_path / "a.gguf", MIXED, extra=factors)
    octavo.save_gguf(octavo.load(path), tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float_model_is_written_and_read(architecture, tmp_path):
    """The same weights, bit for bit, and a config that computes the same: the architecture's sizes are all there."""
    made = tiny(architecture)
    octavo.save_gguf(made.model, tmp_path / "a.gguf")
    model, _ = octavo.load_gguf(tmp_path / "a.gguf", tokenizer=False)
    found = joined(dict(model.named_parameters(remove_duplicate=False)))
    for name, parameter in made.model.named_parameters(remove_duplicate=False):
        if made.norm and "norm" in name:  # plus one in the file, which rounds
            assert (found[name] - parameter).abs().max() <= 2**-23
        else:
            assert torch.equal(found[name], parameter), name
    shift = (output_of(model) - output_of(made.model)).abs().max()
    assert shift == 0 if not made.norm else shift <= 2**-12


def test_a_type_is_that_of_every_matrix_and_norms_stay_float(tmp_path):
    made = tiny("llama")
    octavo.save_gguf(made.model, tmp_path / "a.gguf", octavo.GGML("Q8_0"))
    types = types_of(tmp_path / "a.gguf")
    assert {type for name, type in types.items() if "norm" in name} == {"F32"}
    assert {type for name, type in types.items() if "norm" not in name} == {"Q8_0"}
    model, _ = octavo.load_gguf(tmp_path / "a.gguf", tokenizer=False)
    weight = made.model.model.layers[0].mlp.up_proj.weight.detach()
    blocks = model.model.layers[0].mlp.up_proj.canonical_tensors()["weight_blocks"]
    assert torch.equal(blocks, ops.ggml_quantize(weight, "Q8_0"))


def test_a_quantized_model_is_written_in_a_type_of_ggml(tmp_path):
    model = tiny("qwen2").model
    octavo.quantize_(model, octavo.Int8WeightOnly())
    with pytest.raises(ValueError, match="is Int8, which GGUF has no type for; give a scheme"):
        octavo.save_gguf(model, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
    octavo.save_gguf(model, tmp_path / "a.gguf", "Q5_0")
    assert types_of(tmp_path / "a.gguf")["blk.0.attn_q.weight"] == "Q5_0"


def test_half_weights_keep_their_type(tmp_path):
    model = tiny("llama").model
    octavo.quantize_(model, octavo.HalfWeightOnly("bfloat16"))
    octavo.save_gguf(model, tmp_path / "a.gguf")
    types = types_of(tmp_path / "a.gguf")
    assert types["blk.0.attn_q.weight"] == "BF16" and types["blk.0.attn_norm.weight"] == "F32"
    loaded, _ = octavo.load_gguf(tmp_path / "a.gguf", tokenizer=False)
    expected = model.model.layers[0].self_attn.q_proj.dequantize()
    assert torch.equal(loaded.model.layers[0].self_attn.q_proj.dequantize(), expected)


def test_bad_input_is_refused_and_the_file_stays(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    model = tiny("llama").model
    with pytest.raises(TypeError, match="model is int"):
        octavo.save_gguf(3, path)
    with pytest.raises(TypeError, match="scheme is 4; a name"):
        octavo.save_gguf(model, path, 4)
    with pytest.raises(ValueError, match="scheme is 'Q9'; accepted are the mixtures"):
        octavo.save_gguf(model, path, "q9")
    with pytest.raises(ValueError, match="GGUF files are written of transformers' models"):
        octavo.save_gguf(torch.nn.Linear(2, 2), path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight' holds NaN or Inf"):
        octavo.save_gguf(model, path, "Q8_0")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


# --- importance -----------------------------------------------------------------------------------------------------


def test_importance_is_the_mean_square_of_what_a_layer_reads():
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(5, 4, 3)
    found = octavo.importance_matrix(torch.nn.Sequential(layer), list(x))
    assert found.keys() == {"0"}
    assert torch.equal(found["0"], x.double().square().flatten(0, 1).mean(0).float())


@pytest.mark.parametrize("old", [True, False])
def test_imatrix_files_are_read_as_they_are_written(tmp_path, old):
    given = {"blk.0.attn_q.weight": torch.rand(64), "blk.0.ffn_up.weight": torch.rand(64)}
    octavo.save_imatrix(given, tmp_path / "a", old=old)
    found = octavo.load_imatrix(tmp_path / "a")
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], given[name]) for name in given)


def test_sums_of_an_imatrix_are_divided_by_their_counts(tmp_path):
    """As llama.cpp writes them: sums of squares, [experts, k], and how many rows each expert saw."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "")
    writer.add_string("general.type", "imatrix")
    sums = torch.rand(2, 8)
    writer.add_tensor("w.in_sum2", sums.numpy())
    writer.add_tensor("w.counts", torch.tensor([[4.0], [0.0]]).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = octavo.load_imatrix(tmp_path / "a.gguf")["w"]
    assert torch.equal(found, torch.stack([sums[0] / 4, torch.ones(8)]))  # what nobody has seen counts alike


def test_damaged_imatrix_files_are_refused(tmp_path):
    path = tmp_path / "a"
    octavo.save_imatrix({"w": torch.rand(8)}, path, old=True)
    content = path.read_bytes()
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match="truncated"):
        octavo.load_imatrix(path)
    path.write_bytes(write("llama", tiny("llama"), tmp_path / "m.gguf").read_bytes())
    with pytest.raises(ValueError, match="of the type None and no imatrix"):
        octavo.load_imatrix(path)
    octavo.save_imatrix({"w": -torch.ones(8)}, path)
    with pytest.raises(ValueError, match="numbers that are no mean squares"):
        octavo.load_imatrix(path)


# --- vocabularies ---------------------------------------------------------------------------------------------------


def byte_level_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["the cat sat on the mat, and the dog sat, too"] * 3, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_a_tokenizer_is_written_and_read(tmp_path):
    tokenizer = byte_level_tokenizer()
    octavo.save_gguf(tiny("llama").model, tmp_path / "a.gguf", tokenizer=tokenizer)
    _, loaded = octavo.load_gguf(tmp_path / "a.gguf")
    for text in ("the cat sat, too", "Zürich\n 12 <end>"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.eos_token == "<end>"
    assert read_header(tmp_path / "a.gguf").metadata["tokenizer.ggml.pre"] == values.text("gpt-2")


def test_a_tokenizer_of_another_kind_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ValueError, match="of the kind WordLevel, and only byte-level BPE is written"):
        octavo.save_gguf(tiny("llama").model, tmp_path / "a.gguf", tokenizer=tokenizer)
