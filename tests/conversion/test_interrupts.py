# SPDX-License-Identifier: Apache-2.0
"""Conversions that end early, by Ctrl-C or for want of memory: a model is as it was or quantized as a whole."""

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from models import IDS, LINEARS, model
from torch import nn

import octavo
from octavo.base import modules as swap
from octavo.conversion import convert, plan, prepare
from octavo.conversion.report import QuantizationReport
from octavo.nn import PreparedLinear, QuantLinear
from octavo.schemes.base import Scheme

SCHEMES = [
    octavo.Int8Dynamic(),
    octavo.Int8Static(),
    octavo.Int8Dynamic(method=octavo.SmoothQuant()),
    octavo.LLMInt8(),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
ERRORS = [KeyboardInterrupt, MemoryError, SystemExit]


def interrupt(monkeypatch, owner, name: str, *calls: int, error=KeyboardInterrupt) -> list[int]:
    """owner.name raises at these calls, counted from 1. Returns a list that holds the number of calls."""
    original, count = getattr(owner, name), [0]

    def interrupted(*args, **kwargs):
        count[0] += 1
        if count[0] in calls:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    return count


def kinds(m: nn.Module) -> list[type[nn.Module]]:
    return [type(m.get_submodule(name)) for name in LINEARS]


@every_scheme
@pytest.mark.parametrize("error", ERRORS)
def test_until_the_first_layer_is_frozen_the_model_is_as_it_was(monkeypatch, scheme, error):
    m = model().eval()
    before, weight = model_state(m), m.head.weight
    interrupt(monkeypatch, Scheme, "freeze", 1, error=error)
    with pytest.raises(error):
        octavo.quantize_(m, scheme, data=IDS)
    assert_unchanged(m, before)
    assert m.head.weight is weight


STEPS = [
    (Scheme, "freeze"),
    (plan.Layer, "becomes"),
    (prepare, "replace_at"),
    (QuantLinear, "pack_"),
]


@pytest.mark.parametrize("call", [2, 3, 7])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
def test_later_all_layers_are_quantized_first(monkeypatch, owner, name, error, call):
    """The float weights that are gone could not be put back. The error is raised in the end."""
    m = model().eval()
    octavo.prepare_(m, octavo.Int8Dynamic())
    expected = octavo.quantized(model().eval(), octavo.Int8Dynamic())
    interrupt(monkeypatch, owner, name, call, error=error)
    with pytest.raises(error):
        octavo.freeze_(m)
    monkeypatch.undo()
    assert set(kinds(m)) == {QuantLinear}
    assert_bits_equal(m(IDS).detach(), expected(IDS).detach())
    assert octavo.freeze_(m).rows[0].reason in ("already quantized", "not prepared")


def test_impatience_changes_nothing(monkeypatch, caplog):
    """Several interrupts, one after the other."""
    m = model().eval()
    interrupt(monkeypatch, Scheme, "freeze", 2, 3, 6, 7)
    with pytest.raises(KeyboardInterrupt):
        octavo.quantize_(m, octavo.Int8Dynamic())
    assert set(kinds(m)) == {QuantLinear}
    assert "has been completed" in caplog.text


def test_a_layer_that_cannot_be_frozen_at_all_is_float_again(monkeypatch):
    """So the model runs, and a second call goes on."""
    m = model().eval()
    third = m.get_submodule(LINEARS[2])
    interrupt(monkeypatch, Scheme, "freeze", 3, 4, 5, error=MemoryError)
    with pytest.raises(MemoryError):
        octavo.quantize_(m, octavo.Int8Dynamic())
    assert m.get_submodule(LINEARS[2]) is third
    assert kinds(m).count(QuantLinear) == len(LINEARS) - 1
    m(IDS)
    octavo.quantize_(m, octavo.Int8Dynamic())
    assert set(kinds(m)) == {QuantLinear}


@pytest.mark.parametrize("owner", [prepare, convert], ids=["replacing", "calibrating"])
def test_before_that_everything_is_undone(monkeypatch, owner):
    name = "replace_at" if owner is prepare else "calibrate"
    m = model().eval()
    before = model_state(m)
    interrupt(monkeypatch, owner, name, 1 if name == "calibrate" else 3)
    with pytest.raises(KeyboardInterrupt):
        octavo.quantize_(m, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=IDS)
    assert_unchanged(m, before)


def test_an_interrupt_in_freeze_leaves_prepared_layers_that_can_be_frozen(monkeypatch):
    m = model().eval()
    octavo.prepare_(m, octavo.Int8Dynamic())
    interrupt(monkeypatch, Scheme, "freeze", 1)
    with pytest.raises(KeyboardInterrupt):
        octavo.freeze_(m)
    assert set(kinds(m)) == {PreparedLinear}
    assert isinstance(octavo.freeze_(m), QuantizationReport)


def test_a_copy_that_is_not_finished_leaves_the_original_alone(monkeypatch):
    m = model().eval()
    before = model_state(m)
    interrupt(monkeypatch, Scheme, "freeze", 3)
    with pytest.raises(KeyboardInterrupt):
        octavo.quantized(m, octavo.Int8Dynamic())
    assert_unchanged(m, before)


def test_an_interrupt_while_undoing_does_not_stop_it():
    class Entries(dict):
        """The first `clear` is interrupted."""

        interrupted = False

        def clear(self):
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            super().clear()

    m = model()
    head = m.head
    with pytest.raises(ValueError), swap.undone_on_error(m) as undo:
        m.head = nn.Identity()
        undo._before[1] = (Entries(), {})
        raise ValueError
    assert m.head is head


def test_what_was_let_go_is_not_undone():
    m = model()
    with pytest.raises(ValueError), swap.undone_on_error(m) as undo:
        m.head = nn.Identity()
        undo.let_go()
        assert not undo.is_possible
        raise ValueError
    assert isinstance(m.head, nn.Identity)


@torch.no_grad()
def test_a_bare_layer_is_quantized_or_raises(monkeypatch):
    layer = nn.Linear(8, 8)
    interrupt(monkeypatch, Scheme, "freeze", 1)
    with pytest.raises(KeyboardInterrupt):
        octavo.quantized(layer, octavo.Int8Dynamic())
    assert type(octavo.quantized(layer, octavo.Int8Dynamic())) is QuantLinear
