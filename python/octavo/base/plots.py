# SPDX-License-Identifier: Apache-2.0
"""matplotlib, which is imported only here and only when something is drawn."""

from __future__ import annotations

from typing import Any


def require_pyplot(who: str) -> Any:
    """matplotlib.pyplot. Raises: ImportError, which names `who` and the remedy, if matplotlib is missing."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"{who} needs matplotlib: pip install matplotlib") from error
    return pyplot


def new_axes(who: str, width: float, height: float) -> Any:
    """The Axes of a new figure of `width` x `height` inches. Raises: as `require_pyplot`."""
    return require_pyplot(who).subplots(figsize=(width, height), layout="constrained")[1]
