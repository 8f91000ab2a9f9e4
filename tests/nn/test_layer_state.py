# SPDX-License-Identifier: Apache-2.0
"""The state_dict of a quantized model: no float model takes its codes for weights, and files of it are ordinary."""

import copy
import io
import pickle

import pytest
import torch
from asserts import assert_bits_equal, assert_equal
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

import octavo
from octavo.nn import QuantLinear


def float_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))


def quantized_model(packed: bool) -> nn.Module:
    model = octavo.quantized(float_model(), octavo.Int8Dynamic())
    if not packed:
        for i in (0, 2):
            layer = model[i]
            model[i] = QuantLinear.from_codes(layer.codes(), layer.weight_scale, layer.bias, layer.scheme)
    return model


both_states = pytest.mark.parametrize("packed", [True, False], ids=["packed", "canonical"])
ON_THE_WAY = {
    "itself": lambda state: state,
    "copied": copy.deepcopy,
    "cloned": lambda state: {name: tensor.clone() for name, tensor in state.items()},
    "moved": lambda state: {name: tensor.to("cpu", copy=True).detach() for name, tensor in state.items()},
}


@both_states
@pytest.mark.parametrize("change", ON_THE_WAY.values(), ids=ON_THE_WAY)
@pytest.mark.parametrize("strict", [True, False])
def test_a_float_model_refuses_the_codes_also_without_strict(packed, change, strict):
    model, state = float_model(), change(quantized_model(packed).state_dict())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"the codes of a quantized layer.*octavo\.load makes it of the float one"
    ):
        model.load_state_dict(
            {name: t for name, t in state.items() if name.endswith("weight")}, strict=strict
        )
    for name, tensor in model.state_dict().items():
        assert_bits_equal(tensor, before[name])


@both_states
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_float_tensor_is_filled_with_codes_whoever_copies(packed, dtype):
    codes = quantized_model(packed).state_dict()["0.weight"]
    with pytest.raises(TypeError, match="they mean nothing without their scale"):
        torch.zeros(4, 6, dtype=dtype).copy_(codes)
    assert_equal(torch.zeros(4, 6, dtype=torch.int8).copy_(codes), codes.as_subclass(torch.Tensor))


@both_states
@pytest.mark.parametrize("change", ON_THE_WAY.values(), ids=ON_THE_WAY)
@pytest.mark.parametrize("assign", [True, False])
def test_a_quantized_model_takes_them(packed, change, assign):
    source, target, x = quantized_model(packed), quantized_model(True), torch.randn(3, 6)
    for tensor in target.parameters():
        tensor.data.mul_(2)
    target.load_state_dict(change(source.state_dict()), assign=assign)
    assert_bits_equal(target(x), source(x))
    assert type(target[0].codes()) is torch.Tensor


@both_states
def test_what_is_computed_from_codes_and_what_a_file_holds_is_an_ordinary_tensor(packed):
    state = quantized_model(packed).state_dict()
    codes = state["0.weight"]
    for made in (
        codes.float(),
        codes * state["0.weight_scale"],
        codes.to(torch.int32),
        codes.view(torch.uint8),
    ):
        assert type(made) is torch.Tensor
    assert codes.numpy().tolist() == codes.tolist()
    assert repr(codes).startswith("StoredCodes")
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    from_torch = torch.load(file, weights_only=True)
    from_safetensors = load_bytes(save_bytes(dict(state)))
    from_pickle = pickle.loads(pickle.dumps(state))
    for read in (from_torch, from_safetensors, from_pickle):
        assert type(read["0.weight"]) is torch.Tensor and read["0.weight"].dtype == torch.int8
        assert torch.equal(read["0.weight"], codes.as_subclass(torch.Tensor))


@pytest.mark.parametrize("trains", [True, False])
def test_codes_that_are_assigned_to_a_float_layer_never_compute_anything(trains):
    model = float_model().requires_grad_(trains)
    state = quantized_model(True).state_dict()
    with pytest.raises(RuntimeError):
        model.load_state_dict(state, strict=False, assign=True)
        model(torch.ones(1, 6))


def test_a_file_is_plain_and_torch_fills_a_float_model_with_its_codes():
    """The limit of it, which docs/behaviour.md names: the format has no place to say that they are codes."""
    file = io.BytesIO()
    torch.save(quantized_model(True).state_dict(), file)
    file.seek(0)
    model = float_model()
    result = model.load_state_dict(torch.load(file), strict=False)
    assert result.unexpected_keys == ["0.weight_scale", "2.weight_scale"]
    assert model[0].weight.abs().max() == 127
