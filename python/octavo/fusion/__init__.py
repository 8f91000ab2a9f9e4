# SPDX-License-Identifier: Apache-2.0
"""Whole models made faster by fewer and larger operators: fuse_ and unfuse_.

A step (step.py) is an object with `name` and `find(model, example) -> list[Candidate]`. It looks and changes nothing; a
candidate carries `apply(changes)`, and the original modules and the replacement as a function, with which verify.py
compares the two on the example's tensors. fuse.py runs the steps in order: find, verify each, apply, run the model, and
take the step back if the model's output moved. One file holds one step.
"""

from .fuse import fuse_, unfuse_
from .report import FusionReport, FusionRow

__all__ = ["FusionReport", "FusionRow", "fuse_", "unfuse_"]
