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

from ... import ops
from .attention_call import AttentionCall
from .shared_input import SharedInput

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
NORMS = ("q_norm", "k_norm")  # of each head, before the rotation: Qwen3 has them


class RotaryAttention(nn.Module):
    """What `original`, an attention module of transformers with rotary embeddings, computes; for inference.

    original   has q_proj, k_proj, v_proj, o_proj and may have q_norm, k_norm, which become children of this module too
    attend     transformers' AttentionInterface: (module, query, key, value, mask, scaling=..., ...) -> (y, weights)
    call       the arguments that `original` takes, and what it hands to its cache and to `attend`

    raises   TypeError in a call with an argument that `original` would not take
    """

    def __init__(self, original: Any, attend: Callable[..., tuple[torch.Tensor, Any]], call: AttentionCall):
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.attend, self.call = attend, call
        self.head_dim: int = original.head_dim
        self.layer_idx: int = original.layer_idx
        self.is_causal: bool = getattr(original, "is_causal", True)
        # Asked for by transformers' function for torch's SDPA.
        self.num_key_value_groups: int = getattr(original, "num_key_value_groups", 1)
        self.train(original.training)
        self._shared = SharedInput([getattr(self, name) for name in PROJECTIONS])

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """The arguments of the original -> ([B, L, k], weights or None)."""
        y, weights = self.attended(*args, **kwargs)
        o_proj: Any = self._modules["o_proj"]
        return o_proj(y), weights

    def attended(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """What o_proj reads, [B, L, heads * head_dim], and the attention weights or None."""
        call = self.call
        given, options = call.named(args, kwargs)
        hidden_states, angles = given["hidden_states"], given["position_embeddings"]
        q, k, v = self.states(hidden_states, angles)
        cache = given.get(call.cache)
        if cache is not None:
            given["cos"], given["sin"] = angles
            k, v = call.updated(cache, given, options, k, v, self.layer_idx)
        handed_on = call.options_of(given, options)
        y, weights = self.attend(self, q, k, v, given.get("attention_mask"), **handed_on)
        return y.reshape(*hidden_states.shape[:2], -1), weights

    def states(
        self, hidden_states: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, [B, heads, L, head_dim] each.

        hidden_states [B, L, k]; angles: cos and sin, [B or 1, L, head_dim] each
        """
        batch, length, _ = hidden_states.shape
        modules: dict[str, Any] = self._modules
        shared = self._shared.of([modules[name] for name in PROJECTIONS])
        q, k, v = (x.view(batch, length, -1, self.head_dim) for x in shared(hidden_states))
        if "q_norm" in modules:
            q, k = modules["q_norm"](q), modules["k_norm"](k)
        q, k = ops.rope(q.transpose(1, 2), k.transpose(1, 2), *angles)
        return q, k, v.transpose(1, 2)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._shared.forget()
        super()._load_from_state_dict(*args)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, is_joined={self._shared.is_joined}"
