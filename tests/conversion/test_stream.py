# SPDX-License-Identifier: Apache-2.0
"""Folders quantized tensor by tensor: the same bits as in memory, little memory, and all of it or nothing."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert, check_equal_states, edit_config, folder_of, llama, llava, logits, mixtral

import octavo
from octavo.conversion.folder import quantize_folder
from octavo.files import safetensors
from octavo.huggingface import models

DYNAMIC = octavo.Int8Dynamic()


@pytest.fixture
def source(tmp_path):
    return folder_of(llama(), tmp_path / "source")


def edit_tensors(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / safetensors.WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / safetensors.WEIGHTS)


# The same as in memory


@pytest.mark.parametrize("scheme", [DYNAMIC, octavo.Int8WeightOnly()], ids=repr)
@pytest.mark.parametrize("shard_size", [10**9, 4000])
@pytest.mark.parametrize(
    "make", [llama, bert, lambda: llama(tie_word_embeddings=True), lambda: llama().bfloat16(), mixtral, llava]
)
def test_the_folder_holds_what_quantize_makes_of_the_loaded_model(tmp_path, make, scheme, shard_size):
    folder = folder_of(make(), tmp_path / "source", max_shard_size=20_000 if shard_size == 4000 else "1GB")
    report = quantize_folder(folder, tmp_path / "int8", scheme, shard_size=shard_size)
    expected = models.load_model(folder)
    joined = make is mixtral  # experts, which stay float in folders
    in_memory = octavo.quantize_(expected, scheme, exclude="*.experts.*" if joined else None)
    loaded = models.load_quantized(tmp_path / "int8")
    check_equal_states(loaded, expected)
    assert torch.equal(logits(loaded), logits(expected))
    rows, others = ([row for row in each.rows if "experts" not in row.name] for each in (report, in_memory))
    assert [(row.name, row.action, row.reason) for row in rows] == [
        (row.name, row.action, row.reason) for row in others
    ]
    assert (report.bytes_before, report.bytes_after) == (in_memory.bytes_before, in_memory.bytes_after)


def test_shards_are_bounded_and_listed(source, tmp_path):
    quantize_folder(source, tmp_path / "int8", DYNAMIC, shard_size=4000)
    index = json.loads((tmp_path / "int8" / safetensors.INDEX).read_text())
    sizes = {}
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "int8" / name)
        assert set(tensors) == {key for key, file in index["weight_map"].items() if file == name}
        sizes[name] = safetensors.nbytes(tensors)
        assert sizes[name] <= 4000 or set(tensors) == {"model.embed_tokens.weight"}  # 64 x 32 floats
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert sorted(sizes) == [
        f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)
    ]


def test_excluded_layers_stay_float_and_the_config_says_so(source, tmp_path):
    report = quantize_folder(source, tmp_path / "int8", DYNAMIC, exclude="lm_head")
    assert len(report.quantized) == 14
    config = json.loads((tmp_path / "int8/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"] and config["config_groups"]["group_0"]["targets"] == ["Linear"]
    stored = load_file(tmp_path / "int8" / safetensors.WEIGHTS)
    assert torch.equal(stored["lm_head.weight"], load_file(source / safetensors.WEIGHTS)["lm_head.weight"])


def test_a_weight_that_is_no_float_stays(source, tmp_path):
    edit_tensors(source, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].double()}))
    report = quantize_folder(source, tmp_path / "int8", DYNAMIC)
    assert [row.reason for row in report.rows if row.name == "lm_head"] == ["the weight is torch.float64"]


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def write_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_files_beside_the_weights_come_along_whatever_their_names(source, tmp_path):
    names = ["source.spm", "bpe.codes", "LICENSE", "chat.jinja", "tokens.dat", "1_Pooling/config.json"]
    names += ["2_Dense/model.safetensors", "2_Dense/deeper/x.y", "3_Dense/pytorch_model.bin", "modules.json"]
    write_files(source, *names)
    (source / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "3_Dense"}]))
    (source / "4_Normalize").mkdir()
    before = os.umask(0o022)
    try:
        report = quantize_folder(source, tmp_path / "new" / "int8", DYNAMIC)
    finally:
        os.umask(before)
    assert files_of(tmp_path / "new/int8") == files_of(source)
    for name in names:
        assert (tmp_path / "new/int8" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "new/int8/4_Normalize").is_dir() and report.left_out == {}
    assert (tmp_path / "new/int8").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "new/int8/model.safetensors").stat().st_mode & 0o777 == 0o644


def test_files_that_stay_behind_are_named_with_the_reason(source, tmp_path):
    expected = {
        "weights in another format": [
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "flax.msgpack",
            "on/x.onnx",
        ],
        "weights that the model is not loaded from": ["consolidated.safetensors"],
        "of another checkpoint": ["octavo.json"],
        "code": ["modeling.py", "2_Dense/run.py"],
    }
    write_files(source, *(name for names in expected.values() for name in names))
    write_files(source, ".gitattributes", ".cache/x.json", "checkpoint-500/model.safetensors")
    (source / "away").symlink_to(tmp_path)
    (source / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.json")
    expected |= {
        "hidden": [".gitattributes", ".cache"],
        "a step of training": ["checkpoint-500"],
        "no regular file": ["away", "broken.txt", "pipe.json"],
    }
    # Inside the source: what the new folder holds so far is not part of it.
    report = quantize_folder(source, source / "int8", DYNAMIC)
    assert report.left_out == {name: reason for reason, names in expected.items() for name in names}
    assert report.to_dict()["left_out"] == report.left_out
    assert not files_of(source / "int8").intersection(report.left_out)
    assert "not copied (code): 2_Dense/run.py, modeling.py" in str(report)


def test_links_to_files_are_copied_as_files(source, tmp_path):
    """A folder of the hub's cache holds nothing but links."""
    (source / "tokenizer.json").rename(tmp_path / "blob")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    quantize_folder(source, tmp_path / "int8", DYNAMIC)
    assert not (tmp_path / "int8/tokenizer.json").is_symlink()
    assert (tmp_path / "int8/tokenizer.json").read_bytes() == (tmp_path / "blob").read_bytes()


