# SPDX-License-Identifier: Apache-2.0
"""Every fake says what its operator does: shapes, strides and dtypes, also of symbols, for torch.compile and export."""

import itertools
from math import prod

import pytest
import torch
from operator_arguments import FLOATS, LINEARS, assert_same_bits, make_weight, random_codes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from octavo import ops

OPERATORS = torch.ops.octavo
LEADING = [axes for count in range(4) for axes in itertools.product((0, 1, 3), repeat=count)]
QMIN, QMAX = -128, 127


def norm_arguments(leading, k, dtype=torch.float32):
    return (
        torch.randn(*leading, k).to(dtype),
        torch.randn(*leading, k).to(dtype),
        torch.rand(k),
        torch.rand(k),
    )


def calls_of_any_axes(leading, k, n, dtype=torch.float32):
    """Calls of the operators whose x is [..., k]."""
    x, residual, weight, bias = norm_arguments(leading, k, dtype)
    yield OPERATORS.activate, (x, 2)
    yield OPERATORS.silu_mul, (x, residual)
    yield OPERATORS.rms_norm, (x, weight, 1e-5)
    for keep_sum in (True, False):
        yield OPERATORS.add_norm, (x, residual, weight, bias, 1e-5, False, keep_sum)
        yield OPERATORS.add_norm_codes, (x, residual, weight, bias, 1e-5, True, keep_sum)
    packed = make_weight(n, k)
    for name, options in LINEARS.values():
        yield getattr(OPERATORS, name), (x, *packed, *options)
    ids = torch.zeros(leading, dtype=torch.int64) if n else torch.zeros((*leading, 0), dtype=torch.int64)
    yield OPERATORS.embedding_half, (ids, ops.pack_half(torch.randn(n, k).half()), n, dtype)
    planes = ops.pack_planes(torch.zeros(n, k, dtype=torch.uint8), 3)
    grouped = ops.group_weight(planes, n=n, bits=3, group_size=0, offset=4)
    yield OPERATORS.embedding_groups, (ids, *grouped, k, dtype)
    yield OPERATORS.linear_half, (x, ops.pack_half(torch.randn(n, k).half()), None, n)
    codes = OPERATORS.add_norm_codes(x, residual, weight, bias, 1e-5)[2:]
    yield OPERATORS.linear_codes, (*codes, *packed)


def calls_of_matrices(m, k, n, dtype=torch.float32):
    x, scale, zero_point = torch.randn(m, k).to(dtype), torch.rand(m), torch.zeros(m, dtype=torch.int32)
    yield OPERATORS.choose_qparams, (x, QMIN, QMAX, False)
    yield OPERATORS.quantize, (x, scale, zero_point, QMIN, QMAX, torch.int8)
    yield OPERATORS.dequantize, (random_codes(m, k), scale, zero_point, dtype)
    yield OPERATORS.int8_mm, (random_codes(m, k), random_codes(k, n))
    yield OPERATORS.pack_weight, (random_codes(m, k),)
    yield (
        OPERATORS.pack_weight_into,
        (random_codes(m, k), torch.empty(ops.packed_shape(m, k), dtype=torch.int8)),
    )
    yield OPERATORS.unpack_weight, (ops.pack_weight(random_codes(m, k))[0], m, k)
    blocks = torch.randn(m, 256 * k % 768).to(dtype)
    for name in ("Q8_0", "Q2_K", "Q4_K", "MXFP4"):  # each has other packed tensors
        yield from calls_of_blocks(blocks, ops.block_type("test", name).number)
    half = torch.randn(m, k).half()
    yield OPERATORS.pack_half, (half,)
    yield OPERATORS.unpack_half, (ops.pack_half(half), m, k)


def calls_of_blocks(x, number):
    n, k = x.shape
    blocks = OPERATORS.ggml_quantize(x, number)
    yield OPERATORS.ggml_quantize, (x, number, torch.ones(k))
    yield OPERATORS.ggml_dequantize, (blocks, number, k, x.dtype)
    yield OPERATORS.ggml_pack, (blocks, number, k)
    yield OPERATORS.ggml_unpack, (*OPERATORS.ggml_pack(blocks, number, k), number, n, k)


