"""Least-squares fits of factors to what their layer should put out on given inputs."""

import torch
from torch import Tensor

from soco.linalg import Factors, Spectrum, whitened_svd

# Eigenvalues below this fraction of the largest are taken for none where a Gram matrix is inverted:
# it was summed of float32 products.
CUTOFF = 1e-8

# Entries of the two largest temporaries of the weighted fit: 256 MB each in float64.
_ENTRIES = 2**25
_COLUMNS = 16  # of a triangle, that are made at a time


def refit_up(
    weight: Tensor,
    down: Tensor,
    gram: Tensor,
    cross: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """The best ``up`` for a given ``down``: the least-squares solution of ``U down X = Y``.

    X are the inputs that the layer gets, with Gram matrix ``G = X X^T``; Y are the outputs it
    should give: ``W X``, or ``W X0`` where the dense model's own inputs were X0, with the cross
    Gram matrix ``C = X0 X^T``. Then ``U = W C down^T (down G down^T)^+``. Where no input reaches a
    direction of ``down X`` any U is a solution; the one closest to ``start`` is taken.

    Args:
        weight: (out, in).
        down: (rank, in).
        gram: (in, in).
        cross: (in, in); None: ``gram``.
        start: (out, rank), what the directions keep that the inputs say nothing about; None: zero.

    Returns:
        (out, rank), float64.

    Source: the "update" of SVD-LLM, arXiv:2403.07378, and the coefficients that Basis Sharing fits
    again, arXiv:2410.03765, section 3.4.
    """
    down, gram = down.double(), gram.double()
    target = weight.double() @ (gram if cross is None else cross.double())  # (out, in): Y X^T
    inverse = _pinv(down @ gram @ down.mT)
    if start is None:
        return target @ down.mT @ inverse
    start = start.double()
    return start + (target - start @ down @ gram) @ down.mT @ inverse


def refit_down(weight: Tensor, up: Tensor) -> Tensor:
    """The best ``down`` for a given ``up``, whatever the inputs: ``up^+ W`` (rank, in), float64.

    ``|up down X - W X|`` is least, for every X, when ``up down`` is W projected on up's range.
    """
    up = up.double()
    return _pinv(up.mT @ up) @ up.mT @ weight.double()


def alternate(weight: Tensor, factors: Factors, gram: Tensor, iterations: int) -> Factors:
    """Update up and down in turn, each to its least-squares optimum for ``|W X - up down X|_F``.

    The error never grows. The whitened truncated SVD is the global optimum, and stays as it is.

    Args:
        weight: (out, in).
        factors: where to start.
        gram: (in, in), of the inputs X.
        iterations: of both updates.

    Returns:
        Factors in float64.

    Source: adaComp of AdaSVD, arXiv:2502.01403 (pseudo-inverses instead of inverses).
    """
    up, down = factors.up.double(), factors.down.double()
    for _ in range(iterations):
        up = refit_up(weight, down, gram, start=up)
        down = refit_down(weight, up)
    return Factors(up, down)


def anchored_target(
    weight: Tensor, gram: Tensor, cross: Tensor, share: float, damping: float = 1e-3
) -> Tensor:
    """The weight that, on a compressed model's inputs, puts out what the dense layer did.

    Minimizes ``share |W' X - W X0|^2 + (1 - share) |W' X - W X|^2`` over all W', with X the inputs
    that the layer gets behind compressed layers and X0 those it gets in the dense model:
    ``W' = W ((1 - share) G + share C) G^-1`` with ``G = X X^T`` and ``C = X0 X^T``. A damping keeps
    W' at W where X has nothing to say.

    Args:
        weight: (out, in).
        gram: (in, in), G.
        cross: (in, in), C.
        share: 0 (aim at what W does with the new inputs) to 1 (at what the dense layer put out).
        damping: added to the diagonals of G and C, as a fraction of G's mean diagonal.

    Returns:
        (out, in), float64.

    Source: AA-SVD, arXiv:2604.02119 (share 1); SAES-SVD, arXiv:2602.03051 (share below 1).
    """
    gram, cross = gram.double(), cross.double()
    if not gram.any():
        return weight.double()
    ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype).to(gram)
    mixed = (1 - share) * gram + share * cross + ridge
    return weight.double() @ torch.linalg.solve(gram + ridge, mixed, left=False)


def anchored_svd(
    weight: Tensor, gram: Tensor, cross: Tensor, share: float, damping: float, *, name: str
) -> Spectrum:
    """The best ranks r under the objective of ``anchored_target``, for every r.

    The objective is ``|(W' - T) X|^2`` up to a constant, with T that target, so its best rank r is
    the whitened truncated SVD of T.
    """
    target = anchored_target(weight, gram, cross, share, damping).to(gram.device)
    return whitened_svd(target, gram.double(), name=name)


