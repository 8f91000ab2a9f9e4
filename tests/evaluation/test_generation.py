# SPDX-License-Identifier: Apache-2.0
"""Following the reference's text: what one run says is what free-running completions and plain forwards say."""

import copy
import math

import pytest
import torch
from test_kinds import CausalModel, Wrapped

import octavo
from octavo import metrics
from octavo.evaluation import Prompts, evaluate_generation, generate
from octavo.evaluation.generation import offers_cache

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4]), torch.tensor([5, 6, 7]), torch.tensor([8, 9])]


@pytest.fixture
def pair():
    """A random model, and one that is far enough from it to write other texts."""
    torch.manual_seed(0)
    reference, model = CausalModel(), CausalModel()
    model.load_state_dict(reference.state_dict())
    with torch.no_grad():
        model.head.weight += 0.01 * torch.randn_like(model.head.weight)
    return reference.eval(), model.eval()


def free_running(model, prompt, new_tokens):
    """Greedy decoding by the book: the whole text again for each token."""
    text = prompt[None]
    for _ in range(new_tokens):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], dim=1)
    return text[0, len(prompt) :]


@torch.no_grad()
def test_generate_is_greedy_decoding_by_the_book(pair):
    for prompt in PROMPTS:
        assert torch.equal(generate(pair[0], prompt[None], 7)[0], free_running(pair[0], prompt, 7))


@torch.no_grad()
def test_the_first_rejection_is_where_free_running_texts_part(pair):
    found = evaluate_generation(*pair, Prompts(PROMPTS, new_tokens=12))
    texts = [(free_running(pair[0], prompt, 12), free_running(pair[1], prompt, 12)) for prompt in PROMPTS]
    first = [next((i for i in range(12) if a[i] != b[i]), 12) for a, b in texts]
    assert found.first_differences == first and 12 in first and min(first) < 12
    assert found.mean_first_difference == sum(first) / 4
    assert found.identical == first.count(12) / 4


@torch.no_grad()
def test_forced_figures_are_those_of_plain_forwards_over_the_references_text(pair):
    found = evaluate_generation(*pair, Prompts(PROMPTS, new_tokens=5, top_n=3))
    prefill, generation = (metrics.ForcedAccumulator(3) for _ in range(2))
    by_position = [[] for _ in range(5)]
    for prompt in PROMPTS:
        text = torch.cat([prompt, free_running(pair[0], prompt, 5)])[None, :-1]
        x, y = pair[0](text)[0], pair[1](text)[0]
        last = len(prompt) - 1  # its logits choose the first new token
        prefill.update(x[:last], y[:last])
        generation.update(x[last:], y[last:])
        for position, value in enumerate(metrics.kld(x[last:], y[last:]).tolist()):
            by_position[position].append(value)
    for part, expected in ((found.prefill, prefill.result()), (found.generation, generation.result())):
        assert part.positions == expected.positions
        for name in ("kld_top_n", "kld", "rejection_rate", "dropped_mass"):
            # Logits of size 1 may differ in their last bits where shapes do, a divergence by twice as much.
            assert getattr(part, name) == pytest.approx(getattr(expected, name), abs=1e-5), name
    means = [sum(values) / len(values) for values in by_position]
    assert found.kld_by_position == pytest.approx(means, abs=1e-5)
    assert len(found.rejection_by_position) == 5


def test_a_model_that_follows_itself_is_never_rejected(pair):
    found = evaluate_generation(pair[0], pair[0], PROMPTS)
    assert found.identical == 1.0 and found.mean_first_difference == found.new_tokens == 64
    for part in (found.prefill, found.generation):
        assert (part.kld, part.kld_top_n, part.rejection_rate) == (0.0, 0.0, 0.0)
    assert set(found.kld_by_position + found.rejection_by_position) == {0.0}


def test_the_end_token_ends_a_completion_and_counts(pair):
    text = generate(pair[0], PROMPTS[0][None], 8)[0].tolist()
    end = text[3]
    length = text.index(end) + 1
    found = evaluate_generation(pair[0], pair[0], Prompts(PROMPTS[:1], new_tokens=8, end_token=end))
    assert found.first_differences == [length] and found.generation.positions == length
    assert found.identical == 1.0 and len(found.kld_by_position) == length
    assert generate(pair[0], PROMPTS[0][None], 8, end_token=end).shape == (1, length)


