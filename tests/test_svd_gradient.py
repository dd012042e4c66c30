"""The stable SVD: exact gradients where torch's are, finite ones where torch's are not."""

import math

import pytest
import torch

from soco.svd_gradient import stable_svd

SHAPES = [(7, 4), (4, 7), (5, 5), (3, 6, 4)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def with_values(values, rows=8, columns=6, dtype=torch.float64, seed=0):
    """A matrix (rows, columns) of these singular values."""
    U = torch.linalg.qr(normal(rows, len(values), seed=seed)).Q
    V = torch.linalg.qr(normal(columns, len(values), seed=seed + 1)).Q
    return ((U * torch.tensor(values, dtype=torch.float64)) @ V.T).to(dtype)


def cut(svd, mask):
    """A loss-like matrix that depends on no sign and no turn within a repeated value."""
    U, S, Vh = svd
    return (U * (S * mask)[..., None, :]) @ Vh


def gradient(loss, matrix):
    matrix = matrix.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(matrix), matrix)
    return grad


@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_svd(shape):
    A = normal(*shape)
    U, S, Vh = stable_svd(A)
    torch.testing.assert_close(S, torch.linalg.svdvals(A))
    torch.testing.assert_close((U * S[..., None, :]) @ Vh, A)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_all_outputs(shape):
    """Numerically; signs of vectors are squared away."""
    A = normal(*shape).requires_grad_()
    weights = torch.arange(1.0, shape[-1] + 1, dtype=torch.float64)

    def outputs(A):
        U, S, Vh = stable_svd(A)
        return S.square(), U.square() * S[..., None, :], Vh.square() * weights

    assert torch.autograd.gradcheck(outputs, (A,))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch_on_separated_values(shape):
    A, G = normal(*shape), normal(*shape, seed=5)
    mask = torch.linspace(1, 0, min(shape[-2:]), dtype=torch.float64)
    mine = gradient(lambda A: (cut(stable_svd(A), mask) * G).sum(), A)
    theirs = gradient(lambda A: (cut(torch.linalg.svd(A, full_matrices=False), mask) * G).sum(), A)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("only", ["U", "S", "Vh"])
def test_one_output_alone(only):
    A, G = normal(6, 4), normal(6, 6, seed=5)
    pick = {"U": lambda s: s.U @ s.U.mT * G, "S": lambda s: s.S, "Vh": lambda s: s.Vh.square()}
    mine = gradient(lambda A: pick[only](stable_svd(A)).square().sum(), A)
    theirs = gradient(
        lambda A: pick[only](torch.linalg.svd(A, full_matrices=False)).square().sum(), A
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


DEGENERATE = {
    "repeated": with_values([3.0, 2.0, 2.0, 1.0, 1.0, 0.5]),
    "zeros": with_values([3.0, 2.0, 1.0]),
    "identity": torch.eye(6, dtype=torch.float64),
    "all zero": torch.zeros(8, 6, dtype=torch.float64),
    "one entry": torch.nn.functional.pad(torch.ones(1, 1, dtype=torch.float64), (0, 5, 0, 7)),
    "tiny": with_values([2e-160, 1e-160, 1e-160, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", DEGENERATE)
def test_finite_where_values_meet(case, dtype):
    A = DEGENERATE[case].to(dtype)
    mask = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1, 0.0], dtype=dtype)
    G = normal(*A.shape, seed=9, dtype=dtype)
    grad = gradient(lambda A: (cut(stable_svd(A), mask) * G).sum(), A)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize("case", ["identity", "all zero"])
def test_torch_is_not_finite_there(case):
    """What the series is for: if torch ever does this itself, it may go."""
    A = DEGENERATE[case]
    mask = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1, 0.0], dtype=A.dtype)
    G = normal(*A.shape, seed=9)
    grad = gradient(lambda A: (cut(torch.linalg.svd(A, full_matrices=False), mask) * G).sum(), A)
    assert not bool(grad.isfinite().all())


