"""Exact truncated decompositions: which way each matrix is taken apart, and the ways."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from soco import ops
from soco.linalg import cusolver
from soco.linalg.checks import times_power_of_two, to_unit_range
from soco.linalg.factors import SVD
from soco.linalg.parallel import STREAMS, on_streams, side_by_side, workers_for

# A Gram matrix in float64 knows a singular value s to some eps (s_1 / s)^2 of itself. Down to this
# fraction of the largest one that is good enough (3e-10 of itself measured at n = 200, residuals
# below 1e-9 s_1); below it, nothing is squared.
SQUARING_LIMIT = 1e-6
# In float32, down to this; and what is lost besides, as a fraction of the least error, may be this.
SINGLE_LIMIT = 2e-3
SINGLE_EXCESS = 5e-7
# Below this fraction, the kept directions of a Gram matrix in float32 are turned once more.
SINGLE_ORDER = 0.03
# Up to so many rows or columns a matrix goes to ``ops.batched_svd``: there it is the quickest way
# (docs/performance.md), and has the smallest singular values right.
SMALL = 64


def exact(weight: Tensor, rank: int, name: str) -> SVD:
    """Exact truncated SVD of matrices (batch, out, in), float32 or float64, of rank above 0.

    The result has the weight's dtype. ``truncated_svd`` says which way is taken.
    """
    if min(weight.shape[-2:]) <= SMALL:
        U, S, Vh = ops.batched_svd(weight)
        return SVD(U[..., :rank], S[..., :rank], Vh[..., :rank, :])
    matrices, exponent = to_unit_range(weight)
    svd = _each(matrices, lambda part: _large(part, rank, name))
    U, Vh = ops.fix_signs(svd.U, svd.Vh)
    return SVD(U, times_power_of_two(svd.S, exponent[..., None]), Vh)


def _each(matrices: Tensor, take_apart: Callable[[Tensor], SVD]) -> SVD:
    """The decompositions of a batch, several at once where that is worth it."""
    side, one_by_one = min(matrices.shape[-2:]), matrices.split(1)
    if matrices.is_cuda:
        streams = workers_for(side, len(matrices), STREAMS)
        if side <= cusolver.MOST_ROWS or streams < 2:
            return take_apart(matrices)
        parts = on_streams(take_apart, one_by_one, matrices.device, streams)
    else:
        workers = workers_for(side, len(matrices))
        if workers < 2:
            return take_apart(matrices)
        parts = side_by_side(take_apart, one_by_one, workers)
    return SVD(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _large(matrices: Tensor, rank: int, name: str) -> SVD:
    """Each matrix by the quickest way that is exact for it."""
    svd = SVD(*(matrices.new_empty(len(matrices), *s) for s in _shapes(matrices, rank)))
    left = torch.arange(len(matrices), device=matrices.device)
    if matrices.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        left = _take(svd, left, *_by_gram(matrices, rank))
    if len(left) > 0:
        left = _take(svd, left, *_by_gram(matrices[left].double(), rank))
    if len(left) > 0:
        found = directly(matrices[left].double(), rank, name)
        _take(svd, left, found, torch.ones_like(left, dtype=torch.bool))
    return svd


def _shapes(matrices: Tensor, rank: int) -> tuple[tuple[int, ...], ...]:
    return (matrices.shape[-2], rank), (rank,), (rank, matrices.shape[-1])


def _take(svd: SVD, places: Tensor, found: SVD | None, good: Tensor) -> Tensor:
    """Puts what is good into its place; returns the places that are still to be filled."""
    if found is not None and good.any():
        for into, part in zip(svd, found, strict=True):
            into[places[good]] = part[good].to(into.dtype)
    return places[~good]


def _by_gram(matrices: Tensor, rank: int) -> tuple[SVD | None, Tensor]:
    """Eigenvectors of the smaller side's Gram matrix, projected: A = U (U^T A).

    The rows of ``U^T A`` are orthogonal up to eps (s_1 / s_rank)^2, which one Cholesky step mends.

    Returns:
        The decomposition (None if the eigensolver failed), and for each matrix whether squaring it
        was safe (batch,), bool; where it was not, the decomposition is not to be used.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    A = matrices if wide else matrices.mT
    try:
        with torch.autocast(A.device.type, enabled=False):
            values, vectors = eigh_descending(A @ A.mT)
    except LinAlgError:
        return None, torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    safe = _is_safe(values, rank)
    S = values[..., :rank].clamp(min=0).sqrt()
    U = vectors[..., :rank]
    with torch.autocast(A.device.type, enabled=False):
        Vh = U.mT @ A / torch.where(safe[..., None], S, 1)[..., None]
        L, info = torch.linalg.cholesky_ex(Vh @ Vh.mT)  # close to the identity where it is safe
    safe &= info == 0
    Vh = torch.linalg.solve_triangular(L, Vh, upper=False)
    if A.dtype == torch.float32 and (S[..., -1] < SINGLE_ORDER * S[..., 0])[safe].any():
        U, S, Vh = _turned(U, A)
    else:
        U, S, Vh = _sorted(U, S * L.diagonal(dim1=-2, dim2=-1), Vh)
    return (SVD(U, S, Vh) if wide else SVD(Vh.mT, S, U.mT)), safe


