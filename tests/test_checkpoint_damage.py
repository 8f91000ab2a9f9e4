# SPDX-License-Identifier: Apache-2.0
"""Bad files: each gives a clear error of `load`, and the skeleton stays as it was."""

import os

import pytest
import torch
from torch import nn

import octavo
from checkpoints import check_refused, edit_config, edit_tensors, meta_skeleton, quantized_model


@pytest.fixture
def folder(tmp_path):
    octavo.save(quantized_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("missing", ["octavo.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, missing):
    (folder / missing).unlink()
    check_refused(folder, meta_skeleton(), FileNotFoundError, missing)


def test_a_missing_folder_is_named(tmp_path):
    check_refused(tmp_path / "nowhere", meta_skeleton(), FileNotFoundError, "nowhere")


@pytest.mark.parametrize("file", ["model.safetensors", "buffers.safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(folder, file, keep):
    size = (folder / file).stat().st_size
    os.truncate(folder / file, keep if keep >= 0 else size + keep)
    check_refused(folder, meta_skeleton(), ValueError, f"{file} is truncated or not a safetensors file")


@pytest.mark.parametrize("file", ["model.safetensors", "buffers.safetensors"])
def test_a_flipped_bit_is_noticed(folder, file):
    data = bytearray((folder / file).read_bytes())
    data[-10] ^= 16
    (folder / file).write_bytes(data)
    check_refused(folder, meta_skeleton(), ValueError, "is damaged: its checksum")


@pytest.mark.parametrize("text", ["", "{", "not json", "\0\0", "[" * 100_000])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "octavo.json").write_text(text)
    check_refused(folder, meta_skeleton(), ValueError, "octavo.json is not JSON")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format="other"), "is not a file written by octavo.save"),
        (
            lambda c: c.update(format_version=2, octavo_version="9.9"),
            "version 2, written by octavo 9.9.*upgrade",
        ),
        (lambda c: c.update(format_version="1"), "format version 1"),
        (lambda c: c.update(format_version=0), "format version 0"),
        (lambda c: c.pop("layers"), "has no 'layers'"),
        (lambda c: c.pop("aliases"), "has no 'aliases'"),
        (lambda c: c["layers"].update({"body.0": {"name": "Int3"}}), "Int3"),
        (lambda c: c["layers"].update({"body.0": 7}), "body.0"),
        (
            lambda c: c["layers"].update({"body.9": c["layers"]["body.0"]}),
            "layer 'body.9' is missing in skeleton",
        ),
        (
            lambda c: c["layers"].update({"body.1": c["layers"]["body.0"]}),
            "layer 'body.1' is a ReLU in skeleton",
        ),
        (lambda c: c["layers"].pop("body.0"), "unexpected tensors: body.0.weight_scale"),
        (lambda c: c["aliases"].update({"head.weight": "nothing"}), "names 'nothing'"),
        (lambda c: c["aliases"].clear(), "lacks tensors: head.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, change, message):
    edit_config(folder, change)
    check_refused(folder, meta_skeleton(), ValueError, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("body.0.weight"), "lacks tensors: body.0.weight"),
        (lambda t: t.pop("body.3.running_mean"), "lacks tensors: body.3.running_mean"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"body.0.weight": torch.zeros(35, 22, dtype=torch.int8)}),
            r"\(35, 22\) in the checkpoint",
        ),
        (
            lambda t: t.update({"body.0.weight": torch.zeros(35, 21)}),
            "torch.float32 in the checkpoint, torch.int8",
        ),
        (
            lambda t: t.update({"body.0.weight_scale": torch.ones(35)}),
            r"\(35,\) in the checkpoint and \(35, 1\)",
        ),
        (
            lambda t: t.update({"body.0.weight_scale": torch.ones(35, 1).half()}),
            "torch.float16 in the checkpoint",
        ),
        (
            lambda t: t.update({"embed.weight": torch.zeros(11, 21, dtype=torch.int8)}),
            "torch.int8 in the checkpoint",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, message):
    edit_tensors(folder, change)
    check_refused(folder, meta_skeleton(), ValueError, message)


def test_another_skeleton_is_refused(folder):
    check_refused(
        folder, nn.Sequential(nn.Linear(21, 35)), ValueError, "layer 'body.0' is missing in skeleton"
    )
    check_refused(
        folder, quantized_model(), ValueError, "'body.0' is a QuantLinear in skeleton.*the float model"
    )
