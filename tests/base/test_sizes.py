# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them are the bytes they mean, and what could be read in two ways is refused."""

import numpy as np
import pytest

from octavo.base.sizes import bytes_of

SIZES = {
    8000: 8000, "8000": 8000, "8 kB": 8000, "8KB": 8000, "8k": 8000, "8,000": 8000, "8_000 bytes": 8000,
    "8e3 B": 8000, "1 byte": 1, ".5 kb": 500, "1.5 MB": 1500000, "2 MiB": 2 * 2**20, "2mib": 2 * 2**20,
    "3Gi": 3 * 2**30, "1 TB": 10**12, " 7 ": 7,
}  # fmt: skip


@pytest.mark.parametrize("text, expected", SIZES.items())
def test_sizes(text, expected):
    assert bytes_of(text, "budget") == expected


def test_numbers_of_numpy_are_numbers():
    assert bytes_of(np.int64(5), "budget") == 5


@pytest.mark.parametrize(
    "text", ["", "kB", "-1 kB", "8 kBB", "1,5 MB", "1,00", "1.2.3", "8 bits", "nan", "inf"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match='budget is .*such as "8 kB"'):
        bytes_of(text, "budget")


@pytest.mark.parametrize("value", [True, [8], (8, "kB"), b"8 kB"])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match='budget is .*such as "8 kB"'):
        bytes_of(value, "budget")
