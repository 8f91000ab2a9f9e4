# SPDX-License-Identifier: Apache-2.0
"""Every face of a table has the same cells, in lines of one width."""

from types import SimpleNamespace

from octavo.base.tables import Table, as_html, as_text, percent

ROWS = [SimpleNamespace(name="fp32", kld=0.0), SimpleNamespace(name="a <b>", kld=0.12345)]
TABLE = Table.of("A title", {"KLD": lambda row: f"{row.kld:.2f}", "KLD ": lambda row: percent(row.kld)}, ROWS)


def test_a_cell_for_each_row_and_column_after_the_name():
    assert TABLE.header == ["scheme", "KLD", "KLD"]
    assert TABLE.rows == [["fp32", "0.00", "0.00%"], ["a <b>", "0.12", "12.35%"]]


def test_text_stands_in_columns():
    assert str(TABLE).splitlines() == [
        "A title",
        "scheme   KLD     KLD",
        "--------------------",
        "fp32    0.00   0.00%",
        "a <b>   0.12  12.35%",
    ]


def test_markdown_and_html_show_every_cell():
    assert TABLE.to_markdown().splitlines()[-1] == "| a <b> | 0.12 | 12.35% |"
    page = TABLE._repr_html_()
    assert "a &lt;b&gt;" in page and "<b>" not in page and page.count("<td") == 6


def test_columns_of_numbers_stand_right_and_lines_end_with_their_text():
    text = as_text(("name", "MB", "reason"), [("a", "10.5", ""), ("bcdef", "2", "tied")], right=("MB",))
    assert text.splitlines() == [
        "name     MB  reason",
        "-------------------",
        "a      10.5",
        "bcdef     2  tied",
    ]


def test_html_without_styles_is_bare():
    assert as_html(["a"], [["<b>"]]) == (
        "<table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody></table>"
    )
