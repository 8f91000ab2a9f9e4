# SPDX-License-Identifier: Apache-2.0
"""What tests of checkpoints share: transformers models of a few thousand random weights, and folders of them."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(2, 12)


def llama(**options):
    """Two layers, head and embedding not tied: 15 linear layers."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **options})).eval()


def bert(kind=None):
    """Biases, and a head whose weight and bias are tied: 13 linear layers, and the head."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80, vocab_size=64
    )
    torch.manual_seed(0)
    return (kind or transformers.BertForMaskedLM)(config).eval()


def mixtral():
    """Files have a tensor for each expert under the name block_sparse_moe, the model one for all: 9 linear layers."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=64)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=11)
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads)).eval()


def llava():
    """Files have the names of an older class, such as language_model.model.layers: 29 linear layers."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def folder_of(model, folder: Path, **options) -> Path:
    """`model` as its own save_pretrained writes it, with what lies beside weights in folders from the hub."""
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    return folder


def edit_config(folder, **fields):
    """Gives fields of config.json other values."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def check_equal_states(found, expected):
    """The same tensors under the same names, bit for bit, and the same ties."""
    a, b = found.state_dict(keep_vars=True), expected.state_dict(keep_vars=True)
    assert a.keys() == b.keys()
    for name in b:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name
    ties = [
        {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)}
        for model in (found, expected)
    ]
    assert [len(set(tie.values())) for tie in ties[:1]] == [len(set(tie.values())) for tie in ties[1:]]
