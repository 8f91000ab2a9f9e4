# SPDX-License-Identifier: Apache-2.0
"""torch.compile takes quantized models whole: one graph (fullgraph=True refuses a break), and the bits of eager mode.

aot_eager traces as inductor does and then runs torch's own kernels, so that every bit of a model must agree; inductor
writes other code for what stands between our layers, so it gets a model where that is exact.
"""

import pytest
import torch
from asserts import assert_bits_equal
from models import IDS, every_scheme, model
from torch import nn

import octavo
from octavo.nn import QuantLinear


@pytest.fixture(autouse=True)
def forget_graphs():
    torch.compiler.reset()


def compiled(m: nn.Module, backend: str = "aot_eager", **options):
    return torch.compile(m, fullgraph=True, backend=backend, **options)


@every_scheme
@torch.no_grad()
def test_a_model_is_one_graph_with_the_bits_of_eager(scheme):
    m = octavo.quantized(model().eval(), scheme, data=IDS)
    assert_bits_equal(compiled(m)(IDS), m(IDS))


@torch.no_grad()
def test_inductor_changes_no_bit_of_the_layers():
    torch.manual_seed(0)
    m = octavo.quantized(nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 20)), octavo.Int8Dynamic())
    x = torch.randn(3, 70)
    assert_bits_equal(compiled(m, "inductor")(x), m(x))


@torch.no_grad()
def test_one_graph_serves_every_batch_size():
    m = octavo.quantized(model().eval(), octavo.Int8Dynamic())
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    run = compiled(m, count, dynamic=True)
    for batch in (2, 3, 7):
        ids = IDS[:1].expand(batch, -1)
        assert_bits_equal(run(ids), m(ids))
    assert len(graphs) == 1


@torch.no_grad()
def test_tracing_a_layer_that_was_never_run_leaves_it_unpacked():
    """Packing in the trace would change the module; the graph packs instead."""
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (20, 70), dtype=torch.int8)
    m = nn.Sequential(QuantLinear.from_codes(codes, torch.ones(20, 1), None, octavo.Int8Dynamic()))
    x = torch.randn(3, 70)
    y = compiled(m)(x)
    assert not m[0].is_packed
    assert_bits_equal(y, m(x))


def test_gradients_pass_a_compiled_model():
    torch.manual_seed(0)
    m = octavo.quantized(nn.Sequential(nn.Linear(70, 40), nn.ReLU(), nn.Linear(40, 20)), octavo.Int8Dynamic())
    x = torch.randn(3, 70)
    eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    m(eager_x).sum().backward()
    compiled(m)(compiled_x).sum().backward()
    assert_bits_equal(compiled_x.grad, eager_x.grad)


# --- transformers ---------------------------------------------------------------------------------------------------


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))


def tiny_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 88}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, use_cache=False, **sizes))


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
@torch.no_grad()
def test_a_transformer_is_one_graph_with_the_bits_of_eager(make):
    torch.manual_seed(0)
    m = make().eval()
    report = octavo.quantize_(m, octavo.Int8Dynamic())
    assert len(report.quantized) > 10
    ids = torch.arange(14).reshape(2, 7)
    assert_bits_equal(compiled(m)(ids)[0], m(ids)[0])
