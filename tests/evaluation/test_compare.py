# SPDX-License-Identifier: Apache-2.0
"""compare: the figures are those one would compute by hand, and the models stay as they were."""

import copy
import json
import math
import weakref
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import octavo
from octavo import metrics
from octavo.evaluation.comparison import model_bytes


def small_model() -> nn.Sequential:
    """Two Linear layers around an activation that works in place."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 33), nn.ReLU(inplace=True), nn.Linear(33, 5))


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module]:
    reference = small_model()
    return reference, octavo.quantized(reference, octavo.Int8Dynamic())


def figures(result):
    return result.sqnr_db, result.cosine, result.max_abs_error


def test_the_figures_are_those_computed_by_hand(pair):
    reference, model = pair
    x = torch.randn(7, 20)
    result = octavo.compare(reference, model, x)
    with torch.no_grad():
        hidden, hidden_int8 = reference[0](x), model[0](x)
        y, y_int8 = reference[2](hidden.relu()), model[2](hidden_int8.relu())
        local = model[2](hidden.relu())
    assert [layer.name for layer in result.layers] == ["0", "2"]
    # Layer 0 is followed by an in-place ReLU: had compare kept the tensor and not a copy, these would differ.
    assert result.layers[0].sqnr_db == result.layers[0].local_sqnr_db == metrics.sqnr_db(hidden, hidden_int8)
    assert result.layers[1].sqnr_db == metrics.sqnr_db(y, y_int8)
    assert result.layers[1].local_sqnr_db == metrics.sqnr_db(y, local)
    assert result.layers[1].cosine == metrics.cosine(y, y_int8)
    assert result.layers[1].max_abs_error == metrics.max_abs_error(y, y_int8)
    assert figures(result.output) == (metrics.sqnr_db(y, y_int8), metrics.cosine(y, y_int8),
                                      metrics.max_abs_error(y, y_int8))  # fmt: skip
    assert result.bytes_before == 4 * (20 * 33 + 33 + 33 * 5 + 5)
    assert result.bytes_after == model_bytes(model)


def test_batches_are_streamed_and_add_up_to_the_whole():
    # Multiples of 1/8 and small integers: float32 is exact in any order, so a split changes nothing but the
    # order of the float64 sums of the figures, at most 12 * 33 terms: 396 * 2^-53 relative, which is below
    # 1e-12.
    reference = small_model()
    for parameter in reference.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape) / 8
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    x = torch.randint(-8, 9, (12, 20)).float()
    whole, pieces = octavo.compare(reference, model, x), octavo.compare(reference, model, iter(x.split(5)))
    for a, b in zip([*whole.layers, whole.output], [*pieces.layers, pieces.output], strict=True):
        assert a.sqnr_db == pytest.approx(b.sqnr_db, rel=1e-12)
        assert a.cosine == pytest.approx(b.cosine, rel=1e-12)
        assert a.max_abs_error == b.max_abs_error


def test_nothing_keeps_more_than_one_batch(pair):
    reference, model = pair
    alive: list[int] = []

    def batches():
        outputs: list[weakref.ref] = []
        handle = reference[2].register_forward_hook(lambda *call: outputs.append(weakref.ref(call[2])))
        for _ in range(4):
            yield torch.randn(3, 20)
            alive.append(sum(output() is not None for output in outputs))
        handle.remove()

    octavo.compare(reference, model, batches())
    assert max(alive) <= 1


@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(), octavo.Int8WeightOnly(), None], ids=str)
def test_a_model_equals_itself(scheme):
    model = small_model()
    if scheme is not None:
        octavo.quantize_(model, scheme)
    result = octavo.compare(model, model, torch.randn(4, 20))
    assert figures(result.output) == (math.inf, 1.0, 0.0)
    assert len(result.layers) == (0 if scheme is None else 2)
    for layer in result.layers:
        assert figures(layer) == (math.inf, 1.0, 0.0) and layer.local_sqnr_db == math.inf
    result.plot()  # nothing finite to draw is not an error
    assert "inf" in str(result)


class Pair(nn.Module):
    """Two inputs, and outputs of every kind that transformers and torch models have."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x, y, flip=False):
        a, b = (self.a(y), self.b(x)) if flip else (self.a(input=x), self.b(y))
        if self.kind == "dataclass":
            return Outputs(a, None, (b, a.argmax()))
        return {"tuple": (a, [b], 3), "dict": {"a": a, "more": {"b": b}, "ids": a.argmax()}}[self.kind]


@dataclass
class Outputs:
    a: torch.Tensor
    nothing: None
    rest: tuple


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
@pytest.mark.parametrize("wrap", [tuple, lambda b: [list(b)], lambda b: {"x": b[0], "y": b[1]},
                                  lambda b: iter([UserDict(x=b[0], y=b[1])])],
                         ids=["tuple", "loader_of_lists", "dict", "loader_of_mappings"])  # fmt: skip
