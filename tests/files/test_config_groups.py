# SPDX-License-Identifier: Apache-2.0
"""Which layers the groups of a quantization_config mean: those that they mean to compressed-tensors.

data/compressed_tensors_groups.json holds configurations, some written for a rule and the others drawn at random, with
the kind of each layer as compressed-tensors 0.20.1 finds it.
"""

import json
from pathlib import Path

import pytest
from test_compressed_tensors import PER_TOKEN, STATIC, entry, skeleton
from torch import nn

import octavo
from octavo.files import compressed_tensors
from octavo.formats.int8 import ARGUMENTS

CASES = json.loads((Path(__file__).parents[1] / "data/compressed_tensors_groups.json").read_text())


def model_of_groups() -> nn.Module:
    """Names and classes that the cases' targets mean."""
    attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q_proj", "k_proj", "o_proj")})
    mlp = nn.ModuleDict({"up_proj": nn.Linear(4, 4), "down_proj": nn.Linear(4, 4), "Linear": nn.Linear(4, 4)})
    model = nn.ModuleDict({"attn": attention, "mlp": mlp, "norm": nn.LayerNorm(4), "q_proj": nn.Linear(4, 4)})
    model["again"] = attention["q_proj"]  # a second name
    return model


def entry_of(case: dict) -> dict:
    activations = {"dynamic": PER_TOKEN, "weight_only": None, "static": STATIC}
    groups = {
        f"group_{i}": {
            "targets": targets,
            "weights": ARGUMENTS,
            "input_activations": activations[kind],
            "format": "int-quantized",
        }
        for i, (targets, kind) in enumerate(case["groups"])
    }
    return entry(config_groups=groups, ignore=case["ignore"])


def kind_of(activations: dict) -> str:
    if not activations:
        return "weight_only"
    return "dynamic" if activations["dynamic"] else "static"


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_groups_mean_what_they_mean_to_compressed_tensors(case):
    """A name counts before a regular expression, that before a class, and the last group for a target."""
    schemes = compressed_tensors.schemes_of(entry_of(case), model_of_groups())
    found = {name: kind_of(scheme.activations.compressed_tensors()) for name, scheme in schemes.items()}
    assert found.pop("again", None) == found.get("attn.q_proj") and found == case["expected"]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_table_of_groups_is_theirs(case):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = entry_of(case)
    fields = {key: config[key] for key in ("format", "ignore", "config_groups")}
    model = model_of_groups()
    apply_quantization_config(model, QuantizationConfig(**fields, quantization_status="compressed"))
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            activations = module.quantization_scheme.input_activations
            found[name] = kind_of(activations and activations.model_dump())
    assert found == case["expected"]


@pytest.mark.parametrize("targets", ["Linear", [["Linear"]], None], ids=str)
def test_targets_that_are_no_list_of_names_are_refused(targets):
    """A text is a list of letters to Python, and each would be a name that nothing has."""
    config = entry()
    config["config_groups"]["group_0"]["targets"] = targets
    with pytest.raises(TypeError, match="is no list of names"):
        compressed_tensors.schemes_of(config, skeleton())
    with pytest.raises(TypeError, match="is no list of names"):
        compressed_tensors.schemes_of(entry(ignore="lm_head"), skeleton())


def test_an_embedding_is_quantized_if_the_file_says_so():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "fc": nn.Linear(4, 4)})
    config = entry()
    config["config_groups"]["group_0"]["targets"] = ["Linear", "re:emb"]
    assert compressed_tensors.schemes_of(config, model).keys() == {"embed", "fc"}
    model["embed"].max_norm = 1.0
    with pytest.raises(ValueError, match="load: 're:emb' wants embed quantized, and max_norm shortens rows"):
        compressed_tensors.schemes_of(config, model)
    config["ignore"] = ["embed"]
    assert compressed_tensors.schemes_of(config, model).keys() == {"fc"}


@pytest.mark.parametrize("others", [None, octavo.Int8WeightOnly()])
def test_a_layer_named_like_a_class_or_a_pattern_is_written_as_itself(others):
    def model():
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in ("Linear", "re:x", "fc")})

    chosen = {"fc": octavo.Int8Dynamic(), "*": others}
    written = compressed_tensors.quantization_config(octavo.quantized(model(), chosen))
    expected = {name: chosen.get(name, others) for name in model()}
    found = compressed_tensors.schemes_of(written, model())
    assert found == {name: scheme for name, scheme in expected.items() if scheme}
