# SPDX-License-Identifier: Apache-2.0
"""What a batch is to each kind of model, and that the kind is found out by trying, or asked for."""

from types import SimpleNamespace

import pytest
import torch
from models import Model
from torch import nn

from octavo.evaluation import windows
from octavo.evaluation.kinds import choose_kind, is_causal, logits_of, take_apart, vectors_of


class CausalModel(Model):
    """Logits at each position from the tokens so far, and no others."""

    def forward(self, ids):
        x = self.embedding(ids).cumsum(1)
        return self.head(self.norm(x))


class BackwardModel(Model):
    """The same from the tokens still to come: what a masked language model may do."""

    def forward(self, ids):
        x = self.embedding(ids).flip(1).cumsum(1).flip(1)
        return self.head(self.norm(x))


class Wrapped(nn.Module):
    """A model whose output stands in an object, a dict or a tuple; as transformers' keyword arguments."""

    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, input_ids, attention_mask=None):
        return self.wrap(self.model(input_ids))


WRAPS = {
    "tensor": lambda x: x,
    "object": lambda x: SimpleNamespace(logits=x),
    "dict": lambda x: {"loss": None, "logits": x},
    "tuple": lambda x: (x, "cache"),
}
IDS = torch.arange(30).reshape(3, 10) % 10


def kind_of(model, *args, **kwargs):
    with torch.no_grad():
        return choose_kind(model, args, kwargs)[0]


# --- finding out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_logits_that_do_not_look_ahead_are_a_language_models(wrap):
    assert kind_of(Wrapped(CausalModel(), wrap), IDS) == "language_model"
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    assert kind_of(Wrapped(CausalModel(), wrap), **batch) == "language_model"
    assert kind_of(Wrapped(BackwardModel(), wrap), IDS) == "module"


def test_a_window_may_be_one_token_longer_than_the_model_can_read():
    class Short(CausalModel):
        def forward(self, ids):
            if ids.shape[1] > 9:
                raise ValueError("at most 9 tokens")
            return super().forward(ids)

    assert kind_of(Short(), IDS) == "language_model"
    with pytest.raises(ValueError, match="at most 9"):
        kind_of(Short(), torch.cat([IDS, IDS], dim=1))


def test_one_label_for_each_row_of_logits_is_a_classifier():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    assert kind_of(model, x, torch.tensor([0, 1, 2, 0, 1])) == "classifier"
    assert (
        kind_of(Wrapped(nn.Linear(4, 3), WRAPS["object"]), input_ids=x, labels=torch.ones(5).long())
        == "classifier"
    )


@pytest.mark.parametrize(
    "model, batch",
    [
        (nn.Bilinear(4, 4, 3), (torch.randn(5, 4), torch.arange(5))),  # the second may be an input
        (nn.Linear(4, 3), (torch.randn(5, 4), torch.arange(5))),  # a label that is no class
        (nn.Linear(4, 3), (torch.randn(5, 4), torch.tensor([0, 1, 2, -1, 1]))),
    ],
    ids=["two_inputs", "too_large", "negative"],
)
def test_what_can_be_read_in_two_ways_is_refused(model, batch):
    with pytest.raises(
        ValueError, match=r"batch of \(float32 \[5, 4\], int64 \[5\]\).*say kind='classifier'"
    ):
        kind_of(model, *batch)


def test_a_tuple_of_batches_is_taken_for_one_batch_and_refused_with_the_remedy():
    with pytest.raises(ValueError, match="A tuple is one batch: put batches into a list"):
        kind_of(CausalModel(), *IDS.split(1))


def test_hidden_states_or_unit_vectors_are_an_encoders():
    class Hidden(Model):
        def forward(self, ids):
            return {"last_hidden_state": self.embedding(ids), "pooler_output": None}

    class Units(Model):
        def forward(self, ids):
            return nn.functional.normalize(self.embedding(ids).mean(1), dim=-1)

    assert kind_of(Hidden(), IDS) == kind_of(Units(), IDS) == "encoder"


@pytest.mark.parametrize(
    "model, batch",
    [
        (nn.Linear(4, 3), (torch.randn(5, 4),)),
        (nn.Bilinear(4, 4, 3), (torch.randn(5, 4), torch.randn(5, 4))),
        (nn.Embedding(10, 4), (IDS,)),  # a vocabulary of 4 cannot hold token 9
        (nn.Linear(4, 3), (torch.randn(2, 10, 4),)),
    ],
    ids=["rows", "two_inputs", "embedding", "sequence"],
)
def test_all_else_is_a_module(model, batch):
    assert kind_of(model, *batch) == "module"


