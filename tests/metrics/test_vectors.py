# SPDX-License-Identifier: Apache-2.0
"""Cosines of vectors and their neighbours: against plain loops, and by their identities."""

import math

import pytest
import torch

from octavo.metrics import VectorsAccumulator, vectors


def result(*pieces):
    accumulator = VectorsAccumulator()
    for piece in pieces:
        accumulator.update(*piece)
    return accumulator.result()


def pair(count=20, dim=8):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, dim, generator=generator)
    return x, x + 0.5 * torch.randn(count, dim, generator=generator)


def cosine(a, b):
    dot = math.fsum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(p * p for p in a)) / math.sqrt(math.fsum(q * q for q in b))


def nearest(rows, i):
    return max((j for j in range(len(rows)) if j != i), key=lambda j: cosine(rows[i], rows[j]))


def test_every_figure_is_that_of_a_plain_loop():
    x, y = pair()
    a, b = x.tolist(), y.tolist()
    cosines = [cosine(p, q) for p, q in zip(a, b, strict=True)]
    same = [nearest(a, i) == nearest(b, i) for i in range(20)]
    found = result((x, y))
    assert found.vectors == 20
    assert found.mean_cosine == pytest.approx(sum(cosines) / 20, rel=1e-12)
    assert found.worst_cosine == pytest.approx(min(cosines), rel=1e-12)
    assert 0 < found.same_neighbour == sum(same) / 20 < 1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_model_compared_with_itself_has_turned_nothing(scale):
    x = scale * torch.randn(33, 7)
    found = result((x, x.clone()))
    assert (found.mean_cosine, found.worst_cosine, found.same_neighbour) == (1.0, 1.0, 1.0)


def test_batches_add_up_to_the_whole_exactly():
    x, y = pair()
    assert result(*zip(x.split(6), y.split(6), strict=True)) == result((x, y))


def test_zero_vectors_are_defined():
    x, y = torch.eye(3), torch.eye(3)
    y[0] = 0
    assert result((x, y)).worst_cosine == 0.0
    x[0] = 0
    assert result((x, y)).worst_cosine == 1.0


def test_nan_is_never_dropped():
    x, y = pair()
    y[3, 2] = math.nan
    found = result((x, y))
    assert math.isnan(found.mean_cosine) and math.isnan(found.worst_cosine)


def test_neighbours_are_looked_for_among_the_first_vectors_only(monkeypatch):
    monkeypatch.setattr(vectors, "NEIGHBOURS", 5)
    x, y = pair()
    found = result(*zip(x.split(4), y.split(4), strict=True))
    assert found.same_neighbour == result((x[:5], y[:5])).same_neighbour
    assert found.vectors == 20


def test_one_vector_has_no_neighbour():
    x, y = pair(1)
    assert math.isnan(result((x, y)).same_neighbour)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="approximation has shape"):
        result((torch.ones(2, 3), torch.ones(2, 4)))
    with pytest.raises(ValueError, match="at least one axis"):
        result((torch.tensor(1.0), torch.tensor(1.0)))
    with pytest.raises(ValueError, match="no vector yet"):
        result()
