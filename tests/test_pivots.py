"""soco.pivots: rows of a weight that span it, and nothing lost."""

import pytest
import torch

from soco import pivots
from soco.linalg import Factors
from soco.pivots import LARGEST_COEFFICIENT, Pivoted, pivot_factors

SHAPES = [(8, 5, 3), (5, 8, 4), (6, 6, 5), (7, 2, 2), (2, 7, 1), (64, 33, 20), (60, 70, 55)]


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_factors(out_features, in_features, rank, seed=0):
    return Factors(normal(out_features, rank, seed=seed), normal(rank, in_features, seed=seed + 99))


def away(pivoted, factors):
    """The largest distance of an entry from the exact product, as a fraction of the largest."""
    exact = factors.up.double() @ factors.down.double()
    return float((pivoted.product().double() - exact).abs().max() / exact.abs().max())


def test_by_hand():
    """The largest row is the pivot, and what the others are of it can be seen."""
    factors = Factors(torch.tensor([[1.0], [4.0], [2.0], [0.0]]), torch.tensor([[3.0, 5.0]]))
    made = pivot_factors(factors, name="layer")
    assert made.pivots.tolist() == [1]
    assert made.rows.tolist() == [[12.0, 20.0]]
    assert made.rest.tolist() == [[0.25], [0.5], [0.0]]
    assert made.product().tolist() == [[3.0, 5.0], [12.0, 20.0], [6.0, 10.0], [0.0, 0.0]]


def test_two_pivots_by_hand():
    """Rows 0 and 3 are the sides of the largest parallelogram; row 2 is half of both."""
    up = torch.tensor([[8.0, 0.0], [0.0, 1.0], [4.0, 4.0], [0.0, 8.0]])
    made = pivot_factors(Factors(up, torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]])), name="a")
    assert made.pivots.tolist() == [0, 3]
    assert made.rows.tolist() == [[8.0, 0.0, 16.0], [0.0, 8.0, 24.0]]
    torch.testing.assert_close(made.rest, torch.tensor([[0.0, 0.125], [0.5, 0.5]]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01)],
    ids=str,
)
def test_nothing_is_lost(shape, dtype, tolerance, device):
    out_features, in_features, rank = shape
    factors = random_factors(*shape).to(dtype)
    made = pivot_factors(Factors(*(f.to(device) for f in factors)), name="layer")
    assert made.rest.shape == (out_features - rank, rank)
    assert made.rows.shape == (rank, in_features)
    assert made.rest.dtype == made.rows.dtype == dtype
    assert made.pivots.dtype == torch.int64
    assert {tensor.device.type for tensor in made} == {device}
    assert made.pivots.tolist() == sorted(set(made.pivots.tolist()))
    assert away(Pivoted(*(tensor.cpu() for tensor in made)), factors) < tolerance


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_never_larger_than_dense_nor_than_the_factors(shape):
    out_features, in_features, rank = shape
    made = pivot_factors(random_factors(*shape), name="layer")
    numbers = made.rest.numel() + made.rows.numel()
    assert numbers == rank * (out_features + in_features) - rank**2
    assert numbers <= out_features * in_features
    assert numbers < rank * (out_features + in_features)


@pytest.mark.parametrize("seed", range(16, 22))
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_coefficients_are_bounded(seed, spread):
    """Also where some rows are a thousand times as large as others."""
    factors = random_factors(96, 96, 60, seed=seed)
    factors.up.mul_(torch.exp(spread * normal(96, 1, seed=seed + 50)))
    made = pivot_factors(factors, name="layer")
    assert made.rest.abs().max() <= LARGEST_COEFFICIENT + 1e-9
    assert away(made, factors) < 1e-12


def test_the_exchanges_are_what_bounds_them(monkeypatch):
    """From the worst of beginnings, and where QR with pivoting alone is not enough."""
    factors = random_factors(96, 96, 60, seed=19)
    basis = torch.linalg.qr(factors.up).Q
    alone = pivots._combinations(basis, pivots._first_pivots(basis)).abs().max()
    assert alone > LARGEST_COEFFICIENT
    monkeypatch.setattr(pivots, "_first_pivots", lambda basis: torch.arange(60))
    first = pivots._combinations(basis, torch.arange(60)).abs().max()
    assert first > 2
    made = pivot_factors(factors, name="layer")
    assert made.rest.abs().max() <= LARGEST_COEFFICIENT + 1e-9
    assert away(made, factors) < 1e-12


def test_the_choice_depends_on_the_column_space_alone():
    factors = random_factors(40, 30, 12)
    mix = normal(12, 12, seed=5)
    made = pivot_factors(factors, name="layer").pivots
    scaled = Factors(factors.up * torch.logspace(-9, 9, 12).double(), factors.down)
    for other in (Factors(factors.up @ mix, 1e6 * factors.down[:, :13]), scaled):
        assert torch.equal(pivot_factors(other, name="layer").pivots, made)


def make_dependent(up):
    up[:, 3] = 2 * up[:, 0] - up[:, 1]


def make_zero(up):
    up[:, 2:] = 0


def make_equal(up):
    up[:] = up[:, :1]


@pytest.mark.parametrize("change", [make_dependent, make_zero, make_equal, torch.Tensor.zero_])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns_that_depend_on_each_other(change, dtype):
    factors = random_factors(9, 7, 5)
    change(factors.up)
    factors = factors.to(dtype)
    made = pivot_factors(factors, name="layer")
    assert len(set(made.pivots.tolist())) == 5
    assert made.rest.abs().max() <= LARGEST_COEFFICIENT + 1e-6
    exact = factors.up.double() @ factors.down.double()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(made.product().double(), exact, rtol=tolerance, atol=tolerance)


def test_large_and_small_values():
    """What is squared nowhere may be as large as the dtype holds."""
    factors = random_factors(9, 7, 5).to(torch.float32)
    for scale in (1e-30, 1e30):
        scaled = Factors(factors.up * scale, factors.down)
        assert away(pivot_factors(scaled, name="layer"), scaled) < 1e-6


def test_gradients_stay_outside():
    factors = random_factors(6, 6, 2)
    factors.up.requires_grad_()
    assert not any(tensor.requires_grad for tensor in pivot_factors(factors, name="layer"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 5, 0), r"some\.layer has rank 0: there is no row to keep"),
        ((5, 6, 5), r"some\.layer of shape \[5, 6\] has rank 5: .* a rank below 5, keep it dense"),
        ((5, 6, 6), r"some\.layer of shape \[5, 6\] has rank 6: .* a rank below 5, keep it dense"),
        ((9, 4, 5), r"some\.layer of shape \[9, 4\] has rank 5: .* a rank below 5, keep it dense"),
    ],
)
def test_ranks_of_a_dense_layer(shape, message):
    with pytest.raises(ValueError, match=message):
        pivot_factors(random_factors(*shape), name="some.layer")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_values_that_are_not_finite(value, which):
    factors = random_factors(6, 5, 2)
    factors[which][1, 1] = value
    with pytest.raises(ValueError, match=r"a factor of some\.layer holds a value that is not fini"):
        pivot_factors(factors, name="some.layer")
