# SPDX-License-Identifier: Apache-2.0
"""The public names: each is where octavo/__init__.py says, nothing else is shown, a wrong one names the near one."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import octavo

SOURCE = Path(octavo.__file__).read_text(encoding="utf-8")


def imports_for_type_checkers() -> dict[str, str]:
    """{public name: module} as the block for type checkers has them; a room is the module of its own name."""
    block = next(node for node in ast.parse(SOURCE).body if isinstance(node, ast.If))
    return {
        alias.name: node.module or alias.name
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_find_what_runs():
    typed = imports_for_type_checkers()
    assert set(typed) == set(octavo.__all__) - {"__version__", "ops", "int8_mm"}
    for name, module in typed.items():
        assert octavo._HOME_OF.get(name, name) == module, name
        imported = importlib.import_module(f"octavo.{module}")
        assert getattr(octavo, name) is (imported if module == name else getattr(imported, name)), name


def test_dir_shows_the_public_names_only():
    assert dir(octavo) == sorted(octavo.__all__)


def test_importing_octavo_loads_the_operators_and_little_else():
    program = "import octavo, sys; print(*sorted({n.split('.')[1] for n in sys.modules if n.startswith('octavo.')}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["_C", "base", "ops", "reference"]


@pytest.mark.parametrize(
    "wrong, right",
    [("prepare", "prepare_"), ("freeze", "freeze_"), ("int8dynamic", "Int8Dynamic"), ("fuse", "fuse_")],
)
def test_a_name_that_is_nearly_right_is_told_the_right_one(wrong, right):
    with pytest.raises(AttributeError, match=rf"octavo has no '{wrong}'; did you mean octavo\.{right}\b"):
        getattr(octavo, wrong)


def test_a_name_like_no_other_gets_no_hint():
    with pytest.raises(AttributeError, match="octavo has no 'xyzzy'$"):
        octavo.xyzzy  # noqa: B018


def test_what_is_for_models_is_named_to_those_who_give_a_model_to_what_is_for_tensors():
    with pytest.raises(TypeError, match=r"octavo\.quantize_\(model, scheme\)"):
        octavo.quantize(nn.Linear(4, 4))


@pytest.mark.parametrize("function", [octavo.quantize_, octavo.quantized, octavo.prepare_])
@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(), octavo.Int8Dynamic])
def test_a_scheme_in_the_place_of_the_model_is_told_that_the_model_comes_first(function, scheme):
    with pytest.raises(TypeError, match="got a scheme; the model comes first$"):
        function(scheme, nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("value", [nn.Linear(4, 4), torch.zeros(3)])
def test_a_model_or_a_tensor_in_the_place_of_the_scheme_is_named_and_not_printed(value):
    with pytest.raises(TypeError, match=rf"^scheme is a {type(value).__name__}, accepted are"):
        octavo.quantize_(nn.Sequential(nn.Linear(4, 4)), value)


@pytest.mark.parametrize("function", [octavo.quantize_, octavo.quantized, octavo.prepare_])
def test_a_missing_scheme_is_answered_with_the_schemes_there_are(function):
    with pytest.raises(
        TypeError, match=r"scheme is missing\. Give octavo\.Int8Dynamic\(\).*Int8Static.*LLMInt8"
    ):
        function(nn.Sequential(nn.Linear(4, 4)))
