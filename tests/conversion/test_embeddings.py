# SPDX-License-Identifier: Apache-2.0
"""Embeddings and tied heads of whole models: which are quantized, what is counted, saved, loaded and compared."""

import copy

import pytest
import torch
from tiny_models import IDS, bert, check_equal_states, folder_of, llama, logits
from torch import nn

import octavo
from octavo.conversion.folder import quantize_folder
from octavo.huggingface import models
from octavo.nn import QuantEmbedding, QuantLinear

transformers = pytest.importorskip("transformers")

SCHEME = octavo.Int8Dynamic(group_size=32)


def tied_llama():
    return llama(tie_word_embeddings=True)


def gpt2():
    """Conv1D layers, a table of positions, and a head that is tied."""
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    ).eval()


def t5():
    """Encoder and decoder share an embedding, and the head is tied to it."""
    torch.manual_seed(0)
    sizes = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)
    ).eval()


def gemma3():
    """Rows are multiplied by the root of the width."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, **heads)).eval()


def output_of(model):
    with torch.no_grad():
        if isinstance(model, transformers.T5ForConditionalGeneration):
            return model(input_ids=IDS, decoder_input_ids=IDS).logits
        return model(IDS).logits


MODELS = {
    "llama": (llama, ["model.embed_tokens"], []),
    "tied_llama": (tied_llama, ["model.embed_tokens"], ["lm_head"]),
    "gpt2": (gpt2, ["transformer.wte", "transformer.wpe"], ["lm_head"]),
    "bert": (
        bert,
        [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
        ["cls.predictions.decoder"],
    ),
    "gemma3": (gemma3, ["model.embed_tokens"], ["lm_head"]),
    "t5": (t5, ["shared"], ["lm_head"]),
}
every_model = pytest.mark.parametrize("make, embeddings, heads", MODELS.values(), ids=MODELS)


@every_model
def test_all_embeddings_are_quantized_and_tied_heads_share_their_weight(make, embeddings, heads):
    reference = make()
    model = copy.deepcopy(reference)
    report = octavo.quantize_(model, SCHEME, include_embeddings=True)
    rows = {row.name: row for row in report.rows}
    for name in embeddings:
        assert type(model.get_submodule(name)) is QuantEmbedding and rows[name].action == "quantized"
    for name in heads:
        head, embedding = model.get_submodule(name), model.get_submodule(embeddings[0])
        assert type(head) is QuantLinear and head.packed is embedding.packed
        assert rows[name].reason == f"shares the weight of {embeddings[0]!r}"
        assert rows[name].bytes_after == (0 if head.bias is None else head.bias.nbytes)
    tensors = [
        tensor
        for name in rows
        for part in (model.get_submodule(name)._parameters, model.get_submodule(name)._buffers)
        for tensor in part.values()
        if tensor is not None
    ]
    assert report.bytes_after == sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    assert report.bytes_after < octavo.quantize_(copy.deepcopy(reference), SCHEME).bytes_after
    expected, found = output_of(reference), output_of(model)
    assert (expected - found).norm() < 0.05 * expected.norm()


@every_model
def test_they_are_saved_once_and_loaded_tied(make, embeddings, heads, tmp_path):
    model = make()
    octavo.quantize_(model, SCHEME, include_embeddings=True)
    y = output_of(model)
    model.tie_weights()
    assert torch.equal(output_of(model), y)
    octavo.save(model, tmp_path / "octavo")
    model.save_pretrained(tmp_path / "transformers")
    for loaded in (octavo.load(tmp_path / "octavo", make()), octavo.load(tmp_path / "transformers")):
        assert torch.equal(output_of(loaded), y)
        for name in heads:
            assert loaded.get_submodule(name).packed is loaded.get_submodule(embeddings[0]).packed
    sizes = [octavo.inspect_checkpoint(tmp_path / name).bytes for name in ("octavo", "transformers")]
    assert max(sizes) < sum(tensor.nbytes for tensor in make().state_dict().values()) / 2


@every_model
def test_a_folder_is_quantized_as_the_model_in_memory_is(make, embeddings, heads, tmp_path):
    folder = folder_of(make(), tmp_path / "float")
    report = quantize_folder(folder, tmp_path / "int8", SCHEME, include_embeddings=True)
    expected = models.load_model(folder)
    in_memory = octavo.quantize_(expected, SCHEME, include_embeddings=True)
    expected.tie_weights()  # BERT's bias, of which a quantized layer has a copy
    loaded = models.load_quantized(tmp_path / "int8")
    check_equal_states(loaded, expected)
    assert torch.equal(output_of(loaded), output_of(expected))
    for name in heads:
        assert loaded.get_submodule(name).packed is loaded.get_submodule(embeddings[0]).packed
    facts = [
        [(row.name, row.action, row.reason, row.scheme, row.bytes_after) for row in each.rows]
        for each in (report, in_memory)
    ]
    assert facts[0] == facts[1]


@every_model
def test_compare_shows_them_and_fuse_leaves_them(make, embeddings, heads):
    reference = make()
    model = octavo.quantized(reference, octavo.Int8Dynamic(), include_embeddings=True)
    if make is not t5:
        octavo.fuse_(model, IDS)
    batch = {"input_ids": IDS, "decoder_input_ids": IDS} if make is t5 else IDS
    comparison = octavo.compare(reference, model, [batch])
    found = {layer.name: layer for layer in comparison.layers}
    for name in (*embeddings, *heads):
        if name not in comparison.not_run:  # T5 calls those of its halves
            assert found[name].local_sqnr_db > 30
    assert len(comparison.not_run) == (make is t5)


def test_by_default_embeddings_stay_and_the_report_says_how_to_have_them():
    model = tied_llama()
    report = octavo.quantize_(model, SCHEME)
    rows = {row.name: row.reason for row in report.kept}
    assert rows["model.embed_tokens"] == "an embedding: include_embeddings=True quantizes it"
    assert (
        rows["lm_head"]
        == "weight is tied to model.embed_tokens.weight; include_embeddings=True quantizes both"
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_patterns_say_which_embeddings():
    model = gpt2()
    octavo.quantize_(model, SCHEME, include_embeddings="*.wpe")
    assert type(model.transformer.wpe) is QuantEmbedding and type(model.transformer.wte) is nn.Embedding
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(
        ValueError, match="include_embeddings: pattern 'wte' matches no embedding; the closest name"
    ):
        octavo.quantize_(gpt2(), SCHEME, include_embeddings="wte")
    with pytest.raises(ValueError, match="pattern '.*c_fc' matches no embedding"):
        octavo.quantize_(gpt2(), SCHEME, include_embeddings="*.c_fc")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"exclude": "lm_head"}, "weight is tied to lm_head.weight, which stays float"),
        ({"exclude": "*.embed_tokens"}, None),
        (
            {"scheme": {"lm_head": octavo.Int8Dynamic(), "*": octavo.Int4Dynamic()}},
            "weight is tied to lm_head.weight, for which another weight format is chosen",
        ),
        (
            {"scheme": octavo.LLMInt8()},
            "weight is tied to lm_head.weight, and OutlierLinear cannot share a weight with an embedding",
        ),
    ],
    ids=["head", "embedding", "formats", "columns"],
)
def test_what_cannot_share_a_weight_stays_float_and_tied(options, reason):
    model = tied_llama()
    scheme = {"scheme": SCHEME, **options}
    data = {"data": IDS} if scheme["scheme"] == octavo.LLMInt8() else {}
    report = octavo.quantize_(model, **scheme, **data, include_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    kept = {row.name: row.reason for row in report.kept}
    assert "lm_head" in kept and kept["model.embed_tokens"] == (reason or "excluded by '*.embed_tokens'")


def test_a_method_that_needs_data_leaves_embeddings_to_the_nearest_codes():
    model, plain = tied_llama(), tied_llama()
    octavo.quantize_(
        model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=IDS, include_embeddings=True
    )
    octavo.quantize_(plain, octavo.Int8Dynamic(), include_embeddings=True)
    assert torch.equal(model.lm_head.codes(), plain.lm_head.codes())
    assert model.lm_head.packed is model.model.embed_tokens.packed


def test_an_embedding_needs_no_data():
    model = nn.Sequential(nn.Embedding(8, 16))
    octavo.quantize_(model, octavo.Int8Static(), include_embeddings=True)
    assert type(model[0]) is QuantEmbedding


def test_an_embedding_whose_whole_weight_somebody_reads_stays_float():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(8, 16)

        def forward(self, ids):
            return self.embed(ids) @ self.embed.weight.T

    model = Reads()
    (row,) = octavo.quantize_(model, SCHEME, include_embeddings=True).rows
    assert row.action == "kept" and row.reason == "Reads reads its whole weight besides calling it"


def test_an_error_leaves_the_model_as_it_was():
    model = tied_llama()
    embedding, head = model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        embedding.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight holds NaN or Inf"):
        octavo.quantize_(model, SCHEME, include_embeddings=True)
    assert model.model.embed_tokens is embedding and model.lm_head is head
    assert head.weight is embedding.weight
    with pytest.raises(ValueError, match="the model itself is of the kind Embedding"):
        octavo.quantize_(nn.Embedding(4, 4), SCHEME, include_embeddings=True)


def test_a_copy_with_quantized_embeddings_leaves_the_model_alone():
    model = tied_llama()
    before = logits(model)
    quantized = octavo.quantized(model, SCHEME, include_embeddings=True)
    assert quantized.lm_head.packed is quantized.model.embed_tokens.packed
    assert torch.equal(logits(model), before) and model.lm_head.weight is model.model.embed_tokens.weight


def test_what_measures_models_takes_them():
    model = octavo.quantized(tied_llama(), SCHEME, exclude="*.mlp.*", include_embeddings=True)
    assert octavo.evaluate(tied_llama(), model, IDS).distribution.kld < 1e-2
    found = octavo.sensitivity(model, IDS, octavo.Int8Dynamic())
    assert set(found.layers) == {
        name for name, layer in model.named_modules() if name.endswith("_proj") and "mlp" in name
    }
