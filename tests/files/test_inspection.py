# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint holds: the figures of every layer, for files of Octavo and of others, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import octavo
from octavo import inspect_checkpoint


@pytest.fixture
def folder(tmp_path):
    """Two quantized layers, one float, a tied one, a transient buffer."""
    model = nn.Sequential(
        nn.Linear(64, 32), nn.Linear(32, 64, bias=False), nn.LayerNorm(64), nn.Linear(64, 8)
    )
    octavo.quantize_(
        model, {"3": None, "0": octavo.Int8Dynamic(symmetric=False), "*": octavo.Int8WeightOnly()}
    )
    model.add_module("again", model[3])
    model.register_buffer("positions", torch.arange(10), persistent=False)
    octavo.save(model, tmp_path / "int8")
    return tmp_path / "int8"


def by_name(contents):
    return {layer.name: layer for layer in contents.layers}


def test_every_layer_of_octavo_save(folder):
    layers = by_name(inspect_checkpoint(folder))
    assert list(layers) == ["0", "1", "2", "3", "positions", "again.weight", "again.bias"]
    first = layers["0"]
    assert (first.kind, first.scheme) == ("QuantLinear", "Int8Dynamic(symmetric=False)")
    assert (first.shape, first.dtype, first.weights) == ((32, 64), "int8", 32 * 64)
    assert first.bytes == 32 * 64 + 4 * 32 + 4 * 32
    assert first.bits_per_weight == 8 * (32 * 64 + 4 * 32) / (32 * 64)  # without the bias
    assert layers["1"].scheme == "Int8WeightOnly"
    assert (layers["2"].kind, layers["2"].scheme, layers["2"].bits_per_weight) == ("vector", "", 32.0)
    assert (layers["3"].kind, layers["3"].bytes) == ("matrix", 4 * (64 * 8 + 8))
    assert (layers["positions"].kind, layers["positions"].dtype) == ("buffer", "int64")
    assert (layers["again.weight"].kind, layers["again.weight"].scheme) == ("tied", "3.weight")


def test_totals_are_those_of_the_files(folder):
    contents = inspect_checkpoint(folder)
    files = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert contents.format == "octavo" and dict(contents.files) == files
    headers = sum(8 + int.from_bytes((folder / name).read_bytes()[:8], "little") for name in files)
    assert contents.bytes == sum(files.values()) - headers
    codes, scales = 2 * 64 * 32, 4 * (32 + 64)
    assert contents.bits_per_weight == 8 * (codes + scales) / codes


def test_no_tensor_is_read(folder, monkeypatch):
    """The bytes after the header may be anything: only their number counts."""
    before = inspect_checkpoint(folder)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + b"\xff" * (len(data) - start))
    assert inspect_checkpoint(folder) == before


def test_text_html_and_json_show_every_layer(folder):
    contents = inspect_checkpoint(folder)
    parsed = json.loads(json.dumps(contents.to_dict()))
    assert [layer["name"] for layer in parsed["layers"]] == [layer.name for layer in contents.layers]
    assert parsed["bytes"] == contents.bytes
    for row in contents.rows:
        assert all(cell in str(contents) for cell in row)
        assert all(f"<td>{cell}</td>" in contents._repr_html_() for cell in row)
    assert "2 of 7 layers quantized to 8.75 bits per weight" in str(contents)


