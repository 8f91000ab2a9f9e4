# SPDX-License-Identifier: Apache-2.0
"""What every observer promises: a clear beginning, order, bad batches, saving. Methods: test_observer_methods.py."""

import copy
import json
import logging
import math
import pickle

import pytest
import strategies
import torch
from asserts import assert_bits_equal, assert_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import octavo
from octavo import observers
from octavo.base import configs
from octavo.observers import MSE, Entropy, Histogram, MinMax, MovingAverage, Percentile

BINNED = [Percentile(99.0, bins=128), MSE(steps=8, bins=128), Histogram(bins=128), Entropy(bins=128)]
CONFIGS = [MinMax(), MovingAverage(0.75), *BINNED]
CODES = [(True, -127, 127), (False, -128, 127), (True, -7, 7)]
moderate_floats = st.floats(width=32, min_value=-(2.0**40), max_value=2.0**40, allow_subnormal=False)

every_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
every_codes = pytest.mark.parametrize("codes", CODES, ids=str)


def seen(config, batches, axis=None):
    """A fresh observer that has seen `batches`."""
    observer = config.make(axis)
    for batch in batches:
        observer.update(batch)
    return observer


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_qparams(observer, other):
    for codes in CODES:
        q, expected = observer.qparams(*codes), other.qparams(*codes)
        assert_bits_equal(q.scale, expected.scale)
        assert_equal(q.zero_point, expected.zero_point)


def assert_same_state(observer, other, but=()):
    state, expected = observer.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for key in state.keys() - set(but):
        same = assert_bits_equal if state[key].is_floating_point() else assert_equal
        same(state[key], expected[key])


def batches_of(elements=moderate_floats, max_batches=3):
    batch = st.lists(elements, min_size=1, max_size=8).map(torch.tensor)
    return st.lists(batch, min_size=1, max_size=max_batches)


def test_every_method_is_tested_here():
    assert {config.name for config in CONFIGS} == set(configs.kinds(observers.ObserverConfig))


# --- the beginning --------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("axis", [None, 0])
def test_nothing_seen_is_a_state_of_its_own(config, axis):
    observer = config.make(axis)
    assert not observer.is_initialized
    with pytest.raises(
        ValueError, match=f"{config.name} observer: no finite value was seen.*calibration data"
    ):
        observer.qparams(*CODES[0])
    observer.update(torch.ones(3, 2))
    assert observer.is_initialized
    observer.reset()
    assert not observer.is_initialized
    assert_same_state(observer, config.make(axis))


@every_config
def test_scale_one_and_zeros_are_values_like_any_other(config):
    """quanto took the scale 1 for "not calibrated"."""
    observer = seen(config, [torch.zeros(5)])
    assert observer.is_initialized
    assert observer.qparams(*CODES[0]).scale.item() == 1.0
    assert seen(config, [torch.zeros(5), gaussian(64)]).qparams(*CODES[0]).scale.item() != 1.0


@every_config
def test_empty_batches_change_nothing(config):
    observer = seen(config, [torch.ones(0), torch.ones(3, 0)])
    assert not observer.is_initialized
    observer.update(gaussian(50))
    before = copy.deepcopy(observer)
    observer.update(torch.ones(0, 4))
    assert_same_state(observer, before)


@every_config
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_batches_with_nan_or_inf_are_ignored_with_one_warning(config, bad, caplog):
    observer = seen(config, [torch.tensor([1.0, bad])])
    assert not observer.is_initialized
    observer.update(gaussian(50))
    before = copy.deepcopy(observer)
    observer.update(torch.tensor([bad, 1e9]))
    assert_same_state(observer, before)
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING and config.name in caplog.text


# --- order ----------------------------------------------------------------------------------------------------------

ORDERLESS = [config for config in CONFIGS if not isinstance(config, MovingAverage)]


@pytest.mark.parametrize("config", ORDERLESS, ids=lambda config: config.name)
@settings(max_examples=20)
@given(st.data())
def test_order_and_cut_of_the_batches_do_not_matter(config, data):
    """Bit for bit, for all finite floats: bins that were merged hold what they would have held from the start."""
    batches = data.draw(batches_of(strategies.finite_floats()))
    observer = seen(config, batches)
    assert_same_state(observer, seen(config, data.draw(st.permutations(batches))))
    assert_same_state(observer, seen(config, [torch.cat(batches)]), but=["batches"])


