# SPDX-License-Identifier: Apache-2.0
"""A name means one thing in the whole package: what a reader learned in one file is true in the next one."""

import ast
import importlib
import pkgutil
from functools import lru_cache
from pathlib import Path

import octavo

PACKAGE = Path(octavo.__file__).parent

# Functions that share a name because they are one idea, and how a reader tells them apart.
OPERATORS = set(octavo.ops.__all__) | {"quantize", "dequantize", "choose_qparams"}
OPERATOR_HOMES = (
    "ops",
    "reference",
    "numpy",
    "tensors",
)  # with types, in plain torch, for NumPy, for QParams
SAME_IDEA = {
    "add_arguments": "each command has it",
    "run": "called as module.run: a command, the demo, a study",
    "main": "the start of a program",
    "load": "called as module.load: a checkpoint, the byte language model",
    "write": "called as module.write: safetensors, the manifest",
    **dict.fromkeys(
        ("NF4", "FP4", "MXFP4", "NVFP4", "GGML"), "the weight format, and the scheme that users write"
    ),
    "from_dict": "a config of any kind, an observer, a scheme",
    "rows_of": "called as shapes.rows_of: how many rows an input has; in formats, the rows that lie in strips",
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@lru_cache
def sources() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def defined(tree: ast.Module) -> set[str]:
    """Classes, and functions that other files may call."""
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return classes | {name for name in functions if not name.startswith("_")}


def values(tree: ast.Module) -> set[str]:
    """Constants and type aliases."""
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [
        target
        for node in assigned
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    return {target.id for target in targets if isinstance(target, ast.Name)} - {"__all__"}


def imported(path: str, tree: ast.Module) -> set[tuple[str, str]]:
    """(file, name) of everything that the module takes from another one by its name."""
    folder = Path(path).parent.parts
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            home = "/".join((*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")))
            found |= {(f"{home}.py", alias.name) for alias in node.names}
    return found


def homes(names: dict[str, set[str]]) -> dict[str, list[str]]:
    """{name: the files that have it}, of the names that more than one file has."""
    found: dict[str, list[str]] = {}
    for path, own in names.items():
        for name in own:
            found.setdefault(name, []).append(path)
    return {name: paths for name, paths in sorted(found.items()) if len(paths) > 1}


def are_one_operator(name: str, paths: list[str]) -> bool:
    rooms = {path.split("/")[0].removesuffix(".py") for path in paths}
    return name in OPERATORS and rooms <= set(OPERATOR_HOMES)


def test_a_class_or_a_function_has_a_name_of_its_own():
    twice = homes({path: defined(tree) for path, tree in sources().items()})
    assert "run" in twice and "quantize" in twice, "definitions are read wrongly"
    known = {name for name, paths in twice.items() if name in SAME_IDEA or are_one_operator(name, paths)}
    assert {name: twice[name] for name in twice.keys() - known} == {}


def test_a_constant_that_other_files_import_has_a_name_of_its_own():
    """One that only its own file reads is explained where it is read."""
    trees = sources()
    shared = set().union(*(imported(path, tree) for path, tree in trees.items()))
    names = {path: {name for name in values(tree) if (path, name) in shared} for path, tree in trees.items()}
    assert sum(map(len, names.values())) > 20, "imports are read wrongly"
    assert homes(names) == {}


def test_a_class_is_never_named_like_a_type_alias():
    trees = sources()
    classes = set().union(*(defined(tree) for tree in trees.values()))
    clashes = [(path, name) for path, tree in trees.items() for name in values(tree) & classes]
    assert clashes == []


def test_no_module_is_hidden_by_what_its_package_exports():
    """`package.name` would be the module or the function, whichever was imported last."""
    packages = [octavo, *(importlib.import_module(f"octavo.{each}") for each in packages_inside())]
    for package in packages:
        exported = set(getattr(package, "__all__", []))
        for module in pkgutil.iter_modules(package.__path__):
            if module.name in exported:
                value = getattr(package, module.name)
                assert value is importlib.import_module(f"{package.__name__}.{module.name}"), value


def packages_inside() -> list[str]:
    folders = [path.parent.relative_to(PACKAGE).parts for path in PACKAGE.rglob("__init__.py")]
    return sorted(".".join(parts) for parts in folders if parts)
