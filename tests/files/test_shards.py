# SPDX-License-Identifier: Apache-2.0
"""Files of tensors: equal bits after a round trip, and no damaged, lying or dangerous file is believed."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.files import safetensors


def mixed_tensors() -> dict[str, torch.Tensor]:
    """Every dtype in odd sizes, a scalar and an empty one, so that careless offsets would not be aligned."""
    torch.manual_seed(0)
    tensors = {
        f"of.{name}": torch.randint(0, 2, (3, 5)).to(dtype) for name, dtype in safetensors.DTYPES.items()
    }
    return {
        "a": torch.randn(3),
        "scalar": torch.tensor(7, dtype=torch.int8),
        "none": torch.empty(0, 4),
        **tensors,
    }


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def write(path, tensors):
    safetensors.write(path, tensors, tensors.items())


# Writing


def test_a_round_trip_gives_equal_bits_here_and_in_safetensors(tmp_path):
    tensors = mixed_tensors()
    write(tmp_path / safetensors.WEIGHTS, tensors)
    check_equal(safetensors.read_folder(tmp_path), tensors)
    check_equal(load_file(tmp_path / safetensors.WEIGHTS), tensors)
    for name, stored in safetensors.catalog(tmp_path).items():
        assert stored.meta.is_meta and (stored.meta.dtype, stored.meta.shape) == (
            tensors[name].dtype,
            tensors[name].shape,
        )
        check_equal({name: stored.read()}, {name: tensors[name]})


def test_tensors_may_come_in_any_order_and_only_their_layout_beforehand(tmp_path):
    tensors = mixed_tensors()
    layout = {name: tensor.to("meta") for name, tensor in tensors.items()}
    write(tmp_path / "a", tensors)
    safetensors.write(tmp_path / "b", layout, reversed(tensors.items()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("given", [{}, {"x": torch.zeros(3, 2)}, {"x": torch.zeros(2, 3).half()}])
def test_a_file_that_is_not_as_laid_out_is_never_readable(tmp_path, given):
    with pytest.raises(ValueError, match="'x'"):
        safetensors.write(tmp_path / "a", {"x": torch.zeros(2, 3)}, given.items())
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        safetensors.read_file(tmp_path / "a")


# Damage


@pytest.fixture
def small(tmp_path):
    path = tmp_path / safetensors.WEIGHTS
    write(
        path,
        {"w": torch.arange(6, dtype=torch.int8).reshape(2, 3), "s": torch.tensor([[0.5], [2.0]]).bfloat16()},
    )
    return path


def test_no_flipped_bit_changes_what_is_read(small):
    """In every byte of the file, header included: an error, or the same tensors under the same names."""
    data, expected = small.read_bytes(), {name: t.clone() for name, t in safetensors.read_file(small).items()}
    refused = 0
    bits = range(0, len(data) * 8, 5)  # in each byte one or two, and all eight in turn
    for bit in bits:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        small.write_bytes(flipped)
        try:
            check_equal(safetensors.read_file(small), expected)
        except ValueError:
            refused += 1
    assert refused > 0.8 * len(bits)  # the rest: metadata that says nothing of the tensors, blanks


def test_a_file_cut_anywhere_is_refused(small):
    data = small.read_bytes()
    for length in range(len(data)):
        small.write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            safetensors.read_file(small)


def raw_file(header: object, data: bytes = b"", claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list, offsets: list) -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "content",
    [
        raw_file(entry("F32", [1 << 40, 1 << 40], [0, 4]), bytes(4)),
        raw_file(entry("F32", [1 << 62, 4], [0, 0])),  # the size overflows to 0
        raw_file(entry("I8", [1 << 40], [0, 1 << 40]), bytes(4)),
        raw_file(entry("F32", [1], [4, 8]), bytes(8)),  # a hole before it
        raw_file(entry("F32", [1], [4, 0]), bytes(4)),
        raw_file(entry("F32", [-1], [0, 4]), bytes(4)),
        raw_file(entry("F32", [1.5], [0, 4]), bytes(4)),
        raw_file(entry("F33", [1], [0, 4]), bytes(4)),
        raw_file(entry("C64", [1], [0, 8]), bytes(8)),  # safetensors knows it, octavo does not
        raw_file(
            {**entry("I8", [4], [0, 4]), "y": {"dtype": "I8", "shape": [4], "data_offsets": [2, 6]}}, bytes(6)
        ),
        raw_file(entry("I8", [4], [0, 4]), bytes(5)),  # bytes that belong to nothing
        raw_file(entry("I8", [4], [0, 4]), bytes(4), claimed=1 << 60),
        raw_file(b"\xff" * 16),
        raw_file(b"[" * 100_000),
        raw_file([]),
        raw_file({"__metadata__": {"crc32": "no json"}, **entry("I8", [4], [0, 4])}, bytes(4)),
        raw_file({"__metadata__": {"crc32": "{}"}, **entry("I8", [4], [0, 4])}, bytes(4)),
        raw_file({"__metadata__": {"crc32": '{"x": 5}'}, **entry("I8", [4], [0, 4])}, bytes(4)),
        pickle.dumps({"x": [1, 2, 3]}),
    ],
    ids=range(19),
)
def test_a_lying_file_is_refused(tmp_path, content):
    (tmp_path / safetensors.WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=safetensors.WEIGHTS):
        safetensors.catalog(tmp_path)
        safetensors.read_folder(tmp_path)


# Folders


class Bomb:
    """Makes a file if it is ever unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(ValueError, match="a pickle can run code.*save_pretrained"):
        safetensors.catalog(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=safetensors.WEIGHTS):
        safetensors.read_folder(tmp_path)


def sharded(folder) -> dict[str, str]:
    write(folder / "1.safetensors", {"a": torch.zeros(2)})
    write(folder / "2.safetensors", {"b": torch.ones(2), "c": torch.ones(3)})
    return {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}


def test_shards_are_read_as_one(tmp_path):
    weight_map = sharded(tmp_path)
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert {name: len(tensor) for name, tensor in safetensors.read_folder(tmp_path).items()} == {
        "a": 2,
        "b": 2,
        "c": 3,
    }


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda m: m.update(a="../1.safetensors"), ValueError, "only safetensors files of the same folder"),
        (lambda m: m.update(a="/etc/1.safetensors"), ValueError, "only safetensors files of the same folder"),
        (lambda m: m.update(a="1.bin"), ValueError, "only safetensors files of the same folder"),
        (lambda m: m.update(a=1), ValueError, "only safetensors files of the same folder"),
        (lambda m: m.update(a="3.safetensors"), FileNotFoundError, "3.safetensors"),
        (lambda m: m.update(a="2.safetensors"), ValueError, "'a' is not in 2.safetensors"),
        (lambda m: m.update(d="2.safetensors"), ValueError, "'d' is not in 2.safetensors"),
        (lambda m: m.pop("c"), ValueError, "does not say that 'c' is here"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, change, error, message):
    weight_map = sharded(tmp_path)
    change(weight_map)
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        safetensors.catalog(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', "[" * 100_000, "\0"])
def test_what_is_no_index_is_refused(tmp_path, text):
    sharded(tmp_path)
    (tmp_path / safetensors.INDEX).write_text(text)
    with pytest.raises(ValueError, match=safetensors.INDEX):
        safetensors.catalog(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    weight_map = sharded(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    (tmp_path / safetensors.INDEX).write_text(
        json.dumps({"weight_map": {**weight_map, "b": "2.safetensors"}})
    )
    with pytest.raises(ValueError, match="'a' is in 1.safetensors, too"):
        safetensors.catalog(tmp_path)