def calls_of_heads(batch, queries, keys, dtype=torch.float32):
    q, k = torch.randn(batch, 4, queries, 16).to(dtype), torch.randn(batch, 2, keys, 16).to(dtype)
    for mask in (None, torch.rand(queries, keys) > 0.5, torch.zeros(batch, 1, 1, keys)):
        yield OPERATORS.attention, (q, k, k, mask, True, 0.25, 0)
    angles = torch.randn(batch, queries, 8)
    yield OPERATORS.rope, (q, q[:, :2], angles, angles)


def columns_apart(x):
    """The same values; the elements of a row lie 3 apart, so that no axis is dense."""
    return x.repeat_interleave(3, -1)[..., ::3] if isinstance(x, torch.Tensor) and x.dim() > 1 else x


def description(result):
    tensors = result if isinstance(result, tuple) else (result,)
    return [(tuple(x.shape), x.dtype, x.stride() if x.numel() else None) for x in tensors]


def assert_fake_agrees(operator, arguments):
    expected = description(operator(*arguments))
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    assert description(operator(*on_meta)) == expected, operator
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        assert description(operator(*fakes)) == expected, operator


@pytest.mark.parametrize("k, n", [(0, 5), (1, 0), (70, 5)])
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_fakes_of_any_axes_agree_with_the_operators(leading, k, n):
    for operator, arguments in calls_of_any_axes(leading, k, n):
        assert_fake_agrees(operator, arguments)


@pytest.mark.parametrize("m, k, n", list(itertools.product((0, 1, 17), (0, 1, 70), (0, 5))))
def test_fakes_of_matrices_agree_with_the_operators(m, k, n):
    for operator, arguments in calls_of_matrices(m, k, n):
        assert_fake_agrees(operator, arguments)


