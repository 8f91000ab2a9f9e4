# SPDX-License-Identifier: Apache-2.0
"""The report: sums, table, HTML, JSON."""

import json

from octavo.conversion.report import QuantizationReport, Row

REPORT = QuantizationReport(
    [
        Row("embedding", "Embedding", "kept", "no scheme for this kind", "", 1_000_000, 1_000_000),
        Row("fc", "Linear", "quantized", "", "Int8Dynamic", 4_000_000, 1_000_000),
        Row("<head>", "Linear", "kept", "weight is tied to embedding.weight", "", 0, 0),
    ]
)


def test_sums_and_selections_are_those_of_the_rows():
    assert [row.name for row in REPORT.quantized] == ["fc"]
    assert [row.name for row in REPORT.kept] == ["embedding", "<head>"]
    assert (REPORT.bytes_before, REPORT.bytes_after) == (5_000_000, 2_000_000)


def test_str_is_a_table_with_a_line_for_each_row():
    lines = str(REPORT).splitlines()
    assert len(lines) == 2 + len(REPORT.rows) + 1
    assert lines[0].split() == ["name", "kind", "action", "scheme", "MB", "before", "MB", "after", "reason"]
    assert lines[3].split() == ["fc", "Linear", "quantized", "Int8Dynamic", "4.000", "1.000"]
    assert lines[4].endswith("weight is tied to embedding.weight")
    assert lines[-1] == "1 of 3 layers with weights quantized, 5.000 -> 2.000 MB (2.50x smaller)"
    columns = {
        line.index(word) for line, word in zip(lines[2:5], ["Embedding", "Linear", "Linear"], strict=True)
    }
    assert len(columns) == 1


def test_repr_is_one_line():
    assert (
        repr(REPORT)
        == "QuantizationReport(1 of 3 layers with weights quantized, 5.000 -> 2.000 MB (2.50x smaller))"
    )


def test_html_escapes_names():
    html = REPORT._repr_html_()
    assert html.count("<tr>") == 1 + len(REPORT.rows)
    assert "<td>&lt;head&gt;</td>" in html and "<head>" not in html


def test_to_dict_is_json_with_every_field():
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert [Row(**row) for row in data["rows"]] == REPORT.rows
    assert (data["bytes_before"], data["bytes_after"]) == (5_000_000, 2_000_000)


def test_an_empty_report_prints():
    assert str(QuantizationReport([])).endswith("0 of 0 layers with weights quantized, 0.000 -> 0.000 kB")


def test_a_small_model_is_shown_in_kilobytes_and_a_small_layer_never_as_nothing():
    small = QuantizationReport([Row("fc", "Linear", "quantized", "", "Int8Dynamic", 1_234, 400)])
    lines = str(small).splitlines()
    assert lines[0].split()[4:8] == ["kB", "before", "kB", "after"]
    assert lines[2].split()[4:] == ["1.234", "0.400"]
    assert lines[-1].endswith("1.234 -> 0.400 kB (3.08x smaller)") and "kB before" in small._repr_html_()
    mixed = QuantizationReport([*REPORT.rows, Row("norm", "LayerNorm", "kept", "", "", 256, 256)])
    lines = str(mixed).splitlines()
    assert lines[5].split()[4:] == ["0.000256", "0.000256"]
    assert lines[4].split()[4:6] == ["0.000", "0.000"]  # tied: nothing of its own


def test_the_summary_names_what_keeps_most_of_the_bytes():
    """A layer in three is quantized, and the model is as large as before."""
    experts = Row("experts", "Experts", "kept", "no scheme for this kind", "", 30_000_000, 30_000_000)
    summary = str(QuantizationReport([*REPORT.rows, experts])).splitlines()[-1]
    assert summary.endswith("; 89 % of the bytes stay as they were, most of them in Experts")  # 31 of 35 MB
