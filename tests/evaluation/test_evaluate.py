# SPDX-License-Identifier: Apache-2.0
"""evaluate: for each kind of model the figures are those of its parts, and the models stay as they were."""

import math
from types import SimpleNamespace

import pytest
import torch
from models import Model
from test_kinds import IDS, WRAPS, CausalModel, Wrapped
from torch import nn

import octavo
from octavo import metrics


@pytest.fixture
def pair():
    torch.manual_seed(0)
    reference = CausalModel()
    return reference, octavo.quantized(reference, octavo.Int8Dynamic())


@pytest.fixture
def classifiers():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 5))
    return reference, octavo.quantized(reference, octavo.Int8Dynamic())


def evaluate(*arguments, **options):
    return octavo.evaluate(*arguments, **{"resources": ()} | options)


def output_figures(x, y):
    return octavo.evaluation.OutputFigures(
        metrics.sqnr_db(x, y), metrics.cosine(x, y), metrics.relative_error(x, y), metrics.max_abs_error(x, y)
    )


# --- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@torch.no_grad()
def test_a_language_model_is_scored_on_the_next_token(pair, wrap):
    found = evaluate(*(Wrapped(model, wrap) for model in pair), IDS, bytes_per_token=2)
    x, y = (model(IDS[:, :-1]) for model in pair)
    expected = metrics.DistributionAccumulator()
    expected.update(x, y, IDS[:, 1:])
    assert found.kind == "language_model" and found.batches == 1
    assert found.distribution == expected.result(bytes_per_token=2)
    assert found.output == output_figures(x, y)
    loss = nn.functional.cross_entropy(y.flatten(0, 1), IDS[:, 1:].flatten())
    assert found.distribution.perplexity == pytest.approx(loss.exp().item(), rel=1e-6)  # float32's own loss
    assert found.schemes == {"Int8Dynamic": 7}


def test_batches_are_streamed_and_add_up_to_the_whole(pair):
    whole, pieces = evaluate(*pair, IDS), evaluate(*pair, iter(IDS.split(1)))
    assert pieces.batches == 3
    # Logits of size 1 may differ in their last bits where shapes do, a divergence by twice as much.
    assert pieces.distribution.kld == pytest.approx(whole.distribution.kld, abs=1e-6)
    assert pieces.distribution.tokens == whole.distribution.tokens == 27


def test_padding_does_not_count(pair):
    models = [Wrapped(model, WRAPS["object"]) for model in pair]
    short = IDS[:, :6]
    padded = torch.cat([short, torch.full((3, 4), 9)], dim=1)
    mask = torch.arange(10).expand(3, 10) < 6
    expected = evaluate(*models, short)
    found = evaluate(*models, {"input_ids": padded, "attention_mask": mask.long()})
    assert found.distribution.tokens == 15
    assert found.distribution.kld == pytest.approx(expected.distribution.kld, abs=1e-6)
    assert found.output.sqnr_db == pytest.approx(expected.output.sqnr_db, abs=1e-3)


@torch.no_grad()
def test_a_classifier_is_scored_on_its_labels(classifiers):
    x, labels = torch.randn(60, 20), torch.randint(5, (60,))
    found = evaluate(*classifiers, [(x[:40], labels[:40]), (x[40:], labels[40:])])
    right = classifiers[1](x).argmax(-1) == labels
    assert found.kind == "classifier" and found.batches == 2
    assert found.distribution.accuracy == pytest.approx(right.double().mean().item())
    assert found.distribution.targets == 60
    without = evaluate(*classifiers, x, kind="classifier")
    assert without.distribution.accuracy is None
    assert without.distribution.kld == pytest.approx(found.distribution.kld, abs=1e-6)


