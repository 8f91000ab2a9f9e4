# SPDX-License-Identifier: Apache-2.0
"""RotaryAttention and the step that finds it: the attention of Llama-like models, with and without a cache."""

import pytest
import torch

import octavo
from asserts import assert_bits_equal
from fusion_models import DECODER, IDS, PADDED, _made, llama, mistral, outputs
from octavo.nn import RotaryAttention


def qwen3():
    return _made("Qwen3ForCausalLM", "Qwen3Config", **DECODER)


def rows_of(report):
    return [row for row in report.rows if row.step == "rotary"]


def decoded(model, cache):
    """The logits of 5 tokens one after another, behind a prompt of 12."""
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        return torch.cat([model(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(5)], 1)


@pytest.mark.parametrize("make", [llama, qwen3], ids=["llama", "qwen3"])
def test_a_float_model_decodes_the_same_but_for_rounding(make):
    """2 layers of about 10 operators, each off by at most 2^-19 of what it gives."""
    model = make()
    expected = decoded(model, octavo.nn.KVCache(model.config))
    report = octavo.fuse_(model, IDS, attention="float32")
    assert [row.action for row in rows_of(report)] == ["fused", "fused"], report
    for cache in (octavo.nn.KVCache(model.config), None):
        if cache is not None:
            found = decoded(model, cache)
            assert (found - expected).norm() <= 2**-14 * expected.norm()


def test_queries_keys_and_values_come_from_one_product():
    model = octavo.quantized(llama(), octavo.Int8Dynamic())
    octavo.fuse_(model, IDS, attention="float32")
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, RotaryAttention) and "is_joined=True" in repr(attention)


def test_joining_changes_no_bit():
    model = octavo.quantized(llama(), octavo.Int8Dynamic())
    octavo.fuse_(model, IDS, attention="float32")
    together = outputs(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)  # hooked layers are called one by one
        assert "is_joined=False" in repr(layer.self_attn)
    assert_bits_equal(outputs(model), together)


def test_a_layer_that_somebody_replaces_is_the_one_that_counts():
    """As adapters do: they put a layer of their own around ours."""
    model = octavo.quantized(llama(), octavo.Int8Dynamic())
    octavo.fuse_(model, IDS, attention="float32")
    before = outputs(model)
    attention = model.model.layers[0].self_attn
    attention.v_proj = wrapper = torch.nn.Sequential(attention.v_proj).eval()
    wrapper.register_forward_hook(lambda module, args, y: y * 0)
    assert not torch.equal(outputs(model), before)


def test_the_mask_of_padding_counts():
    model = llama()
    expected = outputs(model)
    octavo.fuse_(model, PADDED, attention="float32")
    assert (outputs(model) - expected).norm() <= 2**-14 * expected.norm()


@pytest.mark.parametrize(
    ("make", "change", "reason"),
    [
        (llama, lambda part: part.add_module("extra", torch.nn.ReLU().eval()), "its parts are extra, k_proj"),
        (llama, lambda part: part.register_forward_hook(lambda *_: None), "hooks"),
        (llama, lambda part: setattr(part, "o_proj", torch.nn.Identity().eval()), "not linear layers"),
        (llama, lambda part: setattr(part, "sliding_window", 4), "sliding window"),
        (llama, lambda part: setattr(part, "scaling", 0.5), ""),
    ],
    ids=["parts", "hooks", "no linear", "window", "scale"],
)
def test_what_it_does_not_know_stays_with_the_reason(make, change, reason):
    model = make()
    for layer in model.model.layers:
        change(layer.self_attn)
    report = octavo.fuse_(model, IDS, attention="float32")
    assert all(reason in row.reason and (row.action == "kept") == bool(reason) for row in rows_of(report)), (
        report
    )


def test_without_octavos_attention_it_stays():
    report = octavo.fuse_(llama(), IDS, attention=None)
    assert rows_of(report) == []


def test_a_wrong_replacement_is_noticed():
    """A class with the same parts that computes something else."""
    model = mistral()
    for layer in model.model.layers:
        attention = layer.self_attn
        kind = type(attention)

        class Doubled(kind):
            def forward(self, hidden_states, position_embeddings, **kwargs):
                return super().forward(2 * hidden_states, position_embeddings, **kwargs)

        attention.__class__ = Doubled
        attention.sliding_window = None
    report = octavo.fuse_(model, IDS, attention="float32")
    assert [row.action for row in rows_of(report)] == ["kept", "kept"], report