@pytest.mark.parametrize("gap", [0.0, 1e-12, 1e-8, 1e-5])
@pytest.mark.parametrize("terms", [0, 3, 10])
def test_close_pairs_have_the_cut_series(gap, terms):
    """One pair, by hand: turning (u_1, v_1) into (u_2, v_2) has the factor of the series."""
    A = torch.diag(torch.tensor([2.0, 2.0 * (1 - gap)], dtype=torch.float64))
    A.requires_grad_()
    U = stable_svd(A, terms=terms).U
    # L = u_21 by sign of u_11: dL/dA = F (s_1 dA_21 + s_2 dA_12) up to the sign of F
    (grad,) = torch.autograd.grad(U[1, 0] * U[0, 0].sign().detach(), A)
    q2 = (1 - gap) ** 2
    factor = sum(q2**k for k in range(terms + 1)) / 4.0
    assert abs(float(grad[1, 0])) == pytest.approx(factor * 2.0, rel=1e-9)
    assert abs(float(grad[0, 1])) == pytest.approx(factor * 2.0 * (1 - gap), rel=1e-9)


def test_wide_pairs_have_the_whole_series():
    A = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)).requires_grad_()
    U = stable_svd(A, terms=2).U
    (grad,) = torch.autograd.grad(U[1, 0] * U[0, 0].sign().detach(), A)
    assert abs(float(grad[1, 0])) == pytest.approx(2.0 / (4 - 1), rel=1e-12)


def test_float32_at_a_narrow_gap_is_near_float64():
    """At a gap ten times the limit, the plain factor is still good to a few percent."""
    A = with_values([5.0, 3.0, 3.0 * (1 - 1e-3), 1.0, 0.5, 0.1])
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    G = normal(*A.shape, seed=3)
    exact = gradient(lambda A: (cut(stable_svd(A), mask.double()) * G).sum(), A)
    found = gradient(lambda A: (cut(stable_svd(A), mask) * G.float()).sum(), A.float())
    assert float((found - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_leading_triplets(method):
    A = with_values([9.0, 5.0, 3.0, 1e-3, 1e-4, 1e-5], rows=30, columns=20)
    G = normal(30, 20, seed=4)
    mask = torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)

    def loss(A):
        U, S, Vh = stable_svd(A, 3, method=method)
        assert S.shape == (3,)
        return (((U * (S * mask)) @ Vh) * G).sum()

    whole = gradient(
        lambda A: (
            cut(stable_svd(A), torch.nn.functional.pad(mask, (0, 17))) * G
        ).sum(), A
    )  # fmt: skip
    assert float((gradient(loss, A) - whole).norm() / whole.norm()) < 2e-3


def test_gradient_of_singular_values_alone_is_exact_when_cut():
    A = normal(9, 7)
    mine = gradient(lambda A: stable_svd(A, 2).S.square().sum(), A)
    theirs = gradient(lambda A: torch.linalg.svdvals(A)[:2].square().sum(), A)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("matrix", "options", "text"),
    [
        (torch.ones(3), {}, "takes a float32 or float64 matrix"),
        (torch.ones(3, 2, dtype=torch.bfloat16), {}, "got \\(3, 2\\) of torch.bfloat16"),
        (torch.full((3, 2), math.nan), {}, "holds NaN or Inf"),
        (torch.ones(3, 2), {"rank": 3}, "rank must be from 1 to 2, got 3"),
        (torch.ones(3, 2), {"terms": -1}, "terms must be 0 or more"),
        (torch.ones(3, 2), {"close": 1.0}, "close in"),
        (torch.ones(3, 2), {"method": "best"}, 'method must be "exact" or "randomized"'),
    ],
)
def test_refuses(matrix, options, text):
    with pytest.raises(ValueError, match=text):
        stable_svd(matrix, **options)
