# SPDX-License-Identifier: Apache-2.0
"""KVCache: what transformers' DynamicCache holds, without joining tensors at each step."""

import copy
import sys

import pytest
import torch
from asserts import assert_bits_equal
from fusion_models import IDS, PADDED, llama, mistral, transformers, with_cache

import octavo
from octavo.nn.caches.growing import GrowingLayer
from octavo.nn.caches.rooms import SPARE
from octavo.nn.kv_cache import KVCache


def tokens(count: int, batch: int = 2, dtype=torch.float32):
    return [torch.randn(batch, 2, count, 16).to(dtype) for _ in "kv"]


def assert_same(cache, expected):
    assert cache.get_seq_length() == expected.get_seq_length()
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        assert_bits_equal(layer.keys, other.keys)
        assert_bits_equal(layer.values, other.values)


def both(steps=(5, 1, 1)):
    """Two caches of two layers that were given the same."""
    caches = KVCache(), transformers.DynamicCache()
    for count in steps:
        for index in (0, 1):
            states = tokens(count)
            for cache in caches:
                cache.update(*states, index)
    return caches


@pytest.mark.parametrize("steps", [(5,), (5, 1, 1), (1,) * (SPARE + 3), (3 * SPARE, 1, 2 * SPARE, 1)])
def test_it_holds_what_dynamic_cache_does(steps):
    assert_same(*both(steps))


OPERATIONS = {
    "crop": lambda cache: cache.crop(-3),
    "crop nothing": lambda cache: cache.crop(0),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "one beam wins": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_what_is_done_to_it_and_what_comes_after(operation):
    caches = both()
    for cache in caches:
        operation(cache)
    if caches[1].get_seq_length():
        assert_same(*caches)
    batch = caches[1].layers[0].keys.shape[0] if caches[1].get_seq_length() else 2
    for count in (1, 2 * SPARE):
        states = tokens(count, batch)
        for cache in caches:
            for index in (0, 1):
                cache.update(*states, index)
        assert_same(*caches)


def test_a_token_moves_nothing_until_the_room_is_full():
    cache = KVCache()
    cache.update(*tokens(5), 0)
    moves, pointer = 0, None
    for _ in range(1000):
        keys, values = cache.update(*tokens(1), 0)
        assert keys.stride(3) == values.stride(3) == 1
        moves, pointer = moves + (keys.data_ptr() != pointer), keys.data_ptr()
    assert moves <= 5  # 69, 138, 276, 552, 1104 tokens


def test_a_crop_keeps_the_room():
    cache = KVCache()
    pointer = cache.update(*tokens(20), 0)[0].data_ptr()
    cache.crop(-10)
    assert cache.update(*tokens(3), 0)[0].data_ptr() == pointer


def test_bfloat16_storage_takes_half_and_rounds_once():
    cache = KVCache(dtype=torch.bfloat16)
    states = tokens(7)
    keys, values = cache.update(*states, 0)
    assert_bits_equal(keys, states[0].bfloat16())
    assert_bits_equal(values, states[1].bfloat16())


def test_rooms_made_in_inference_mode_can_be_used_outside():
    cache = KVCache()
    with torch.inference_mode():
        cache.update(*tokens(3), 0)
    cache.update(*tokens(3), 0)
    with torch.inference_mode():
        assert cache.update(*tokens(3), 0)[0].shape[2] == 9


def test_gradients_reach_the_keys():
    cache = KVCache()
    states = [state.requires_grad_() for state in tokens(3)]
    keys, values = cache.update(*states, 0)
    (keys.sum() + values.sum()).backward()
    assert all(state.grad is not None for state in states)


def test_a_copy_is_a_cache_of_its_own():
    cache, expected = both()
    twin = copy.deepcopy(cache)
    cache.update(*tokens(2), 0)
    assert_same(twin, expected)


# --- in models ------------------------------------------------------------------------------------------------------


def generated(model, **options):
    return model.generate(**PADDED, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_gives_the_tokens_of_the_default_cache(options, fused):
    model = llama()
    if fused:
        octavo.fuse_(model, PADDED, attention="float32")
    expected = generated(model, **options)
    assert torch.equal(generated(model, **with_cache(KVCache()), **options), expected)
    assert torch.equal(generated(model, **with_cache(KVCache(model.config)), **options), expected)


@pytest.mark.parametrize("way", ["sampling", "prompt lookup", "draft model"])
def test_sampled_and_assisted_decoding_write_the_tokens_of_the_default_cache(way):
    model = llama()
    options = {
        "sampling": {"do_sample": True},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "draft model": {"assistant_model": llama(num_hidden_layers=1)},
    }[way]
    written = []
    for cache in (transformers.DynamicCache(), KVCache()):
        torch.manual_seed(0)
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, **options}
        written.append(model.generate(IDS[:1], **with_cache(cache), **options))
    assert torch.equal(*written)


@torch.no_grad()
def test_a_fused_model_reads_bfloat16_keys():
    model = llama()
    expected = model(IDS).logits
    octavo.fuse_(model, PADDED, attention="float32")
    cache = KVCache(dtype=torch.bfloat16)
    first = model(IDS[:, :8], **with_cache(cache)).logits
    second = model(IDS[:, 8:], **with_cache(cache)).logits
    found = torch.cat([first, second], 1)
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), 0) >= 0.9999


def test_an_encoder_decoder_model_takes_two():
    sizes = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=64)
    counts = {
        f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")
    }
    torch.manual_seed(0)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **counts)).eval()
    expected = generated(model)
    cache = transformers.EncoderDecoderCache(KVCache(), KVCache())
    assert torch.equal(generated(model, **with_cache(cache)), expected)


def test_layers_with_a_window_are_transformers_own():
    model = mistral(sliding_window=4)
    cache = KVCache(model.config)
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicSlidingWindowLayer"] * 2
    expected = generated(model)
    assert torch.equal(generated(model, **with_cache(cache)), expected)
    # All tokens, and the mask hides them.
    assert torch.equal(generated(model, **with_cache(KVCache())), expected)
    assert type(KVCache(llama().config).layers[0]) is GrowingLayer


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"dtype": torch.int8}, ValueError, "accepted are None, torch.float32, torch.bfloat16"),
        ({"config": "llama"}, TypeError, "config is a str, a transformers config"),
        ({"dtype": "int2"}, ValueError, "'int8' and 'int4'"),
        ({"dtype": "int8", "recent": -1}, ValueError, "recent is -1, a number of tokens"),
        ({"dtype": "int8", "rotate": 1}, TypeError, "rotate is 1, accepted are True, False and None"),
        ({"first": 4}, ValueError, "first and recent are for dtype='int8' and 'int4'"),
        ({"size": 3}, TypeError, "size"),
    ],
)
def test_bad_arguments_are_refused_by_name(options, error, text):
    with pytest.raises(error, match=text):
        KVCache(**options)


def test_without_transformers_there_is_everything_but_the_cache(monkeypatch):
    # It is imported when it is asked for.
    assert octavo.nn.KVCache is KVCache and "KVCache" not in vars(octavo.nn)
    monkeypatch.setitem(sys.modules, "octavo.nn.kv_cache", None)
    with pytest.raises(ImportError, match=r"pip install transformers"):
        octavo.nn.KVCache  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'KVcache'"):
        octavo.nn.KVcache  # noqa: B018
