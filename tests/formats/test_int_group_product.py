# SPDX-License-Identifier: Apache-2.0
"""What layers of integers in groups compute: the product of their codes, on every instruction set, alone or joined."""

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from models import IDS, model
from torch import nn
from torch.nn import functional as F

import octavo
from octavo.formats import IntGroup
from octavo.formats.int_group import SCALE_DTYPES
from octavo.nn import QuantLinear
from octavo.nn.fused.shared_input import SharedInput, can_be_joined
from octavo.tensors.fake_quantize import fake_quantize_per_token

SCHEMES = [
    octavo.Int4WeightOnly(),
    octavo.Int4WeightOnly(16, 3, symmetric=False),
    octavo.Int4Dynamic(64, 2, symmetric=False, scale_dtype="bfloat16"),
    octavo.Int4Dynamic(None, 5, scale_dtype="float32"),
    octavo.Int8Dynamic(group_size=32),
    octavo.Int8Dynamic(weights=IntGroup(8, 48, symmetric=False)),
    octavo.Int8Dynamic(activation_group_size=64),
    octavo.Int8WeightOnly(weights=IntGroup(8, None)),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=octavo.schemes.label)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_by(scheme, x: torch.Tensor) -> torch.Tensor:
    """The codes of x [m, k] as reals, float64."""
    bits, group = scheme.activations.signed_codes
    if bits == 8:
        return fake_quantize_per_token(x, True, group or None).double()
    scale = x.abs().amax(1, keepdim=True) / 32512
    return (x * (1 / scale)).round().double() * scale.double()


def expected(layer: QuantLinear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact product of codes, and what float32 may change in it: each segment of at least 16 columns is rounded
    once and added with up to four roundings, of numbers that are no larger than the sum of sizes; scales of rows, and
    a zero point's share of a float32 scale, are rounded, too."""
    x, weights = read_by(layer.scheme, x), layer.scheme.weights
    q = weights.read(layer.canonical_tensors(), layer.out_features, layer.in_features)
    weight, bias = q.dequantize().double(), layer.bias.double()
    reach = weight.abs() + 2 * q._spread(q.scale).double() * q._spread(q.zero_point - q.qparams.qmin).abs()
    sizes = x.abs() @ reach.T + bias.abs()
    return F.linear(x, weight, bias), sizes * (4 * (x.shape[1] // 16 + 1) + 8) * 2**-24


def test_a_layer_multiplies_what_its_codes_stand_for():
    """For every width, kind and dtype, groups that are short, longer than the row or no multiple of the input's."""
    seed = 0
    for bits in range(2, 9):
        for group_size in (16, 32, 48, 128, None):
            seed += 1
            weights = IntGroup(bits, group_size, seed % 2 == 0, list(SCALE_DTYPES)[seed % 3])
            n, k = 5 + seed, (16, 70, 96, 333)[seed % 4]
            torch.manual_seed(seed)
            linear, x = nn.Linear(k, n), seeded(3, k, seed=seed)
            for scheme in (
                octavo.Int8Dynamic(weights=weights, activation_group_size=(32, 64, None)[seed % 3]),
                octavo.Int8WeightOnly(weights=weights),
            ):
                layer = octavo.quantized(linear, scheme)
                y, bound = expected(layer, x)
                assert_within(layer(x), y, bound)
                assert_within(layer.dequantize(), layer.code_weight(), 0.0)


@every_scheme
def test_same_bits_on_every_isa_and_in_every_batch(scheme, isa):
    x = seeded(9, 383)
    x[4, 100], x[7, 3] = float("nan"), float("inf")
    layer = octavo.quantized(nn.Linear(383, 129), scheme)
    y = layer(x)
    assert y[[4, 7]].isnan().all() and y[[0, 1, 2, 3, 5, 6, 8]].isfinite().all()
    assert_bits_equal(torch.cat([layer(x[:2]), layer(x[2:3]), layer(x[3:])]), y)
    assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer(x[:0]).shape == (0, 129)
    with octavo.use_isa("scalar"):
        assert_bits_equal(layer(x), y)


@every_scheme
def test_gradients_are_those_of_the_dequantized_layer(scheme):
    layer, x, grad = octavo.quantized(nn.Linear(70, 19), scheme), seeded(4, 70), seeded(4, 19, seed=1)
    layer.bias.requires_grad_()
    x.requires_grad_()
    layer(x).backward(grad)
    assert_within(
        x.grad,
        grad.double() @ layer.dequantize().double(),
        20 * 2**-24 * (grad.abs() @ layer.dequantize().abs()),
    )
    assert_within(layer.bias.grad, grad.double().sum(0), 2**-20)


@every_scheme
def test_activations_are_applied_before_the_result_is_rounded(scheme):
    layer, x = octavo.quantized(nn.Linear(70, 19), scheme), seeded(4, 70)
    y = layer(x)
    layer.activation = "silu"
    assert_bits_equal(layer(x), octavo.ops.activate(y, "silu"))


@every_scheme
def test_layers_of_whole_strips_are_joined_without_another_copy(scheme):
    layers = [octavo.quantized(nn.Linear(70, n), scheme) for n in (16, 48, 32)]
    x = seeded(5, 70)
    separate = [layer(x) for layer in layers]
    shared = SharedInput(layers)
    assert shared.is_joined
    for together, alone in zip(shared(x), separate, strict=True):
        assert_bits_equal(together, alone)
    operands, _ = shared.joined()
    addresses = range(operands[0].data_ptr(), operands[0].data_ptr() + operands[0].nbytes)
    assert all(layer.packed.data_ptr() in addresses for layer in layers)
    assert all(map(torch.equal, [layer(x) for layer in layers], separate))
    state = layers[1].state_dict()
    layers[1].load_state_dict(state)
    assert_bits_equal(shared(x)[1], separate[1])
    assert not can_be_joined([octavo.quantized(nn.Linear(70, 17), scheme)] * 2)


@torch.no_grad()
def test_a_compiled_model_has_the_bits_of_eager():
    """Packed or not: a graph packs for itself."""
    for scheme in (octavo.Int4WeightOnly(16, 3, symmetric=False), octavo.Int8Dynamic(group_size=32)):
        for is_packed in (True, False):
            torch.compiler.reset()
            m = octavo.quantized(model().eval(), scheme)
            y = m(IDS)
            if not is_packed:
                [layer.unpack_() for layer in m.modules() if isinstance(layer, QuantLinear)]
            assert_bits_equal(torch.compile(m, fullgraph=True, backend="aot_eager")(IDS), y)


@torch.no_grad()
def test_blocks_of_a_model_are_fused_and_give_the_same_bits():
    from tiny_models import IDS, llama, logits

    float_model = llama(hidden_size=64, intermediate_size=128, use_cache=False)
    for scheme in (octavo.Int4Dynamic(48), octavo.Int8Dynamic(activation_group_size=32)):
        found = []
        for blocks in (False, True):
            m = octavo.quantized(float_model, scheme)
            report = octavo.fuse_(m, {"input_ids": IDS}, blocks=blocks)
            assert all(row.action == "fused" for row in report.rows), report
            found.append(logits(m))
        assert_bits_equal(*found)


def test_a_layer_of_4096_x_4096_is_held_once_in_nine_and_a_half_megabytes():
    layer = octavo.quantized(nn.Linear(4096, 4096, bias=False), octavo.Int4WeightOnly())
    held = {
        tensor.untyped_storage().data_ptr(): tensor.nbytes
        for tensor in [*layer.parameters(), *layer.buffers()]
    }
    assert layer.is_packed and sum(held.values()) <= 9.5e6