@torch.no_grad()
def test_an_encoder_is_compared_vector_by_vector(classifiers):
    x = torch.randn(30, 20)
    found = evaluate(*classifiers, x, kind="encoder")
    expected = metrics.VectorsAccumulator()
    expected.update(*(model(x) for model in classifiers))
    assert found.vectors == expected.result() and found.distribution is None
    units = [nn.Sequential(model, nn.Unflatten(0, (-1,))) for model in classifiers]
    for model in units:
        model.forward = lambda x, run=model[0]: nn.functional.normalize(run(x), dim=-1)
    assert evaluate(*units, x).kind == "encoder"


@torch.no_grad()
def test_a_module_is_compared_in_all_that_it_puts_out(classifiers):
    found = evaluate(*classifiers, [torch.randn(3, 20)] * 2)
    assert found.kind == "module" and found.distribution is found.vectors is found.generation is None
    x = torch.randn(7, 20)
    assert evaluate(*classifiers, x).output == output_figures(*(model(x) for model in classifiers))


@pytest.mark.parametrize("kind", ["language_model", "classifier", "encoder", "module"])
def test_a_model_compared_with_itself_differs_by_exactly_nothing(kind, pair, classifiers):
    model = pair[1] if kind == "language_model" else classifiers[1]
    data = {"language_model": IDS, "classifier": (torch.randn(9, 20), torch.randint(5, (9,)))}
    prompts = IDS[:, :3] if kind == "language_model" else None
    found = evaluate(model, model, data.get(kind, torch.randn(9, 20)), kind=kind, prompts=prompts)
    assert found.output == octavo.evaluation.OutputFigures(math.inf, 1.0, 0.0, 0.0)
    if found.distribution:
        assert (found.distribution.kld_max, found.distribution.top1_agreement) == (0.0, 1.0)
        assert found.distribution.flips == found.distribution.ln_perplexity_ratio == 0.0
    if found.vectors:
        assert (found.vectors.worst_cosine, found.vectors.same_neighbour) == (1.0, 1.0)
    if found.generation:
        assert (found.generation.identical, found.generation.generation.kld) == (1.0, 0.0)


def test_tokens_that_both_models_exclude_do_not_blur_the_output(pair):
    class Masked(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids).index_fill(-1, torch.tensor([0]), -math.inf)

    found = evaluate(*map(Masked, pair), IDS % 9 + 1, kind="language_model")
    assert math.isfinite(found.output.sqnr_db) and math.isfinite(found.distribution.perplexity)
    assert evaluate(Masked(pair[0]), pair[1], IDS).output.max_abs_error == math.inf


def test_prompts_add_generation(pair):
    found = evaluate(*pair, IDS, prompts=octavo.Prompts(IDS[:, :4], new_tokens=3))
    assert found.generation == octavo.evaluation.evaluate_generation(
        *pair, octavo.Prompts(IDS[:, :4], new_tokens=3)
    )
    assert found.generation.prompts == 3


