# SPDX-License-Identifier: Apache-2.0
"""`octavo dtypes` and `octavo inspect` print what the library says, as text, as a terminal's table and as JSON."""

import json
import math
import re

import pytest
import torch
from torch import nn

import octavo
from octavo import cli
from octavo.dtypes import FORMATS, bits, table


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def terminal(monkeypatch):
    """stdout that says it is a terminal of the given width."""

    def become(columns: int) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))

    return become


@pytest.fixture
def checkpoint(tmp_path):
    octavo.save(octavo.quantized(nn.Sequential(nn.Linear(64, 16)), octavo.Int8Dynamic()), tmp_path)
    return tmp_path


def strict(text: str):
    """JSON without NaN and Infinity, which json.loads would take."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_dtypes_prints_the_table(capsys):
    assert run("dtypes") == 0
    assert capsys.readouterr().out == f"{table()}\n"
    assert run("dtypes", "--json") == 0
    assert strict(capsys.readouterr().out) == table().to_dict()


@pytest.mark.parametrize("columns, shown", [(200, "least normal"), (80, "7B, GB")])
def test_dtypes_fits_the_terminal(capsys, terminal, columns, shown):
    terminal(columns)
    assert run("dtypes") == 0
    printed = capsys.readouterr().out
    assert shown in printed and all(name in printed for name in FORMATS)
    assert max(map(len, re.sub("\x1b\\[[0-9;]*m", "", printed).splitlines())) <= columns


@pytest.mark.parametrize(
    "text, value", [("1/3", 1 / 3), ("0.1", 0.1), ("7", 7), ("1e300", 1e300), ("inf", math.inf)]
)
def test_dtypes_of_a_value_is_its_bits_in_every_format(capsys, terminal, text, value):
    assert run("dtypes", text) == 0
    printed = capsys.readouterr().out
    for format in FORMATS.values():
        assert str(bits(float(value), format, saturate=not format.has_nan)).split("\n")[0] in printed
    assert run("dtypes", "--json", text) == 0
    found = strict(capsys.readouterr().out)
    assert found["value"] == (value if math.isfinite(value) else "inf")
    assert [entry["format"] for entry in found["formats"]] == list(FORMATS)
    terminal(120)
    assert run("dtypes", text) == 0
    assert bits(float(value), "bf16").fraction in capsys.readouterr().out


def test_dtypes_of_nan_leaves_out_formats_without_it(capsys, terminal):
    assert run("dtypes", "nan", "--json") == 0
    found = [entry["format"] for entry in strict(capsys.readouterr().out)["formats"]]
    assert found == [format.name for format in FORMATS.values() if format.has_nan]
    terminal(120)
    assert run("dtypes", "nan") == 0
    assert "no NaN" in capsys.readouterr().out


def test_dtypes_of_a_negative_value(capsys):
    assert run("dtypes", "-2.5") == 0
    assert "given -2.5, exact" in capsys.readouterr().out


def test_dtypes_of_no_number_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("dtypes", "1/0")
    assert stopped.value.code == 2 and "'1/0' is not a number" in capsys.readouterr().err


def test_inspect_prints_the_contents(checkpoint, capsys, terminal):
    contents = octavo.inspect_checkpoint(checkpoint)
    assert run("inspect", checkpoint) == 0
    assert capsys.readouterr().out == f"{contents}\n"
    assert run("inspect", checkpoint, "--json") == 0
    assert strict(capsys.readouterr().out) == json.loads(json.dumps(contents.to_dict()))
    terminal(120)
    assert run("inspect", checkpoint) == 0
    printed = capsys.readouterr().out
    assert "Int8Dynamic" in printed and contents.summary in printed


def test_inspect_refuses_in_one_line(tmp_path, capsys):
    torch.save({}, tmp_path / "model.pt")
    for path in (tmp_path / "model.pt", tmp_path, tmp_path / "none"):
        assert run("inspect", path) == 1
        captured = capsys.readouterr()
        assert (
            captured.out == ""
            and captured.err.startswith("octavo inspect: ")
            and captured.err.count("\n") == 1
        )
