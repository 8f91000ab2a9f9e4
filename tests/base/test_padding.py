# SPDX-License-Identifier: Apache-2.0
"""Padded positions change no figure, by whatever mask the model knows them, and the result says so."""

import pytest
import torch
from torch import nn

import octavo
from octavo.base.padding import Padding, attended, key_padding

KEPT = torch.arange(6).expand(4, 6) < torch.tensor([6, 4, 3, 2])[:, None]
LOWEST = torch.finfo(torch.float32).min
PAIRS = KEPT[:, None, None, :] & torch.ones(6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "mask",
    [
        KEPT,
        KEPT.long(),
        KEPT.float(),
        torch.zeros(4, 6).masked_fill(~KEPT, -torch.inf),
        torch.zeros(4, 6).masked_fill(~KEPT, LOWEST),
        PAIRS,
        PAIRS.long(),
        PAIRS[:, 0],
        torch.zeros(4, 1, 6, 6).masked_fill(~PAIRS, LOWEST),
        torch.zeros(4, 1, 1, 6).masked_fill(~KEPT[:, None, None], -torch.inf),
    ],
)
def test_every_form_of_attention_mask_says_the_same(mask):
    assert torch.equal(attended(mask), KEPT)


@pytest.mark.parametrize("mask", [~KEPT, (~KEPT).byte(), torch.zeros(4, 6).masked_fill(~KEPT, -torch.inf)])
def test_every_form_of_key_padding_mask_says_the_same(mask):
    assert torch.equal(key_padding(mask), KEPT)


def test_masks_of_zeros_that_are_added_to_scores_leave_nothing_out():
    assert attended(torch.zeros(4, 1, 6, 6)).all() and key_padding(torch.zeros(4, 6)).all()


class Tokens(nn.Module):
    """Position by position, so that padding cannot change what counts. `shape` is what the output looks like."""

    def __init__(self, shape=lambda y: y):
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 12), nn.Linear(12, 8)
        self.shape = shape

    def forward(self, ids, attention_mask=None):
        return self.shape(self.b(self.a(self.embedding(ids)).relu()))


def pair(*arguments):
    torch.manual_seed(0)
    reference = Tokens(*arguments)
    return reference, octavo.quantized(reference, octavo.Int8Dynamic())


