# SPDX-License-Identifier: Apache-2.0
"""octavo.json, which says what the tensors of a saved model are: written with a checksum, read with suspicion.

    format, format_version, octavo_version
    layers, prepared     {name of a layer: fields of its scheme}, and what else a prepared layer is made of
    aliases              {name of a tensor: name of the tensor that it shares memory with}
    weight_dtypes        {name of a layer: what its weight reads as}, of layers where that is not float32
    files                {name: fingerprint} of the files that were written together with this one
    crc32                of all the rest; files of before there were any have none, and are read

The checksum finds damage and edits by mistake. Against somebody who means to change a file there is no checksum.
"""

from __future__ import annotations

import json
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .disk import current, read_json

NAME = "octavo.json"
FORMAT_VERSION = 1
CHECKSUM = "crc32"
KINDS: dict[str, type] = {
    "layers": dict,
    "prepared": dict,
    "aliases": str,
    "files": str,
    "weight_dtypes": str,
}


def write(folder: Path, content: dict[str, Any]) -> None:
    """Writes `content`, the format and the checksum to octavo.json in `folder`."""
    content = {
        "format": "octavo",
        "format_version": FORMAT_VERSION,
        "octavo_version": version("octavo"),
        **content,
    }
    content[CHECKSUM] = _checksum(content)
    (folder / NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """What `write` was given, with every entry that a reader asks for, of the right type.

    Raises: FileNotFoundError if there is no octavo.json; PermissionError if it cannot be read; ValueError if it is
    damaged, foreign, or of a newer format.
    """
    path = current(folder, NAME)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder written by octavo.save")
    content = read_json(path)
    if content.get("format") != "octavo":
        raise ValueError(f"{path} is not a file written by octavo.save")
    found = content.get("format_version")
    if type(found) is not int or not 1 <= found <= FORMAT_VERSION:  # True is an int, too
        raise ValueError(
            f"{path} has format version {found}, written by octavo {content.get('octavo_version')}; "
            f"this octavo reads up to {FORMAT_VERSION}: upgrade it"
        )
    if CHECKSUM in content and content[CHECKSUM] != _checksum(content):
        raise ValueError(
            f"{path} is damaged or was edited: its checksum is not the one it was written with; save the model again"
        )
    content.setdefault("prepared", {})  # files of before there were any
    content.setdefault("files", {})
    for key, kind in KINDS.items():
        if key == "weight_dtypes" and key not in content:
            continue  # an older file does not know
        entries = content.get(key)
        if not isinstance(entries, dict):
            raise ValueError(f"{path} has no {key!r}; the file is damaged, save the model again")
        for name, value in entries.items():
            if not isinstance(value, kind):
                raise ValueError(
                    f"{path}: {name!r} in {key!r} is {type(value).__name__}; the file is damaged"
                )
    return content


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
