# SPDX-License-Identifier: Apache-2.0
"""Norms, their codes and rotary embeddings: within bounds of float64, the same bits everywhere, torch's contracts."""

import pytest
import torch
from asserts import assert_within
from operator_arguments import FLOATS, WHAT_TAKES_MILLISECONDS, assert_same_bits, make_weight, random_rows
from torch.library import opcheck

import octavo
from octavo import ops, reference

U = 2.0**-24  # the largest relative error of a float32 rounding
EPS = 1e-5
SIZES = [1, 7, 16, 63, 64, 65, 200, 1024]


def rounding(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most that a rounding from float32 to dtype changes."""
    if dtype == torch.float32:
        return torch.zeros_like(y)
    limits = torch.finfo(dtype)
    return limits.eps / 2 * (1 + 2**-8) * y.abs() + limits.smallest_normal * limits.eps / 2


def norm_bound(total, weight, bias, rms: bool, dtype) -> torch.Tensor:
    """docs/numerics.md, eq. 52; all arguments float64."""
    steps = -(-total.shape[-1] // 64) + 7  # s + 1: additions that one element goes through, and the division
    mean = torch.zeros(()) if rms else total.mean(-1, keepdim=True)
    centered = total - mean
    size = (centered.square().mean(-1, keepdim=True) + EPS).sqrt()
    of_mean = 0.0 if rms else steps * U * total.abs().mean(-1, keepdim=True)
    relative = (steps / 2 + 8) * U + (of_mean / size) ** 2 / 2
    y = centered / size * weight + bias
    of_value = weight.abs() * (of_mean + centered.abs() * relative) / size
    return (of_value + U * (y.abs() + bias.abs())) * (1 + 2**-8) + rounding(y, dtype)


def random_norm(shape, dtype):
    """x, residual, weight, bias; rows of different size and mean."""
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1)) + 1
    return x.to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]), torch.randn(shape[-1])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("rms", [False, True])
def test_norms_are_within_the_bound(dtype, k, rms):
    x, residual, weight, bias = random_norm((6, k), dtype)
    y, total = ops.add_norm(x, residual, weight, bias, EPS, rms)
    assert_same_bits(total, (x.float() + residual.float()).to(dtype))
    wide = total.double(), weight.double(), bias.double()
    expected, _ = reference.add_norm(wide[0], torch.zeros_like(wide[0]), weight, bias, EPS, rms)
    assert_within(y, expected, norm_bound(*wide, rms, dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rms", [False, True])
def test_every_isa_gives_the_same_bits(isa, dtype, rms):
    for k in SIZES:
        arguments = (*random_norm((5, k), dtype), EPS, rms)
        with octavo.use_isa("scalar"):
            expected = ops.add_norm(*arguments), ops.rms_norm(arguments[0], arguments[2], EPS)
        got = ops.add_norm(*arguments), ops.rms_norm(arguments[0], arguments[2], EPS)
        for tensor, other in zip((*got[0], got[1]), (*expected[0], expected[1]), strict=True):
            assert_same_bits(tensor, other)


@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm_is_the_norm_of_a_sum_with_nothing(isa, dtype):
    x, _, weight, _ = random_norm((3, 100), dtype)
    y, _ = ops.add_norm(x, torch.zeros_like(x), weight, None, EPS, True)
    assert_same_bits(ops.rms_norm(x, weight, EPS), y)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_does_not_depend_on_the_others(isa, threads):
    x, residual, weight, bias = random_norm((300, 130), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole, _ = ops.add_norm(x, residual, weight, bias, EPS)
    finally:
        torch.set_num_threads(before)
    for row in (0, 1, 150, 299):
        assert_same_bits(ops.add_norm(x[row], residual[row], weight, bias, EPS)[0], whole[row])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5, 70), (2, 0), (0, 4)])
def test_a_sum_that_nobody_wants_changes_nothing_else(isa, dtype, shape):
    x, residual, weight, bias = (
        tensor.to(dtype)
        for tensor in (torch.randn(shape), torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1]))
    )
    for operator in (ops.add_norm, ops.add_norm_codes):
        y, total, *codes = operator(x, residual, weight, bias, EPS)
        other, nothing, *other_codes = operator(x, residual, weight, bias, EPS, keep_sum=False)
        assert total.shape == x.shape and nothing.shape == (0,) and nothing.dtype == dtype
        for tensor, same in zip((y, *codes), (other, *other_codes), strict=True):
            assert_same_bits(tensor, same)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_keeps_to_itself(isa, bad):
    x, residual, weight, bias = random_norm((4, 70), torch.float32)
    clean = ops.add_norm_codes(x, residual, weight, bias, EPS)
    x[2, 3] = bad
    y, total, codes, scale = ops.add_norm_codes(x, residual, weight, bias, EPS)
    assert y[2].isnan().all() and scale[2].isnan()
    for tensor, other in zip((y, total, codes, scale), clean, strict=True):
        assert_same_bits(tensor[[0, 1, 3]], other[[0, 1, 3]])


def test_half_precision_weights_are_widened():
    x, residual, weight, bias = random_norm((3, 33), torch.bfloat16)
    half = weight.bfloat16(), bias.bfloat16()
    y, _ = ops.add_norm(x, residual, *half, EPS)
    assert_same_bits(y, ops.add_norm(x, residual, half[0].float(), half[1].float(), EPS)[0])


# --- codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k", [5, 64, 70, 384])
@pytest.mark.parametrize("rms", [False, True])
def test_codes_are_those_that_linear_dynamic_makes(isa, dtype, k, rms):
    x, residual, weight, bias = random_norm((13, k), dtype)
    y, total, codes, scale = ops.add_norm_codes(x, residual, weight, bias, EPS, rms)
    for tensor, other in zip((y, total), ops.add_norm(x, residual, weight, bias, EPS, rms), strict=True):
        assert_same_bits(tensor, other)
    layer = make_weight(40, k)
    for activation in (None, "gelu"):
        expected = ops.linear_dynamic(y.float(), *layer, True, activation)
        assert_same_bits(ops.linear_codes(codes, scale, *layer, activation), expected)
        assert_same_bits(ops.linear_codes(codes.contiguous(), scale, *layer, activation), expected)


def test_codes_and_the_product_are_the_references(isa):
    y = random_rows(9, 70)
    y[3, 2] = torch.nan
    weight = torch.ones(70)
    _, _, codes, scale = ops.add_norm_codes(y, torch.zeros_like(y), weight, None, EPS, True)
    expected = reference.add_norm_codes(y, torch.zeros_like(y), weight, None, EPS, True)
    assert torch.equal(scale.isnan(), expected[3].isnan())
    layer = make_weight(20, 70)
    got = ops.linear_codes(expected[2], expected[3], *layer)
    assert_same_bits(got, reference.linear_codes(expected[2], expected[3], *layer))
    assert (codes.int() - expected[2].int()).abs().max() <= 1  # y itself is only within its bound


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (0, 70), (2, 1, 3, 64)], ids=str)
def test_codes_of_any_shape(shape):
    x, weight, layer = torch.randn(shape), torch.randn(shape[-1]), make_weight(20, shape[-1])
    y, _, codes, scale = ops.add_norm_codes(x, x, weight, None, EPS, True)
    assert codes.shape == shape and scale.shape == (x.shape[:-1].numel(),)
    assert_same_bits(ops.linear_codes(codes, scale, *layer), ops.linear_dynamic(y, *layer))
    # Rows at no common distance are copied.
    turned = codes[None].transpose(0, -2).contiguous().transpose(0, -2)[0]
    assert_same_bits(ops.linear_codes(turned, scale, *layer), ops.linear_dynamic(y, *layer))


def test_batch_split_and_threads_change_no_bit_of_linear_codes(isa):
    x, weight, layer = torch.randn(300, 128), torch.randn(128), make_weight(600, 128)
    _, _, codes, scale = ops.add_norm_codes(x, x, weight, None, EPS, True)
    whole = ops.linear_codes(codes, scale, *layer, "gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(ops.linear_codes(codes, scale, *layer, "gelu"), whole)
            for row in (0, 7, 299):
                part = slice(row, row + 1)
                assert_same_bits(ops.linear_codes(codes[part], scale[part], *layer, "gelu"), whole[part])
    finally:
        torch.set_num_threads(before)


# --- rope -----------------------------------------------------------------------------------------------------------


def random_rope(dtype, batch=2, rotated=32, angles=1, length=9):
    q = torch.randn(batch, length, 4, 32).to(dtype).transpose(1, 2)
    k = torch.randn(batch, length, 2, 32).to(dtype).transpose(1, 2)
    angle = torch.rand(angles, length, rotated) * 7
    return q, k, angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rotated", [2, 20, 32])
@pytest.mark.parametrize("angles, length", [(1, 9), (2, 9), (2, 1)])
def test_rope_is_within_two_roundings(isa, dtype, rotated, angles, length):
    """One of the second product, one of the fma, and one to dtype."""
    q, k, cos, sin = random_rope(dtype, rotated=rotated, angles=angles, length=length)
    expected = reference.rope(q.double(), k.double(), cos, sin)
    for x, y, exact in zip((q, k), ops.rope(q, k, cos, sin), expected, strict=True):
        assert y.shape == x.shape and y.is_contiguous()
        largest = x.double().abs().amax()
        assert_within(y, exact, U * (largest + exact.abs()) + rounding(exact, dtype))
        assert_same_bits(y[..., rotated:], x[..., rotated:].contiguous())
    got = ops.rope(q, k, cos, sin)
    with octavo.use_isa("scalar"):
        for y, other in zip(got, ops.rope(q, k, cos, sin), strict=True):
            assert_same_bits(y, other)


def test_rope_turns_what_has_any_strides():
    q, k, cos, sin = random_rope(torch.float32)
    for y, other in zip(ops.rope(q, k, cos, sin), ops.rope(q.mT.contiguous().mT, k, cos, sin), strict=True):
        assert_same_bits(y, other)


# --- torch's contracts ----------------------------------------------------------------------------------------------


def opcheck_calls(dtype, shape):
    namespace, x = torch.ops.octavo, torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1])
    yield namespace.rms_norm.default, (x, weight, EPS)
    yield namespace.add_norm.default, (x, x.clone(), weight, weight.clone(), EPS)
    yield namespace.add_norm_codes.default, (x, x.clone(), weight, None, EPS, True)
    yield namespace.add_norm.default, (x, x.clone(), weight, None, EPS, False, False)
    yield namespace.add_norm_codes.default, (x, x.clone(), weight, None, EPS, False, False)
    _, _, codes, scale = ops.add_norm_codes(x, x, weight, None, EPS, True)
    yield namespace.linear_codes.default, (codes, scale, *make_weight(20, shape[-1]), 2)
    yield namespace.rope.default, random_rope(dtype)


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(dtype):
    """Everything for all shapes, but for tracing, which takes a quarter of a second: once for each call and type."""
    for operator, arguments in opcheck_calls(dtype, (70,)):
        opcheck(operator, arguments, test_utils=WHAT_TAKES_MILLISECONDS)
    for operator, arguments in opcheck_calls(dtype, (2, 3, 64)):
        opcheck(operator, arguments)


def test_compile_gives_one_graph_for_every_batch_size():
    weight, layer = torch.randn(64), make_weight(64, 64)

    def block(x, residual):
        y, total, codes, scale = ops.add_norm_codes(x, residual, weight, weight, EPS)
        y = y + ops.linear_codes(codes, scale, *layer, "gelu")
        y, total = ops.add_norm(y, total, weight, weight, EPS)
        return ops.rms_norm(y + total, weight, EPS)

    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((2, 3, 64), (4, 7, 64), (2, 1, 64)):
            x, residual = torch.randn(shape), torch.randn(shape)
            assert_same_bits(compiled(x, residual), block(x, residual))


def test_gradients_are_torchs():
    x, residual = (torch.randn(3, 20, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(20), torch.randn(20)
    y, total = ops.add_norm(x, residual, weight, bias, EPS)
    (y.square().sum() + ops.rms_norm(total, weight, EPS).sum()).backward()
    mine = x.grad
    x.grad = None
    total = x + residual
    y = torch.nn.functional.layer_norm(total, (20,), weight, bias, EPS)
    (y.square().sum() + torch.nn.functional.rms_norm(total, (20,), weight, EPS).sum()).backward()
    assert_same_bits(mine, x.grad)


def test_the_gradient_path_gives_nearly_the_same_values():
    q, k, cos, sin = random_rope(torch.float32, rotated=20)
    for y, other in zip(ops.rope(q, k, cos, sin), ops.rope(q.requires_grad_(), k, cos, sin), strict=True):
        assert_within(other, y, 4 * U * q.detach().abs().amax().item())
    x, residual, weight, bias = random_norm((3, 50), torch.float32)
    y, total = ops.add_norm(x, residual, weight, bias, EPS)
    wide = total.double(), weight.double(), bias.double()
    other, _ = ops.add_norm(x.requires_grad_(), residual, weight, bias, EPS)
    assert_within(other, y, 8 * norm_bound(*wide, False, torch.float32))  # torch adds in another order


def test_codes_have_no_gradient_and_say_so():
    x = torch.randn(3, 20, requires_grad=True)
    with pytest.raises(ValueError, match="use add_norm and linear_dynamic"):
        ops.add_norm_codes(x, x, torch.ones(20), None, EPS)


X, W = torch.randn(3, 20), torch.ones(20)
Q, ANGLE = torch.randn(2, 4, 9, 32), torch.randn(1, 9, 32)


@pytest.mark.parametrize(
    "error, text, call",
    [
        (TypeError, "x is float64", lambda: ops.rms_norm(X.double(), W, EPS)),
        (ValueError, "weight must have 20 values", lambda: ops.rms_norm(X, W[:5], EPS)),
        (ValueError, "weight must be float32", lambda: ops.rms_norm(X, W.double(), EPS)),
        (ValueError, "at least 1 dimension", lambda: ops.rms_norm(torch.tensor(1.0), W, EPS)),
        (ValueError, "residual must have the shape", lambda: ops.add_norm(X, X[:2], W, W, EPS)),
        (
            ValueError,
            "residual must have the shape and the dtype",
            lambda: ops.add_norm(X, X.half(), W, W, EPS),
        ),
        (ValueError, "bias must have 20 values", lambda: ops.add_norm(X, X, W, W[:5], EPS)),
        (TypeError, "codes is int8", lambda: ops.linear_codes(X.to(torch.int8), W[:3], *make_weight(4, 20))),
        (ValueError, "scale must be", lambda: ops.linear_codes(X.to(torch.uint8), W, *make_weight(4, 20))),
        (ValueError, "x has 20 features", lambda: ops.linear_codes(X.byte(), W[:3], *make_weight(4, 70))),
        (ValueError, "q must have 4 dimensions", lambda: ops.rope(Q[0], Q, ANGLE, ANGLE)),
        (ValueError, "cos must have 3 dimensions", lambda: ops.rope(Q, Q, ANGLE[0], ANGLE[0])),
        (ValueError, "sin must have the shape", lambda: ops.rope(Q, Q, ANGLE, ANGLE[:, :5])),
        (ValueError, "cos must have the shape", lambda: ops.rope(Q, Q, ANGLE[:, :5], ANGLE[:, :5])),
        (ValueError, "even", lambda: ops.rope(Q, Q, ANGLE[..., :5], ANGLE[..., :5])),
    ],
)
def test_bad_input_is_named(error, text, call):
    with pytest.raises(error, match=text):
        call()
