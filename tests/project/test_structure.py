# SPDX-License-Identifier: Apache-2.0
"""The rules that keep the project readable: who may import whom, sizes, complete operators, paths that exist."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from octavo import ops, reference

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python/octavo"
CSRC = ROOT / "csrc"

# The rooms of python/octavo, a floor for each line. Imports point down: a room imports those on the lines above.
ROOMS = [
    ["_C"],
    ["base", "dtypes", "metrics", "reference"],
    ["ops", "runtime"],
    ["tensors"],
    ["observers", "formats"],
    ["nn", "numpy"],
    ["activations"],
    ["methods"],
    ["schemes"],
    ["files"],
    ["conversion", "huggingface"],
    ["adaptation"],
    ["evaluation"],
    ["fusion", "lab", "integrations"],
    ["cli"],
]
MOST_ROOMS, MOST_FILES = 26, 16
# The folders of csrc/. Includes point down, too: a file may include the files of its own folder and of the lines above.
FLOORS = [
    ["base", "contract"],
    ["isa/common", "registry"],
    ["isa/float/vector"],
    ["isa/float/tile"],
    ["isa/float/attention"],
    ["isa/integer", "isa/float", "drivers"],
    ["isa/groups", "drivers/groups", "drivers/half"],
    ["drivers/ggml"],
    ["bindings"],
    ["bindings/numpy", "bindings/torch", "tests"],
]
# Longer than the limit, and why.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS = {
    "python/octavo/ops/linear.py:linear_static": "the arguments are those of the operator's schema",
    "python/octavo/reference/codes.py:linear_static": "the same",
    "python/octavo/conversion/convert.py:quantize_": "choices of a user, given by name",
    "python/octavo/conversion/convert.py:quantized": "the same",
    "python/octavo/conversion/prepare.py:prepare_": "the same",
}
FILE_LIMIT, FUNCTION_LIMIT, PARAMETER_LIMIT = 400, 60, 7


def python_files() -> list[Path]:
    return sorted(
        path
        for folder in ("python", "tests", "tools", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
    )


def cpp_files() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# --- who may import whom --------------------------------------------------------------------------------------------


def floor_of_room(room: str) -> int:
    found = [level for level, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"{room} has no place in ROOMS: give it one"
    return found[0]


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """The modules of octavo that `path` imports, as paths such as ("schemes", "base")."""
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + tuple(
                (node.module or "").split(".") if node.module else ()
            )
            found |= {base} if base else {(alias.name,) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "octavo":
            inner = tuple(node.module.split("."))[1:]
            found |= {inner} if inner else {(alias.name,) for alias in node.names}
    return found


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def rooms() -> set[str]:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    return folders | {path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py"} | {"_C"}


def test_every_room_has_a_floor_and_every_floor_is_real():
    assert rooms() == {room for floor in ROOMS for room in floor}
    assert len(rooms()) <= MOST_ROOMS


def test_python_imports_point_down():
    for path in modules():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports_of(path):
            assert module[0] == own or floor_of_room(module[0]) < floor_of_room(own), (
                f"{name_of(path)} may not import {'.'.join(module)}"
            )


def test_a_folder_can_be_seen_at_a_glance():
    folders = {path.parent for path in modules()} | {path.parent for path in cpp_files()}
    for folder in folders:
        files = [path for path in folder.iterdir() if path.suffix in (".py", ".h", ".cpp")]
        assert len(files) <= MOST_FILES + 1, f"{name_of(folder)} holds {len(files)} files"


@pytest.mark.parametrize("room", ["schemes", "activations", "formats"])
def test_choices_of_one_kind_never_import_each_other(room):
    for path in sorted(PACKAGE.glob(f"{room}/[!_]*.py")):
        common = {(room, "base"), (room, "groups")}  # formats/groups.py is the base of the formats in groups
        assert {module for module in imports_of(path) if module[0] == room} <= common, path.name


def test_a_module_is_never_named_like_a_public_function():
    """`octavo.compare` would be the module or the function, whichever was imported last."""
    import octavo

    for name in octavo.__all__:
        if callable(getattr(octavo, name)):
            assert name.strip("_") not in rooms(), name


def test_what_a_float_layer_is_only_the_registry_says():
    """Nobody tests for nn.Linear: a layer of another class would stay behind there."""
    for path in modules():
        for node in ast.walk(ast.parse(text_of(path))):
            is_test = isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "isinstance",
                "issubclass",
            )
            asked = node.args if is_test else [node] if isinstance(node, ast.Compare) else []
            text = " ".join(map(ast.unparse, asked))
            assert not re.search(r"\bnn\.(modules\.linear\.\w+|Linear)\b", text), (
                f"{name_of(path)} tests: {text}"
            )
    named = [name_of(path) for path in modules() if '"torch.nn.modules.linear.' in text_of(path)]
    assert named == ["python/octavo/nn/replacements.py"]


def test_tests_mirror_the_package():
    """A folder of tests is a folder of the package, but for what is said of all of it and what tests share."""
    for folder in sorted((ROOT / "tests").rglob("*")):
        inner = folder.relative_to(ROOT / "tests")
        if (
            folder.is_dir()
            and inner.parts[0] not in ("support", "project", "data")
            and "__" not in folder.name
        ):
            assert (PACKAGE / inner).is_dir(), f"tests/{inner} mirrors nothing"


def includes_of(path: Path) -> list[str]:
    return re.findall(r'^#include [<"](.*)[>"]', text_of(path), re.MULTILINE)


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CSRC).as_posix()


def floor_of(folder: str) -> int:
    found = [level for level, folders in enumerate(FLOORS) if folder in folders]
    assert found, f"csrc/{folder} has no place in FLOORS: give it one"
    return found[0]


def test_includes_point_down():
    """Files of the same folder are included by their bare names, all others by their paths from csrc/."""
    for path in cpp_files():
        own = folder_of(path)
        for name in re.findall(r'^#include "(.*)"', text_of(path), re.MULTILINE):
            if "/" not in name:
                assert (path.parent / name).exists(), (
                    f"{name} is not in csrc/{own}: say where it is, from csrc/ on"
                )
                continue
            assert (CSRC / name).exists(), f"{name} does not exist"
            assert folder_of(CSRC / name) != own, f"{name} is in the same folder: its bare name is enough"
            assert floor_of(folder_of(CSRC / name)) < floor_of(own), f"csrc/{own} may not include {name}"


def test_includes_stay_in_their_family():
    for path in cpp_files():
        includes, folder = includes_of(path), folder_of(path)
        torch_headers = [name for name in includes if name.startswith(("torch/", "ATen/", "c10/"))]
        python_headers = [name for name in includes if name.startswith(("pybind11/", "Python.h"))]
        assert not (torch_headers and python_headers), "torch's headers and pybind11's never meet"
        assert folder == "bindings/torch" or not torch_headers, "the core does not know torch"
        assert folder == "bindings/numpy" or not python_headers, "the core does not know Python"
        assert all(name.startswith(("torch/csrc/stable/", "torch/headeronly/")) for name in torch_headers)
        if folder.startswith("isa/"):
            assert {name.split("/")[0] for name in includes if "/" in name} <= {"contract", "isa"}


def test_headers_of_one_instruction_set_have_internal_linkage():
    """What two files include with different compile flags must not be one function for the linker."""
    for path in sorted(CSRC.glob("isa/**/*.h")):
        opening = "\nnamespace octavo {\nnamespace {"
        assert opening in text_of(path)
        assert "\n}  // namespace\n}  // namespace octavo\n" in text_of(path)


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_a_file_can_be_read_in_one_sitting():
    for path in python_files() + cpp_files():
        assert len(text_of(path).splitlines()) <= FILE_LIMIT or name_of(path) in LONG_FILES, name_of(path)


def test_a_file_opens_with_its_license():
    for path in python_files() + cpp_files():
        assert "SPDX-License-Identifier: Apache-2.0" in text_of(path).splitlines()[0], name_of(path)


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(text_of(path))) if isinstance(node, ast.FunctionDef)]


def test_a_python_function_fits_a_screen():
    for path in python_files():
        for function in functions_of(path):
            place = f"{name_of(path)}:{function.name}"
            arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            names = [argument.arg for argument in arguments if argument.arg not in ("self", "cls", "ctx")]
            overrides_torch = function.name == "_load_from_state_dict"
            length = function.end_lineno - function.lineno + 1
            assert place in LONG_FUNCTIONS or length <= FUNCTION_LIMIT, f"{place} has {length} lines"
            assert (
                "tests/" in place
                or place in MANY_PARAMETERS
                or overrides_torch
                or len(names) <= PARAMETER_LIMIT
            ), f"{place} has {len(names)} parameters"


def test_a_cpp_function_fits_a_screen():
    for path in cpp_files():
        start = None
        for number, line in enumerate(text_of(path).splitlines()):
            if (
                start is None
                and re.match(r"[A-Za-z].*\{$", line)
                and not re.match(r"(namespace|class|struct|enum|extern)", line)
            ):
                start = number
            elif line.startswith("}") and start is not None:
                place = f"{name_of(path)}:{start + 1}"
                assert number - start + 1 <= FUNCTION_LIMIT or place in LONG_FUNCTIONS, place
                start = None


def test_a_type_name_of_csrc_means_one_thing():
    """But for what each instruction set defines in its own way: Vector in vector_avx2.h and vector_avx512.h."""
    homes: dict[str, set[str]] = {}
    for path in cpp_files():
        family = f"{folder_of(path)}/{path.stem.split('_')[0]}"
        for name in re.findall(
            r"^\s*(?:struct|class|enum class|enum) (\w+)[^;(]*\{", text_of(path), re.MULTILINE
        ):
            homes.setdefault(name, set()).add(family)
    assert {"TileProduct", "OutputTile", "Vector"} <= homes.keys()
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


# --- operators and instruction sets ---------------------------------------------------------------------------------

BINDING = "".join(path.read_text() for path in sorted(CSRC.glob("bindings/torch/*.cpp")))
FAKES = "".join(path.read_text() for path in sorted(PACKAGE.glob("ops/*.py")))
OPERATORS = re.findall(r'm\.def\(\s*"(\w+)\(', BINDING)


def test_there_are_operators():
    assert {"quantize", "linear_dynamic"} <= set(OPERATORS)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_has_schema_cpu_fake_and_reference(name):
    operator = getattr(torch.ops.octavo, name).default
    schema = [argument.name for argument in operator._schema.arguments]
    assert f'm.impl("{name}"' in BINDING, "no CPU kernel"
    assert f'register_fake("octavo::{name}")' in FAKES, "no fake"
    for module in (ops, reference):
        names = list(inspect.signature(getattr(module, name)).parameters)
        if name.endswith("_groups"):  # Python has the tensors and numbers of a weight in groups in one tuple
            at = names.index("weight")
            names[at : at + 1] = ops.GroupWeight._fields
        assert names == schema, module.__name__


@pytest.mark.parametrize("path", sorted(CSRC.glob("isa/*/*.cpp")), ids=name_of)
def test_each_compile_flag_has_its_feature_bit(path):
    """Else the file's code could run on a CPU that lacks what the flag switched on."""
    text = text_of(path)
    flags = re.search(r"^// compile-flags:(.*)$", text, re.MULTILINE).group(1).split()
    table = text[text.index("make_table() {") :].lower()
    for flag in flags:
        if flag.startswith("-m"):
            assert re.search(rf"kfeature{flag[2:].replace('-', '')}\b", table), flag


# --- documents ------------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def spelled_out(pattern: str) -> list[str]:
    """a/{b,c}.h -> a/b.h and a/c.h"""
    match = re.search(r"\{([^}]*)\}", pattern)
    if not match:
        return [pattern]
    return [pattern[: match.start()] + part + pattern[match.end() :] for part in match.group(1).split(",")]


def test_paths_in_documents_exist():
    for path in documents():
        folders = "csrc|python|tests|tools|docs|notebooks|benchmarks|\\.ci"
        for pattern in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./*{{}},-]*", text_of(path)):
            for name in spelled_out(pattern.rstrip(".,")):
                assert list(ROOT.glob(name)), f"{path.name} names {name}"


def test_links_between_documents_lead_somewhere():
    for path in documents():
        for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text_of(path)):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
