# SPDX-License-Identifier: Apache-2.0
"""A KVCache of codes: it keeps the tokens that transformers' caches keep, in the bytes that were promised."""

import copy

import pytest
import torch
from asserts import assert_bits_equal
from fusion_models import IDS, PADDED, llama, mistral, transformers, with_cache

import octavo
from octavo.nn.caches.codes import BITS, StateCodes
from octavo.nn.kv_cache import KVCache

OPTIONS = [
    {"dtype": dtype, **more}
    for dtype in BITS
    for more in ({}, {"first": 3, "recent": 4}, {"rotate": False, "recent": 2})
]


def tokens(count: int, batch: int = 2, size: int = 64):
    return [torch.randn(batch, 2, count, size) for _ in "kv"]


def expected_states(cache: KVCache, floats: list[torch.Tensor], coded: range) -> list[torch.Tensor]:
    """The floats, with the tokens of `coded` as codes give them back."""
    kind, at = cache.codes.states, slice(coded.start, coded.stop)
    result = [states.clone() for states in floats]
    for states in result:
        states[:, :, at] = kind.decode(kind.encode(states[:, :, at]), states.dtype)
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("steps", [(100,), (2, 1, 1, 5, 91), (40, *(1,) * 60)], ids=len)
def test_all_but_the_first_and_the_recent_tokens_are_codes(options, steps):
    cache, floats = KVCache(**options), tokens(100)
    before = 0
    for count in steps:
        given = [states.narrow(2, before, count) for states in floats]
        found = cache.update(*given, 0)
        before += count
    coded = range(options.get("first", 0), 100 - options.get("recent", 0))
    for states, expected in zip(found, expected_states(cache, floats, coded), strict=True):
        assert_bits_equal(states, expected)
    assert cache.get_seq_length() == 100 and cache.get_mask_sizes(3, 0) == (103, 0)


@pytest.mark.parametrize("dtype, bits", [("int8", 8 + 16 / 32), ("int4", 4 + 2 * 16 / 32)])
def test_bytes_are_codes_and_scales(dtype, bits):
    cache, half = KVCache(dtype=dtype), KVCache(dtype=torch.bfloat16)
    for each in (cache, half):
        each.update(*tokens(256), 0)
    assert cache.nbytes == half.nbytes / 16 * bits


def test_floats_that_stay_are_counted():
    cache = KVCache(dtype="int8", first=4, recent=6)
    states = tokens(10)
    cache.update(*states, 0)
    assert cache.nbytes == sum(each.nbytes for each in states)


OPERATIONS = {
    "crop": (lambda cache: cache.crop(-3), lambda x: x[:, :, :-3]),
    "crop nothing": (lambda cache: cache.crop(0), lambda x: x),
    "crop into the codes": (lambda cache: cache.crop(-12), lambda x: x[:, :, :-12]),
    "crop everything": (lambda cache: cache.crop(-20), lambda x: x[:, :, :0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), lambda x: x[[1, 1]]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), lambda x: x.repeat_interleave(3, 0)),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), lambda x: x[1:]),
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_done_to_it_moves_codes_and_rounds_nothing_again(operation, options):
    cache = KVCache(**options)
    before = cache.update(*tokens(20), 0)
    of_cache, of_tensor = OPERATIONS[operation]
    of_cache(cache)
    for found, states in zip(cache.layers[0].read(), before, strict=True):
        assert_bits_equal(found, of_tensor(states).contiguous())
    assert cache.get_seq_length() == of_tensor(before[0]).shape[2]
    more = tokens(2, of_tensor(before[0]).shape[0])
    assert cache.update(*more, 0)[0].shape[2] == cache.get_seq_length()


def test_a_token_moves_nothing_until_the_room_is_full():
    cache = KVCache(dtype="int4")
    cache.update(*tokens(5), 0)
    moves, pointer = 0, None
    for _ in range(300):
        cache.update(*tokens(1), 0)
        now = cache.layers[0].coded_tokens.tensors()[0].data_ptr()
        moves, pointer = moves + (now != pointer), now
    assert moves <= 4  # 69, 138, 276, 552 tokens


def test_reset_forgets_everything():
    cache = KVCache(dtype="int8", recent=3)
    cache.update(*tokens(5), 0)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert cache.update(*tokens(2, batch=1), 0)[0].shape == (1, 2, 2, 64)


