# SPDX-License-Identifier: Apache-2.0
"""What the compiler made: what the module needs and exports, which instructions stand where, and the build's one check.

Reads the object files that installing from this folder leaves in build/.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

from octavo import _C

ROOT = Path(__file__).parents[2]
BUILDS = sorted(ROOT.glob(f"build/cp{sys.version_info.major}{sys.version_info.minor}-*"))
x86_64 = pytest.mark.skipif("avx2" not in _C.built_isas(), reason="only the scalar kernels are built here")


def run(*command, **options) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


@pytest.fixture(scope="module")
def core() -> Path:
    """The folder with the core's object files, laid out as csrc/."""
    if not BUILDS:
        pytest.skip("no build/ folder: install with `pip install -e .` from this folder")
    return BUILDS[-1] / "CMakeFiles/octavo_core.dir/csrc"


SOURCES = [
    path
    for path in sorted(ROOT.glob("csrc/isa/*/*.cpp"))
    if path.stem in _C.built_isas() or "avx2" in _C.built_isas()
]


@pytest.fixture(params=SOURCES, ids=lambda path: path.relative_to(ROOT / "csrc").as_posix())
def isa_object(request, core) -> Path:
    return core / f"{request.param.relative_to(ROOT / 'csrc')}.o"


def driver_objects(core: Path) -> list[Path]:
    """The objects outside isa/, which may run on any CPU."""
    bindings = core.parent.parent.glob("*/csrc/bindings/*/*.o")
    return sorted([*core.glob("registry/*.o"), *core.glob("drivers/*.o"), *bindings])


def disassembly(path: Path) -> str:
    return run("objdump", "-d", "--no-show-raw-insn", str(path))


# --- the module -----------------------------------------------------------------------------------------------------


def test_the_module_needs_torch_cpu_and_the_c_libraries_only():
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", run("readelf", "-d", _C.__file__))
    assert "libtorch_cpu" in needed
    loader = {name for name in needed if name.startswith("ld-linux")}  # for thread-local variables
    assert set(needed) - loader <= {"libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc"}


def test_the_module_uses_the_stable_abi_of_torch_only():
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", _C.__file__).splitlines()]
    of_torch = [name for name in undefined if re.search(r"torch|c10|^_ZNK?2at", name)]
    assert "torch_parallel_for" in of_torch
    assert [name for name in of_torch if not name.startswith(("aoti_torch_", "torch_"))] == []


def test_the_module_exports_its_init_function_only():
    assert [line.split()[-1] for line in run("nm", "-D", "--defined-only", _C.__file__).splitlines()] == [
        "PyInit__C"
    ]


# --- the objects ----------------------------------------------------------------------------------------------------


def test_an_isa_object_exports_its_table_and_nothing_weak(isa_object):
    """A weak symbol, such as an inline function of a header, could be taken from here by code that runs on any CPU."""
    symbols = [line.split()[-2:] for line in run("nm", "-C", "--defined-only", str(isa_object)).splitlines()]
    shared = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
    prefix = {"float": "float_", "groups": "group_", "integer": ""}[isa_object.parent.name]
    assert shared == [f"octavo::{prefix}kernel_{isa_object.name.removesuffix('.cpp.o')}"]


def test_an_isa_object_runs_nothing_when_it_is_loaded(isa_object):
    """Its table is a constant. Code that fills it would run before the registry has asked what the CPU can run."""
    sections = re.findall(r"^ +\d+ (\S+)", run("objdump", "-h", str(isa_object)), re.MULTILINE)
    assert any(name.startswith(".text") for name in sections)
    assert [name for name in sections if re.match(r"\.(init|preinit|ctors)", name)] == []


@x86_64
def test_objects_that_run_on_any_cpu_hold_no_wide_instruction(core):
    objects = driver_objects(core)
    assert {"registry", "drivers", "torch", "numpy"} <= {path.parent.name for path in objects}
    for path in [*objects, *core.glob("isa/*/scalar.cpp.o")]:
        assert not re.search(r"%[yz]mm", disassembly(path)), path.name


