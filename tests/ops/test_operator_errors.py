# SPDX-License-Identifier: Apache-2.0
"""Bad arguments get one sentence from an operator, whichever way the call takes: kernel, meta tensors, or gradients."""

import itertools

import pytest
import torch
from operator_arguments import make_weight, random_codes

from octavo import ops

OPERATORS = torch.ops.octavo
INT8 = torch.int8


def packed_of(n, k):
    return torch.zeros(ops.packed_shape(n, k), dtype=INT8)


def ints(*shape):
    return torch.zeros(*shape, dtype=torch.int32)


WEIGHT = dict(zip(("packed", "column_sum", "weight_scale", "bias"), make_weight(20, 70), strict=True))
X, ROWS, MATRIX, HEADS = torch.randn(2, 3, 70), torch.rand(3), torch.randn(3, 70), torch.randn(2, 4, 5, 16)
NORM = {"x": X, "residual": X, "weight": torch.rand(70), "bias": torch.rand(70), "eps": 1e-5}
INPUT = {"input_scale": torch.tensor([0.02]), "input_zero_point": ints(1)}
HALF = torch.randn(20, 70).bfloat16()
PACKED_HALF = ops.pack_half(HALF)
BAD_PACKED_HALF = [PACKED_HALF[:1], PACKED_HALF.float(), PACKED_HALF[0]]
QPARAMS = {"scale": ROWS, "zero_point": ints(3)}

PLANES, UINT8 = torch.zeros(2, 4, 3, 64, dtype=torch.uint8), torch.uint8
GROUPS = {
    **{"codes": PLANES, "scale": torch.rand(2, 3, 16), "super_scale": None, "minimum": None, "table": None},
    **{"column_scale": torch.rand(20), "n": 20, "bits": 3, "group_size": 32, "offset": 4},
}

BLOCKS = ops.ggml_quantize(torch.randn(20, 512), "Q4_K")
PACKED_BLOCKS = dict(
    zip(("codes", "scale", "super_scale", "minimum"), ops.ggml_pack(BLOCKS, "Q4_K", 512), strict=True)
)
BAD_TYPES = [-1, 9, 99]