def test_codes_refuse_gradients_and_odd_heads():
    keys, values = tokens(3)
    with pytest.raises(RuntimeError, match="codes of int8 pass no gradient"):
        KVCache(dtype="int8").update(keys.requires_grad_(), values, 0)
    with pytest.raises(ValueError, match="heads of 7 channels, an even number"):
        KVCache(dtype="int4").update(*tokens(3, size=7), 0)
    with pytest.raises(ValueError, match="minus the number of tokens"):
        KVCache(config=llama().config, dtype="int8").crop(3)


# --- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_recording", [False, True])
@pytest.mark.parametrize("steps", [(3, 1, 1, 1, 1), (9, 2, 3), (5,), (6, 1)], ids=str)
def test_a_window_keeps_what_transformers_window_keeps(steps, is_recording):
    config = mistral(sliding_window=6).config
    # Room for all of them in float: then the two hold the same bits.
    caches = KVCache(config, dtype="int8", recent=1000), transformers.DynamicCache(config=config)
    if is_recording:
        for cache in caches:
            cache.activate_past_recording()
    for count in steps:
        states = tokens(count)
        assert caches[0].get_mask_sizes(count, 0) == caches[1].get_mask_sizes(count, 0)
        for found, expected in zip(*(cache.update(*states, 0) for cache in caches), strict=True):
            assert_bits_equal(found, expected)
        if is_recording:
            for cache in caches:
                cache.layers[0].crop(-1)
        for name in ("keys", "values"):
            assert_bits_equal(*(getattr(cache.layers[0], name).contiguous() for cache in caches))
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_a_window_that_moved_is_not_put_back():
    cache = KVCache(mistral(sliding_window=6).config, dtype="int8")
    cache.update(*tokens(9), 0)
    with pytest.raises(RuntimeError, match="call activate_past_recording before"):
        cache.crop(-1)


# --- in models ------------------------------------------------------------------------------------------------------


def generated(model, cache, **options):
    return model.generate(
        **PADDED, **with_cache(cache), max_new_tokens=6, do_sample=False, pad_token_id=0, **options
    )


@pytest.mark.parametrize("make", [llama, lambda: mistral(sliding_window=4)], ids=["llama", "window"])
@pytest.mark.parametrize("dtype", BITS)
def test_a_batch_with_padding_and_beams_writes_what_floats_write_where_all_is_recent(make, dtype):
    model = make()
    for options in ({}, {"num_beams": 3}):
        expected = generated(model, transformers.DynamicCache(config=model.config), **options)
        found = generated(model, KVCache(model.config, dtype, recent=1000), **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", BITS)
@torch.no_grad()
def test_a_model_reads_codes_whether_fused_or_not(dtype):
    model = llama()
    expected = model(IDS).logits
    for _ in range(2):
        cache = KVCache(dtype=dtype)
        parts = [model(ids, **with_cache(cache)).logits for ids in (IDS[:, :8], IDS[:, 8:])]
        assert torch.cosine_similarity(torch.cat(parts, 1).flatten(), expected.flatten(), 0) >= 0.99
        octavo.fuse_(model, PADDED, attention="float32")


def test_assisted_decoding_writes_what_greedy_decoding_writes():
    model, ids = llama(), IDS[:1]
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **with_cache(KVCache(dtype="int4")), **options)
    found = model.generate(ids, **with_cache(KVCache(dtype="int4")), **options, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_a_prompt_that_was_read_once_starts_several_answers():
    model, prompt = llama(), IDS[:1, :8]
    cache = KVCache(dtype="int4", first=2, recent=2)
    with torch.no_grad():
        model(prompt, **with_cache(cache))
    for ending in (IDS[:1, 8:], IDS[1:, 8:]):
        ids = torch.cat([prompt, ending], 1)
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
        found = model.generate(ids, **with_cache(copy.deepcopy(cache)), **options)
        assert found.shape[1] == ids.shape[1] + 4
    assert cache.get_seq_length() == prompt.shape[1]


@pytest.mark.parametrize("dtype, bits", BITS.items())
def test_states_are_rotated_unless_asked_otherwise(dtype, bits):
    assert KVCache(dtype=dtype).codes.states == StateCodes(bits, rotate=True)
    assert KVCache(dtype=dtype, rotate=False).codes.states == StateCodes(bits, rotate=False)
