# SPDX-License-Identifier: Apache-2.0
"""The metadata of a model that comes from no GGUF file: its config in llama.cpp's words.

These are transformers' own tables, read from right to left.
"""

from __future__ import annotations

from typing import Any

from ..skeleton import quiet_transformers
from .config import ARCHITECTURES, MORE_KEYS, OWN_KEYS, SPECIAL_TOKENS, Architecture
from .values import MetadataValue, number, text

# What transformers calls the models that llama.cpp has another name for.
_NAMES = {"mistral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
_TABLES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def architecture_name(model: Any) -> tuple[str, Architecture]:
    """What llama.cpp calls the architecture of `model`. Raises: ValueError if it has no name for it."""
    origin = getattr(model, "gguf_origin", None)
    if origin is not None:
        name = origin.source.first.architecture
        return name, ARCHITECTURES[name]
    kind = getattr(getattr(model, "config", None), "model_type", None)
    name = _NAMES.get(str(kind), str(kind))
    if name not in ARCHITECTURES:
        raise ValueError(
            f"the model is a {type(model).__name__} of type {kind!r}; GGUF files are written of transformers' models "
            f"of the architectures {', '.join(ARCHITECTURES)}"
        )
    return name, ARCHITECTURES[name]


def query_groups(config: Any) -> int:
    """How many query heads share a key."""
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_attention_heads // keys


def metadata_of(model: Any, name: str) -> dict[str, MetadataValue]:
    """The metadata of `model`, of the architecture that llama.cpp calls `name`, without a vocabulary.

    Raises: ValueError for a way of rescaling positions that files have no words for.
    """
    config = model.config
    found = {"general.architecture": text(name), "general.type": text("model")}
    title = str(getattr(config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]
    found["general.name"] = text(title or name)
    for key, value in _sizes(config, name).items():
        if isinstance(value, (bool, int, float)):
            kind = {bool: "bool", int: "uint32", float: "float32"}[type(value)]
            found[f"{name}.{key}"] = number(value, kind)
    found |= _rescaling(config, name)
    for field, key in SPECIAL_TOKENS.items():
        value = getattr(config, f"{field}_token_id", None)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and value >= 0:
            found[f"tokenizer.ggml.{key}_token_id"] = number(value)
    return found


def _sizes(config: Any, name: str) -> dict[str, Any]:
    architecture = ARCHITECTURES[name]
    table: Any = dict(architecture.config)
    if not table:
        with quiet_transformers():
            from transformers.integrations import GGUF_CONFIG_MAPPING
        table = GGUF_CONFIG_MAPPING[_TABLES.get(name, name)]
    table = {**table, **MORE_KEYS, **OWN_KEYS.get(name, {})}
    found = {key: getattr(config, field, None) for key, field in table.items() if field}
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    found["rope.freq_base"] = _rope(config).get("rope_theta")
    found["attention.head_count_kv"] = _key_heads(config)
    if architecture.is_causal and name != "gpt2":
        found["rope.dimension_count"] = head
    if "attention.key_length" in found and found["attention.key_length"]:
        found["attention.value_length"] = head
    if not found.get("feed_forward_length"):
        found["feed_forward_length"] = getattr(config, "n_inner", None) or 4 * config.hidden_size
    if name == "falcon":
        found["attention.layer_norm_epsilon"] = config.layer_norm_epsilon
    found["vocab_size"] = config.vocab_size
    return found


def _key_heads(config: Any) -> int:
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _rope(config: Any) -> dict[str, Any]:
    """What the config says of rotations; of several kinds of layers those that see all positions."""
    found = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def _rescaling(config: Any, name: str) -> dict[str, MetadataValue]:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return {}
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"the model rescales positions in the way {kind!r}; GGUF files are written of linear and yarn"
        )
    prefix = f"{name}.rope.scaling."
    found = {f"{prefix}type": text(kind), f"{prefix}factor": number(rope["factor"], "float32")}
    context = rope.get("original_max_position_embeddings")
    return found if context is None else {**found, f"{prefix}original_context_length": number(context)}
