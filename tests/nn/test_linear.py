# SPDX-License-Identifier: Apache-2.0
"""QuantLinear: its two states, and everything that people do to a module."""

import copy
import io
import pickle
import re

import pytest
import torch
from asserts import assert_bits_equal, assert_equal
from torch import nn

import octavo
from octavo import _C
from octavo.nn import QuantLinear

N, K = 33, 70  # neither is a multiple of what packing pads to


def codes_and_scale() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=generator)
    codes[0, 0], codes[-1, -1] = -128, 127
    return codes, torch.rand(N, 1, generator=generator) + 0.01


def canonical(bias: bool = True, scheme=octavo.Int8Dynamic()) -> QuantLinear:
    """A layer whose weight is an int8 Parameter."""
    codes, scale = codes_and_scale()
    values = torch.randn(N, generator=torch.Generator().manual_seed(1)) if bias else None
    return QuantLinear.from_codes(codes, scale, values, scheme)


def packed(bias: bool = True, scheme=octavo.Int8Dynamic()) -> QuantLinear:
    return canonical(bias, scheme).pack_()


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


both_states = pytest.mark.parametrize("make", [canonical, packed])


# --- the two states -------------------------------------------------------------------------------------------------


def test_first_forward_packs_and_memory_holds_one_form_only():
    layer = canonical()
    assert not layer.is_packed and dict(layer.named_buffers()) == {}
    y = layer(activations(2, K))
    assert layer.is_packed
    assert [name for name, _ in layer.named_parameters()] == ["weight_scale", "bias"]
    assert [name for name, _ in layer.named_buffers()] == ["packed", "column_sum"]
    assert_bits_equal(layer(activations(2, K)), y)


def test_a_layer_packed_with_one_instruction_set_is_the_same_layer_with_every_other():
    """AVX2 may have packed a list, and does without where another instruction set has packed."""
    linear, x = nn.Linear(700, 40), activations(5, 700)
    torch.nn.init.uniform_(linear.weight, -0.5, 0.5)
    with torch.no_grad():
        linear.weight[:, 0], linear.weight[:, 1], linear.weight[::3, 6:8] = 1.0, -0.5, 1.0
    x[0] = 1.0
    expected, lists = None, {}
    for packed_with in _C.runnable_isas():
        with octavo.use_isa(packed_with):
            layer = octavo.Int8Dynamic().quantize_linear(linear)
        lists[packed_with] = len(layer.column_sum) > 40
        for isa in _C.runnable_isas():
            with octavo.use_isa(isa):
                y = layer(x)
                expected = y if expected is None else expected
                assert_bits_equal(y, expected)
                assert_equal(copy.deepcopy(layer).unpack_().weight, layer.codes())
    assert [isa for isa, listed in lists.items() if listed] == [isa for isa in lists if isa == "avx2"]


def test_forward_is_the_scheme_s_operator():
    layer, x = packed(), activations(4, K)
    expected = octavo.ops.linear_dynamic(
        x, layer.packed, layer.column_sum, layer.weight_scale, layer.bias, True
    )
    assert_bits_equal(layer(x), expected)
    without_bias = octavo.ops.linear_dynamic(
        x, layer.packed, layer.column_sum, layer.weight_scale, None, True
    )
    assert_bits_equal(packed(bias=False)(x), without_bias)


@both_states
def test_codes_come_back_exactly_the_foreign_minus_128_included(make):
    codes, scale = codes_and_scale()
    layer = make()
    assert_equal(layer.codes(), codes)
    assert_bits_equal(layer.dequantize(), codes.float() * scale)
    assert_bits_equal(layer.dequantize(torch.bfloat16), (codes.float() * scale).bfloat16())


def test_weight_is_the_parameter_when_canonical_and_a_dequantized_copy_when_packed():
    layer = canonical()
    assert layer.weight.dtype == torch.int8 and isinstance(layer.weight, nn.Parameter)
    layer.pack_()
    assert_bits_equal(layer.weight, layer.dequantize())
    layer.weight.requires_grad = False  # adapters do this; it needs a leaf
    with pytest.raises(AttributeError, match="read-only once packed.*load_state_dict"):
        layer.weight = torch.zeros(N, K)


def test_a_loader_that_writes_the_parameter_of_a_packed_layer_is_heard():
    """transformers and accelerate set module._parameters[name] without asking the module."""
    layer = packed()
    layer._parameters["weight"] = nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False)
    layer(activations(1, K))
    assert_equal(layer.codes(), torch.ones(N, K, dtype=torch.int8))


def test_packing_twice_and_packing_on_meta_do_nothing():
    layer = packed()
    address = layer.packed.data_ptr()
    assert layer.pack_().packed.data_ptr() == address
    assert not QuantLinear(K, N, scheme=octavo.Int8Dynamic(), device="meta").pack_().is_packed


