# SPDX-License-Identifier: Apache-2.0
"""Rows of packed weights are those of the whole weight, bit for bit, for any ids and on each instruction set."""

import pytest
import torch
from operator_arguments import FLOATS, assert_same_bits
from test_groups import weight_cases

from octavo import cpu_info, ops, reference, use_isa

SHAPES = [(1, 37, 100, 32), (1, 16, 64, 0), (1, 50, 300, 48)]


@pytest.mark.parametrize("isa", cpu_info().isas)
def test_rows_in_groups_have_the_bits_of_the_whole_weight(isa):
    torch.manual_seed(0)
    with use_isa(isa):
        for _, k, weight, case in weight_cases(SHAPES):
            ids = torch.randint(weight.n, (3, 5))
            for dtype in FLOATS:
                rows = ops.embedding_groups(ids, weight, k, dtype)
                assert_same_bits(rows, reference.embedding_groups(ids, weight, k, dtype))
                assert torch.equal(rows, ops.dequantize_groups(weight, k, dtype)[ids]), case


@pytest.mark.parametrize("half", FLOATS[1:], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_16_bit_floats_are_the_weight(half, dtype):
    torch.manual_seed(1)
    packed = ops.pack_half(torch.randn(37, 70).to(half))
    ids = torch.randint(37, (4, 2))
    rows = ops.embedding_half(ids, packed, 37, dtype)
    assert_same_bits(rows, reference.embedding_half(ids, packed, 37, dtype))


@pytest.fixture(params=["groups", "half"])
def embed(request):
    """The function ids -> rows of a weight [20, 70]."""
    torch.manual_seed(2)
    if request.param == "half":
        packed = ops.pack_half(torch.randn(20, 70).half())
        return lambda ids: ops.embedding_half(ids, packed, 20)
    codes = ops.pack_planes(torch.randint(8, (20, 70), dtype=torch.uint8), 3)
    weight = ops.group_weight(codes, n=20, bits=3, group_size=0, offset=4, column_scale=torch.rand(20))
    return lambda ids: ops.embedding_groups(ids, weight, 70)


def test_ids_of_any_integer_type_shape_and_strides(embed):
    every = embed(torch.arange(20))
    assert torch.equal(embed(torch.tensor(7)), every[7])
    assert torch.equal(embed(torch.arange(20, dtype=torch.int32).flip(0)), every.flip(0))
    ids = torch.randint(20, (3, 4, 5))
    assert torch.equal(embed(ids.permute(2, 0, 1)), every[ids.permute(2, 0, 1)])
    assert torch.equal(embed(ids[:, ::2]), every[ids[:, ::2]])
    assert embed(ids[:0]).shape == (0, 4, 5, 70)
    assert torch.equal(torch.vmap(embed)(ids), every[ids])
    assert torch.equal(torch.vmap(embed)(ids[0, 0]), every[ids[0, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("wrong", [-1, 20, 2**31 - 1])
def test_an_id_that_is_no_row_is_an_index_error_with_the_range(embed, wrong, dtype):
    with pytest.raises(IndexError, match=rf"ids holds {wrong}, the weight has 20 rows: ids from 0 to 19"):
        embed(torch.tensor([[3, wrong]], dtype=dtype))


def test_other_types_are_refused_with_a_sentence(embed):
    with pytest.raises(TypeError, match="ids is float32, accepted: int32, int64"):
        embed(torch.rand(3))
    with pytest.raises(TypeError, match="ids is a list"):
        embed([1, 2])


def test_a_large_call_is_shared_out_to_threads_and_gives_the_same_bits(embed):
    ids = torch.randint(20, (5000,))
    assert torch.equal(embed(ids), embed(torch.arange(20))[ids])
