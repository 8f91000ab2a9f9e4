# SPDX-License-Identifier: Apache-2.0
"""An evaluation as dict, JSON, text, Markdown, HTML and plot; and the limits that a test sets on it."""

import html
import json
import math
from dataclasses import fields, replace

import pytest
import torch
from test_kinds import IDS, CausalModel

import octavo
from octavo.evaluation.figures import FIGURES, SECTIONS
from octavo.evaluation.views import sections


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    reference = CausalModel()
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    return octavo.evaluate(
        reference, model, IDS, prompts=octavo.Prompts(IDS[:, :4], new_tokens=3), bytes_per_token=1
    )


@pytest.fixture(scope="module")
def nothing():
    """A model against itself: figures of 0 and inf, and parts that are not there."""
    model = octavo.quantized(torch.nn.Sequential(torch.nn.Linear(4, 3)), octavo.Int8Dynamic())
    return octavo.evaluate(model, model, torch.randn(2, 4), resources=())


def test_the_dict_holds_every_field(result):
    found = result.to_dict()
    assert found.keys() == {field.name for field in fields(result)}
    assert found["distribution"]["kld"] == result.distribution.kld
    assert found["resources"]["model"]["memory"]["total"] == result.resources.model.memory.total
    assert found["generation"]["first_differences"] == result.generation.first_differences


def test_json_is_strict_and_reads_back(nothing, result):
    def refuse(text):
        raise AssertionError(f"{text} is no JSON")

    found = json.loads(nothing.to_json(), parse_constant=refuse)
    assert float(found["output"]["sqnr_db"]) == math.inf and found["output"]["cosine"] == 1.0
    assert found["distribution"] is None
    assert json.loads(result.to_json(indent=None), parse_constant=refuse)["kind"] == "language_model"
    broken = replace(nothing, output=replace(nothing.output, cosine=math.nan))
    assert math.isnan(float(json.loads(broken.to_json())["output"]["cosine"]))


def test_every_figure_stands_where_its_path_says(result, nothing):
    missing = {name for name, figure in FIGURES.items() if figure.value(result) is None}
    assert missing <= {"mean_cosine", "worst_cosine", "same_neighbour", "joules_per_call", "peak_rss"}
    assert FIGURES["perplexity"].reference_value(result) == result.distribution.perplexity_reference
    assert {name for name in FIGURES if FIGURES[name].value(nothing) is not None} == {
        figure.name for figure in SECTIONS["Output"]
    }


@pytest.mark.parametrize("face", [str, octavo.Evaluation.to_markdown, octavo.Evaluation._repr_html_])
def test_text_markdown_and_html_hold_every_figure_measured(result, nothing, face):
    for evaluation in (result, nothing):
        shown = html.unescape(face(evaluation))
        for title, rows in sections(evaluation).items():
            assert title in shown
            for row in rows:
                assert row.model.strip() in shown and row.reference in shown
    assert "inf dB" in face(nothing)
    assert "no RAPL" in face(result) or result.resources.model.joules_per_call is not None


def test_names_are_escaped_in_html(nothing):
    page = replace(nothing, schemes={"<b>": 1}, notes=["a < b"])._repr_html_()
    assert "&lt;b&gt;" in page and "a &lt; b" in page and "x <b>" not in page
    assert page.count("<tr") == page.count("</tr>") == 5


@pytest.mark.parametrize(
    "name, value, share",
    [
        ("kld", 1e-3, 0.5), ("kld", 0.0, 0.0), ("kld", math.inf, 1.0), ("kld", 5.0, 1.0), ("kld", math.nan, None),
        ("top1_agreement", 0.25, 0.25), ("perplexity", 3.0, 0.75), ("perplexity", 99.0, 1.0),
    ],
)  # fmt: skip
def test_bars_stay_between_0_and_1(result, name, value, share):
    distribution = replace(result.distribution, perplexity_reference=2.0, **{name: value})
    found = FIGURES[name].bar_share(replace(result, distribution=distribution))
    assert found is None if share is None else found == pytest.approx(share)


def test_a_table_in_markdown_is_well_formed(result):
    rows = [line for line in result.to_markdown().splitlines() if line.startswith("|")]
    assert len(rows) > 20 and {row.count("|") for row in rows} == {4}


# --- limits ---------------------------------------------------------------------------------------------------------


def test_limits_are_kept_by_what_is_better(result):
    kld, top1 = result.distribution.kld, result.distribution.top1_agreement
    result.assert_close(kld=kld, top1_agreement=top1, identical=0.0, bytes_in_memory=1e9)
    with pytest.raises(AssertionError, match=rf"1 of 2 .*: kld is {kld:.6g}, allowed at most {kld / 2:.6g}$"):
        result.assert_close(kld=kld / 2, top1_agreement=top1)
    with pytest.raises(AssertionError, match="2 of 2 .* cosine is .*, allowed at least 1.1; sqnr_db is"):
        result.assert_close(cosine=1.1, sqnr_db=999)


def test_nan_keeps_no_limit(nothing):
    for name, limit in (("sqnr_db", -math.inf), ("max_abs_error", math.inf)):
        broken = replace(nothing, output=replace(nothing.output, **{name: math.nan}))
        with pytest.raises(AssertionError, match=f"{name} is nan"):
            broken.assert_close(**{name: limit})


def test_limits_that_check_nothing_are_refused(nothing):
    with pytest.raises(TypeError, match="no limit given"):
        nothing.assert_close()
    with pytest.raises(TypeError, match="kldd unknown; known are sqnr_db, cosine"):
        nothing.assert_close(kldd=0.1, cosine=0.9)
    with pytest.raises(ValueError, match="kld was not measured for this module"):
        nothing.assert_close(kld=0.1)


# --- plots ----------------------------------------------------------------------------------------------------------


def test_plots_draw_on_the_given_axes_and_show_nothing(result, nothing, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("plot must not show"))
    _, ax = pyplot.subplots()
    assert result.plot(ax) is ax
    widths = [bar.get_width() for bar in result.plot().patches]
    assert widths[1] == result.distribution.kld and widths[-1] == result.distribution.kld_max
    assert [bar.get_width() for bar in nothing.plot().patches] == [0.0]
    line = result.generation.plot().lines[0]
    assert line.get_ydata().tolist() == result.generation.kld_by_position
    pyplot.close("all")


def test_plots_without_matplotlib_name_the_remedy(result, without_matplotlib):
    for part in (result, result.generation):
        with pytest.raises(ImportError, match=r"pip install matplotlib$"):
            part.plot()


@pytest.mark.parametrize(
    "seconds, text",
    [(1.83, "1.83 s"), (83.04, "83.0 s"), (1234.0, "1,234 s"), (0.99996, "1.00 s"), (0.0123, "12.3 ms"),
     (0.5, "500 ms"), (0.000456, "456 µs"), (2.34e-7, "0.234 µs"), (0.0, "0 µs")],
)  # fmt: skip
def test_times_are_shown_without_an_exponent(seconds, text):
    assert FIGURES["latency"].shown(seconds) == text


@pytest.mark.parametrize("joules, text", [(1834.0, "1,834 J"), (12.3, "12.3 J"), (0.00123, "0.00123 J")])
def test_figures_of_three_digits_are_whole_numbers_above_that(joules, text):
    assert FIGURES["joules_per_call"].shown(joules) == text
