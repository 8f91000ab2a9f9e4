# SPDX-License-Identifier: Apache-2.0
"""ops.attention is within a derived bound of float64 on every instruction set; masks, strides, NaN, torch."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from asserts import assert_bits_equal, assert_within
from operator_arguments import FLOATS
from torch.library import opcheck

import octavo
from octavo import ops, reference
from octavo.ops.softmax_attention import causal_mask
from octavo.runtime.timing import torch_threads

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 197, 513)
DIMENSIONS = (16, 32, 48, 64, 80, 96, 112, 128)
HALF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # unit roundoffs
BLOCK = 256  # keys
POLYNOMIAL = {torch.float32: 1.5e-7, torch.bfloat16: 1.1e-4}  # relative errors of 2^x


def heads(batch, heads, length, dimension, dtype=torch.float32):
    return torch.randn(batch, heads, length, dimension).to(dtype)


def has_bfloat16() -> bool:
    try:
        ops.attention(*[heads(1, 1, 16, 16)] * 3, precision="bfloat16")
    except ValueError:
        return False
    return True


needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no AVX512_BF16")


def bound(q, k, v, mask=None, *, causal=False, scale=None, products=torch.float32):
    """(45) to (47) of docs/numerics.md, [batch, queries, heads * dimension]."""
    u, half, (keys, dimension) = HALF[torch.float32], HALF[products], k.shape[-2:]
    scale = 1 / math.sqrt(dimension) if scale is None else scale
    k, v = (reference.floats.repeat_heads(x, q.shape[1]).double() for x in (k, v))
    weights = reference.floats.attention_weights(q, k, mask, causal=causal, scale=scale)
    magnitudes = scale * (q.double().abs() @ k.abs().mT)
    scores = scale * (q.double() @ k.mT)
    added = torch.zeros(())
    if mask is not None and mask.dtype != torch.bool:
        added = mask.double().masked_fill(mask == -math.inf, 0)
    scores = (scores + added).masked_fill(weights == 0, 0)
    distance = (scores.amax(-1, keepdim=True) - scores).clamp(min=0)
    spread = scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)
    rounded = 0 if products == torch.float32 else 2 * half
    score = (rounded + (dimension + 3) * u) * magnitudes + u * (
        2 * added.abs() + scores.abs() + distance + spread
    )
    blocks = math.ceil(keys / BLOCK)
    weight = score + POLYNOMIAL[products] + blocks * (POLYNOMIAL[torch.float32] + 2 * u)
    sums = (keys + keys / 16 + 12) * u + rounded
    result = (weights * weight) @ v.abs() + (weights * weight).sum(-1, keepdim=True) * (weights @ v).abs()
    result = result + sums * (weights @ v.abs())
    result = 1.05 * result + 2.0**-126 * v.abs().sum(
        -2, keepdim=True
    )  # second order; weights below float32's range
    y = (weights @ v).abs()
    return (result + HALF[q.dtype] * (y + result) + 2.0**-24).transpose(1, 2).flatten(2)


def assert_attends(q, k, v, mask=None, precision="float32", **options):
    """Within the bound of the definition, which is computed in float64 and not rounded."""
    products = torch.bfloat16 if precision == "bfloat16" else torch.float32
    y = ops.attention(q, k, v, mask, precision=precision, **options)
    exact = reference.attention(q.double(), k, v, mask, **options)
    assert (y.dtype, y.is_contiguous()) == (q.dtype, True)
    assert_within(y, exact, bound(q, k, v, mask, **options, products=products))
    return y


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_is_within_the_bound(isa, length):
    for other in (length, 77):
        assert_attends(heads(1, 2, other, 32), heads(1, 2, length, 32), heads(1, 2, length, 32))


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_any_dimension_is_within_the_bound(isa, dimension):
    for queries, keys in ((1, 70), (30, 70)):
        q, k, v = heads(2, 2, queries, dimension), heads(2, 2, keys, dimension), heads(2, 2, keys, dimension)
        assert_attends(q, k, v)
        assert_attends(q, k, v, scale=0.3)


@needs_bfloat16
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_bfloat16_products_are_within_their_bound(length, dimension):
    q, k, v = heads(1, 2, 30, dimension), heads(1, 2, length, dimension), heads(1, 2, length, dimension)
    assert_attends(q, k, v, precision="bfloat16")
    assert_attends(q, k, v, causal=True, precision="bfloat16")
    assert_bits_equal(ops.attention(q, k, v), ops.attention(q, k, v, precision="bfloat16"))


@pytest.mark.parametrize("queries", [1, 30])
def test_scores_that_grow_from_block_to_block_are_rescaled(isa, queries):
    growth = torch.linspace(0.1, 3, 3 * BLOCK + 7)[:, None]
    q, k, v = heads(1, 1, queries, 32), heads(1, 1, len(growth), 32) * growth, heads(1, 1, len(growth), 32)
    assert_attends(q, k, v)
    assert_attends(q, k.flip(-2), v)


@pytest.mark.parametrize("queries", [1, 30])
def test_large_scores_do_not_overflow(isa, queries):
    q, k, v = heads(1, 2, queries, 32) * 1e3, heads(1, 2, 300, 32) * 1e3, heads(1, 2, 300, 32)
    assert ops.attention(q, k, v, precision="float32").abs().max() <= v.abs().max() * (1 + 2**-12)


def masks(batch, heads, queries, keys):
    """Every kind, in several shapes that can be broadcast."""
    look = torch.rand(batch, heads, queries, keys) > 0.3
    add = torch.randn(batch, heads, queries, keys).masked_fill(~look, -math.inf)
    wide = torch.randn(batch, 1, queries, keys + 9)
    return {
        "look": look,
        "look of keys": look[:, :1, :1],
        "add": add,
        "add of one head": add[:, :1],
        "add for all": add[0, 0],
        "one row": add[0, 0, 0],
        "bfloat16": add.bfloat16(),
        "float16": add.half(),
        "slice": wide[..., 4 : keys + 4],
        "transposed": torch.randn(batch, 1, keys, queries).mT,
        "one key for all": torch.rand(batch, 1, queries, 1) > 0.3,
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("queries, keys", [(1, 33), (2, 270), (30, 33), (30, 270), (30, 20)])
def test_masks_are_within_the_bound(isa, queries, keys, causal):
    q, k, v = heads(2, 4, queries, 32), heads(2, 2, keys, 32), heads(2, 2, keys, 32)
    assert_attends(q, k, v, causal=causal)
    for mask in masks(2, 4, queries, keys).values():
        assert_attends(q, k, v, mask, causal=causal)


@pytest.mark.parametrize("queries", [1, 13])
def test_dtypes_mix_and_the_result_has_that_of_q(isa, queries):
    for q_dtype, k_dtype, v_dtype in itertools.product(FLOATS, FLOATS, FLOATS):
        q, k, v = (
            heads(1, 2, queries, 48, q_dtype),
            heads(1, 1, 40, 48, k_dtype),
            heads(1, 1, 40, 48, v_dtype),
        )
        assert_attends(q, k, v)
        if octavo.cpu_info().active == octavo.cpu_info().isas[-1] and has_bfloat16():
            assert_attends(q, k, v, precision="bfloat16")


@pytest.mark.parametrize("queries", [1, 30])
def test_any_strides_give_the_bits_of_dense_tensors(isa, queries):
    q, (k, v) = heads(2, 4, queries, 32), torch.randn(2, 2, 2, 40, 32)
    expected = ops.attention(q, k, v)
    by_position = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    every_other = [x.repeat_interleave(2, -2)[:, :, ::2] for x in (q, k, v)]
    columns = [x.mT.contiguous().mT for x in (q, k, v)]
    joined = torch.cat([k, v], -1)
    for strided in (by_position, every_other, columns, (q, joined[..., :32], joined[..., 32:])):
        assert_bits_equal(ops.attention(*strided), expected)


def test_every_instruction_set_gives_the_same_bits_in_float32(isa):
    for queries, keys in ((2, 70), (30, 300)):
        q, k, v, mask = (
            heads(1, 2, queries, 48),
            heads(1, 1, keys, 48),
            heads(1, 1, keys, 48),
            torch.randn(keys),
        )
        with octavo.use_isa("scalar"):
            expected = ops.attention(q, k, v, mask, causal=True, precision="float32")
        assert_bits_equal(ops.attention(q, k, v, mask, causal=True, precision="float32"), expected)


@pytest.mark.parametrize("queries", [1, 300])
def test_threads_and_batch_splits_change_no_bit(isa, queries):
    q, k, v = heads(3, 4, queries, 32), heads(3, 2, 300, 32), heads(3, 2, 300, 32)
    mask = torch.randn(3, 1, 1, 300)
    whole = ops.attention(q, k, v, mask)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            assert_bits_equal(ops.attention(q, k, v, mask), whole)
            parts = [
                ops.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask[i : i + 1]) for i in range(3)
            ]
            assert_bits_equal(torch.cat(parts), whole)


# --- what is hidden, and what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 30])
def test_a_query_that_sees_nothing_gives_zeros(isa, queries):
    q, k, v = heads(2, 2, queries, 32), heads(2, 2, 20, 32), heads(2, 2, 20, 32)
    look = torch.ones(2, 1, queries, 20, dtype=torch.bool)
    look[1, 0, 0] = False
    for mask in (look, torch.zeros(look.shape).masked_fill(~look, -math.inf)):
        y = assert_attends(q, k, v, mask)
        assert not y[1, 0].any() and y[0].all()
        assert not ops.attention(q, k, v, mask)[1, 0].any()
    # The least float32 times log2(e) is -Inf: it hides, as its users mean it to.
    least = torch.full((20,), torch.finfo(torch.float32).min)
    assert not ops.attention(q, k, v, least).any()


def test_without_keys_or_before_the_first_key_all_is_zero(isa):
    q, k = heads(1, 2, 30, 32), heads(1, 2, 20, 32)
    assert not ops.attention(q, k[:, :, :0], k[:, :, :0]).any()
    y = ops.attention(q, k, k, causal=True)  # queries 0 .. 9 come before key 0
    assert not y[:, :10].any() and y[:, 10:].all()


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0)])
def test_nothing_in_gives_nothing_out(isa, shape):
    batch, count, queries = shape
    k = heads(batch, count, 5, 16)
    assert ops.attention(heads(batch, count, queries, 16), k, k).shape == (batch, queries, 16 * count)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("queries", [4, 30])
def test_a_query_that_is_not_finite_stays_alone(isa, queries, bad):
    q, k, v = heads(1, 2, queries, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
    expected = ops.attention(q, k, v).unflatten(2, (2, 32))
    q[0, 1, 2, 5] = bad
    y = ops.attention(q, k, v).unflatten(2, (2, 32))
    assert y[0, 2, 1].isnan().all()
    y[0, 2, 1] = expected[0, 2, 1]
    assert_bits_equal(y, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("queries", [3, 30])
def test_hidden_keys_and_values_count_for_nothing(isa, queries, bad):
    q, k, v = heads(1, 2, queries, 32), heads(1, 2, 300, 32), heads(1, 2, 300, 32)
    look = torch.rand(queries, 300) > 0.2
    look[:, 290] = look[:, 7] = False
    for mask in (look, torch.zeros(look.shape).masked_fill(~look, -math.inf)):
        for precision in ("float32", "auto"):
            expected = ops.attention(q, k, v, mask, precision=precision)
            dirty = k.clone(), v.clone()
            for x in dirty:
                x[:, :, 7, 3] = x[:, :, 290] = bad
            y = ops.attention(q, *dirty, mask, precision=precision)
            if precision == "float32":
                assert_bits_equal(y, expected)
            else:  # a block with such values is multiplied in float32
                exact = reference.attention(q, k, v, look)
                assert_within(y, exact, bound(q, k, v, look, products=torch.bfloat16))


@pytest.mark.parametrize("queries", [3, 30])
def test_the_future_is_hidden_whatever_it_holds(isa, queries):
    q, k, v = heads(1, 2, queries, 32), heads(1, 2, queries, 32), heads(1, 2, queries, 32)
    expected = ops.attention(q, k, v, causal=True, precision="float32")
    k[:, :, -1], v[:, :, -1] = math.nan, math.nan
    y = ops.attention(q, k, v, causal=True, precision="float32")
    assert_bits_equal(y[:, :-1], expected[:, :-1])
    assert y[:, -1].isnan().all()


@pytest.mark.parametrize("queries", [3, 30])
def test_a_key_or_value_that_is_seen_and_not_finite_shows(isa, queries):
    q, k, v = heads(1, 1, queries, 32), heads(1, 1, 40, 32), heads(1, 1, 40, 32)
    k_nan, v_bad = k.clone(), v.clone()
    k_nan[..., 7, 3], v_bad[..., 7, 3], v_bad[..., 8, 4] = math.nan, math.nan, math.inf
    assert ops.attention(q, k_nan, v).isnan().all()
    expected, y = ops.attention(q, k, v, precision="float32"), ops.attention(q, k, v_bad, precision="float32")
    assert y[..., 3].isnan().all() and (y[..., 4] == math.inf).all()
    y[..., 3:5] = expected[..., 3:5]
    assert_bits_equal(y, expected)


# --- bad input ------------------------------------------------------------------------------------------------------

X = torch.randn(2, 4, 5, 32)


@pytest.mark.parametrize(
    "error, text, call",
    [
        (TypeError, "q is float64", lambda: ops.attention(X.double(), X, X)),
        (TypeError, "v is int64", lambda: ops.attention(X, X, X.long())),
        (TypeError, "mask is int64", lambda: ops.attention(X, X, X, torch.ones(5, dtype=torch.int64))),
        (ValueError, "q must have 4 dimensions", lambda: ops.attention(X[0], X, X)),
        (ValueError, "have dimension 24; .*pad", lambda: ops.attention(*[X[..., :24]] * 3)),
        (ValueError, "have dimension 144", lambda: ops.attention(*[torch.randn(1, 1, 2, 144)] * 3)),
        (ValueError, "k has batch 1", lambda: ops.attention(X, X[:1], X[:1])),
        (ValueError, "v must have the shape of k", lambda: ops.attention(X, X, X[:, :, :4])),
        (ValueError, "q has 4 heads and k 3", lambda: ops.attention(X, X[:, :3], X[:, :3])),
        (ValueError, "mask has size 3 where", lambda: ops.attention(X, X, X, torch.ones(3, 1, 1, 5))),
        (
            ValueError,
            "precision is 'int4', accepted: 'auto'",
            lambda: ops.attention(X, X, X, precision="int4"),
        ),
    ],
)
def test_bad_input_is_named(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_bfloat16_is_refused_where_it_does_not_exist():
    with (
        octavo.use_isa("scalar"),
        pytest.raises(ValueError, match="scalar has no products .*precision='auto'"),
    ):
        ops.attention(X, X, X, precision="bfloat16")


# --- torch's contracts ----------------------------------------------------------------------------------------------

OPERATOR = torch.ops.octavo.attention.default


@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    q, k = heads(2, 4, 9, 32, dtype), heads(2, 2, 11, 32, dtype)
    opcheck(OPERATOR, (q, k, k, None, True, 0.2, 0))
    opcheck(OPERATOR, (q, k, k, torch.rand(2, 1, 9, 11) > 0.2, False, 0.2, 1))


def test_compile_gives_one_graph_for_every_batch_and_length():
    torch.compiler.reset()

    def f(q, k, v, mask):
        return ops.attention(q * 2, k, v, mask, precision="float32") + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch, length in ((2, 9), (3, 17), (5, 64)):
            q, k, v = heads(batch, 4, length, 32), heads(batch, 2, length, 32), heads(batch, 2, length, 32)
            mask = torch.rand(batch, 1, 1, length) > 0.2
            assert_bits_equal(compiled(q, k, v, mask), f(q, k, v, mask))


class Causal(torch.nn.Module):
    def forward(self, q, k, v):
        return ops.attention(q, k, v, causal=True)


def test_export_keeps_one_node_and_dynamic_batch_and_length():
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    arguments = tuple(heads(2, 4, 9, 32) for _ in range(3))
    exported = torch.export.export(
        Causal(), arguments, dynamic_shapes={name: {0: batch, 2: length} for name in "qkv"}
    )
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [OPERATOR]
    q, k, v = (heads(3, 4, 70, 32) for _ in range(3))
    assert_bits_equal(exported.module()(q, k, v), ops.attention(q, k, v, causal=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_it_does_for_torchs_function(dtype):
    q, k, v = (heads(1, 2, 9, 32) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        y = ops.attention(q, k, v)
        assert y.dtype == F.scaled_dot_product_attention(q, k, v).dtype == dtype
    assert_bits_equal(y, ops.attention(q.to(dtype), k.to(dtype), v.to(dtype)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "look", "add"])
def test_gradients_are_torchs(causal, kind):
    q, k, v = heads(2, 4, 5, 32), heads(2, 2, 9, 32), heads(2, 2, 9, 32)
    mask = masks(2, 4, 5, 9)[kind] if kind else None
    inputs = [x.requires_grad_() for x in (q, k, v)]
    y = ops.attention(*inputs, mask, causal=causal)
    assert_within(y, reference.attention(q, k, v, mask, causal=causal), bound(q, k, v, mask, causal=causal))
    k_all, v_all = (reference.floats.repeat_heads(x, 4) for x in (k, v))
    past = causal_mask(mask, 5, 9) if causal else mask
    torchs = F.scaled_dot_product_attention(q, k_all, v_all, past).transpose(1, 2).flatten(2)
    for ours, theirs in zip(gradients_of(y, inputs), gradients_of(torchs, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def gradients_of(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs)
