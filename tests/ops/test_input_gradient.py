# SPDX-License-Identifier: Apache-2.0
"""grad_x = grad_y @ weight of packed weights: right in tiles as well as whole, in the memory of one tile."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from octavo import ops
from octavo.ops import input_gradient as module

SCHEMES = [
    octavo.Int8Dynamic(),
    octavo.Int8WeightOnly(),
    octavo.Int4WeightOnly(group_size=32),
    octavo.Int4Dynamic(group_size=16, symmetric=False),
    octavo.NF4(),
    octavo.HalfWeightOnly(),
]
N, K, M = 100, 48, 7  # n ends within a strip, and in a tile that is shorter than the others


def layer_of(scheme, n=N, k=K):
    torch.manual_seed(0)
    return octavo.quantized(torch.nn.Linear(k, n), scheme)


def gradient(layer, dtype=torch.float32):
    x = torch.randn(M, layer.in_features, dtype=dtype, requires_grad=True)
    grad_y = torch.randn(M, layer.out_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer(x).backward(grad_y)
    return x.grad, grad_y


@pytest.mark.parametrize("tile", [16 * K, 48 * K, module.TILE], ids=["strips", "three strips", "whole"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_counts_once(scheme, tile, dtype, monkeypatch):
    """docs/numerics.md, eq. 128: n products in float32, added in any order, and the rounding of the result."""
    monkeypatch.setattr(module, "TILE", tile)
    layer = layer_of(scheme)
    found, grad_y = gradient(layer, dtype)
    weight = layer.dequantize_rows(0, N).double()
    exact = grad_y.double() @ weight
    u, terms = 2.0**-24, grad_y.double().abs() @ weight.abs()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((found.double() - exact).abs() <= 2 * N * u * terms + 1.01 * rounding).all()


def test_a_backward_pass_inside_of_autocast_is_the_one_outside(monkeypatch):
    monkeypatch.setattr(module, "TILE", 16 * K)
    x = torch.randn(M, K, requires_grad=True)
    found = []
    for inside in (False, True):
        y = layer_of(SCHEMES[2])(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_rows_are_those_of_the_whole(scheme):
    layer = layer_of(scheme)
    whole = layer.dequantize_rows(0, N)
    for begin, end in ((0, 16), (16, 64), (96, N), (0, N)):
        assert torch.equal(layer.dequantize_rows(begin, end), whole[begin:end])
    if scheme.name != "NF4":  # whose kernel multiplies by integers
        assert torch.equal(whole, layer.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_no_float_weight_is_whole_in_memory(scheme, monkeypatch):
    """The largest tensor that the backward pass makes is a tile, or as large as x."""
    monkeypatch.setattr(module, "TILE", 32 * K)
    layer = layer_of(scheme, n=400)
    made = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not any(result is each for each in args):
                made.append(result.untyped_storage().nbytes())
            return result

    x = torch.randn(M, K, requires_grad=True)
    y = layer(x)
    own = {tensor.untyped_storage().nbytes() for tensor in (*layer.buffers(), *layer.parameters(), y, x)}
    with Watching():
        y.backward(torch.ones_like(y))
    largest = max(size for size in made if size not in own)
    assert largest <= 4 * max(32 * K, M * K, M * 400) < 4 * 400 * K


def test_second_derivatives_and_batches_see_the_whole_weight():
    layer = layer_of(SCHEMES[0])
    x = torch.randn(3, K, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    weight = ops.dequantized_rows(*layer.scheme.weights.operands_of(layer)[::2], K, 0, N).double()
    expected = 2 * torch.ones(3, K).double() @ weight.T @ weight
    assert torch.allclose(second.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