def test_packing_in_inference_mode_leaves_a_layer_that_can_be_trained_through():
    layer = canonical()
    with torch.inference_mode():
        layer(activations(1, K))
    x = activations(1, K).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()


def test_an_unfilled_layer_is_zero():
    layer = QuantLinear(3, 2, scheme=octavo.Int8WeightOnly())
    assert_bits_equal(layer(torch.ones(1, 3)), torch.zeros(1, 2))


def test_a_missing_attribute_is_still_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        packed().weights  # noqa: B018


def test_repr_tells_what_the_layer_is():
    isa = octavo.cpu_info().active
    assert repr(packed()) == (
        f"QuantLinear(in_features=70, out_features=33, bias=True, scheme=Int8Dynamic, bits=8, "
        f"granularity=per_channel, isa={isa})"
    )


# --- copies and files -----------------------------------------------------------------------------------------------


@both_states
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_bits_and_share_nothing(make, copier):
    layer, x = make(), activations(3, K)
    other = copier(layer)
    assert other.is_packed == layer.is_packed and other.scheme == layer.scheme
    other.bias.data.zero_()
    assert layer.bias.any()
    other.bias.data.copy_(layer.bias)
    assert_bits_equal(other(x), layer(x))


@both_states
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_canonical_in_both_states(make, bias):
    codes, scale = codes_and_scale()
    state = make(bias).state_dict(prefix="fc.")
    assert set(state) == {"fc.weight", "fc.weight_scale"} | ({"fc.bias"} if bias else set())
    assert_equal(state["fc.weight"], codes)
    assert_bits_equal(state["fc.weight_scale"], scale)


@both_states
@pytest.mark.parametrize(
    "start, assign",
    # Without assign torch copies nothing into meta tensors.
    [("filled", False), ("filled", True), ("packed", False), ("packed", True), ("meta", True)],
)
def test_state_dict_round_trip_through_a_weights_only_file(make, start, assign):
    file, source = io.BytesIO(), make()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    target = QuantLinear(K, N, scheme=octavo.Int8Dynamic(), device="meta" if start == "meta" else None)
    if start == "packed":
        target.pack_()
    assert str(target.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
    assert target.is_packed == (start == "packed")
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert_bits_equal(target(activations(3, K)), source(activations(3, K)))


@both_states
@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"weight": torch.zeros(N, K)},
            "weight is torch.float32, QuantLinear needs int8.*float model, then quantize",
        ),
        ({"weight": torch.zeros(N, K, dtype=torch.uint8)}, "weight is torch.uint8"),
        (
            {"weight": torch.zeros(N, K + 1, dtype=torch.int8)},
            r"weight has shape \(33, 71\), QuantLinear needs \(33, 70\)",
        ),
        ({"weight_scale": torch.ones(N)}, r"weight_scale has shape \(33,\), QuantLinear needs \(33, 1\)"),
        ({"weight_scale": torch.ones(N, 1, dtype=torch.int32)}, "weight_scale is torch.int32"),
        ({"bias": torch.ones(N, dtype=torch.float64)}, "bias is torch.float64"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_another_dtype_or_shape_is_refused_and_changes_nothing(make, change, text, assign):
    layer = make()
    before, was_packed = layer.state_dict(), layer.is_packed
    before = {name: tensor.clone() for name, tensor in before.items()}
    state = {**{name: torch.zeros_like(tensor) for name, tensor in before.items()}, **change}
    with pytest.raises(RuntimeError, match=text):
        layer.load_state_dict(state, assign=assign)
    assert layer.is_packed == was_packed
    assert_equal(layer.codes(), before["weight"])
    assert_bits_equal(layer.bias.detach(), before["bias"])


@both_states
def test_missing_and_unexpected_keys_are_reported_as_torch_does(make):
    layer = make()
    state = layer.state_dict()
    del state["weight"]
    state["extra"] = torch.ones(1)
    with pytest.raises(
        RuntimeError,
        match=re.compile(
            'Unexpected.*"extra".*Missing.*"weight"|Missing.*"weight".*Unexpected.*"extra"', re.DOTALL
        ),
    ):
        layer.load_state_dict(state)
    result = layer.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["extra"]
    assert_equal(layer.codes(), codes_and_scale()[0])


@pytest.mark.parametrize("assign", [False, True])
def test_a_bfloat16_scale_in_a_file_becomes_the_same_float32_values(assign):
    layer = packed()
    state = {**layer.state_dict(), "weight_scale": codes_and_scale()[1].bfloat16()}
    layer.load_state_dict(state, assign=assign)
    assert_bits_equal(layer.weight_scale.detach(), codes_and_scale()[1].bfloat16().float())


# --- moves and flags ------------------------------------------------------------------------------------------------


@both_states
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.half().float(),
        lambda m: m.type(torch.float16),
    ],
    ids=["half", "bfloat16", "to", "half, then float", "type"],
)
def test_casts_change_the_bias_and_leave_codes_and_scales_bit_for_bit(make, cast):
    codes, scale = codes_and_scale()
    layer = cast(make())
    assert_equal(layer.codes(), codes)
    assert_bits_equal(layer.weight_scale.detach(), scale)
    expected = cast(nn.Linear(1, 1)).bias.dtype
    assert layer.bias.dtype == expected
    assert layer(activations(2, K).to(expected)).dtype == expected


