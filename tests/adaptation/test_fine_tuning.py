# SPDX-License-Identifier: Apache-2.0
"""The whole way: a language model of 4 bits learns a text through LoRA, the adapter is saved, loaded and merged."""

import pytest
import torch

import octavo

pytest.importorskip("transformers")

from tiny_models import llama

TEXT = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43]])
TARGETS = "*_proj"


def quantized_llama():
    model = llama()
    octavo.quantize_(model, octavo.Int4WeightOnly(group_size=16), include=TARGETS)
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_of_four_bits_learns_and_its_adapter_travels(checkpointing, tmp_path):
    model = quantized_llama()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    octavo.adapt_(model, octavo.LoRA(r=4, alpha=8))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.Adam(octavo.adapters(model), lr=0.02)
    losses = []
    for _ in range(12):
        loss = model(TEXT, labels=TEXT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(TEXT).logits
    octavo.save_adapter(model, tmp_path)

    other = quantized_llama()
    octavo.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(other(TEXT).logits, expected)
    octavo.remove_adapters_(other)
    after = other.state_dict()
    assert after.keys() == base.keys() and all(torch.equal(after[name], base[name]) for name in base)

    receipt = octavo.merge_(model, min_survival=0.0, data=TEXT)
    assert receipt.kld_after < receipt.kld_before
    assert model(TEXT, labels=TEXT).loss < losses[0]
