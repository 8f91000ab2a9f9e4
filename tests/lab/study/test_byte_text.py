# SPDX-License-Identifier: Apache-2.0
"""Held-out text is the same every time, and no file is on both sides of the split."""

import pytest
import torch

from octavo.lab.study import byte_text


def test_every_file_falls_on_one_side_and_both_have_text():
    files = byte_text.source_files()
    held_out = sum(path.stat().st_size for name, path in files.items() if byte_text.is_held_out(name))
    everything = sum(path.stat().st_size for path in files.values())
    assert list(files) == sorted(files)
    assert len(byte_text.training_bytes()) == everything - held_out
    assert 0.01 < held_out / everything < 0.2


def test_the_side_depends_on_the_name_alone():
    """Known names, so that a change of the rule, which would put trained text into the held-out, is noticed."""
    assert [
        name for name in ("copy.py", "glob.py", "ssl.py", "argparse.py") if byte_text.is_held_out(name)
    ] == [
        "copy.py",
        "glob.py",
        "ssl.py",
    ]


def test_windows_are_evenly_spaced_pieces_of_the_held_out_text():
    windows = byte_text.held_out(5, context=40)
    assert windows.shape == (5, 41) and windows.dtype == torch.int64
    files = byte_text.source_files()
    text = b"".join(path.read_bytes() for name, path in files.items() if byte_text.is_held_out(name))
    step = (len(text) - 41) // 4
    for number, window in enumerate(windows):
        assert bytes(window.tolist()) == text[number * step :][:41]


def test_the_default_is_41_thousand_predicted_bytes_twice_the_same():
    windows = byte_text.held_out()
    assert windows[:, 1:].numel() == 40_960
    assert torch.equal(windows, byte_text.held_out())


def test_calibration_windows_are_evenly_spaced_pieces_of_the_training_text():
    windows, text = byte_text.calibration(3, context=50), byte_text.training_bytes()
    assert windows.shape == (3, 50) and windows.dtype == torch.int64
    middle = (len(text) - 50) // 2
    assert [bytes(window.tolist()) for window in windows] == [
        bytes(text[start : start + 50].tolist()) for start in (0, middle, 2 * middle)
    ]
    with pytest.raises(ValueError, match="calibration: windows is 0; from 1 to "):
        byte_text.calibration(0)


@pytest.mark.parametrize("windows", [0, 10**9])
def test_windows_that_do_not_fit_are_refused(windows):
    with pytest.raises(ValueError, match=f"held_out: windows is {windows}; from 1 to "):
        byte_text.held_out(windows)


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(byte_text.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no library sources"):
        byte_text.held_out()
