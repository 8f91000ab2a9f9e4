# SPDX-License-Identifier: Apache-2.0
"""Every notebook runs from top to bottom, is stored with its outputs, and shows no path of the machine it ran on."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("transformers")

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def texts(cell) -> str:
    """What a cell printed and showed, without pictures."""
    shown = [output.get("text", "") for output in cell.get("outputs", [])]
    shown += [str(output.get("data", {}).get("text/plain", "")) for output in cell.get("outputs", [])]
    return "\n".join(shown)


def test_there_is_a_notebook():
    assert "01_quantize_a_model.ipynb" in [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_without_error_or_warning(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}  # it may not depend on the folder it is started in
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error" and output.get("name") != "stderr", output
    assert "same bits: True" in "".join(map(texts, notebook.cells))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_executed_and_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = "".join(map(texts, notebook.cells))
    assert "same bits: True" in stored
    assert "/home/" not in stored and "/tmp/" not in stored and "site-packages" not in stored