def test_moving_average_weighs_the_last_batches_most():
    wide, narrow = torch.tensor([-8.0, 8.0]), torch.tensor([-1.0, 1.0])
    low, high = seen(MovingAverage(0.75), [wide, narrow]).choose_range(*CODES[0])
    assert (low.item(), high.item()) == (-6.25, 6.25)  # 8 + (1 - 0.75) (1 - 8)
    low, high = seen(MovingAverage(0.75), [narrow, wide]).choose_range(*CODES[0])
    assert (low.item(), high.item()) == (-2.75, 2.75)


def test_mse_counts_every_batch_not_the_last():
    """torchao's MSE observer overwrites its range at every batch."""
    wide, narrow = 100 * gaussian(1000), gaussian(1000, seed=1)
    both, last = (seen(MSE(), batches).qparams(*CODES[0]) for batches in ([wide, narrow], [narrow]))
    assert both.scale > 10 * last.scale


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ORDERLESS, ids=lambda config: config.name)
@given(batches_of(strategies.finite_floats()), st.sampled_from(CODES))
@settings(max_examples=25)
def test_a_range_never_leaves_the_values_and_zero(config, batches, codes):
    low, high = seen(config, batches).choose_range(*codes)
    x = torch.cat(batches)
    largest = x.abs().max()
    assert -largest <= low <= high <= largest
    if not codes[0]:
        assert x.amin().clamp(max=0) <= low and high <= x.amax().clamp(min=0)


@every_config
@settings(max_examples=15)
@given(batches=batches_of(st.floats(-1e3, 1e3, width=16)), exponent=st.integers(-20, 20))
def test_a_power_of_two_moves_the_range_by_itself(config, batches, exponent):
    factor = 2.0**exponent
    for codes in CODES:
        plain, moved = (
            seen(config, [f * batch for batch in batches]).choose_range(*codes) for f in (1, factor)
        )
        for end, moved_end in zip(plain, moved, strict=True):
            assert_bits_equal(moved_end, end * factor)


@every_config
@settings(max_examples=12)
@given(
    x=strategies.tensors(shape=(3, 4, 5), dtypes=(torch.float32,), elements=moderate_floats),
    axis=st.integers(-3, 2),
)
def test_each_channel_is_observed_as_if_it_were_alone(config, x, axis):
    together = seen(config, [x, 2 * x], axis)
    for codes in CODES:
        q = together.qparams(*codes)
        assert q.granularity == octavo.PerChannel(axis)
        for i in range(x.shape[axis]):
            alone = seen(config, [x.select(axis, i), 2 * x.select(axis, i)]).qparams(*codes)
            assert_bits_equal(q.scale[i], alone.scale)
            assert_equal(q.zero_point[i], alone.zero_point)


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_observed_as_its_float32_values(config, dtype):
    x = gaussian(40, 30).to(dtype)
    assert_same_state(seen(config, [x.t()]), seen(config, [x.float()]))


@settings(max_examples=25)
@given(batches_of())
def test_minmax_and_the_hundredth_percentile_have_the_qparams_of_all_values_together(batches):
    for symmetric, qmin, qmax in CODES[:2]:
        expected = octavo.choose_qparams(torch.cat(batches), symmetric=symmetric)
        for config in (MinMax(), Percentile(100, bins=128)):
            q = seen(config, batches).qparams(symmetric, qmin, qmax)
            assert_bits_equal(q.scale, expected.scale)
            assert_equal(q.zero_point, expected.zero_point)


@every_codes
def test_qparams_quantize_what_was_observed(codes):
    x = gaussian(6, 50)
    for axis in (None, 0, 1):
        q = seen(MinMax(), [x], axis).qparams(*codes).quantize(x)
        assert q.shape == x.shape and (q.qparams.qmin, q.qparams.qmax) == codes[1:]


# --- state ----------------------------------------------------------------------------------------------------------


def copies(observer):
    """The observer in another place: through its state_dict, on the meta device and back, pickled."""
    loaded = observer.config.make(observer.axis)
    loaded.load_state_dict(observer.state_dict())
    on_meta = observer.config.make(observer.axis).to("meta")
    on_meta.load_state_dict(observer.state_dict(), assign=True)
    return [loaded, on_meta, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))]


