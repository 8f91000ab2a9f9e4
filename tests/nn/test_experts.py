# SPDX-License-Identifier: Apache-2.0
"""Experts that transformers keeps in one Parameter become layers of their own, multiply the same, and come back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import octavo
from octavo.nn import QuantLinear
from octavo.nn.experts import expert_parameters, join_experts_, split_experts_

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
EXPERTS = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2, "pad_token_id": 0}
IDS = torch.tensor([[5, 17, 99, 0, 3, 8, 42], [1, 2, 3, 4, 5, 6, 7]])


def random_(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    return model.eval()


def mixtral():
    return random_(
        transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS, num_local_experts=4))
    )


def qwen():
    config = transformers.Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=32, num_experts=8, head_dim=16)
    return random_(transformers.Qwen3MoeForCausalLM(config))


def gpt_oss():  # matrices [k, n], with biases and a gate of its own
    config = transformers.GptOssConfig(**EXPERTS, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    return random_(transformers.GptOssForCausalLM(config))


MODELS = {"mixtral": mixtral, "qwen3_moe": qwen, "gpt_oss": gpt_oss}
SCHEMES = {"codes": octavo.Int8Dynamic(), "packed": octavo.Int8Dynamic(group_size=32)}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def make(request):
    return request.param


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


def test_layers_of_experts_give_what_the_forward_of_their_class_gives(make):
    model = make()
    model.set_experts_implementation("eager")
    expected, before = outputs(model), dict(model.named_parameters())
    assert split_experts_(model) == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert not any(expert_parameters(module) for module in model.modules())
    assert torch.equal(outputs(model), expected)
    join_experts_(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_the_layers_share_the_memory_of_the_parameter():
    model = mixtral()
    experts = model.model.layers[0].mlp.experts
    address = experts.down_proj[2].data_ptr()
    split_experts_(model)
    assert experts.get_submodule("2.down_proj").weight.data_ptr() == address
    assert experts.down_proj[torch.tensor(2)].shape == (64, 96)


def test_quantized_experts_multiply_codes_of_the_rows_that_reach_them(make, monkeypatch):
    model = make()
    expected = outputs(model)
    report = octavo.quantize_(model, octavo.Int8Dynamic(group_size=32))
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.get_submodule("3.down_proj"), QuantLinear)
    rows = {row.name: row for row in report.rows}
    row = rows["model.layers.1.mlp.experts.gate_up_proj"]
    assert row.action == "quantized" and row.bytes_after < 0.5 * row.bytes_before
    # 8 bits in groups of 32 leave 44 dB in each product of Gaussian data; six products in a row leave more than 30.
    error = (outputs(model) - expected).square().sum() / expected.square().sum()
    assert error < 1e-3
    seen = []
    forward = QuantLinear.forward
    monkeypatch.setattr(
        QuantLinear, "forward", lambda self, x: (seen.append((self, len(x))), forward(self, x))[1]
    )
    outputs(model)
    own = {id(module) for name, module in experts.named_modules() if name.endswith("down_proj")}
    per_token = model.config.num_experts_per_tok
    assert sum(count for layer, count in seen if id(layer) in own) == per_token * IDS.numel()


def test_copies_pickles_and_dequantized_matrices_are_those_of_the_codes(make):
    model = make()
    octavo.quantize_(model, octavo.Int8WeightOnly())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other), outputs(model))
    experts = model.model.layers[0].mlp.experts
    dense = experts.get_submodule("1.down_proj").dequantize()
    matrix = experts.down_proj[1]
    assert torch.equal(matrix.clone(), dense.T if experts.is_transposed else dense)


def test_quantized_leaves_the_float_model_as_it_was_and_copies_no_floats(make):
    model = make()
    names, expected = list(model.state_dict()), outputs(model)
    fast = octavo.quantized(model, octavo.Int8Dynamic())
    assert list(model.state_dict()) == names and torch.equal(outputs(model), expected)
    assert not any(parameter.dim() == 3 for parameter in fast.parameters())
    assert all(
        part.joined is None
        for part in vars(fast.model.layers[0].mlp.experts).values()
        if hasattr(part, "joined")
    )
    octavo.quantize_(model, octavo.Int8Dynamic())
    assert torch.equal(outputs(fast), outputs(model))


def test_excluded_experts_stay_in_their_parameter(make):
    model = make()
    octavo.quantize_(model, octavo.Int8Dynamic(), exclude="*.layers.0.mlp.experts.*")
    assert model.model.layers[0].mlp.experts.down_proj.dim() == 3
    assert isinstance(model.model.layers[1].mlp.experts.get_submodule("0.down_proj"), QuantLinear)


def test_an_error_leaves_the_experts_as_they_were():
    model = mixtral()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight holds NaN"):
        octavo.quantize_(model, octavo.Int8Dynamic())
    assert isinstance(model.model.layers[1].mlp.experts.down_proj, nn.Parameter)


def test_experts_are_prepared_trained_and_frozen():
    model = mixtral()
    octavo.prepare_(model, octavo.Int8Dynamic())
    model(IDS, labels=IDS).loss.backward()
    layers = [model.model.layers[0].mlp.experts.get_submodule(f"{i}.down_proj") for i in range(4)]
    assert any(layer.weight.grad is not None and layer.weight.grad.any() for layer in layers)
    octavo.freeze_(model)
    assert isinstance(model.model.layers[0].mlp.experts.get_submodule("0.down_proj"), QuantLinear)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_every_way_to_a_file_and_back_gives_the_same_bits(make, scheme, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "float")
    octavo.quantize_(model, scheme)
    expected, kind = outputs(model), type(model)

    octavo.save(model, tmp_path / "octavo")
    assert torch.equal(outputs(octavo.load(tmp_path / "octavo", make())), expected)
    model.save_pretrained(tmp_path / "transformers")
    assert torch.equal(outputs(octavo.load(tmp_path / "transformers")), expected)

    config = octavo.OctavoConfig(scheme)
    loaded = kind.from_pretrained(tmp_path / "float", quantization_config=config)
    assert torch.equal(outputs(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(kind.from_pretrained(tmp_path / "again")), expected)
    assert torch.equal(outputs(octavo.load(tmp_path / "again")), expected)