def test_transformers_models_are_known_for_what_they_are():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=60
    )
    ids = torch.randint(60, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    bert, llama = transformers.BertConfig(**small), transformers.LlamaConfig(**small)
    for model, data, kind in [
        (transformers.LlamaForCausalLM(llama), ids, "language_model"),
        (transformers.LlamaForCausalLM(llama), batch, "language_model"),
        (transformers.BertModel(bert), batch, "encoder"),
        (transformers.BertForMaskedLM(bert), batch, "module"),  # it sees the token that it would be scored on
        (
            transformers.BertForSequenceClassification(bert),
            batch | {"labels": torch.tensor([0, 1])},
            "classifier",
        ),
    ]:
        found = evaluate(model, octavo.quantized(model, octavo.Int8WeightOnly()), data)
        assert found.kind == kind, type(model).__name__
        assert found.notes[0].startswith(f"kind: {kind}, because ")
    with pytest.raises(ValueError, match="depend on later tokens"):
        masked = transformers.BertForMaskedLM(bert)
        evaluate(masked, masked, batch, kind="language_model")


# --- manners --------------------------------------------------------------------------------------------------------


def test_the_models_stay_as_they_were(pair):
    pair[0].train()
    before = {name: tensor.clone() for name, tensor in pair[0].state_dict().items()}
    evaluate(*pair, IDS)
    assert pair[0].training and all(parameter.grad is None for parameter in pair[0].parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in pair[0].state_dict().items())
    with pytest.raises(IndexError):
        evaluate(*pair, [IDS, IDS + 100])  # a token that the embedding does not have
    assert pair[0].training


def test_resources_are_measured_for_both(pair):
    found = octavo.evaluate(*pair, IDS, prompts=octavo.Prompts(IDS[:, :2], new_tokens=2)).resources
    for model in (found.reference, found.model):
        assert model.latency.p10 <= model.latency.median <= model.latency.p90
        assert model.prefill_tokens_per_second == 27 / model.latency.median
        assert model.decode_tokens_per_second > 0
        assert model.peak_rss is None  # not asked for
    assert found.model.memory.total == octavo.compare.__globals__["model_bytes"](pair[1])


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(reference=len), TypeError, "reference is builtin_function_or_method"),
        (dict(model=None), TypeError, "model is NoneType"),
        (dict(model=Model().to("meta")), ValueError, "model has weights on the meta device"),
        (dict(data=[]), ValueError, "data is empty"),
        (dict(data="text"), TypeError, "evaluate: data is str"),
        (dict(data=[3]), TypeError, "evaluate: a batch is int"),
        (dict(kind="llm"), ValueError, "kind is 'llm'; accepted are 'auto', 'language_model'"),
        (dict(resources="speeed"), ValueError, "speeed"),
        (dict(kind="module", prompts=IDS), ValueError, "evaluated as module"),
        (dict(model=nn.Sequential(Model(), nn.Linear(10, 3))), ValueError, r"\[\(3, 9, 10\)\] in reference"),
        (dict(bytes_per_token=-1), ValueError, "bytes_per_token is -1"),
        (dict(kind="encoder", model=nn.Identity()), TypeError, "the output is Tensor; an encoder"),
    ],
)
def test_bad_input_is_named(pair, change, error, message):
    arguments = dict(reference=pair[0], model=pair[1], data=IDS, resources=()) | change
    with pytest.raises(error, match=message):
        octavo.evaluate(**arguments)


def test_an_output_without_floats_is_refused(pair):
    with pytest.raises(ValueError, match="at least one floating-point tensor"):
        evaluate(nn.Identity(), nn.Identity(), IDS, kind="module")


# --- what a batch holds ---------------------------------------------------------------------------------------------


