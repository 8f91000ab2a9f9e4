# SPDX-License-Identifier: Apache-2.0
"""Weights of few bits as compressed-tensors packs them: theirs are read here bit for bit, ours there."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from test_compressed_tensors import PER_TOKEN, check_dequantized, entry, folder_with
from torch import nn

import octavo
from octavo.formats import IntGroup
from octavo.huggingface import models as pretrained

# Written by compressed-tensors 0.20.0; bfloat16 as uint16.
GOLDEN = np.load(Path(__file__).parents[1] / "data/compressed_tensors_packed.npz")
CASES = {
    "int4_asym_g32_float32": IntGroup(4, 32, False, "float32"),
    "int4_sym_g128_float32": IntGroup(4, 128, True, "float32"),
    "int4_sym_g128_bfloat16": IntGroup(4, 128, True, "bfloat16"),
    "int4_asym_g128_float16": IntGroup(4, 128, False, "float16"),
    "int4_sym_channel_K36": IntGroup(4, None, True, "float32"),
    "int4_asym_channel_K36_N21": IntGroup(4, None, False, "float32"),
    "int8_sym_g32": IntGroup(8, 32, True, "float32"),
    "int3_sym_g32": IntGroup(3, 32, True, "float32"),
}
GROUP_32 = {**PER_TOKEN, "strategy": "group", "group_size": 32}


def golden(case: str) -> dict[str, torch.Tensor]:
    arrays = {key.split("/")[1]: GOLDEN[key].copy() for key in GOLDEN.files if key.startswith(case + "/")}
    found = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {
        name: tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
        for name, tensor in found.items()
    }


def config_of(weights: IntGroup, activations=None) -> dict:
    config = entry((), activations, format="pack-quantized")
    config["config_groups"]["group_0"]["weights"] = weights.compressed_tensors()
    return config


def read(folder, case: str, activations=None, change=None) -> nn.Module:
    tensors = golden(case)
    expected = tensors.pop("deq")
    if change is not None:
        change(tensors)
    return _loaded(folder, config_of(CASES[case], activations), tensors, tuple(expected.shape))


def test_their_weights_are_read_bit_for_bit_and_given_back(tmp_path):
    """Their product is rounded once in the scale's dtype, ours once to float32 and then to that dtype."""
    for case, weights in CASES.items():
        layer, tensors = read(tmp_path / case, case), golden(case)
        expected = tensors.pop("deq")
        assert (
            layer.scheme.weights == weights and layer.scheme.activations == octavo.activations.SixteenBits()
        )
        assert torch.equal(layer.dequantize(expected.dtype), expected), case
        for packed in (True, False):
            state = layer.state_dict() if packed else layer.unpack_().state_dict()
            assert state.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, (case, name)


@pytest.mark.parametrize(
    "case, activations, scheme",
    [
        ("int3_sym_g32", None, octavo.Int4WeightOnly(32, 3, scale_dtype="float32")),
        ("int3_sym_g32", GROUP_32, octavo.Int4Dynamic(32, 3, scale_dtype="float32")),
        ("int3_sym_g32", PER_TOKEN, octavo.Int8Dynamic(weights=IntGroup(3, scale_dtype="float32"))),
        ("int8_sym_g32", None, octavo.Int8WeightOnly(weights=IntGroup(8, scale_dtype="float32"))),
        (
            "int8_sym_g32",
            GROUP_32,
            octavo.Int8Dynamic(weights=IntGroup(8, scale_dtype="float32"), activation_group_size=32),
        ),
    ],
)
def test_a_group_of_their_config_becomes_the_scheme_that_means_it(tmp_path, case, activations, scheme):
    layer = read(tmp_path, case, activations)
    assert layer.scheme == scheme
    config = octavo.files.compressed_tensors.quantization_config(layer)
    (group,) = config["config_groups"].values()
    assert config["format"] == group["format"] == "pack-quantized"
    assert group["weights"] == CASES[case].compressed_tensors()
    assert group["input_activations"] == activations


@pytest.mark.parametrize("activations", [None, PER_TOKEN])
def test_codes_in_a_byte_each_are_packed_when_they_are_read(tmp_path, activations):
    """As int-quantized files have them: weights of 4 bits for 8-bit activations, and 8 bits with zero points."""
    case = "int4_asym_channel_K36_N21"
    q = CASES[case].read(golden(case), 21, 36)
    tensors = {
        "weight": q.codes,
        "weight_scale": q.scale[:, None],
        "weight_zero_point": q.zero_point[:, None].char(),
    }
    config = entry({"num_bits": 4, "symmetric": False}, activations)
    layer = _loaded(tmp_path / "4", config, tensors, (21, 36))
    assert layer.scheme.weights == CASES[case] and torch.equal(layer.dequantize(), golden(case)["deq"])
    assert layer.scheme.activations.compressed_tensors() == (activations or {})

    stored = np.load(Path(__file__).parents[1] / "data/compressed_tensors_int8.npz")
    tensors = {
        key.split("/")[1]: torch.from_numpy(stored[key].copy()) for key in stored if "asym_channel" in key
    }
    expected = tensors.pop("deq")
    layer = _loaded(tmp_path / "8", entry({"symmetric": False}, activations), tensors, tuple(expected.shape))
    assert layer.scheme.weights == IntGroup(8, None, False, "float32")
    assert torch.equal(layer.dequantize(), expected)

    with pytest.raises(
        ValueError, match=r"0.weight has codes -128 .. 127, more than the 3 bits it is said to have"
    ):
        _loaded(tmp_path / "3", entry({"num_bits": 3, "symmetric": False}), tensors, tuple(expected.shape))