def test_every_form_of_batch_and_output_counts_the_same(kind, wrap):
    torch.manual_seed(1)
    reference = Pair(kind)
    model = octavo.quantized(reference, octavo.Int8WeightOnly())
    batch = torch.randn(3, 8), torch.randn(3, 8)
    result = octavo.compare(reference, model, wrap(batch))
    with torch.no_grad():
        expected = torch.cat([reference.a(batch[0]), reference.b(batch[1])])
        found = torch.cat([model.a(batch[0]), model.b(batch[1])])
    assert result.output.max_abs_error == metrics.max_abs_error(expected, found)
    assert result.output.sqnr_db == pytest.approx(metrics.sqnr_db(expected, found), rel=1e-12)


def test_static_layers_are_compared_and_prepared_ones_show_the_same_before_they_are_frozen(pair):
    """Both models compute with the same codes; float32 rounds their sums by some 2^-20 apart, -120 dB."""
    reference, x = pair[0], torch.randn(64, 20)
    model = small_model()
    octavo.prepare_(model, octavo.Int8Static())
    with octavo.calibrating(model):
        model(x)
    before = octavo.compare(reference, model, x)
    octavo.freeze_(model)
    after = octavo.compare(reference, model, x)
    assert [layer.name for layer in after.layers] == ["0", "2"]
    assert all(layer.local_sqnr_db > 30 for layer in after.layers)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert one.local_sqnr_db == pytest.approx(other.local_sqnr_db, abs=0.01)


def test_a_layer_that_runs_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(self.layer(x))

    reference = Twice()
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    x = torch.randn(5, 8)
    result = octavo.compare(reference, model, x)
    with torch.no_grad():
        expected = torch.cat([reference.layer(x), reference(x)])
        found = torch.cat([model.layer(x), model(x)])
    assert result.layers[0].sqnr_db == pytest.approx(metrics.sqnr_db(expected, found), rel=1e-12)


def test_layers_that_no_batch_reaches_are_named():
    reference = Pair("tuple")
    reference.unused = nn.Linear(8, 8)
    result = octavo.compare(reference, octavo.quantized(reference, octavo.Int8Dynamic()),
                            (torch.randn(2, 8), torch.randn(2, 8)))  # fmt: skip
    assert result.not_run == ["unused"]
    assert "no batch reached: unused" in str(result) and "unused" in result._repr_html_()


def test_the_models_stay_as_they_were(pair):
    reference, model = pair
    (
        reference.append(nn.Dropout(0.5)),
        model.append(nn.Dropout(0.5)),
    )  # in training mode the figures would be random
    reference.train(), model.eval()
    reference[1].eval()
    seen = []
    model[0].register_forward_hook(lambda *call: seen.append(call))
    first = octavo.compare(reference, model, torch.ones(2, 20))
    assert first.output == octavo.compare(reference, model, torch.ones(2, 20)).output
    assert [m.training for m in reference.modules()] == [True, True, False, True, True]
    assert not any(m.training for m in model.modules())
    assert len(seen) == 2  # the user's hook saw the model's own runs, not the extra ones for the local figure
    assert hooks(reference) == 0 and hooks(model) == 1


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("broken", ["reference", "model"])
def test_hooks_and_flags_come_back_after_an_error(pair, broken):
    reference, model = pair
    reference.train()

    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    dict(reference=reference, model=model)[broken].append(Fails())
    with pytest.raises(RuntimeError, match="on purpose"):
        octavo.compare(reference, model, torch.randn(2, 20))
    assert hooks(reference) == hooks(model) == 0
    assert reference.training


def test_worst_orders_by_sqnr_and_the_dict_is_plain(pair):
    result = octavo.compare(*pair, torch.randn(7, 20))
    assert result.worst(1) == [min(result.layers, key=lambda layer: layer.sqnr_db)]
    assert len(result.worst(10)) == 2
    fields = json.loads(json.dumps(result.to_dict()))
    assert fields["layers"][0]["name"] == "0" and fields["output"]["cosine"] == result.output.cosine
    assert fields["bytes_before"] == result.bytes_before


def test_text_and_html_hold_every_layer_and_escape_names(pair):
    reference, model = pair
    wrapped = [nn.ModuleDict({"<b>": m}) for m in (reference, model)]
    for module in wrapped:
        module.forward = module["<b>"].forward
    result = octavo.compare(*wrapped, torch.randn(7, 20))
    lines = str(result).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "<b>.0", "<b>.2", "output", "memory:"]
    page = result._repr_html_()
    assert "&lt;b&gt;.0" in page and "<b>" not in page
    assert page.count("<tr>") == page.count("</tr>") == 4


def test_plot_draws_on_the_given_axes_and_shows_nothing(pair, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("plot must not show"))
    result = octavo.compare(*pair, torch.randn(7, 20))
    _, ax = pyplot.subplots()
    assert result.plot(ax) is ax
    own = result.plot()
    for axes in (ax, own):
        assert [bar.get_width() for bar in axes.patches] == [layer.sqnr_db for layer in result.layers]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    pyplot.close("all")


