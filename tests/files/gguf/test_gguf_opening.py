# SPDX-License-Identifier: Apache-2.0
"""Models out of GGUF files: every weight is what the file's blocks decode to, in the place where it belongs, and the
model computes what the float model of these weights does."""

import contextlib
import io
import re

import pytest
import torch
from torch import nn

import octavo
from octavo.files.gguf import load_gguf
from octavo.nn import QuantEmbedding, QuantLinear

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from gguf_files import ARCHITECTURES, IDS, tiny, write  # noqa: E402

MIXED = {
    "attn_(q|qkv)": "Q4_1",
    "attn_k": "Q5_0",
    "attn_v": "F16",
    "ffn_down": "Q4_0",
    "exps": "Q8_0",
    "": "Q8_0",
}


def opened(architecture, folder, types=MIXED, **options):
    """The float model with what the file decodes to, and the model that was opened."""
    made = tiny(architecture)
    path = write(architecture, made, folder / f"{architecture}.gguf", types)
    model, tokenizer = load_gguf(path, tokenizer=False, **options)
    assert tokenizer is None
    return made.model, model, path


def weights_of(model):
    """{name: the values of each tensor}, of quantized layers as float matrices in the shape of the float layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[f"{name}.weight"] = module.replaces.weight(module.dequantize())
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias
        elif type(module).__module__.startswith("octavo."):
            found[f"{name}.weight"] = module.dequantize()
        else:
            found |= {f"{name}.{leaf}": each for leaf, each in module._parameters.items() if each is not None}
    return joined(found)


def joined(weights):
    """`weights`, those of experts, which are layers, as transformers has them: one tensor for all."""
    found, experts = {}, {}
    for name, weight in weights.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if match:
            experts.setdefault(f"{match[1]}.{match[3]}", []).append(weight)
        else:
            found[name] = weight
    return found | {name: torch.stack(each) for name, each in experts.items()}


def output_of(model, ids=IDS):
    with torch.no_grad():
        result = model(input_ids=ids)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def rounding_bound(model, ids=IDS):
    """How far the outputs may move when every linear layer reads 16-bit codes: measured to first order on the float
    model. Inputs are moved by 2**-9 of the largest of their row, in random directions, the outputs' shift is scaled to
    the half step of 2**-16 that rounding moves them by, and doubled twice: for directions and for sums in float32."""
    generator = torch.Generator().manual_seed(0)

    def moved(module, args):
        x = args[0]
        signs = torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
        return (x + signs * x.abs().amax(-1, keepdim=True) * 2**-9,)

    exact = output_of(model, ids)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    hooks = [m.register_forward_pre_hook(moved) for m in model.modules() if isinstance(m, kinds)]
    shift = (output_of(model, ids) - exact).abs().max()
    for hook in hooks:
        hook.remove()
    return 4 * shift * 2**-16 / 2**-9


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_exact_and_the_model_computes_what_the_float_model_does(architecture, tmp_path):
    expected, model, _ = opened(architecture, tmp_path, activations="int16")
    found = weights_of(model)
    for name, parameter in expected.named_parameters(remove_duplicate=False):
        if name in found:
            assert torch.equal(found[name], parameter), name
    assert {name for name, _ in expected.named_parameters()} <= found.keys()
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert (output_of(model) - output_of(expected)).abs().max() <= rounding_bound(expected)


@pytest.mark.parametrize("architecture", [each for each in ARCHITECTURES if each not in ("gemma", "bert")])
def test_weights_are_those_that_transformers_reads(architecture, tmp_path):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    expected, model, path = opened(architecture, tmp_path)
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=expected)["tensors"]
    found = weights_of(model)
    assert len(theirs) > 5
    for name, tensor in theirs.items():
        assert torch.equal(found[name], tensor), name


def test_every_matrix_of_blocks_is_packed_with_its_type(tmp_path):
    _, model, path = opened("llama", tmp_path)
    types = {
        name: module.scheme.weights.type
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and hasattr(module.scheme.weights, "type")
    }
    assert types["model.layers.0.self_attn.q_proj"] == "Q4_1"
    assert types["model.layers.1.mlp.down_proj"] == "Q4_0"
    assert types["lm_head"] == "Q8_0"
    half = model.model.layers[0].self_attn.v_proj
    assert half.scheme == octavo.HalfWeightOnly("float16") and half.weight.dtype == torch.float32


def test_a_tied_head_shares_the_blocks_of_the_embedding(tmp_path):
    _, model, _ = opened("gpt2", tmp_path)
    assert model.config.tie_word_embeddings
    head, embedding = model.lm_head, model.transformer.wte
    assert isinstance(embedding, QuantEmbedding) and head.scheme.weights.type == "Q8_0"
    assert head.packed.data_ptr() == embedding.packed.data_ptr()
    rows = embedding(IDS)
    assert torch.equal(rows, head.dequantize()[IDS])


def test_load_gives_the_same_model(tmp_path):
    _, model, path = opened("qwen2", tmp_path)
    assert torch.equal(output_of(octavo.load(path)), output_of(model))


def test_rope_frequencies_of_the_file_are_used(tmp_path):
    """Llama 3.1 divides the frequencies by a tensor of the file. Where it is ones, nothing changes."""
    made = tiny("llama")
    made.model.model.register_parameter("rope_freqs", None)
    outputs = {}
    for factor in (1.0, 4.0):
        path = write(
            "llama", made, tmp_path / f"{factor}.gguf", extra={"rope_freqs.weight": torch.full((8,), factor)}
        )
        outputs[factor] = output_of(load_gguf(path, False, activations="int16")[0])
    made.model.model.rotary_emb.inv_freq /= 4
    assert (outputs[4.0] - output_of(made.model)).abs().max() <= rounding_bound(made.model)
    assert not torch.equal(outputs[1.0], outputs[4.0])


def test_what_is_not_opened_is_refused_by_name(tmp_path):
    made = tiny("llama")
    path = write("llama", made, tmp_path / "a.gguf")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match="architecture 'mamba'; opened are llama, qwen2"):
        load_gguf(path)
    path.write_bytes(content.replace(b"blk.1.attn_q.weight", b"blk.1.attn_Q.weight"))
    with pytest.raises(ValueError, match="has no place for: blk.1.attn_Q.weight"):
        load_gguf(path)
    with pytest.raises(ValueError, match="load_gguf: .* is not a safetensors file"):
        (tmp_path / "b.gguf").write_bytes(b"nothing")
        load_gguf(tmp_path / "b.gguf")
