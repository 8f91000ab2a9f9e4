# SPDX-License-Identifier: Apache-2.0
"""Integers of 2 to 8 bits with a scale for each group of neighbours in a row, and perhaps a zero point.

The canonical form is what compressed-tensors writes as "pack-quantized", so that files are exchanged as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .. import ops
from ..base.configs import require_flags, require_group_size, require_int
from ..base.float_types import FLOAT_DTYPES
from ..tensors.dense_bits import from_words, to_words, words_for
from ..tensors.fake_quantize import SMALLEST_SCALE
from ..tensors.forms import TensorForm, equal_to, positive
from ..tensors.granularity import Granularity, PerChannel, PerGroup
from ..tensors.qparams import QParams, QuantizedTensor
from ..tensors.strips import from_strips, to_strips
from .base import GroupFormat, Tensors, WeightFormat, differs, on_huge_pages

SCALE_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
LEAST_FLOAT16, LEAST_NORMAL_FLOAT16 = 2.0**-24, 2.0**-14
# If the largest scale of a weight is at least this, float16 makes its steps at most 1.6 % (2^-6) larger.
ENOUGH_FOR_FLOAT16 = 2.0**-18


@dataclass(frozen=True)
class IntGroup(GroupFormat):
    """value = scale * (code - zero_point), with a scale for each `group_size` neighbours in a row.

    bits          2 .. 8; codes are signed, -2^(bits - 1) .. 2^(bits - 1) - 1
    group_size    a multiple of 16, or None for one group that is the whole row. The last group of a row may be short
    symmetric     True: code 0 is 0.0. False: a zero point for each group
    scale_dtype   "float32", "bfloat16" or "float16": what scales are rounded to before codes are chosen
    raises        TypeError, ValueError for other values

    The canonical form, of a weight [n, k]: `weight_packed` int32 [n, ceil(k * bits / 32)], the codes plus
    2^(bits - 1), one right behind the other, lowest bits first; `weight_scale` [n, groups]; `weight_shape` int64 [2],
    n and k; unless symmetric `weight_zero_point` int32 [ceil(n * bits / 32), groups], packed likewise, but along n.

    Float16 reaches from 2^-24 to 65,504. A group whose scale is smaller gets 2^-24, with which a weight is off by at
    most 2^-25, as it is in float16 itself; `qparams` refuses a weight that as a whole is too small or too large.
    Packed: `packed`, uint8 planes or, with 8 bits, int8 as Int8 has them; `packed_scale` and `packed_zero_point`
    (uint8, plus 2^(bits - 1); None if symmetric) in strips [ceil(n / 16), groups, 16]. docs/packed_format.md draws it.
    source        the layout in files: compressed-tensors 0.20.0, `PackedQuantizationCompressor`; docs/numerics.md
    """

    bits: int = 4
    group_size: int | None = 32
    symmetric: bool = True
    scale_dtype: str = "float16"

    held: ClassVar[tuple[str, ...]] = ("packed", "packed_scale", "packed_zero_point")
    operands: ClassVar[tuple[str, ...]] = (*held, "out_features")
    strip: ClassVar[int] = 16
    stored_as: ClassVar[str] = "pack-quantized"
    read_as: ClassVar[tuple[str, ...]] = ("int-quantized",)

    def __post_init__(self) -> None:
        require_int("IntGroup: bits", self.bits)
        if not 2 <= self.bits <= 8:
            raise ValueError(f"IntGroup: bits must be in 2 .. 8, got {self.bits}")
        require_group_size("IntGroup: group_size", self.group_size, 16)
        require_flags(self, "symmetric")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"IntGroup: scale_dtype is {self.scale_dtype!r}, accepted are {', '.join(map(repr, SCALE_DTYPES))}"
            )

    @property
    def granularity(self) -> Granularity:
        return PerChannel(0) if self.group_size is None else PerGroup(self.group_size)

    @property
    def stored_bits(self) -> int:
        return self.bits

    @property
    def has_zero_points(self) -> bool:
        return not self.symmetric

    @property
    def replaced(self) -> tuple[str, ...]:
        both = "weight_packed", "weight_scale"
        return both if self.symmetric else (*both, "weight_zero_point")

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1

    # --- the canonical form -----------------------------------------------------------------------------------------

    def tensors(self, n: int, k: int) -> dict[str, TensorForm]:
        groups, dtype = self._groups(k), SCALE_DTYPES[self.scale_dtype]
        # Others are not taken for a narrow type: they would be rounded.
        accepted = FLOAT_DTYPES if dtype is torch.float32 else (dtype,)
        forms = {
            "weight_packed": TensorForm((n, words_for(k, self.bits)), torch.int32, (torch.int32,)),
            "weight_scale": TensorForm((n, groups), dtype, accepted, 1.0, positive),
            "weight_shape": TensorForm((2,), torch.int64, (torch.int64,), (n, k), equal_to((n, k))),
        }
        if not self.symmetric:
            shape = words_for(n, self.bits), groups
            forms["weight_zero_point"] = TensorForm(shape, torch.int32, (torch.int32,))
        return forms

    def _groups(self, k: int) -> int:
        return 1 if self.group_size is None else -(-k // self.group_size)

    def store(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
        n, k = q.shape
        tensors = {
            "weight_packed": to_words(self._unsigned(q.codes), self.bits),
            "weight_scale": q.scale.reshape(n, -1).to(SCALE_DTYPES[self.scale_dtype]),
            "weight_shape": torch.tensor([n, k], device="cpu"),
        }
        if not self.symmetric:
            zero_point = q.zero_point.reshape(n, -1).to(torch.int8)
            tensors["weight_zero_point"] = self._packed_zero_point(zero_point)
        return tensors

    def read(self, tensors: Tensors, n: int, k: int) -> QuantizedTensor:
        codes = self._signed(from_words(tensors["weight_packed"].detach(), self.bits, k))
        scale = tensors["weight_scale"].detach().float()
        zero_point = torch.zeros(scale.shape, dtype=torch.int32, device=scale.device)
        if not self.symmetric:
            zero_point = self._signed(self._zero_point(tensors, n)).int()
        shape = self.granularity.qparams_shape((n, k))
        q = QParams(scale.reshape(shape), zero_point.reshape(shape), self.qmin, self.qmax, self.granularity)
        return QuantizedTensor(codes, q)

    def _zero_point(self, tensors: Tensors, n: int) -> torch.Tensor:
        """Unsigned zero points, uint8 [n, groups]."""
        columns = tensors["weight_zero_point"].detach().T.contiguous()
        return from_words(columns, self.bits, n).T.contiguous()

    def _packed_zero_point(self, zero_point: torch.Tensor) -> torch.Tensor:
        """`zero_point` int8 [n, groups], packed along n."""
        return to_words(self._unsigned(zero_point.T.contiguous()), self.bits).T.contiguous()

    def _unsigned(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.uint8) - self.qmin  # modulo 256

    def _signed(self, codes: torch.Tensor) -> torch.Tensor:
        return (codes + self.qmin).view(torch.int8)

    def shape(self, tensors: Tensors) -> tuple[int, int]:
        n, k = tensors["weight_shape"].tolist()
        return n, k

    # --- from floats ------------------------------------------------------------------------------------------------

    def qparams(self, weight: torch.Tensor) -> QParams:
        """Those that cover the range of each group, with 0 in it: docs/numerics.md, eq. 58 to 60.

        raises   ValueError for NaN or Inf, and if the weight needs scales that `scale_dtype` does not have
        """
        rows = self.granularity.to_rows(weight.detach())
        low, high = rows.amin(1).float().clamp_max(0), rows.amax(1).float().clamp_min(0)
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError("IntGroup: the weight holds NaN or Inf; finite values are needed")
        if self.symmetric:
            scale = torch.maximum(low / self.qmin, high / self.qmax)
        else:
            scale = (high / 2 - low / 2) / ((self.qmax - self.qmin) / 2)  # high - low may overflow
        is_zero = scale < SMALLEST_SCALE
        self._require_room(scale.masked_fill(is_zero, 0.0))
        scale = self.stored_scale(scale).masked_fill(is_zero, 1.0)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        if not self.symmetric:
            zero_point = (self.qmin - (low / scale).round()).clamp(self.qmin, self.qmax).int()
        shape = self.granularity.qparams_shape(weight.shape)
        return QParams(
            scale.reshape(shape), zero_point.reshape(shape), self.qmin, self.qmax, self.granularity
        )

    def scale_shape(self, n: int, k: int) -> tuple[int, ...]:
        return n, self._groups(k)

    def stored_scale(self, scale: torch.Tensor) -> torch.Tensor:
        dtype = SCALE_DTYPES[self.scale_dtype]
        if dtype is torch.float32:
            return scale
        size = scale.detach().abs()
        stored = size.to(dtype).float().clamp_max(torch.finfo(dtype).max)
        if dtype is torch.float16:  # its denormals are rounded up, so that nothing is clipped
            up = (size / LEAST_FLOAT16).ceil_().clamp_min_(1.0) * LEAST_FLOAT16
            stored = torch.where(size < LEAST_NORMAL_FLOAT16, up, stored)
        return stored.copysign(scale.detach())

    def _require_room(self, scale: torch.Tensor) -> None:
        largest = scale.max().item() if scale.numel() else 0.0
        if self.scale_dtype != "float16" or largest == 0:
            return
        if not ENOUGH_FOR_FLOAT16 <= largest <= torch.finfo(torch.float16).max:
            raise ValueError(
                f"{self.name}: the weight's largest scale is {largest:g}, and float16 has scales of "
                f"{ENOUGH_FOR_FLOAT16:.2g} .. 65504 that are fine enough; use scale_dtype='float32'"
            )

    # --- the packed form and the product ----------------------------------------------------------------------------

    def pack(self, tensors: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        codes = from_words(tensors["weight_packed"].detach(), self.bits, k)
        held = {
            "packed": self._packed_codes(codes),
            "packed_scale": to_strips(tensors["weight_scale"].detach()),
        }
        if not self.symmetric:
            held["packed_zero_point"] = to_strips(self._zero_point(tensors, n))
        return held

    def _packed_codes(self, codes: torch.Tensor) -> torch.Tensor:
        if self.bits == 8:
            return on_huge_pages(ops.pack_weight(self._signed(codes))[0])
        return on_huge_pages(ops.pack_planes(codes, self.bits))

    def unpack(self, held: Tensors, n: int, k: int) -> dict[str, torch.Tensor]:
        packed = held["packed"]
        if self.bits == 8:
            codes = self._unsigned(ops.unpack_weight(packed, n, k))
        else:
            codes = ops.unpack_planes(packed, n, k)
        tensors = {
            "weight_packed": to_words(codes, self.bits),
            "weight_scale": from_strips(held["packed_scale"], n),
        }
        if not self.symmetric:
            zero_point = self._signed(from_strips(held["packed_zero_point"], n))
            tensors["weight_zero_point"] = self._packed_zero_point(zero_point)
        return tensors

    def group_weight(self, *operands: Any) -> ops.GroupWeight:
        packed, scale, zero_point, n = operands
        size, offset = self.group_size or 0, -self.qmin if self.symmetric else 0
        return ops.GroupWeight(packed, scale, None, zero_point, None, None, n, self.bits, size, offset)

    def layer_weight(self, layer: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # A zero point times a float32 scale is rounded for the kernel: its weight may be another in the last bit.
        if not layer.is_packed or (self.scale_dtype == "float32" and not self.symmetric):
            return super().layer_weight(layer, dtype)
        return ops.dequantize_groups(self.group_weight(*self.operands_of(layer)), layer.in_features, dtype)

    # --- files ------------------------------------------------------------------------------------------------------

    def compressed_tensors(self) -> dict[str, Any]:
        groups: dict[str, Any] = {"strategy": "group", "group_size": self.group_size}
        if self.group_size is None:
            groups = {"strategy": "channel"}
        bits = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "dynamic": False}
        return {**bits, **groups}

    @classmethod
    def from_compressed_tensors(cls, weights: Mapping[str, Any]) -> WeightFormat | None:
        size = weights.get("group_size")
        try:
            format = cls(
                weights.get("num_bits", 8), None if size == -1 else size, weights.get("symmetric", True)
            )
        except (TypeError, ValueError):
            return None
        wanted = format.compressed_tensors()
        if weights.get("strategy") == "tensor":
            wanted["strategy"] = "tensor"
        return None if differs(weights, wanted) else format

    def adapt(self, layer: str, tensors: dict[str, torch.Tensor]) -> WeightFormat:
        self._pack_bytes(layer, tensors)
        packed, scale = tensors.get(f"{layer}.weight_packed"), tensors.get(f"{layer}.weight_scale")
        if packed is None or scale is None or packed.dim() != 2:
            return self  # whoever looks for them says so
        if scale.numel() == 1 and self.group_size is None:  # one of the whole tensor
            for name in (f"{layer}.weight_scale", f"{layer}.weight_zero_point"):
                if name in tensors and tensors[name].numel() == 1:
                    tensors[name] = tensors[name].reshape(1, 1).repeat(len(packed), 1)
            scale = tensors[f"{layer}.weight_scale"]
        self._adapt_zero_point(layer, tensors, scale)
        self._forget_order(layer, tensors)
        names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
        return replace(self, scale_dtype=names.get(scale.dtype, "float32"))

    def _pack_bytes(self, layer: str, tensors: dict[str, torch.Tensor]) -> None:
        """Int-quantized files have a byte for each code, `weight` int8 [n, k]."""
        codes = tensors.get(f"{layer}.weight")
        if codes is None or codes.dtype != torch.int8 or codes.dim() != 2 or not codes.numel():
            return
        low, high = (int(end) for end in codes.aminmax())
        if low < self.qmin or high > self.qmax:
            raise ValueError(
                f"load: {layer}.weight has codes {low} .. {high}, more than the {self.bits} bits it is said to have"
            )
        del tensors[f"{layer}.weight"]
        tensors[f"{layer}.weight_packed"] = to_words(self._unsigned(codes), self.bits)
        tensors[f"{layer}.weight_shape"] = torch.tensor(codes.shape)

    def _adapt_zero_point(self, layer: str, tensors: dict[str, torch.Tensor], scale: torch.Tensor) -> None:
        """Int-quantized files have them as they are, int8 [n, groups]; symmetric weights may have zeros for them."""
        name = f"{layer}.weight_zero_point"
        zero_point = tensors.get(name)
        if zero_point is not None and zero_point.dtype == torch.int8 and zero_point.shape == scale.shape:
            zero_point = tensors[name] = self._packed_zero_point(zero_point)
        if zero_point is None or not self.symmetric:
            return
        none = self._packed_zero_point(torch.zeros(scale.shape, dtype=torch.int8))
        if not torch.equal(zero_point, none):
            raise ValueError(f"load: {layer}.weight is described as symmetric and has zero points")
        tensors.pop(name)

    def _forget_order(self, layer: str, tensors: dict[str, torch.Tensor]) -> None:
        """`weight_g_idx` names the group of each column, in files of older versions whose columns were reordered."""
        order = tensors.pop(f"{layer}.weight_g_idx", None)
        if order is None:
            return
        if self.group_size is None or not torch.equal(order, torch.arange(len(order)) // self.group_size):
            raise ValueError(
                f"load: the groups of {layer}.weight are no neighbours (weight_g_idx, actorder='group'), and octavo "
                "reads groups of neighbours; have the model exported anew with actorder='static'"
            )
