# SPDX-License-Identifier: Apache-2.0
"""Blocks as short lists of operators: the same numbers for every size of input, and calls left to the original."""

import copy
import functools
import pickle
import sys

import pytest
import torch
from fusion_models import options_of
from torch import nn

import octavo
from octavo import ops
from octavo.fusion import step
from octavo.fusion.blocks import patterns
from octavo.fusion.blocks.blocks import Blocks
from octavo.fusion.fuse import run_steps
from octavo.nn import FusedBlock
from octavo.nn.fused.attention_call import cache_parameter

transformers = pytest.importorskip("transformers")
CACHE = cache_parameter(transformers.LlamaModel.forward)
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
IDS = torch.arange(14).reshape(2, 7)
PADDED = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


def _bert():
    return transformers.BertModel(transformers.BertConfig(vocab_size=64, **SIZES))


def _roberta():
    return transformers.RobertaModel(transformers.RobertaConfig(vocab_size=64, **SIZES))


def _distilbert():
    config = transformers.DistilBertConfig(vocab_size=64, dim=64, n_layers=2, n_heads=4, hidden_dim=128)
    return transformers.DistilBertModel(config)


def _vit():
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **SIZES))


def _llama():
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, use_cache=False, **SIZES)
    return transformers.LlamaModel(config)


def _gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, use_cache=False)
    return transformers.GPT2Model(config)


def _t5():
    config = transformers.T5Config(vocab_size=64, d_model=64, d_kv=16, num_layers=2, num_heads=4, d_ff=128)
    return transformers.T5EncoderModel(config)


FAMILIES = {"bert": _bert, "roberta": _roberta, "distilbert": _distilbert, "vit": _vit, "llama": _llama}


def example_of(name, batch=2, length=7):
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    return {"input_ids": torch.arange(batch * length).reshape(batch, length) % 64}


def model_of(name, scheme=None):
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    with torch.no_grad():  # biases and norms that are not 0 and 1
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if scheme is not None:
        octavo.quantize_(model, scheme)
    return model


@functools.cache
def _fused(name, scheme):
    """A fused model, to be copied, and what the report says."""
    model = model_of(name, scheme)
    return model, run_steps(model, example_of(name), [Blocks("float32")], 0.99)


def fused_of(name, scheme=None):
    return copy.deepcopy(_fused(name, scheme)[0])


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, FusedBlock)]


@pytest.fixture
def calls(monkeypatch):
    """Names of the operators that fused blocks call, in order."""
    names = []

    def counted(name, function):
        def call(*args, **options):
            names.append(name)
            return function(*args, **options)

        return call

    linear = ["linear_dynamic", "linear_codes"]
    for name in (*linear, "attention", "add_norm", "add_norm_codes", "rope", "rms_norm", "silu_mul"):
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    return names


# --- what is fused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_is_fused_and_the_report_has_its_error(name):
    model, report = _fused(name, octavo.Int8Dynamic())
    assert [(row.action, row.reason) for row in report.rows] == [("fused", "")] * 2
    assert all(row.error is not None for row in report.rows)
    assert len(blocks_of(model)) == 2


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
@pytest.mark.parametrize(("batch", "length"), [(2, 7), (1, 1), (3, 20), (7, 7)])
def test_fused_float_models_are_as_exact_as_the_original_for_any_size(name, batch, length):
    """Both round as many operations, in another order: against float64 neither is more than a few times the other."""
    inputs = example_of(name, batch, length)
    model, fused = model_of(name), fused_of(name)
    exact = run(copy.deepcopy(model).double(), **{k: _double(x) for k, x in inputs.items()})
    own = (run(model, **inputs) - exact).abs().max()
    assert (run(fused, **inputs) - exact).abs().max() <= 4 * own


def _double(x):
    return x.double() if x.is_floating_point() else x


def test_a_bert_layer_is_seven_calls(calls):
    fused = fused_of("bert", octavo.Int8Dynamic())
    run(fused, input_ids=IDS)
    attention = ["linear_dynamic", "attention", "linear_dynamic", "add_norm_codes"]
    assert calls[:14] == [*attention, "linear_codes", "linear_dynamic", "add_norm"] * 2  # then the pooler


def test_a_llama_layer_is_nine_calls(calls):
    fused = fused_of("llama", octavo.Int8Dynamic())
    run(fused, input_ids=IDS)
    first = ["rms_norm", "linear_dynamic", "rope", "attention", "linear_dynamic", "add_norm_codes"]
    assert calls == [*first, "linear_codes", "silu_mul", "linear_dynamic"] * 2


