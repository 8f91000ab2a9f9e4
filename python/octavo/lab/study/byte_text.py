# SPDX-License-Identifier: Apache-2.0
"""Text that every Python carries: its standard library's sources, as bytes, split into training and held-out files.

Only a file's name decides on which side it falls: a file that is held out in one version of Python is held out in all,
and the byte language model has never seen it. Contents change with the version, and so do figures on held-out text.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch

# Packages of program text, beside the modules of one file. Tests, tables (encodings), prose (pydoc_data) are left out.
PACKAGES = (
    "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging",
    "multiprocessing", "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
HELD_OUT_SHARE = 20  # one file in so many
WINDOWS = 320  # of 128 predicted bytes: 40,960


def training_bytes() -> torch.Tensor:
    """All files that are not held out, one after another, in the order of their names: uint8 [bytes].

    Raises: FileNotFoundError if this Python was installed without its sources.
    """
    return _joined(held_out=False)


def held_out(windows: int = WINDOWS, context: int = 128) -> torch.Tensor:
    """Windows of text the byte language model was not trained on: int64 [windows, context + 1], values 0 to 255.

    The first `context` bytes of a row are input, the last `context` are what is to be predicted; the windows lie
    evenly spread over all held-out files. The same for the same files, which the version of Python decides.

    Raises: FileNotFoundError as `training_bytes`; ValueError if the windows would overlap.
    """
    return _spread("held_out", _joined(held_out=True), windows, context + 1)


def calibration(windows: int = 64, context: int = 128) -> torch.Tensor:
    """Windows of the training text, to calibrate with: int64 [windows, context], evenly spread, never held out.

    Raises: as `held_out`.
    """
    return _spread("calibration", training_bytes(), windows, context)


def source_files() -> dict[str, Path]:
    """Every file of the text, {name relative to the library: path}, in the order of the names."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        *library.glob("*.py"),
        *(path for package in PACKAGES for path in (library / package).rglob("*.py")),
    ]
    named = {path.relative_to(library).as_posix(): path for path in files}
    return {name: named[name] for name in sorted(named) if not _is_left_out(name)}


def is_held_out(name: str) -> bool:
    """Whether the file of this name belongs to the held-out text."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def _is_left_out(name: str) -> bool:
    # Tests repeat themselves; _sysconfigdata was written when this Python was built and knows that machine.
    return name.startswith("_sysconfigdata") or bool({"test", "tests"} & set(name.split("/")))


def _spread(who: str, text: torch.Tensor, windows: int, length: int) -> torch.Tensor:
    if windows < 1 or windows * length > len(text):
        raise ValueError(
            f"{who}: windows is {windows}; from 1 to {len(text) // length} windows of {length} bytes fit"
        )
    starts = torch.arange(windows) * ((len(text) - length) // max(windows - 1, 1))
    return text[starts[:, None] + torch.arange(length)].long()


def _joined(*, held_out: bool) -> torch.Tensor:
    text = b"".join(
        path.read_bytes() for name, path in source_files().items() if is_held_out(name) == held_out
    )
    if not text:
        raise FileNotFoundError(
            f"this Python has no library sources in {sysconfig.get_path('stdlib')}; use one installed with them"
        )
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