# What each operator takes, and changes that must be refused: {argument: bad values}.
GOOD = {
    "choose_qparams": {"x": MATRIX, "qmin": -127, "qmax": 127, "symmetric": True},
    "quantize": {"x": MATRIX, **QPARAMS, "qmin": -128, "qmax": 127, "dtype": INT8},
    "dequantize": {"codes": random_codes(3, 70), **QPARAMS, "dtype": torch.float32},
    "int8_mm": {"a": random_codes(3, 70), "b": random_codes(70, 5)},
    "pack_weight": {"codes": random_codes(20, 70)},
    "pack_weight_into": {"codes": random_codes(20, 70), "packed": packed_of(20, 70)},
    "unpack_weight": {"packed": packed_of(20, 70), "n": 20, "k": 70},
    "list_saturating": {"packed": packed_of(20, 70), "column_sum": ints(20)},
    "linear_dynamic": {"x": X, **WEIGHT, "symmetric": True, "activation": 0},
    "linear_static": {"x": X, **WEIGHT, **INPUT, "activation": 0},
    "linear_weight_only": {"x": X, **WEIGHT, "activation": 0},
    "linear_codes": {"codes": random_codes(2, 3, 70, dtype=torch.uint8), "scale": torch.rand(6), **WEIGHT},
    "linear_groups": {"x": X, **GROUPS, "bias": torch.rand(20), "input_bits": 8, "input_group": 32},
    "dequantize_groups": {**GROUPS, "k": 70, "dtype": torch.float32},
    "embedding_groups": {"ids": torch.arange(20), **GROUPS, "k": 70, "dtype": torch.float32},
    "pack_planes": {"codes": torch.zeros(20, 70, dtype=torch.uint8), "bits": 3},
    "unpack_planes": {"planes": PLANES, "n": 20, "k": 70},
    "ggml_quantize": {"x": torch.randn(20, 512), "type": 12, "importance": torch.rand(512)},
    "ggml_dequantize": {"blocks": BLOCKS, "type": 12, "k": 512, "dtype": torch.float32},
    "ggml_pack": {"blocks": BLOCKS, "type": 12, "k": 512},
    "ggml_unpack": {**PACKED_BLOCKS, "type": 12, "n": 20, "k": 512},
    "pack_half": {"weight": HALF},
    "pack_half_into": {"weight": HALF, "packed": torch.empty_like(PACKED_HALF)},
    "unpack_half": {"packed": PACKED_HALF, "n": 20, "k": 70},
    "embedding_half": {"ids": ints(2, 3), "packed": PACKED_HALF, "n": 20, "dtype": torch.float32},
    "linear_half": {"x": X, "packed": PACKED_HALF, "bias": torch.rand(20), "n": 20, "activation": 0},
    "activate": {"x": X, "activation": 1},
    "silu_mul": {"gate": X, "up": X},
    "rms_norm": {"x": X, "weight": torch.rand(70), "eps": 1e-5},
    "add_norm": NORM,
    "add_norm_codes": NORM,
    "rope": {"q": HEADS, "k": HEADS[:, :2], "cos": torch.rand(2, 5, 8), "sin": torch.rand(2, 5, 8)},
    "attention": {
        **{"q": HEADS, "k": HEADS[:, :2], "v": HEADS[:, :2], "mask": torch.zeros(2, 1, 5, 5)},
        **{"causal": True, "scale": 0.25, "precision": 1},
    },
}
VECTORS = [torch.rand(69), torch.rand(70, 1), torch.rand(()), torch.ones(70, dtype=torch.int64)]
BAD_WEIGHT = {
    "packed": [packed_of(20, 700), packed_of(200, 70), packed_of(20, 70).float(), packed_of(20, 70)[0]],
    "column_sum": [ints(19), ints(20, 1), torch.zeros(20)],
    "weight_scale": [torch.rand(20), torch.rand(20, 2), torch.rand(20, 1).double(), torch.rand(40, 1)],
    "bias": [torch.rand(19), torch.rand(20, 1), torch.zeros(20, dtype=torch.int64)],
    "activation": [-1, 5],
}
BAD_X = [torch.rand(()), torch.rand(2, 135), X.double()]
BAD_NORM = {"x": [torch.rand(()), X.long()], "weight": VECTORS}
BAD_ADD_NORM = {**BAD_NORM, "bias": VECTORS, "residual": [X[:1], X[0], X.half(), torch.rand(2, 3, 1)]}
BAD_SCALES = {"scale": [torch.rand(2), ROWS.double()], "zero_point": [ints(4), ROWS]}
BAD_GROUPS = {
    "codes": [PLANES[:1], PLANES[0], PLANES.int(), PLANES[:, :, :2]],
    "scale": [
        torch.rand(3, 16),
        torch.rand(2, 2, 16),
        torch.rand(2, 3, 16).double(),
        torch.ones(2, 3, 16, dtype=INT8),
    ],
    "super_scale": [
        torch.rand(2, 2, 1, 16),
        torch.rand(2, 1, 16),
        torch.ones(2, 1, 1, 16, dtype=UINT8),
        torch.rand(2, 1, 2, 16),
        torch.rand(2, 1, 3, 16),
    ],
    "minimum": [torch.rand(2, 2, 16), torch.ones(2, 3, 16, dtype=INT8)],
    "table": [torch.zeros(16, dtype=UINT8)],
    "column_scale": [torch.rand(19), torch.rand(20).half(), torch.rand(20, 1)],
    "bits": [0, 9, 4, 8],
    "group_size": [-32, 24, 64],
    "offset": [-1, 256],
    "n": [-1, 40],
}
BAD_IDS = [torch.rand(3), torch.zeros(3, dtype=UINT8)]
BAD_HEADS = [HEADS[0], HEADS[..., :8], HEADS[..., :0], HEADS[:, :0], HEADS.double()]
BAD = {
    "choose_qparams": {"x": [ROWS, MATRIX.double()], "qmin": [127, -(2**40), -128], "qmax": [2**40]},
    "quantize": {"x": [ROWS, MATRIX.double()], "qmin": [-129], "dtype": [torch.int32], **BAD_SCALES},
    "dequantize": {"codes": [ROWS.byte(), ints(3, 70)], "dtype": [torch.float64], **BAD_SCALES},
    "int8_mm": {"a": [ints(3, 70), random_codes(3, 7), random_codes(3)], "b": [random_codes(1), ints(70, 5)]},
    "pack_weight": {"codes": [random_codes(3), ints(3, 3)]},
    "pack_weight_into": {"codes": [ints(20, 70)], "packed": [packed_of(40, 70), packed_of(20, 70).mT]},
    "list_saturating": {
        "packed": [packed_of(200, 70), packed_of(20, 70).float(), packed_of(20, 70)[0]],
        "column_sum": [ints(50), ints(20, 1), torch.zeros(20)],
    },
    "unpack_weight": {
        "packed": [packed_of(40, 70), ints(2, 2, 16, 64)],
        "n": [-1, 2**62],
        "k": [-1, 2**63 - 1],
    },
    "linear_dynamic": {"x": BAD_X, **BAD_WEIGHT},
    "linear_static": {"x": BAD_X, **BAD_WEIGHT, "input_scale": [ROWS, ints(1)], "input_zero_point": [ROWS]},
    "linear_weight_only": {"x": BAD_X, **BAD_WEIGHT},
    "linear_codes": {
        "codes": [random_codes(6, 70), torch.zeros((), dtype=torch.uint8)],
        "scale": [ROWS, ints(6)],
    },
    "linear_groups": {
        **{"x": [torch.rand(()), torch.rand(2, 135), X.double()], **BAD_GROUPS, "bias": [torch.rand(19)]},
        **{"input_bits": [7, 16], "input_group": [16, -32]},
    },
    "dequantize_groups": {**BAD_GROUPS, "k": [-1, 200], "dtype": [torch.float64]},
    "embedding_groups": {**BAD_GROUPS, "ids": BAD_IDS, "k": [-1, 200], "dtype": [torch.float64]},
    "pack_planes": {"codes": [ROWS.byte(), ints(3, 3)], "bits": [0, 8]},
    "unpack_planes": {"planes": [PLANES[0], PLANES.int(), PLANES[:1]], "n": [-1, 40], "k": [-1, 200]},
    "ggml_quantize": {
        **{"x": [ROWS, torch.randn(20, 500), MATRIX.double()], "type": BAD_TYPES},
        "importance": [torch.rand(511), torch.rand(1, 512), ints(512)],
    },
    "ggml_dequantize": {
        **{"blocks": [BLOCKS[0], BLOCKS[:, 1:], BLOCKS.int()], "type": [*BAD_TYPES, 3]},
        **{"k": [-256, 256, 500], "dtype": [torch.float64]},
    },
    "ggml_pack": {
        "blocks": [BLOCKS[0], BLOCKS[:, 1:], BLOCKS.int()],
        "type": [*BAD_TYPES, 3],
        "k": [-256, 256, 500],
    },
    "ggml_unpack": {
        **{name: [tensor[:1], tensor[0], tensor.int()] for name, tensor in PACKED_BLOCKS.items()},
        **{"type": [*BAD_TYPES, 3, 14], "n": [-1, 33], "k": [-256, 256, 500]},
    },
    "pack_half": {"weight": [ROWS.half(), MATRIX]},
    "pack_half_into": {
        "weight": [ROWS.half(), MATRIX],
        "packed": [*BAD_PACKED_HALF, PACKED_HALF.half(), PACKED_HALF.mT.contiguous().mT],
    },
    "unpack_half": {"packed": BAD_PACKED_HALF, "n": [-1, 33, 2**62], "k": [-1, 71]},
    "embedding_half": {
        **{"ids": BAD_IDS, "packed": BAD_PACKED_HALF, "n": [-1, 33], "dtype": [torch.float64]},
    },
    "linear_half": {
        "x": BAD_X,
        "packed": [*BAD_PACKED_HALF, PACKED_HALF[:, :69]],
        "bias": BAD_WEIGHT["bias"],
        "n": [-1, 33],
        "activation": [-1, 5],
    },
    "activate": {"x": [X.long()], "activation": [-1, 5]},
    "silu_mul": {"gate": [torch.rand(()), X.double(), X[:1]], "up": [X[:1], X.half(), torch.rand(70)]},
    "rms_norm": BAD_NORM,
    "add_norm": BAD_ADD_NORM,
    "add_norm_codes": BAD_ADD_NORM,
    "rope": {
        "q": [HEADS[0], HEADS[..., :6], HEADS[:, :, :1], HEADS.double()],
        "k": [HEADS[0], HEADS[..., :6], HEADS[:1].expand(3, 4, 5, 16), HEADS.double()],
        "cos": [torch.rand(5, 8), torch.rand(2, 5, 7), torch.rand(2, 5, 8).long()],
        "sin": [torch.rand(5, 8), torch.rand(1, 5, 8), torch.rand(2, 5, 8).half()],
    },
    "attention": {
        "q": [*BAD_HEADS, HEADS[:1], HEADS[:, :3]],
        "k": [*BAD_HEADS, HEADS[:1, :2], HEADS[:, :3]],
        "v": [*BAD_HEADS, HEADS[:, :2, :4], HEADS[:, :1]],
        "mask": [torch.rand(5).long(), torch.rand(4), torch.rand(3, 1, 5, 5), torch.rand(1, 1, 1, 5, 5)],
        "precision": [-1, 4],
    },
}
CASES = [
    pytest.param(op, name, value, id=f"{op}-{name}-{i}")
    for op, changes in BAD.items()
    for name, values in changes.items()
    for i, value in enumerate(values)
]


