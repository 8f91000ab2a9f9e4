# SPDX-License-Identifier: Apache-2.0
"""One value bit by bit, and the formats compared: what is shown is what is stored."""

import math

import pytest
import torch

from octavo import dtypes
from octavo.dtypes import FORMATS, bits


@pytest.mark.parametrize(
    "name, sign, exponent, fraction, stored",
    [
        ("fp32", "0", "01111101", "01010101010101010101011", 0.3333333432674408),
        ("fp16", "0", "01101", "0101010101", 0.333251953125),
        ("bf16", "0", "01111101", "0101011", 0.333984375),
        ("fp8_e4m3fn", "0", "0101", "011", 0.34375),
        ("int8", "0", "", "0000000", 0),
    ],
)
def test_one_third_bit_by_bit(name, sign, exponent, fraction, stored):
    pattern = bits(1 / 3, name)
    assert (pattern.sign, pattern.exponent, pattern.fraction, pattern.stored) == (
        sign,
        exponent,
        fraction,
        stored,
    )
    assert pattern.error == stored - 1 / 3
    for part in (sign, exponent, fraction, repr(stored), f"{pattern.error:+.3g}"):
        assert part in str(pattern)


FORMULAS = [
    (1 / 3, "bf16"),
    (-5.5, "fp32"),
    (1e-7, "fp16"),
    (0.0, "fp64"),
    (-3, "int8"),
    (200, "uint8"),
    (-448, "e4m3fn"),
]


@pytest.mark.parametrize("value, name", FORMULAS)
def test_the_formula_computes_the_stored_value(value, name):
    pattern = bits(value, name)
    assert eval(pattern.formula.replace("^", "**")) == pattern.stored
    assert f"{pattern.formula} = {pattern.stored!r}" in str(pattern)


def test_what_lies_beyond_the_range_is_said():
    assert bits(1e6, "fp16").stored == math.inf and "beyond the range" in str(bits(1e6, "fp16"))
    assert bits(1e6, "fp16", saturate=True).error == 65504 - 1e6
    assert bits(math.inf, "fp16").error == 0 and bits(math.nan, "fp16").error == 0
    with pytest.raises(ValueError, match="outside int8"):
        bits(300, "int8")


def test_bits_takes_one_value():
    assert bits(torch.tensor([[2.0]]), "bf16").stored == 2.0
    assert bits(-1, "int64").fraction == "1" * 63
    with pytest.raises(ValueError, match="value has 3 elements"):
        bits(torch.ones(3), "bf16")


def test_the_html_shows_every_bit_in_its_colour():
    page = bits(1 / 3, "bf16")._repr_html_()
    assert [page.count(colour) for colour in ("#f4b6b0", "#b7e1b0", "#b3d0f2")] == [1, 8, 7]
    assert "<script" not in page and "http" not in page


def test_the_table_says_what_7_billion_weights_weigh():
    overview = dtypes.table()
    memory = {figures["name"]: figures["gigabytes_7b"] for figures in overview.to_dict()}
    assert (memory["fp32"], memory["bf16"], memory["int8"], memory["int4"]) == (28.0, 14.0, 7.0, 3.5)
    assert [row[0] for row in overview.rows] == list(FORMATS)
    for row in overview.rows:
        assert all(cell in str(overview) for cell in row)
        assert all(f">{cell}</td>" in overview._repr_html_() for cell in row)
