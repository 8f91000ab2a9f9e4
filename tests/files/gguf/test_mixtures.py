# SPDX-License-Identifier: Apache-2.0
"""Which tensor gets which type: the choices of llama.cpp, by hand for a model of 16 layers."""

import pytest

from octavo.files.gguf.mixtures import MIXTURES, Mixture


def types(name, tensor, layers=16, k=256, **options):
    mixture = Mixture(name, "llama", layers, **options)
    return [mixture.type_of(f"blk.{i}.{tensor}.weight", (512, k)) for i in range(layers)]


MORE = {0, 1, 4, 7, 10, 13, 14, 15}  # the first and last eighth of 16, and every third between


def test_q4_k_m_gives_six_bits_to_values_and_the_way_down_of_half_the_layers():
    for tensor in ("attn_v", "ffn_down"):
        assert {i for i, type in enumerate(types("Q4_K_M", tensor)) if type == "Q6_K"} == MORE
        assert {type for type in types("Q4_K_M", tensor) if type != "Q6_K"} == {"Q4_K"}
    assert set(types("Q4_K_M", "attn_q")) == set(types("Q4_K_M", "ffn_up")) == {"Q4_K"}
    assert set(types("Q4_K_M", "attn_qkv")) == {"Q5_K"}


def test_other_mixtures_have_rules_of_their_own():
    assert types("Q4_K_S", "attn_v") == ["Q5_K"] * 4 + ["Q4_K"] * 12
    assert types("Q4_K_S", "ffn_down") == ["Q5_K"] * 2 + ["Q4_K"] * 14
    assert types("Q3_K_M", "attn_v") == ["Q5_K"] * 2 + ["Q4_K"] * 14
    assert types("Q3_K_M", "ffn_down") == ["Q5_K"] + ["Q4_K"] * 15
    assert set(types("Q3_K_L", "attn_output")) == {"Q5_K"}
    assert set(types("Q3_K_S", "attn_v")) == {"Q3_K"}
    assert set(types("Q5_K_M", "attn_qkv")) == {"Q6_K"}
    assert types("Q2_K_S", "attn_v", query_groups=4) == ["Q4_K"] * 16
    assert set(types("Q4_K_M", "attn_k", experts=8)) == {"Q8_0"}


def test_the_head_gets_six_bits_and_so_does_an_embedding_that_is_the_head():
    tied, own = Mixture("Q4_K_M", "llama", 16, has_head=False), Mixture("Q4_K_M", "llama", 16)
    assert own.type_of("output.weight", (512, 256)) == "Q6_K"
    assert own.type_of("token_embd.weight", (512, 256)) == "Q4_K"
    assert tied.type_of("token_embd.weight", (512, 256)) == "Q6_K"
    assert own.type_of("output.weight", (512, 96)) == "Q8_0"


@pytest.mark.parametrize("name", [*MIXTURES, "Q4_0", "Q4_K", "F16"])
def test_what_is_no_matrix_of_codes_stays_float32(name):
    mixture = Mixture(name, "llama", 16)
    for tensor, shape in (
        ("blk.0.attn_norm.weight", (256,)),
        ("blk.0.attn_q.bias", (256,)),
        ("blk.0.ffn_gate_inp.weight", (8, 256)),
        ("position_embd.weight", (64, 256)),
        ("token_types.weight", (2, 256)),
    ):
        assert mixture.type_of(tensor, shape) == "F32"


def test_rows_that_are_no_whole_blocks_get_what_llama_cpp_takes_instead():
    assert set(types("Q4_K", "attn_q", k=96)) == {"Q5_0"}
    assert set(types("Q4_K_M", "attn_q", k=96)) == {"Q5_0"}
    assert set(types("Q6_K", "attn_q", k=96)) == {"Q8_0"}
    assert set(types("Q4_K", "attn_q", k=20)) == {"F16"}


def test_a_name_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="scheme is 'Q4'; accepted are the mixtures Q3_K_S"):
        Mixture("Q4", "llama", 2)
