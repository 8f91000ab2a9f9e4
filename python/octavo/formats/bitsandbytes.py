# SPDX-License-Identifier: Apache-2.0
"""NF4 and FP4: the codebooks of bitsandbytes, with its scales, byte by byte where its blocks lie in rows."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..base.configs import require_flags, require_int
from ..tensors.codebook import FP4_VALUES, NF4_VALUES, Codebook, CodebookQParams, codebook_qparams
from ..tensors.double_quantization import (
    BLOCK,
    DYNAMIC_MAP,
    DoubleQuantized,
    codes_of_scale,
    double_quantize,
)
from ..tensors.forms import TensorForm, finite, not_negative
from ..tensors.granularity import PerGroup
from .base import Tensors
from .groups import CodebookFormat

NESTED = "weight_nested_absmax", "weight_nested_offset"


@dataclass(frozen=True)
class _BitsAndBytes(CodebookFormat, ABC):
    """The scale of a block is its largest |weight|; -1 and 1 of the table reach all of it. NF4 has the words."""

    block_size: int = 64
    double_quant: bool = True

    held: ClassVar[tuple[str, ...]] = (
        *CodebookFormat.held,
        "packed_absmax",
        "packed_nested_absmax",
        "packed_nested_offset",
    )
    reach: ClassVar[float] = 1.0
    high_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_flags(self, "double_quant")
        require_int(f"{self.name}: block_size", self.block_size)
        if self.block_size % 16 or not 16 <= self.block_size <= 4096:
            raise ValueError(
                f"{self.name}: block_size must be a multiple of 16 in 16 .. 4096, got {self.block_size}"
            )

    @property
    def granularity(self) -> PerGroup:
        return PerGroup(self.block_size)

    @property
    def fixed_scales(self) -> str:
        return "are quantized themselves" if self.double_quant else ""

    @property
    def replaced(self) -> tuple[str, ...]:
        return "weight_packed", *self.scale_forms(0, 0)

    def part_of(self, name: str) -> str:
        return "scales" if "absmax" in name or "nested" in name else super().part_of(name)

    def scale_forms(self, n: int, k: int) -> dict[str, TensorForm]:
        blocks = self.granularity.qparams_shape((n, k))
        if not self.double_quant:
            return {"weight_absmax": TensorForm(blocks, torch.float32, (torch.float32,), 1.0, not_negative)}
        nested = -(-blocks[0] * blocks[1] // BLOCK)
        return {
            "weight_absmax": TensorForm(blocks, torch.uint8, (torch.uint8,)),
            "weight_nested_absmax": TensorForm((nested,), torch.float32, (torch.float32,), 1.0, not_negative),
            "weight_nested_offset": TensorForm((1,), torch.float32, (torch.float32,), 1.0, finite),
        }

    def scale_of(self, tensors: Tensors) -> torch.Tensor:
        return _nested(tensors).dequantize() if self.double_quant else tensors["weight_absmax"]

    def packed_scale(self, tensors: Tensors) -> torch.Tensor:
        return self.scale_of(tensors).detach()

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        held = super().pack(tensors, n, k)
        if self.double_quant:
            stored = {name: tensors[name].detach() for name in self.scale_forms(n, k)}
            held |= {name.replace("weight", "packed"): stored[name].clone() for name in NESTED}
            # The bytes follow from the scales, unless two of them have the same one.
            if torch.compiler.is_compiling() or not _nested(stored).follows_from_scale():
                held["packed_absmax"] = stored["weight_absmax"].clone()
        return held

    def unpacked_scale(self, held: Tensors, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.double_quant:
            return {"weight_absmax": scale}
        nested = [held[name.replace("weight", "packed")].clone() for name in NESTED]
        codes = held["packed_absmax"]
        codes = codes_of_scale(scale, *nested) if codes is None else codes.clone()
        return {"weight_absmax": codes, **dict(zip(NESTED, nested, strict=True))}

    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        if not self.double_quant:
            return codebook_qparams(self.codebook, absmax, self.granularity, {"weight_absmax": absmax})
        nested = double_quantize(absmax)
        stored = dict(zip(("weight_absmax", *NESTED), nested, strict=True))
        return codebook_qparams(self.codebook, nested.dequantize(), self.granularity, stored, absmax)

    @classmethod
    def from_bitsandbytes(
        cls, tensors: Tensors, state: Mapping[str, Any]
    ) -> tuple[CodebookFormat, dict[str, torch.Tensor]]:
        """The format and the canonical tensors of a weight that bitsandbytes has written.

        tensors   what hangs under its `weight`, by the rest of the name, with "codes" for `weight` itself
        state     its quant_state: the shape and the sizes of blocks
        raises    ValueError if blocks straddle rows and for other tables of values; KeyError, TypeError, RuntimeError
                  for what is missing or does not fit
        """
        n, k = state["shape"]
        double_quant = "nested_offset" in state
        format = cls(state["blocksize"], double_quant)
        if k % format.block_size:
            raise ValueError(
                f"blocks of {format.block_size} straddle its rows of {k}, and octavo's lie in rows; quantize the float "
                f"model with octavo.{format.name}()"
            )
        forms = format.tensors(n, k)
        found = {"weight_packed": tensors["codes"], "weight_absmax": tensors["absmax"]}
        tables = {"quant_map": cls.codebook.table}
        if double_quant:
            found["weight_nested_absmax"] = tensors["nested_absmax"]
            found["weight_nested_offset"] = torch.tensor([state["nested_offset"]], device="cpu")
            tables["nested_quant_map"] = DYNAMIC_MAP
        if state.get("nested_blocksize", BLOCK) != BLOCK or any(
            not torch.equal(tensors[name].float(), table) for name, table in tables.items()
        ):
            raise ValueError(
                f"its values are not those of {format.name}, or its nested blocks not of {BLOCK}"
            )
        return format, {name: tensor.reshape(forms[name].shape) for name, tensor in found.items()}


def _nested(tensors: Tensors) -> DoubleQuantized:
    return DoubleQuantized(*(tensors[name] for name in ("weight_absmax", *NESTED)))


@dataclass(frozen=True)
class NF4(_BitsAndBytes):
    """Quantiles of a normal distribution, times the largest |weight| of a block: what bitsandbytes calls NF4.

    block_size     16 .. 4096, a multiple of 16: neighbours in a row that share a scale
    double_quant   the scales are bytes, with a scale of their own for each 256 of them, and less their mean

    Beside `weight_packed`, high halves first: `weight_absmax` float32 [n, blocks], 0 for a block of zeros. With
    double_quant: `weight_absmax` uint8 [n, blocks], `weight_nested_absmax` float32 [ceil(n * blocks / 256)] and
    `weight_nested_offset` float32 [1].

    Where k is a multiple of the block these are the bytes of bitsandbytes 0.50 on CPUs, whose blocks run through the
    flattened weight. Its mean is a sum of torch's, which for 2^15 blocks and more depends on the number of threads;
    ours does not. A block whose largest |weight| is below 1e-38 loses digits, and what it loses is below 1e-38. With
    double_quant the scale of a block is off by at most 1 / 128 of the largest difference from the mean among the 256,
    which is much for a block that is far smaller than the others.
    raises   TypeError, ValueError for other block sizes; ValueError where double_quant would overflow float32
    source   Dettmers et al. 2023, QLoRA (arXiv:2305.14314), section 3
    """

    codebook: ClassVar[Codebook] = NF4_VALUES


@dataclass(frozen=True)
class FP4(_BitsAndBytes):
    """bitsandbytes' 4-bit float; fields and tensors are those of NF4. MXFP4 and NVFP4 have another table.

    source   bitsandbytes 0.50
    """

    codebook: ClassVar[Codebook] = FP4_VALUES