class Positioned(CausalModel):
    """A language model that reads all of a tokenizer's entries."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, token_type_ids=None, scale=1.0):
        x = self.embedding(input_ids) + self.embedding(token_type_ids) * scale
        x = x + position_ids[..., None] / 10
        return self.head(self.norm((x * attention_mask[..., None]).cumsum(1)))


@torch.no_grad()
def test_a_language_models_batch_is_passed_whole_and_labels_of_minus_100_do_not_count():
    torch.manual_seed(0)
    reference = Positioned()
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    mask = torch.arange(10).expand(3, 10) >= torch.tensor([0, 2, 5])[:, None]  # on the left
    inputs = {
        "attention_mask": mask.long(),
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        "token_type_ids": torch.arange(10).expand(3, 10) // 5,
    }
    labels = IDS.masked_fill(~mask, -100).index_fill(1, torch.tensor([4, 6]), -100)
    found = evaluate(
        reference, model, {"input_ids": IDS, **inputs, "labels": labels, "scale": 2.0, "idx": torch.arange(3)}
    )
    cut = {name: value[:, :-1] for name, value in inputs.items()}
    x, y = (m(IDS[:, :-1], **cut, scale=2.0) for m in (reference, model))
    counts = mask[:, :-1] & mask[:, 1:] & (labels[:, 1:] != -100)
    expected = metrics.DistributionAccumulator()
    expected.update(x, y, labels[:, 1:], counts)
    assert found.kind == "language_model" and found.distribution == expected.result()
    assert found.distribution.targets == found.distribution.tokens == counts.sum()
    assert "not used, for forward does not take it: idx" in found.notes
    left_out = int((~counts).sum())
    assert f"{left_out} of 27 positions are left out: padding, or labels of -100" in found.notes


@torch.no_grad()
def test_masks_of_four_dimensions_lose_the_last_query_and_key():
    class Pairs(CausalModel):
        def forward(self, input_ids, attention_mask, position_ids):
            weights = attention_mask[:, 0].float()
            assert (
                weights.shape[1:] == (input_ids.shape[1],) * 2
                and position_ids.shape[-1] == input_ids.shape[1]
            )
            return self.head(weights @ self.embedding(input_ids) + position_ids[0][..., None])

    reference = Pairs()
    kept = torch.arange(10).expand(3, 10) < torch.tensor([10, 8, 5])[:, None]
    pairs = torch.ones(10, 10).tril().bool() & kept[:, None, None]
    batch = {"input_ids": IDS, "attention_mask": pairs, "position_ids": torch.zeros(3, 1, 10)}
    found = evaluate(reference, octavo.quantized(reference, octavo.Int8Dynamic()), batch)
    assert found.kind == "language_model" and found.distribution.tokens == 9 + 7 + 4


@torch.no_grad()
def test_a_label_for_each_token_makes_a_classifier_unless_the_model_is_causal():
    class Tagger(Model):
        def forward(self, input_ids, attention_mask=None):
            x = self.embedding(input_ids)
            return SimpleNamespace(logits=self.head(self.norm(x + x.mean(1, keepdim=True))))

    reference = Tagger()
    labels = IDS.masked_fill(torch.arange(10) >= 7, -100)
    mask = (torch.arange(10).expand(3, 10) < torch.tensor([10, 8, 5])[:, None]).long()
    batch = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    found = evaluate(reference, octavo.quantized(reference, octavo.Int8Dynamic()), batch)
    assert found.kind == "classifier" and found.distribution.tokens == found.distribution.targets == 7 + 7 + 5


@torch.no_grad()
def test_numbers_beside_x_are_left_out_and_the_note_says_so(classifiers):
    x = torch.randn(9, 20)
    for targets in (torch.randn(9), torch.randn(9, 5), torch.randn(9, 20)):
        found = evaluate(*classifiers, [(x, targets)])
        assert found.kind == "module" and found.output == evaluate(*classifiers, x).output
        assert "the last value of each batch is taken for labels and not used" in found.notes


def test_an_encoders_rows_without_a_token_have_no_vector():
    class Encoder(Model):
        def forward(self, input_ids, attention_mask=None):
            return SlotOutput(self.norm(self.encoder[0](self.embedding(input_ids))))

    class SlotOutput:
        __slots__ = ("last_hidden_state",)

        def __init__(self, hidden):
            self.last_hidden_state = hidden

    mask = (torch.arange(10).expand(3, 10) < torch.tensor([10, 0, 5])[:, None]).long()
    reference = Encoder()
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    found = evaluate(reference, reference, {"input_ids": IDS, "attention_mask": mask})
    assert found.kind == "encoder" and found.output.sqnr_db == math.inf and found.vectors.worst_cosine == 1.0
    with pytest.raises(ValueError, match="no position counts"):
        evaluate(reference, model, {"input_ids": IDS, "attention_mask": mask * 0}, kind="encoder")


def test_labels_that_are_no_tokens_of_the_batch_are_refused(pair):
    models = [Wrapped(model, WRAPS["tensor"]) for model in pair]
    with pytest.raises(ValueError, match=r"labels have shape \(3,\) and input_ids \(3, 10\)"):
        evaluate(*models, {"input_ids": IDS, "labels": torch.arange(3)}, kind="language_model")