def _sorted(U: Tensor, S: Tensor, Vh: Tensor) -> SVD:
    S, order = S.sort(descending=True, stable=True)
    U = U.gather(-1, order[..., None, :].expand_as(U))
    return SVD(U, S, Vh.gather(-2, order[..., None].expand_as(Vh)))


def _turned(U: Tensor, A: Tensor) -> SVD:
    """The singular triplets within the span of U (batch, side, rank): Rayleigh and Ritz, float64.

    A Gram matrix in float32 knows the span, but mixes in it directions of singular values that are
    far below the largest.
    """
    with torch.autocast(A.device.type, enabled=False):
        U = torch.linalg.qr(U.double()).Q
        core = U.mT @ A.double()
        values, turn = eigh_descending(core @ core.mT)
        S = values.clamp(min=0).sqrt()
        Vh = turn.mT @ core / torch.where(S > 0, S, 1)[..., None]
        return SVD((U @ turn).to(A.dtype), S.to(A.dtype), Vh.to(A.dtype))


def _is_safe(values: Tensor, rank: int) -> Tensor:
    """Whether the Gram matrix knew enough of its matrix.

    Args:
        values: (batch, side), its eigenvalues, descending, in the dtype it was computed in.
        rank: how many of them are kept.

    Returns:
        (batch,), bool.
    """
    S = values[..., :rank].clamp(min=0).sqrt()
    if values.dtype == torch.float64:
        return S[..., -1] > SQUARING_LIMIT * S[..., 0]
    # To turn more than half of the directions takes as long as float64 from the beginning.
    limit = SINGLE_LIMIT if 2 * rank <= values.shape[-1] else SINGLE_ORDER
    return (S[..., -1] > limit * S[..., 0]) & (single_excess(values, rank) < SINGLE_EXCESS)


def single_excess(values: Tensor, rank: int) -> Tensor:
    """By how much truncation through a Gram matrix in float32 may err above the least error.

    Kept and dropped directions i and j of the Gram matrix are mixed by its error e_ij, at a cost of
    ``min(e_ij^2 / (l_i - l_j), l_i - l_j)`` of the energy kept. The errors were about
    ``eps l_1 / sqrt(side)`` in all spectra tried (docs/performance.md), up to a factor below the 6
    that is here.

    Args:
        values: (batch, side), eigenvalues of the Gram matrix, descending.
        rank: how many of them are kept.

    Returns:
        (batch,), float64, relative to the error of the best truncation: 1e-6 is one millionth more.
    """
    values = values.double().clamp(min=0)
    kept, dropped = values[..., :rank], values[..., rank:]
    if dropped.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    error = 6 * torch.finfo(torch.float32).eps * values[..., 0] / values.shape[-1] ** 0.5
    gaps = (kept[..., :, None] - dropped[..., None, :]).clamp_min(torch.finfo(values.dtype).tiny)
    lost = torch.minimum(error[..., None, None].square() / gaps, gaps).sum((-2, -1))
    return lost / (2 * dropped.sum(-1)).clamp_min(torch.finfo(values.dtype).tiny)


def directly(matrices: Tensor, rank: int, name: str) -> SVD:
    """By a solver that squares nothing.

    That is gesdd on the CPU; on CUDA the polar decomposition, and where it loses anything, QR
    iteration (gesvd).
    """
    U, S, Vh = _by_polar(matrices, name) if matrices.is_cuda else _by_torch(matrices, name)
    return SVD(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def _by_polar(matrices: Tensor, name: str) -> SVD:
    """One after the other by cuSOLVER's polar decomposition, those it is not good for by torch."""
    found = [cusolver.svd(matrix) or _by_torch(matrix, name) for matrix in matrices]
    return SVD(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _by_torch(matrices: Tensor, name: str) -> SVD:
    driver = "gesvd" if matrices.is_cuda else None
    try:
        return SVD(*torch.linalg.svd(matrices, full_matrices=False, driver=driver))
    except LinAlgError as error:
        raise LinAlgError(f"no SVD of {name} converged: {error}") from error


def eigh_descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, the largest first, and their vectors."""
    found = cusolver.eigh(symmetric) if cusolver.takes_batch(symmetric) else None
    values, vectors = torch.linalg.eigh(symmetric) if found is None else found
    return values.flip(-1), vectors.flip(-1)
