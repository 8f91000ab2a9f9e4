# SPDX-License-Identifier: Apache-2.0
"""Weights in the blocks of GGML, as llama.cpp runs them and GGUF files have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import formats
from ..activations import Activations, Dynamic
from ..nn.replacements import features_of
from .base import CodebookScheme


@dataclass(frozen=True)
class GGML(CodebookScheme):
    """Weights encoded as llama.cpp does: octavo.formats.GGML. Short names are those of the types: "q4_k", "q8_0", ...

    type          "Q4_K", "Q8_0", ...: as in octavo.formats.GGML
    activations   "int8": each row of the input gets a scale for each 32 elements. "int16": weight-only, each row is
                  rounded to 16 bits; or an object of octavo.activations
    method        as in octavo.schemes.Scheme
    raises        TypeError, ValueError for another type
    source        ggml 0.25; docs/numerics.md
    """

    type: str = "Q4_K"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "type", self.format().type)

    def format(self) -> formats.GGML:
        return formats.GGML(self.type)

    @classmethod
    def short_names(cls) -> Mapping[str, dict[str, Any]]:
        return {name: {"type": name} for name in formats.BLOCK_TYPES if name not in ("MXFP4", "NVFP4")}

    def read_input(self) -> Activations:
        word: Any = self.activations
        if word == "int8" or (isinstance(word, Mapping) and word.get("name") == "int8"):
            return Dynamic(group_size=32)
        return super().read_input()

    def reason_to_keep(self, linear: Any) -> str | None:
        reason = super().reason_to_keep(linear)
        if reason is None and isinstance(self.weights, formats.GGML):
            k, n = features_of(linear)
            reason = self.weights.reason_for_shape(n, k) or None
        return reason
