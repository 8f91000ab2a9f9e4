# SPDX-License-Identifier: Apache-2.0
"""Which tensor of a file gets which type: the rules of llama.cpp, by the names of its mixtures.

"Q4_K_M" is Q4_K for most matrices and Q6_K for those whose errors cost most: values and the way down of some layers,
and the head. The name of a type alone, "Q4_K", is that type for every matrix. Source: llama.cpp, llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ...formats import BLOCK_TYPES, fallback_type
from .config import EMBEDDING, HEAD

# The type of most matrices. "_S", "_M" and "_L" give some of them more bits.
MIXTURES = {
    **{f"Q3_K_{size}": "Q3_K" for size in "SML"},
    **{f"{base}_{size}": base for base in ("Q4_K", "Q5_K") for size in "SM"},
    "Q2_K_S": "Q2_K",
}
_FLOATS = ("F32", "F16", "BF16")
# What is never a matrix of codes: added to, or so small that its errors count twice.
_KEPT = re.compile(r"norm\.weight$|ffn_gate_inp|^position_embd|^token_types|^rope_")
_LAYER = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class Mixture:
    """The types of a file.

    name            of a mixture of llama.cpp, or of a type
    architecture    by llama.cpp's name
    layers, experts of the model
    query_groups    how many query heads share a key
    has_head        whether the head is a tensor of its own
    """

    name: str
    architecture: str
    layers: int
    experts: int = 0
    query_groups: int = 1
    has_head: bool = True

    def __post_init__(self) -> None:
        if self.name not in (*MIXTURES, *BLOCK_TYPES, *_FLOATS):
            raise ValueError(
                f"scheme is {self.name!r}; accepted are the mixtures {', '.join(MIXTURES)} and the types "
                f"{', '.join((*BLOCK_TYPES, *_FLOATS))}"
            )

    def type_of(self, tensor: str, shape: Sequence[int], has_importance: bool = False) -> str:
        """The type of the tensor that goes by this name in the file; `shape` as torch has it."""
        if len(shape) < 2 or not tensor.endswith("weight") or _KEPT.search(tensor):
            return "F32"
        if self.name in _FLOATS:
            return self.name
        wanted = MIXTURES.get(self.name, self.name)
        if self.name in MIXTURES:
            wanted = self._mixed(tensor, wanted, shape[-1])
        return fallback_type(wanted, shape[-1])

    def _mixed(self, tensor: str, base: str, k: int) -> str:
        if tensor == HEAD or (tensor == EMBEDDING and not self.has_head):
            return "Q8_0" if self.architecture == "falcon" or k % BLOCK_TYPES[base].elements else "Q6_K"
        found = _LAYER.match(tensor)
        if found is None:
            return base
        layer, part = int(found[1]), tensor[found.end() :]
        for prefix, rule in (
            ("attn_v.", self._values),
            ("attn_k.", self._keys),
            ("ffn_down", self._down),
            ("attn_output.", self._attention_output),
            ("attn_qkv.", self._joined_attention),
        ):
            if part.startswith(prefix):
                return rule(layer, base)
        return base

    def _values(self, layer: int, base: str) -> str:
        if self.experts == 8:
            return "Q8_0"
        chosen = base
        if self.name == "Q2_K_S" and self.query_groups >= 4:
            chosen = "Q4_K"
        elif self.name == "Q3_K_M":
            chosen = "Q5_K" if layer < 2 else "Q4_K"
        elif self.name == "Q3_K_L":
            chosen = "Q5_K"
        elif self.name in ("Q4_K_M", "Q5_K_M") and self._more_bits(layer):
            chosen = "Q6_K"
        elif self.name == "Q4_K_S" and layer < 4:
            chosen = "Q5_K"
        is_70b = self.architecture == "llama" and self.layers == 80
        return "Q5_K" if is_70b and chosen in ("Q3_K", "Q4_K") else chosen

    def _keys(self, layer: int, base: str) -> str:
        return "Q8_0" if self.experts == 8 else base

    def _down(self, layer: int, base: str) -> str:
        is_falcon = self.architecture == "falcon"
        if self.name == "Q2_K_S":
            return "Q4_K" if layer < self.layers // 8 else base
        if self.name == "Q3_K_M":
            if layer < self.layers // 16:
                return "Q5_K"
            return "Q4_K" if not is_falcon or self._more_bits(layer) else "Q3_K"
        if self.name == "Q3_K_L":
            return "Q4_K" if is_falcon else "Q5_K"
        if self.name == "Q4_K_M" and is_falcon:
            return "Q6_K" if layer < self.layers // 16 else "Q5_K" if self._more_bits(layer) else "Q4_K"
        if self.name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if self._more_bits(layer) else base
        return "Q5_K" if self.name == "Q4_K_S" and not is_falcon and layer < self.layers // 8 else base

    def _attention_output(self, layer: int, base: str) -> str:
        if self.architecture == "falcon":
            return "Q4_K" if self.name == "Q3_K_L" else base
        if self.experts == 8 and self.name in ("Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"):
            return "Q5_K"
        return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.name, base) if self.experts != 8 else base

    def _joined_attention(self, layer: int, base: str) -> str:
        return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(self.name, base)

    def _more_bits(self, layer: int) -> bool:
        """The first and the last eighth of the layers, and every third one between."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2
