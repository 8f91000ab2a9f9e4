# SPDX-License-Identifier: Apache-2.0
"""`.weight` of a packed layer: its form costs nothing, its values are the dequantized ones, and writing is refused."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from asserts import assert_bits_equal
from checkpoints import edit_config
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import octavo
from octavo.nn import QuantLinear

N, K = 6, 10


def layer_of(dtype=torch.float32, scheme=octavo.Int8Dynamic(), **options) -> QuantLinear:
    torch.manual_seed(0)
    x = torch.randn(16, K)
    return octavo.quantized(nn.Linear(K, N, **options).to(dtype), scheme, data=[x.to(dtype)])


@pytest.fixture
def layer() -> QuantLinear:
    return layer_of()


@pytest.fixture
def reads(monkeypatch) -> list:
    """One entry for each time that a matrix was dequantized."""
    calls, original = [], QuantLinear.dequantize
    monkeypatch.setattr(QuantLinear, "dequantize", lambda *args: (calls.append(args), original(*args))[1])
    return calls


# --- what it is -----------------------------------------------------------------------------------------------------


def test_questions_about_the_form_need_no_values(layer, reads):
    weight = layer.weight
    assert isinstance(weight, torch.Tensor) and not isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device.type) == ((N, K), torch.float32, "cpu")
    assert (weight.size(0), weight.dim(), weight.ndim, weight.numel(), len(weight)) == (N, 2, 2, N * K, N)
    assert (weight.stride(), weight.is_contiguous(), weight.layout) == ((K, 1), True, torch.strided)
    assert (weight.requires_grad, weight.is_leaf, weight.grad, weight.is_meta) == (False, True, None, False)
    assert weight.is_floating_point() and weight.element_size() == 4 and weight.nbytes == 4 * N * K
    assert (weight.data.dtype, weight.detach().shape, weight.T.shape) == (torch.float32, (N, K), (K, N))
    assert weight.t().stride() == (1, K) and weight[2].shape == (K,) and weight.view(-1).shape == (N * K,)
    assert weight.to("cpu").dtype == weight.float().dtype == torch.float32
    weight.requires_grad = False
    weight.requires_grad_(False)
    assert reads == []
    weight.sum()
    assert len(reads) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [
        octavo.Int8Dynamic(),
        octavo.Int8Static(),
        octavo.LLMInt8(0.5),
        octavo.Int8Dynamic(method=octavo.SmoothQuant(fold=False)),
    ],
    ids=lambda scheme: scheme.name,
)
def test_it_has_the_dtype_of_the_float_layer_also_from_a_file(tmp_path, dtype, bias, scheme):
    layer = layer_of(dtype, scheme, bias=bias)
    assert layer.weight.dtype == layer.weight_dtype == dtype
    assert_bits_equal(layer.weight, layer.dequantize(dtype))
    octavo.save(nn.Sequential(layer), tmp_path)
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(K, N, bias=bias))
    assert_bits_equal(octavo.load(tmp_path, skeleton)[0].weight, layer.dequantize(dtype))


def test_an_old_file_gives_it_the_dtype_of_the_bias_or_else_the_skeleton(tmp_path):
    for bias in (True, False):
        octavo.save(layer_of(torch.bfloat16, bias=bias), tmp_path)
        edit_config(tmp_path, lambda config: config.pop("weight_dtypes"))
        loaded = octavo.load(tmp_path, nn.Linear(K, N, bias=bias).half())
        assert loaded.weight.dtype == (torch.bfloat16 if bias else torch.float16)


@pytest.mark.parametrize(
    "cast, dtype",
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half().float(), torch.float32),
        (lambda m: m.double(), torch.float32),
        (lambda m: copy.deepcopy(m.half()), torch.float16),
        (lambda m: pickle.loads(pickle.dumps(m.half())), torch.float16),
    ],
)
def test_casts_of_the_layer_change_what_it_reads_as(layer, cast, dtype):
    values = layer.dequantize(dtype)
    assert_bits_equal(cast(layer).weight, values)


# --- its values -----------------------------------------------------------------------------------------------------

READS = {
    "add": lambda w: w + 1,
    "product": lambda w: torch.ones(3, K) @ w.T,
    "linear": lambda w: F.linear(torch.ones(3, K), w),
    "linear, two views": lambda w: F.linear(torch.ones(3, 5), w[:, 2:7]),
    "abs, max": lambda w: w.abs().max(dim=1).values,
    "element": lambda w: w[3, 4].item(),
    "clone": lambda w: w.clone(),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "torch.save": lambda w: saved(w),
    "numpy": lambda w: torch.from_numpy(w.numpy().copy()),
    "asarray": lambda w: torch.from_numpy(np.asarray(w.detach()).copy()),
    "tolist": lambda w: w.tolist(),
    "print": str,
    "format": lambda w: f"{w} {w[0, 0]:.3f}",
    "to": lambda w: w.to(torch.bfloat16),
    "contiguous": lambda w: w.t().contiguous(),
    "chunks": lambda w: w.chunk(2)[1] * 1.0,
    "unbind": lambda w: [row.sum() for row in w],
    "stack": lambda w: torch.stack([w, w]),
    "mask": lambda w: w[w > 0],
    "gather": lambda w: w[torch.tensor([2, 0])],
    "norm": lambda w: w.norm(),
    "einsum": lambda w: torch.einsum("nk,mk->mn", w, torch.ones(2, K)),
    "reshape": lambda w: w.reshape(2, -1) * 1.0,
    "out": lambda w: torch.mul(w, 2, out=torch.empty(N, K)),
    "filled": lambda w: torch.empty(N, K).copy_(w),
    "equal": lambda w: (torch.equal(w, w + 0), torch.equal(w, w + 1)),
    "vmap": lambda w: torch.vmap(torch.sum)(w),
    "share_memory": lambda w: w.share_memory_(),
    "bits": lambda w: (w.view(torch.int32) + 0).tolist(),
}


def saved(tensor: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(found, expected):
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert_bits_equal(found, expected)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_reading_gives_what_the_dequantized_matrix_gives(layer, read, mode):
    with mode():
        assert_same(read(layer.weight), read(layer.dequantize()))


def test_a_gradient_passes_through_a_product_with_it(layer):
    x, grad_y = torch.randn(3, K, requires_grad=True), torch.randn(3, N)
    F.linear(x, layer.weight, layer.bias).backward(grad_y)
    assert_bits_equal(x.grad, grad_y @ layer.dequantize())


def test_multi_head_attention_reads_it():
    torch.manual_seed(0)
    width = 8
    layers = [octavo.quantized(nn.Linear(width, width), octavo.Int8Dynamic()) for _ in range(4)]
    x = torch.randn(5, 2, width)

    def attention(of):
        q, k, v, out = map(of, layers)
        bias = torch.cat([layer.bias for layer in layers[:3]])
        weights = {
            "q_proj_weight": q,
            "k_proj_weight": k,
            "v_proj_weight": v,
            "use_separate_proj_weight": True,
        }
        none = (None, None, False, 0.0)
        return F.multi_head_attention_forward(
            x, x, x, width, 2, torch.empty(0), bias, *none, out, layers[3].bias, training=False, **weights
        )[0]

    assert_bits_equal(attention(lambda layer: layer.weight), attention(lambda layer: layer.dequantize()))


def test_what_the_layer_holds_later_is_what_it_reads(layer):
    weight, other = layer.weight, layer_of(bias=True)
    state = other.state_dict()
    state["weight"] = state["weight"] // 2
    layer.load_state_dict(state)
    assert_bits_equal(weight + 0, layer.dequantize())


def test_an_address_stays_and_is_nobody_else_s(layer):
    first, second = layer.weight, layer.weight
    assert first.data_ptr() == first.data_ptr() != second.data_ptr()
    assert first.untyped_storage().nbytes() == 4 * N * K


def test_compiled_and_exported_code_may_read_it(layer):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            return F.linear(x.to(self.inner.weight.dtype), self.inner.weight)

    x = torch.randn(3, K)
    expected = Reads()(x)
    assert_bits_equal(torch.compile(Reads(), backend="eager", fullgraph=True)(x), expected)
    assert_bits_equal(torch.export.export(Reads(), (x,)).module()(x), expected)


# --- writing --------------------------------------------------------------------------------------------------------

WRITES = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "copy_": lambda w: w.copy_(torch.zeros(N, K)),
    "zero_": lambda w: w.zero_(),
    "data.mul_": lambda w: w.data.mul_(2),
    "detach().fill_": lambda w: w.detach().fill_(0),
    "element": lambda w: w.__setitem__((0, 0), 1.0),
    "slice": lambda w: w.__setitem__(slice(1, 3), torch.zeros(2, K)),
    "mask": lambda w: w.__setitem__(w > 0, 0.0),
    "row": lambda w: w[2].add_(1),
    "view": lambda w: w.view(-1).zero_(),
    "transposed": lambda w: w.t().mul_(2),
    "chunk": lambda w: w.chunk(2)[0].mul_(2),
    "float().clamp_": lambda w: w.float().clamp_(0, 1),
    "cpu().neg_": lambda w: w.cpu().neg_(),
    "out": lambda w: torch.add(torch.ones(N, K), 1, out=w),
    "init": lambda w: nn.init.xavier_uniform_(w),
    "init of zeros": lambda w: nn.init.zeros_(w),
    "orthogonal": lambda w: nn.init.trunc_normal_(w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "data": lambda w: setattr(w, "data", torch.zeros(N, K)),
    "grad": lambda w: setattr(w, "grad", torch.zeros(N, K)),
    "requires_grad": lambda w: setattr(w, "requires_grad", True),
    "requires_grad_": lambda w: w.requires_grad_(),
    "set_": lambda w: w.set_(torch.zeros(N, K)),
    "resize_": lambda w: w.resize_(1),
    "apply_": lambda w: w.apply_(lambda value: 0.0),
    "index_add_": lambda w: w.index_add_(0, torch.tensor([0]), torch.ones(1, K)),
    "random numbers": lambda w: w.normal_(),
    "trainable Parameter": nn.Parameter,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_writing_is_refused_with_the_remedy_and_changes_nothing(layer, write, mode):
    before = layer.dequantize()
    with (
        mode(),
        pytest.raises(RuntimeError, match="weight of a quantized layer is read-only.*Change the float model"),
    ):
        write(layer.weight)
    assert_bits_equal(layer.dequantize(), before)


def test_an_array_of_it_cannot_be_written_to(layer):
    for array in (layer.weight.numpy(), np.asarray(layer.weight)):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1.0


def test_a_copy_of_it_can_be_written_to(layer):
    before = layer.dequantize()
    for copied in (
        layer.weight.clone(),
        layer.weight * 1,
        copy.deepcopy(layer.weight),
        layer.weight.bfloat16(),
    ):
        copied.zero_()
        nn.Parameter(copied)
    assert_bits_equal(layer.dequantize(), before)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrizations.weight_norm(layer),
        lambda layer: layer.reset_parameters(),
    ],
    ids=["prune", "weight_norm", "reset_parameters"],
)
def test_what_changes_weights_of_other_layers_says_that_it_cannot(layer, change):
    x = torch.randn(2, K)
    y = layer(x)
    with pytest.raises((RuntimeError, AttributeError, KeyError, ValueError, TypeError)):
        change(layer)
    assert_bits_equal(layer(x), y)
