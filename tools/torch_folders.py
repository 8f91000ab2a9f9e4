# SPDX-License-Identifier: Apache-2.0
"""Where torch may be installed, without importing it: printed for CMake, imported by build_backend.py.

In pip's isolated build torch cannot be imported, but sysconfig still names the environment that asked for the build.
"""

import importlib.util
import os
import sysconfig


def torch_folders() -> list[str]:
    """The folders to look into, best first. TORCH_ROOT, if set, is the only one."""
    if root := os.environ.get("TORCH_ROOT"):
        return [root]
    spec = importlib.util.find_spec("torch")
    importable = list(spec.submodule_search_locations or []) if spec else []
    return importable + [os.path.join(sysconfig.get_path(kind), "torch") for kind in ("purelib", "platlib")]


if __name__ == "__main__":
    print(";".join(torch_folders()), end="")
