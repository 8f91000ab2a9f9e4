# SPDX-License-Identifier: Apache-2.0
"""Activation functions: within their bounds of float64, the same bits on every ISA; and inside the linear operators."""

import copy
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from asserts import assert_within, in_case
from operator_arguments import FLOATS, assert_same_bits, make_weight
from torch.library import opcheck

import octavo
from octavo import ops, reference

ROOT = Path(__file__).parents[2]
U = 2.0**-24  # the largest relative error of a float32 rounding
TINY = 2.0**-121  # what is lost where exp2 overflows: |x| 2^-128 for |x| < 100


def every_kind_of_float(step: int = 9973) -> torch.Tensor:
    """Each `step`-th float32 up to 100 in size, of both signs: all exponents, and the fractions at random."""
    bits = torch.arange(0, 0x42C80000, step, dtype=torch.int64).to(torch.int32)
    positive = bits.view(torch.float32)
    return torch.cat([positive, -positive])


def ulp(y: torch.Tensor) -> torch.Tensor:
    """Of float32, at each float64 of `y`."""
    exponent = torch.frexp(y.abs().clamp(min=2.0**-126)).exponent
    return torch.ldexp(torch.ones_like(y), exponent - 24)


def bound(x: torch.Tensor, y: torch.Tensor, activation: str) -> torch.Tensor:
    """docs/numerics.md, eq. 49 and 50."""
    below = (-x).clamp(min=0)
    match activation:
        case "relu":
            return torch.zeros_like(y)
        case "gelu":
            return torch.where(x > -1, 2 * ulp(y), 3e-7)
        case "gelu_tanh":
            return U * (6.5 + 4 * 1.5958 * (below + 0.044715 * below**3)) * y.abs() + TINY
    return U * (5 + 1.25 * below) * y.abs() + TINY


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_an_activation_is_within_its_bound(activation):
    x = every_kind_of_float()
    y = reference.activate(x.double(), activation)
    assert_within(ops.activate(x, activation), y, bound(x.double(), y, activation))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_isa_gives_the_same_bits(isa, activation, dtype):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-44, 3e38, -3e38])
    x = torch.cat([special, every_kind_of_float(99991), torch.randn(10_000)]).to(dtype)
    y = ops.activate(x, activation)
    with octavo.use_isa("scalar"):
        assert_same_bits(y, ops.activate(x, activation))


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_nan_stays_and_infinities_have_their_limits(isa, activation):
    y = ops.activate(torch.tensor([torch.nan, torch.inf, -torch.inf] * 7), activation)
    assert y[0::3].isnan().all() and (y[1::3] == torch.inf).all() and (y[2::3] == 0).all()


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_float32_result_rounded_once(activation, dtype):
    x = torch.randn(3, 1000).to(dtype)
    assert_same_bits(ops.activate(x, activation), ops.activate(x.float(), activation).to(dtype))


@pytest.mark.parametrize("shape", [(0,), (1,), (17,), (3, 5), (2, 3, 1000), ()], ids=str)
def test_any_shape_and_any_strides(shape):
    x = torch.randn(*shape, 2)[..., 1]
    y = ops.activate(x, "gelu")
    assert y.shape == x.shape and y.is_contiguous()
    assert_same_bits(y, ops.activate(x.contiguous().reshape(-1), "gelu").reshape(shape))


def test_the_table_meets_the_tail_at_the_chebyshev_nodes_of_each_interval():
    """Its row i are the powers of r in the quintic around 25 i / 64 that equals Phi(-(25 i / 64 + r)) at 6 nodes."""
    width, degree = 25 / 64, 5
    text = (ROOT / "csrc/isa/float/gelu_table.h").read_text().partition("kGeluTable")[2].partition("= {")[2]
    table = np.array(re.findall(r"-?[\d.]+(?:e-?\d+)?(?=f)", text), dtype=np.float32).reshape(degree + 1, 16)
    nodes = np.cos(np.pi * (2 * np.arange(degree + 1) + 1) / (2 * degree + 2))  # in -1 .. 1
    powers = np.vander(nodes, increasing=True)
    for i in range(15):
        tails = [math.erfc((width * i + node * width / 2) / math.sqrt(2)) / 2 for node in nodes]
        exact = np.linalg.solve(powers, tails) * (2 / width) ** np.arange(degree + 1)
        rounded = np.where(np.abs(exact) > 1e-12, exact, 0).astype(np.float32)  # odd around 0, but for 2^-53
        np.testing.assert_array_equal(table[:, i], rounded)
    assert not table[:, 15].any()


# --- silu_mul -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_silu_mul_of_column_slices_is_within_its_bound(isa, dtype):
    """silu's bound, one more float32 rounding and one to dtype."""
    both = (3 * torch.randn(4, 5, 100)).to(dtype)
    gate, up = both.split([50, 50], dim=-1)
    expected = reference.silu_mul(gate.double(), up.double())
    silu = bound(gate.double(), reference.activate(gate.double(), "silu"), "silu")
    rounding = (U + (torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0)) * expected.abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    y = ops.silu_mul(gate, up)
    assert y.is_contiguous()
    assert_within(y, expected, (silu * up.double().abs() + rounding) * (1 + 2**-8) + smallest)
    assert_same_bits(y, ops.silu_mul(gate.contiguous(), up.contiguous()))
    with octavo.use_isa("scalar"):
        assert_same_bits(y, ops.silu_mul(gate, up))


# --- inside the linear operators ------------------------------------------------------------------------------------


