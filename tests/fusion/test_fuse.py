# SPDX-License-Identifier: Apache-2.0
"""fuse_ and unfuse_: what is fused in which model, and that nothing is lost on the way there and back."""

import copy
import logging
import pickle

import pytest
import torch
from asserts import assert_bits_equal, assert_unchanged, model_state
from fusion_models import DECODERS, IDS, MODELS, PADDED, batch_of, bert, llama, outputs, transformers
from torch import nn

import octavo
from octavo.fusion.fuse import RECORD
from octavo.nn.fused.attention_call import AttentionCall

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
# What is fused in each of the two layers; a decoder has one norm more, at its end.
ENCODER = {"attention": 1, "activations": 2}
LLAMA = {"attention": 1, "rotary": 2, "gated": 2, "norms": 5}
FUSED = {name: LLAMA if name in DECODERS else ENCODER for name in MODELS}
FUSED["gemma"] = {"attention": 1, "rotary": 2, "activations": 2, "norms": 5}  # its gate is a GELU


def quantized(make):
    model = make()
    octavo.quantize_(model, octavo.Int8Dynamic())
    return model


def count(rows) -> dict[str, int]:
    steps = [row.step for row in rows]
    return {step: steps.count(step) for step in dict.fromkeys(steps)}


def check_report(report, expected):
    assert count(report.fused) == expected, report
    assert all(row.reason for row in report.kept) and not any(row.reason for row in report.fused)
    assert all(row.error is not None for row in report.fused)
    assert list(report.outputs) == list(expected)


@every_model
def test_a_float_model_computes_the_same_but_for_rounding(make):
    """Each of some 10 places may be off by 2^-19 of what it gives: 2^-14 of the output is more than they add up to."""
    model = make()
    before = outputs(model)
    report = octavo.fuse_(model, batch_of(model), attention="float32")
    assert report.fused
    error = (outputs(model) - before).norm() / before.norm()
    assert error <= 2**-14
    assert report.output.cosine >= 1 - 2**-28


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fused_in_which_model_and_unfusing_brings_back_the_same_modules_and_bits(name):
    model = quantized(MODELS[name])
    expected, before, config = outputs(model), model_state(model), model.config
    attributes = {module: vars(module).keys() for module in model.modules()}
    report = octavo.fuse_(model, batch_of(model), attention="float32")
    check_report(report, FUSED[name])
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before["tensors"][key]), key
    assert octavo.unfuse_(model) is model
    assert_unchanged(model, before)
    assert {module: vars(module).keys() for module in model.modules()} == attributes
    assert model.config is config
    assert_bits_equal(outputs(model), expected)


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_state_dict_loaded_into_a_fused_model_counts(make):
    """Also for the modules that come back: another model's weights stay loaded."""
    model, other = quantized(make), quantized(make)
    for parameter in other.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(1.25)
    octavo.fuse_(model, PADDED, attention="float32")
    outputs(model)
    model.load_state_dict(other.state_dict())
    expected = outputs(other)
    octavo.fuse_(other, PADDED, attention="float32")
    assert_bits_equal(outputs(model), outputs(other))
    assert_bits_equal(outputs(octavo.unfuse_(model)), expected)


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_assigned_parameters_stay_after_unfusing(make):
    model = make()
    octavo.fuse_(model, PADDED)
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.load_state_dict(doubled, assign=True, strict=False)
    octavo.unfuse_(model)
    assert all(torch.equal(tensor, doubled[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_copy_of_a_fused_model_is_one(make):
    model = quantized(make)
    plain = outputs(model)
    octavo.fuse_(model, PADDED)
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        expected, twin = outputs(model), copied(model)
        assert_bits_equal(outputs(twin), expected)
        assert_bits_equal(outputs(octavo.unfuse_(twin)), plain)
        assert_bits_equal(outputs(model), expected)  # and is a model of its own


@torch.no_grad()
def test_a_fused_model_compiles_to_the_bits_of_eager():
    torch.compiler.reset()
    model = quantized(lambda: llama(num_hidden_layers=1))
    octavo.fuse_(model, PADDED)
    y = torch.compile(model.model, backend="aot_eager")(input_ids=IDS, use_cache=False)[0]
    assert_bits_equal(y, model.model(input_ids=IDS, use_cache=False)[0])


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_saved_fused_model_is_loaded_as_the_one_before(make, tmp_path):
    """Files hold weights, not what was done to the modules around them."""
    model = quantized(make)
    expected = outputs(model)
    octavo.fuse_(model, PADDED)
    octavo.save(model, tmp_path / "octavo")
    assert_bits_equal(outputs(octavo.load(tmp_path / "octavo", make())), expected)
    model.save_pretrained(tmp_path / "transformers")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "transformers")
    assert config._attn_implementation != "octavo"


def test_fusing_and_running_under_autocast():
    model = quantized(llama)
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(model).float()
        report = octavo.fuse_(model, PADDED)
        found = outputs(model).float()
    assert not report.kept, report
    assert torch.cosine_similarity(found.flatten(), before.flatten(), 0) >= 0.999


def test_models_of_one_config_and_other_copies_are_not_touched():
    first = bert()
    second = type(first)(first.config).eval()
    octavo.fuse_(first, PADDED)
    assert first.config._attn_implementation == "octavo"
    assert second.config._attn_implementation == "sdpa"


def test_tied_weights_stay_tied():
    model = llama(tie_word_embeddings=True)
    octavo.fuse_(model, PADDED)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "llama"])
