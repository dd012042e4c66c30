"""Weighted decompositions: all roots of one Gram matrix agree, errors are tails, nothing breaks."""

import math

import pytest
import torch

from soco.linalg import whitened_svd
from soco.weighting import OUTPUT_FLOOR, eigen_root, rooted_svd, shrunk, two_sided_svd


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SHAPES = [(9, 6), (6, 9), (7, 7), (1, 5), (5, 1)]


def problem(rows, columns, tokens=60, seed=0):
    """A weight, inputs whose channels differ by a factor of a thousand, and their Gram matrix."""
    weight = random(rows, columns, seed=seed)
    scale = torch.logspace(-1.5, 1.5, columns, dtype=torch.float64)
    inputs = scale[:, None] * random(columns, tokens, seed=seed + 1)
    inputs = inputs + 0.5 * inputs.roll(1, 0)  # and are correlated
    return weight, inputs, inputs @ inputs.T


def roots(inputs, gram):
    return {
        "eigen": eigen_root(gram),
        "qr": torch.linalg.qr(inputs.T, mode="r").R.T,
        "cholesky": torch.linalg.cholesky(gram + 1e-300 * torch.eye(len(gram))),
    }


def inverse_form(weight, root, rank):
    """As published: ``trunc(W S) S^-1``."""
    U, S, Vh = torch.linalg.svd(weight @ root, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_four_closed_forms_agree_on_full_rank(rows, columns):
    weight, inputs, gram = problem(rows, columns)
    for rank in range(1, min(rows, columns) + 1):
        wanted = whitened_svd(weight, gram).truncate(rank).product()
        for name, root in roots(inputs, gram).items():
            found = rooted_svd(weight, root).truncate(rank).product()
            torch.testing.assert_close(found, wanted, atol=1e-8, rtol=1e-8, msg=name)
            published = inverse_form(weight, root, rank)
            torch.testing.assert_close(published, wanted, atol=1e-8, rtol=1e-8, msg=name)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_error_is_the_tail(rows, columns):
    weight, inputs, gram = problem(rows, columns)
    spectrum = rooted_svd(weight, eigen_root(gram))
    for rank in range(1, min(rows, columns) + 1):
        error = (weight - spectrum.truncate(rank).product()) @ inputs
        tail = spectrum.sigma[rank:].norm()
        torch.testing.assert_close(error.norm(), tail, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("tokens", [3, 8])
@pytest.mark.parametrize("route", ["output", "eigen", "qr"])
def test_singular_grams_are_met_better_than_by_the_inverse(route, tokens):
    """Fewer tokens than channels: the published form adds to the diagonal until it can invert."""
    weight, inputs, gram = problem(16, 12, tokens)
    rank = 2
    if route == "output":
        spectrum = whitened_svd(weight, gram)
    else:
        root = torch.linalg.qr(inputs.T, mode="r").R.T if route == "qr" else eigen_root(gram)
        spectrum = rooted_svd(weight, root)
    damped = gram + (1e-6 - torch.linalg.eigvalsh(gram)[0]) * torch.eye(12)
    published = inverse_form(weight.float(), torch.linalg.cholesky(damped).float(), rank).double()
    found = spectrum.truncate(rank).product()
    best = torch.linalg.svdvals(weight @ inputs)[rank:].norm()
    mine, theirs = ((weight - each) @ inputs for each in (found, published))
    torch.testing.assert_close(mine.norm(), best, rtol=1e-6, atol=1e-9)
    assert mine.norm() <= theirs.norm() * (1 + 1e-9)
    whole = (spectrum.up * spectrum.sigma) @ spectrum.down
    torch.testing.assert_close(whole, weight, atol=1e-8, rtol=1e-8)  # also where nothing is seen


def test_the_qr_route_keeps_what_squaring_loses():
    """Singular values down to 1e-10 of the largest: a Gram matrix knows them to 1e-8 at best."""
    columns = 6
    U, V = torch.linalg.qr(random(columns, columns)).Q, torch.linalg.qr(random(60, columns)).Q
    values = torch.logspace(0, -10, columns, dtype=torch.float64)
    inputs = (U * values) @ V.T
    weight = torch.linalg.qr(random(columns, columns, seed=3)).Q
    exact = values
    by_qr = rooted_svd(weight, torch.linalg.qr(inputs.T, mode="r").R.T).sigma
    by_gram = whitened_svd(weight, inputs @ inputs.T).sigma
    assert ((by_qr - exact) / exact).abs().max() < 1e-4
    assert ((by_gram - exact) / exact).abs().max() > 1e-2


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_diagonal_root_is_a_matrix(rows, columns):
    weight = random(rows, columns)
    scale = random(columns, seed=5).abs() + 0.1
    found, wanted = rooted_svd(weight, scale), rooted_svd(weight, torch.diag(scale))
    torch.testing.assert_close(found.sigma, wanted.sigma)
    torch.testing.assert_close(found.truncate(1).product(), wanted.truncate(1).product())


def test_a_channel_of_weight_zero_keeps_its_column_at_full_rank():
    weight = random(4, 5)
    scale = torch.tensor([1.0, 0.0, 2.0, 1.0, 3.0], dtype=torch.float64)
    spectrum = rooted_svd(weight, scale)
    torch.testing.assert_close((spectrum.up * spectrum.sigma) @ spectrum.down, weight)


@pytest.mark.parametrize("root", [torch.zeros(5), torch.zeros(5, 3)])
def test_an_all_zero_root_is_the_plain_svd(root):
    weight = random(4, 5)
    torch.testing.assert_close(
        rooted_svd(weight, root.double()).sigma, torch.linalg.svdvals(weight)
    )


# ---- both sides ----------------------------------------------------------------------------------


def grad_gram(rows, seed=9):
    gradients = torch.logspace(-1, 1, rows, dtype=torch.float64)[:, None] * random(
        rows, 80, seed=seed
    )
    return gradients @ gradients.T / 80


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_two_sided_is_the_published_form(rows, columns):
    weight, _, gram = problem(rows, columns)
    curvature = grad_gram(rows)
    left, right = torch.linalg.cholesky(curvature), torch.linalg.cholesky(gram)
    U, S, Vh = torch.linalg.svd(left.T @ weight @ right, full_matrices=False)
    spectrum = two_sided_svd(weight, gram, curvature)
    torch.testing.assert_close(spectrum.sigma, S, atol=1e-8, rtol=1e-6)
    for rank in range(1, min(rows, columns) + 1):
        middle = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        published = torch.linalg.inv(left.T) @ middle @ torch.linalg.inv(right)
        found = spectrum.truncate(rank).product()
        torch.testing.assert_close(found, published, atol=1e-7, rtol=1e-6)
        error = weight - found
        loss = torch.trace(error.T @ curvature @ error @ gram)
        tail = spectrum.sigma[rank:].square().sum()
        torch.testing.assert_close(loss, tail, atol=1e-7, rtol=1e-5)


def test_two_sided_with_an_identity_is_one_sided():
    weight, _, gram = problem(6, 8)
    both = two_sided_svd(weight, gram, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(both.sigma, whitened_svd(weight, gram).sigma)
    plain = two_sided_svd(weight, None, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(plain.sigma, torch.linalg.svdvals(weight))


def test_a_vector_is_a_diagonal_of_output_weights():
    weight, _, gram = problem(6, 8)
    outputs = random(6, seed=4).square() + 0.1
    found = two_sided_svd(weight, gram, outputs)
    wanted = two_sided_svd(weight, gram, torch.diag(outputs))
    torch.testing.assert_close(found.sigma, wanted.sigma)
    torch.testing.assert_close(found.truncate(2).product(), wanted.truncate(2).product())


def test_outputs_that_the_loss_does_not_feel_stay_finite():
    weight, _, gram = problem(6, 8)
    curvature = grad_gram(6)
    curvature[:, 2] = curvature[2] = 0
    spectrum = two_sided_svd(weight, gram, curvature)
    assert all(bool(part.isfinite().all()) for part in spectrum)
    whole = (spectrum.up * spectrum.sigma) @ spectrum.down
    torch.testing.assert_close(whole, weight, atol=1e-6, rtol=1e-6)
    assert spectrum.sigma[-1] < 10 * OUTPUT_FLOOR * spectrum.sigma[0]
    nothing = two_sided_svd(weight, gram, torch.zeros(6, 6, dtype=torch.float64))
    torch.testing.assert_close(nothing.sigma, whitened_svd(weight, gram).sigma)


def test_shrinking_by_hand():
    gram = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    torch.testing.assert_close(shrunk(gram, 0.5), torch.tensor([[3.5, 0.5], [0.5, 2.5]]))
    assert torch.equal(shrunk(gram, 0.0), gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    weight, _, gram = problem(6, 8)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for spectrum in (
        rooted_svd(weight.to(dtype), eigen_root(gram)),
        two_sided_svd(weight.to(dtype), gram, grad_gram(6)),
    ):
        assert {part.dtype for part in spectrum} == {wanted}


def test_what_does_not_fit_is_named():
    weight = random(4, 5)
    with pytest.raises(
        ValueError, match=r"a root for q \(4, 5\) must be \(in,\) or \(in, columns\)"
    ):
        rooted_svd(weight, torch.ones(4), name="q")
    with pytest.raises(ValueError, match=r"the weights of the inputs of q .* NaN or Inf"):
        rooted_svd(weight, torch.full((5,), math.nan), name="q")
    with pytest.raises(ValueError, match=r"q \(4, 5\) holds NaN or Inf"):
        rooted_svd(weight / 0, torch.ones(5), name="q")
    with pytest.raises(ValueError, match=r"gradients of q must be \(out, out\) or \(out,\)"):
        two_sided_svd(weight, None, torch.eye(5), name="q")
    with pytest.raises(ValueError, match="gradients of q is not positive semidefinite"):
        two_sided_svd(weight, None, -torch.eye(4), name="q")
