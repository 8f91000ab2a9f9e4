# SPDX-License-Identifier: Apache-2.0
"""QuantEmbedding: an embedding whose weight is quantized, and PreparedEmbedding, which it is on the way to that.

The weight [num_embeddings, embedding_dim] is one of n rows and k columns. Packed, it is what a linear layer of k inputs
and n outputs has, and so a head that is tied to the embedding multiplies by the same memory from which this layer reads
rows. For files, packing and training an embedding is a linear layer without bias; only its call is another one.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..tensors.qparams import QParams
from .linear import LinearScheme, QuantLinear
from .prepared import PreparedLinear
from .replacements import EMBEDDING

TRIAL_ROWS = 8


class QuantEmbedding(QuantLinear):
    """Row ids[...] of a quantized weight, times `embed_scale` if the float layer had one.

    embedding_dim, num_embeddings   k and n, which are `in_features` and `out_features` as well
    scheme                          of it, the weight format is used: nothing is read but ids

    `padding_idx` is a row like any other: zeros have codes that stand for zeros, in each format. All tensors are
    frozen, and ids have no gradient. Arguments and the rest as QuantLinear.
    """

    replaces = EMBEDDING
    padding_idx: int | None = None
    embed_scale: Any  # a buffer that no file has, a number or None

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int,
        bias: bool = False,
        *,
        scheme: LinearScheme,
        device: torch.device | str | None = None,
    ):
        super().__init__(embedding_dim, num_embeddings, bias=False, scheme=scheme, device=device)
        self.embed_scale = None

    @property
    def num_embeddings(self) -> int:
        return self.out_features

    @property
    def embedding_dim(self) -> int:
        return self.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [...] int64 or int32, 0 .. num_embeddings - 1, to [..., embedding_dim] in `weight_dtype`.

        raises   IndexError for an id that is no row; TypeError for another dtype
        """
        rows = self.scheme.weights.rows(self, input, self.weight_dtype)
        return scaled(rows, self.embed_scale)

    def take_settings_(self, embedding: Any) -> None:
        """Takes from `embedding`, the float or the prepared layer, what is neither weight nor size."""
        _take_settings_(self, embedding)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        weights = self.scheme.weights
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, scheme={self.scheme.name}, bits={weights.bits}, "
            f"granularity={weights.granularity.name}"
        )


class PreparedEmbedding(PreparedLinear):
    """Rows of the fake-quantized weight; while calibrating, of the float one. Arguments and the rest as PreparedLinear.

    Each code is the nearest one: methods that choose codes by what the layer's input is have nothing to look at here.
    """

    padding_idx: int | None = None
    embed_scale: Any

    def __init__(self, embedding: nn.Module, scheme: Any, **options: Any):
        super().__init__(embedding, scheme, **options)
        _take_settings_(self, embedding)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input [...] int64 or int32 to [..., embedding_dim] in the weight's dtype."""
        weight = self.weight if self.is_calibrating else self.fake_quantized_weight()
        return scaled(F.embedding(input, weight, self.padding_idx), self.embed_scale)

    def _range_of(self, weight: torch.Tensor) -> QParams:
        return self.scheme.weights.qparams(weight)


def scaled(rows: torch.Tensor, scale: Any) -> torch.Tensor:
    """`rows` times the scale of an embedding: a tensor, which is rounded to their dtype first, a number or None."""
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)


def obstacle_of(embedding: Any) -> str:
    """Why a quantized layer would not do what `embedding`, a float one, does, in words; "" if it would."""
    if embedding.max_norm is not None:
        return "max_norm shortens rows of the weight in each call, and a quantized weight is frozen"
    for name in ("sparse", "scale_grad_by_freq"):
        if getattr(embedding, name):
            return f"{name} is about gradients of a weight that will be frozen: set embedding.{name} = False"
    if not _is_plain(embedding) and not _multiplies(embedding):
        return (
            f"{type(embedding).__name__} has a forward of its own, which is no embedding times `embed_scale`"
        )
    return ""


def _take_settings_(layer: Any, embedding: Any) -> None:
    layer.padding_idx = getattr(embedding, "padding_idx", None)
    is_float = isinstance(embedding, nn.Embedding)
    scale = getattr(embedding, "embed_scale", None) if not is_float or _multiplies(embedding) else None
    layer.__dict__.pop("embed_scale", None)
    if isinstance(scale, torch.Tensor):
        layer.register_buffer("embed_scale", scale.detach(), persistent=False)
    else:
        layer.embed_scale = scale


def _is_plain(embedding: nn.Module) -> bool:
    return type(embedding).forward is nn.Embedding.forward


def _multiplies(embedding: nn.Module) -> bool:
    """Whether a layer of a subclass gives rows times `embed_scale`, as Gemma 3's and BART's do: a few are tried."""
    scale: Any = getattr(embedding, "embed_scale", None)
    if _is_plain(embedding) or scale is None:
        return False
    trial: Any = copy.copy(embedding)
    if getattr(scale, "is_meta", False):  # any other number shows what is done with it
        scale = torch.tensor(1.5, dtype=scale.dtype, device="cpu")
        trial.__dict__["_buffers"] = {**embedding._buffers, "embed_scale": scale}
    trial.padding_idx = None
    generator = torch.Generator(device="cpu").manual_seed(0)
    weight = torch.randn(TRIAL_ROWS, 4, generator=generator, device="cpu")
    trial.__dict__["_parameters"] = {"weight": nn.Parameter(weight, requires_grad=False)}
    ids = torch.tensor([[5, 0, 3], [3, 7, 1]], device="cpu")
    try:
        with torch.no_grad():
            return torch.equal(type(embedding).forward(trial, ids), scaled(F.embedding(ids, weight), scale))
    except Exception:  # whatever a forward does that takes something else than ids
        return False
