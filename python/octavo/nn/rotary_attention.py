# SPDX-License-Identifier: Apache-2.0
"""RotaryAttention: the attention of Llama-like decoders in few calls.

Queries, keys and values come from one product where their layers allow it, and are rotated by one operator; the cache
and the attention function are those of the model. Parameters and children keep the names they had.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .. import ops
from .shared_input import SharedInput

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NORMS = ("q_norm", "k_norm")  # of each head, before the rotation: Qwen3 has them


class RotaryAttention(nn.Module):
    """What `original`, an attention module of transformers with rotary embeddings, computes; for inference.

    original   has q_proj, k_proj, v_proj, o_proj and may have q_norm, k_norm, which become children of this module too
    attend     transformers' AttentionInterface: (module, query, key, value, mask, scaling=..., ...) -> (y, weights)
    """

    def __init__(self, original: Any, attend: Callable[..., tuple[torch.Tensor, Any]]):
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.attend = attend
        self.head_dim: int = original.head_dim
        self.layer_idx: int = original.layer_idx
        self.scaling: float = original.scaling
        self.is_causal: bool = getattr(original, "is_causal", True)
        # Asked for by transformers' function for torch's SDPA.
        self.num_key_value_groups: int = getattr(original, "num_key_value_groups", 1)
        self.train(original.training)
        self._shared = SharedInput([getattr(self, name) for name in PROJECTIONS])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """The arguments of `attended` -> ([B, L, k], weights or None)."""
        y, weights = self.attended(*args, **kwargs)
        o_proj: Any = self._modules["o_proj"]
        return o_proj(y), weights

    def attended(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """What o_proj reads, [B, L, heads * head_dim], and the attention weights or None.

        hidden_states [B, L, k]; position_embeddings: cos and sin, [B or 1, L, head_dim] each
        """
        batch, length, _ = hidden_states.shape
        modules: dict[str, Any] = self._modules
        shared = self._shared.of([modules[name] for name in PROJECTIONS])
        q, k, v = (x.view(batch, length, -1, self.head_dim) for x in shared(hidden_states))
        if "q_norm" in modules:
            q, k = modules["q_norm"](q), modules["k_norm"](k)
        q, k = ops.rope(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        v = v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        y, weights = self.attend(self, q, k, v, attention_mask, scaling=self.scaling, **options)
        return y.reshape(batch, length, -1), weights

    def _load_from_state_dict(self, *args: Any) -> None:
        self._shared.forget()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, is_joined={self._shared.is_joined}"