def best_share(
    weight: Tensor, gram: Tensor, cross: Tensor, rank: int, low: float, high: float
) -> float:
    """The share at which the smallest part of the target's energy lies outside of rank ``rank``.

    With ``P = W G^(1/2)`` and ``Q = W (C - G) G^(-1/2)`` the target is ``P + share Q``. The
    space is that of the first ``rank`` left singular vectors of P, and
    ``(a + 2 b share + c share^2) / (A + 2 B share + C share^2)`` is minimized, numerator: energy
    outside of it.

    Args:
        weight: (out, in).
        gram: (in, in).
        cross: (in, in).
        rank: of the space.
        low: smallest share allowed.
        high: largest.

    Source: adaptive coefficient of SAES-SVD, arXiv:2602.03051, section 3.3.
    """
    weight, gram, cross = weight.double(), gram.double(), cross.double()
    change = cross - gram
    parts = (
        weight @ gram @ weight.mT,  # P P^T
        weight @ change @ weight.mT,  # Q P^T
        weight @ change @ _pinv(gram) @ change.mT @ weight.mT,  # Q Q^T
    )
    space = torch.linalg.eigh(parts[0]).eigenvectors[:, len(weight) - rank :]
    whole = [float(part.trace()) for part in parts]
    inside = [float((space * (part @ space)).sum()) for part in parts]
    a, b, c = (w - i for w, i in zip(whole, inside, strict=True))
    A, B, C = whole

    def outside(share: float) -> float:
        energy = A + 2 * B * share + C * share * share
        return (a + 2 * b * share + c * share * share) / energy if energy > 0 else 1.0

    candidates = [low, high]
    square, line, constant = c * B - b * C, c * A - a * C, b * A - a * B
    disc = line * line - 4 * square * constant
    if square and disc >= 0:
        candidates += [(-line + sign * disc**0.5) / (2 * square) for sign in (1, -1)]
    elif line:
        candidates.append(-constant / line)
    return min((share for share in candidates if low <= share <= high), key=outside)


def weighted_low_rank(
    weight: Tensor,
    weights: Tensor,
    factors: Factors,
    iterations: int,
    damping: float = 1e-9,
) -> Factors:
    """Alternating weighted least squares: lower ``sum_ij F_ij (W - up down)_ij^2``, step by step.

    Row i of ``up`` solves ``(down diag(F_i) down^T) a = down diag(F_i) w_i``, column j of ``down``
    likewise; each update is exact, so the objective falls from one to the next, but for the damping
    on the diagonals.

    Args:
        weight: (out, in).
        weights: (out, in), F, not negative.
        factors: where to start.
        iterations: of both updates.
        damping: added to the diagonals, as a fraction of the mean diagonal.

    Returns:
        Factors in float64.

    Source: TFWSVD, EMNLP 2022 (the objective); the exact updates are those of weighted alternating
    least squares.
    """
    W, F = weight.double(), weights.double()
    up, down = factors.up.double(), factors.down.double()
    for _ in range(iterations):
        up = _solve_rows(W, F, down.mT, up, damping)
        down = _solve_rows(W.mT, F.mT, up, down.mT, damping).mT
    return Factors(up, down)


def _solve_rows(
    target: Tensor, weights: Tensor, basis: Tensor, start: Tensor, damping: float
) -> Tensor:
    """For every row i the x that minimizes ``sum_j F_ij (t_ij - basis_j x)^2``: (rows, rank)."""
    solved = []
    rows = max(1, _ENTRIES // basis.shape[1] ** 2)  # at a time
    for t, f, x in zip(target.split(rows), weights.split(rows), start.split(rows), strict=True):
        normal = _normal(basis, f)
        diagonal = normal.diagonal(dim1=-2, dim2=-1)
        ridge = damping * diagonal.mean(-1, keepdim=True)
        # The damping pulls towards where the row was, and not towards zero: it never costs.
        side = (f * t) @ basis + ridge * x
        diagonal += ridge
        root, failed = torch.linalg.cholesky_ex(normal)
        chosen = torch.cholesky_solve(side[..., None], root)[..., 0]
        usable = (failed == 0) & chosen.isfinite().all(-1) & (f.sum(-1) > 0)
        solved.append(torch.where(usable[:, None], chosen, x))
    return torch.cat(solved)


def _normal(basis: Tensor, weights: Tensor) -> Tensor:
    """Lower triangles of ``basis^T diag(f) basis`` for each row f of ``weights``: (rows, k, k).

    As few large products: those of one row alone would be too thin to be fast.
    """
    rank = basis.shape[1]
    normal = basis.new_zeros(len(weights), rank, rank)
    step = min(_COLUMNS, max(1, _ENTRIES // basis.numel()))
    for begin in range(0, rank, step):
        end = min(begin + step, rank)
        pairs = (basis[:, begin:end, None] * basis[:, None, :end]).flatten(1)
        normal[:, begin:end, :end] = (weights @ pairs).view(-1, end - begin, end)
    return normal


def _pinv(gram: Tensor) -> Tensor:
    """The Moore-Penrose inverse of a symmetric positive semidefinite matrix, float64."""
    return torch.linalg.pinv((gram + gram.mT) / 2, rtol=CUTOFF, hermitian=True)