def _loaded(folder, config: dict, tensors: dict[str, torch.Tensor], shape: tuple[int, int]) -> nn.Module:
    folder = folder_with(folder, config, {f"0.{name}": tensor for name, tensor in tensors.items()})
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(*shape[::-1], bias=False))
    return octavo.load(folder, skeleton)[0]


def test_forms_that_older_versions_wrote_are_read(tmp_path):
    """Zero points as they are, and the order of columns where it is the usual one."""

    def change(tensors):
        packed, n = tensors["weight_zero_point"], len(tensors["weight_scale"])
        bits = np.unpackbits(packed.T.contiguous().numpy().view(np.uint8), axis=-1, bitorder="little")
        codes = bits.reshape(packed.shape[1], -1, 4)[:, :n] @ (1 << np.arange(4))
        tensors["weight_zero_point"] = torch.from_numpy(codes - 8).to(torch.int8).T.contiguous()
        tensors["weight_g_idx"] = torch.arange(256, dtype=torch.int32) // 32

    layer = read(tmp_path, "int4_asym_g32_float32", change=change)
    assert torch.equal(layer.dequantize(), golden("int4_asym_g32_float32")["deq"])


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda t: t.update(weight_g_idx=torch.arange(96) % 3),
            "groups of 0.weight are no neighbours.*actorder='static'",
        ),
        (
            lambda t: t.update(weight_zero_point=torch.ones(3, 3, dtype=torch.int32)),
            "symmetric and has zero points",
        ),
        (
            lambda t: t.update(weight_shape=torch.tensor([24, 95])),
            r"weight_shape holds \(24, 95\) and not \(24, 96\)",
        ),
        (lambda t: t.update(weight_packed=t["weight_packed"][:, 1:].clone()), r"\(24, 8\) in the checkpoint"),
        (lambda t: t["weight_scale"].fill_(0), "values that are no scales"),
        (lambda t: t.pop("weight_scale"), "lacks tensors: 0.weight_scale"),
        (lambda t: t.pop("weight_packed"), "lacks tensors: 0.weight_packed"),
    ],
)
def test_tensors_that_are_no_layer_are_refused(tmp_path, change, text):
    with pytest.raises(ValueError, match=text):
        read(tmp_path, "int3_sym_g32", change=change)


def test_a_group_that_is_not_full_has_no_words(tmp_path):
    """Theirs must divide the row, so such a model is not passed off as one of theirs."""
    for k, has_words in ((64, True), (70, False)):
        m = octavo.quantized(nn.Sequential(nn.Linear(k, 16)), octavo.Int4WeightOnly())
        assert ("quant_method" in octavo.files.compressed_tensors.quantization_config(m)) == has_words


def test_inspection_counts_scales_and_zero_points(tmp_path):
    from octavo.evaluation.resources import bits_per_weight, memory_of

    scheme = octavo.Int4WeightOnly(32, 3, symmetric=False)
    m = octavo.quantized(nn.Sequential(nn.Linear(64, 32, bias=False)), scheme)
    memory, count = memory_of(m), 32 * 64
    assert (memory.codes, memory.scales) == (count * 3 // 8, 2 * count // 32)
    assert memory.zero_points in (3 * count // 32 // 8, count // 32)  # as in files, or a byte for each
    octavo.save(m, tmp_path)
    contents = octavo.inspect_checkpoint(tmp_path)
    assert contents.bits_per_weight == 3 + (16 + 3) / 32 + 8 * 16 / count  # and the shape
    assert bits_per_weight(m) >= 3 + (16 + 3) / 32


# transformers


SCHEMES = [
    octavo.Int4WeightOnly(16),
    octavo.Int4WeightOnly(None, 3),
    octavo.Int4Dynamic(32, 5),
    octavo.Int8Dynamic(group_size=32),
]


def test_a_folder_is_the_same_model_for_us_and_for_their_package(tmp_path):
    from tiny_models import check_equal_states, llama, logits, transformers

    for i, scheme in enumerate(SCHEMES):
        model, folder = llama(), tmp_path / str(i)
        octavo.quantize_(
            model, scheme, exclude=["lm_head", "*.down_proj"]
        )  # whose 48 inputs are no groups of 32
        model.save_pretrained(folder)
        loaded = pretrained.load_quantized(folder)
        check_equal_states(loaded, model)
        assert torch.equal(logits(loaded), logits(model)), scheme
        if importlib.util.find_spec("compressed_tensors") is not None:
            check_dequantized(transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), model)
