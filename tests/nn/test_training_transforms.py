# SPDX-License-Identifier: Apache-2.0
"""Prepared models in torch's hands: checkpointing, hooks on saved tensors, second derivatives, torch.func, graphs."""

import pytest
import torch
from asserts import assert_bits_equal, assert_within
from models import every_scheme
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import octavo
from octavo.tensors.fake_quantize import fake_quantize, fake_quantize_per_token, lsq

X = torch.randn(12, 70, generator=torch.Generator().manual_seed(1))
OPTIONS = [{}, {"estimator": "pure"}, {"learn_scales": True}]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def prepared(scheme, **options) -> nn.Module:
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(70, 20), nn.ReLU(), nn.Linear(20, 5))
    octavo.prepare_(m, scheme, **options)
    for _ in range(scheme.calibration_passes):
        with octavo.calibrating(m), torch.no_grad():
            m(X)
    return m


def loss(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return m(x).square().sum()


def gradients(m: nn.Module, run) -> list[torch.Tensor]:
    """Of `loss` by the parameters of m and by x, where run(m, x) gives the output."""
    x = X.clone().requires_grad_()
    wanted = [*(p for p in m.parameters() if p.requires_grad), x]
    return list(torch.autograd.grad(run(m, x).square().sum(), wanted, allow_unused=True))


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_bits_equal(a, b)


def on_cpu(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autograd.graph.save_on_cpu():
        return m(x)


@every_option
@every_scheme
@pytest.mark.parametrize(
    "run", [lambda m, x: checkpoint(m, x, use_reentrant=False), on_cpu], ids=["checkpoint", "save_on_cpu"]
)
def test_what_happens_to_saved_tensors_changes_no_gradient(run, scheme, options):
    m = prepared(scheme, **options)
    assert_same(gradients(m, run), gradients(m, lambda m, x: m(x)))


@every_scheme
def test_a_frozen_model_trains_what_is_before_it_under_checkpointing(scheme):
    m = prepared(scheme)
    octavo.freeze_(m)
    run = lambda m, x: checkpoint(m, x, use_reentrant=False)  # noqa: E731
    assert_same(gradients(m, run), gradients(m, lambda m, x: m(x)))


ONE, ZERO = torch.ones(1) / 16, torch.zeros(1, dtype=torch.int32)
FUNCTIONS = {
    "clipped": lambda x: fake_quantize(x, ONE, ZERO, -8, 7),
    "pure": lambda x: fake_quantize(x, ONE, ZERO, -8, 7, estimator="pure"),
    "per_token": fake_quantize_per_token,
    "lsq": lambda x: lsq(x, ONE, -8, 7),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@every_function
def test_the_gradient_can_be_derived_again_by_what_comes_from_behind(function):
    """d/dx of f(x)^2 is 2 f(x) f'(x), of which f' is a constant: its derivative is 2 f'(x)^2, here 0 or 2."""
    x = X.clone().requires_grad_()
    (once,) = torch.autograd.grad(function(x).sum(), x)
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_bits_equal(second, 2 * once * once)


@pytest.mark.parametrize("offset", [None, torch.zeros(1)])
def test_learned_scales_can_be_derived_twice(offset):
    """y = f(x, s): the derivative of sum(y^2)'s by s, along y alone, is 2 (dy/ds)^2 summed: the slope is a constant."""
    x, scale = X[0, :1], ONE.clone().requires_grad_()
    (once,) = torch.autograd.grad(lsq(x, scale, -8, 7, offset=offset, grad_factor=0.5).sum(), scale)
    y = lsq(x, scale, -8, 7, offset=offset, grad_factor=0.5)
    (first,) = torch.autograd.grad(y.square().sum(), scale, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), scale)
    assert_within(second, 2 * once.double() * once, 4 * 2**-24 * second.abs())


@every_function
@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(X),
        lambda f: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(X[:, None])[:, 0],
        lambda f: torch.func.grad(lambda x: torch.vmap(f)(x).square().sum())(X[:, None])[:, 0],
    ],
    ids=["grad", "vmap(grad)", "grad(vmap)"],
)
def test_torch_func_gives_the_gradients_of_autograd(function, transformed):
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    assert_bits_equal(transformed(function).contiguous(), expected)


@every_option
@every_scheme
def test_func_grad_of_a_prepared_model(scheme, options):
    m = prepared(scheme, **options)
    parameters = dict(m.named_parameters())
    found = torch.func.grad(lambda p: functional_call(m, p, (X,)).square().sum())(parameters)
    loss(m, X).backward()
    for name, parameter in parameters.items():
        assert_bits_equal(found[name], parameter.grad)


@every_scheme
def test_gradients_of_each_row_of_a_prepared_model(scheme):
    """vmap(grad), as for gradients of single samples. Products of one row are summed in another order: k + n roundings
    of what is summed, generously 2^-15 of the largest."""
    m = prepared(scheme)
    rows = torch.vmap(torch.func.grad(lambda x: loss(m, x)))(X)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(m, x), x)
    assert_within(rows, expected, 2**-15 * expected.abs().amax())


