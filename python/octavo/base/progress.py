# SPDX-License-Identifier: Apache-2.0
"""The progress bar of whatever takes `progress=True`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def with_bar(items: Iterable[Item], title: str, unit: str, progress: bool) -> Iterable[Item]:
    """`items`, with a tqdm bar that counts them if `progress`."""
    if not progress:
        return items
    from tqdm.auto import tqdm  # not at the top: in a notebook without ipywidgets its import alone warns

    return tqdm(items, desc=title, unit=unit)