def test_a_plain_file_of_floats(tmp_path):
    tensors = {
        "layers.10.weight": torch.zeros(4, 6, dtype=torch.bfloat16),
        "layers.2.weight": torch.zeros(3, 2, 3, 3, dtype=torch.float16),
        "scalar": torch.zeros(()),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    contents = inspect_checkpoint(tmp_path / "x.safetensors")
    assert contents.format == "safetensors" and contents.bits_per_weight is None
    found = [(layer.name, layer.kind, layer.dtype, layer.bits_per_weight) for layer in contents.layers]
    assert found == [
        ("layers.2", "convolution", "fp16", 16.0),
        ("layers.10", "matrix", "bf16", 16.0),
        ("", "scalar", "fp32", 32.0),
    ]


def foreign(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """A quantization_config and the tensors of one layer of n = 32, k = 64 weights, as other packages store them."""
    scales = torch.zeros(32, 1)
    if name == "compressed-tensors":
        config = {"quant_method": name, "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
        return config, {"weight_packed": torch.zeros(32, 8, dtype=torch.int32), "weight_scale": scales}
    if name == "gptq":
        packed = {"qweight": torch.zeros(8, 32, dtype=torch.int32), "scales": scales}
        return {"quant_method": name, "bits": 4}, packed
    if name == "bitsandbytes nf4":
        state = {"weight.absmax": scales, "weight.quant_state.bitsandbytes__nf4": torch.zeros(0)}
        return {"quant_method": "bitsandbytes"}, {"weight": torch.zeros(1024, 1, dtype=torch.uint8), **state}
    codes = torch.zeros(32, 64).to(torch.float8_e4m3fn)
    return {"quant_method": name}, {"weight": codes, "weight_scale": scales}


@pytest.mark.parametrize(
    "name, scheme, bits",
    [
        ("compressed-tensors", "compressed-tensors, 4 bits", 4),
        ("gptq", "gptq, 4 bits", 4),
        ("bitsandbytes nf4", "bitsandbytes nf4", 4),
        ("fp8", "fp8", 8),
    ],
)
def test_quantized_folders_of_other_packages(tmp_path, name, scheme, bits):
    config, tensors = foreign(name)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    layer = {f"model.0.{leaf}": tensor for leaf, tensor in tensors.items()}
    save_file({**layer, "model.0.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    (found,) = inspect_checkpoint(tmp_path).layers
    assert (found.name, found.kind, found.scheme, found.weights) == ("model.0", "quantized", scheme, 32 * 64)
    assert found.bits_per_weight == bits + 8 * 4 * 32 / (32 * 64)  # 32 float32 scales
    assert found.bytes == 32 * 64 * bits // 8 + 4 * 32 + 4 * 32


def test_packed_codes_of_unknown_width_have_no_figure(tmp_path):
    _, tensors = foreign("gptq")
    save_file(tensors, tmp_path / "x.safetensors")
    contents = inspect_checkpoint(tmp_path / "x.safetensors")
    assert contents.layers[0].weights is None and contents.bits_per_weight is None
    assert contents.rows[0][-1] == "-"


def test_sharded_folders(tmp_path):
    names = {"0.weight": "model-00001-of-00002.safetensors", "1.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for tensor, file in names.items():
        save_file({tensor: torch.zeros(2, 2)}, tmp_path / file)
    contents = inspect_checkpoint(tmp_path)
    assert contents.format == "transformers" and [name for name, _ in contents.files] == list(names.values())
    assert [layer.name for layer in contents.layers] == ["0", "1"]
    (tmp_path / names["1.weight"]).unlink()
    with pytest.raises(
        FileNotFoundError, match="model-00002-of-00002.safetensors does not exist.*incomplete"
    ):
        inspect_checkpoint(tmp_path)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def not_json(folder: Path) -> None:
    (folder / "octavo.json").write_text("{")


def not_octavo(folder: Path) -> None:
    (folder / "octavo.json").write_text('{"format": "quarto"}')


def too_new(folder: Path) -> None:
    config = json.loads((folder / "octavo.json").read_text())
    (folder / "octavo.json").write_text(json.dumps({**config, "format_version": 99}))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (truncated, ValueError, "model.safetensors is truncated or not a safetensors file"),
        (not_json, ValueError, "octavo.json is not JSON"),
        (not_octavo, ValueError, "is not a file written by octavo.save"),
        (too_new, ValueError, "format version 99.*this octavo reads up to 1: upgrade"),
        (without_weights, FileNotFoundError, "model.safetensors does not exist"),
    ],
)
def test_a_damaged_folder_is_refused(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=f"inspect_checkpoint: .*{message}"):
        inspect_checkpoint(folder)


def test_other_kinds_of_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a checkpoint's folder"):
        inspect_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no safetensors file; give"):
        inspect_checkpoint(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="a pickle can run code"):
            inspect_checkpoint(path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(64))
    with pytest.raises(ValueError, match="of GGUF version 1, versions 2 and 3 are read"):
        inspect_checkpoint(tmp_path / "model.gguf")