def test_tensors_that_the_model_has_no_place_for_are_copied_and_named(source, tmp_path):
    edit_config(source, num_hidden_layers=1)
    report = quantize_folder(source, tmp_path / "int8", DYNAMIC)
    stored = load_file(source / safetensors.WEIGHTS)
    assert report.unknown == sorted(name for name in stored if ".layers.1." in name)
    assert "no place for them: model.layers.1.input_layernorm.weight, " in str(report)
    assert all(
        torch.equal(load_file(tmp_path / "int8" / safetensors.WEIGHTS)[name], stored[name])
        for name in report.unknown
    )
    assert len(octavo.load(tmp_path / "int8").model.layers) == 1


def test_a_missing_layer_is_refused_with_a_remedy_that_works(tmp_path):
    """As sentence-transformers saves a BERT whose pooler nobody uses."""
    from tiny_models import transformers

    folder = folder_of(bert(transformers.BertModel), tmp_path / "source")
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("pooler")])
    check_refused(
        folder, tmp_path, ValueError, "do not hold pooler.dense.bias, pooler.dense.weight.*save_pretrained"
    )
    models.load_model(folder).save_pretrained(tmp_path / "whole")
    quantize_folder(tmp_path / "whole", tmp_path / "int8", DYNAMIC)
    assert octavo.load(tmp_path / "int8").pooler.dense.scheme == DYNAMIC


def test_a_skeleton_costs_nothing_and_has_its_buffers(source):
    skeleton = models.skeleton(source)
    assert all(parameter.is_meta for parameter in skeleton.parameters() if parameter.dim() > 1)
    expected = dict(llama().named_buffers())
    assert expected and dict(skeleton.named_buffers()).keys() == expected.keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in skeleton.named_buffers())
    assert torch.get_default_dtype() == torch.float32


# Memory, in a fresh process

MEASURE = """
import resource, sys
import octavo, torch
from octavo.conversion.folder import quantize_folder

def peak():  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
small, large, output = sys.argv[1:]
quantize_folder(small, output + "-small", octavo.Int8Dynamic())  # imports, and memory that any run takes
before = peak()
quantize_folder(large, output, octavo.Int8Dynamic())
print(peak() - before)
"""


def test_the_peak_is_about_twice_the_largest_tensor(source, tmp_path):
    width = 768
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4, vocab_size=128)
    large = folder_of(llama(**sizes).bfloat16(), tmp_path / "large")
    stored = load_file(large / safetensors.WEIGHTS)
    whole, largest = safetensors.nbytes(stored), max(tensor.nbytes for tensor in stored.values())
    assert whole > 14 * largest  # else the bound below would say little
    command = [sys.executable, "-c", MEASURE, source, large, tmp_path / "int8"]
    # glibc keeps freed blocks below a threshold that it raises as it goes; fixed, it is the code that is measured.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **fixed})
    # At once there are the weight, its codes and the packed codes: 2 + 1 + 1 bytes for an element of 2.
    assert int(done.stdout) < 2.5 * largest
    assert torch.equal(models.load_quantized(tmp_path / "int8").lm_head.codes(), head_codes(stored))


def head_codes(stored) -> torch.Tensor:
    return octavo.quantize(stored["lm_head.weight"], granularity=octavo.PerChannel(0)).codes


# All of it or nothing

