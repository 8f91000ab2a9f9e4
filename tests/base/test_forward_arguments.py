# SPDX-License-Identifier: Apache-2.0
"""Labels beside the inputs are left out, and said, by every function that runs batches; what may be both is refused."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import octavo
from octavo.base.forward_arguments import arguments_by_name, taken

X, LABELS = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def static(model: nn.Module) -> nn.Module:
    return octavo.quantized(model, octavo.Int8Static(), data=X)


USES = {
    "quantize_": lambda data: octavo.quantize_(mlp(), octavo.Int8Static(), data=data),
    "quantized": lambda data: octavo.quantized(
        mlp(), octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=data
    ),
    "compare": lambda data: octavo.compare(mlp(), static(mlp()), data),
    "evaluate": lambda data: octavo.evaluate(mlp(), static(mlp()), data, kind="module", resources=()),
    "sensitivity": lambda data: octavo.sensitivity(mlp(), data, octavo.Int8Dynamic()),
    "correct_bias_": lambda data: octavo.correct_bias_(static(mlp()), mlp(), data),
    "equalize_": lambda data: octavo.equalize_(mlp(), data),
    "fuse_": lambda data: octavo.fuse_(static(mlp()), data),
}
FORMS = {
    "loader": DataLoader(TensorDataset(X, LABELS), batch_size=5),
    "tuple": (X, LABELS),
    "float_targets": [(X, torch.randn(12))],
    "targets_like_x": [(X, X)],
    "list_in_a_list": [[X, LABELS]],
    "dict": {"input": X, "labels": LABELS, "names": ["a"] * 12},
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_rule_for_labelled_batches_everywhere(use, form):
    use(form)


@pytest.mark.parametrize("form", [[(X, LABELS)], FORMS["dict"]], ids=["loader", "dict"])
def test_figures_are_those_without_the_labels_and_say_so(form):
    reference, model = mlp(), static(mlp())
    with_labels, without = octavo.compare(reference, model, form), octavo.compare(reference, model, X)
    assert with_labels.output.max_abs_error == without.output.max_abs_error
    assert any("not used" in note for note in with_labels.notes) and not without.notes
    assert with_labels.notes[0] in str(with_labels)


def test_functions_without_a_result_for_it_log_it_once(caplog):
    caplog.set_level("INFO", "octavo")
    octavo.quantize_(mlp(), octavo.Int8Static(), data=FORMS["loader"])
    assert (
        caplog.messages.count("quantize_: the last value of each batch is taken for labels and not used") == 1
    )


class Two(nn.Module):
    """`second` may be left out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, x, attention_mask=None):
        return self.layer(x if attention_mask is None else x * attention_mask)


class Both(Two):
    def forward(self, x, second):
        return self.layer(x) * second[:, None]


@pytest.mark.parametrize(
    "second", [LABELS, LABELS[:, None], LABELS.float(), torch.full((12, 8), -100), LABELS.repeat(8, 1).T]
)
def test_labels_that_forward_has_another_place_for_are_refused(second):
    """A mask holds no class, no -100 and is as wide as x."""
    with pytest.raises(ValueError, match="may end with labels, or with what forward calls 'attention_mask'"):
        octavo.compare(Two(), octavo.quantized(Two(), octavo.Int8Dynamic()), (X, second))


def test_what_forward_needs_or_is_named_is_an_input():
    for batch in [
        (X, torch.ones(12, 8)),
        (X, torch.ones(12, 8, dtype=torch.bool)),
        {"x": X, "attention_mask": LABELS[:, None]},
    ]:
        octavo.compare(Two(), octavo.quantized(Two(), octavo.Int8Dynamic()), batch)
    reference = Both()
    octavo.compare(reference, octavo.quantized(reference, octavo.Int8Dynamic()), (X, LABELS))


@pytest.mark.parametrize(
    "batch, text",
    [
        ((X, X), "A tuple is one batch: put batches into a list"),
        ((X, X[:5]), "A tuple is one batch: put batches into a list"),
        ((X, LABELS, LABELS), "A tuple is one batch: put batches into a list"),
        ({"pixels": X, "labels": LABELS}, "forward takes none of them, only 'input'"),
    ],
)
def test_batches_that_do_not_fit_are_refused_and_the_model_stays(batch, text):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=text):
        octavo.quantize_(model, octavo.Int8Static(), data=batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_entries_that_forward_does_not_name_are_said_even_if_it_takes_any():
    class Any_(nn.Module):
        def forward(self, input_ids, **kwargs):
            return input_ids

    batch = {"input_ids": X, "idx": LABELS}
    args, kwargs, note = taken(Any_(), (), batch, who="compare")
    assert kwargs == batch and "idx" in note
    args, kwargs, note = taken(nn.Linear(8, 3), (), {"input": X, "idx": LABELS}, who="compare")
    assert kwargs.keys() == {"input"} and note == "not used, for forward does not take it: idx"


def test_wrappers_are_looked_through_and_arguments_have_names():
    compiled = torch.compile(nn.Linear(8, 3))
    assert taken(compiled, (X, LABELS), {}, who="x")[0] == (X,)
    assert arguments_by_name(Two(), (X, LABELS), {}).keys() == {"x", "attention_mask"}
    assert inspect.signature(Two.forward).parameters.keys() == {"self", "x", "attention_mask"}
