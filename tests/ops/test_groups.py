# SPDX-License-Identifier: Apache-2.0
"""Weights in groups: the kernels give the bits of the reference, gradients are those of the dequantized layer."""

import itertools

import pytest
import torch
from operator_arguments import FLOATS, assert_same_bits

from octavo import cpu_info, ops, reference, use_isa

INPUTS = [(8, 0), (8, 32), (8, 128), (16, 0)]
KINDS = [
    *("per channel", "plain", "zero points", "minima", "two levels", "table", "wide table"),
    *("signed", "halves of bytes", "powers of two", "small floats"),
]


def in_strips(numbers):
    """[n, groups] as the operators have it, [strips, groups, 16]."""
    return (
        torch.nn.functional.pad(numbers, (0, 0, 0, -len(numbers) % 16)).unflatten(0, (-1, 16)).mT.contiguous()
    )


def make_weight(n, k, bits, group_size, kind):
    """A random GroupWeight."""
    u = torch.randint(2**bits, (n, k), dtype=torch.uint8)
    codes = ops.pack_weight((u.int() - 128).to(torch.int8))[0] if bits == 8 else ops.pack_planes(u, bits)
    groups = -(-k // group_size) if group_size else 1
    numbers = {"n": n, "bits": bits, "group_size": group_size, "offset": 2 ** (bits - 1)}
    if kind == "per channel":
        return ops.group_weight(codes, **numbers, column_scale=torch.rand(n) + 0.1)
    scale = in_strips((torch.rand(n, groups) + 0.1).to(FLOATS[(n + k) % 3]))
    integers = in_strips(torch.randint(64, (n, groups), dtype=torch.uint8))
    if kind == "zero points":
        return ops.group_weight(codes, scale, **{**numbers, "offset": 0}, minimum=integers)
    if kind == "minima":
        return ops.group_weight(codes, scale, **numbers, minimum=in_strips(torch.randn(n, groups).half()))
    if kind == "two levels":
        super_scale = torch.rand(-(-n // 16), 1, 2, 16).half()
        return ops.group_weight(codes, integers, **numbers, minimum=integers.flip(0), super_scale=super_scale)
    if kind in ("signed", "halves of bytes"):
        super_scale = torch.rand(-(-n // 16), 1, 1 if kind == "signed" else 2, 16).half()
        whole = in_strips(torch.randint(256, (n, groups), dtype=torch.uint8))
        whole = whole.view(torch.int8) if kind == "signed" else whole
        return ops.group_weight(codes, whole, **numbers, super_scale=super_scale)
    if kind == "powers of two":
        return ops.group_weight(codes, integers + 100, **numbers)
    if kind == "small floats":
        return ops.group_weight(codes, (integers + 64).view(torch.float8_e4m3fn), **numbers)
    if kind.endswith("table"):
        offset = 127 if kind == "wide table" else 64
        numbers |= {"offset": offset, "table": torch.randint(2 * offset, (16,), dtype=torch.uint8)}
    return ops.group_weight(codes, scale, **numbers)


def weight_cases(shapes):
    for (m, n, k, group_size), bits, kind in itertools.product(shapes, range(1, 9), KINDS):
        is_possible = kind != "wide table" or group_size % 32 == 0
        if (not kind.endswith("table") or bits == 4) and is_possible:
            yield (
                m,
                k,
                make_weight(n, k, bits, group_size, kind),
                f"{m}x{k}->{n}, {bits} bits, {group_size}, {kind}",
            )


@pytest.mark.parametrize("isa", cpu_info().isas)
def test_the_product_has_the_bits_of_the_reference(isa):
    torch.manual_seed(1)
    with use_isa(isa):
        for m, k, weight, case in weight_cases(
            [(3, 37, 100, 32), (19, 20, 48, 16), (2, 33, 300, 0), (9, 80, 130, 48)]
        ):
            x, bias = torch.randn(m, k), torch.randn(weight.n)
            x[m // 2] = torch.nan if k % 3 else 0.0
            for input_bits, input_group in INPUTS:
                options = {"bias": bias, "input_bits": input_bits, "input_group": input_group}
                try:
                    actual = ops.linear_groups(x, weight, **options)
                    assert_same_bits(actual, reference.linear_groups(x, weight, **options))
                except AssertionError as error:
                    raise AssertionError(
                        f"{case}, input {input_bits} bits in groups of {input_group}"
                    ) from error


def test_packing_and_what_a_weight_is_worth_equal_the_reference():
    torch.manual_seed(2)
    for bits in range(1, 8):
        u = torch.randint(2**bits, (37, 100), dtype=torch.uint8)
        planes = ops.pack_planes(u, bits)
        assert torch.equal(planes, reference.pack_planes(u, bits))
        assert torch.equal(ops.unpack_planes(planes, 37, 100), u)
    for _, k, weight, case in weight_cases([(1, 37, 100, 32), (1, 16, 64, 0)]):
        for dtype in FLOATS:
            actual = ops.dequantize_groups(weight, k, dtype)
            assert torch.equal(actual, reference.dequantize_groups(weight, k, dtype)), case


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_float_type_strides_and_activation(dtype):
    torch.manual_seed(3)
    weight = make_weight(40, 96, 4, 32, "plain")
    x = torch.randn(96, 2, 5).to(dtype).permute(1, 2, 0)
    y = ops.linear_groups(x, weight, input_group=32)
    assert_same_bits(y, reference.linear_groups(x, weight, input_group=32))
    floats = ops.linear_groups(x.float(), weight, input_group=32)
    active = ops.linear_groups(x, weight, input_group=32, activation="silu")
    assert_same_bits(active, ops.activate(floats, "silu").to(dtype))  # rounded once, after the activation


def test_rows_within_the_bound_of_the_exact_product():
    torch.manual_seed(4)
    k = 512
    weight = make_weight(64, k, 4, 32, "plain")
    x = torch.randn(50, k, dtype=torch.float64) * torch.logspace(-2, 2, k)
    dense = ops.dequantize_groups(weight, k).double()
    y = ops.linear_groups(x.float(), weight, input_group=32).double()
    steps = x.float().double().unflatten(1, (-1, 32)).abs().amax(2) / 127
    rounding = (steps / 2) @ dense.abs().unflatten(1, (-1, 32)).sum(2).T
    floats = (k / 32 + 4) * 2**-24 * (x.abs() @ dense.abs().T) * 2
    assert ((y - x.float().double() @ dense.T).abs() <= rounding + floats).all()


def test_gradients_are_those_of_the_dequantized_layer():
    torch.manual_seed(5)
    for kind in KINDS[1:5]:
        weight = make_weight(24, 80, 4, 32, kind)
        x, bias = torch.randn(6, 80, requires_grad=True), torch.randn(24, requires_grad=True)
        grad_y = torch.randn(6, 24)
        y = ops.linear_groups(x, weight, bias=bias, input_group=32)
        y.backward(grad_y)
        dense = ops.dequantize_groups(weight, 80)
        assert torch.equal(x.grad, grad_y @ dense)
        assert torch.equal(bias.grad, grad_y.sum(0))


def test_opcheck_and_a_compiled_graph():
    torch.manual_seed(6)
    weight = make_weight(20, 70, 3, 32, "zero points")
    x, operators = torch.randn(2, 3, 70), torch.ops.octavo
    torch.library.opcheck(operators.linear_groups.default, (x, *weight, torch.randn(20), 8, 32, 2))
    torch.library.opcheck(operators.dequantize_groups.default, (*weight, 70, torch.float32))
    torch.library.opcheck(operators.pack_planes.default, (torch.zeros(5, 9, dtype=torch.uint8), 3))
    torch.library.opcheck(operators.unpack_planes.default, (weight.codes, 20, 70))
