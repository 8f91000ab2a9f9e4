# SPDX-License-Identifier: Apache-2.0
"""The model of transformers that a GGUF file's metadata describe, without weights.

transformers knows how llama.cpp's keys translate into its configs, but reads the whole file for it, token by token of
the vocabulary: seconds. So it is given a twin of the file: the same keys but for the vocabulary, and all tensors by
their names with one number each. What its tables leave out, and what only shapes tell, is added here.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...nn.experts import split_experts_
from ..skeleton import named_errors, quiet_transformers, without_weights
from .header import GGUFHeader, header_bytes
from .parts import GGUFFile
from .values import array

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
_VOCABULARY, _LONGEST_ARRAY = "tokenizer.ggml.tokens", 1024


@dataclass(frozen=True)
class Architecture:
    """How a model of one of llama.cpp's architectures differs from the one of transformers.

    rotates_rows   whether the rows of q and k lie in the order in which llama.cpp rotates pairs of them
    norm_offset    what the weights of norms are larger by in the file
    is_causal      whether it writes text; else it is an encoder
    config         {key behind the architecture's name: field of the config}, where transformers has no such table
    kind           what transformers calls the model, where it has no such table
    """

    rotates_rows: bool = False
    norm_offset: float = 0.0
    is_causal: bool = True
    config: tuple[tuple[str, str], ...] = ()
    kind: str = ""


_SIZES = (
    ("context_length", "max_position_embeddings"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("embedding_length", "hidden_size"),
    ("attention.head_count", "num_attention_heads"),
)
_GEMMA = (
    *_SIZES,
    ("attention.key_length", "head_dim"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
)
ARCHITECTURES = {
    "llama": Architecture(rotates_rows=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen2moe": Architecture(),
    "qwen3moe": Architecture(),
    "gemma": Architecture(norm_offset=1.0, config=_GEMMA, kind="gemma"),
    "gemma2": Architecture(norm_offset=1.0),
    "gemma3": Architecture(norm_offset=1.0),
    "phi3": Architecture(),
    "gpt2": Architecture(),
    "falcon": Architecture(),
    "starcoder2": Architecture(),
    "bert": Architecture(
        is_causal=False,
        config=(*_SIZES, ("attention.layer_norm_epsilon", "layer_norm_eps")),
        kind="bert",
    ),
}
# Keys that the tables of transformers leave out: without them a model of another size has the default's.
MORE_KEYS = {
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}
# Of one architecture only.
OWN_KEYS = {
    "gpt2": {"context_length": "n_positions"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "falcon": {
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
        "feed_forward_length": "ffn_hidden_size",
    },
}


def architecture_of(model: GGUFFile) -> Architecture:
    """Raises: ValueError for an architecture that is not opened, with those that are."""
    name = model.first.architecture
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{model.path} is of the architecture {name!r}; opened are {', '.join(ARCHITECTURES)}. "
            "octavo.inspect_checkpoint and `octavo inspect` show what it holds"
        )
    return ARCHITECTURES[name]


def gguf_skeleton(model: GGUFFile, as_floats: bool = False) -> Any:
    """The float model that `model` describes, in eval mode, its weights on the meta device.

    as_floats   experts stay as transformers has them; otherwise they are layers

    Raises: ValueError for an architecture that is not opened, and if the metadata do not make a model.
    """
    architecture = architecture_of(model)
    _require_understood(model)
    with quiet_transformers() as transformers, named_errors(model.path, "make a config of its metadata"):
        fields = _fields(transformers, model, architecture)
        kind = transformers.AutoConfig.for_model(fields["model_type"]).__class__
        config = kind.from_dict({**fields, **_left_out(model, kind, fields)})
        auto = transformers.AutoModelForCausalLM if architecture.is_causal else transformers.AutoModel
        found = auto._model_mapping[type(config)]
        config.architectures = [found.__name__]
    options = {} if architecture.is_causal else {"add_pooling_layer": False}
    skeleton = without_weights(found, config, model.path, **options)
    _rescale_rotations(model, skeleton)
    if not as_floats:
        split_experts_(skeleton)
    return skeleton


def _rescale_rotations(model: GGUFFile, skeleton: Any) -> None:
    """Llama 3.1 and later divide the frequencies of rotations by a tensor of the file."""
    info = model.tensors.get(ROPE_FACTORS)
    if info is None:
        return
    factors = model.mapped()[ROPE_FACTORS].view(torch.float32) if info.type == "F32" else torch.empty(0)
    for module in skeleton.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, torch.Tensor):
                if factors.shape != frequencies.shape:
                    raise ValueError(f"{model.path}: {ROPE_FACTORS} must be F32 {list(frequencies.shape)}")
                setattr(module, name, frequencies / factors)


def _require_understood(model: GGUFFile) -> None:
    """Raises: ValueError for a model that would be computed wrongly."""
    tensors = model.tensors
    name = model.first.architecture
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        raise ValueError(
            f"{model.path} is a falcon with two norms in a block (40B); only those with one are opened"
        )
    for key in (EMBEDDING, "blk.0.attn_norm.weight"):
        if key not in tensors and not (name == "bert" and key != EMBEDDING):
            raise ValueError(f"{model.path} is damaged, or no model: it has no tensor {key!r}")
    for key in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if key in tensors:
            raise ValueError(f"{model.path} rescales positions by {key}, which is not computed")
    scaling = model.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"{model.path} rescales positions in the way {scaling!r}, which is not computed")


def _fields(transformers: Any, model: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """The config's fields, by transformers' tables or by ours."""
    name = model.first.architecture
    if architecture.config:
        fields = {field: model.get(f"{name}.{key}") for key, field in architecture.config}
        fields = {field: value for field, value in fields.items() if value is not None}
        ids = {
            f"{each}_token_id": model.get(f"tokenizer.ggml.{key}_token_id")
            for each, key in SPECIAL_TOKENS.items()
        }
        return {"model_type": architecture.kind, **fields, **ids}
    with tempfile.TemporaryDirectory() as folder, _silenced("transformers.modeling_gguf_pytorch_utils"):
        _write_twin(model, Path(folder, "twin.gguf"))
        fields, _ = transformers.PretrainedConfig.get_config_dict(folder, gguf_file="twin.gguf")
    return fields


def _left_out(model: GGUFFile, kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """What the tables leave out, and what shapes tell."""
    name, tensors = model.first.architecture, model.tensors
    defaults = kind()
    found: dict[str, Any] = {"vocab_size": tensors[EMBEDDING].shape[0]}
    for key, field in {**MORE_KEYS, **OWN_KEYS.get(name, {})}.items():
        value = model.get(f"{name}.{key}")
        is_known = hasattr(defaults, field) or (
            field == "rope_theta" and hasattr(defaults, "rope_parameters")
        )
        is_computed = isinstance(getattr(kind, field, None), property)  # falcon's head_dim
        if value is not None and field not in fields and is_known and not is_computed:
            found[field] = value
    if ARCHITECTURES[name].is_causal:  # transformers ties falcon's even where the file has both
        found["tie_word_embeddings"] = HEAD not in tensors
    if hasattr(defaults, "attention_bias") and name == "llama":
        found["attention_bias"] = "blk.0.attn_q.bias" in tensors
    scaling = model.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        found["rope_scaling"] = _rope_scaling(model, f"{name}.rope.scaling.", scaling)
    if "token_types.weight" in tensors:
        found["type_vocab_size"] = tensors["token_types.weight"].shape[0]
    return found


def _rope_scaling(model: GGUFFile, prefix: str, type: str) -> dict[str, Any]:
    fields = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    values = {field: model.get(prefix + key) for key, field in fields.items()}
    return {"rope_type": type, **{field: value for field, value in values.items() if value is not None}}


def _write_twin(model: GGUFFile, path: Path) -> None:
    """The file that transformers reads the config from."""
    first: GGUFHeader = model.first
    keys = {
        key: value
        for key, value in first.metadata.items()
        if (value.length or 0) <= _LONGEST_ARRAY and not key.startswith("split.")
    }
    keys[_VOCABULARY] = array([""], "string")  # how many there are is told by the embedding
    tensors = [(name, 0, (1,), 4) for name in model.tensors]
    data = bytes(len(tensors) * first.alignment)
    path.write_bytes(header_bytes(3, keys, tensors, first.alignment) + data)


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    """Nothing is said about keys that the twin lacks on purpose."""
    found = logging.getLogger(logger)
    before = found.disabled
    found.disabled = True
    try:
        yield
    finally:
        found.disabled = before
