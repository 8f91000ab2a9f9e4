# SPDX-License-Identifier: Apache-2.0
"""A cache on disk: the same bits, and a conversation that goes on as if it had never stopped."""

import pytest
import torch
from asserts import assert_bits_equal
from fusion_models import IDS, llama, mistral, transformers, with_cache

from octavo.nn.kv_cache import KVCache

CACHES = {
    "as they come": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"dtype": "int8"},
    "int4": {"dtype": "int4", "first": 2, "recent": 3},
    "int4 as it is": {"dtype": "int4", "rotate": False},
}


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("options", CACHES.values(), ids=CACHES)
def test_what_is_read_has_the_bits_of_what_was_written(options, window, tmp_path):
    config = mistral(sliding_window=window).config
    cache = KVCache(config, **options)
    for _ in range(2):
        cache.update(*(torch.randn(2, 2, 9, 16) for _ in "kv"), 0)
    cache.save(tmp_path / "cache.safetensors")
    read = KVCache.load(tmp_path / "cache.safetensors")
    states = [torch.randn(2, 2, 1, 16) for _ in "kv"]
    for found, expected in zip(read.update(*states, 0), cache.update(*states, 0), strict=True):
        assert_bits_equal(found, expected)
    assert read.dtype == cache.dtype and read.codes == cache.codes and read.nbytes == cache.nbytes
    assert [each.get_seq_length() for each in read.layers] == [19, 0]


@pytest.mark.parametrize("options", [{}, {"dtype": "int4"}], ids=["float", "int4"])
def test_a_conversation_goes_on(options, tmp_path):
    model, written = llama(), dict(do_sample=False, pad_token_id=0)
    whole = model.generate(IDS[:1], **with_cache(KVCache(**options)), **written, max_new_tokens=8)
    cache = KVCache(**options)
    part = model.generate(IDS[:1], **with_cache(cache), **written, max_new_tokens=3)
    cache.save(tmp_path / "cache.safetensors")
    read = KVCache.load(tmp_path / "cache.safetensors")
    assert torch.equal(model.generate(part, **with_cache(read), **written, max_new_tokens=5), whole)


def test_other_files_and_other_layers_are_refused(tmp_path):
    path = tmp_path / "cache.safetensors"
    path.write_bytes(b"no cache")
    with pytest.raises(ValueError, match="no cache that KVCache.save wrote"):
        KVCache.load(path)
    cache = KVCache()
    cache.layers.append(transformers.cache_utils.StaticLayer(max_cache_len=4))
    with pytest.raises(TypeError, match="layer 0 is a StaticLayer"):
        cache.save(path)