def test_plot_without_matplotlib_names_the_remedy(pair, without_matplotlib):
    result = octavo.compare(*pair, torch.randn(7, 20))
    with pytest.raises(ImportError, match=r"pip install matplotlib$"):
        result.plot()


def mismatched(change):
    reference = small_model()
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    change(reference, model)
    return reference, model


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r, m: r.__delitem__(2), "reference has no layer '2'"),
        (lambda r, m: r.__setitem__(2, nn.Identity()), "'2' is Identity in reference"),
        (lambda r, m: r.__setitem__(2, nn.Linear(33, 6)), r"\(33, 6\) in reference and \(33, 5\) in model"),
        (lambda r, m: m.append(nn.Flatten(0)), "output shapes are"),
        (lambda r, m: m.append(nn.Sequential(nn.Linear(5, 20), m[0])), "'0' runs more often in model"),
        (lambda r, m: r.append(nn.Sequential(nn.Linear(5, 20), r[0])), "'0' runs more often in reference"),
        (lambda r, m: r.to("meta"), "reference has weights on the meta device"),
    ],
)
def test_models_that_do_not_match_are_refused(change, message):
    reference, model = mismatched(change)
    with pytest.raises(ValueError, match=message):
        octavo.compare(reference, model, torch.randn(2, 20))
    assert hooks(reference) == hooks(model) == 0


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "batches is empty"),
        (iter(()), ValueError, "batches is empty"),
        (None, TypeError, "batches is NoneType"),
        ("text", TypeError, "batches is str"),
        ([3], TypeError, "a batch is int"),
    ],
)
def test_bad_batches_are_named(pair, batches, error, message):
    with pytest.raises(error, match=message):
        octavo.compare(*pair, batches)


def test_what_is_not_a_module_is_refused(pair):
    with pytest.raises(TypeError, match="reference is function"):
        octavo.compare(lambda x: x, pair[1], torch.randn(1, 20))
    with pytest.raises(TypeError, match="model is OrderedDict"):
        octavo.compare(pair[0], pair[1].state_dict(), torch.randn(1, 20))


def test_an_output_without_floats_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten())
    model.forward = lambda x: x.argmax()
    with pytest.raises(ValueError, match="no floating-point tensor"):
        octavo.compare(model, copy.copy(model), torch.randn(1, 4))


def test_exchanged_arguments_are_warned_about(pair, caplog):
    reference, model = pair
    assert octavo.compare(model, reference, torch.randn(2, 20)).layers == []
    assert "exchanged" in caplog.text


# --- rescaled layers ------------------------------------------------------------------------------------------------


def folded(model: nn.Module, x: torch.Tensor, folder) -> nn.Module:
    return octavo.quantized(model, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=x)


def folded_and_loaded(model: nn.Module, x: torch.Tensor, folder) -> nn.Module:
    octavo.save(folded(model, x, folder), folder)
    return octavo.load(folder, copy.deepcopy(model))


def equalized(model: nn.Module, x: torch.Tensor, folder) -> nn.Module:
    model = copy.deepcopy(model)
    octavo.equalize_(model, x)
    return octavo.quantized(model, octavo.Int8Dynamic())


@pytest.mark.parametrize("rescaled", [folded, folded_and_loaded, equalized])
def test_figures_of_rescaled_layers_are_in_the_references_units(rescaled, tmp_path):
    """A layer computes what it would if it stood in the reference: what it reads there, rescaled, and what it gives,
    rescaled back. 8 bits of weights and of each row lie around 40 dB; without the factors it is -20 to 5."""
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.LayerNorm(20), nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 20), nn.LayerNorm(20), nn.Linear(20, 5)
    )
    with torch.no_grad():
        reference[0].weight.copy_(torch.rand(20) * 5)
        reference[1].weight.mul_(torch.logspace(-1, 1, 33)[:, None])
    x = torch.randn(50, 20)
    model = rescaled(reference, x, tmp_path)
    result = octavo.compare(reference, model, x)
    assert [layer.name for layer in result.layers] == ["1", "3", "5"] and not result.unclear
    assert all(min(layer.sqnr_db, layer.local_sqnr_db) > 30 for layer in result.layers)
    assert any(
        note.startswith("rescaled against the reference, and compared in its units: 1")
        for note in result.notes
    )
    last = result.layers[-1]  # it gives the model's output, in nobody's units but the reference's
    assert (last.sqnr_db, last.max_abs_error) == (result.output.sqnr_db, result.output.max_abs_error)


def test_exchanged_models_are_noticed(pair):
    """The figures are those of the exchanged models, and the result says so."""
    reference, model = pair
    result = octavo.compare(model, reference, torch.randn(4, 20))
    assert "were the two exchanged? The float model comes first" in result.notes[0]
    assert result.notes[0] in str(result)
    found = octavo.evaluate(model, reference, torch.randn(4, 20), resources=())
    assert any("were the two exchanged?" in note for note in found.notes)
    assert not any("exchanged" in note for note in octavo.compare(*pair, torch.randn(4, 20)).notes)
