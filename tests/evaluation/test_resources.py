# SPDX-License-Identifier: Apache-2.0
"""Bytes add up, energy is what the counters say, peak memory is a fresh process's, and what fails is said."""

import copy
import subprocess

import pytest
import torch
from models import IDS, every_scheme, model
from torch import nn

import octavo
from octavo.evaluation import bits_per_weight, bytes_on_disk, energy, memory_of
from octavo.evaluation.comparison import model_bytes
from octavo.evaluation.energy import Rapl, joules_per_call
from octavo.evaluation.peak_memory import peak_memory
from octavo.evaluation.resources import measure_resources


@every_scheme
def test_the_parts_of_memory_add_up_to_the_whole(scheme):
    quantized = octavo.quantized(model(), scheme, data=IDS)
    memory = memory_of(quantized)
    assert memory.total == model_bytes(quantized)
    assert memory.codes > 0 and memory.scales > 0


def test_each_part_is_counted_by_hand():
    layer = octavo.quantized(nn.Sequential(nn.Linear(128, 32)), octavo.Int8Dynamic())
    memory = memory_of(layer)
    assert (memory.codes, memory.scales, memory.zero_points) == (128 * 32, 4 * 32, 0)
    assert memory.other == 2 * 4 * 32  # bias and column sums
    assert bits_per_weight(layer) == 8 * (128 * 32 + 4 * 32) / (128 * 32)
    padded = octavo.quantized(nn.Sequential(nn.Linear(100, 20)), octavo.Int8Dynamic())
    assert memory_of(padded).codes == 128 * 32


def test_what_outlier_columns_and_smoothing_add_counts_as_bits_of_the_weights():
    """Columns that stay float32 have 32 bits for each of their weights, and their packed copies more."""
    linear, x = nn.Linear(64, 32), torch.ones(4, 64)
    x[:, :3] = 20
    plain = bits_per_weight(octavo.quantized(linear, octavo.Int8Dynamic()))
    outliers = bits_per_weight(octavo.quantized(linear, octavo.LLMInt8(), data=x))
    assert outliers >= plain + 32 * 3 / 64
    smoothed = bits_per_weight(
        octavo.quantized(linear, octavo.Int8Dynamic(method=octavo.SmoothQuant()), data=x)
    )
    assert smoothed == plain + 8 * 4 * 64 / (64 * 32)


def test_a_float_model_has_the_bits_of_its_dtype():
    assert bits_per_weight(model()) == 32
    assert bits_per_weight(model().bfloat16()) == 16
    assert bits_per_weight(nn.Embedding(3, 4)) is None
    assert memory_of(model()).total == memory_of(model()).other


def test_shared_tensors_count_once():
    tied = model()
    tied.head.weight = tied.embedding.weight
    assert memory_of(tied).total == model_bytes(tied)


@every_scheme
def test_bytes_on_disk_are_those_of_a_saved_folder(scheme, tmp_path):
    quantized = octavo.quantized(model(), scheme, data=IDS)
    octavo.save(quantized, tmp_path)
    assert bytes_on_disk(quantized) == sum(path.stat().st_size for path in tmp_path.iterdir())


# --- energy ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def powercap(tmp_path):
    """Two packages, and the cores of one, which are in its count already."""
    for name, value in (("intel-rapl:0", 1000), ("intel-rapl:1", 9_000_000), ("intel-rapl:0:0", 77)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    return tmp_path


def test_joules_are_what_the_packages_counted_around_the_wrap(powercap):
    counter = Rapl(powercap)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("2001000")
    (powercap / "intel-rapl:1" / "energy_uj").write_text(
        "500000"
    )  # 1.0 J to the end of the range, 0.5 J after it
    assert counter.joules() == pytest.approx(2.0 + 1.5)
    assert counter.joules() == 0.0


def test_joules_per_call_are_shared_out(powercap, monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.0)
    assert (
        joules_per_call(lambda: (powercap / "intel-rapl:0" / "energy_uj").write_text("501000"), powercap)
        == 0.5
    )


def test_without_counters_the_reason_is_given(tmp_path):
    with pytest.raises(OSError, match="no RAPL energy counters"):
        Rapl(tmp_path)


def test_counters_that_may_not_be_read_are_said_to_be_so(powercap, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    with pytest.raises(OSError, match="may not be read by this user"):
        Rapl(powercap)


# --- peak memory ----------------------------------------------------------------------------------------------------


def test_peak_memory_is_that_of_a_fresh_process():
    """This process's own 400 MB do not count; the 64 MB layer that the new one loads does."""
    ballast = torch.ones(100 << 20)
    before, peak = peak_memory(nn.Linear(4096, 4096, bias=False), (torch.ones(1, 4096),), {})
    assert peak - before >= 64 << 20
    assert peak < ballast.nbytes + (300 << 20)


class Unpicklable(nn.Linear):
    def __reduce__(self):
        raise TypeError("not to be sent")


def test_what_cannot_be_measured_is_said_and_the_rest_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    broken = Unpicklable(4, 4)
    found = measure_resources(
        {"reference": broken, "model": broken}, ((torch.ones(1, 4),), {}), ("size", "peak_memory")
    )
    assert found.model.peak_rss is None and found.model.bytes_on_disk > 0
    assert found.unavailable == {"peak_rss": "the model cannot be pickled: not to be sent"}


def test_a_process_that_fails_is_quoted(monkeypatch):
    """As where a class lives in a notebook, which the new process does not know."""
    failed = subprocess.CompletedProcess(
        [], 1, "", "Traceback\nAttributeError: Can't get attribute 'Local'\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="did not run in a fresh process: AttributeError: .*'Local'$"):
        peak_memory(nn.Linear(2, 2), (torch.ones(1, 2),), {})


def test_measuring_leaves_the_model_as_it_was():
    quantized = octavo.quantized(model(), octavo.Int8Dynamic())
    before = copy.deepcopy(quantized.state_dict())
    measure_resources(
        {"reference": quantized, "model": quantized}, ((torch.arange(6)[None],), {}), ("size", "speed"), 6
    )
    after = quantized.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
