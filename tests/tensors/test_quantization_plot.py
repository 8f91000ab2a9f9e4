# SPDX-License-Identifier: Apache-2.0
"""The picture of a quantized matrix: every number that belongs there is in it, and scales stand where they apply."""

import pytest
import torch

import octavo

pyplot = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures(monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *_, **__: pytest.fail("plot must not show"))
    yield
    pyplot.close("all")


def cells(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def labels(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def title(figure) -> str:
    return figure.get_suptitle()


X = torch.tensor([[0.10, -0.25, 0.50, 1.00], [12.0, -30.0, 0.50, 7.00]])


def test_the_four_panels_hold_x_codes_dequantized_and_error():
    q = octavo.quantize(X, granularity=octavo.PerChannel(0))
    x, codes, back, error = q.plot(X).axes
    assert cells(x) == [f"{value:.3g}" for value in X.flatten().tolist()]
    assert cells(codes) == [str(code) for code in q.codes.flatten().tolist()]
    assert cells(back) == [f"{value:.3g}" for value in q.dequantize().flatten().tolist()]
    differences = (q.dequantize().double() - X.double()).flatten().tolist()
    assert cells(error) == [f"{value:+.2g}" if value else "0" for value in differences]


def test_one_scale_of_all_is_in_the_title():
    q = octavo.quantize(X)
    assert title(q.plot(X)) == f"scale of all: {q.scale.item():.3g}"


def test_scales_of_rows_stand_beside_them():
    q = octavo.quantize(X, granularity=octavo.PerToken())
    figure = q.plot(X)
    assert labels(figure.axes[1].yaxis) == [f"{scale:.3g}" for scale in q.scale.tolist()]
    assert title(figure) == "beside the codes: scale"


def test_scales_of_columns_stand_below_them():
    q = octavo.quantize(X, granularity=octavo.PerChannel(1))
    figure = q.plot(X)
    assert labels(figure.axes[1].xaxis) == [f"{scale:.3g}" for scale in q.scale.tolist()]
    assert title(figure) == "below the codes: scale"


def test_scales_and_zero_points_of_groups_stand_beside_their_row():
    q = octavo.quantize(X, granularity=octavo.PerGroup(2), symmetric=False)
    expected = [
        " | ".join(
            f"{scale:.3g} ({zero})" if zero else f"{scale:.3g}" for scale, zero in zip(*row, strict=True)
        )
        for row in zip(q.scale.tolist(), q.zero_point.tolist(), strict=True)
    ]
    assert labels(q.plot(X).axes[1].yaxis) == expected


def test_a_large_matrix_shows_its_corner_and_says_so():
    x = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    q = octavo.quantize(x, granularity=octavo.PerChannel(0))
    figure = q.plot(x, max_rows=3, max_columns=2)
    assert title(figure).startswith("top left corner of [20, 30]; ")
    assert cells(figure.axes[1]) == [str(code) for code in q.codes[:3, :2].flatten().tolist()]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_other_shapes_are_drawn_as_rows(shape):
    x = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape)
    figure = octavo.quantize(x).plot(x)
    assert len(cells(figure.axes[0])) == x.numel()


def test_zeros_and_bfloat16_are_drawn():
    x = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert cells(octavo.quantize(x).plot(x).axes[3]) == ["0"] * 4


def test_what_does_not_fit_is_refused():
    q = octavo.quantize(X)
    with pytest.raises(ValueError, match=r"x has shape \[4, 2\], these codes \[2, 4\]"):
        q.plot(X.T)
    with pytest.raises(ValueError, match="not an empty one"):
        octavo.quantize(X[:0]).plot(X[:0])
    with pytest.raises(ValueError, match="at least 1 row and column, got 0 and 8"):
        q.plot(X, max_rows=0)
    with pytest.raises(TypeError, match="x is torch.float64"):
        q.plot(X.double())


def test_without_matplotlib_the_remedy_is_named(without_matplotlib):
    with pytest.raises(ImportError, match=r"pip install matplotlib$"):
        octavo.quantize(X).plot(X)
