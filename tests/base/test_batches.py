# SPDX-License-Identifier: Apache-2.0
"""Batches in every form that data loaders give, and tensors wherever an output keeps them."""

import warnings
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import octavo
from octavo.base.batches import calls, float_tensors, output_of

Y = torch.arange(6.0).reshape(2, 3)


class Plain:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("unset", "value")

    def __init__(self, value):
        self.value = value


class MoreSlots(Slots):
    __slots__ = "own"

    def __init__(self, value):
        self.own = [value]


@dataclass
class Data:
    name: str
    value: object


@dataclass(slots=True)
class SlotData:
    value: object


WRAPS = {
    "tensor": lambda y: y,
    "namespace": lambda y: SimpleNamespace(logits=y, note="x"),
    "object": Plain,
    "slots": Slots,
    "inherited_slots": MoreSlots,
    "dataclass": lambda y: Data("y", y),
    "slots_dataclass": SlotData,
    "dicts": lambda y: {"a": UserDict(b=OrderedDict(c=y))},
    "sequences": lambda y: [(deque([y]),), None, 3, "text"],
    "set": lambda y: frozenset([y]),
    "deep": lambda y: [{"a": Plain(SimpleNamespace(b=[Slots((Data("", y),))]))}],
    "distribution": lambda y: torch.distributions.Exponential(y + 1),
}
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


@wraps
def test_tensors_are_found_wherever_they_are(wrap):
    assert [tensor.shape for tensor in float_tensors(wrap(Y))] == [Y.shape]
    assert not list(float_tensors(wrap(Y.long()))) or wrap is WRAPS["distribution"]


def test_an_object_that_holds_itself_ends():
    one = Plain(Y)
    one.me = [one]
    assert len(list(float_tensors(one))) == 1
    assert len(list(float_tensors([one, one]))) == 2  # twice in an output, though, is twice


def test_complex_sparse_and_nested_tensors_come_as_plain_floats():
    assert next(float_tensors(torch.complex(Y, Y))).shape == (2, 3, 2)
    assert torch.equal(next(float_tensors(Y.to_sparse())), Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that they are a prototype
        nested = torch.nested.nested_tensor([Y[:1], Y])
    assert [tensor.shape[0] for tensor in float_tensors(nested)] == [1, 2]


def test_modules_functions_and_caches_are_no_outputs():
    assert not list(float_tensors([nn.Linear(2, 2), output_of, Plain, octavo.nn.KVCache(), torch.float32]))


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer, self.wrap = nn.Linear(3, 4), wrap

    def forward(self, x):
        return self.wrap(self.layer(x).exp())


@wraps
def test_every_figure_sees_what_an_output_holds(wrap):
    """An error that is not seen would be 0 or inf dB."""
    torch.manual_seed(0)
    reference = Wrapped(wrap)
    model = octavo.quantized(reference, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)))
    assert 0 < octavo.compare(reference, model, Y).output.sqnr_db < 60
    assert 0 < octavo.evaluate(reference, model, Y, kind="module", resources=()).output.sqnr_db < 60
    found = octavo.sensitivity(
        reference, Y, octavo.Int8Dynamic(weights=octavo.formats.CoarseInt8(3)), figure="error"
    )
    assert found.rows[1].figure > 0


@pytest.mark.parametrize("output", [None, 3, Y.long(), "text", Plain(None)])
def test_an_output_without_a_tensor_is_an_error_never_a_figure(output):
    reference = Wrapped(lambda y: output)
    model = octavo.quantized(reference, octavo.Int8Dynamic())
    for measure in (
        lambda: octavo.compare(reference, model, Y),
        lambda: octavo.evaluate(reference, model, Y, kind="module", resources=()),
        lambda: octavo.sensitivity(reference, Y, octavo.Int8Dynamic(), figure="error"),
    ):
        with pytest.raises(ValueError, match="floating-point tensor"):
            measure()


def test_each_run_gets_its_own_copy_of_a_cache():
    class Cached(nn.Module):
        def forward(self, x, cache):
            cache.seen.append(x)
            return x * len(cache.seen)

    class Cache:
        def __init__(self):
            self.seen = []

        def get_seq_length(self):
            return len(self.seen)

    cache = Cache()
    for _ in range(2):
        assert torch.equal(output_of(Cached(), (Y,), {"cache": cache}), Y)
        assert torch.equal(output_of(Cached(), (Y, cache), {}), Y)
    assert not cache.seen


def test_a_loaders_batch_of_x_and_labels_given_as_a_list_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"give one batch as a tuple: \(x, labels\)"):
        next(calls([Y, torch.tensor([0, 1])], "compare: batches"))
    assert len(list(calls([Y, Y], "compare: batches"))) == 2
