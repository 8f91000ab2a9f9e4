# SPDX-License-Identifier: Apache-2.0
"""Modules change places and go back to them."""

import pytest
import torch
from asserts import assert_unchanged, model_state
from models import model
from torch import nn

from octavo.base.modules import places_of, replace_at, undone_on_error


def test_a_module_is_replaced_in_every_place():
    shared, other = nn.Linear(2, 2), nn.Identity()
    m = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared, "d": other})})
    places = places_of([shared, m], m)
    assert places == {id(shared): [(m, "a"), (m["b"], "c")], id(m): []}
    replace_at(places[id(shared)], new := nn.Identity())
    assert m["a"] is m["b"]["c"] is new and m["b"]["d"] is other


def test_after_an_error_everything_is_in_its_place():
    m = model()
    before, weight = model_state(m), m.head.weight
    with pytest.raises(KeyError), undone_on_error(m):
        m.head = nn.Identity()
        m.encoder[0].mlp[0].weight = nn.Parameter(torch.zeros(1))
        m.encoder[0].register_buffer("extra", torch.zeros(1))
        m.norm.eps, m.other = 1.0, 2
        m.eval()
        raise KeyError
    assert_unchanged(m, before)
    assert m.head.weight is weight and m.norm.eps == 1e-5 and not hasattr(m, "other")


def test_without_an_error_nothing_is_undone():
    m = model()
    with undone_on_error(m):
        m.head = nn.Identity()
    assert isinstance(m.head, nn.Identity)


def test_after_an_error_vectors_have_their_values_back():
    m = model()
    before, weight = model_state(m), m.norm.weight
    with pytest.raises(KeyboardInterrupt), undone_on_error(m), torch.no_grad():
        m.norm.weight.mul_(2)
        m.head.bias.zero_()
        raise KeyboardInterrupt
    assert_unchanged(m, before)
    assert m.norm.weight is weight
