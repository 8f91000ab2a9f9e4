# SPDX-License-Identifier: Apache-2.0
"""What the tests of the operators share: random arguments, the linear operators by name, equality of bits."""

import torch

from octavo import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
RANGES = {  # (dtype, symmetric): qmin, qmax
    (torch.int8, True): (-127, 127),
    (torch.int8, False): (-128, 127),
    (torch.uint8, True): (1, 255),
    (torch.uint8, False): (0, 255),
}
WHAT_TAKES_MILLISECONDS = ("test_schema", "test_autograd_registration", "test_faketensor")  # of opcheck
LINEARS = {
    "dynamic_symmetric": ("linear_dynamic", (True,)),
    "dynamic_affine": ("linear_dynamic", (False,)),
    "static": ("linear_static", (torch.tensor([0.02]), torch.tensor([-7], dtype=torch.int32))),
    "weight_only": ("linear_weight_only", ()),
}


def random_codes(*shape, dtype=torch.int8):
    """Codes over all of dtype, both ends included."""
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, dtype=dtype)


def random_rows(m, k, dtype=torch.float32):
    """Rows of very different size, one of them zero and one of them positive."""
    x = torch.randn(m, k) * torch.logspace(-6, 3, m)[:, None]
    x[m // 2] = 0
    x[-1] = x[-1].abs()
    return x.to(dtype)


def make_weight(n, k, bias_dtype=torch.float32):
    """packed, column_sum, weight_scale, bias of a random weight."""
    packed, column_sum = ops.pack_weight(random_codes(n, k))
    bias = None if bias_dtype is None else torch.randn(n).to(bias_dtype)
    return packed, column_sum, torch.rand(n, 1) / 100, bias


def assert_same_bits(actual, expected):
    """Equality of dtype, shape and bits, the sign of zero included; every NaN equals every other."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual.isnan(), expected.isnan())
    bits = {4: torch.int32, 2: torch.int16, 1: torch.int8}[actual.element_size()]
    assert torch.equal(actual.nan_to_num(nan=0.0).view(bits), expected.nan_to_num(nan=0.0).view(bits))
