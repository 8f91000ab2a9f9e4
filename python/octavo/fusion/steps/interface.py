# SPDX-License-Identifier: Apache-2.0
"""octavo.ops.attention as transformers' AttentionInterface wants it, and its registration under names of ours.

What the operator does not know (a bias by position, attention weights as a result, odd head sizes) goes on to the
function for torch's SDPA, call by call; what neither knows is refused.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from ... import ops
from ...nn.fused.capturing import collected

# The precision of ops.attention -> the name of the implementation.
NAMES = {name: "octavo" if name == "auto" else f"octavo_{name}" for name in ops.PRECISIONS}
# Parameters of transformers' function for torch's SDPA that attention_forward reads as it does.
KNOWN = ("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal")
_others_of_sdpa = ["position_bias"]  # and what _read_sdpa finds; a list, which torch.compile reads as it is
NO_DROPOUT = "octavo's attention has no dropout: call model.eval(), or octavo.unfuse_(model) before training"
NO_WEIGHTS = (
    "octavo's attention gives no attention weights, which output_attentions=True asks for: call octavo.unfuse_(model), "
    "and model.set_attn_implementation('eager') if it was another one"
)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    precision: str = "auto",
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Octavo's attention with the signature that transformers' AttentionInterface wants.

    query    [B, H, Lq, D]; key and value [B, Hkv, Lk, D]

    returns  [B, Lq, H, D] and no weights
    raises   ValueError for dropout, attention sinks, a softcap, and where attention weights are asked for
    """
    if options.get("dropout"):
        raise ValueError(NO_DROPOUT)
    if options.get("output_attentions") or _collects_weights():
        raise ValueError(NO_WEIGHTS)
    if options.get("s_aux") is not None:
        raise ValueError("octavo's attention has no sinks: call octavo.unfuse_(model)")
    if options.get("softcap") is not None:
        raise ValueError("octavo's attention has no softcap: call octavo.unfuse_(model)")
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    # As SDPA's function reads these: one query looks at everything, and a mask says all there is to say.
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    # torch's causal mask begins at the first key, ours ends at the last one.
    if not is_native(query, key, value, options) or (causal and query.shape[2] != key.shape[2]):
        return sdpa(module, query, key.to(query.dtype), value.to(query.dtype), attention_mask, **options)
    batch, heads, length, size = query.shape
    y = ops.attention(
        query, key, value, attention_mask, causal=causal, scale=options.get("scaling"), precision=precision
    )
    return y.view(batch, length, heads, size), None


def is_native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether ops.attention computes this call; `options` are what the AttentionInterface hands on."""
    size = query.shape[-1]
    is_plain = not any(options.get(name) is not None for name in ("cache", "softcap", *_others_of_sdpa))
    return (
        is_plain and not options.get("output_attentions") and is_native_size(size) and value.shape[-1] == size
    )


def is_native_size(head_dim: int) -> bool:
    """Whether ops.attention takes heads of this size; torch computes heads of other sizes."""
    return head_dim % 16 == 0 and head_dim <= 128


def running(precision: str) -> str:
    """The precision that `precision` stands for on this CPU: "auto" is one of the others."""
    if precision != "auto":
        return precision
    x = torch.zeros(1, 1, 1, 16)
    try:
        ops.attention(x, x, x, precision="bfloat16")
    except ValueError:
        return "float32"
    return "bfloat16"


def _collects_weights() -> bool:
    """Whether transformers collects what attention modules return. Not all models hand output_attentions on to them."""
    return not torch.compiler.is_compiling() and any(name.endswith("attentions") for name in collected())


def sdpa(*args: Any, **options: Any) -> Any:
    """transformers' function for torch's SDPA."""
    return _interface()["sdpa"](*args, **options)


def _interface() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def register_attention(name: str, function: Any) -> None:
    """Makes `name` known to transformers, with masks as torch's SDPA takes them: bool or none."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def _read_sdpa() -> None:
    """Notes the parameters of transformers' function that are not known here: position_bias, and later ones."""
    parameters = inspect.signature(_interface()["sdpa"]).parameters.values()
    others = [p.name for p in parameters if p.name not in KNOWN and p.kind is not p.VAR_KEYWORD]
    _others_of_sdpa.extend(name for name in others if name not in _others_of_sdpa)


class Registration:
    """Registers our functions when it is made; a part of fused models, so that unpickling one does it as well."""

    def __init__(self) -> None:
        _read_sdpa()
        for precision, name in NAMES.items():
            register_attention(name, partial(attention_forward, precision=precision))

    def __reduce__(self) -> tuple:
        return Registration, ()