IDS = torch.randint(1, 20, (4, 6), generator=torch.Generator().manual_seed(0))
OTHER_IDS = torch.where(KEPT, IDS, 20 - IDS)  # the same but for what is padding
SHAPES = {
    "positions": lambda y: y,
    "tokens_in_a_row": lambda y: y.flatten(0, 1),
    "length_first": lambda y: y.transpose(0, 1),
    "one_number_each": lambda y: y[..., 0],
    "heads": lambda y: y.unflatten(-1, (2, 4)),
    "attention": lambda y: (y @ y.transpose(1, 2))[:, None].expand(4, 2, 6, 6) * KEPT[:, None, None],
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_padding_changes_no_figure_whatever_the_outputs_shape(shape):
    reference, model = pair(shape)
    found = [
        octavo.compare(reference, model, {"ids": ids, "attention_mask": KEPT}) for ids in (IDS, OTHER_IDS)
    ]
    without = octavo.compare(reference, model, {"ids": OTHER_IDS})
    assert found[0].output == found[1].output != without.output
    assert found[0].layers == found[1].layers != without.layers
    assert found[0].notes == ["padding: 9 of 24 positions are left out, as attention_mask says"]
    assert found[0].notes[0] in str(found[0])


def test_figures_are_those_of_the_rows_that_count():
    reference, model = pair()
    with torch.no_grad():
        x, y = reference(IDS)[KEPT], model(IDS)[KEPT]
    found = octavo.compare(reference, model, (IDS, KEPT)).output  # the mask by its place
    assert (found.sqnr_db, found.max_abs_error) == (
        octavo.metrics.sqnr_db(x, y),
        octavo.metrics.max_abs_error(x, y),
    )


def test_every_function_leaves_the_same_positions_out():
    reference, model = pair()
    batches = [{"ids": ids, "attention_mask": KEPT} for ids in (IDS, OTHER_IDS)]
    evaluations = [octavo.evaluate(reference, model, b, kind="module", resources=()) for b in batches]
    assert evaluations[0].output == evaluations[1].output
    assert "padding: 9 of 24" in evaluations[0].notes[-1]
    for figure in ("kld", "error"):
        found = [octavo.sensitivity(reference, b, octavo.Int8Dynamic(), figure=figure).rows for b in batches]
        assert found[0] == found[1]
    shifts = [octavo.correct_bias_(pair()[1], reference, b) for b in batches]
    assert all(torch.equal(shifts[0][name], shifts[1][name]) for name in ("a", "b"))


def test_a_batch_of_nothing_but_padding_is_an_error_that_says_so():
    reference, model = pair()
    batch = {"ids": IDS, "attention_mask": torch.zeros_like(IDS)}
    for measure in (
        lambda: octavo.compare(reference, model, batch),
        lambda: octavo.evaluate(reference, model, batch, kind="module", resources=()),
        lambda: octavo.evaluate(reference, model, batch, kind="classifier", resources=()),
        lambda: octavo.sensitivity(reference, batch, octavo.Int8Dynamic()),
        lambda: octavo.correct_bias_(model, reference, batch),
    ):
        with pytest.raises(ValueError, match="no position counts"):
            measure()


# --- labels of -100 ---------------------------------------------------------------------------------------------------


class Texts(Tokens):
    """Logits for each token: of its own alone, or also of a later one, so that the model is not causal."""

    def __init__(self, looks_ahead):
        super().__init__()
        self.looks_ahead = looks_ahead

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        return {"logits": self.b(self.a(x + x.flip(1) if self.looks_ahead else x).relu())}


@pytest.mark.parametrize("looks_ahead", [False, True], ids=["language_model", "classifier_of_tokens"])
def test_positions_labelled_minus_100_count_nowhere(looks_ahead):
    """A causal model's label of token i is what its logits at i - 1 predict."""
    torch.manual_seed(0)
    reference = Texts(looks_ahead)
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    labels = torch.where(KEPT, IDS, -100)
    counts = KEPT if looks_ahead else torch.cat([KEPT[:, 1:], torch.zeros(4, 1, dtype=torch.bool)], 1)
    with torch.no_grad():
        x, y = reference(IDS)["logits"][counts], model(IDS)["logits"][counts]
        read = reference.embedding(IDS)
        read = read + read.flip(1) if looks_ahead else read
        hidden, hidden_int8 = reference.a(read), model.a(read)
    found = octavo.compare(reference, model, {"input_ids": IDS, "labels": labels})
    assert found.output.sqnr_db == octavo.metrics.sqnr_db(x, y)
    assert found.layers[0].sqnr_db == octavo.metrics.sqnr_db(hidden[counts], hidden_int8[counts])
    left_out = int((~counts).sum())
    assert found.notes == [f"labels of -100: {left_out} of 24 positions are left out, as labels say"]
    for figure, measure in {"kld": octavo.metrics.kld, "error": octavo.metrics.relative_error}.items():
        batch = {"input_ids": IDS, "labels": labels}
        for row in octavo.sensitivity(reference, batch, octavo.Int8Dynamic(), figure=figure).rows[1::2]:
            with torch.no_grad():
                z = octavo.quantized(reference, {row.name: row.scheme})(IDS)["logits"][counts]
            assert row.figure == pytest.approx(torch.as_tensor(measure(x, z)).mean().item(), rel=1e-6)


def test_labels_that_forward_does_not_take_leave_the_same_positions_out():
    reference, model = pair()
    labels = torch.where(KEPT, IDS, -100)
    batches = [{"ids": IDS, "label": labels}, {"ids": OTHER_IDS, "labels": labels}]
    found = [octavo.compare(reference, model, batch) for batch in batches]
    assert found[0].output == found[1].output and found[0].layers == found[1].layers
    rows = [octavo.sensitivity(reference, batch, octavo.Int8Dynamic()).rows for batch in batches]
    assert rows[0] == rows[1]


def test_rows_labelled_minus_100_count_nowhere():
    """One label for each row, as classifiers have them, behind the input."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(16, 8))
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    x, labels = torch.randn(6, 16), torch.tensor([0, 3, -100, 7, -100, 1])
    expected = octavo.compare(reference, model, x[labels >= 0])
    assert octavo.compare(reference, model, [(x, labels)]).output == expected.output
    evaluation = octavo.evaluate(reference, model, [(x, labels)], resources=())
    assert evaluation.kind == "classifier" and evaluation.output.sqnr_db == expected.output.sqnr_db
    assert evaluation.distribution.tokens == 4


# --- torch's encoder ------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A model whose caller knows nothing of masks: padding is token 0."""

    def __init__(self, batch_first=True, norm=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
        self.embedding, self.input = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16) if norm else None)
        self.batch_first = batch_first

    def forward(self, ids):
        x = self.input(self.embedding(ids))
        x = x if self.batch_first else x.transpose(0, 1)
        return self.encoder(x, src_key_padding_mask=ids == 0)


def encoders(**options):
    torch.manual_seed(0)
    reference = Encoder(**options).eval()
    if reference.encoder.norm is not None:
        nn.init.normal_(reference.encoder.norm.bias)
    return reference, octavo.quantized(reference, octavo.Int8Dynamic())


PADDED = IDS.masked_fill(~KEPT, 0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"batch_first": False}], ids=str)
def test_a_mask_that_is_made_inside_counts_as_well(options):
    reference, model = encoders(**options)
    result = octavo.compare(reference, model, PADDED)
    kept = KEPT if options.get("batch_first", True) else KEPT.T
    with torch.no_grad():
        x, y = reference(PADDED)[kept], model(PADDED)[kept]
    # The float model takes torch's fused path here and plain modules inside compare: some 2^-20 apart, -110 dB.
    assert result.output.sqnr_db == pytest.approx(octavo.metrics.sqnr_db(x, y), abs=0.01)
    assert [layer.name for layer in result.layers][0] == "input"
    assert all(layer.sqnr_db > 30 for layer in result.layers)
    assert "9 of 24 positions are left out" in result.notes[-1]
    octavo.correct_bias_(model, reference, PADDED)
    assert octavo.compare(reference, model, PADDED).output.sqnr_db > 30
    assert reference.encoder.use_nested_tensor == options.get("batch_first", True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in reference.modules())


def test_masks_that_one_module_hands_to_another_count_once():
    reference, _ = encoders()
    padding = Padding(reference)
    with torch.no_grad():
        assert len(padding.masks((PADDED,), {})) == 1
    assert (padding.counted, padding.left_out) == (15, 9)