@every_config
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_saved_observer_goes_on_where_it_was(config, axis, count):
    batches = [3.0**i * gaussian(20, 4, seed=i) for i in range(4)]
    for observer in copies(seen(config, batches[:count], axis)):
        assert observer.is_initialized == (count > 0)
        for batch in batches[count:]:
            observer.update(batch)
        assert_same_state(observer, seen(config, batches, axis))
        assert_same_qparams(observer, seen(config, batches, axis))


def test_state_of_another_observer_is_refused():
    state = seen(Percentile(bins=128), [torch.ones(3)]).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for counts"):
        Percentile(bins=256).make().load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        MinMax().make().load_state_dict(state)


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_the_model_leaves_the_range_as_it_is(config, dtype):
    model = nn.ModuleList([seen(config, [gaussian(100)])])
    assert_same_state(model.to(dtype)[0], seen(config, [gaussian(100)]))


@every_config
def test_the_state_does_not_grow_with_the_data(config):
    sizes = {
        sum(t.nbytes for t in seen(config, [gaussian(n)] * n).state_dict().values()) for n in (1, 10, 40)
    }
    assert len(sizes) == 1


@every_config
def test_observing_in_inference_mode_leaves_ordinary_tensors(config):
    """Inference tensors could not take part in training after calibration."""
    with torch.inference_mode():
        observer = seen(config, [gaussian(30), gaussian(30, seed=1)])
        q = observer.qparams(*CODES[0])
    assert not any(t.is_inference() for t in [*observer.buffers(), q.scale, q.zero_point])
    assert_same_state(observer, seen(config, [gaussian(30), gaussian(30, seed=1).requires_grad_()]))


@every_config
def test_observing_changes_neither_the_batch_nor_keeps_it(config):
    x = gaussian(30)
    observer = seen(config, [x])
    assert_bits_equal(x, gaussian(30))
    before = copy.deepcopy(observer)
    x.fill_(1e6)
    assert_same_state(observer, before)


@every_config
def test_repr_tells_method_axis_and_batches(config):
    assert f"{config}, axis=0, batches=2" in repr(seen(config, [torch.ones(2, 3)] * 2, axis=0))
    assert "batches=unknown" in repr(config.make().to("meta"))


# --- configs and refusals -------------------------------------------------------------------------------------------


@every_config
def test_a_config_survives_json(config):
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields["name"] == config.name
    assert observers.from_dict(fields) == config and hash(observers.from_dict(fields)) == hash(config)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (lambda: observers.from_dict({"name": "Max"}), ValueError, "observer 'Max' is unknown.*MinMax"),
        (lambda: observers.from_dict({"name": "MinMax", "bins": 3}), ValueError, "cannot be made from"),
        (lambda: MovingAverage(1.0), ValueError, r"momentum must be a number in \[0, 1\), got 1.0"),
        (lambda: MovingAverage("0.9"), ValueError, "momentum must be a number"),
        (lambda: Percentile(0), ValueError, "percentile must be a number in"),
        (lambda: Percentile(100.5), ValueError, "got 100.5"),
        (lambda: MSE(steps=1), ValueError, "steps must be an int of at least 2, got 1"),
        (lambda: Entropy(bins=2000), ValueError, "Entropy: bins must be a power of two.*got 2000"),
        (lambda: Histogram(bins=64), ValueError, "at least 128, got 64"),
        (lambda: MinMax().make().update([1.0]), TypeError, "x is list, accepted are"),
        (lambda: MinMax().make().update(torch.ones(2).double()), TypeError, "x is torch.float64"),
        (lambda: MinMax().make(2).update(torch.ones(2, 2)), ValueError, "no axis 2"),
        (lambda: MinMax().make(0.5), TypeError, "axis must be an int, got 0.5"),
        (
            lambda: seen(MinMax(), [torch.ones(2, 3), torch.ones(4, 3)], axis=0),
            ValueError,
            r"x has 4 channels on axis 0.*had 2; reset\(\)",
        ),
        (lambda: seen(MinMax(), [torch.ones(2)]).qparams(True, -128, 127), ValueError, "even"),
    ],
)
def test_bad_input_is_refused_with_the_argument_and_the_remedy(call, error, text):
    with pytest.raises(error, match=text):
        call()
