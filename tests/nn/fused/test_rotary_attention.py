# SPDX-License-Identifier: Apache-2.0
"""RotaryAttention and the step that finds it: the attention of Llama-like models, with and without a cache."""

import copy
import functools
import inspect

import pytest
import torch
from asserts import assert_bits_equal
from fusion_models import DECODER, IDS, PADDED, _made, llama, mistral, outputs, transformers, with_cache

import octavo
from octavo.fusion.example import Example
from octavo.fusion.steps.interface import Registration
from octavo.fusion.steps.rotary import Rotary
from octavo.nn import RotaryAttention


def qwen3():
    return _made("Qwen3ForCausalLM", "Qwen3Config", **DECODER)


@functools.cache
def _fused(make, scheme=None):
    model = make() if scheme is None else octavo.quantized(make(), scheme)
    report = octavo.fuse_(model, IDS, attention="float32")
    assert [row.action for row in from_strips(report)] == ["fused", "fused"], report
    return model


def fused(make, scheme=None):
    """A copy of a model that is fused once: proving what attention computes takes its time."""
    return copy.deepcopy(_fused(make, scheme))


def from_strips(report):
    return [row for row in report.rows if row.step == "rotary"]


def decoded(model, cache, mask=None):
    """The logits of 5 tokens one after another, behind a prompt of 12."""
    with torch.no_grad():
        model(IDS, mask, **with_cache(cache))
        return torch.cat([model(IDS[:, i : i + 1], mask, **with_cache(cache)).logits for i in range(5)], 1)


@pytest.mark.parametrize("make", [llama, qwen3], ids=["llama", "qwen3"])
def test_a_float_model_decodes_the_same_but_for_rounding(make):
    """2 layers of about 10 operators, each off by at most 2^-19 of what it gives."""
    model = make()
    expected = decoded(model, octavo.nn.KVCache(model.config))
    model = fused(make)
    for cache in (octavo.nn.KVCache(model.config), None):
        if cache is not None:
            found = decoded(model, cache)
            assert (found - expected).norm() <= 2**-14 * expected.norm()


