# SPDX-License-Identifier: Apache-2.0
"""Headers of GGUF files: equal to what the package gguf reads, refused where ggml would refuse them, written back bit
for bit. The files in tests/data/gguf were written by the package's own writer."""

import random
import struct
from pathlib import Path

import pytest

from octavo.files.gguf import values
from octavo.files.gguf.header import block_sizes, header_bytes, mapped_tensors, read_header
from octavo.files.gguf.parts import read_gguf

gguf = pytest.importorskip("gguf")
DATA = Path(__file__).parents[2] / "data/gguf"
TINY = DATA / "tiny.gguf"
NUMBER_OF = {name: number for number, (name, _, _) in block_sizes().items()}


def decoded(read):
    """A value, or that it is a text of other bytes than UTF-8."""
    try:
        return read()
    except UnicodeDecodeError:
        return "no UTF-8"


def same_as_gguf_reader(path: Path) -> None:
    """Every key and every tensor is what the package's reader finds in the same bytes."""
    header, reader = read_header(path), gguf.GGUFReader(path)
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert list(header.metadata) == keys
    for key in keys:
        mine, theirs = decoded(header.metadata[key].decode), decoded(reader.fields[key].contents)
        assert repr(mine) == repr([] if theirs is None else theirs), key  # a NaN equals a NaN
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    contents = mapped_tensors(header)
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert (info.type, list(info.shape)) == (tensor.tensor_type.name, tensor.shape.tolist()[::-1])
        assert info.offset == tensor.data_offset
        assert contents[tensor.name].numpy().tobytes() == tensor.data.tobytes()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def made(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    metadata: dict | None = None,
    tensors: list | None = None,
    data: int = 64,
) -> bytes:
    """A file of which one thing can be wrong. tensors: (name, number of the type, shape as torch has it, bytes)."""
    keys = {"general.architecture": values.text("llama")} if metadata is None else metadata
    infos = [("a.weight", 0, (2, 4), 32)] if tensors is None else tensors
    head = header_bytes(version, keys, infos, 32)
    return magic + head[4:] + bytes(data)


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny_align64.gguf"])
def test_it_reads_what_the_package_reads(name):
    same_as_gguf_reader(DATA / name)


@pytest.mark.parametrize("name", ["tiny.gguf", "tiny_align64.gguf"])
def test_a_header_is_written_back_bit_for_bit(name):
    header = read_header(DATA / name)
    infos = [(info.name, NUMBER_OF[info.type], info.shape, info.bytes) for info in header.tensors.values()]
    written = header_bytes(header.version, header.metadata, infos, header.alignment)
    assert (DATA / name).read_bytes().startswith(written)
    assert len(written) == next(iter(header.tensors.values())).offset


def test_values_of_every_type_are_written_as_they_are_read():
    for type in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        assert values.number(3, type).decode() == 3
        assert values.array([1, 2], type).decode() == [1, 2]
    assert values.number(0.5, "float32").decode() == values.number(0.5, "float64").decode() == 0.5
    assert values.number(True, "bool").decode() is True
    assert values.text("").decode() == "" and values.text("Zürich").decode() == "Zürich"
    assert values.array(["a", "", "ö"], "string").decode() == ["a", "", "ö"]
    assert values.array([], "float32").decode() == [] and values.array([], "float32").length == 0


def test_version_2_is_read(tmp_path):
    assert read_header(write(tmp_path / "a.gguf", made(version=2))).version == 2


