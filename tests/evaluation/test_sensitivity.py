# SPDX-License-Identifier: Apache-2.0
"""Each layer alone, and the schemes chosen by that: the model stays as it was, and the choice is the best there is."""

import itertools
import json
import math

import pytest
import torch
from asserts import assert_unchanged, model_state
from models import IDS, LINEARS, model, variants
from torch import nn

import octavo
from octavo.evaluation import mixed_precision
from octavo.evaluation.sensitivities import LayerSensitivity, Sensitivity
from octavo.lab.study import byte_lm, byte_text
from octavo.metrics import DistributionAccumulator, relative_error

W8, W4, W3, W2 = (octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(bits)) for bits in (8, 4, 3, 2))
# In groups, whose codes take as many bits in memory as they have.
FOUR, THREE, TWO = (octavo.Int4WeightOnly(64, bits=bits, symmetric=False) for bits in (4, 3, 2))
UNIT = 2.0**-20  # figures that are multiples of it add up without rounding, in any order


# --- choosing -------------------------------------------------------------------------------------------------------


def made_up(layers: int, seed: int, *, with_float: bool = True) -> Sensitivity:
    """Random figures, which need not fall as the bits rise, and sizes that fit them."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(layers):
        weights = 8 * int(torch.randint(1, 20, (), generator=generator))
        figures = (torch.randint(0, 1 << 20, (3,), generator=generator).double() * UNIT).tolist()
        if with_float:
            rows.append(LayerSensitivity(str(i), None, 0.0, 4 * weights, weights))
        for scheme, figure in zip((W8, W4, W2), figures, strict=True):
            rows.append(LayerSensitivity(str(i), scheme, figure, scheme.weights.bits * weights // 8, weights))
    return Sensitivity("kld", rows)


def sums(found: Sensitivity, chosen) -> tuple[int, float]:
    """Bytes and summed figure of what was chosen."""
    rows = {(row.name, row.scheme): row for row in found.rows}
    assert list(chosen) == list(found.layers)
    picked = [rows[item] for item in chosen.items()]
    return sum(row.packed_bytes for row in picked), sum(row.figure for row in picked)


def all_sums(found: Sensitivity) -> list[tuple[int, float]]:
    return [
        (sum(row.packed_bytes for row in rows), sum(row.figure for row in rows))
        for rows in itertools.product(*found.layers.values())
    ]


@pytest.mark.parametrize("with_float", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_choice_is_the_best_of_all_combinations_at_every_budget(seed, with_float):
    found = made_up(4, seed, with_float=with_float)
    possible = all_sums(found)
    for budget in sorted({size for size, _ in possible})[::4]:
        best = min((figure, size) for size, figure in possible if size <= budget)
        assert sums(found, octavo.choose(found, budget=budget))[::-1] == best
    for budget in sorted({figure for _, figure in possible})[::4]:
        best = min((size, figure) for size, figure in possible if figure <= budget)
        assert sums(found, octavo.choose(found, error=budget)) == best


def budgets(found: Sensitivity) -> tuple[list[float], list[float]]:
    """Sizes and figures that fill the range of what can be reached."""
    (small, coarse), (large, _) = (
        sums(found, octavo.choose(found, budget=size)) for size in (least_bytes(found), math.inf)
    )
    steps = torch.linspace(0, 1, 25, dtype=torch.float64).tolist()
    return [small + t * (large - small) for t in steps], [t * coarse for t in steps]


def least_bytes(found: Sensitivity) -> int:
    return sum(min(row.packed_bytes for row in rows) for rows in found.layers.values())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_budgets_are_kept_and_more_budget_is_never_worse(monkeypatch, seed, exact):
    found = made_up(12, seed)
    by_size, by_figure = budgets(found)
    if not exact:
        monkeypatch.setattr(mixed_precision, "EXACT_SUMS", 0)
    last = math.inf
    for budget in by_size:
        size, figure = sums(found, octavo.choose(found, budget=budget))
        assert size <= budget and figure <= last
        last = figure
    last = math.inf
    for budget in by_figure:
        size, figure = sums(found, octavo.choose(found, error=budget))
        assert figure <= budget and size <= last
        last = size


@pytest.mark.parametrize("seed", range(2))
def test_what_a_price_for_bytes_finds_is_the_best_of_its_own_size_and_figure(monkeypatch, seed):
    found = made_up(12, seed)
    by_size, by_figure = budgets(found)
    with monkeypatch.context() as patch:
        patch.setattr(mixed_precision, "EXACT_SUMS", 0)
        priced = [sums(found, octavo.choose(found, budget=budget)) for budget in by_size]
        priced += [sums(found, octavo.choose(found, error=budget)) for budget in by_figure]
    assert len(set(priced)) > 10
    for size, figure in set(priced):
        assert sums(found, octavo.choose(found, budget=size)) == (size, figure)
        assert sums(found, octavo.choose(found, error=figure)) == (size, figure)


def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can():
    rows = [
        LayerSensitivity(name, scheme, figure, size, 80)
        for name in "abc"
        for scheme, figure, size in ((W8, 0.1, 80), (W4, 0.7, 40))
    ]
    found = Sensitivity("kld", rows)
    with pytest.raises(ValueError, match="budget is 119, the least possible is 120"):
        octavo.choose(found, budget=119)
    assert octavo.choose(found, budget=120) == dict.fromkeys("abc", W4)
    least = 0.1 + 0.1 + 0.1  # in float64 not 0.3
    with pytest.raises(ValueError, match=f"error is 0.2, the least possible is {least}"):
        octavo.choose(found, error=0.2)
    assert octavo.choose(found, error=least) == dict.fromkeys("abc", W8)
    with pytest.raises(ValueError, match="budget is nan"):
        octavo.choose(found, budget=math.nan)


def test_one_of_budget_and_error_is_needed():
    for both_or_none in ({}, {"budget": 1000, "error": 1.0}):
        with pytest.raises(TypeError, match="give one of budget=.*and error="):
            octavo.choose(made_up(2, 0), **both_or_none)


def test_without_a_limit_an_error_budget_takes_the_fewest_bytes_and_a_size_budget_the_least_figure():
    found = made_up(5, 0)
    assert sums(found, octavo.choose(found, error=math.inf))[0] == least_bytes(found)
    assert sums(found, octavo.choose(found, budget=math.inf))[1] == 0


def test_a_figure_that_is_not_finite_is_never_chosen():
    rows = [LayerSensitivity("a", None, 0.0, 320, 80), LayerSensitivity("a", W4, math.nan, 40, 80)]
    assert octavo.choose(Sensitivity("kld", rows), budget=1000) == {"a": None}
    with pytest.raises(ValueError, match="the least possible is 320"):
        octavo.choose(Sensitivity("kld", rows), budget=40)
    with pytest.raises(ValueError, match="'a' has no row with a finite figure"):
        octavo.choose(Sensitivity("kld", rows[1:]), budget=1000)


# --- measuring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", ["kld", "error"])
def test_one_layer_alone_is_that_layer_quantized_by_hand_and_the_model_stays(figure):
    """For every scheme, those that fold into a norm or linear layer included."""
    reference, schemes = model().train(), list(dict.fromkeys(variants()))
    before = model_state(reference)
    found = octavo.sensitivity(reference, IDS, schemes, figure=figure, include=["encoder.0.*", "head"])
    assert_unchanged(reference, before)
    assert all(module.training for module in reference.modules())
    reference.eval()
    expected = [(name, scheme) for name in (*LINEARS[:3], "head") for scheme in (None, *schemes)]
    assert [(row.name, row.scheme) for row in found.rows] == expected
    for row in found.rows:
        if row.scheme is None:
            assert row.figure == 0
            continue
        alone = octavo.quantized(reference, {row.name: row.scheme}, data=IDS)
        with torch.no_grad():
            x, y = reference(IDS), alone(IDS)
        logits = DistributionAccumulator()
        logits.update(x, y)
        assert row.figure == (logits.result().kld if figure == "kld" else relative_error(x, y))


def test_sizes_are_those_that_lie_in_memory():
    linear = nn.Sequential(nn.Linear(256, 32))
    schemes = [W8, octavo.Int4WeightOnly(64, bits=3), octavo.LLMInt8(0.5)]
    found = octavo.sensitivity(linear, torch.ones(2, 256), schemes, figure="error")
    for row in found.rows[1:]:
        quantized = octavo.quantized(linear, row.scheme, data=torch.ones(2, 256))
        assert 8 * row.packed_bytes == octavo.evaluation.bits_per_weight(quantized) * row.weights
    assert [row.packed_bytes for row in found.rows[:3]] == [
        4 * 256 * 32,
        256 * 32 + 4 * 32,  # a float32 scale for each channel
        3 * 256 * 32 // 8 + 2 * 4 * 32,  # and a float16 one for each group
    ]


def test_a_batch_that_raises_leaves_the_model_as_it_was():
    reference = model().train()
    before = model_state(reference)
    for scheme in (W4, octavo.Int8Dynamic(method=octavo.SmoothQuant())):
        with pytest.raises(IndexError):
            octavo.sensitivity(reference, [IDS, IDS + 10**6], scheme)
        assert_unchanged(reference, before)
        assert all(module.training for module in reference.modules())


def test_a_generator_of_batches_is_read_once_and_serves_all_layers():
    batches = [IDS, IDS.flip(1)]
    schemes = [W4, octavo.Int8Static()]
    assert octavo.sensitivity(model(), iter(batches), schemes) == octavo.sensitivity(
        model(), batches, schemes
    )


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model()

    def forward(self, input_ids, attention_mask):
        return {"logits": self.model(input_ids)}


def test_padding_does_not_count():
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    padded = octavo.sensitivity(Padded(), {"input_ids": IDS, "attention_mask": mask}, W3)
    plain = octavo.sensitivity(model(), IDS[:1], W3)
    for row, expected in zip(padded.rows, plain.rows, strict=True):
        assert row.name == f"model.{expected.name}"
        assert math.isclose(row.figure, expected.figure, rel_tol=1e-4)  # float32 logits of other batch sizes


def test_what_quantize_keeps_in_float_has_no_rows():
    tied = model()
    tied.head = nn.Linear(8, 10, bias=False)
    tied.head.weight = tied.embedding.weight
    assert "head" not in octavo.sensitivity(tied, IDS, W4).layers
    found = octavo.sensitivity(model(), IDS, W4, exclude=["encoder.*"])
    assert list(found.layers) == ["head"]


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"figure": "sqnr"}, ValueError, "figure is 'sqnr'; accepted are 'kld' and 'error'"),
        ({"data": []}, ValueError, "data is empty"),
        ({"schemes": "int8"}, ValueError, "scheme 'int8' is unknown"),
        ({"schemes": []}, ValueError, "schemes is empty"),
        ({"schemes": 3}, TypeError, r"schemes is 3; give a scheme or a list of them: \[octavo.Int8Dynamic"),
        ({"schemes": None}, TypeError, "schemes is None; give a scheme"),
        ({"include": "nothing"}, ValueError, "matches no layer"),
        ({"model": nn.Linear(8, 8)}, ValueError, "wrap it"),
        ({"model": nn.Sequential(nn.Embedding(10, 8))}, ValueError, "no layer can be quantized"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, error, text):
    with pytest.raises(error, match=text):
        octavo.sensitivity(**{"model": model(), "data": IDS, "schemes": W4, **change})
    with pytest.raises(TypeError, match="sensitivity is int; give what octavo.sensitivity"):
        octavo.choose(3, error=1.0)


def test_an_output_without_logits_asks_for_the_other_figure():
    linear = nn.Sequential(nn.Linear(5, 3), nn.Flatten(0))
    with pytest.raises(TypeError, match="figure='error' compares any tensors"):
        octavo.sensitivity(linear, torch.ones(2, 5), W4)


# --- showing --------------------------------------------------------------------------------------------------------


def test_a_sensitivity_is_a_table_a_dict_and_a_plot(capsys):
    found = octavo.sensitivity(
        model(), IDS, [W8, octavo.Int8Dynamic(method=octavo.SmoothQuant())], progress=True
    )
    assert "measuring sensitivity" in capsys.readouterr().err
    lines = str(found).splitlines()
    assert len(lines) == 2 + len(found.rows) and "KL divergence, nats" in lines[0]
    assert found._repr_html_().count("<tr>") == 1 + len(found.rows)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["figure"] == "kld" and plain["rows"][0]["scheme"] is None
    assert octavo.schemes.from_dict(plain["rows"][2]["scheme"]) == octavo.Int8Dynamic(
        method=octavo.SmoothQuant()
    )


def test_a_plot_marks_every_figure_above_0():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = octavo.sensitivity(model(), IDS, [W4, W2])
    ax = found.plot()
    assert [len(line.get_xdata()) for line in ax.lines] == [7, 7]
    assert [text.get_text() for text in ax.get_yticklabels()] == LINEARS
    assert found.plot(ax) is ax
    pyplot.close(ax.figure)


# --- on a language model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> Sensitivity:
    return octavo.sensitivity(byte_lm.load(), byte_text.calibration(4), [TWO, THREE, FOUR])


def test_a_budget_may_be_a_size_as_people_write_it():
    rows = [LayerSensitivity("a", None, 0.0, 4000, 1000), LayerSensitivity("a", W4, 0.1, 500, 1000)]
    found = Sensitivity("kld", rows)
    assert octavo.choose(found, budget="4 kB") == octavo.choose(found, budget=4000) == {"a": None}
    assert octavo.choose(found, budget="3.9 KiB") == octavo.choose(found, budget="3999") == {"a": W4}
    with pytest.raises(ValueError, match="budget is 400, the least possible is 500"):
        octavo.choose(found, budget="0.4 kB")
    with pytest.raises(TypeError, match="error is '8 kB'; a number in the figure's unit is needed"):
        octavo.choose(found, error="8 kB")


def kld(chosen) -> float:
    """Of the byte language model so quantized, on text that was not used to choose."""
    reference, windows = byte_lm.load(), byte_text.held_out(16)
    result = octavo.evaluate(
        reference, octavo.quantized(reference, chosen), windows, kind="language_model", resources=()
    )
    return result.distribution.kld


def test_half_the_layers_at_4_bits_and_half_at_2_is_better_than_the_other_way_round(measured):
    """The eight layers of the perceptrons have one size, so both choices have."""
    rows = [row for row in measured.rows if ".mlp." in row.name and row.scheme in (TWO, FOUR)]
    chosen = octavo.choose(Sensitivity("kld", rows), budget=sum(row.packed_bytes for row in rows) / 2)
    assert sorted(scheme.weights.bits for scheme in chosen.values()) == [2, 2, 2, 2, 4, 4, 4, 4]
    inverted = {name: TWO if scheme == FOUR else FOUR for name, scheme in chosen.items()}
    assert kld(chosen) < kld(inverted) / 3


def test_a_mix_of_2_to_4_bits_is_better_than_3_bits_for_all_at_equal_size(measured):
    uniform = dict.fromkeys(measured.layers, THREE)
    size, _ = sums(measured, uniform)
    chosen = octavo.choose(measured, budget=size)
    assert sums(measured, chosen)[0] <= size
    assert kld(chosen) < kld(uniform)