@pytest.mark.parametrize("batch, queries, keys", list(itertools.product((0, 1, 2), (0, 1, 7), (0, 1, 9))))
def test_fakes_of_heads_agree_with_the_operators(batch, queries, keys):
    for operator, arguments in calls_of_heads(batch, queries, keys):
        assert_fake_agrees(operator, arguments)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fakes_agree_for_every_dtype_and_any_strides(dtype):
    for operator, arguments in (
        *calls_of_any_axes((2, 3), 70, 20, dtype),
        *calls_of_matrices(17, 70, 20, dtype),
        *calls_of_heads(2, 7, 9, dtype),
    ):
        assert_fake_agrees(operator, arguments)
        if operator not in (OPERATORS.pack_weight_into, OPERATORS.linear_codes):
            assert_fake_agrees(operator, [columns_apart(x) for x in arguments])


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("k", [0, 70])
def test_opcheck_where_axes_or_columns_are_missing(leading, k):
    for operator, arguments in calls_of_any_axes(leading, k, 5):
        opcheck(operator.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("rows", [(4,), (0,), (2, 3), ()])
@pytest.mark.parametrize("k", [0, 64, 70])
def test_linear_codes_takes_what_add_norm_codes_gives(isa, rows, k):
    x, residual, weight, bias = norm_arguments(rows, k)
    packed = make_weight(20, k)
    y, _, codes, scale = ops.add_norm_codes(x, residual, weight, bias, 1e-5)
    assert scale.shape == (prod(rows),)
    assert_same_bits(ops.linear_codes(codes, scale, *packed), ops.linear_dynamic(y, *packed))


# --- symbols --------------------------------------------------------------------------------------------------------


class Call(torch.nn.Module):
    """An operator as a module. The tensors that have the batch axis are inputs, the rest of the arguments are not."""

    def __init__(self, operator, arguments, dynamic):
        super().__init__()
        self.operator, self.arguments, self.dynamic = operator, list(arguments), dynamic
        for i, x in enumerate(arguments):
            if isinstance(x, torch.Tensor) and i not in dynamic:
                self.register_buffer(f"argument{i}", x)

    def forward(self, *inputs):
        arguments = [
            getattr(self, f"argument{i}") if hasattr(self, f"argument{i}") else x
            for i, x in enumerate(self.arguments)
        ]
        for i, x in zip(self.dynamic, inputs, strict=True):
            arguments[i] = x
        return self.operator(*arguments)


def batched_calls():
    """(operator, arguments of a batch size, which of them have the batch as their first axis)."""
    weight, norm, angles = make_weight(20, 70), (torch.rand(70), torch.rand(70), 1e-5), torch.randn(1, 7, 8)

    def rows(m):
        return torch.randn(m, 3, 70)

    def heads(m, count):
        return tuple(torch.randn(m, 4, 7, 16) for _ in range(count))

    def qparams(m):
        return torch.rand(m), torch.zeros(m, dtype=torch.int32)

    yield OPERATORS.activate, lambda m: (rows(m), 2), (0,)
    yield OPERATORS.silu_mul, lambda m: (rows(m), rows(m)), (0, 1)
    yield OPERATORS.rms_norm, lambda m: (rows(m), norm[0], 1e-5), (0,)
    for operator in (OPERATORS.add_norm, OPERATORS.add_norm_codes):
        yield operator, lambda m: (rows(m), rows(m), *norm), (0, 1)
    for name, options in LINEARS.values():
        yield getattr(OPERATORS, name), lambda m, options=options: (rows(m), *weight, *options), (0,)
    half = ops.pack_half(torch.randn(20, 70).half())
    yield OPERATORS.linear_half, lambda m: (rows(m), half, torch.rand(20), 20), (0,)
    yield (
        OPERATORS.linear_codes,
        lambda m: (random_codes(m, 70, dtype=torch.uint8), torch.rand(m), *weight),
        (0, 1),
    )
    yield OPERATORS.choose_qparams, lambda m: (torch.randn(m, 70), QMIN, QMAX, False), (0,)
    yield OPERATORS.quantize, lambda m: (torch.randn(m, 70), *qparams(m), QMIN, QMAX, torch.int8), (0, 1, 2)
    yield OPERATORS.dequantize, lambda m: (random_codes(m, 70), *qparams(m), torch.float32), (0, 1, 2)
    yield OPERATORS.int8_mm, lambda m: (random_codes(m, 70), random_codes(70, 5)), (0,)
    yield OPERATORS.pack_weight, lambda m: (random_codes(m, 70),), (0,)
    yield OPERATORS.attention, lambda m: (*heads(m, 3), None, True, 0.25, 1), (0, 1, 2)
    yield (
        OPERATORS.attention,
        lambda m: (*heads(m, 3), torch.rand(m, 1, 1, 7) > 0.2, False, 0.25, 1),
        (0, 1, 2, 3),
    )
    yield OPERATORS.rope, lambda m: (*heads(m, 2), angles, angles), (0, 1)


BATCHED = [pytest.param(*call, id=f"{call[0].__name__}{i}") for i, call in enumerate(batched_calls())]


def results(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("operator, arguments_of, dynamic", BATCHED)
def test_one_graph_serves_every_batch_size(operator, arguments_of, dynamic):
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(operator, fullgraph=True, dynamic=True, backend=count)
    for m in (33, 34, 51):  # sizes that no other axis has: torch takes equal sizes for one symbol
        arguments = arguments_of(m)
        for actual, expected in zip(
            results(compiled(*arguments)), results(operator(*arguments)), strict=True
        ):
            assert_same_bits(actual, expected)
    assert len(graphs) == 1


@pytest.mark.parametrize("operator, arguments_of, dynamic", BATCHED)
def test_export_keeps_a_dynamic_batch(operator, arguments_of, dynamic):
    arguments, batch = arguments_of(33), torch.export.Dim("batch", min=17, max=1024)
    module = Call(operator.default, arguments, dynamic)
    exported = torch.export.export(
        module,
        tuple(arguments[i] for i in dynamic),
        dynamic_shapes={"inputs": tuple({0: batch} for _ in dynamic)},
    )
    other = arguments_of(51)
    inputs = tuple(other[i] for i in dynamic)
    for actual, expected in zip(results(exported.module()(*inputs)), results(module(*inputs)), strict=True):
        assert_same_bits(actual, expected)
