# SPDX-License-Identifier: Apache-2.0
"""Codebooks: an index of 4 bits for each weight and a scale for each block of neighbours in a row.

`weight_packed` uint8 [n, ceil(k / 2)] holds the indices, two in a byte, with the code of 0.0 behind an odd last one.
The last block of a row may be short. What the scales are is each format's own; docs/numerics.md, eq. 80 to 86.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from ..base.configs import require_flags, require_int
from ..tensors.codebook import (
    E2M1_VALUES,
    FP4_VALUES,
    NF4_VALUES,
    Codebook,
    CodebookQParams,
    codebook_qparams,
)
from ..tensors.double_quantization import BLOCK, DoubleQuantized, double_quantize
from ..tensors.forms import TensorForm, finite, not_negative, positive
from ..tensors.granularity import PerGroup
from ..tensors.qparams import QParams, QuantizedTensor
from .base import Tensors, WeightFormat, differs


@dataclass(frozen=True)
class CodebookFormat(WeightFormat, ABC):
    """A table and the rule for its scales."""

    codebook: ClassVar[Codebook]
    reach: ClassVar[float]  # the largest |weight| of a block, in scales
    high_first: ClassVar[bool] = False  # whether the first of two indices lies in the high half of its byte

    replaced: ClassVar[tuple[str, ...]] = ("weight_packed",)
    bits: ClassVar[int] = 4
    stored_bits: ClassVar[int] = 4

    @property
    @abstractmethod
    def granularity(self) -> PerGroup: ...

    @abstractmethod
    def scale_forms(self, n: int, k: int) -> dict[str, TensorForm]:
        """The tensors of the scales."""

    @abstractmethod
    def scale_of(self, tensors: Tensors) -> torch.Tensor:
        """Float32 [n, blocks], what the tensors stand for."""

    def stored_qparams(self, q: QParams) -> CodebookQParams:
        if isinstance(q, CodebookQParams) and q.stored is not None:
            return q
        return self.qparams_of(q.scale * self.reach)

    @abstractmethod
    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        """Those for blocks whose largest |weight| is `absmax` float32 [n, blocks]."""

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        packed = TensorForm((n, -(-k // 2)), torch.uint8, (torch.uint8,))
        return {"weight_packed": packed, **self.scale_forms(n, k)}

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        n, k = q.shape
        codes = F.pad(q.codes, (0, k % 2), value=self.codebook.zero)
        high, low = (codes[:, ::2], codes[:, 1::2]) if self.high_first else (codes[:, 1::2], codes[:, ::2])
        return {"weight_packed": high << 4 | low, **(self.stored_qparams(q.qparams).stored or {})}

    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        packed = tensors["weight_packed"].detach()
        halves = [packed >> 4, packed & 15]
        codes = torch.stack(halves if self.high_first else halves[::-1], dim=-1).flatten(1)[:, :k]
        stored = {name: tensors[name].detach() for name in self.scale_forms(n, k)}
        q = codebook_qparams(self.codebook, self.scale_of(stored), self.granularity, stored)
        return QuantizedTensor(codes, q)

    def qparams(self, weight: torch.Tensor) -> CodebookQParams:
        absmax = self.granularity.to_rows(weight.detach()).abs().amax(1).float()
        if torch.compiler.is_compiling():
            torch._assert_async(absmax.isfinite().all(), f"{self.name}: the weight holds NaN or Inf")
        elif not absmax.isfinite().all():
            raise ValueError(f"{self.name}: the weight holds NaN or Inf")
        return self.qparams_of(absmax.reshape(self.granularity.qparams_shape(weight.shape)))


# --- bitsandbytes' formats ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _BitsAndBytes(CodebookFormat, ABC):
    """The scale of a block is its largest |weight|; -1 and 1 of the table reach all of it. NF4 has the words."""

    block_size: int = 64
    double_quant: bool = True

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

    def part_of(self, name: str) -> str:
        return "scales" if name.startswith(("weight_absmax", "weight_nested")) else super().part_of(name)

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

    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        if not self.double_quant:
            return codebook_qparams(self.codebook, absmax, self.granularity, {"weight_absmax": absmax})
        nested = double_quantize(absmax)
        names = "weight_absmax", "weight_nested_absmax", "weight_nested_offset"
        stored = dict(zip(names, nested, strict=True))
        return codebook_qparams(self.codebook, nested.dequantize(), self.granularity, stored, absmax)


def _nested(tensors: Tensors) -> DoubleQuantized:
    names = "weight_absmax", "weight_nested_absmax", "weight_nested_offset"
    return DoubleQuantized(*(tensors[name] for name in names))


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


# --- e2m1 -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Float4(CodebookFormat, ABC):
    """The table e2m1, names and layout of compressed-tensors."""

    codebook: ClassVar[Codebook] = E2M1_VALUES
    reach: ClassVar[float] = 6.0
    words: ClassVar[dict[str, Any]]  # what compressed-tensors says of the weights

    def compressed_tensors(self) -> dict[str, Any] | None:
        return dict(self.words)

    @classmethod
    def from_compressed_tensors(cls, weights: Mapping[str, Any]) -> WeightFormat | None:
        # How scales are stored goes without saying for this layout; older files leave it out.
        said = {key: value for key, value in cls.words.items() if key not in ("scale_dtype", "zp_dtype")}
        return None if differs(weights, said) else cls()


@dataclass(frozen=True)
class MXFP4(_Float4):
    """e2m1 with a power of two for each 32 weights of a row: 4.25 bits.

    Beside `weight_packed`, low halves first: `weight_scale` uint8 [n, ceil(k / 32)], E8M0:
    value = 2^(byte - 127) * e2m1.

    The exponent is the floor of log2 of the block's largest |weight|, less 2; what lies beyond 6 then becomes 6. Codes
    and exponents are those of ggml, whose ties go to zero. Blocks below 2^-124 share the exponent of that size.
    source   OCP Microscaling Formats 1.0, sections 5.4 and 6.3; ggml 0.25; the layout is compressed-tensors' (0.20),
             mxfp4-pack-quantized, which has no k that is not a multiple of 32
    """

    stored_as: ClassVar[str] = "mxfp4-pack-quantized"
    words: ClassVar[dict[str, Any]] = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    granularity: ClassVar[PerGroup] = PerGroup(32)
    fixed_scales: ClassVar[str] = "are powers of two"

    def scale_forms(self, n: int, k: int) -> dict[str, TensorForm]:
        blocks = self.granularity.qparams_shape((n, k))
        return {"weight_scale": TensorForm(blocks, torch.uint8, (torch.uint8,), 127, _not_255)}

    def scale_of(self, tensors: Tensors) -> torch.Tensor:
        return _powers_of_two().to(tensors["weight_scale"].device)[tensors["weight_scale"].int()]

    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        exponents = (torch.frexp(absmax).exponent - 1 - 2 + 127).clamp(1, 254)
        stored = {"weight_scale": torch.where(absmax > 0, exponents, 0).to(torch.uint8)}
        return codebook_qparams(self.codebook, self.scale_of(stored), self.granularity, stored)


@cache
def _powers_of_two() -> torch.Tensor:
    """What the bytes of E8M0 stand for: float32 [256]."""
    return torch.tensor([2.0 ** (byte - 127) for byte in range(255)] + [torch.nan], device="cpu")


def _not_255(exponents: torch.Tensor) -> str:
    return "255, which E8M0 has for NaN" if (exponents == 255).any() else ""


@dataclass(frozen=True)
class NVFP4(_Float4):
    """e2m1 with a scale of 8 bits for each 16 weights of a row and one float32 for all of it: 4.5 bits.

    Beside `weight_packed`, low halves first: `weight_scale` float8_e4m3fn [n, ceil(k / 16)], not negative, and
    `weight_global_scale` float32 [1]: value = weight_scale / weight_global_scale * e2m1.

    The global scale brings the largest block scale to 448, and each block's largest |weight| to 6 of its steps. Blocks
    whose largest |weight| is below 2^-19 of that of all become zeros. With a global scale of 1, codes and block scales
    are those of ggml, whose ties go to zero.
    source   NVIDIA's NVFP4; ggml 0.25; the layout is compressed-tensors' (0.20), nvfp4-pack-quantized, which has no k
             that is not a multiple of 16
    """

    stored_as: ClassVar[str] = "nvfp4-pack-quantized"
    words: ClassVar[dict[str, Any]] = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
        "zp_dtype": "torch.float8_e4m3fn",
    }
    granularity: ClassVar[PerGroup] = PerGroup(16)
    fixed_scales: ClassVar[str] = "have 8 bits"

    def scale_forms(self, n: int, k: int) -> dict[str, TensorForm]:
        blocks = self.granularity.qparams_shape((n, k))
        e4m3 = torch.float8_e4m3fn
        return {
            "weight_scale": TensorForm(blocks, e4m3, (e4m3,), 1.0, lambda scale: not_negative(scale.float())),
            "weight_global_scale": TensorForm((1,), torch.float32, (torch.float32,), 1.0, positive),
        }

    def scale_of(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight_scale"].float() / tensors["weight_global_scale"]

    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        largest = absmax.amax().reshape(1) if absmax.numel() else absmax.new_zeros(1)
        factor = torch.where(largest > 0, (448 * 6 / largest).clamp_max(2.0**126), 1.0)
        scale = (absmax / 6 * factor).clamp_max(448).to(torch.float8_e4m3fn)
        stored = {"weight_scale": scale, "weight_global_scale": factor}
        return codebook_qparams(self.codebook, self.scale_of(stored), self.granularity, stored)