@pytest.mark.parametrize(
    "content, message",
    [
        (b"GGUF", "has 4 bytes"),
        (made(magic=b"lmgg"), "GGML file, the format before GGUF: .* convert"),
        (made(magic=b"tjgg"), "GGJT file"),
        (made(magic=b"PK\3\4"), "is no GGUF file"),
        (made(version=1), "version 1, versions 2 and 3 are read; get or convert it anew"),
        (made(version=4), "version 4, .* a newer octavo"),
        ((DATA / "tiny_bigendian.gguf").read_bytes(), "big-endian GGUF file: `gguf-convert-endian"),
        (made(tensors=[("a", 0, (2, 4), 32)] * 2), "'a' comes twice"),
        (made(metadata={"general.alignment": values.number(24)}), "no power of two"),
        (made(metadata={"general.alignment": values.number(32, "uint64")}), "no power of two of type uint32"),
        (made(metadata={"k": values.MetadataValue(9, struct.pack("<IQ", 9, 0))}), "array of items of type 9"),
        (made(metadata={"k": values.MetadataValue(13, b"")}), "value of type 13"),
        (made(metadata={"k": values.MetadataValue(8, struct.pack("<Q", 1 << 62))}), "go beyond"),
        (made(metadata={"k": values.MetadataValue(9, struct.pack("<IQ", 8, 1 << 62))}), "texts goes beyond"),
        (made(metadata={"k": values.MetadataValue(9, struct.pack("<IQ", 10, 1 << 62))}), "go beyond"),
        (made(metadata={"": values.text("a")}), "a key of 0 bytes"),
        (made(tensors=[("a" * 64, 0, (2, 4), 32)]), "a tensor's name of 64 bytes"),
        (made(tensors=[("a", 0, (1,) * 5, 4)]), "5 axes"),
        (made(tensors=[("a", 0, (), 4)]), "0 axes"),
        (made(tensors=[("a", 0, (0, 4), 0)]), r"shape \(0, 4\)"),
        (made(tensors=[("a", 0, (1 << 40, 1 << 40), 4)]), "has the shape"),
        (made(tensors=[("a", 12, (2, 128), 144)]), "rows of 128, Q4_K needs a multiple of 256"),
        (made(tensors=[("a", 99, (2, 4), 32)]), "type 99, which the package gguf does not know"),
        (made(data=16), "truncated: 'a.weight' ends at"),
        (made(tensors=[("a", 0, (2, 4), 64), ("b", 0, (1,), 4)], data=128), "'b' lies at 64 .* 32 is where"),
    ],
)
def test_damage_is_refused_by_a_sentence(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_header(write(tmp_path / "a.gguf", content))


def test_a_key_that_comes_twice_is_refused(tmp_path):
    content = bytearray(made(metadata={"k1": values.number(1), "k2": values.number(1)}))
    content[content.index(b"k2") + 1] = ord("1")
    with pytest.raises(ValueError, match="'k1' comes twice"):
        read_header(write(tmp_path / "a.gguf", bytes(content)))


# --- parts ----------------------------------------------------------------------------------------------------------


def split(folder: Path, *, count: int = 2, numbers: tuple[int, ...] = (0, 1), total: int = 2) -> Path:
    """A model in two files with a tensor each; returns the first one's path."""
    paths = [folder / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for path, number, name in zip(paths, numbers, "ab", strict=True):
        keys = {
            "split.no": values.number(number, "uint16"),
            "split.count": values.number(count, "uint16"),
            "split.tensors.count": values.number(total, "int32"),
        }
        path.write_bytes(made(metadata=keys, tensors=[(name, 0, (2, 4), 32)]))
    return paths[0]


def test_parts_are_read_as_one_model(tmp_path):
    model = read_gguf(split(tmp_path))
    assert list(model.tensors) == ["a", "b"] and len(model.parts) == 2
    assert {name: tuple(content.shape) for name, content in model.mapped().items()} == {
        "a": (2, 16),
        "b": (2, 16),
    }


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not part 2 of the 2"):
        read_gguf(split(tmp_path, numbers=(0, 2)))
    with pytest.raises(ValueError, match="hold 2 tensors, split.tensors.count is 3"):
        read_gguf(split(tmp_path, total=3))
    first = split(tmp_path)
    with pytest.raises(ValueError, match="give the file of its first part"):
        read_gguf(tmp_path / "m-00002-of-00002.gguf")
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="must end on -00001-of-00002.gguf"):
        read_gguf(tmp_path / "other.gguf")
    first = split(tmp_path)
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match="m-00002-of-00002.gguf does not exist"):
        read_gguf(first)


# --- damage at random -----------------------------------------------------------------------------------------------


def damaged(content: bytes, header_end: int, seed: int) -> bytes:
    """Bytes flipped, overwritten, inserted or taken away, most of them in the header, which is what can be misread."""
    rng, mutated = random.Random(seed), bytearray(content)
    for _ in range(rng.randint(1, 3)):
        if not mutated:
            break
        at = rng.randrange(min(header_end, len(mutated)) if rng.random() < 0.9 else len(mutated))
        kind = rng.randrange(6)
        if kind == 0:
            mutated[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            mutated[at] = rng.choice((0, 1, 8, 9, 127, 128, 255))
        elif kind == 2:
            width = rng.choice((4, 8))
            mutated[at : at + width] = rng.choice((0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)).to_bytes(
                width, "little"
            )
        elif kind == 3:
            mutated[at:at] = rng.randbytes(rng.randint(1, 40))
        elif kind == 4:
            del mutated[at : at + rng.randint(1, 40)]
        else:
            del mutated[at:]
            mutated += b"\0"
    return bytes(mutated)


def test_a_damaged_file_is_refused_or_read_as_the_package_reads_it(tmp_path, pytestconfig):
    content = TINY.read_bytes()
    end = next(iter(read_header(TINY).tensors.values())).offset
    count, refused = pytestconfig.getoption("damaged_files"), 0
    for seed in range(count):
        path = write(tmp_path / "a.gguf", damaged(content, end, seed))
        try:
            read_header(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        same_as_gguf_reader(path)
    assert count // 4 < refused < count