@both_states
def test_double_does_nothing_and_float64_input_is_refused(make):
    layer = make().double()
    assert {p.dtype for p in layer.parameters()} <= {torch.float32, torch.int8}
    assert layer(activations(2, K)).dtype == torch.float32
    with pytest.raises(TypeError, match="x is float64"):
        layer(activations(2, K).double())


def test_bias_of_a_new_layer_has_the_default_dtype_if_the_operators_take_it():
    try:
        for default, expected in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)):
            torch.set_default_dtype(default)
            layer = QuantLinear(3, 2, scheme=octavo.Int8Dynamic())
            assert (layer.bias.dtype, layer.weight_scale.dtype) == (expected, torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)


@both_states
def test_to_meta_and_back_by_loading(make):
    layer = make()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = layer(activations(2, K))
    shell = make().to("meta")
    assert shell(torch.empty(5, K, device="meta")).shape == (5, N)
    shell.load_state_dict(state, assign=True)
    assert_bits_equal(shell(activations(2, K)), expected)


def test_everything_is_frozen_and_a_packed_model_can_be_unfrozen_as_any_other():
    model = nn.Sequential(packed(), nn.ReLU())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    model(activations(2, K)).sum().backward()
    assert model[0].bias.grad is not None


@both_states
def test_share_memory(make):
    layer = make()
    expected = make()(activations(2, K))
    layer.share_memory()
    assert all(tensor.is_shared() for tensor in [*layer.parameters(), *layer.buffers()])
    assert_bits_equal(layer(activations(2, K)), expected)


@pytest.mark.parametrize(
    "scheme", [octavo.Int8Dynamic(), octavo.Int8WeightOnly()], ids=lambda scheme: scheme.name
)
def test_gradient_of_x_is_that_of_the_dequantized_layer(scheme):
    layer, x = packed(scheme=scheme), activations(3, K).requires_grad_()
    grad_y = torch.randn(3, N, generator=torch.Generator().manual_seed(3))
    layer(x).backward(grad_y)
    assert_bits_equal(x.grad, grad_y @ layer.dequantize())


def test_meta_forward_gives_shape_and_dtype_in_both_states():
    layer = QuantLinear(K, N, scheme=octavo.Int8WeightOnly(), device="meta")
    y = layer(torch.empty(2, 3, K, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, layer.is_packed) == ((2, 3, N), torch.bfloat16, False)


@both_states
def test_export_gives_one_operator_and_leaves_the_layer_in_its_state(make):
    layer, x = make(), activations(4, K)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.octavo.linear_dynamic.default) == 1
    assert layer.is_packed == (make is packed)
    assert_bits_equal(program.module()(x[:3]), layer(x[:3]))


def test_forward_reads_no_attribute_through_module_getattr(monkeypatch):
    """nn.Module.__getattr__ costs 0.4 us a time, more than the rest of forward."""
    layer, names = packed(), []
    original = QuantLinear.__getattr__
    monkeypatch.setattr(
        QuantLinear, "__getattr__", lambda self, name: (names.append(name), original(self, name))[1]
    )
    layer(activations(1, K))
    assert names == []


# --- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"codes": torch.zeros(N, K)}, TypeError, "weight must be int8, got float32"),
        ({"codes": torch.zeros(N * K, dtype=torch.int8)}, ValueError, r"matrix \[n, k\]"),
        ({"weight_scale": torch.ones(N)}, ValueError, r"weight_scale has shape \(33,\), \(33, 1\) is needed"),
        ({"weight_scale": torch.ones(N, 1).double()}, TypeError, "weight_scale must be float32, got float64"),
        ({"bias": torch.zeros(N + 1)}, ValueError, r"bias has shape \(34,\), \(33,\) is needed"),
        ({"bias": torch.zeros(N).double()}, TypeError, "bias is torch.float64"),
    ],
)
def test_from_codes_refuses_what_does_not_fit(change, error, text):
    codes, scale = codes_and_scale()
    arguments = {
        "codes": codes,
        "weight_scale": scale,
        "bias": None,
        "scheme": octavo.Int8Dynamic(),
        **change,
    }
    with pytest.raises(error, match=text):
        QuantLinear.from_codes(**arguments)
