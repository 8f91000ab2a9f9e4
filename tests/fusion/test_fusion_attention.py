# SPDX-License-Identifier: Apache-2.0
"""Attention of transformers models: which calls are octavo's, which stay torch's, and which are refused."""

import pickle

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from fusion_models import DECODER, IDS, PADDED, bert, llama, mistral, outputs, transformers, with_cache
from torch import nn
from torch.nn import functional as F

import octavo
from octavo import ops
from octavo.fusion.steps.interface import attention_forward, is_native
from octavo.nn.fused.attention_call import cache_of


def attention_rows(model, example=PADDED, **options):
    report = octavo.fuse_(model, example, **options)
    return [row for row in report.rows if row.step == "attention"]


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each call of ops.attention."""
    seen = []
    attention = ops.attention

    def watched(q, k, v, mask=None, **options):
        seen.append({"q": q, "k": k, "mask": mask, **options})
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(ops, "attention", watched)
    return seen


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "int8"])
def test_every_layer_calls_the_operator_with_the_precision(calls, precision):
    model = bert()
    (row,) = attention_rows(model, attention=precision)
    calls.clear()
    outputs(model)
    if row.action == "fused":
        assert [call["precision"] for call in calls] == [precision] * 2
    else:  # a CPU without such products
        assert precision == "bfloat16" and "no products of bfloat16" in row.reason and calls == []


@pytest.mark.parametrize("make, options, step", [(bert, {"blocks": True}, "blocks"), (llama, {}, "rotary")])
def test_steps_behind_it_keep_products_of_codes(calls, make, options, step):
    model = make()
    before = outputs(model, {"input_ids": IDS})
    report = octavo.fuse_(model, {"input_ids": IDS}, attention="int8", **options)
    assert [row.action for row in report.rows if row.step in ("attention", step)] == ["fused"] * 3
    calls.clear()
    assert not torch.equal(outputs(model, {"input_ids": IDS}), before)
    assert [call["precision"] for call in calls] == ["int8"] * 2


def test_keys_of_groups_are_not_repeated_and_masks_are_bool_or_none(calls):
    model = llama()
    octavo.fuse_(model, PADDED)
    calls.clear()
    outputs(model)
    assert all(call["q"].shape == (2, 4, 12, 16) and call["k"].shape == (2, 2, 12, 16) for call in calls)
    assert all(call["mask"].dtype == torch.bool and not call["causal"] for call in calls)
    calls.clear()
    outputs(model, {"input_ids": IDS})
    assert all(call["mask"] is None and call["causal"] for call in calls)


def test_one_query_sees_every_key(calls):
    model = llama()
    octavo.fuse_(model, PADDED)
    with torch.no_grad():
        cache = cache_of(model(IDS))
        calls.clear()
        model(IDS[:, :1], **with_cache(cache))
    assert [(call["causal"], call["mask"]) for call in calls] == [(False, None)] * 2


def test_none_leaves_attention_alone(calls):
    model = bert()
    assert attention_rows(model, attention=None) == []
    outputs(model)
    assert calls == [] and model.config._attn_implementation == "sdpa"


def test_the_row_shows_the_largest_difference_to_torch():
    (row,) = attention_rows(bert(), attention="float32")
    # Rounding of sums of 12 terms of size 1, with weights that sum to 1.
    assert row.action == "fused" and 0 <= row.error <= 2**-19


def test_a_window_is_respected():
    """Mistral's mask is the window; the window is shorter than the text."""
    model = mistral(sliding_window=4)
    before = outputs(model)
    (row,) = attention_rows(model, attention="float32")
    assert row.action == "fused"
    assert (outputs(model) - before).norm() <= 2**-14 * before.norm()


def test_padding_on_the_left_leaves_queries_that_see_nothing():
    left = {"input_ids": IDS, "attention_mask": torch.tensor([[0] * 5 + [1] * 7, [1] * 12])}
    model = llama()
    before = outputs(model, left)
    (row,) = attention_rows(model, left, attention="float32")
    assert row.action == "fused"
    assert (outputs(model, left) - before).norm() <= 2**-14 * before.norm()


def test_an_operator_that_is_off_is_found_out(monkeypatch):
    operator = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args, **options: operator(*args, **options) * 1.001)
    (row,) = attention_rows(bert(), attention="float32")
    assert row.action == "kept" and "more than rounding" in row.reason


def test_models_within_a_module_are_found_by_name():
    wrapper = nn.ModuleDict({"text": bert()}).eval()
    wrapper.forward = lambda ids: wrapper["text"](ids)
    (row,) = attention_rows(wrapper, IDS)
    assert (row.name, row.kind, row.action) == ("text", "BertModel", "fused")


