# SPDX-License-Identifier: Apache-2.0
"""Tiny models of transformers as GGUF files, written by the package gguf as llama.cpp's converter writes them.

Nothing here is Octavo's: the tests compare with this. Rows of q and k are put into llama.cpp's order, gemma's norms
are written plus one, a Conv1D's weight as a Linear's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY, POSITIONS = 64, 96, 2, 4, 80, 64
IDS = torch.tensor([[3, 17, 5, 79, 0, 40, 8, 8]])


@dataclass
class Tiny:
    """A model, and how llama.cpp's converter names its sizes.

    keys       {key behind the architecture's name: value}
    rotated    whether q and k are permuted
    norm       what is added to the weights of norms
    """

    model: Any
    keys: dict[str, Any]
    rotated: bool = False
    norm: float = 0.0
    skipped: str = "(?!)"
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def _keys(config: Any, *, heads_kv: int | None = None, **others: Any) -> dict[str, Any]:
    keys = {
        "context_length": POSITIONS,
        "block_count": LAYERS,
        "feed_forward_length": INNER,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": heads_kv or HEADS,
    }
    return {**keys, **{key.replace("__", "."): value for key, value in others.items()}}


_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(architecture: str) -> Tiny:
    """A model of the architecture, with random weights and biases, and norms that are not all ones."""
    torch.manual_seed(0)
    made = _MADE[architecture]()
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "norm" in name.lower() or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" in name or "wte" in name:
                parameter.copy_(torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    made.model.eval()
    return made


def _llama(kind: str = "Llama", **more: Any) -> Tiny:
    config = getattr(transformers, f"{kind}Config")(
        **_SIZES, num_key_value_heads=2, rope_theta=5000.0, tie_word_embeddings=False, **more
    )
    keys = _keys(
        config,
        heads_kv=2,
        rope__dimension_count=HIDDEN // HEADS,
        rope__freq_base=5000.0,
        attention__layer_norm_rms_epsilon=config.rms_norm_eps,
    )
    return Tiny(getattr(transformers, f"{kind}ForCausalLM")(config), keys, rotated=kind == "Llama")


def _qwen3() -> Tiny:
    made = _llama("Qwen3", head_dim=32)
    made.keys |= {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    return made


def _moe(kind: str, **more: Any) -> Tiny:
    made = _llama(kind, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, **more)
    made.keys |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    return made


def _qwen2moe() -> Tiny:
    made = _moe("Qwen2Moe", shared_expert_intermediate_size=64)
    made.keys["expert_shared_feed_forward_length"] = 64
    return made


def _qwen3moe() -> Tiny:
    made = _moe("Qwen3Moe", head_dim=16, norm_topk_prob=True)
    made.keys["attention.key_length"] = 16
    return made


def _gemma(kind: str, **more: Any) -> Tiny:
    config = getattr(transformers, f"{kind}Config" if kind != "Gemma3" else "Gemma3TextConfig")(
        **_SIZES, num_key_value_heads=2, head_dim=32, **more
    )
    keys = _keys(
        config,
        heads_kv=2,
        attention__key_length=32,
        attention__value_length=32,
        attention__layer_norm_rms_epsilon=config.rms_norm_eps,
    )
    if "sliding_window" in more:
        keys["attention.sliding_window"] = more["sliding_window"]
    return Tiny(getattr(transformers, f"{kind}ForCausalLM")(config), keys, norm=1.0)


def _gemma3() -> Tiny:
    made = _gemma("Gemma3", sliding_window=16)
    made.keys["rope.freq_base"] = 1e6
    return made


def _phi3() -> Tiny:
    config = transformers.Phi3Config(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False)
    keys = _keys(config, heads_kv=2, attention__layer_norm_rms_epsilon=config.rms_norm_eps)
    return Tiny(transformers.Phi3ForCausalLM(config), {**keys, "rope.dimension_count": HIDDEN // HEADS})


def _gpt2() -> Tiny:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS
    )
    keys = _keys(config, attention__layer_norm_epsilon=config.layer_norm_epsilon)
    return Tiny(transformers.GPT2LMHeadModel(config), keys)


def _falcon() -> Tiny:
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS
    )
    keys = _keys(config, heads_kv=1, attention__layer_norm_epsilon=config.layer_norm_epsilon)
    return Tiny(transformers.FalconForCausalLM(config), {**keys, "feed_forward_length": 4 * HIDDEN})


def _starcoder2() -> Tiny:
    config = transformers.Starcoder2Config(**_SIZES, num_key_value_heads=2, rope_theta=5000.0)
    keys = _keys(
        config,
        heads_kv=2,
        rope__freq_base=5000.0,
        attention__layer_norm_epsilon=config.norm_epsilon,
    )
    return Tiny(transformers.Starcoder2ForCausalLM(config), keys)


def _bert() -> Tiny:
    config = transformers.BertConfig(**_SIZES)
    keys = _keys(config, attention__layer_norm_epsilon=config.layer_norm_eps)
    model = transformers.BertModel(config, add_pooling_layer=False)
    return Tiny(model, keys, skipped="embeddings.position_ids")


_MADE = {
    "llama": _llama,
    "qwen2": lambda: _llama("Qwen2"),
    "qwen3": _qwen3,
    "qwen2moe": _qwen2moe,
    "qwen3moe": _qwen3moe,
    "gemma": lambda: _gemma("Gemma"),
    "gemma2": lambda: _gemma("Gemma2", sliding_window=16),
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "falcon": _falcon,
    "starcoder2": _starcoder2,
    "bert": _bert,
}
ARCHITECTURES = tuple(_MADE)


def write(
    architecture: str,
    made: Tiny,
    path: Path,
    types: Mapping[str, str] | str = "Q8_0",
    extra: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Writes the file, and puts what its blocks decode to into `made.model`.

    types   of matrices: one for all, or {pattern for names in the file: type}, the first that matches; F32 for the rest
    extra   tensors of the file that are none of the model
    """
    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(kind, LAYERS)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in made.keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"{architecture}.{key}", value
        )
    writer.add_string("general.name", f"tiny {architecture}")
    for key, number in (("bos", 1), ("eos", 2), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    with torch.no_grad():
        state = reversed(made.model.state_dict().items())
        for name, tensor in {t.data_ptr(): (n, t) for n, t in state}.values():  # tied ones once
            if not re.search(made.skipped, name):
                _add(writer, made, table, name, tensor, types)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, made: Tiny, table: Any, name: str, tensor: torch.Tensor, types: Any) -> None:
    stem, leaf = name.rsplit(".", 1)
    if leaf == "gate_up_proj":  # of all experts
        base = table.get_name(f"{stem}.down_proj").replace("down", "{}")
        for part, view in zip(("gate", "up"), tensor.chunk(2, dim=1), strict=True):
            _store(writer, made, f"{base.format(part)}.weight", view, types, 0)
        return
    target = table.get_name(name) if leaf == "down_proj" else table.get_name(stem)
    target = f"{target}.{leaf if leaf == 'bias' else 'weight'}"
    owner = made.model.get_submodule(stem)
    view = tensor.T if type(owner).__name__ == "Conv1D" and leaf == "weight" else tensor
    heads = 0
    if made.rotated and re.search(r"attn_[qk]\.", target):
        heads = HEADS if "attn_q" in target else 2
    if "ffn_gate_inp_shexp" in target:
        view = view[0]
    _store(writer, made, target, view, types, heads)


def _store(writer: Any, made: Tiny, target: str, view: torch.Tensor, types: Any, heads: int) -> None:
    """Writes a tensor; `view`, of the model's own memory, gets what was written."""
    type = "F32"
    if view.dim() > 1:
        patterns = {"": types} if isinstance(types, str) else types
        type = next((each for pattern, each in patterns.items() if re.search(pattern, target)), "F32")
    values = view.detach().numpy().copy()
    if target.endswith("norm.weight"):
        values = values + np.float32(made.norm)
    if heads:  # llama.cpp's convert_hf_to_gguf.py: LlamaModel.permute
        values = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        values = values.swapaxes(1, 2).reshape(view.shape)
    number = gguf.GGMLQuantizationType[type]
    stored = gguf.quants.quantize(values, number)
    writer.add_tensor(target, stored, raw_dtype=number)
    read = gguf.quants.dequantize(stored, number).reshape(view.shape)
    if heads:
        read = read.reshape(heads, len(read) // heads // 2, 2, *read.shape[1:]).swapaxes(1, 2)
        read = read.reshape(view.shape)
    if target.endswith("norm.weight"):
        read = read - np.float32(made.norm)
    view.copy_(torch.from_numpy(np.ascontiguousarray(read)))
