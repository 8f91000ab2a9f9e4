# SPDX-License-Identifier: Apache-2.0
"""Attention computed by torch's function, for gradients, means what the kernels mean: what is hidden, what is empty."""

import itertools
import math

import pytest
import torch
from operator_arguments import FLOATS

import octavo
from octavo import ops, reference

LEAST = torch.finfo(torch.float32).min


def heads(batch, count, length, dtype=torch.float32, dimension=16):
    return torch.randn(batch, count, length, dimension).to(dtype)


def both_ways(q, k, v, mask=None, **options):
    """The kernel's result, and that of torch's function after a backward whose gradients are finite."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = ops.attention(*inputs, mask, **options)
    y.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    return ops.attention(q, k, v, mask, **options), y.detach()


def masks_that_blind_the_first_query(queries, keys, hide):
    look = torch.ones(queries, keys, dtype=torch.bool)
    look[0] = False
    add = torch.zeros(queries, keys).masked_fill(~look, hide)
    return add, add[None], add.expand(2, 4, -1, -1)


@pytest.mark.parametrize("hide", [-math.inf, LEAST])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient(dtype, causal, hide):
    q, k, v = heads(2, 4, 7, dtype), heads(2, 2, 9, dtype), heads(2, 2, 9, dtype)
    for mask in (
        *masks_that_blind_the_first_query(7, 9, hide),
        masks_that_blind_the_first_query(7, 9, hide)[0] == 0,
        torch.full((9,), hide),
        torch.full((1,), hide).bfloat16(),
    ):
        kernels, torchs = both_ways(q, k, v, mask, causal=causal, precision="float32")
        assert not kernels[:, 0].any() and not torchs[:, 0].any()
        assert torch.equal(kernels.any(-1), torchs.any(-1)), "the same queries are blind"
        if mask.dim() > 1:
            look = mask if mask.dtype == torch.bool else mask == 0
            exact = reference.attention(q, k, v, look, causal=causal)
            # Nine weights, their sum and the result may each be rounded to q's dtype by torch.
            torch.testing.assert_close(
                torchs, exact, atol=12 * torch.finfo(dtype).eps * v.abs().max().item(), rtol=0
            )


def test_masks_are_made_where_the_keys_are_whatever_the_default_device_is():
    q = heads(1, 2, 3).requires_grad_()
    with torch.device("meta"):
        y = ops.attention(q, q, q, causal=True)
    assert torch.equal(y, ops.attention(q, q, q, causal=True))


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0), (5, 2), (0, 0)])
@pytest.mark.parametrize("batch, causal", list(itertools.product((0, 2), (False, True))))
def test_empty_axes_give_the_same_both_ways(batch, causal, queries, keys):
    q, k = heads(batch, 4, queries), heads(batch, 2, keys)
    for mask in (None, torch.zeros(keys), torch.ones(queries, 1, dtype=torch.bool)):
        kernels, torchs = both_ways(q, k, k, mask, causal=causal, precision="float32")
        assert kernels.shape == torchs.shape == (batch, queries, 64)
        if keys == 0 or causal and keys < queries:
            assert not kernels[:, : queries - keys].any() and not torchs[:, : queries - keys].any()


@pytest.mark.parametrize("shape", [(9,), (1, 9), (7, 9), (7, 1), (1,), (4, 7, 9), (2, 1, 1, 9), ()])
def test_masks_of_any_number_of_axes_are_broadcast_alike(shape):
    q, k, v = heads(2, 4, 7), heads(2, 2, 9), heads(2, 2, 9)
    for mask in (torch.randn(shape), torch.rand(shape) > 0.3):
        kernels, torchs = both_ways(q, k, v, mask, precision="float32")
        # Nine products and weights, each rounded a few times in float32.
        torch.testing.assert_close(kernels, torchs, atol=40 * 2.0**-24 * v.abs().max().item() * 4, rtol=0)


def test_a_mask_that_q_s_dtype_cannot_hold_hides_nothing_more():
    """-1e9 is -Inf in float16; a query that sees only such keys weighs them, on both ways."""
    q, k, v = heads(1, 1, 7, torch.float16), heads(1, 1, 9, torch.float16), heads(1, 1, 9, torch.float16)
    mask = torch.full((7, 9), -1e9)
    kernels, torchs = both_ways(q, k, v, mask)
    assert kernels.any(-1).all() and torchs.any(-1).all() and torchs.isfinite().all()


def test_a_precision_that_does_not_exist_here_is_refused_with_gradients_too():
    q = heads(1, 1, 7).requires_grad_()
    with octavo.use_isa("scalar"), pytest.raises(ValueError, match="no products of bfloat16"):
        ops.attention(q, q, q, precision="bfloat16")


def test_compiled_gradients_are_one_graph():
    torch.compiler.reset()
    q, k, mask = heads(2, 4, 7).requires_grad_(), heads(2, 2, 9), torch.zeros(9)
    compiled = torch.compile(ops.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, k, mask), ops.attention(q, k, k, mask))