EXAMPLES = [
    (octavo.Int8WeightOnly(), {}),
    (octavo.Int8Dynamic(), {"estimator": "pure"}),
    (octavo.Int8Static(int32_bias=True), {}),
    (octavo.Int8Static(symmetric=False), {"learn_scales": True}),
    (octavo.Int8Static(method=octavo.SmoothQuant()), {}),
    (octavo.LLMInt8(), {"learn_scales": True}),
]


@pytest.mark.parametrize(("scheme", "options"), EXAMPLES, ids=repr)
def test_forward_mode_is_the_transpose_of_backward(scheme, options):
    """<J t, v> = <t, J' v> for any t and v, by x and all parameters at once. Sums of some thousand products in two
    orders: generously 2^-15 of all terms together."""
    m = prepared(scheme, **options)
    inputs = {"x": X, **dict(m.named_parameters())}

    def run(inputs):
        return functional_call(m, {name: p for name, p in inputs.items() if name != "x"}, (inputs["x"],))

    tangents = {name: torch.randn_like(tensor) for name, tensor in inputs.items()}
    y, tangent = torch.func.jvp(run, (inputs,), (tangents,))
    assert_bits_equal(y, m(X))
    v = torch.randn_like(y)
    (gradients_of,) = torch.func.vjp(run, inputs)[1](v)
    terms = torch.cat([(gradients_of[name].double() * tangents[name]).flatten() for name in inputs])
    assert_within((tangent.double() * v).sum(), terms.sum(), 2**-15 * terms.abs().sum())
    both = [
        of(torch.func.jacrev(lambda x: loss(m, x)))(X[0]) for of in (torch.func.jacfwd, torch.func.jacrev)
    ]
    assert_within(both[0], both[1], 2**-15 * both[1].abs().amax())


def test_biases_of_many_models_are_quantized_together():
    """And one that does not fit is told of, though torch.vmap knows no elements."""
    m = prepared(octavo.Int8Static(int32_bias=True))[0]
    biases = torch.randn(3, 20)
    run = lambda bias: functional_call(m, {"bias": bias}, (X,))  # noqa: E731
    assert_bits_equal(torch.vmap(run)(biases), torch.stack([run(bias) for bias in biases]))
    biases[1, 2] = 1e9
    with pytest.raises(
        ValueError, match="a bias is more steps of input_scale [*] weight_scale than int32 sums"
    ):
        torch.vmap(run)(biases)


# --- graphs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def new_graphs():
    torch.compiler.reset()


@pytest.mark.parametrize(("scheme", "options"), EXAMPLES, ids=repr)
def test_a_prepared_layer_is_one_graph(scheme, options, new_graphs):
    m = prepared(scheme, **options)[0]
    run = torch.compile(m, fullgraph=True, backend="aot_eager")
    assert_same(gradients(m, lambda _, x: run(x)), gradients(m, lambda m, x: m(x)))
    assert_bits_equal(run(X).detach(), m(X).detach())


@pytest.mark.parametrize(("scheme", "options"), EXAMPLES, ids=repr)
@torch.no_grad()
def test_a_prepared_layer_can_be_exported(scheme, options):
    m = prepared(scheme, **options)[0]
    assert_bits_equal(torch.export.export(m, (X,)).module()(X), m(X))


@torch.no_grad()
def test_outlier_columns_are_in_the_graph_as_well(new_graphs):
    """As a product over all columns, of which the others are 0: summed in another order, k roundings of each side."""
    m, x = prepared(octavo.LLMInt8()), X.clone()
    x[:, 3] *= 100
    with octavo.calibrating(m):
        m(x)
    assert m[0].outlier_columns.tolist() == [3]
    bound = 2 * 70 * 2**-24 * (x.abs() @ m[0].weight.abs().T)
    assert_within(torch.compile(m[0], fullgraph=True, backend="aot_eager")(x), m[0](x), bound)


@pytest.mark.parametrize(
    "scheme",
    [octavo.Int8Static(), octavo.LLMInt8(), octavo.Int8Static(method=octavo.SmoothQuant())],
    ids=repr,
)
def test_a_graph_of_a_layer_that_is_not_calibrated_raises_when_it_runs(scheme, new_graphs):
    m = nn.Sequential(nn.Linear(70, 20))
    octavo.prepare_(m, scheme)
    run = torch.compile(m, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="layer '0' is not calibrated"):
        run(X)
    for _ in range(scheme.calibration_passes):
        with octavo.calibrating(m), torch.no_grad():
            m(X)
    assert_bits_equal(run(X).detach(), m(X).detach())


def test_an_int32_bias_that_does_not_fit_raises_in_a_graph(new_graphs):
    m = prepared(octavo.Int8Static(int32_bias=True))
    with torch.no_grad():
        m[0].bias[0] = 1e9
    with pytest.raises(RuntimeError, match="leave room for"):
        torch.compile(m, fullgraph=True, backend="aot_eager")(X)
