# SPDX-License-Identifier: Apache-2.0
"""SharedInput: the same bits as the layers one by one, from weights that are held once."""

import contextlib
import copy
import operator

import pytest
import torch
from asserts import assert_bits_equal
from torch import nn

import octavo
from octavo import _C, ops
from octavo.nn.fused.shared_input import SharedInput
from octavo.runtime import huge_pages

WIDTHS = [32, 16, 48]


def layers(*widths, bias=True, scheme=None):
    floats = [nn.Linear(70, width, bias=bias) for width in widths]
    return [octavo.quantized(nn.Sequential(layer), scheme or octavo.Int8Dynamic())[0] for layer in floats]


def assert_one_by_one(shared, x):
    for found, layer in zip(shared(x), shared.layers, strict=True):
        assert_bits_equal(found.contiguous(), layer(x))


@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(), octavo.Int8Dynamic(False), octavo.Int8WeightOnly()])
@pytest.mark.parametrize("bias", [True, False])
def test_joined_layers_give_the_bits_of_each_layer(scheme, bias):
    shared = SharedInput(layers(*WIDTHS, bias=bias, scheme=scheme))
    assert shared.is_joined
    assert_one_by_one(shared, torch.randn(2, 3, 70))


def heavy_tailed(width):
    """Few sums of its products of bytes can saturate, so that AVX2 has a list of them."""
    linear = nn.Linear(70, width)
    torch.nn.init.uniform_(linear.weight, -0.5, 0.5)
    with torch.no_grad():
        linear.weight[:, 0], linear.weight[:, 1], linear.weight[::3, 6:8] = 1.0, -0.5, 1.0
    return octavo.Int8Dynamic().quantize_linear(linear)


def test_joined_layers_have_one_list_of_saturating_words():
    with octavo.use_isa("avx2") if "avx2" in _C.runnable_isas() else contextlib.nullcontext():
        parts, x = [heavy_tailed(width) for width in WIDTHS], torch.full((3, 70), 1.0)
        expected = [layer(x) for layer in parts]
        shared = SharedInput(parts)
        packed, column_sum, _ = shared.joined()[0]
        assert torch.equal(column_sum, ops.list_saturating(packed, column_sum[: sum(WIDTHS)]))
        for found, one, layer in zip(shared(x), expected, parts, strict=True):
            assert_bits_equal(found.contiguous(), one)
            assert_bits_equal(layer(x), one)
            assert len(layer.column_sum) == layer.out_features  # the lists are not held twice


def test_layers_keep_their_state():
    parts = layers(*WIDTHS)
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in parts]
    assert SharedInput(parts).is_joined
    for layer, state in zip(parts, before, strict=True):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, state[name])


def test_weights_are_held_once():
    parts = layers(*WIDTHS)
    shared = SharedInput(parts)
    packed = shared.joined()[0][0]
    start = packed.data_ptr()
    for layer in parts:
        assert layer.packed.data_ptr() == start
        start += layer.packed.numel()
    assert start == packed.data_ptr() + packed.numel()


def test_layers_packed_one_after_another_are_joined_without_a_copy():
    parts = layers(*WIDTHS)
    pointers = [layer.packed.data_ptr() for layer in parts]
    assert huge_pages.joined([layer.packed for layer in parts]) is not None
    assert SharedInput(parts).is_joined
    assert [layer.packed.data_ptr() for layer in parts] == pointers


def test_layers_packed_in_another_order_are_joined_with_one():
    parts = layers(*WIDTHS)[::-1]
    assert huge_pages.joined([layer.packed for layer in parts]) is None
    assert_one_by_one(SharedInput(parts), torch.randn(3, 70))


@pytest.mark.parametrize(
    "parts",
    [
        lambda: layers(32, 20),
        lambda: [*layers(32), *layers(32, bias=False)],
        lambda: [*layers(32), *layers(32, scheme=octavo.Int8WeightOnly())],
        lambda: [*layers(32), nn.Linear(70, 32)],
    ],
    ids=["width", "bias", "scheme", "float"],
)
def test_other_layers_are_called_one_by_one(parts):
    shared = SharedInput(parts())
    assert not shared.is_joined
    assert_one_by_one(shared, torch.randn(3, 70))


def test_a_hooked_layer_is_called():
    shared, calls = SharedInput(layers(32, 32)), []
    assert shared.is_joined
    shared.layers[1].register_forward_hook(lambda *_: calls.append(1))
    shared(torch.randn(3, 70))
    assert calls == [1]


def test_what_is_loaded_later_counts():
    shared, others = SharedInput(layers(*WIDTHS)), layers(*WIDTHS)
    shared(torch.randn(3, 70))
    for layer, other in zip(shared.layers, others, strict=True):
        layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 70)
    for found, other in zip(shared(x), others, strict=True):
        assert_bits_equal(found.contiguous(), other(x))


def test_a_bias_of_another_dtype_counts():
    """.to(dtype) changes what a Parameter holds, and the Parameter stays the same object."""
    shared = SharedInput(layers(*WIDTHS))
    shared(torch.randn(3, 70))
    for layer in shared.layers:
        layer.bfloat16()
    assert_one_by_one(shared, torch.randn(3, 70))


def test_a_copy_is_joined_on_its_own():
    shared = SharedInput(layers(*WIDTHS))
    shared(torch.randn(3, 70))
    other = copy.deepcopy(shared)
    x = torch.randn(3, 70)
    for found, layer in zip(other(x), shared.layers, strict=True):
        assert_bits_equal(found.contiguous(), layer(x))
    assert {layer.packed.data_ptr() for layer in other.layers}.isdisjoint(
        layer.packed.data_ptr() for layer in shared.layers
    )


def test_a_wrong_x_is_refused_by_the_layer():
    with pytest.raises(ValueError, match="in_features = 70"):
        SharedInput(layers(*WIDTHS))(torch.randn(3, 71))


def test_two_users_of_the_same_layers_do_not_move_them_in_turns():
    """Such as a fused block and the attention module inside of it, called with a cache."""
    parts = layers(*WIDTHS)[::-1]
    first, second, x = SharedInput(parts), SharedInput(parts), torch.randn(3, 70)
    first(x)
    held = [tensor for layer in parts for tensor in (*layer.buffers(), *layer.parameters())]
    pointers = [tensor.data_ptr() for tensor in held]
    joined = first.joined()
    for user in (second, first, second):
        assert_one_by_one(user, x)
    now = [tensor for layer in parts for tensor in (*layer.buffers(), *layer.parameters())]
    assert [tensor.data_ptr() for tensor in now] == pointers and all(map(operator.is_, now, held))
    assert first.joined() is joined
    pairs = zip((*joined[0], joined[1]), (*second.joined()[0], second.joined()[1]), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_other_layers_take_the_place_of_the_first_ones():
    parts, others, x = layers(*WIDTHS), layers(*WIDTHS), torch.randn(3, 70)
    shared = SharedInput(parts)
    shared(x)
    assert shared.of(others) is shared and shared.layers == tuple(others)
    assert_one_by_one(shared, x)
