# SPDX-License-Identifier: Apache-2.0
"""Ends with one sentence where Python is older than 3.10: `make` runs this file, tools/build_backend.py imports it.

It is written for old versions of Python to read, so that they reach the sentence.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("octavo needs Python 3.10 or newer, and this is Python " + sys.version.split()[0])
