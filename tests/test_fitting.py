"""Least-squares fits: each is the optimum it claims to be, and none makes things worse."""

import itertools

import pytest
import torch

from soco.fitting import (
    alternate,
    anchored_svd,
    anchored_target,
    best_share,
    refit_down,
    refit_up,
    weighted_low_rank,
)
from soco.linalg import Factors, whitened_svd
from soco.weighting import rooted_svd


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = random(7, 6)
INPUTS = torch.logspace(-1, 1, 6, dtype=torch.float64)[:, None] * random(6, 50, seed=1)
GRAM = INPUTS @ INPUTS.T
# What the layer sees behind compressed blocks: the same tokens, distorted.
BEHIND = INPUTS + 0.3 * random(6, 6, seed=2) @ INPUTS + 0.2 * random(6, 50, seed=3)
GRAM_BEHIND, CROSS = BEHIND @ BEHIND.T, INPUTS @ BEHIND.T


def error(factors, gram=GRAM):
    change = WEIGHT - factors.product()
    return float(torch.trace(change @ gram @ change.T))


def test_up_is_the_least_squares_solution():
    down = random(3, 6, seed=4)
    found = refit_up(WEIGHT, down, GRAM_BEHIND, CROSS)
    wanted = torch.linalg.lstsq((down @ BEHIND).T, (WEIGHT @ INPUTS).T).solution.T
    torch.testing.assert_close(found, wanted)
    same = refit_up(WEIGHT, down, GRAM)
    torch.testing.assert_close(same, refit_up(WEIGHT, down, GRAM, GRAM))


def test_up_for_linearly_dependent_rows():
    down = random(3, 6, seed=4)
    twice = torch.cat([down, down[:1]])
    found = refit_up(WEIGHT, twice, GRAM) @ twice
    torch.testing.assert_close(found, refit_up(WEIGHT, down, GRAM) @ down)


def test_down_is_the_least_squares_solution():
    up = random(7, 3, seed=5)
    wanted = torch.linalg.lstsq(up, WEIGHT).solution
    torch.testing.assert_close(refit_down(WEIGHT, up), wanted)


@pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
def test_what_the_inputs_do_not_reach_is_left_as_it_was(shape):
    """A Gram matrix of rank 3 says nothing about most of the weight: that part stays."""
    weight, inputs = random(*shape, seed=11), random(shape[1], 3, seed=12)
    gram = inputs @ inputs.T
    best = whitened_svd(weight, gram).truncate(6)
    moved = alternate(weight, best, gram, 4)
    torch.testing.assert_close(moved.product(), best.product(), atol=1e-6, rtol=1e-6)
    up = refit_up(weight, best.down, gram, start=best.up)
    torch.testing.assert_close(up, best.up, atol=1e-6, rtol=1e-6)
    assert torch.linalg.matrix_rank(refit_up(weight, best.down, gram)) == 3
    other = random(shape[0], 6, seed=13)  # and it is a solution from any start
    found = refit_up(weight, best.down, gram, start=other) @ best.down @ inputs
    torch.testing.assert_close(found, refit_up(weight, best.down, gram) @ best.down @ inputs)


def test_alternating_does_not_move_a_whitened_optimum():
    best = whitened_svd(WEIGHT, GRAM).truncate(3)
    moved = alternate(WEIGHT, best, GRAM, 5)
    torch.testing.assert_close(moved.product(), best.product(), atol=1e-9, rtol=1e-9)


def test_alternating_improves_a_perturbed_start():
    best = whitened_svd(WEIGHT, GRAM).truncate(3)
    start = Factors(best.up + 0.3 * random(7, 3, seed=6), best.down)
    errors = [error(alternate(WEIGHT, start, GRAM, n)) for n in range(8)]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
    assert errors[1] < errors[0]
    assert errors[-1] >= error(best) * (1 - 1e-12)
    far = Factors(random(7, 3, seed=7), random(3, 6, seed=8))
    assert error(alternate(WEIGHT, far, GRAM, 300)) == pytest.approx(error(best), rel=1e-6)


# ---- targets from the dense model ----------------------------------------------------------------