def test_a_bfloat16_model_is_fused(make):
    model = make().bfloat16()
    before = outputs(model).float()
    report = octavo.fuse_(model, PADDED)
    assert report.fused and not [row for row in report.kept if row.step != "activations"], report
    assert outputs(model).dtype == torch.bfloat16
    assert torch.cosine_similarity(outputs(model).float().flatten(), before.flatten(), 0) >= 0.999


def test_fusing_twice_finds_nothing_more_and_unfuses_at_once(caplog):
    model = quantized(llama)
    before = model_state(model)
    octavo.fuse_(model, PADDED)
    with caplog.at_level(logging.WARNING, "octavo"):
        assert octavo.fuse_(model, PADDED).fused == []
    assert "nothing was fused" in caplog.text
    assert_unchanged(octavo.unfuse_(model), before)


def test_a_part_and_then_the_whole():
    model = quantized(llama)
    before = model_state(model)
    with torch.no_grad():
        x = model.model.embed_tokens(IDS)
    octavo.fuse_(model.model.layers[0].mlp, x, attention=None)  # nothing in there can be replaced
    octavo.fuse_(model.model, {"input_ids": IDS})
    octavo.fuse_(model, PADDED)
    assert_unchanged(octavo.unfuse_(model), before)
    assert RECORD not in vars(model.model)


def test_the_model_goes_on_to_train_and_back():
    """A fused model passes gradients on: every step leaves to torch what wants one."""
    model = llama()
    plain = copy.deepcopy(model)
    octavo.fuse_(model, PADDED, attention="float32")
    for each in (model, plain):
        each.train()
        each(**PADDED, labels=IDS).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None, name
        assert (a.grad - b.grad).norm() <= 1e-4 * b.grad.norm(), name


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"attention": "bf16"}, ValueError, "'auto', 'float32', 'bfloat16', 'int8' and None"),
        ({"attension": "auto"}, TypeError, "attension"),
        ({"plain_attention": "yes"}, TypeError, "True or False"),
        ({"plain_attention": True, "attention": None}, ValueError, "needs a precision"),
        ({"min_cosine": 2}, ValueError, "-1 .. 1"),
        ({"min_cosine": True}, ValueError, "-1 .. 1"),
        ({"blocks": "all"}, TypeError, "blocks must be True or False, got 'all'"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, error, text):
    model = bert()
    before = model_state(model)
    with pytest.raises(error, match=text):
        octavo.fuse_(model, PADDED, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "example, error, text",
    [
        ("text", TypeError, "example is str"),
        ([], ValueError, "example is empty"),
        ([1], TypeError, "a batch is int"),
        ({"input_idz": IDS}, ValueError, "exactly one of input_ids"),
        (torch.full((1, 3), 99), IndexError, "range"),
    ],
)
def test_a_bad_example_leaves_the_model_as_it_was(example, error, text):
    model = quantized(bert)
    before, config = model_state(model), model.config
    with pytest.raises(error, match=text):
        octavo.fuse_(model, example)
    assert_unchanged(model, before)
    assert model.config is config