KILL = """
import os, signal, sys
import octavo, torch
from octavo.conversion import folder
from octavo.files import safetensors
from octavo.huggingface import models

def deadly(action):
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*args, **kwargs)
    return wrapped

torch.set_num_threads(1)
source, output, *points = sys.argv[1:]
models.skeleton(source)  # transformers is imported once, not in each child
safetensors.read_tensor, folder.copy_others, os.rename = map(
    deadly, (safetensors.read_tensor, folder.copy_others, os.rename)
)
for left in map(int, points):  # each in a process of its own, which is cheaper forked than started
    child = os.fork()
    if child == 0:
        folder.quantize_folder(source, f"{output}/{left}/int8", octavo.Int8Dynamic(), shard_size=4000)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_killed_run_leaves_nothing_that_looks_like_a_checkpoint(source, tmp_path):
    points = [
        0,
        11,
        21,
        22,
        23,
    ]  # 21 tensors are read, then files copied, then the folder renamed; 23 is survived
    command = [sys.executable, "-c", KILL, source, tmp_path, *map(str, points)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [int(code) for code in done.stdout.split()] == 4 * [-signal.SIGKILL] + [0]
    for point in points[:-1]:
        (left,) = (tmp_path / str(point)).iterdir()
        assert left.name.startswith(".") and left.name.endswith(".partial")
    quantize_folder(source, tmp_path / "22/int8", DYNAMIC)
    assert os.listdir(tmp_path / "22") == ["int8"]  # what was left of the first run is gone
    for point in (22, 23):
        assert len(models.load_quantized(tmp_path / str(point) / "int8").state_dict()) == 21 + 15


def test_a_failed_run_cleans_up(source, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(safetensors, "checksum", full_disk)
    with pytest.raises(OSError, match="No space"):
        quantize_folder(source, tmp_path / "out/int8", DYNAMIC)
    assert os.listdir(tmp_path / "out") == []


# What is refused; the output is then as it was


def check_refused(source, tmp_path, error, message, scheme=DYNAMIC, **options):
    with pytest.raises(error, match=message):
        quantize_folder(source, tmp_path / "out/int8", scheme, **options)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_a_weight_with_nan_is_named(source, tmp_path):
    edit_tensors(source, lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")))
    check_refused(source, tmp_path, ValueError, "model.layers.1.mlp.up_proj.weight holds NaN or Inf")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("lm_head.weight"), "do not hold lm_head.weight, which a LlamaForCausalLM has"),
        (lambda t: t.pop("model.norm.weight"), "do not hold model.norm.weight"),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(64, 31)}),
            r"\(64, 31\), config.json makes it \(64, 32\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": torch.zeros(64)}),
            r"\(64,\), config.json makes it \(64, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(source, tmp_path, change, message):
    edit_tensors(source, change)
    check_refused(source, tmp_path, ValueError, message)


def test_sources_that_are_no_float_models_of_transformers_are_refused(source, tmp_path):
    check_refused(tmp_path / "nowhere", tmp_path, FileNotFoundError, "nowhere holds no config.json")
    edit_config(source, architectures=["Trainer"])  # in transformers, but no model
    check_refused(source, tmp_path, ValueError, "class as 'Trainer'")
    edit_config(source, architectures=None)
    check_refused(source, tmp_path, ValueError, "class as None")
    edit_config(source, quantization_config={})
    check_refused(source, tmp_path, ValueError, "quantized already")
    (source / "config.json").write_text("[]")
    check_refused(source, tmp_path, ValueError, "not a JSON object")
    (source / "config.json").write_text("{")
    check_refused(source, tmp_path, ValueError, "not JSON")


def test_pickled_weights_and_code_in_the_folder_are_not_touched(source, tmp_path):
    (source / safetensors.WEIGHTS).rename(tmp_path / "elsewhere")
    (source / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    check_refused(source, tmp_path, ValueError, "a pickle can run code")
    (source / "modeling.py").write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    classes = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    edit_config(source, model_type="strange", auto_map=classes)
    check_refused(source, tmp_path, ValueError, "custom code|trust_remote_code")
    assert not (tmp_path / "marker").exists()


def test_wrong_arguments_are_refused(source, tmp_path):
    check_refused(source, tmp_path, ValueError, "Int8Static needs data.*save_pretrained", octavo.Int8Static)
    check_refused(source, tmp_path, ValueError, "matches no layer", exclude="head")
    check_refused(source, tmp_path, ValueError, "no layer would be quantized.*excluded by", exclude="*")
    check_refused(source, tmp_path, TypeError, "scheme is 8", 8)
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        quantize_folder(source, source, DYNAMIC)


def test_an_empty_folder_is_taken_and_nothing_else_is_written_beside_it(source, tmp_path):
    (tmp_path / "out/int8").mkdir(parents=True)
    quantize_folder(source, tmp_path / "out/int8", DYNAMIC)
    assert os.listdir(tmp_path / "out") == ["int8"]
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        quantize_folder(source, tmp_path / "out/int8", DYNAMIC)
