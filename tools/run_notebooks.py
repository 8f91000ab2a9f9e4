# SPDX-License-Identifier: Apache-2.0
"""Runs the notebooks and stores their outputs, without the timestamps that would make every run a change."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

for path in sorted(Path(__file__).resolve().parents[1].glob("notebooks/*.ipynb")):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, record_timing=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)
