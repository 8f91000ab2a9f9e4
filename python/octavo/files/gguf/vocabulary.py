# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of transformers in the words of GGUF: byte-level BPE, which most of today's models have.

llama.cpp knows rules that split text by names. The rule of a tokenizer is looked up among those that transformers
reads under these names; one that has none is refused, because another rule would make other tokens of the same text.
"""

from __future__ import annotations

import json
from typing import Any

from ..skeleton import quiet_transformers
from .values import MetadataValue, array, number, text

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def vocabulary_of(tokenizer: Any) -> dict[str, MetadataValue]:
    """The metadata that `tokenizer` becomes.

    Raises: TypeError if it is no fast tokenizer of transformers; ValueError for another kind than byte-level BPE, and
    for a rule that llama.cpp has no name for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"tokenizer is {type(tokenizer).__name__}, a fast tokenizer of transformers is needed"
        )
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(state.get("pre_tokenizer")):
        raise ValueError(
            f"tokenizer is of the kind {model.get('type')}, and only byte-level BPE is written; without tokenizer= the "
            "file has no vocabulary"
        )
    tokens = _tokens(model["vocab"], state.get("added_tokens", []))
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    found = {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(_rule(state["pre_tokenizer"])),
        "tokenizer.ggml.tokens": array([name for name, _ in tokens], "string"),
        "tokenizer.ggml.token_type": array([kind for _, kind in tokens], "int32"),
        "tokenizer.ggml.merges": array(merges, "string"),
    }
    for field, key in _SPECIAL.items():
        index = getattr(tokenizer, f"{field}_token_id", None)
        if index is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = number(index)
    begins = getattr(tokenizer, "add_bos_token", None)
    found["tokenizer.ggml.add_bos_token"] = number(bool(begins), "bool")
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = text(tokenizer.chat_template)
    return found


def _tokens(vocabulary: dict[str, int], added: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """(token, kind), by id; ids that nobody has are unused."""
    by_id = {index: (token, NORMAL) for token, index in vocabulary.items()}
    for entry in added:
        by_id[entry["id"]] = (entry["content"], CONTROL if entry["special"] else USER_DEFINED)
    return [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(max(by_id) + 1)]


def _rule(pre_tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which text is split before merging."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        with quiet_transformers():
            from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
        wanted = parts[0]["pattern"].get("Regex")
        for name, rule in GGUF_PRE_TOKENIZER_SPLITS.items():
            if rule == wanted:
                return name
    raise ValueError(
        f"tokenizer splits text by {' and '.join(kinds)} in a way that llama.cpp has no name for; without tokenizer= "
        "the file has no vocabulary"
    )
