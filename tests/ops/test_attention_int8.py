# SPDX-License-Identifier: Apache-2.0
"""ops.attention with products of codes: the reference's bits on every instruction set, and within a derived bound."""

import itertools
import math

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from operator_arguments import FLOATS
from test_attention import BLOCK, DIMENSIONS, HALF, LENGTHS, OPERATOR, heads, masks
from torch.library import opcheck

import octavo
from octavo import ops, reference
from octavo.runtime.timing import torch_threads

COARSE, FINE = 1.1e-4, 1.5e-7  # relative errors of 2^x


def attend(q, k, v, mask=None, **options):
    return ops.attention(q, k, v, mask, precision="int8", **options)


def assert_is_the_references(q, k, v, mask=None, **options):
    y = attend(q, k, v, mask, **options)
    assert_bits_equal(y, reference.attention_int8(q, k, v, mask, **options))
    return y


def bound(q, k, v, scale):
    """(55) to (57) of docs/numerics.md without a mask, [batch, queries, heads * dimension]."""
    u, (keys, dimension) = HALF[torch.float32], k.shape[-2:]
    q, k, v = q.double(), k.double(), v.double()
    scores, magnitudes = scale * (q @ k.mT), scale * (q.abs() @ k.abs().mT)
    q_step, k_step = (scale * q.abs().amax(-1) / 127)[..., None], (k.abs().amax(-1) / 127)[..., None, :]
    rounded = q_step * k.abs().sum(-1)[..., None, :] + k_step * scale * q.abs().sum(-1)[..., None]
    rounded = (1 + 2**-12) / 2 * (rounded + q_step * k_step * dimension / 2)
    largest, least = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
    distance = scores.abs() + (largest - scores) + (largest - least)
    blocks = math.ceil(keys / BLOCK)
    error = (dimension + 3) * u * magnitudes + u * distance + rounded + COARSE + blocks * (FINE + 2 * u)

    weights, farthest = (scores - largest).exp(), error.amax(-1, keepdim=True)
    lost = weights * error.expm1() + farthest.exp() / 510
    least_total = torch.maximum((-farthest).exp(), (weights - lost).sum(-1, keepdim=True))
    y = scores.softmax(-1) @ v
    off = (lost[..., None] * (v[..., None, :, :] - y[..., None, :]).abs()).sum(-2) / least_total
    v_largest = v.abs().amax(-2, keepdim=True)
    off = off + v_largest / 254 * (1 + 2**-13) + (5 * blocks + 8) * u * v_largest
    return off.transpose(1, 2).flatten(2)


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_gives_the_references_bits(isa, length):
    for other in (max(length, 7), 77):
        q, k, v = heads(1, 2, other, 32), heads(1, 2, length, 32), heads(1, 2, length, 32)
        assert_is_the_references(q, k, v)
        assert_is_the_references(q, k, v, causal=True)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_any_dimension_gives_the_references_bits(isa, dimension):
    q, k, v = heads(2, 2, 30, dimension), heads(2, 2, 70, dimension), heads(2, 2, 70, dimension)
    assert_is_the_references(q, k, v)
    assert_is_the_references(q, k, v, scale=-0.3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(9, 270), (30, 33), (30, 20)])
def test_masks_give_the_references_bits(isa, queries, keys, causal):
    q, k, v = heads(2, 4, queries, 32), heads(2, 2, keys, 32), heads(2, 2, keys, 32)
    for mask in masks(2, 4, queries, keys).values():
        assert_is_the_references(q, k, v, mask, causal=causal)


def test_dtypes_mix_and_the_result_has_that_of_q(isa):
    for q_dtype, k_dtype, v_dtype in itertools.product(FLOATS, FLOATS, FLOATS):
        k, v = heads(1, 1, 40, 48, k_dtype), heads(1, 1, 40, 48, v_dtype)
        assert assert_is_the_references(heads(1, 2, 13, 48, q_dtype), k, v).dtype == q_dtype


def test_scores_that_grow_from_block_to_block_are_rescaled(isa):
    growth = torch.linspace(0.1, 3, 3 * BLOCK + 7)[:, None]
    q, k, v = heads(1, 1, 30, 32), heads(1, 1, len(growth), 32) * growth, heads(1, 1, len(growth), 32)
    assert_is_the_references(q, k, v)
    assert_is_the_references(q, k.flip(-2), v)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dimension", [16, 64, 128])
def test_products_of_codes_are_within_their_bound(length, dimension):
    q, k, v = heads(1, 2, 30, dimension), heads(1, 2, length, dimension), heads(1, 2, length, dimension) + 3
    scale = 1 / math.sqrt(dimension)
    assert_within(attend(q, k, v), reference.attention(q.double(), k, v), bound(q, k, v, scale) + 2.0**-23)


def test_equal_values_come_back_as_one_of_them(isa):
    """Weights lose up to half a step each, but are divided by the sum of what is left."""
    q, k, v = heads(1, 2, 30, 32), heads(1, 2, 300, 32), heads(1, 2, 1, 32).expand(1, 2, 300, 32)
    expected = v[:, :, :1].expand(1, 2, 30, 32).transpose(1, 2).flatten(2)
    assert_within(attend(q, k, v), expected, 12 * HALF[torch.float32] * expected.abs())


def test_zeros_are_codes_like_others(isa):
    """Rows without a scale of their own: all weights are equal then, or all results 0."""
    q, k, v = heads(1, 1, 30, 32), heads(1, 1, 70, 32), heads(1, 1, 70, 32)
    zero = torch.zeros(())
    assert not attend(q, k, v * zero).any()
    for y in (assert_is_the_references(q * zero, k, v), assert_is_the_references(q, k * zero, v)):
        assert_bits_equal(y, y[:, :1].expand_as(y))


