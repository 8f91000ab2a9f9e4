# SPDX-License-Identifier: Apache-2.0
"""A layer with adapters: what it computes, what it is trained by, what it keeps of the layer below."""

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapted import ADAPTERS, SCHEMES, inputs, quantized_network, train_a_little_
from torch.utils.checkpoint import checkpoint

import octavo
from octavo import ops
from octavo.nn import QuantLinear

PAIRS = [*itertools.product(SCHEMES, ["lora"]), *itertools.product(["int4", "int8 static"], ADAPTERS)]


def multiplied_weight(layer):
    """What the kernel multiplies by, float64: for codebooks a table of integers, which differs a little from the exact
    one of `dequantize`."""
    weights = layer.scheme.weights
    if hasattr(weights, "group_weight"):
        group_weight = weights.group_weight(*weights.operands_of(layer))
        return ops.dequantize_groups(group_weight, layer.in_features).double()
    return layer.dequantize().double()


def adapted(scheme="int4", adapter="lora"):
    model = quantized_network(SCHEMES[scheme])
    octavo.adapt_(model, ADAPTERS[adapter])
    return model


@pytest.mark.parametrize(("scheme", "adapter"), PAIRS)
def test_an_untrained_adapter_changes_no_bit(scheme, adapter):
    """With DoRA neither: it divides each row by its length and multiplies by the same number."""
    x = inputs()
    expected = quantized_network(SCHEMES[scheme])(x)
    y = adapted(scheme, adapter)(x)
    assert torch.equal(y, expected)


@pytest.mark.parametrize(("scheme", "adapter"), PAIRS)
def test_only_the_adapter_gets_gradients(scheme, adapter):
    model = adapted(scheme, adapter)
    train_a_little_(model)
    model(inputs()).square().sum().backward()
    trained = {id(parameter) for parameter in octavo.adapters(model)}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        assert parameter.requires_grad == (id(parameter) in trained), name
    assert all(parameter.grad.abs().sum() > 0 for parameter in octavo.adapters(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_dequantized_layers(scheme):
    """Against autograd on float layers with the dequantized weights, at the inputs that the quantized layers had.

    Only the last layer's adapter and the first layer's pass through weights, so the bound is that of two products of
    float32: each sum of k terms in another order is off by k * 2^-23 of the sum of its terms' sizes, at most."""
    model = adapted(scheme)
    train_a_little_(model)
    fc1, fc2 = model.fc1, model.fc2
    x = inputs()
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    (weights * y).sum().backward()

    (a1, b1), (a2, b2) = (
        [getattr(layer.adapters.default, part).detach().double() for part in "AB"] for layer in (fc1, fc2)
    )
    scaling = fc1.adapters.default.scaling
    with torch.no_grad():
        hidden = fc1(x)
    h = F.gelu(hidden.double().requires_grad_())
    grad_h = weights.double() @ (multiplied_weight(fc2.base) + scaling * b2 @ a2)
    hidden64 = hidden.double().requires_grad_()
    (grad_hidden,) = torch.autograd.grad(F.gelu(hidden64), hidden64, grad_h)
    expected = {
        "fc2.B": scaling * weights.double().T @ (h.detach() @ a2.T),
        "fc2.A": scaling * (weights.double() @ b2).T @ h.detach(),
        "fc1.B": scaling * grad_hidden.T @ (x.double() @ a1.T),
        "fc1.A": scaling * (grad_hidden @ b1).T @ x.double(),
    }
    for name, value in expected.items():
        layer, part = name.split(".")
        found = getattr(getattr(model, layer).adapters.default, part).grad
        bound = 4 * 64 * 2.0**-23 * value.abs().max()
        assert (found.double() - value).abs().max() <= bound, name


def test_checkpointing_gives_the_same_gradients():
    x = inputs()
    found = []
    for reentrant in (None, False, True):
        model = adapted()
        train_a_little_(model)
        given = x.clone().requires_grad_()
        y = model(given) if reentrant is None else checkpoint(model, given, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([parameter.grad for parameter in octavo.adapters(model)])
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_autocast_and_sixteen_bit_inputs(adapter):
    """bfloat16 in, bfloat16 out, and within the 2^-8 that each of a few roundings costs."""
    model = adapted("half", adapter)
    train_a_little_(model)
    x = inputs()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().sum().backward()
    assert y.dtype == model(x.bfloat16()).dtype == torch.bfloat16
    error = (y.float() - expected).norm() / expected.norm()
    assert error < 4 * 2.0**-8
    assert all(parameter.grad.dtype == torch.float32 for parameter in octavo.adapters(model))


@pytest.mark.parametrize("adapter", ["lora", "ia3", "adalora"])
def test_a_compiled_model_has_the_same_gradients(adapter):
    x = inputs()
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = adapted("int8", adapter)
        train_a_little_(model)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(parameter.grad for parameter in octavo.adapters(model))])
    for eager, graph in zip(*found, strict=True):
        assert torch.allclose(eager, graph, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_copies_pickles_and_state_dicts_are_the_same_model(adapter):
    model = adapted("affine", adapter)
    train_a_little_(model)
    x = inputs()
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    filled = adapted("affine", adapter)
    filled.load_state_dict(model.state_dict())
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        filled,
    ):
        assert torch.equal(other(x), expected)
        with octavo.use_adapters(other, None):
            assert torch.equal(other(x), quantized_network(SCHEMES["affine"])(x))


def test_dropout_is_for_training_only_and_spares_the_base():
    model = quantized_network()
    octavo.adapt_(model, octavo.LoRA(r=2, dropout=0.5))
    train_a_little_(model)
    x = inputs()
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with torch.no_grad():
        for parameter in octavo.adapters(model):
            parameter.zero_()
    assert torch.equal(model(x), quantized_network()(x))


def test_what_the_layer_has_is_read_through_the_adapter():
    model = adapted()
    layer = model.fc1
    assert isinstance(layer.base, QuantLinear) and layer.base.is_packed
    assert (layer.in_features, layer.out_features) == (48, 64)
    assert layer.weight.dtype == torch.float32 and layer.weight.shape == (64, 48)
    assert layer.scheme == SCHEMES["int4"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
