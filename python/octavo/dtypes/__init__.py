# SPDX-License-Identifier: Apache-2.0
"""Looking into number formats: what they can hold, how a value is stored in them, and casts between them.

`table()` compares them, `bits(1/3, "bf16")` shows one value bit by bit, `cast`, `encode` and `decode` work on tensors.
They are for study: plain torch on any format, not fast.
"""

from .bit_pattern import BitPattern, bits
from .casts import cast, decode, encode
from .format_table import FormatTable, table
from .formats import FORMATS, NumberFormat, find_format

__all__ = [
    "FORMATS",
    "BitPattern",
    "FormatTable",
    "NumberFormat",
    "bits",
    "cast",
    "decode",
    "encode",
    "find_format",
    "table",
]