def test_what_a_row_holds_after_its_end_does_not_count(pair):
    """Prompts that run together, the one ending before the other, give what each gives alone."""
    torch.manual_seed(1)
    other = CausalModel()
    for end in range(10):
        alone = [evaluate_generation(pair[0], other, Prompts([p], 8, end_token=end)) for p in PROMPTS[::2]]
        together = evaluate_generation(pair[0], other, Prompts(PROMPTS[::2], 8, end_token=end))
        assert together.first_differences == [each.first_differences[0] for each in alone]
        assert together.identical == sum(each.identical for each in alone) / 2
        assert together.generation.positions == sum(each.generation.positions for each in alone)


def test_one_prompt_of_one_token_has_no_prefill(pair):
    found = evaluate_generation(*pair, Prompts([[4]], new_tokens=2))
    assert found.prefill.positions == 0 and math.isnan(found.prefill.kld)
    assert found.generation.positions == 2


def test_every_form_of_prompts_is_the_same(pair):
    ids = torch.tensor([[1, 2], [3, 4]])
    forms = [ids, list(ids), [[1, 2], [3, 4]], Prompts(ids)]
    assert len({str(evaluate_generation(*pair, form)) for form in forms}) == 1


def test_more_prompts_than_run_together_keep_their_order(pair):
    prompts = [torch.tensor([i % 10, i // 10]) for i in range(20)] + [torch.tensor([3])]
    together = evaluate_generation(*pair, Prompts(prompts, new_tokens=6)).first_differences
    alone = [evaluate_generation(*pair, Prompts([p], new_tokens=6)).first_differences[0] for p in prompts]
    assert together == alone


def test_the_training_flags_come_back(pair):
    pair[0].train()
    evaluate_generation(*pair, Prompts(PROMPTS, new_tokens=1))
    generate(pair[0], PROMPTS[0][None], 1)
    assert pair[0].training and not pair[1].training


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def test_transformers_cache_gives_what_running_the_whole_text_gives(llama):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
    prompts = torch.randint(50, (3, 6), generator=torch.Generator().manual_seed(1))
    assert offers_cache(llama) and not offers_cache(Wrapped(llama, lambda x: x))
    cached, whole = (
        evaluate_generation(llama, model, Prompts(prompts, new_tokens=8, cache=cache))
        for cache in ("auto", False)
    )
    assert cached.first_differences == whole.first_differences
    # Logits of size 10 from sums in another order: 10 * 50 * 2^-24, and a divergence moves by twice as much.
    assert cached.generation.kld == pytest.approx(whole.generation.kld, abs=1e-4)
    assert cached.prefill.kld == pytest.approx(whole.prefill.kld, abs=1e-4)
    assert cached.generation.kld > 1e-2


def test_a_quantized_model_with_a_cache_follows_itself(llama):
    model = octavo.quantized(llama, octavo.Int8Dynamic())
    found = evaluate_generation(model, model, Prompts([[1, 2, 3]], new_tokens=4))
    assert found.generation.kld == found.prefill.kld == 0.0 and found.identical == 1.0


def test_transformers_own_generate_writes_the_same(llama):
    ids = torch.tensor([[7, 8, 9]])
    expected = llama.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(generate(llama, ids, 9), expected[:, 3:])


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Prompts("text"), TypeError, "ids is str"),
        (lambda: Prompts(PROMPTS, new_tokens=0), ValueError, "new_tokens is 0"),
        (lambda: Prompts(PROMPTS, cache="yes"), ValueError, "cache is 'yes'"),
        (lambda: Prompts([]).tensors(), ValueError, "ids is empty"),
        (lambda: Prompts([torch.ones(3)]).tensors(), ValueError, "torch.float32"),
        (lambda: Prompts([torch.ones(2, 3).long()]).tensors(), ValueError, r"\(2, 3\)"),
    ],
)
def test_bad_prompts_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
