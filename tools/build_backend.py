# SPDX-License-Identifier: Apache-2.0
"""scikit-build-core, plus one question before pip fetches any dependency: is there a torch to compile against?

Without it, pip would first download the newest torch with everything it needs, and only then see the build fail.
"""

from __future__ import (
    annotations,  # an older Python must reach the next import, which ends it with a sentence
)

import re
import sys
from pathlib import Path

import python_version  # noqa: F401
from scikit_build_core import build as _scikit
from scikit_build_core.build import *  # noqa: F403  every other hook is scikit-build-core's own
from torch_folders import torch_folders

_MINIMUM = (2, 10)
_HELP = (
    "octavo compiles against an installed torch >= 2.10, and {found}: run `pip install torch==2.13.0` first "
    "(builds in an empty environment, as uv and `python -m build` make them, also need --no-build-isolation or "
    "--no-isolation, or TORCH_ROOT=<site-packages>/torch)."
)


def _version(folder: str) -> str | None:
    """The version of the torch in `folder`, from the text of its version.py; None if there is none."""
    path = Path(folder, "version.py")
    match = re.search(r"__version__\s*=\s*'([^']+)'", path.read_text()) if path.is_file() else None
    return match.group(1) if match else None


def _require_torch(settings: dict | None) -> None:
    """Ends the build with one sentence unless there is a torch new enough."""
    folders = torch_folders()
    for key, value in (settings or {}).items():
        if key.endswith("define.TORCH_ROOT"):
            folders = [value]
    version = next(filter(None, map(_version, folders)), None)
    if version is None:
        sys.exit(_HELP.format(found="this environment has none"))
    if tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM:
        sys.exit(_HELP.format(found=f"this environment has torch {version}"))


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    _require_torch(config_settings)
    return _scikit.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    _require_torch(config_settings)
    return _scikit.get_requires_for_build_editable(config_settings)


# With --no-build-isolation pip does not ask for requirements: these are the first hooks it calls then.


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    _require_torch(config_settings)
    return _scikit.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: dict | None = None) -> str:
    _require_torch(config_settings)
    return _scikit.prepare_metadata_for_build_editable(metadata_directory, config_settings)
