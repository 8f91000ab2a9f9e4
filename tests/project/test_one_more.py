# SPDX-License-Identifier: Apache-2.0
"""One more of a kind is one more file: a weight format, an instruction set. Nothing elsewhere lists them."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python/octavo"
CSRC = ROOT / "csrc"

# Where the package may say what only the format Int8 knows, and why.
ONLY_INT8 = {"weight_scale", "column_sum", "packed", "int8", "Int8"}
KNOWS_INT8 = {
    "dtypes/formats.py": "lists dtypes",
    "files/safetensors.py": "lists dtypes",
    "runtime/huge_pages.py": "int8 are bytes, of any format",
    "nn/outlier.py": "outlier columns, of any format, are multiplied by the kernels of bytes",
    "nn/linear.py": "from_codes calls the scales of any format weight_scale",
    "nn/caches/codes.py": "int8 are codes of keys and values, which are no weights",
    "nn/static.py": "files have the zero point of an input as int8",
    "nn/prepared.py": "the learned scale of any format is called weight_scale",
    "nn/scales.py": "the same",
    "nn/fused/shared_input.py": "int8 are bytes, of any format",
    "activations/dynamic.py": "its product with Int8, by the operator of groups",
    "files/compressed_tensors.py": "int8 are 8-bit activations",
    "schemes/base.py": "Int8 is the default",
    "schemes/int8_dynamic.py": "Int8 is the default, and with groups IntGroup",
}


def words_of_int8(path: Path) -> set[str]:
    """Names, attributes and texts of code; not of comments and docstrings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} - {"int8"}  # a precision of attention, a format of octavo.dtypes
        elif isinstance(node, ast.Name | ast.arg | ast.alias | ast.keyword):
            name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "name", None)
            found |= {name} - {"packed"}  # a name of local variables
    return found & ONLY_INT8


def test_no_file_outside_of_formats_knows_what_int8_weights_are():
    rooms = ("formats", "ops", "reference", "numpy", "tensors", "lab")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).with_suffix("").parts[0] not in rooms and words_of_int8(path)
    }
    assert found == set(KNOWS_INT8)


def test_an_instruction_set_is_one_file_that_cmake_finds(tmp_path):
    """Copies the part of CMakeLists.txt that lists instruction sets, and one file beside the others."""
    text = (ROOT / "CMakeLists.txt").read_text()
    functions = re.findall(r"^function\(octavo_\w+ .*?^endfunction\(\)$", text, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "csrc/isa/integer"
    folder.mkdir(parents=True)
    for path in CSRC.glob("isa/integer/*.cpp"):
        (folder / path.name).write_text(path.read_text())
    (folder / "toy.cpp").write_text(
        "// SPDX-License-Identifier: Apache-2.0\n// compile-flags: -mavx2 -mtoy\n"
    )
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.18)\nproject(toy NONE)\nset(CMAKE_SYSTEM_PROCESSOR x86_64)\n"
        + "\n".join(functions)
        + "\noctavo_isas(integer)\n"
        "get_source_file_property(flags csrc/isa/integer/toy.cpp COMPILE_OPTIONS)\n"
        'message("LIST${integer_list}")\nmessage("FLAGS ${flags}")\n'
    )
    found = subprocess.run(
        ["cmake", "-S", tmp_path, "-B", tmp_path / "build"], capture_output=True, text=True, check=True
    ).stderr
    names = sorted(path.stem for path in CSRC.glob("isa/integer/*.cpp"))
    assert re.findall(r"X\((\w+)\)", found.split("FLAGS")[0]) == sorted([*names, "toy"])
    assert "FLAGS -mavx2;-mtoy" in found
    # And the registry declares and reads whatever is in that list.
    registry = (CSRC / "registry/registry.cpp").read_text()
    assert "extern const Kernel kernel_##name;\nOCTAVO_ISAS\n" in registry
    assert not any(re.search(rf"\bkernel_{name}\b", registry) for name in names if name != "scalar")
