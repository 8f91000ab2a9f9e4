# SPDX-License-Identifier: Apache-2.0
"""Every helper of asserts.py passes on what is right and fails on what is wrong."""

import pytest
import torch
from asserts import (
    assert_bits_equal,
    assert_equal,
    assert_unchanged,
    assert_within,
    assert_within_scale,
    in_case,
    model_state,
)
from torch import nn

NAN = float("nan")
FLOATS = torch.tensor([1.0, -2.0, NAN, 0.0])
NEXT_UP = torch.nextafter(FLOATS, torch.tensor(torch.inf))


def test_equal_passes_on_equal_integers():
    assert_equal(torch.tensor([1, 2]), torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "wrong",
    [torch.tensor([1, 3]), torch.tensor([1, 2], dtype=torch.int8), torch.tensor([[1, 2]]), torch.tensor([1])],
)
def test_equal_fails_on_another_value_dtype_or_shape(wrong):
    with pytest.raises(AssertionError):
        assert_equal(wrong, torch.tensor([1, 2]))


def test_equal_refuses_floats():
    with pytest.raises(AssertionError, match="assert_bits_equal"):
        assert_equal(FLOATS, FLOATS)


def test_bits_equal_takes_nan_for_equal():
    assert_bits_equal(FLOATS, FLOATS.clone())


@pytest.mark.parametrize(
    "wrong",
    [
        NEXT_UP,
        FLOATS.double(),
        FLOATS[:3],
        torch.tensor([1.0, -2.0, NAN, -0.0]),
        torch.tensor([NAN, -2.0, NAN, 0.0]),
        torch.tensor([1.0, -2.0, 5.0, 0.0]),
    ],
)
def test_bits_equal_fails_on_one_ulp_a_sign_of_zero_a_misplaced_nan_a_dtype_a_shape(wrong):
    with pytest.raises(AssertionError):
        assert_bits_equal(wrong, FLOATS)


def test_within_takes_its_bound_element_by_element():
    expected, bound = torch.tensor([1.0, 100.0]), torch.tensor([0.5, 5.0])
    assert_within(torch.tensor([1.5, 95.0]), expected, bound)
    with pytest.raises(AssertionError, match=r"element \[0\].*bound 0.5"):
        assert_within(torch.tensor([2.0, 100.0]), expected, bound)


@pytest.mark.parametrize("wrong", [torch.tensor([NAN]), torch.tensor([torch.inf]), torch.tensor([[1.0]])])
def test_within_fails_on_nan_inf_and_another_shape(wrong):
    with pytest.raises(AssertionError):
        assert_within(wrong, torch.tensor([1.0]), 1e30)


def test_within_fails_on_an_output_twice_too_large():
    with pytest.raises(AssertionError):
        assert_within(2 * torch.ones(8), torch.ones(8), 0.1)


def test_within_scale_ends_right_above_half_a_step():
    scale = torch.tensor([0.5])
    assert_within_scale(torch.tensor([1.25]), torch.tensor([1.0]), scale)
    with pytest.raises(AssertionError):
        assert_within_scale(torch.tensor([1.2502]), torch.tensor([1.0]), scale)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.__setitem__(0, nn.Linear(3, 2)),
        lambda model: model[0].weight.data.add_(1),
        lambda model: model[0].eval(),
        lambda model: model.append(nn.ReLU()),
        lambda model: model[0].half(),
    ],
    ids=["a replaced module", "a changed weight", "a changed flag", "a new module", "another dtype"],
)
def test_unchanged_notices(change):
    model = nn.Sequential(nn.Linear(3, 2))
    before = model_state(model)
    assert_unchanged(model, before)
    change(model)
    with pytest.raises(AssertionError):
        assert_unchanged(model, before)


def test_what_fails_in_a_case_names_it():
    with in_case("first", 1):
        assert_within(torch.ones(1), torch.ones(1), 0)
    with pytest.raises(AssertionError, match="in the case second, 2: .*is too far"):
        with in_case("second", 2):
            assert_within(torch.ones(1), torch.zeros(1), 0)
