# SPDX-License-Identifier: Apache-2.0
"""MXFP4 and NVFP4: floats of four bits, e2m1, with scales of eight bits, in the layout of compressed-tensors."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..tensors.codebook import E2M1_VALUES, Codebook, CodebookQParams, codebook_qparams
from ..tensors.forms import TensorForm, not_negative, positive
from ..tensors.granularity import PerGroup
from .base import CodebookFormat, Tensors, WeightFormat, differs


def _words(strategy: str, group_size: int, scale_dtype: str) -> dict[str, Any]:
    """What compressed-tensors says of the weights."""
    kind = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
    scales = {"scale_dtype": scale_dtype, "zp_dtype": scale_dtype}
    return {**kind, "strategy": strategy, "group_size": group_size, **scales}


@dataclass(frozen=True)
class _Float4(CodebookFormat, ABC):
    """The table e2m1, names and layout of compressed-tensors."""

    codebook: ClassVar[Codebook] = E2M1_VALUES
    reach: ClassVar[float] = 6.0
    replaced: ClassVar[tuple[str, ...]] = ("weight_packed", "weight_scale")
    words: ClassVar[dict[str, Any]]

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
    words: ClassVar[dict[str, Any]] = _words("group", 32, "torch.uint8")
    granularity: ClassVar[PerGroup] = PerGroup(32)
    fixed_scales: ClassVar[str] = "are powers of two"

    def scale_forms(self, n: int, k: int) -> dict[str, TensorForm]:
        blocks = self.granularity.qparams_shape((n, k))
        return {"weight_scale": TensorForm(blocks, torch.uint8, (torch.uint8,), 127, _not_255)}

    def scale_of(self, tensors: Tensors) -> torch.Tensor:
        return _POWERS_OF_TWO.to(tensors["weight_scale"].device)[tensors["weight_scale"].int()]

    def packed_scale(self, tensors: Tensors) -> torch.Tensor:
        return self.scale_of(tensors).bfloat16()

    def unpacked_scale(self, held: Tensors, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight_scale": (torch.frexp(scale.float()).exponent + 126).to(torch.uint8)}

    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        exponents = (torch.frexp(absmax).exponent - 1 - 2 + 127).clamp(1, 254)
        stored = {"weight_scale": torch.where(absmax > 0, exponents, 0).to(torch.uint8)}
        return codebook_qparams(self.codebook, self.scale_of(stored), self.granularity, stored)


# What the bytes of E8M0 stand for: float32 [256].
_POWERS_OF_TWO = torch.tensor(
    [2.0 ** (byte - 127) for byte in range(255)] + [torch.nan], dtype=torch.float32, device="cpu"
)


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
    words: ClassVar[dict[str, Any]] = _words("tensor_group", 16, "torch.float8_e4m3fn")
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

    def packed_scale(self, tensors: Tensors) -> torch.Tensor:
        return tensors["weight_scale"].detach().half()

    def column_scale(self, tensors: Tensors) -> torch.Tensor:
        return self.codebook.step / tensors["weight_global_scale"].detach()

    def exact_scale(self, packed_scale: torch.Tensor, layer: Any) -> torch.Tensor:
        return packed_scale.float() / layer.weight_global_scale.detach()

    def unpacked_scale(self, held: Tensors, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"weight_scale": scale.to(torch.float8_e4m3fn)}

    def qparams_of(self, absmax: torch.Tensor) -> CodebookQParams:
        largest = absmax.amax().reshape(1) if absmax.numel() else absmax.new_zeros(1)
        factor = torch.where(largest > 0, (448 * 6 / largest).clamp_max(2.0**126), 1.0)
        scale = (absmax / 6 * factor).clamp_max(448).to(torch.float8_e4m3fn)
        stored = {"weight_scale": scale, "weight_global_scale": factor}
        return codebook_qparams(self.codebook, self.scale_of(stored), self.granularity, stored)
