# SPDX-License-Identifier: Apache-2.0
"""The progress bar that every function with an argument `progress` shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def with_bar(items: Iterable[Item], title: str, unit: str, progress: bool) -> Iterable[Item]:
    """Gives `items`; if `progress` is True, a tqdm bar counts them."""
    if not progress:
        return items
    from tqdm.auto import tqdm  # not at the top: in a notebook without ipywidgets its import alone warns

    return tqdm(items, desc=title, unit=unit)