def test_a_fused_bert_layer_equals_the_seven_operators_bit_for_bit():
    model, fused = (f("bert", octavo.Int8Dynamic()) for f in (model_of, fused_of))
    layer, x = model.encoder.layer[0], torch.randn(2, 7, 64)

    def linear(module, x, activation=None):
        module.pack_()
        tensors = (module.packed, module.column_sum, module.weight_scale, module.bias)
        return ops.linear_dynamic(x, *tensors, True, activation)

    with torch.no_grad():
        own = layer.attention.self
        q, k, v = (linear(m, x).view(2, 7, 4, 16).transpose(1, 2) for m in (own.query, own.key, own.value))
        y = linear(layer.attention.output.dense, ops.attention(q, k, v, precision="float32"))
        norm = layer.attention.output.LayerNorm
        middle, _ = ops.add_norm(y, x, norm.weight, norm.bias, norm.eps)
        y = linear(layer.output.dense, linear(layer.intermediate.dense, middle, "gelu"))
        norm = layer.output.LayerNorm
        expected, _ = ops.add_norm(y, middle, norm.weight, norm.bias, norm.eps)
        options = options_of(fused.encoder.layer[0], fused, {"input_ids": IDS})
        assert torch.equal(fused.encoder.layer[0](x, None, **options), expected)


@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_passing_codes_changes_no_bit(name, monkeypatch):
    inputs = example_of(name)
    with_codes = run(fused_of(name, octavo.Int8Dynamic()), **inputs)
    known = patterns._is_dynamic
    monkeypatch.setattr(
        patterns, "_is_dynamic", lambda layer, symmetric=None: symmetric is None and known(layer)
    )
    model = model_of(name, octavo.Int8Dynamic())
    run_steps(model, inputs, [Blocks("float32")], 0.99)
    assert len(blocks_of(model)) == 2 and torch.equal(run(model, **inputs), with_codes)


@pytest.mark.parametrize("scheme", [octavo.Int8Dynamic(symmetric=False), octavo.Int8WeightOnly()])
def test_other_schemes_run_by_their_own_operator(scheme):
    """Products are the same bits, so only norms and attention can differ."""
    inputs = example_of("bert")
    model = model_of("bert", scheme)
    report = run_steps(model, inputs, [Blocks("float32")], 0.99)
    assert [row.action for row in report.rows] == ["fused"] * 2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_one_example_without_padding_serves_padded_batches(name):
    """Hidden positions count for nothing, so a shorter row alone gives what it gives padded, up to rounding."""
    fused = fused_of(name)
    padded = run(fused, input_ids=IDS, attention_mask=PADDED)[1, :4]
    exact = run(model_of(name).double(), input_ids=IDS, attention_mask=PADDED)[1, :4]
    own = run(model_of(name), input_ids=IDS, attention_mask=PADDED)[1, :4]
    assert (padded - exact).abs().max() <= 4 * (own - exact).abs().max()


# --- what is left to the original -----------------------------------------------------------------------------------


def test_calls_with_a_cache_run_the_original():
    ids = example_of("llama")["input_ids"]
    model, fused = (f("llama", octavo.Int8Dynamic()) for f in (model_of, fused_of))
    with torch.no_grad():
        assert torch.equal(
            fused(ids, use_cache=True).last_hidden_state, model(ids, use_cache=True).last_hidden_state
        )


def test_a_hook_inside_a_block_is_called(calls):
    fused, seen = fused_of("bert", octavo.Int8Dynamic()), []
    expected = run(fused, input_ids=IDS)
    calls.clear()
    dense = blocks_of(fused)[0].attention.output.dense
    handle = dense.register_forward_hook(lambda module, args, output: seen.append(output))
    run(fused, input_ids=IDS)
    assert len(seen) == 1 and calls.count("add_norm_codes") == 1
    handle.remove()
    assert torch.equal(run(fused, input_ids=IDS), expected) and len(seen) == 1


def test_a_block_with_a_hooked_layer_is_kept():
    model = model_of("bert")
    model.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    rows = run_steps(model, example_of("bert"), [Blocks("float32")], 0.99).rows
    assert [row.reason for row in rows] == ["", step.MODULE_HAS_HOOKS]


def test_a_hook_on_a_block_sees_its_input_and_output(calls):
    fused, seen = fused_of("bert", octavo.Int8Dynamic()), []
    blocks_of(fused)[1].register_forward_hook(lambda module, args, output: seen.append(output))
    assert torch.equal(run(fused, input_ids=IDS), seen[0]) and calls.count("add_norm_codes") == 2


def test_hidden_states_are_recorded_as_before(calls):
    """transformers hangs hooks into blocks, or tells each one: the original runs then, and ours in later calls."""
    model, fused = (f("bert", octavo.Int8Dynamic()) for f in (model_of, fused_of))
    with torch.no_grad():
        states, expected = (m(IDS, output_hidden_states=True).hidden_states for m in (fused, model))
    assert len(states) == 3 and all(map(torch.equal, states, expected))
    run(fused, input_ids=IDS)
    assert calls.count("add_norm_codes") == 2


def test_training_runs_the_original():
    model, fused = model_of("bert").train(), fused_of("bert").train()
    torch.manual_seed(1)
    expected = run(model, input_ids=IDS)
    torch.manual_seed(1)
    assert torch.equal(run(fused, input_ids=IDS), expected)


def test_gradients_are_those_of_the_original():
    model, fused = model_of("bert"), fused_of("bert")
    for each in (model, fused):
        each(IDS).last_hidden_state.sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), fused.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


