# SPDX-License-Identifier: Apache-2.0
"""The installed script `octavo`. It is no part of the package `octavo`, whose import brings torch: a mistyped command,
or --help, does not wait for that.

The commands are the files of octavo/cli. They are reached by their folder and under another name, because
`import octavo.cli` would import `octavo` first. So these files import nothing of it before a command runs.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

NAME = "octavo_command_line"


def main() -> int:
    """Runs the command of sys.argv and returns the exit code, as `octavo.cli.main`."""
    package = importlib.util.find_spec("octavo")  # found, not imported
    assert package is not None and package.origin is not None
    folder = Path(package.origin).parent / "cli"
    spec = importlib.util.spec_from_file_location(
        NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main()
