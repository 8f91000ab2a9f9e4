# SPDX-License-Identifier: Apache-2.0
"""What tests of fusion share: tiny models of transformers whose heads have a size that attention computes itself."""

import pytest
import torch

from octavo.nn.fused.attention_call import cache_parameter

transformers = pytest.importorskip("transformers")

IDS = torch.arange(24).reshape(2, 12) % 60 + 1
PADDED = {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 12, [1] * 7 + [0] * 5])}
WIDTHS = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=64)
DECODER = dict(**WIDTHS, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def _made(kind: str, config: str, sizes=None, **options):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**(sizes or {}), **options})).eval()


def with_cache(cache) -> dict:
    """The argument for transformers' cache, by the name that the installed version has for it."""
    return {cache_parameter(transformers.LlamaForCausalLM.forward): cache}


def bert(**options):
    return _made("BertModel", "BertConfig", WIDTHS, num_attention_heads=4, **options)


def distilbert():
    sizes = dict(dim=64, hidden_dim=96, n_layers=2, n_heads=4, vocab_size=64)
    return _made("DistilBertModel", "DistilBertConfig", **sizes)


def roberta():
    return _made("RobertaModel", "RobertaConfig", **WIDTHS, num_attention_heads=4)


def vit():
    sizes = {name: size for name, size in WIDTHS.items() if name != "vocab_size"}
    return _made("ViTModel", "ViTConfig", **sizes, num_attention_heads=4, image_size=32, patch_size=8)


def llama(**options):
    return _made("LlamaForCausalLM", "LlamaConfig", DECODER, **options)


def mistral(**options):
    return _made("MistralForCausalLM", "MistralConfig", DECODER, **options)


def qwen2():
    return _made("Qwen2ForCausalLM", "Qwen2Config", **DECODER)


def gemma():
    return _made("GemmaForCausalLM", "GemmaConfig", **DECODER)


def batch_of(model):
    """One batch with padding, or images for a model of those."""
    if "pixel_values" in model.main_input_name:
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    return PADDED


def options_of(block, model, inputs) -> dict:
    """What `model` hands to `block` by name: in some versions of transformers positions, which it makes no use of."""
    options = {}
    hook = block.register_forward_pre_hook(lambda _, args, kwargs: options.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return options


def outputs(model, batch=None) -> torch.Tensor:
    """The model's main output for its batch, where that is no padding."""
    batch = batch_of(model) if batch is None else batch
    with torch.no_grad():
        result = model(**batch)
    y = result.logits if hasattr(result, "logits") else result.last_hidden_state
    mask = batch.get("attention_mask")
    return y if mask is None else y[mask.bool()]


ENCODERS = {"bert": bert, "distilbert": distilbert, "roberta": roberta, "vit": vit}
DECODERS = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "gemma": gemma}
MODELS = {**ENCODERS, **DECODERS}