@pytest.mark.parametrize("make", [llama, qwen3], ids=["llama", "qwen3"])
def test_a_static_cache_is_given_what_the_original_gives_it(make):
    """In some versions of transformers such a cache asks where its tokens belong."""
    model = make()
    caches = [transformers.StaticCache(config=model.config, max_cache_len=20) for _ in range(2)]
    mask = torch.ones(2, 20, dtype=torch.long)
    expected = decoded(model, caches[0], mask)
    assert (decoded(fused(make), caches[1], mask) - expected).norm() <= 2**-14 * expected.norm()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_by_each_of_its_names(name):
    model = fused(llama)
    attention, cache = model.model.layers[0].self_attn, octavo.nn.KVCache()
    x, angles = torch.randn(1, 3, 64), (torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    attention(x, angles, None, **{name: cache})
    assert cache.get_seq_length() == 3
    attention(x, position_embeddings=angles, attention_mask=None, **{name: cache})
    assert cache.get_seq_length() == 6


CHANGES = {
    "forgets options": (lambda f, x, angles, mask, **rest: f(x, angles, mask), "does not call its cache"),
    "forgets an option": (
        lambda f, x, angles, mask, octavo_option=None, **rest: f(x, angles, mask, **rest),
        "does not hand all its arguments on",
    ),
    "scales far positions": (
        lambda f, x, angles, mask, position_ids, **rest: f(
            x * (1 + position_ids // 64)[..., None], angles, mask, position_ids=position_ids, **rest
        ),
        "operator floor_divide may take another path",
    ),
    "clips large inputs": (
        lambda f, x, angles, mask, **rest: f(x.clamp(-8, 8), angles, mask, **rest),
        "operator clamp may take another path",
    ),
    "turns neighbours": (
        lambda f, x, angles, mask, **rest: f(x, tuple(each.flip(-1) for each in angles), mask, **rest),
        "",  # the angles that it hands to its cache, or its keys
    ),
    "returns more": (
        lambda f, x, angles, mask, **rest: (*f(x, angles, mask, **rest), None),
        "returns something else",
    ),
    "scales its output": (
        lambda f, x, angles, mask, **rest: (f(x, angles, mask, **rest)[0] * 1.0, None),
        "returns something else",
    ),
    "cuts the mask": (
        lambda f, x, angles, mask, **rest: f(x, angles, mask[..., :], **rest),
        "changes its attention mask",
    ),
}


OTHER_ARITHMETIC = {
    "Helium": ({}, "differ on random angles"),
    "Cohere": ({}, "differ on random angles"),
    "Glm": ({"pad_token_id": 0}, ""),
    "Ernie4_5": ({}, "differ on random angles"),
    "Ministral3": ({}, "operator floor may take another path"),
    "Olmo": ({"clip_qkv": 8.0}, "operator clamp_ may take another path"),
}


@pytest.mark.parametrize("name", OTHER_ARITHMETIC)
@torch.no_grad()
def test_attention_of_other_arithmetic_is_kept_though_the_example_is_one_token(name):
    """Pairs of neighbours are turned, queries scaled by their position, large values clipped: one token shows none."""
    options, reason = OTHER_ARITHMETIC[name]
    model = _made(f"{name}ForCausalLM", f"{name}Config", DECODER, **options)
    for parameter in model.parameters():
        parameter.mul_(4)  # else attention is nearly a mean, whatever is turned
    long = torch.arange(24)[None] % 60 + 1
    expected = model(long).logits
    report = octavo.fuse_(model, {"input_ids": IDS[:1, :1]}, attention="float32")
    rows = from_strips(report)
    assert rows and all(row.action == "kept" and reason in row.reason for row in rows), report
    assert (model(long).logits - expected).norm() <= 2**-14 * expected.norm()


def reasons_of(change, names=None):
    """Why attention modules whose forward is `change` of the original are kept; they are looked at, and never run."""
    model = llama()
    Registration()
    model.set_attn_implementation("octavo_float32")
    kind = type(model.model.layers[0].self_attn)

    @functools.wraps(kind.forward)
    def forward(self, hidden_states, position_embeddings, attention_mask, **rest):
        return change(
            functools.partial(kind.forward, self), hidden_states, position_embeddings, attention_mask, **rest
        )

    if names is not None:
        forward.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        )
    for layer in model.model.layers:
        layer.self_attn.__class__ = type("Changed", (kind,), {"forward": forward})
    example = Example(llama(), {"input_ids": IDS[:1, :1]})  # one token shows nothing: cos is 1 and sin is 0
    return [candidate.reason for candidate in Rotary().find(model, example)]


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_module_that_does_something_else_is_kept_with_the_reason(change, reason):
    found = reasons_of(change)
    assert all(each and reason in each for each in found), found


def test_a_module_of_another_class_that_does_the_same_has_no_reason():
    assert reasons_of(lambda f, *args, **rest: f(*args, **rest)) == ["", ""]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["memory"], "its forward takes memory, which is not known"),
        ([], "its forward takes no cache, whose known names are cache, past_key_values"),
    ],
)
def test_a_module_whose_cache_has_another_name_is_kept_with_the_reason(names, reason):
    usual = ["self", "hidden_states", "position_embeddings", "attention_mask"]
    assert reasons_of(lambda f, *args, **rest: f(*args, **rest), usual + names) == [reason] * 2


def test_what_the_original_would_not_take_is_refused():
    attention = fused(llama).model.layers[0].self_attn
    x, angles = torch.randn(1, 3, 64), (torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    with pytest.raises(TypeError, match="(cache|past_key_values) is given twice"):
        attention(x, angles, None, octavo.nn.KVCache(), cache=octavo.nn.KVCache())
    with pytest.raises(TypeError, match="arguments without a name, at most"):
        attention(x, angles, *[None] * 9)
    attention.call.has_options = False
    with pytest.raises(
        TypeError, match="scaling is no argument of the module it stands for; accepted are hidden"
    ):
        attention(x, angles, scaling=1.0)


def test_queries_keys_and_values_come_from_one_product():
    model = fused(llama, octavo.Int8Dynamic())
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, RotaryAttention) and "is_joined=True" in repr(attention)


def test_joining_changes_no_bit():
    model = fused(llama, octavo.Int8Dynamic())
    together = outputs(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda *_: None)  # hooked layers are called one by one
        assert "is_joined=False" in repr(layer.self_attn)
    assert_bits_equal(outputs(model), together)


def test_a_layer_that_somebody_replaces_is_the_one_that_counts():
    """As adapters do: they put a layer of their own around ours."""
    model = fused(llama, octavo.Int8Dynamic())
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
    assert all(
        reason in row.reason and (row.action == "kept") == bool(reason) for row in from_strips(report)
    ), report


def test_without_octavos_attention_it_stays():
    report = octavo.fuse_(llama(), IDS, attention=None)
    assert from_strips(report) == []


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
    assert [row.action for row in from_strips(report)] == ["kept", "kept"], report
