# SPDX-License-Identifier: Apache-2.0
"""What a PyTorch user can run instead. One file of this folder is one package, found by listing the folder.

A file has REQUIRES, the packages it imports (inside its functions, so that listing rivals loads none of them), and
RIVALS, those of Int8Dynamic, or LOW_BITS, those of fewer bits and of groups, or both. CTranslate2 is left out: its
OpenMP team beside torch's slows eager torch by up to 2.5x, in the whole process.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

import torch
from torch import nn

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Rival:
    """One way to compute a linear layer.

    build          makes the callable from a layer in the input's dtype, which it must not change
    as_accurate    as Int8Dynamic: 8 bits or more, every row of x and every output channel with a scale of its own
    dtypes         of x
    batches        the only ones it runs at; empty: all
    """

    name: str
    build: Callable[[nn.Linear], Run]
    as_accurate: bool
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    batches: tuple[int, ...] = ()

    def takes(self, dtype: torch.dtype, batch: int) -> bool:
        return dtype in self.dtypes and (not self.batches or batch in self.batches)


def available(only: list[str] | None = None, kind: str = "RIVALS") -> tuple[list[Rival], list[str]]:
    """All rivals, or those whose name (with or without "torch") or file is in `only`; a line for each file skipped.

    kind   RIVALS or LOW_BITS
    """
    rivals, skipped = [], []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        wanted = [
            rival
            for rival in getattr(module, kind, [])
            if not only or {rival.name, rival.name.removeprefix("torch "), info.name} & set(only)
        ]
        missing = [package for package in module.REQUIRES if not is_installed(package)]
        if wanted and missing:
            skipped.append(
                f"{info.name}: {', '.join(missing)} not installed (pip install -r requirements-bench.txt)"
            )
        else:
            rivals += wanted
    return rivals, skipped


def is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # find_spec("a.b") imports a
        return False


def versions() -> dict[str, str]:
    """Of every package that a rival needs and that is installed."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        for package in importlib.import_module(f"{__name__}.{info.name}").REQUIRES:
            names = packages_distributions().get(package.partition(".")[0], [])
            for name in [package.replace(".", "-"), *names]:
                with contextlib.suppress(PackageNotFoundError):
                    found[package] = version(name)
                    break
    return dict(sorted(found.items()))
