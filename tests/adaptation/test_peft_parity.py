# SPDX-License-Identifier: Apache-2.0
"""The same adapters by PEFT itself, if it is installed: files in both directions, and every decision of AdaLoRA."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from adapted import ADAPTERS, Network, inputs, train_a_little_

import octavo

peft = pytest.importorskip("peft")


def float_network():
    torch.manual_seed(0)
    return Network(48, 64, 40)


def assert_near(found, expected, layers=2):
    """Sums of at most 64 products in float32, in another order, for each layer, and a few operations more."""
    assert (found - expected).abs().max() <= layers * 2 * 80 * 2.0**-24 * 8 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft_reads_what_octavo_has_written(adapter, tmp_path):
    if adapter == "biases":
        pytest.skip(
            "PEFT keeps the biases of adapted layers in the base layer's name, tested by the round trip"
        )
    model = float_network()
    octavo.adapt_(model, replace(ADAPTERS[adapter], targets=["fc1", "fc2"]))
    train_a_little_(model)
    octavo.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(float_network(), tmp_path)
    assert_near(theirs(inputs()), model(inputs()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank_pattern", [{}, {"fc2": 5}])
def test_octavo_reads_what_peft_has_written(rank_pattern, tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["fc1", "fc2"], rank_pattern=rank_pattern, alpha_pattern={"fc1": 7}
    )
    theirs = peft.get_peft_model(float_network(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path)
    model = float_network()
    octavo.load_adapter(model, tmp_path)
    assert_near(model(inputs()), theirs(inputs()))


@pytest.mark.filterwarnings("ignore")
def test_adalora_takes_the_decisions_of_peft():
    """With the gradients of PEFT: masks, importance and budgets have the same bits in every step."""
    steps = {"init_r": 6, "target_r": 2, "total_step": 16}
    config = peft.AdaLoraConfig(
        **steps, tinit=2, tfinal=3, deltaT=2, lora_alpha=8, target_modules=["fc1", "fc2"]
    )
    theirs = peft.get_peft_model(float_network(), config)
    model = float_network()
    adapter = octavo.AdaLoRA(**steps, warm_up=2, final=3, interval=2, alpha=8, targets=["fc1", "fc2"])
    octavo.adapt_(model, adapter)
    allocator = octavo.RankAllocator(model)
    pairs = []
    for name in ("fc1", "fc2"):
        own, other = getattr(model, name).adapters.default, getattr(theirs.base_model.model, name)
        for part in "ABE":
            pairs.append((getattr(own, part), getattr(other, f"lora_{part}")["default"]))
    with torch.no_grad():
        for own, other in pairs:
            own.copy_(other)
    optimizer = torch.optim.Adam([other for _, other in pairs], lr=0.02)
    for step in range(1, steps["total_step"] + 1):
        theirs(inputs()).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for own, other in pairs:
                own.copy_(other)
                own.grad = copy.deepcopy(other.grad)
        theirs.base_model.update_and_allocate(step)
        allocator.step()
        for own, other in pairs:
            assert torch.equal(own, other), step
        optimizer.zero_grad()
    assert allocator.budget == 4


@pytest.mark.filterwarnings("ignore")
def test_the_orthogonal_loss_is_that_of_peft():
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["fc1", "fc2"], orth_reg_weight=0.25
    )

    class WithLoss(Network):
        def forward(self, x):
            return SimpleNamespace(loss=super().forward(x).sum() * 0)

    torch.manual_seed(0)
    theirs = peft.get_peft_model(WithLoss(48, 64, 40), config)
    model = float_network()
    octavo.adapt_(
        model, octavo.AdaLoRA(init_r=4, target_r=2, total_step=9, orthogonality=0.25, targets=["fc1", "fc2"])
    )
    with torch.no_grad():
        for name in ("fc1", "fc2"):
            own, other = getattr(model, name).adapters.default, getattr(theirs.base_model.model, name)
            own.A.copy_(other.lora_A["default"])
            own.B.copy_(other.lora_B["default"])
    expected = theirs.base_model(inputs()).loss
    assert torch.allclose(octavo.RankAllocator(model).loss(), expected, rtol=1e-5)
