# SPDX-License-Identifier: Apache-2.0
"""File formats: a new one is found by the ordinary calls; what none reads is refused with the list of all."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import check_refused
from safetensors.torch import save_file
from torch import nn

import octavo
from octavo.conversion.folder import quantize_folder
from octavo.files import FILE_FORMATS, Checkpoint, FileFormat, format_of
from octavo.files.format import Stored
from octavo.files.inspection import Entry, by_layer, contents_of, row
from octavo.nn import QuantLinear
from octavo.schemes import from_dict

SCHEME = octavo.Int8Dynamic(symmetric=False)


class Numbers(FileFormat):
    """One JSON file: {"schemes": {layer: fields}, "tensors": {name: [dtype, values]}}."""

    description = "a file of numbers"

    def __init__(self) -> None:
        self.changed: list[nn.Module] = []

    def recognize(self, path):
        return path.suffix == ".numbers" or (path / "model.numbers").exists()

    def inspect(self, path):
        content, dtypes = json.loads(path.read_text()), {"int8": "I8", "float32": "F32"}
        tensors = self.tensors(path)
        headers = {
            name: Entry(dtypes[content["tensors"][name][0]], tuple(tensor.shape), tensor.nbytes)
            for name, tensor in tensors.items()
        }
        schemes = {name: fields["name"] for name, fields in content["schemes"].items()}
        rows = [
            row(name, own, "QuantLinear" if name in schemes else "", schemes.get(name, ""))
            for name, own in by_layer(headers).items()
        ]
        return contents_of(path, "numbers", [path], rows)

    def read(self, path, skeleton):
        fields = json.loads(path.read_text())["schemes"]
        return Checkpoint({name: from_dict(each) for name, each in fields.items()}, self.tensors(path))

    def skeleton(self, path):
        return skeleton()

    def is_quantized(self, path):
        return path.is_file()

    def catalog(self, path):
        path = path / "model.numbers"
        return {
            name: Stored(path, tensor.to("meta"), tensor.clone) for name, tensor in self.tensors(path).items()
        }

    def write(self, model, path):
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
        tensors = {
            name: [str(tensor.dtype).removeprefix("torch."), tensor.tolist()]
            for name, tensor in model.state_dict().items()
        }
        schemes = {name: layer.scheme.to_dict() for name, layer in layers.items()}
        path.write_text(json.dumps({"schemes": schemes, "tensors": tensors}))

    def model_changed(self, model):
        self.changed.append(model)

    @staticmethod
    def tensors(path):
        stored = json.loads(path.read_text())["tensors"]
        return {
            name: torch.tensor(values, dtype=getattr(torch, dtype))
            for name, (dtype, values) in stored.items()
        }


@pytest.fixture
def numbers():
    format = Numbers()
    FILE_FORMATS.insert(0, format)
    yield format
    FILE_FORMATS.remove(format)


def skeleton():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))


def quantized():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    octavo.quantize_(model, {"2": None, "*": SCHEME})
    return model


# --- a format that the package does not have ------------------------------------------------------------------------


def test_a_new_format_is_loaded_and_inspected(numbers, tmp_path):
    path, model = tmp_path / "model.numbers", quantized()
    numbers.write(model, path)
    loaded = octavo.load(path)
    x = torch.randn(5, 8)
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].scheme == SCHEME and type(loaded[2]) is nn.Linear
    contents = octavo.inspect_checkpoint(path)
    assert contents.format == "numbers" and contents.files == [("model.numbers", path.stat().st_size)]
    assert [(layer.name, layer.scheme) for layer in contents.layers] == [
        ("0", "Int8Dynamic"),
        ("1", ""),
        ("2", ""),
    ]
    assert contents.bits_per_weight == 8 * (6 * 8 + 4 * 6) / (6 * 8)


def test_filling_checks_a_new_format_as_it_does_every_other(numbers, tmp_path):
    path = tmp_path / "model.numbers"
    numbers.write(quantized(), path)
    content = json.loads(path.read_text())
    content["tensors"]["0.weight_scale"][1][0] = [-1.0]
    path.write_text(json.dumps(content))
    check_refused(path, skeleton(), ValueError, "load: 0.weight_scale holds")
    del content["tensors"]["0.weight_scale"]
    path.write_text(json.dumps(content))
    check_refused(path, skeleton(), ValueError, "lacks tensors: 0.weight_scale")


def test_a_new_format_is_quantized(numbers, tmp_path):
    tiny_models = pytest.importorskip("tiny_models")
    model = tiny_models.llama()
    folder = tiny_models.folder_of(model, tmp_path / "float")
    (folder / "model.safetensors").unlink()
    numbers.write(model, folder / "model.numbers")
    report = quantize_folder(folder, tmp_path / "int8", octavo.Int8Dynamic())
    assert "quantized" in {row.action for row in report.rows}
    octavo.quantize_(model, octavo.Int8Dynamic())
    tiny_models.check_equal_states(octavo.load(tmp_path / "int8"), model)


def test_formats_hear_of_every_model_that_is_quantized(numbers, tmp_path):
    model = quantized()
    assert numbers.changed == [model]
    octavo.prepare_(model, {"2": SCHEME, "*": None})
    octavo.freeze_(model)
    assert numbers.changed == [model, model]
    octavo.save(model, tmp_path)
    loaded = octavo.load(tmp_path, skeleton())
    assert numbers.changed == [model, model, loaded]


def test_an_error_lists_the_new_format(numbers, tmp_path):
    for read in (octavo.load, octavo.inspect_checkpoint):
        with pytest.raises(ValueError, match="give a file of numbers or a folder of octavo.save or "):
            read(tmp_path)


def test_the_first_format_of_the_list_counts(numbers, tmp_path):
    octavo.save(quantized(), tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": {"octavo": {"layers": {}}}}')
    (tmp_path / "model.numbers").touch()
    assert format_of(tmp_path) is numbers
    FILE_FORMATS.append(FILE_FORMATS.pop(0))
    assert format_of(tmp_path).description == "a folder of octavo.save"


# --- what no format reads -------------------------------------------------------------------------------------------


def refusals(path: Path) -> list[str]:
    errors = []
    for name, read in (("load", octavo.load), ("inspect_checkpoint", octavo.inspect_checkpoint)):
        with pytest.raises((OSError, ValueError), match=f"^{name}: ") as caught:
            read(path)
        errors.append(str(caught.value))
    return errors


def test_a_folder_of_no_format_is_refused_with_what_is_read(tmp_path):
    load, inspect = refusals(tmp_path)
    assert "a folder of octavo.save" in load and "quantized by octavo or compressed-tensors" in load
    assert "a file of safetensors" in inspect and "a file of safetensors" not in load


@pytest.mark.parametrize(
    "name, remedy",
    [("pytorch_model.bin", "a pickle can run code"), ("x.gguf", "a GGUF model is given by its file")],
)
def test_files_of_other_formats_are_named_with_a_remedy(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(bytes(64))
    for path in (tmp_path, tmp_path / name):
        for error in refusals(path):
            assert name in error and remedy in error


def test_float_models_are_inspected_and_not_loaded(tmp_path):
    save_file({"0.weight": torch.ones(2, 2)}, tmp_path / "any.safetensors")
    (tmp_path / "renamed").write_bytes((tmp_path / "any.safetensors").read_bytes())
    for path in (tmp_path, tmp_path / "any.safetensors", tmp_path / "renamed"):
        assert octavo.inspect_checkpoint(path).format == "safetensors"
        check_refused(path, skeleton(), FileNotFoundError, "neither octavo.json nor config.json")


# --- files of earlier versions --------------------------------------------------------------------------------------

DATA = Path(__file__).parents[1] / "data"


def check_outputs(model: nn.Module, folder: Path) -> None:
    """Each layer gives what it gave in the version that wrote the folder."""
    from safetensors.torch import load_file

    stored = load_file(folder / "expected_outputs.safetensors")
    names = sorted({name.rpartition(".")[0] for name in stored})
    assert names
    for name in names:
        assert torch.equal(model.get_submodule(name)(stored[f"{name}.x"]), stored[f"{name}.y"]), name


def test_a_folder_of_octavo_0_1_is_read():
    """One layer whose smoothing was folded, one that smooths, one of 4-bit codes; no checksums yet."""
    with torch.device("meta"):
        layers = [nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.Tanh()]
        model = nn.Sequential(*layers, nn.Linear(16, 24, bias=False), nn.Linear(24, 4)).eval()
        model.register_buffer("positions", torch.arange(4), persistent=False)
    model = octavo.load(DATA / "octavo_0_1", model)
    assert model[1].scheme == octavo.Int8Dynamic()
    smoothing = octavo.SmoothQuant(alpha=0.4, fold=False)
    assert model[3].scheme == octavo.Int8Static(octavo.observers.MSE(), method=smoothing)
    assert model[5].scheme == octavo.Int8Dynamic(symmetric=False, weights=octavo.formats.CoarseInt8(4))
    assert torch.equal(model.positions, torch.arange(4))
    check_outputs(model, DATA / "octavo_0_1")
    contents = {layer.name: layer for layer in octavo.inspect_checkpoint(DATA / "octavo_0_1").layers}
    assert [contents[name].weights for name in "135"] == [16 * 24, 24 * 16, 16 * 24]
    assert "SmoothQuant" in contents["3"].scheme and "CoarseInt8" in contents["5"].scheme


def test_a_compressed_tensors_folder_of_octavo_0_1_is_read():
    """Written by save_pretrained: layers of three kinds, the head float."""
    pytest.importorskip("transformers")
    folder = DATA / "compressed_tensors_0_1"
    model = octavo.load(folder)
    check_outputs(model, folder)
    kinds = {type(layer.scheme) for layer in model.modules() if isinstance(layer, QuantLinear)}
    assert kinds == {octavo.Int8Dynamic, octavo.Int8Static, octavo.Int8WeightOnly}
    assert type(model.lm_head) is nn.Linear
    assert len(octavo.inspect_checkpoint(folder).quantized) == 7