def test_a_model_that_is_none_or_trains_or_is_empty_is_refused():
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, got str"):
        octavo.fuse_("model", IDS)
    with pytest.raises(TypeError, match="unfuse_: model must be"):
        octavo.unfuse_(None)
    with pytest.raises(ValueError, match=r"training mode.*call model.eval\(\) first"):
        octavo.fuse_(bert().train(), PADDED)
    model = bert()
    model.encoder.layer[0].train()
    with pytest.raises(ValueError, match=r"encoder.layer.0 is in training mode"):
        octavo.fuse_(model, PADDED)
    with pytest.raises(ValueError, match="0.weight is on the meta device"):
        octavo.fuse_(nn.Sequential(nn.Linear(2, 2, device="meta")).eval(), torch.ones(1, 2))
    with pytest.raises(ValueError, match="compiled; fuse the model, then compile it"):
        octavo.fuse_(torch.compile(nn.Sequential().eval()), PADDED)


def test_an_error_on_the_way_undoes_everything(monkeypatch):
    """Whatever fails after some steps are done: here the last one."""

    def find(*_):
        raise KeyError("broken")

    model = quantized(llama)
    before, config = model_state(model), model.config
    monkeypatch.setattr(octavo.fusion.steps.norms.Norms, "find", find)
    with pytest.raises(KeyError, match="broken"):
        octavo.fuse_(model, PADDED)
    assert_unchanged(model, before)
    assert model.config is config and RECORD not in vars(model)


def test_a_step_that_moves_the_output_is_taken_back():
    model = quantized(llama)
    before = model_state(model)
    report = octavo.fuse_(model, PADDED, attention=None, min_cosine=1.0)
    if report.output is None or report.output.cosine < 1.0:  # rounding may well leave it at 1
        assert_unchanged(model, before)


def test_unfusing_what_is_not_fused_does_nothing():
    model = bert()
    before = model_state(model)
    assert_unchanged(octavo.unfuse_(model), before)


# --- the report -----------------------------------------------------------------------------------------------------


def test_the_report_as_text_html_and_dict():
    model = quantized(bert)
    report = octavo.fuse_(model, PADDED)
    text, html, plain = str(report), report._repr_html_(), report.to_dict()
    for row in report.rows:
        assert (row.name or "(the model)") in text and row.reason in text and row.step in html
    assert "3 of 4 places fused" in text and repr(report) == "FusionReport(3 of 4 places fused)"
    assert [row["action"] for row in plain["rows"]] == [row.action for row in report.rows]
    assert plain["outputs"]["attention"]["cosine"] == report.outputs["attention"].cosine
    assert octavo.FusionReport().output is None


def test_a_model_with_nothing_to_fuse_says_so():
    report = octavo.fuse_(nn.Sequential(nn.Linear(3, 3)).eval(), torch.ones(2, 3))
    (row,) = report.rows
    assert (row.step, row.action) == ("attention", "kept") and "no model of transformers" in row.reason


def test_a_model_that_loses_its_cache_is_noticed(monkeypatch):
    """The example is a whole text: only writing with the cache shows it."""
    update = AttentionCall.updated
    monkeypatch.setattr(
        AttentionCall,
        "updated",
        lambda self, cache, given, options, *states: (update(self, cache, given, options, *states), states)[
            1
        ][:2],
    )
    model = llama()
    expected = outputs(model, {"input_ids": IDS})
    report = octavo.fuse_(model, {"input_ids": IDS}, attention="float32")
    rows = [row for row in report.rows if row.step == "rotary"]
    assert [row.action for row in rows] == ["kept", "kept"]
    assert all("for tokens that it reads with its cache" in row.reason for row in rows), report
    assert (outputs(model, {"input_ids": IDS}) - expected).norm() <= 2**-14 * expected.norm()
