"""Incremental PCA against the whole SVD, and the weights made with it against SVD-LLM's."""

import math

import pytest
import torch

from soco.linalg import whitened_svd
from soco.principal import PrincipalDirections, project


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


WEIGHT = normal(12, 9)  # more outputs than inputs
INPUTS = normal(400, 9, seed=1) * torch.logspace(0, -2, 9, dtype=torch.float64)
INPUTS[:200] *= torch.linspace(3, 0.3, 9, dtype=torch.float64)  # the text changes halfway


def gather(rows, rank, size):
    pca = PrincipalDirections(rank)
    for batch in rows.split(size):
        pca.update(batch)
    return pca


def loss(weight, inputs=INPUTS):
    return float((inputs @ (WEIGHT - weight).T).square().sum())


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_one_batch_is_svd_llm(rank):
    outputs = INPUTS @ WEIGHT.T
    pca = gather(outputs, rank, len(outputs))
    found = project(WEIGHT, pca.directions(WEIGHT)).product()
    best = whitened_svd(WEIGHT, INPUTS.T @ INPUTS).truncate(rank).product()
    torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-8)


def test_all_columns_kept_is_exact_with_many_batches():
    outputs = INPUTS @ WEIGHT.T
    values = torch.linalg.svdvals(outputs)
    energy = gather(outputs, 12, 16).energy
    torch.testing.assert_close(energy, values.square(), rtol=1e-8, atol=1e-8)
    directions = gather(outputs, 12, 16).directions(WEIGHT)
    best = whitened_svd(WEIGHT, INPUTS.T @ INPUTS)
    for rank in (2, 5):
        found = directions[:, :rank] @ directions[:, :rank].T @ WEIGHT
        torch.testing.assert_close(found, best.truncate(rank).product(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [2, 5, 8])
@pytest.mark.parametrize("size", [8, 40])
def test_many_batches_are_near_and_never_below_the_optimum(rank, size):
    outputs = INPUTS @ WEIGHT.T
    found = loss(project(WEIGHT, gather(outputs, rank, size).directions(WEIGHT)).product())
    best = loss(whitened_svd(WEIGHT, INPUTS.T @ INPUTS).truncate(rank).product())
    assert best * (1 - 1e-9) <= found < 1.1 * best


def test_batches_count_by_their_size():
    """A loud batch decides; with plain vectors both would count the same."""
    loud, quiet = torch.zeros(5, 3).double(), torch.zeros(5, 3).double()
    loud[:, 0], quiet[:, 1] = 10.0, 0.1
    for order in ((loud, quiet), (quiet, loud)):
        pca = PrincipalDirections(1)
        for batch in order:
            pca.update(batch)
        direction = pca.directions(torch.eye(3))[:, 0].abs()
        torch.testing.assert_close(direction, torch.tensor([1.0, 0, 0]).double())


def test_the_mean_is_not_taken_off():
    pca = PrincipalDirections(1)
    pca.update(torch.tensor([[5.0, 0.1], [5.0, -0.1]]))
    assert float(pca.directions(torch.eye(2))[0, 0].abs()) == pytest.approx(1.0)


def test_memory_is_of_the_kept_rank():
    pca = gather(normal(64, 30), 4, 8)
    assert pca.sketch is not None
    assert pca.sketch.shape == (4, 30)


@pytest.mark.parametrize("tokens", [0, 3])
def test_few_tokens_are_completed_by_the_plain_svd(tokens):
    pca = PrincipalDirections(6)
    if tokens:
        pca.update(INPUTS[:tokens] @ WEIGHT.T)
    V = pca.directions(WEIGHT)
    torch.testing.assert_close(V.T @ V, torch.eye(6, dtype=torch.float64))
    found = V @ V.T @ WEIGHT
    torch.testing.assert_close(INPUTS[:tokens] @ found.T, INPUTS[:tokens] @ WEIGHT.T)
    rest = WEIGHT - V[:, :tokens] @ V[:, :tokens].T @ WEIGHT
    tail = torch.linalg.svdvals(rest)[6 - tokens :].norm()
    torch.testing.assert_close((WEIGHT - found).norm(), tail)


def test_projection_is_idempotent_and_keeps_dtype():
    V = gather(INPUTS @ WEIGHT.T, 3, 50).directions(WEIGHT)
    once = project(WEIGHT, V)
    torch.testing.assert_close(project(once.product(), V).product(), once.product())
    assert project(WEIGHT.bfloat16(), V).up.dtype == torch.float32


def test_refuses():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        PrincipalDirections(0)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        PrincipalDirections(1).update(torch.tensor([[math.nan]]))
