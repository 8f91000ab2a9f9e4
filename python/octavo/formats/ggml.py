# SPDX-License-Identifier: Apache-2.0
"""The blocks of GGML as GGUF files have them: 18 types of one to eight bits, byte for byte those of llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .. import ops
from ..base.configs import spelled
from ..reference.ggml_blocks import BLOCK_TYPES, BlockType
from ..tensors.blocks import BlockQParams, QuantizedBlocks
from ..tensors.codebook import E2M1_VALUES, IQ4_NL_VALUES
from ..tensors.forms import TensorForm
from ..tensors.granularity import PerGroup
from ..tensors.qparams import QParams, QuantizedTensor
from .base import GroupFormat, Tensors, on_huge_pages

# What llama.cpp takes instead if k is no whole number of blocks: llama-quant.cpp, `tensor_type_fallback`.
_INSTEAD = {"TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_INSTEAD |= dict.fromkeys(("Q2_K", "Q3_K", "IQ4_XS"), "IQ4_NL")

# How many times the step of its float16 number the largest weight of a block is: docs/numerics.md. A weight below half
# of the smallest float16 times that becomes nothing but zeros.
_STEPS_OF_LARGEST = {
    **{"Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q8_0": 127, "Q2_K": 45, "Q3_K": 128, "Q4_K": 945},
    **{
        "Q5_K": 1953,
        "Q6_K": 4096,
        "IQ4_NL": 127,
        "IQ4_XS": 4064,
        "TQ1_0": 1,
        "TQ2_0": 1,
        "Q1_0": 1,
        "Q2_0": 1,
    },
}
_LEAST_HALF, _LEAST_E4M3 = 2.0**-25, 6 * 2.0**-10

_DTYPES = {"half": torch.float16, "e4m3": torch.float8_e4m3fn}


def fallback_type(type: str, k: int) -> str:
    """The type that llama.cpp writes for rows of k elements if `type` is asked for: `type` if k is a whole number of
    blocks, otherwise one with blocks of 32, and "F16" where these do not fit either.

    raises   ValueError for another type
    """
    kind = ops.block_type("fallback_type", type)
    if k % kind.elements == 0:
        return kind.name
    other = _INSTEAD.get(kind.name)
    return other if other is not None and k % BLOCK_TYPES[other].elements == 0 else "F16"


@dataclass(frozen=True)
class GGML(GroupFormat):
    """Weights in the blocks of a GGML type, their scales among them.

    type     "Q4_0" "Q4_1" "Q5_0" "Q5_1" "Q8_0", "Q2_K" .. "Q6_K", "IQ4_NL" "IQ4_XS", "TQ1_0" "TQ2_0", "MXFP4" "NVFP4",
             "Q1_0" "Q2_0", in any spelling
    raises   TypeError, ValueError for another type

    The canonical form, of a weight [n, k]: `weight_blocks` uint8 [n, bytes of a row], one row after the other as a
    GGUF file has them. So rows are permuted, joined and split by indexing. k is a whole number of blocks: of 256
    elements for K types, IQ4_XS and TQ, 128 for Q1_0, 64 for NVFP4 and Q2_0, 32 otherwise.

    Packed: `packed`, planes or, with 8 bits, S16; `packed_scale` [ceil(n / 16), groups, 16], float16 or one byte each;
    `packed_super_scale` float16 [ceil(n / 16), blocks, 1 or 2, 16] and `packed_minimum`, if the type has them;
    `packed_column_scale` float32 [n] for MXFP4 and NVFP4. docs/packed_format.md draws it. TQ1_0 and Q1_0 become 2 bits
    for each weight; all others keep their size but for 4 % at most.
    source   ggml 0.25; docs/numerics.md
    """

    type: str = "Q4_K"

    held: ClassVar[tuple[str, ...]] = (
        *("packed", "packed_scale", "packed_super_scale", "packed_minimum", "packed_column_scale"),
    )
    operands: ClassVar[tuple[str, ...]] = (*held, "out_features")
    replaced: ClassVar[tuple[str, ...]] = ("weight_blocks",)
    strip: ClassVar[int] = 16
    fixed_scales: ClassVar[str] = "lie in blocks with the codes"

    def __post_init__(self) -> None:
        if not isinstance(self.type, str):
            raise TypeError(f"GGML: type must be a name such as 'Q4_K', got {self.type!r}")
        found = [name for name in BLOCK_TYPES if spelled(name) == spelled(self.type)]
        object.__setattr__(self, "type", found[0] if found else ops.block_type("GGML", self.type).name)

    @property
    def blocks(self) -> BlockType:
        """What a block of this type is."""
        return BLOCK_TYPES[self.type]

    @property
    def granularity(self) -> PerGroup:
        return PerGroup(self.blocks.group)

    @property
    def bits(self) -> int:
        return self.blocks.bits

    @property
    def stored_bits(self) -> int:
        return round(self.blocks.bits_per_weight)

    def reason_for_shape(self, n: int, k: int) -> str:
        """Why a weight [n, k] cannot be stored, in words with the remedy; "" if it can."""
        size = self.blocks.elements
        if k % size == 0:
            return ""
        fits = [name for name, kind in BLOCK_TYPES.items() if k % kind.elements == 0]
        instead = fallback_type(self.type, k)
        if instead in fits:
            remedy = f"llama.cpp takes {instead} there"
        else:
            remedy = (
                f"{', '.join(fits)} would fit" if fits else "octavo.Int4WeightOnly takes rows of any length"
            )
        return f"rows of {k} weights are no whole number of blocks of {size}, which {self.type} has; {remedy}"

    # --- the canonical form -----------------------------------------------------------------------------------------

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        shape = n, self.blocks.row_bytes(k)
        return {"weight_blocks": TensorForm(shape, torch.uint8, (torch.uint8,), 0, self.reason_for_blocks)}

    def reason_for_blocks(self, blocks: torch.Tensor) -> str:
        """What is wrong with `blocks` uint8 [n, bytes of a row], in words; "" if nothing is. What ggml's validation
        refuses is: scales that are NaN or Inf. And bytes of TQ1_0 that stand for the same as another one, which writers
        write."""
        rows = blocks.detach().reshape(-1, self.blocks.size)
        if self.type == "MXFP4":
            return "255 as an exponent, which E8M0 has for NaN" if (rows[:, 0] == 255).any() else ""
        for at in _HALVES.get(self.type, range(0, 2 * self.blocks.halves, 2)):
            high = rows[:, at + 1]
            if ((high & 0x7C) == 0x7C).any():
                return "scales that are NaN or Inf"
        if (
            self.type == "TQ1_0"
            and not _WRITTEN[rows[:, :48].int()].all() & _WRITTEN_LAST[rows[:, 48:52].int()].all()
        ):
            return "bytes that are no five digits of base 3, as no writer of TQ1_0 makes them"
        return ""

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        return {"weight_blocks": q.codes}

    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        return QuantizedBlocks(tensors["weight_blocks"].detach(), BlockQParams.of(self.type, k))

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        n, size = tensors["weight_blocks"].shape
        return n, size // self.blocks.size * self.blocks.elements

    # --- from floats ------------------------------------------------------------------------------------------------

    def qparams(self, weight: torch.Tensor) -> QParams:
        """Raises ValueError for NaN and Inf, for rows that are no whole number of blocks, and for a weight so small
        that all its scales would become 0."""
        reason = self.reason_for_shape(*weight.shape)
        if reason:
            raise ValueError(f"GGML: {reason}")
        low, high = (end.float() for end in weight.detach().aminmax())
        if torch.compiler.is_compiling():
            torch._assert_async(low.isfinite() & high.isfinite(), "GGML: the weight holds NaN or Inf")
        elif not (low.isfinite() & high.isfinite()):
            raise ValueError("GGML: the weight holds NaN or Inf; finite values are needed")
        else:
            self._require_scales(low.item(), high.item())
        return BlockQParams.of(self.type, weight.shape[1])

    def _require_scales(self, low: float, high: float) -> None:
        largest = max(high, 0.0) - min(low, 0.0) if self.blocks.has_minimum else max(high, -low)
        least = _LEAST_E4M3 if self.type == "NVFP4" else _LEAST_HALF * _STEPS_OF_LARGEST.get(self.type, 0)
        if 0 < largest < least:
            raise ValueError(
                f"GGML: the largest weight is {largest:g}, and blocks of {self.type} have scales for {least:.2g} and "
                "more: all would become 0; scale the weight up, or use octavo.Int4WeightOnly(scale_dtype='float32')"
            )

    # --- the packed form and the product ----------------------------------------------------------------------------

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        blocks = tensors["weight_blocks"].detach()
        codes, scale, super_scale, minimum = ops.ggml_pack(blocks, self.type, k)
        number = _DTYPES.get(self.blocks.scales, torch.int8 if self.blocks.signed else torch.uint8)
        held = {
            "packed": on_huge_pages(codes.view(torch.int8) if self.bits == 8 else codes),
            "packed_scale": scale.view(number),
        }
        if self.blocks.two_levels:
            held["packed_super_scale"] = super_scale.view(torch.float16)
        if minimum.numel() or (self.blocks.has_minimum and self.blocks.scales != "halves_of_bytes"):
            held["packed_minimum"] = minimum.view(
                torch.float16 if self.blocks.scales == "half" else torch.uint8
            )
        if self.blocks.scales in ("e8m0", "e4m3"):
            held["packed_column_scale"] = torch.full(
                (n,), E2M1_VALUES.step, dtype=torch.float32, device=codes.device
            )
        return held

    def unpack(self, held: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        nothing = torch.empty(0, dtype=torch.uint8, device=held["packed"].device)
        given = [held.get(name) for name in self.held[:4]]
        codes, scale, super_scale, minimum = (
            nothing if part is None else part.view(torch.uint8) for part in given
        )
        return {"weight_blocks": ops.ggml_unpack(codes, scale, super_scale, minimum, self.type, n, k)}

    def group_weight(self, *operands: Any) -> ops.GroupWeight:
        packed, scale, super_scale, minimum, column_scale, n = operands
        kind = self.blocks
        table = None
        if kind.values:
            table = (IQ4_NL_VALUES if kind.name.startswith("IQ4") else E2M1_VALUES).unsigned
        numbers = n, kind.bits, kind.group, kind.offset
        return ops.GroupWeight(packed, scale, super_scale, minimum, table, column_scale, *numbers)


# Where the float16 numbers of a block are, if they are not in front.
_HALVES: dict[str, Any] = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}


def _written(numbers: range) -> torch.Tensor:
    """Which bytes stand for one of `numbers`, of five digits: bool [256]."""
    written = torch.zeros(256, dtype=torch.bool, device="cpu")
    written[[(256 * number + 242) // 243 for number in numbers]] = True
    return written


_WRITTEN, _WRITTEN_LAST = _written(range(243)), _written(range(0, 243, 3))
