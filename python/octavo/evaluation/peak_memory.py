# SPDX-License-Identifier: Apache-2.0
"""Peak memory of loading a model and running one batch, in a process of its own: `python -m` this file is that process.

ru_maxrss would not do: after fork and exec it still holds the parent's peak. VmHWM belongs to the new program alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

TIMEOUT = 600.0  # seconds for loading and one call


def peak_memory(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Bytes of resident memory of a fresh process at its highest: before it loads the model, and after one call.

    The model is pickled, as `torch.save` does it, and must be importable there: a class defined in a notebook or in
    the script itself is not.
    Raises: RuntimeError that says why it could not be measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "call.pt"
        try:
            torch.save((model, args, kwargs), path)
        except Exception as error:  # whatever the model's own pickling raises
            raise RuntimeError(f"the model cannot be pickled: {error}") from error
        return _run(path)


def _run(path: Path) -> tuple[int, int]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", __name__, str(path), str(torch.get_num_threads())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"a fresh process could not be run: {error}") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the model did not run in a fresh process: {reason}")
    before, peak = json.loads(done.stdout.splitlines()[-1])
    return before, peak


def highest() -> int:
    """The highest resident memory of this process so far, in bytes. Raises: OSError if this is not Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def main(path: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    before = highest()
    model, args, kwargs = torch.load(path, weights_only=False)  # our own file of a moment ago
    with torch.no_grad():
        model(*args, **kwargs)
    print(json.dumps([before, highest()]))


if __name__ == "__main__":
    main(*sys.argv[1:])
