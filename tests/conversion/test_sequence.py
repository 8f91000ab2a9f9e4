# SPDX-License-Identifier: Apache-2.0
"""Block by block: each layer learns from what the quantized ones before it give, whatever the model looks like."""

import pytest
import torch
from torch import nn

import octavo
from octavo import GPTQ, Int4WeightOnly
from octavo.conversion import sequence
from octavo.methods.statistics import InputStatistics, Positions, inputs_recorded
from octavo.nn import QuantLinear

SCHEME = Int4WeightOnly(16, method=GPTQ())


class Block(nn.Module):
    """Reads x under another name in each call, and gives a tuple."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, scale, x=None):
        return x + scale * self.down(self.up(self.norm(x)).relu()), None


class Net(nn.Module):
    """Layers before, between and after two lists of blocks; the second list runs first in the order of attributes."""

    def __init__(self, joins: bool = False):
        super().__init__()
        self.decoder = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 8)
        self.encoder = nn.ModuleList(Block() for _ in range(3))
        self.first, self.middle = nn.Linear(16, 32), nn.Linear(32, 32)
        self.joins = joins

    def forward(self, x):
        x = self.first(x)
        for i, block in enumerate(self.encoder):
            x = block(0.5, x=x + 0.1 if self.joins and i else x)[0]  # nobody hands a sum on
        x = self.middle(x)
        for block in self.decoder:
            x = block(1.0, x=x)[0]
        return self.head(x)


def net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options).eval()


def batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 40, 16) for _ in range(3)]


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: layer.dequantize() for name, layer in model.named_modules() if isinstance(layer, QuantLinear)
    }


def same(one: nn.Module, other: nn.Module) -> bool:
    found, expected = codes(one), codes(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("joins", [False, True], ids=["a chain", "sums between blocks"])
def test_each_layer_learns_from_the_quantized_ones_before_it(joins):
    """An oracle: part after part, X^T X of the half-quantized model, run from its beginning."""
    model, expected = net(joins=joins), net(joins=joins)
    parts = ["first", "encoder.0", "encoder.1", "encoder.2", "middle", "decoder.0", "decoder.1", "head"]
    octavo.quantize_(model, SCHEME, data=batches())
    for part in parts:
        root = expected.get_submodule(part)
        own = {
            m: n for n, m in expected.named_modules() if isinstance(m, nn.Linear) and m in set(root.modules())
        }
        for layer in own:
            layer.statistics, layer.name = None, ""
        with torch.no_grad(), inputs_recorded(expected, list(own)):
            for batch in batches():
                expected(batch)
        for layer, name in own.items():
            q = GPTQ().codes(SCHEME.weights, layer.weight.detach(), layer.statistics.gram)
            new = SCHEME.layer.from_tensors(
                SCHEME.weights.store(q), layer.bias, SCHEME, shape=tuple(layer.weight.shape)
            )
            parent, _, attribute = name.rpartition(".")
            setattr(expected.get_submodule(parent), attribute, new)
    assert same(model, expected) and len(codes(model)) == 13


def test_running_the_whole_model_for_each_block_gives_the_same_bits(monkeypatch):
    once = octavo.quantized(net(), SCHEME, data=batches())
    monkeypatch.setattr(sequence.BlockSequence, "_calls", lambda self, blocks: None)
    assert same(octavo.quantized(net(), SCHEME, data=batches()), once)


def test_a_chain_computes_each_block_twice_after_the_first_look():
    model, runs = net(), []
    for block in model.decoder:
        block.register_forward_hook(lambda *_: runs.append(1))
    octavo.quantize_(model, SCHEME, data=batches())
    # Which lists run, on one batch; what the blocks are called with, on three; twice; and for the head after them.
    assert len(runs) == 2 * (1 + 3 + 2 * 3 + 3)


def test_in_place_copies_and_originals_agree_and_blocks_may_be_kept():
    model, original = net(), net()
    copy = octavo.quantized(original, SCHEME, data=batches(), exclude=["encoder.0.*", "encoder.1.up"])
    report = octavo.quantize_(model, SCHEME, data=batches(), exclude=["encoder.0.*", "encoder.1.up"])
    assert same(copy, model) and len(report.quantized) == 10 and not codes(original)
    assert torch.equal(copy(batches()[0]), model(batches()[0]))


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch):
    model, count = net(), []
    before, y = dict(model.named_modules()), model(batches()[0])
    freeze = Int4WeightOnly.freeze

    def interrupted(self, prepared, shares=None):
        count.append(1)
        if len(count) == 6:
            raise KeyboardInterrupt
        return freeze(self, prepared, shares)

    monkeypatch.setattr(Int4WeightOnly, "freeze", interrupted)
    with pytest.raises(KeyboardInterrupt):
        octavo.quantize_(model, SCHEME, data=batches())
    assert dict(model.named_modules()) == before and torch.equal(model(batches()[0]), y)


def test_other_schemes_in_the_same_model_take_part():
    schemes = {"encoder.*": SCHEME, "decoder.0.*": octavo.Int8Static(), "*": octavo.Int8Dynamic()}
    model = octavo.quantized(net(), schemes, data=batches())
    assert model.decoder[0].up.input_scale != 1 and len(codes(model)) == 13
    y, expected = model(batches()[0]), net()(batches()[0])
    assert (y - expected).norm() < 0.2 * expected.norm()


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="data is empty; give at least one batch"):
        octavo.quantize_(net(), SCHEME, data=[])


# --- positions --------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        return self.linear(x)


def test_padding_does_not_count_and_a_tensor_that_two_read_is_multiplied_once():
    model, x = Masked(), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model.linear.statistics, model.linear.name = None, ""
    with inputs_recorded(model, [model.linear]):
        model(x, attention_mask=mask)
        model(x, attention_mask=torch.ones(2, 5))
    kept = torch.cat([x[mask.bool()], x.reshape(-1, 8)])
    found = model.linear.statistics
    assert isinstance(found, InputStatistics) and found.rows == 18
    torch.testing.assert_close(found.gram, (kept.T @ kept).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.absolute, kept.abs().sum(0).double(), rtol=1e-5, atol=0)
    positions = Positions(model)
    positions.masks = [mask.bool()]
    model.linear.statistics = None
    with inputs_recorded(model, [model.linear], positions):
        model(x)
    assert model.linear.statistics.rows == 8