# --- what does not change a bit ------------------------------------------------------------------------------------


def test_any_strides_give_the_bits_of_dense_tensors(isa):
    q, (k, v) = heads(2, 4, 30, 32), torch.randn(2, 2, 2, 40, 32)
    joined = torch.cat([k, v], -1)
    by_position = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for strided in (by_position, (q, joined[..., :32], joined[..., 32:])):
        assert_bits_equal(attend(*strided), attend(q, k, v))


def test_threads_and_splits_of_batch_and_queries_change_no_bit(isa):
    q, k, v = heads(3, 4, 300, 32), heads(3, 2, 300, 32), heads(3, 2, 300, 32)
    mask = torch.randn(3, 1, 1, 300)
    whole = attend(q, k, v, mask)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert_bits_equal(attend(q, k, v, mask), whole)
            parts = [attend(*(x[i : i + 1] for x in (q, k, v, mask))) for i in range(3)]
            assert_bits_equal(torch.cat(parts), whole)
            halves = [attend(q[:, :, part], k, v, mask) for part in (slice(0, 77), slice(77, None))]
            assert_bits_equal(torch.cat(halves, 1), whole)


def test_few_queries_are_computed_in_float32(isa):
    q, k, v = heads(1, 2, 3, 32), heads(1, 1, 40, 32), heads(1, 1, 40, 32)
    assert_bits_equal(attend(q, k, v), ops.attention(q, k, v, precision="float32"))


# --- what is hidden, and what is not finite -------------------------------------------------------------------------


def test_a_query_that_sees_nothing_gives_zeros(isa):
    q, k, v = heads(1, 2, 30, 32), heads(1, 2, 20, 32), heads(1, 2, 20, 32)
    look = torch.ones(30, 20, dtype=torch.bool)
    look[4] = False
    assert not assert_is_the_references(q, k, v, look)[:, 4].any()
    assert not attend(q, k[:, :, :0], k[:, :, :0]).any()
    assert not attend(q, k, v, causal=True)[:, :10].any()


def test_hidden_values_only_count_in_the_scales(isa):
    """Hidden keys count for nothing at all; so do hidden values as long as larger ones are seen."""
    q, k, v = heads(1, 2, 30, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
    look = torch.rand(30, 300) > 0.2
    look[:, 7] = look[:, 290] = False
    v[:, :, [7, 290]] = 0.0
    expected = attend(q, k, v, look)
    k[:, :, [7, 290]] *= 1e6
    v[:, :, [7, 290]] = torch.where(torch.rand(32) < 0.5, -1.0, 1.0) * v.abs().amax(-2, keepdim=True)
    assert_bits_equal(attend(q, k, v, look), expected)
    v[:, :, 7] *= 2
    assert not torch.equal(attend(q, k, v, look), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_query_that_is_not_finite_stays_alone(isa, bad):
    q, k, v = heads(1, 2, 30, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
    expected = attend(q, k, v).unflatten(2, (2, 32))
    q[0, 1, 2, 5] = bad
    y = attend(q, k, v).unflatten(2, (2, 32))
    assert y[0, 2, 1].isnan().all()
    y[0, 2, 1] = expected[0, 2, 1]
    assert_bits_equal(y, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_is_nan_to_those_who_see_it(isa, bad):
    q, k, v = heads(1, 2, 30, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
    look = torch.rand(30, 300) > 0.2
    look[:, 7], look[:3, 7] = False, True
    hidden = look.clone()
    hidden[:, 7] = False
    clean = attend(q, k, v, hidden)
    k[:, :, 7, 3] = bad
    y = attend(q, k, v, look)
    assert y[:, :3].isnan().all()
    assert_bits_equal(y[:, 3:], clean[:, 3:])
    assert_bits_equal(attend(q, k, v, hidden), clean)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_head_with_values_that_are_not_finite_is_computed_in_float32(isa, bad):
    q, k, v = heads(2, 4, 30, 32), heads(2, 2, 300, 32), heads(2, 2, 300, 32)
    look = torch.rand(30, 300) > 0.2
    expected = attend(q, k, v, look).unflatten(2, (4, 32))
    v[1, 0, 290, 4] = bad
    y = attend(q, k, v, look).unflatten(2, (4, 32))
    exact = ops.attention(q, k, v, look, precision="float32").unflatten(2, (4, 32))
    expected[1, :, :2] = exact[1, :, :2]  # both query heads that read key head 0
    assert_bits_equal(y, expected)


# --- torch's contracts ----------------------------------------------------------------------------------------------


def test_opcheck():
    q, k = heads(2, 4, 9, 32), heads(2, 2, 11, 32)
    opcheck(OPERATOR, (q, k, k, None, True, 0.2, 3))


def test_gradients_come_from_torchs_function():
    q, k, v = (heads(1, 2, 9, 32).requires_grad_() for _ in range(3))
    y, expected = attend(q, k, v), ops.attention(q, k, v, precision="float32")
    ours, theirs = (torch.autograd.grad(x.square().sum(), [q, k, v]) for x in (y, expected))
    assert all(map(torch.equal, ours, theirs))


def test_auto_never_chooses_it():
    q, k, v = (heads(1, 2, 30, 32) for _ in range(3))
    for isa in octavo.cpu_info().isas:
        with octavo.use_isa(isa):
            assert not torch.equal(ops.attention(q, k, v), attend(q, k, v))