@x86_64
def test_no_kernel_saturates(core):
    """But for AVX2, which adds what its sums have lost, or has codes whose sums fit (csrc/isa/groups/avx2.cpp)."""
    for path in core.glob("isa/*/*.o"):
        found = re.findall(r"\b(v?pmaddubsw|vpdpbusds|vpdpwssds|v?phaddsw)\b", disassembly(path))
        assert set(found) <= ({"vpmaddubsw"} if path.name == "avx2.cpp.o" else set()), path.name


@x86_64
def test_the_wide_tile_keeps_24_accumulators_in_registers(core):
    """g++ 12 copies accumulators of intrinsics through the stack, which halves the speed."""
    functions = re.split(r"\n(?=[0-9a-f]{16} <)", disassembly(core / "isa/integer/avx512_vnni.cpp.o"))
    accumulate = re.compile(r"vpdpbusd\s.*,%zmm(\d+)$", re.MULTILINE)
    widest = max(functions, key=lambda text: len(set(accumulate.findall(text))))
    assert len(set(accumulate.findall(widest))) >= 24
    for block in re.split(r"\n.*\tj\w+ .*", widest):  # loops without a jump inside
        products = list(accumulate.finditer(block))
        if products:
            loop = block[products[0].start() : products[-1].end()]
            assert re.findall(r".*%zmm\d+,\S*\(.*", loop) == [], "a zmm register is stored"


# --- what is installed ----------------------------------------------------------------------------------------------


def pinned(name: str) -> dict[str, str]:
    """package -> version, in a file of constraints; of a package with several versions the last one."""
    lines = (ROOT / name).read_text().splitlines()
    found = (re.match(r"([\w.-]+)==(\S+)", line) for line in lines if not line.startswith("#"))
    return {match.group(1): match.group(2) for match in found}


def requirements(*extras: str) -> dict[str, str]:
    """package -> which versions the installed octavo allows, of what it needs always and for `extras`."""
    found = (re.match(r'([\w-]+)[^;=<>]*([^;]*)(?:; extra == "(\w+)")?', line) for line in requires("octavo"))
    return {
        match.group(1): match.group(2).strip()
        for match in found
        if match.group(1) not in ("octavo", "torch") and match.group(3) in (None, *extras)
    }


def test_the_oldest_releases_tried_are_the_oldest_allowed():
    lowest = {name: said.removeprefix(">=") for name, said in requirements("plot", "demo").items()}
    oldest = pinned("constraints-oldest.txt")
    assert oldest.keys() == lowest.keys()
    for name, version in lowest.items():
        assert re.fullmatch(re.escape(version) + r"(\.0)*", oldest[name]), name


def test_every_package_that_the_tests_install_is_pinned():
    assert requirements("plot", "demo", "docs", "test").keys() <= pinned("constraints.txt").keys()


# --- the build backend ----------------------------------------------------------------------------------------------

HOOKS = [
    "get_requires_for_build_wheel()",
    "get_requires_for_build_editable()",
    "prepare_metadata_for_build_wheel('.')",
]


def call_backend(hook: str, torch_root: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("scikit_build_core")
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); import build_backend; print(build_backend.{hook})"
    environment = {**os.environ, "TORCH_ROOT": str(torch_root)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_without_torch_the_build_says_what_to_install(tmp_path, hook):
    done = call_backend(hook, tmp_path)
    assert done.returncode != 0
    assert "this environment has none: run `pip install torch==" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, "one sentence, no traceback"


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cpu"])
def test_with_an_old_torch_the_build_says_so(tmp_path, version):
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    done = call_backend(HOOKS[0], tmp_path)
    assert done.returncode != 0 and f"has torch {version}" in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0a0+gitabc"])
def test_with_a_new_torch_the_build_goes_on(tmp_path, version):
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    assert call_backend(HOOKS[0], tmp_path).returncode == 0


def test_an_older_python_gets_a_sentence():
    """No older Python is at hand where the tests run, so this one says that it is older."""
    code = (
        "import sys; sys.version_info, sys.version = (3, 9, 18), '3.9.18 (main)'\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r}); import build_backend"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "octavo needs Python 3.10 or newer, and this is Python 3.9.18\n"