def test_an_activation_inside_is_the_one_outside(isa, linear):
    for m, n, k in [(1, 64, 64), (2, 1, 1), (13, 33, 67), (40, 100, 130), (0, 5, 3)]:
        x, weight = torch.randn(m, k), make_weight(n, k)
        for activation in ops.ACTIVATIONS:
            with in_case((m, n, k), activation):
                expected = ops.activate(linear(x, *weight), activation)
                assert_same_bits(linear(x, *weight, activation=activation), expected)


def test_an_activation_inside_is_rounded_once(isa, linear):
    for dtype in (torch.bfloat16, torch.float16):
        x, weight = torch.randn(13, 67).to(dtype), make_weight(33, 67)
        for activation in ops.ACTIVATIONS:
            with in_case(dtype, activation):
                expected = ops.activate(linear(x.float(), *weight), activation).to(dtype)
                assert_same_bits(linear(x, *weight, activation=activation), expected)


@pytest.mark.parametrize("m", [5, 300])
def test_batch_split_and_threads_change_no_bit(isa, linear, m):
    x, weight = torch.randn(m, 200), make_weight(600, 200)
    whole = linear(x, *weight, activation="gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = [linear(part, *weight, activation="gelu") for part in x.split([2, m - 2])]
            assert_same_bits(torch.cat(parts), whole)
            assert_same_bits(linear(x, *weight, activation="gelu"), whole)
    finally:
        torch.set_num_threads(before)


def test_the_reference_has_activations_too(linear):
    x, weight = torch.randn(3, 70), make_weight(20, 70)
    y = linear(x, *weight, module=reference)
    expected = reference.activate(y, "gelu")
    assert_same_bits(linear(x, *weight, activation="gelu", module=reference), expected)


def test_the_gradient_is_that_of_torchs_activation(linear):
    weight, grad_y = make_weight(20, 70), torch.randn(3, 20)
    x = torch.randn(3, 70, requires_grad=True)
    linear(x, *weight, activation="gelu").backward(grad_y)
    outside = x.detach().clone().requires_grad_()
    torch.nn.functional.gelu(linear(outside, *weight)).backward(grad_y)
    assert_same_bits(x.grad, outside.grad)


@pytest.mark.parametrize(
    "call",
    [
        lambda linear: linear(torch.randn(2, 70), *make_weight(20, 70), activation="tanh"),
        lambda linear: ops.activate(torch.randn(2), "tanh"),
    ],
)
def test_an_unknown_activation_lists_the_known_ones(linear, call):
    with pytest.raises(ValueError, match="'tanh', accepted: None, 'relu', 'gelu', 'gelu_tanh', 'silu'"):
        call(linear)


@pytest.mark.parametrize(
    "error, text, gate, up",
    [
        (TypeError, "gate is float64", torch.randn(2).double(), torch.randn(2)),
        (ValueError, "up must have the shape", torch.randn(2), torch.randn(3)),
        (ValueError, "up must have the shape and the dtype", torch.randn(2), torch.randn(2).half()),
        (ValueError, "at least 1 dimension", torch.tensor(1.0), torch.tensor(1.0)),
    ],
)
def test_bad_input_to_silu_mul_is_named(error, text, gate, up):
    with pytest.raises(error, match=text):
        ops.silu_mul(gate, up)


# --- torch's contracts ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
def test_opcheck(linear):
    x = torch.randn(3, 70)
    opcheck(linear.op, (x, *make_weight(20, 70), *linear.options, 2))
    opcheck(torch.ops.octavo.activate.default, (x, 2))
    opcheck(torch.ops.octavo.silu_mul.default, (x[:, :35], x[:, 35:]))


def test_compile_changes_no_bit(linear):
    weight, x = make_weight(20, 70), torch.randn(4, 70)
    torch.compiler.reset()

    def compute(x):
        y = linear(x, *weight, activation="gelu")
        return ops.silu_mul(y[:, :10], y[:, 10:]) + ops.activate(y, "relu")[:, :10]

    with torch.no_grad():
        compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
        assert_same_bits(compiled(x), compute(x))


def test_gradients_of_the_operators_alone_are_torchs():
    x = torch.randn(3, 10, requires_grad=True)
    (ops.activate(x, "gelu_tanh").sum() + ops.silu_mul(x, x).sum()).backward()
    mine = x.grad
    x.grad = None
    (
        torch.nn.functional.gelu(x, approximate="tanh").sum() + (torch.nn.functional.silu(x) * x).sum()
    ).backward()
    assert_same_bits(mine, x.grad)


# --- QuantLinear ----------------------------------------------------------------------------------------------------

SCHEMES = {
    "dynamic": octavo.Int8Dynamic(),
    "weight_only": octavo.Int8WeightOnly(),
    "static": octavo.Int8Static(),
    "smoothed": octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=False)),
    "outliers": octavo.LLMInt8(1.0),
}


@pytest.fixture(params=SCHEMES)
def layer_and_input(request):
    """A packed layer of each kind, which has seen its input."""
    x = torch.randn(9, 40)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24))
    scheme = SCHEMES[request.param]
    octavo.quantize_(model, scheme, data=[x] if scheme.needs_data else None)
    return model[0], x


def test_a_layers_activation_is_part_of_its_call(layer_and_input):
    layer, x = layer_and_input
    y = layer(x)
    layer.activation = "gelu"
    assert_same_bits(layer(x), ops.activate(y, "gelu"))
    half = layer(x.bfloat16())
    layer.activation = None
    assert_same_bits(half, ops.activate(layer(x.bfloat16().float()), "gelu").bfloat16())


def test_an_activation_is_shown_and_copied_but_not_saved(layer_and_input):
    layer, x = layer_and_input
    keys, text = list(layer.state_dict()), repr(layer)
    layer.activation = "silu"
    assert "activation=silu" in repr(layer) and "activation" not in text
    assert list(layer.state_dict()) == keys
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same_bits(other(x), layer(x))