def test_a_layer_that_was_replaced_is_used():
    fused = fused_of("bert")
    expected = run(fused, input_ids=IDS)
    output = blocks_of(fused)[0].output
    output.dense = nn.Linear(128, 64)
    assert not torch.equal(run(fused, input_ids=IDS), expected)


def test_autocast_runs_the_original():
    model, fused = model_of("bert"), fused_of("bert")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(fused, input_ids=IDS), run(model, input_ids=IDS))


def test_a_compiler_traces_the_original(calls, monkeypatch):
    fused = fused_of("bert", octavo.Int8Dynamic())
    monkeypatch.setattr(sys.modules["octavo.nn.fused.fused_block"], "_is_compiling", lambda: True)
    run(fused, input_ids=IDS)
    assert "add_norm" not in calls


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_gpt2, "operator split is not understood"),
        (_t5, "returns more than one tensor"),
        (lambda: _bert().bfloat16(), "computes in bfloat16, float32 is served"),
        (
            lambda: transformers.LlamaModel(transformers.LlamaConfig(vocab_size=64, **SIZES)),
            f"its argument {CACHE} is a DynamicCache: such calls are left to the original",
        ),
    ],
    ids=["gpt2", "t5", "bfloat16", "cache"],
)
def test_other_blocks_are_left_alone_with_the_reason(make, reason):
    model = make().eval()
    before = dict(model.named_modules())
    report = run_steps(model, {"input_ids": IDS}, [Blocks("float32")], 0.99)
    assert {(row.action, row.reason) for row in report.rows} == {("kept", reason)}
    assert dict(model.named_modules()) == before


# --- a fused model is still the model -------------------------------------------------------------------------------


def test_names_and_state_stay_and_unfuse_brings_the_same_modules_back():
    model = model_of("bert", octavo.Int8Dynamic())
    modules, state = dict(model.named_modules()), model.state_dict()
    run_steps(model, example_of("bert"), [Blocks("float32")], 0.99)
    assert list(dict(model.named_modules())) == list(modules)
    found = model.state_dict()
    assert list(found) == list(state) and all(torch.equal(found[name], state[name]) for name in state)
    assert isinstance(model.encoder.layer[0], type(modules["encoder.layer.0"]))
    octavo.unfuse_(model)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_blocks_come_after_the_other_steps_and_all_are_taken_back(name, calls):
    model, inputs = model_of(name, octavo.Int8Dynamic()), example_of(name)
    modules, expected = dict(model.named_modules()), run(model, **inputs)
    report = octavo.fuse_(model, inputs, blocks=True)
    assert [row.action for row in report.rows if row.step == "blocks"] == ["fused"] * 2
    calls.clear()
    run(model, **inputs)
    assert calls.count("linear_codes") == 2
    octavo.unfuse_(model)
    assert dict(model.named_modules()) == modules and torch.equal(run(model, **inputs), expected)


def test_what_is_loaded_into_a_fused_model_is_computed_with():
    scheme = octavo.Int8Dynamic()
    torch.manual_seed(5)
    other = FAMILIES["bert"]().eval()
    octavo.quantize_(other, scheme)
    fused = fused_of("bert", scheme)
    run(fused, input_ids=IDS)
    fused.load_state_dict(other.state_dict())
    run_steps(other, example_of("bert"), [Blocks("float32")], 0.99)
    assert torch.equal(run(fused, input_ids=IDS), run(other, input_ids=IDS))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_weights_of_their_own(copied, calls):
    fused = fused_of("bert", octavo.Int8Dynamic())
    expected = run(fused, input_ids=IDS)
    twin = copied(fused)
    calls.clear()
    assert torch.equal(run(twin, input_ids=IDS), expected) and calls.count("add_norm_codes") == 2
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.mul_(2)
    assert torch.equal(run(fused, input_ids=IDS), expected) and not torch.equal(
        run(twin, input_ids=IDS), expected
    )


def test_a_forward_put_on_a_layer_is_called_in_copies_as_well():
    fused = fused_of("bert", octavo.Int8Dynamic())
    expected = run(fused, input_ids=IDS)
    dense = blocks_of(fused)[0].output.dense
    dense.forward = lambda x: torch.zeros(*x.shape[:-1], 64)
    assert not torch.equal(run(fused, input_ids=IDS), expected)


def test_layers_that_no_longer_fit_together_run_the_original():
    model, fused = (f("bert", octavo.Int8Dynamic()) for f in (model_of, fused_of))
    for each in (model, fused):
        run(each, input_ids=IDS)
        each.encoder.layer[0].attention.self.query.bfloat16()  # its bias: those of the others stay float32
    args = torch.randn(2, 7, 64), None
    assert torch.equal(fused.encoder.layer[0](*args), model.encoder.layer[0](*args))


def test_the_fused_layers_hold_their_weights_once():
    fused = fused_of("bert", octavo.Int8Dynamic())
    run(fused, input_ids=IDS)
    own = blocks_of(fused)[0].attention.self
    first, second = own.query.packed, own.key.packed
    assert second.data_ptr() == first.data_ptr() + first.nbytes