def anchored_loss(weight, share):
    own = (weight - WEIGHT) @ BEHIND
    dense = weight @ BEHIND - WEIGHT @ INPUTS
    return float(share * dense.square().sum() + (1 - share) * own.square().sum())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_target_is_the_optimum(share):
    target = anchored_target(WEIGHT, GRAM_BEHIND, CROSS, share, damping=0.0)
    aim = share * WEIGHT @ INPUTS + (1 - share) * WEIGHT @ BEHIND
    wanted = torch.linalg.lstsq(BEHIND.T, aim.T).solution.T
    torch.testing.assert_close(target, wanted, atol=1e-8, rtol=1e-8)
    for seed in range(3):
        other = target + 1e-3 * random(7, 6, seed=seed)
        assert anchored_loss(other, share) > anchored_loss(target, share)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_truncation_is_the_best_of_its_rank(share, rank):
    """Against alternating least squares from many starts."""
    spectrum = anchored_svd(WEIGHT, GRAM_BEHIND, CROSS, share, 0.0, name="w")
    found = anchored_loss(spectrum.truncate(rank).product(), share)
    aim = share * CROSS + (1 - share) * GRAM_BEHIND
    best = float("inf")
    for seed in range(4):
        up, down = random(7, rank), random(rank, 6, seed=seed)
        for _ in range(400):
            up = refit_up(WEIGHT, down, GRAM_BEHIND, aim)
            target = anchored_target(WEIGHT, GRAM_BEHIND, CROSS, share, 0.0)
            down = refit_down(target, up)
        best = min(best, anchored_loss(up @ down, share))
    assert found == pytest.approx(best, rel=1e-6)


def test_without_compressed_blocks_it_is_svd_llm():
    found = anchored_svd(WEIGHT, GRAM, GRAM, 1.0, 1e-3, name="w").truncate(2).product()
    wanted = whitened_svd(WEIGHT, GRAM).truncate(2).product()
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def test_damping_keeps_the_weight_where_nothing_is_seen():
    seen = BEHIND.clone()
    seen[4:] = 0
    target = anchored_target(WEIGHT, seen @ seen.T, INPUTS @ seen.T, 1.0)
    torch.testing.assert_close(target[:, 4:], WEIGHT[:, 4:], atol=1e-8, rtol=1e-8)
    empty = torch.zeros(6, 6, dtype=torch.float64)
    assert torch.equal(anchored_target(WEIGHT, empty, empty, 1.0), WEIGHT)


def test_the_best_share_is_the_minimum_of_its_ratio():
    def outside(share, rank=2):
        P = WEIGHT @ torch.linalg.cholesky(GRAM_BEHIND)
        Q = WEIGHT @ (CROSS - GRAM_BEHIND) @ torch.linalg.inv(torch.linalg.cholesky(GRAM_BEHIND)).T
        space = torch.linalg.svd(P).U[:, :rank]
        target = P + share * Q
        rest = target - space @ (space.T @ target)
        return float(rest.square().sum() / target.square().sum())

    for low, high in ((0.0, 1.0), (0.2, 0.43), (0.9, 1.0)):
        share = best_share(WEIGHT, GRAM_BEHIND, CROSS, 2, low, high)
        assert low <= share <= high
        grid = torch.linspace(low, high, 201, dtype=torch.float64).tolist()
        assert outside(share) <= min(map(outside, grid)) + 1e-9


# ---- element-wise weights ------------------------------------------------------------------------


def weighted_error(factors, weights):
    return float((weights * (WEIGHT - factors.product()).square()).sum())


def test_every_update_lowers_the_weighted_error():
    weights = random(7, 6, seed=10).square()
    start = whitened_svd(WEIGHT, None).truncate(2)
    errors = [
        weighted_error(weighted_low_rank(WEIGHT, weights, start, n), weights) for n in range(9)
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_weights_that_are_equal_in_all_rows_do_not_move_fwsvd():
    columns = random(6, seed=11).square() + 0.01
    best = rooted_svd(WEIGHT, columns.sqrt()).truncate(2)
    moved = weighted_low_rank(WEIGHT, columns.expand(7, 6), best, 5)
    torch.testing.assert_close(moved.product(), best.product(), atol=1e-7, rtol=1e-7)


def test_rows_and_columns_of_weight_zero_stay_finite():
    weights = random(7, 6, seed=10).square()
    weights[3], weights[:, 2] = 0, 0
    start = whitened_svd(WEIGHT, None).truncate(2)
    found = weighted_low_rank(WEIGHT, weights, start, 6)
    assert bool(found.product().isfinite().all())
    torch.testing.assert_close(found.up[3], start.up[3])
    assert weighted_error(found, weights) <= weighted_error(start, weights)