@pytest.mark.parametrize(
    "kind, options, reason",
    [
        ("T5EncoderModel", dict(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2), "does not let"),
        (
            "Gemma2ForCausalLM",
            DECODER,
            "kind",
        ),  # some versions of transformers allow SDPA, which has no softcap
        ("LlamaForCausalLM", {**DECODER, "head_dim": 8}, "only torch computes"),
    ],
)
def test_other_models_are_kept_with_a_reason(kind, options, reason):
    config = kind.replace("EncoderModel", "").replace("ForCausalLM", "") + "Config"
    model = getattr(transformers, kind)(getattr(transformers, config)(**{**options, "vocab_size": 64})).eval()
    (row,) = attention_rows(model, {"input_ids": IDS})
    assert row.action == "kept" and reason in row.reason, row
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [bert, llama])
def test_who_asks_for_attention_weights_is_told_that_there_are_none(make, attn_implementation):
    model = make(attn_implementation=attn_implementation)
    octavo.fuse_(model, IDS)
    with torch.no_grad():
        with pytest.raises(
            ValueError, match=r"output_attentions=True asks for: call octavo.unfuse_\(model\)"
        ):
            model(IDS, output_attentions=True)
        model(IDS, output_attentions=False)
        found = octavo.unfuse_(model)(IDS, output_attentions=True).attentions
    if attn_implementation == "eager":
        assert [weights.shape for weights in found] == [(2, 4, 12, 12)] * 2


def test_a_model_that_was_asked_for_hidden_states_before_is_fused_and_gives_them():
    """transformers leaves hooks on all modules then."""
    model = llama()
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states
        report = octavo.fuse_(model, IDS, attention="float32")
        found = model(IDS, output_hidden_states=True).hidden_states
    assert [row.action for row in report.rows if row.step == "rotary"] == ["fused"] * 2
    assert len(found) == len(expected) == 3


@pytest.mark.parametrize("by_name", [False, True])
def test_a_module_may_call_attention_by_the_names_of_its_arguments(by_name, calls):
    """Many models of images and texts hand attention_mask over by its name."""
    model = llama()
    for layer in model.model.layers:
        kind = type(layer.self_attn)

        class Calls(kind):
            def forward(self, hidden_states, position_embeddings, attention_mask=None, **options):
                batch, length, _ = hidden_states.shape
                q, k, v = (
                    getattr(self, f"{name}_proj")(hidden_states).view(batch, length, -1, 16).transpose(1, 2)
                    for name in "qkv"
                )
                attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
                given = {"query": q, "key": k, "value": v, "attention_mask": attention_mask}
                values = [] if by_name else list(given.values())
                y, _ = attend(self, *values, **(given if by_name else {}), scaling=self.scaling)
                return self.o_proj(y.reshape(batch, length, -1)), None

        layer.self_attn.__class__ = Calls
    before = outputs(model)
    (row,) = attention_rows(model, attention="float32")
    assert row.action == "fused", row
    calls.clear()
    assert (outputs(model) - before).norm() <= 2**-14 * before.norm() and len(calls) == 2


def test_dropout_is_refused_not_ignored():
    model = bert(attention_probs_dropout_prob=0.1)
    octavo.fuse_(model, PADDED)
    model.train()
    with pytest.raises(ValueError, match=r"no dropout: call model.eval\(\), or octavo.unfuse_"):
        model(**PADDED)
    octavo.unfuse_(model)(**PADDED)


def test_sinks_and_softcaps_are_refused():
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="no sinks"):
        attention_forward(nn.Identity(), q, q, q, None, s_aux=torch.ones(2))
    with pytest.raises(ValueError, match="no softcap"):
        attention_forward(nn.Identity(), q, q, q, None, softcap=30.0)


@pytest.mark.parametrize(
    "options, size, native",
    [
        ({}, 64, True),
        ({"scaling": 0.1, "is_causal": False, "sliding_window": 3}, 128, True),
        ({}, 40, False),
        ({}, 144, False),
        ({"position_bias": torch.zeros(1)}, 64, False),
        ({"output_attentions": True}, 64, False),
        ({"softcap": 30.0}, 64, False),
    ],
)
def test_which_calls_are_ours(options, size, native):
    q = torch.zeros(1, 2, 3, size)
    assert is_native(q, q, q, options) is native
    assert not is_native(q, q, torch.zeros(1, 2, 3, 48), options)


def test_a_causal_call_of_another_length_is_torchs():
    """transformers' function looks at the first keys then, ours would at the last ones."""
    module = nn.Identity()
    q, k = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 5, 16)
    y, weights = attention_forward(module, q, k, k, None, is_causal=True)
    expected = F.scaled_dot_product_attention(q, k[:, :, :3], k[:, :, :3], is_causal=True)
    assert weights is None
    assert_within(
        y, expected.transpose(1, 2).contiguous(), 2**-20
    )  # some versions hide keys, others cut them off


def test_a_pickled_model_brings_its_attention_along(monkeypatch):
    """Into a process where nothing was fused yet."""
    model = bert()
    octavo.fuse_(model, PADDED)
    expected, data = outputs(model), pickle.dumps(model)
    for interface in (transformers.AttentionInterface, transformers.AttentionMaskInterface):
        monkeypatch.delitem(interface._global_mapping, "octavo")
    with pytest.raises(KeyError, match="octavo"):
        outputs(model)
    assert_bits_equal(outputs(pickle.loads(data)), expected)
