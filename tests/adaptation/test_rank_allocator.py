# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's budget, decisions and state: the rules of PEFT, number for number."""

import copy

import pytest
import torch
from adapted import inputs, peft_outputs, quantized_network

import octavo

SCHEDULES = {
    "init12_target8_tinit0_tfinal0_dT1_T100": (12, 8, 0, 0, 1, 100),
    "init12_target8_tinit10_tfinal20_dT5_T100": (12, 8, 10, 20, 5, 100),
    "init6_target3_tinit2_tfinal3_dT2_T20": (6, 3, 2, 3, 2, 20),
    "init12_target2_tinit50_tfinal100_dT10_T500": (12, 2, 50, 100, 10, 500),
}


def trained(adapter, steps, allocator=None, model=None, optimizer=None):
    """A model after some steps of training, and its allocator; `watch` sees every step."""
    if model is None:
        model = quantized_network()
        torch.manual_seed(0)
        octavo.adapt_(model, adapter)
        allocator = octavo.RankAllocator(model)
        optimizer = torch.optim.Adam(octavo.adapters(model), lr=0.01)
    counts = []
    for _ in range(steps):
        loss = model(inputs()).square().mean() + allocator.loss()
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        layers = (model.fc1.adapters.default, model.fc2.adapters.default)
        counts.append(sum(int((layer.E != 0).sum()) for layer in layers))
    return model, allocator, optimizer, counts


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_budget_is_that_of_peft(name):
    init_r, target_r, warm_up, final, interval, total = SCHEDULES[name]
    model = quantized_network()
    octavo.adapt_(
        model,
        octavo.AdaLoRA(
            init_r=init_r,
            target_r=target_r,
            total_step=total,
            warm_up=warm_up,
            final=final,
            interval=interval,
        ),
    )
    allocator = octavo.RankAllocator(model)
    for step, budget, decides in peft_outputs()[f"adalora_budget/{name}"].tolist():
        assert allocator.schedule(step) == (budget, bool(decides)), step


def test_decisions_fall_where_those_of_peft_fall():
    """Counts of values that are not 0, of a run of PEFT with other data: on a decision the budget, between two as many
    as there are, because the optimizer moves all of them."""
    adapter = octavo.AdaLoRA(init_r=6, target_r=3, total_step=20, warm_up=2, final=3, interval=2)
    _, _, _, counts = trained(adapter, 20)
    assert counts == peft_outputs()["adalora/steps"][:, 3].tolist()


def test_the_mask_and_the_scores_are_those_of_the_formulas():
    adapter = octavo.AdaLoRA(init_r=4, target_r=1, total_step=8, interval=3)
    model, allocator, _, _ = trained(adapter, 2)
    layers = {name: getattr(model, name).adapters.default for name in ("fc1", "fc2")}
    loss = model(inputs()).square().mean()
    loss.backward()
    means, scores = {}, {}
    for name, layer in layers.items():
        parts = {}
        for part in "ABE":
            importance = (getattr(layer, part) * getattr(layer, part).grad).abs().detach()
            mean = 0.85 * allocator._mean[f"{name}.{part}"] + 0.15 * importance
            spread = 0.85 * allocator._uncertainty[f"{name}.{part}"] + 0.15 * (importance - mean).abs()
            parts[part] = (mean * spread).double()
        means[name] = parts
        scores[name] = parts["E"].flatten() + parts["A"].mean(1) + parts["B"].mean(0)
    allocator.step()
    budget, decides = allocator.schedule(3)
    assert decides and budget == allocator.budget
    kept = torch.cat([layer.kept for layer in layers.values()])
    best = torch.cat(list(scores.values())).topk(budget).indices
    assert sorted(best.tolist()) == kept.nonzero().flatten().tolist()
    assert all(not layer.E[~layer.kept].any() for layer in layers.values())


def test_a_training_that_was_interrupted_goes_on_with_the_same_bits():
    adapter = octavo.AdaLoRA(init_r=4, target_r=2, total_step=12, warm_up=2, final=3, interval=2)
    whole, *_ = trained(adapter, 12)
    model, allocator, optimizer, _ = trained(adapter, 5)
    states = copy.deepcopy([part.state_dict() for part in (model, allocator, optimizer)])
    other = quantized_network()
    octavo.adapt_(other, adapter)
    parts = other, octavo.RankAllocator(other), torch.optim.Adam(octavo.adapters(other), lr=0.01)
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    trained(adapter, 7, parts[1], parts[0], parts[2])
    assert torch.equal(parts[0](inputs()), whole(inputs()))
    kept = [layer.adapters.default.kept for layer in (other.fc1, other.fc2)]
    assert sum(int(each.sum()) for each in kept) == parts[1].budget == 4


def test_a_pruned_adapter_is_saved_small_and_computes_the_same(tmp_path):
    adapter = octavo.AdaLoRA(init_r=4, target_r=2, total_step=6, final=1)
    model, *_ = trained(adapter, 6)
    octavo.save_adapter(model, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(len(tensor) for name, tensor in tensors.items() if name.endswith("lora_E")) == 4
    other = quantized_network()
    octavo.load_adapter(other, tmp_path)
    assert torch.equal(other(inputs()), model(inputs()))
    assert torch.equal(other.fc1.adapters.default.kept, model.fc1.adapters.default.kept)


def test_what_does_not_fit_is_refused():
    model = quantized_network()
    octavo.adapt_(model, octavo.LoRA())
    with pytest.raises(ValueError, match="AdaLoRA is needed"):
        octavo.RankAllocator(model)
    octavo.remove_adapters_(model)
    octavo.adapt_(model, octavo.AdaLoRA(init_r=4, target_r=2, total_step=5))
    allocator = octavo.RankAllocator(model)
    with pytest.raises(ValueError, match="zero_grad"):
        allocator.step()
    assert allocator.steps == 0
    state = allocator.state_dict() | {"mean": {"fc1.A": torch.zeros(4, 48)}}
    with pytest.raises(ValueError, match="other layers"):
        allocator.load_state_dict(state)