def error_of(function, arguments):
    with pytest.raises(Exception) as error:
        function(**arguments)
    return type(error.value), str(error.value)


def with_tensors(arguments, change):
    return {name: change(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def marked(x):
    return x.detach().clone().requires_grad_() if x.is_floating_point() else x


@pytest.mark.parametrize("name", GOOD)
def test_good_arguments_are_accepted(name):
    getattr(OPERATORS, name)(**GOOD[name])


@pytest.mark.parametrize("op, name, value", CASES)
def test_a_kernel_and_meta_tensors_refuse_with_one_sentence(op, name, value):
    arguments, operator = GOOD[op] | {name: value}, getattr(OPERATORS, op)
    error, text = error_of(operator, arguments)
    assert error is ValueError and text.startswith(f"{op}: ")
    assert (error, text) == error_of(operator, with_tensors(arguments, lambda x: x.to("meta")))


LINEARS = {"linear_dynamic", "linear_static", "linear_weight_only"}
WITH_GRADIENTS = {*LINEARS, "linear_half", "silu_mul", "rms_norm", "add_norm", "rope", "attention"}
NAMED = {"activation", "precision"}  # of the wrappers: names, not the numbers of the operators


@pytest.mark.parametrize(
    "op, name, value",
    [case for case in CASES if case.values[0] in WITH_GRADIENTS and case.values[1] not in NAMED],
)
def test_a_call_with_gradients_refuses_as_one_without(op, name, value):
    good = {key: x for key, x in GOOD[op].items() if key not in NAMED}
    arguments, function = good | {name: value}, getattr(ops, op)
    with torch.no_grad():
        expected = error_of(function, arguments)
    assert expected[0] in (TypeError, ValueError) and expected[1].startswith(f"{op}: ")
    assert error_of(function, with_tensors(arguments, marked)) == expected


@pytest.mark.parametrize("requires_grad", [False, True])
def test_names_are_checked_with_and_without_gradients(requires_grad):
    x = torch.randn(3, 70).requires_grad_(requires_grad)
    heads = HEADS.clone().requires_grad_(requires_grad)
    weight = WEIGHT.values()
    for call in (
        lambda: ops.activate(x, "tanh"),
        lambda: ops.linear_dynamic(x, *weight, activation="tanh"),
        lambda: ops.linear_static(x, *weight, *INPUT.values(), activation="tanh"),
        lambda: ops.linear_weight_only(x, *weight, activation="tanh"),
        lambda: ops.linear_half(x, PACKED_HALF, None, 20, activation="tanh"),
        lambda: ops.attention(heads, heads, heads, precision="int4"),
    ):
        with pytest.raises(ValueError, match="accepted"):
            call()


# --- tensors elsewhere, and of other kinds --------------------------------------------------------------------------


def tensors_of(op):
    return [name for name, x in GOOD[op].items() if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("op, name", [(op, name) for op in GOOD for name in tensors_of(op)[1:]])
def test_tensors_on_two_devices_are_refused(op, name):
    """A fake of meta and CPU tensors would give memory that nobody has written."""
    for other in (name, tensors_of(op)[0]):
        with pytest.raises(ValueError, match="on meta.*all tensors must be on one device|and .* on meta"):
            getattr(OPERATORS, op)(**GOOD[op] | {other: GOOD[op][other].to("meta")})


def kinds():
    x = torch.ones(3, 3)
    yield "to_dense", x.to_sparse()
    yield "to_dense", x.to_sparse_csr()
    yield "to_dense", x.to_mkldnn()
    yield "nested", torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged)


@pytest.mark.filterwarnings("ignore:.*nested tensors|.*Sparse CSR")
@pytest.mark.parametrize("kind, requires_grad", itertools.product(range(4), (False, True)))
def test_tensors_of_other_kinds_are_refused_with_the_remedy(kind, requires_grad):
    text, x = list(kinds())[kind]
    with pytest.raises(TypeError, match=f"activate: x .*{text}"):
        OPERATORS.activate(x.requires_grad_(requires_grad), 1)
    if text == "to_dense" and kind == 0:
        with pytest.raises(TypeError, match="rms_norm: weight .*to_dense"):
            OPERATORS.rms_norm(torch.ones(3), torch.ones(3).to_sparse(), 1e-5)


def test_views_that_torch_negates_lazily_are_read_as_they_are_meant():
    x = torch._neg_view(torch.tensor([-1.0, 2.0]))
    assert torch.equal(ops.activate(x, "relu"), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="packed is a view that torch negates"):
        ops.pack_weight_into(random_codes(20, 70), torch._neg_view(packed_of(20, 70)))
