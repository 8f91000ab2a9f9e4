# SPDX-License-Identifier: Apache-2.0
"""Programs of fused blocks: a large batch in parts gives the bits of the batch at once."""

import copy
import functools

import pytest
import torch
from fusion_models import bert, llama, options_of, vit

import octavo
from octavo.nn import FusedBlock
from octavo.nn.fused.fused_block import BlockProgram

IDS = torch.arange(70).reshape(10, 7) % 60 + 1
PADDING = torch.arange(7) < torch.arange(10)[:, None] % 7 + 1
MODELS = {
    "bert": (bert, {"input_ids": IDS}),
    "padded bert": (bert, {"input_ids": IDS, "attention_mask": PADDING.long()}),
    "llama": (
        lambda: llama(use_cache=False).model,
        {"input_ids": IDS, "attention_mask": PADDING.flip(1).long()},
    ),
    "vit": (vit, {"pixel_values": torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))}),
}


def fused_model(name):
    return copy.deepcopy(_fused_model(name))


@functools.cache
def _fused_model(name):
    make, inputs = MODELS[name]
    model = make()
    octavo.quantize_(model, octavo.Int8Dynamic())
    octavo.fuse_(model, {name: tensor[:2] for name, tensor in inputs.items()}, blocks=True, min_cosine=0.9)
    assert any(isinstance(module, FusedBlock) for module in model.modules())
    return model


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.fixture
def batch_sizes(monkeypatch):
    """The batch of every run of a program's steps, with one thread."""
    sizes = []
    steps = BlockProgram._run
    monkeypatch.setattr(
        BlockProgram, "_run", lambda self, slots: sizes.append(len(slots[0])) or steps(self, slots)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield sizes
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_of_a_batch_give_the_bits_of_all_of_it(name, threads, batch_sizes, monkeypatch):
    model, inputs = fused_model(name), MODELS[name][1]
    rows = run(model, inputs).shape[1]
    torch.set_num_threads(threads)
    batch_sizes.clear()
    expected = run(model, inputs)
    assert batch_sizes == [10] * 2
    batch_sizes.clear()
    monkeypatch.setattr(BlockProgram, "rows_at_a_time", 3 * rows)
    assert torch.equal(run(model, inputs), expected)
    assert batch_sizes == ([3, 3, 4] * 2 if threads == 1 else [10] * 2)


def test_a_mask_of_other_axes_is_not_cut(batch_sizes, monkeypatch):
    """[length, length] of as many positions as items: cut along its first axis it would be rows of queries. The block
    was exported with a mask of four axes, so this call is the original's."""
    model, inputs = fused_model("padded bert"), MODELS["padded bert"][1]
    block = model.encoder.layer[0]
    x, mask = torch.randn(7, 7, 64), torch.ones(7, 7, dtype=torch.bool).tril()
    options = options_of(block, model, inputs)
    with torch.no_grad():
        expected = copy.deepcopy(block)(x, mask.expand(7, 1, 7, 7), **options)
        monkeypatch.setattr(BlockProgram, "rows_at_a_time", 7)
        batch_sizes.clear()
        by_original = block(x, mask, **options)
        assert (
            batch_sizes == [] and (by_original - expected).norm() <= 2**-6 * expected.norm()
        )  # of other codes
        by_list = block(x, mask.expand(7, 1, 7, 7), **options)
        assert torch.equal(by_list, expected) and batch_sizes == [1] * 7
