# SPDX-License-Identifier: Apache-2.0
"""The commands do what they say on a small transformers model, and name what is wrong in one line."""

import json
import subprocess
import sys

import pytest
import torch

import octavo
from octavo import cli, metrics
from octavo.cli._json import strict
from octavo.cli._types import scheme_called, scheme_names
from octavo.huggingface import models as pretrained
from octavo.lab import demo
from octavo.nn import QuantLinear

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random BERT with a real tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    pretrained.load_tokenizer(pretrained.bundled_folder()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def int8_folder(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("int8") / "model"
    assert run("quantize", model_folder, folder) == 0
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A first line of text.\n\nAnd a second one, which is longer.\n", encoding="utf-8")
    return path


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


# Blocks of 256, the default of "ggml", are longer than the rows of this model.
WITHOUT_DATA = [name for name in scheme_names() if not scheme_called(name)().needs_data and name != "ggml"]


@pytest.mark.parametrize("scheme", WITHOUT_DATA)
def test_quantize_then_compare(model_folder, tmp_path, text, capsys, scheme):
    assert run("quantize", model_folder, tmp_path / "int8", "--scheme", scheme) == 0
    printed = capsys.readouterr().out
    assert "quantized" in printed and f"saved: {tmp_path / 'int8'}" in printed
    found: dict = {}
    exec(printed.splitlines()[-1].removeprefix("load it in Python: "), found)
    assert run("compare", model_folder, tmp_path / "int8", "--text", text) == 0
    printed = capsys.readouterr().out
    reference = pretrained.load_model(model_folder)
    model = octavo.quantized(reference, scheme_called(scheme))
    tokenizer = pretrained.load_tokenizer(model_folder)
    sentences = [line for line in text.read_text().splitlines() if line]
    batches = pretrained.unpadded_batches(tokenizer, sentences)
    expected = octavo.compare(reference, model, batches)
    assert printed == f"{expected}\n" == f"{octavo.compare(reference, found['model'], batches)}\n"
    assert run("compare", model_folder, tmp_path / "int8", "--text", text, "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected.to_dict()


def test_a_quantized_folder_cannot_be_mistaken_for_a_float_one(model_folder, tmp_path):
    """transformers without compressed-tensors must refuse it; it would fill float layers with codes otherwise."""
    run("quantize", model_folder, tmp_path / "int8")
    config = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == "channel" and group["input_activations"]["strategy"] == "token"
    # The decoder is tied to the embedding: it stays float, and the file says so.
    assert config["ignore"] == ["cls.predictions.decoder"]


def test_embeddings_are_quantized_on_request(model_folder, tmp_path, capsys):
    run("quantize", model_folder, tmp_path / "all", "--include-embeddings")
    assert "shares the weight of 'bert.embeddings.word_embeddings'" in capsys.readouterr().out
    loaded = octavo.load(tmp_path / "all")
    assert loaded.cls.predictions.decoder.packed is loaded.bert.embeddings.word_embeddings.packed
    run("quantize", model_folder, tmp_path / "one", "--include-embeddings", "*.position_embeddings")
    assert "not matched by include_embeddings" in capsys.readouterr().out


def test_layers_can_be_excluded_and_weights_cut_into_shards(model_folder, tmp_path):
    run("quantize", model_folder, tmp_path / "int8", "--shard-size", "10KB", "--exclude", "*.query", "*.1.*")
    assert (tmp_path / "int8" / "model.safetensors.index.json").exists()
    layers = pretrained.load_quantized(tmp_path / "int8").named_modules()
    names = [name for name, module in layers if isinstance(module, QuantLinear)]
    assert len(names) == 5 + 1 and not any(".1." in name or "query" in name for name in names)


def test_a_model_and_its_tokenizer_can_be_saved_from_memory(model_folder, tmp_path):
    """The way for schemes that need data, whatever names transformers gives the tensors in its own files."""
    model = pretrained.load_model(model_folder)
    ids = torch.arange(1000, 1016)[None]
    octavo.quantize_(model, octavo.Int8Static(symmetric=False), data=ids)
    pretrained.save_quantized(model, pretrained.load_tokenizer(model_folder), tmp_path)
    loaded = pretrained.load_quantized(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.quantization_config["quant_method"] == "compressed-tensors"
    assert pretrained.load_tokenizer(tmp_path)("a word")["input_ids"]


def test_transformers_reads_a_quantized_folder_with_compressed_tensors(model_folder, tmp_path):
    pytest.importorskip("compressed_tensors")
    run("quantize", model_folder, tmp_path / "int8", "--scheme", "int8-weight-only")
    stock = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "int8").eval()
    ours = pretrained.load_quantized(tmp_path / "int8")
    ids = torch.arange(1000, 1016)[None]
    with torch.no_grad():
        # The same codes and scales; ours rounds activations to 1 part in 65,024 of each row's largest value.
        assert metrics.sqnr_db(stock(ids).logits, ours(ids).logits) > 60


def test_info_names_the_active_kernels(capsys):
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert octavo.cpu_info().active in printed and octavo.__version__ in printed


def test_info_as_json_has_the_same(capsys):
    assert run("info", "--json") == 0
    found, expected = json.loads(capsys.readouterr().out), octavo.cpu_info()
    assert found["active"] == expected.active and tuple(found["isas"]) == expected.isas
    assert found["octavo"] == octavo.__version__ and found["torch"] == torch.__version__


def test_json_is_strict():
    found = strict({"a": [float("inf"), (1.5, float("nan"))], "b": -float("inf"), "c": "text"})
    assert found == {"a": ["inf", [1.5, "nan"]], "b": "-inf", "c": "text"}


def test_demo_prints_the_result(monkeypatch, capsys):
    asked = {}

    def fake(model, output, *, threads):
        asked.update(model=model, output=output, threads=threads)
        return "the result"

    monkeypatch.setattr(demo, "run", fake)
    assert run("demo", "--threads", 2, "--output", "here", "--encoder", "there") == 0
    assert capsys.readouterr().out == "the result\n"
    assert asked == {"model": "there", "output": "here", "threads": 2}


def test_bad_input_is_one_line_on_stderr_and_exit_code_1(model_folder, int8_folder, tmp_path, text, capsys):
    empty, latin, wrong = tmp_path / "empty.txt", tmp_path / "latin.txt", tmp_path / "wrong"
    empty.write_text("\n \n")
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    wrong.mkdir()
    config = json.loads((model_folder / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "hidden_act": "gelo"}))
    for arguments, message in [
        (("quantize", tmp_path / "nowhere", tmp_path / "out"), "holds no config.json"),
        (("quantize", model_folder, model_folder), "exists and is not an empty folder"),
        (("quantize", model_folder, text), "exists and is not an empty folder"),
        (("compare", model_folder, model_folder, "--text", text), "has no quantization_config"),
        (("compare", int8_folder, model_folder, "--text", text), "give the float folder first"),
        (("evaluate", int8_folder, model_folder, "--text", text), "give the float folder first"),
        (("compare", int8_folder, int8_folder, "--text", text), "give the folder of its float model first"),
        (
            ("compare", model_folder, int8_folder, "--text", latin),
            f"{latin} is not UTF-8 text: byte 3 is 0xe9",
        ),
        (
            ("evaluate", model_folder, int8_folder, "--text", latin),
            f"{latin} is not UTF-8 text: byte 3 is 0xe9",
        ),
        (("compare", model_folder, int8_folder, "--text", tmp_path), f"directory: '{tmp_path}'"),
        (("compare", tmp_path, int8_folder, "--text", text), f"{tmp_path} holds no config.json"),
        (("quantize", wrong, tmp_path / "out"), f"{wrong / 'config.json'}: transformers cannot make"),
        (("quantize", model_folder, tmp_path / "out", "--exclude", "["), "matches no layer"),
        (("inspect", tmp_path / "nowhere"), "nowhere does not exist"),
        (("inspect", text), "not a safetensors file"),
        (("compare", model_folder, model_folder, "--text", tmp_path / "none.txt"), "none.txt"),
        (("compare", model_folder, model_folder, "--text", empty), "holds no text"),
    ]:
        assert run(*arguments) == 1
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["quantize", "a", "b", "--scheme", "int3"],
        ["quantize", "a", "b", "--scheme", "int8-static"],  # it needs data
        ["quantize", "a", "b", "--shard-size", "many"],
        ["quantize", "a", "b", "--shard-size", "0GB"],
        ["quantize", "a", "b", "--shard-size", "9" * 5000],
        ["demo", "--threads", "0"],
        ["demo", "--threads", "9" * 5000],
        ["demo", "--threads", "\u0663"],
        ["dtypes", "1/0"],
        ["dtypes", "1e5/3"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert "usage: octavo" in capsys.readouterr().err


def test_schemes_are_named_by_their_files():
    assert {scheme_called(name) for name in scheme_names()} == set(octavo.schemes.SCHEMES.values())


def test_ctrl_c_is_one_line_and_exit_code_130(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert run("demo") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "octavo demo: interrupted"


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("a\n  b"), "a b"),
        (MemoryError(), "not enough memory"),
        (KeyError("x"), "KeyError: 'x'; with OCTAVO_TRACEBACK=1 in the environment it says where"),
        (RuntimeError(""), "RuntimeError: ; with OCTAVO_TRACEBACK=1 in the environment it says where"),
    ],
    ids=repr,
)
def test_an_error_of_any_kind_is_one_line(monkeypatch, capsys, error, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert run("demo") == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"octavo demo: {line}"
    monkeypatch.setenv("OCTAVO_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run("demo")


SCRIPT = """
import sys
from octavo_command import main
try:
    code = main()
except SystemExit as stopped:
    code = stopped.code
print("torch" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments, code, loads_torch",
    [
        (["fly"], 2, False),
        (["--help"], 0, False),
        (["quantize", "--help"], 0, False),
        (["quantize", "a", "b", "--scheme", "int3"], 2, False),
        (["compare", "a", "b"], 2, False),
        (["study", "--schemes", "int3"], 2, False),
        (["info"], 0, True),
    ],
)
def test_the_installed_script_parses_before_torch_is_imported(arguments, code, loads_torch):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    assert done.returncode == code and done.stderr.splitlines()[-1] == str(loads_torch), done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_is_installed():
    done = subprocess.run(
        [sys.executable, "-m", "octavo.cli", "info"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("octavo ")


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m octavo.cli dtypes 1/3 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("fp64") and done.stderr == ""