def test_a_causal_model_is_told_from_one_that_looks_ahead_a_little():
    class AlmostCausal(CausalModel):
        def forward(self, ids):
            return super().forward(ids) + 1e-3 * self.head(self.embedding(ids[:, -1:]))

    with torch.no_grad():
        assert is_causal(CausalModel(), (IDS,), {})
        assert not is_causal(AlmostCausal(), (IDS,), {})


# --- taking apart ---------------------------------------------------------------------------------------------------


def test_a_language_model_reads_all_but_the_last_and_is_scored_on_all_but_the_first():
    call = take_apart("language_model", (IDS,), {})
    assert torch.equal(call.args[0], IDS[:, :-1]) and torch.equal(call.targets, IDS[:, 1:])
    assert call.mask is None


def test_padding_on_either_side_does_not_count():
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
    call = take_apart(
        "language_model", (), {"input_ids": IDS[:2, :5], "attention_mask": mask, "labels": IDS[:2, :5]}
    )
    assert call.mask.tolist() == [[True, True, False, False], [False, False, True, True]]
    assert call.kwargs.keys() == {"input_ids", "attention_mask"}
    assert torch.equal(call.kwargs["attention_mask"], mask[:, :-1])


def test_a_classifiers_labels_stand_last_or_under_their_name():
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2], dtype=torch.int32)
    call = take_apart("classifier", (x, x, labels), {})
    assert len(call.args) == 2 and call.targets.dtype == torch.int64
    call = take_apart("classifier", (), {"x": x, "labels": labels})
    assert call.kwargs.keys() == {"x"} and call.targets.tolist() == [0, 1, 2]
    assert take_apart("classifier", (x,), {}).targets is None


@pytest.mark.parametrize("batch", [torch.randn(3, 4), torch.arange(4), torch.ones(3, 1).long()])
def test_a_batch_that_is_no_text_is_refused(batch):
    with pytest.raises(ValueError, match=r"int64 \[batch, 2 or more\], alone or as input_ids; got torch"):
        take_apart("language_model", (batch,), {})


def test_a_tuple_of_batches_is_one_batch_and_refused_as_text():
    with pytest.raises(ValueError, match=r"got \(int64 \[3, 10\], int64 \[3, 10\]\)"):
        take_apart("language_model", (IDS, IDS), {})


def test_float_labels_are_refused():
    with pytest.raises(ValueError, match="integer labels"):
        take_apart("classifier", (torch.randn(3, 4), torch.randn(3)), {})


# --- outputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_logits_are_found_in_every_kind_of_output(wrap):
    logits = torch.randn(2, 3)
    assert logits_of(wrap(logits)) is logits


@pytest.mark.parametrize(
    "output", [None, {"a": torch.ones(2, 2)}, torch.ones(2, 2).long(), torch.ones(2), (), "x"]
)
def test_an_output_without_logits_is_refused(output):
    with pytest.raises(TypeError, match="kind='module'"):
        logits_of(output)


def test_vectors_are_means_over_what_the_mask_keeps():
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    output = SimpleNamespace(last_hidden_state=hidden, pooler_output=None)
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(vectors_of(output, mask), expected)
    torch.testing.assert_close(vectors_of(output, None), hidden.mean(1))
    vectors = torch.randn(2, 3)
    assert vectors_of({"last_hidden_state": hidden, "sentence_embedding": vectors}, None) is vectors
    assert vectors_of(vectors, mask) is vectors
    with pytest.raises(TypeError, match="kind='module'"):
        vectors_of({"logits": vectors}, None)


# --- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens, length, batch", [(100, 7, 4), (50, 49, 1), (13, 4, 100), (9, 1, 3)])
def test_each_token_but_the_first_is_predicted_once_in_order(tokens, length, batch):
    text = torch.arange(1000, 1000 + 2 * tokens)[::2]  # not contiguous
    pieces = list(windows(text, length, batch))
    assert all(piece.shape[1] == length + 1 and len(piece) <= batch for piece in pieces)
    predicted = torch.cat([piece[:, 1:].reshape(-1) for piece in pieces])
    assert torch.equal(predicted, text[1 : len(predicted) + 1])
    assert len(predicted) == (tokens - 1) // length * length
    for piece in pieces:
        assert torch.equal(piece[1:, 0], piece[:-1, -1])


@pytest.mark.parametrize(
    "text, length, batch", [(torch.arange(5), 5, 1), (IDS, 3, 1), (torch.arange(9), 0, 1)]
)
def test_text_that_gives_no_window_is_refused(text, length, batch):
    with pytest.raises(ValueError, match="windows:"):
        list(windows(text, length, batch))
