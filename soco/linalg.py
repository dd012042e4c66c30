"""Truncated and whitened singular value decompositions: the numbers behind every factor pair."""

import math
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from soco import ops

# A Gram matrix in float64 knows a singular value s to some eps (s_1 / s)^2 of itself. Down to this
# fraction of the largest one that is good enough (3e-10 of itself measured at n = 200, residuals
# below 1e-9 s_1); below it, nothing is squared.
SQUARING_LIMIT = 1e-6

# How far from symmetric or positive a Gram matrix may be, as a fraction of its largest entry or
# eigenvalue, and still count as one that was only accumulated in low precision.
_GRAM_TOLERANCE = 1e-4

# Columns (batch, n, columns) -> orthonormal ones, and whether that failed (batch,), bool.
Orthonormalizer = Callable[[Tensor], tuple[Tensor, Tensor]]


class SVD(NamedTuple):
    """A singular value decomposition ``U diag(S) Vh``, batched over leading dimensions."""

    U: Tensor  # (..., out, rank), orthonormal columns
    S: Tensor  # (..., rank), descending
    Vh: Tensor  # (..., rank, in), orthonormal rows


class Factors(NamedTuple):
    """A weight (out, in) as the product ``up @ down``."""

    up: Tensor  # (out, rank)
    down: Tensor  # (rank, in)

    def to(self, dtype: torch.dtype) -> "Factors":
        """Round both factors to ``dtype``."""
        return Factors(self.up.to(dtype), self.down.to(dtype))

    def product(self) -> Tensor:
        """The weight (out, in) that the factors stand for."""
        return self.up @ self.down


class Spectrum(NamedTuple):
    """A weight as ``up @ diag(sigma) @ down``, its components ordered by what dropping them costs.

    At full rank, min(out, in), it is the weight itself; the first r components are the best rank r.
    """

    up: Tensor  # (out, rank); orthonormal columns only where outputs are not weighted
    sigma: Tensor  # (rank,), descending
    down: Tensor  # (rank, in); orthonormal rows only where inputs are not weighted

    def truncate(self, rank: int) -> Factors:
        """Keep the first ``rank`` components, with ``sqrt(sigma)`` on either side.

        >>> spectrum = whitened_svd(torch.tensor([[0.0, 4.0], [9.0, 0.0]]), None)
        >>> spectrum.truncate(1)
        Factors(up=tensor([[0.],
                [3.]]), down=tensor([[3., 0.]]))
        """
        rank = _check_rank(rank, len(self.sigma), "the spectrum")
        root = self.sigma[:rank].sqrt()
        return Factors(self.up[:, :rank] * root, root[:, None] * self.down[:rank])


@torch.no_grad()
def truncated_svd(
    weight: Tensor,
    rank: int,
    method: Literal["exact", "randomized"] = "exact",
    *,
    oversampling: float = 0.25,
    power_iterations: int = 4,
    seed: int = 0,
    name: str = "weight",
) -> SVD:
    """The leading ``rank`` singular triplets of a weight, or of a batch of weights.

    ``exact`` takes the eigenvectors of the Gram matrix of the smaller side in float64 and projects
    the weight on the ones kept. Squaring loses singular values far below the largest, so a matrix
    whose kept ones reach below ``SQUARING_LIMIT`` of it (rank-deficient ones too), or whose
    eigensolver fails, goes through ``torch.linalg.svd`` in float64 instead.

    ``randomized`` finds the range of the weight by subspace iteration from a Gaussian sketch and
    solves in that range. Its error is above the optimum: by 0.1 to 0.2 % in the mean over the
    layers of two trained models at a third of the full rank, 0.5 % at worst (whitened: 0.03 % and
    0.14 %); with 2 power iterations by 1 to 2 %, with 8 by 0.02 %. On a CPU it is the quicker one
    for weights of about 1000 rows or more, up to a quarter of the full rank.

    Either way the largest entry of every column of U is positive, so that equal inputs give equal
    results whichever way was taken. No gradient flows.

    Args:
        weight: (..., out, in), floating point, of any strides.
        rank: triplets to keep, 0 to min(out, in).
        method: "exact" or "randomized".
        oversampling: extra columns of the sketch, as a fraction of ``rank``; if positive, at least
            8 columns. Randomized only, like the next two.
        power_iterations: products with the weight and its transpose after the sketch.
        seed: of the sketch; the same seed gives the same result.
        name: what to call the weight in an error.

    Returns:
        U (..., out, rank), S (..., rank) and Vh (..., rank, in), float64 for a float64 weight and
        float32 for any other.

    Raises:
        ValueError: the weight is not a floating-point matrix or holds NaN or Inf, or an argument is
            out of range.
        torch.linalg.LinAlgError: the stable route did not converge either.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061 (randomized range finder); Yamamoto et al.,
    ETNA 44, 2015 (CholeskyQR2).

    >>> U, S, Vh = truncated_svd(torch.tensor([[0.0, 4.0], [9.0, 0.0]]), 1)
    >>> U.T, S, Vh
    (tensor([[0., 1.]]), tensor([9.]), tensor([[1., 0.]]))
    """
    _check_matrix(weight, name)
    *batch, rows, inputs = weight.shape
    rank = _check_rank(rank, min(rows, inputs), name)
    if method not in ("exact", "randomized"):
        raise ValueError(f'method must be "exact" or "randomized", got {method!r}')
    columns = _sketch_columns(rank, min(rows, inputs), oversampling)
    if power_iterations < 0:
        raise ValueError(f"power_iterations must be at least 0, got {power_iterations}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    flat = weight.reshape(math.prod(batch), rows, inputs)
    if rank == 0 or len(flat) == 0:
        svd = SVD(*(flat.new_zeros(len(flat), *s) for s in ((rows, rank), (rank,), (rank, inputs))))
    elif method == "exact":
        svd = _exact(flat.double(), rank, name)
    else:
        svd = _randomized(flat.to(dtype), rank, columns, power_iterations, seed, name)
    return SVD(*(part.to(dtype).reshape(*batch, *part.shape[1:]) for part in svd))


@torch.no_grad()
def whitened_svd(
    weight: Tensor, gram: Tensor | None, rank: int | None = None, *, name: str = "weight"
) -> Spectrum:
    """Order a weight's components by what they matter to its outputs on given inputs.

    With the Gram matrix ``G = X X^T`` of the inputs X (in, tokens), the output error of a
    replacement is ``|(W - W') X|_F^2 = tr((W - W') G (W - W')^T)``. The eigenvectors of
    ``W G W^T = U diag(sigma^2) U^T`` give its best rank r, ``W' = U_r U_r^T W``, for every r, and
    the error is exactly the norm of the ``sigma`` dropped. They are the singular values of ``W S``
    for any root ``S S^T = G``, and W' is ``U_r diag(sigma_r) V_r^T S^-1`` where S has an inverse;
    but no root is taken and nothing is inverted here, so that G may be singular.

    ``down`` is ``diag(1 / sigma) U^T W``. Where G sees nothing (dead channels, fewer tokens than
    channels), ``sigma`` is at the noise of the solver, ``sqrt(min(out, in) * eps)`` of the
    largest; it is set to that floor, and the directions are those of the plain SVD of what remains.
    So the full spectrum is W itself whatever G is. An all-zero G gives the plain SVD.

    Args:
        weight: (out, in), floating point.
        gram: (in, in), symmetric positive semidefinite, on the weight's device; best accumulated
            in float64. None means the identity: the plain SVD.
        rank: components to keep, 0 to min(out, in); None keeps all.
        name: what to call the weight in an error.

    Returns:
        The spectrum, computed in float64, in float64 for a float64 weight and float32 for any
        other.

    Raises:
        ValueError: the weight is not a floating-point matrix or holds NaN or Inf; the same of the
            Gram matrix, or it is not symmetric positive semidefinite; ``rank`` is out of range.

    Source: the objective is SVD-LLM's, arXiv:2403.07378; this form of its solution is
    Swift-SVD's, arXiv:2604.01609.

    >>> gram = torch.diag(torch.tensor([1.0, 100.0]))  # the second input is ten times larger
    >>> whitened_svd(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), gram).sigma
    tensor([10.,  3.])
    """
    _check_matrix(weight, name)
    if weight.dim() != 2:
        raise ValueError(f"{name} must be (out, in), got {tuple(weight.shape)}")
    rank = _check_rank(min(weight.shape) if rank is None else rank, min(weight.shape), name)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if gram is not None:
        _check_gram(gram, weight, name)
    if gram is None or rank == 0 or not (gram.any() and weight.any()):
        spectrum = Spectrum(*truncated_svd(weight.double(), rank, name=name))
    else:
        spectrum = _whitened(weight.double(), gram.double(), rank, name)
    return Spectrum(*(part.to(dtype) for part in spectrum))


def _whitened(weight: Tensor, gram: Tensor, rank: int, name: str) -> Spectrum:
    """``whitened_svd`` in float64, of a weight and a Gram matrix that are not zero."""
    weight, weight_scale = _to_unit_range(weight)
    gram, gram_scale = _to_unit_range(gram)
    # weight = basis @ core with orthonormal columns in basis; core is (side, in), side <= in.
    basis, core = (None, weight) if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight)
    energy = core @ gram @ core.mT  # (side, side)
    values, vectors = _eigh_descending((energy + energy.mT) / 2)
    # Below this an eigenvalue is rounding: the solver's, or that of the products before it.
    side, eps = len(values), torch.finfo(torch.float64).eps
    noise = eps * torch.maximum(side * values[0], core.square().sum() * gram.diagonal().amax())
    if values[-1] < -torch.maximum(_GRAM_TOLERANCE * values[0], noise):
        raise ValueError(
            f"the Gram matrix of {name} is not positive semidefinite: one direction of the outputs "
            f"has an energy of {values[-1]:.3g}, next to {values[0]:.3g} in the largest"
        )
    sigma = values.clamp(min=noise).sqrt()
    seen = int((values > noise).sum())
    spectrum = order_components(core, vectors, sigma, seen, rank, basis, name=name)
    root = gram_scale.sqrt()
    return Spectrum(spectrum.up, spectrum.sigma * weight_scale * root, spectrum.down / root)


def order_components(
    core: Tensor,
    vectors: Tensor,
    sigma: Tensor,
    seen: int,
    rank: int,
    basis: Tensor | None = None,
    *,
    name: str = "weight",
) -> Spectrum:
    """A weight by given directions of its outputs: ``down = diag(1 / sigma) vectors^T core``.

    Directions that no input moves (all but the first ``seen``) are turned to those of the plain SVD
    of what remains, so that the full spectrum is the weight itself.

    Args:
        core: (side, in), float64: the weight, or what is right of ``basis`` in it.
        vectors: (side, side), orthonormal columns.
        sigma: (side,), descending, positive.
        seen: how many of the directions have a ``sigma`` that is more than rounding.
        rank: components to keep.
        basis: (out, side), orthonormal columns: the weight is ``basis @ core``; None is identity.
        name: what to call the weight in an error.
    """
    if seen < rank:
        unseen = vectors[:, seen:]  # (side, side - seen)
        turn = truncated_svd(unseen.mT @ core, vectors.shape[1] - seen, name=name).U
        vectors = torch.cat([vectors[:, :seen], unseen @ turn], dim=1)
    up, sigma = vectors[:, :rank], sigma[:rank]
    up, down = _fix_signs(up if basis is None else basis @ up, up.mT @ core / sigma[:, None])
    return Spectrum(up, sigma, down)


def _exact(weight: Tensor, rank: int, name: str) -> SVD:
    """Exact truncated SVD of float64 matrices (batch, out, in), each by the way it needs."""
    matrices, scale = _to_unit_range(weight)
    try:
        svd, squarable = _by_gram(matrices, rank)
    except LinAlgError:
        svd = _by_svd(matrices, rank, name)
    else:
        if not squarable.all():
            stable = _by_svd(matrices[~squarable], rank, name)
            svd = SVD(*(a.index_put((~squarable,), b) for a, b in zip(svd, stable, strict=True)))
    U, Vh = _fix_signs(svd.U, svd.Vh)
    return SVD(U, svd.S * scale, Vh)


def _by_gram(matrices: Tensor, rank: int) -> tuple[SVD, Tensor]:
    """Eigenvectors of the smaller side's Gram matrix, projected: A = U (U^T A).

    The rows of ``U^T A`` are orthogonal up to eps (s_1 / s_rank)^2, which one Cholesky step mends.

    Returns:
        The decomposition, and for each matrix whether squaring it was safe (batch,), bool; where it
        was not, the decomposition is not to be used.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    A = matrices if wide else matrices.mT
    values, vectors = _eigh_descending(A @ A.mT)
    S = values[..., :rank].clamp(min=0).sqrt()
    squarable = S[..., -1] > SQUARING_LIMIT * S[..., 0]
    U = vectors[..., :rank]
    Vh = U.mT @ A / torch.where(squarable[..., None], S, 1)[..., None]
    L, info = torch.linalg.cholesky_ex(Vh @ Vh.mT)  # close to the identity where it is safe
    squarable &= info == 0
    Vh = torch.linalg.solve_triangular(L, Vh, upper=False)
    S, order = (S * L.diagonal(dim1=-2, dim2=-1)).sort(descending=True, stable=True)
    U = U.gather(-1, order[..., None, :].expand_as(U))
    Vh = Vh.gather(-2, order[..., None].expand_as(Vh))
    return (SVD(U, S, Vh) if wide else SVD(Vh.mT, S, U.mT)), squarable


def _by_svd(matrices: Tensor, rank: int, name: str) -> SVD:
    """The solver that squares nothing: gesdd on the CPU, QR iteration (gesvd) on CUDA."""
    driver = "gesvd" if matrices.is_cuda else None
    try:
        U, S, Vh = torch.linalg.svd(matrices, full_matrices=False, driver=driver)
    except LinAlgError as error:
        raise LinAlgError(f"no SVD of {name} converged: {error}") from error
    return SVD(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def _randomized(
    weight: Tensor, rank: int, columns: int, power_iterations: int, seed: int, name: str
) -> SVD:
    """Randomized truncated SVD of float32 or float64 matrices (batch, out, in)."""
    matrices, scale = _to_unit_range(weight)
    with torch.autocast(weight.device.type, enabled=False):
        Q, failed = _range(matrices, columns, power_iterations, seed, _cholesky_qr)
        if failed.any():
            again, _ = _range(matrices[failed], columns, power_iterations, seed, _householder_qr)
            Q = Q.index_put((failed,), again)
        inner = _exact((Q.mT @ matrices).double(), rank, name)  # Rayleigh-Ritz, (columns, in)
        U, Vh = _fix_signs(Q.double() @ inner.U, inner.Vh)
    return SVD(U, inner.S * scale, Vh)


def _range(
    matrices: Tensor, columns: int, power_iterations: int, seed: int, orthonormal: Orthonormalizer
) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span nearly the leading left singular vectors.

    Returns:
        (batch, out, columns), and for each matrix whether orthonormalizing failed (batch,), bool;
        nothing waits for the device before that.
    """
    Q, failed = orthonormal(ops.gaussian_sketch(matrices, columns, seed))
    for _ in range(power_iterations):
        Q, bad = orthonormal(matrices.mT @ Q)
        failed |= bad
        Q, bad = orthonormal(matrices @ Q)
        failed |= bad
    Q, bad = orthonormal(Q)
    return Q, failed | bad


def _cholesky_qr(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q of Y = Q L^T, L L^T = Y^T Y in float64: orthonormal to eps times Y's condition squared."""
    wide = Y.double().mT
    L, info = torch.linalg.cholesky_ex(wide @ wide.mT)
    return torch.linalg.solve_triangular(L, wide, upper=False).mT.to(Y.dtype), info != 0


def _householder_qr(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Q of the Householder QR, which no input breaks."""
    return torch.linalg.qr(Y).Q, Y.new_zeros(len(Y), dtype=torch.bool)


def _eigh_descending(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(-1), vectors.flip(-1)


def _fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of every column of U positive."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))  # (..., 1, rank)
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vh * sign.mT


def _to_unit_range(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Divide matrices (..., out, in) by a power of two each, exactly, so that squares stay finite.

    Returns:
        The matrices with entries up to 1, and what they were divided by (..., 1).
    """
    peak = matrix.abs().amax((-2, -1))
    scale = torch.exp2(torch.frexp(peak).exponent.to(matrix.dtype))
    return matrix / scale[..., None, None], scale[..., None]


def _sketch_columns(rank: int, side: int, oversampling: float) -> int:
    if not (math.isfinite(oversampling) and oversampling >= 0):
        raise ValueError(f"oversampling must be a finite number, at least 0, got {oversampling}")
    extra = max(8, math.ceil(oversampling * rank)) if oversampling else 0
    return min(rank + extra, side)


def _check_rank(rank: int, most: int, name: str) -> int:
    try:
        rank = operator.index(rank)
    except TypeError:
        raise ValueError(f"rank must be a whole number, got {rank!r}") from None
    if not 0 <= rank <= most:
        raise ValueError(f"rank must be from 0 to {most} for {name}, got {rank}")
    return rank


def _check_matrix(matrix: Tensor, name: str) -> None:
    if matrix.dim() < 2:
        raise ValueError(f"{name} must be (..., out, in), got {tuple(matrix.shape)}")
    if not matrix.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {matrix.dtype}")
    finite = matrix.isfinite()
    if not finite.all():
        bad = (~finite).nonzero()
        raise ValueError(
            f"{name} {tuple(matrix.shape)} holds NaN or Inf in {len(bad)} of its entries, "
            f"the first at {tuple(bad[0].tolist())}"
        )


def _check_gram(gram: Tensor, weight: Tensor, name: str) -> None:
    title, inputs = f"the Gram matrix of {name}", weight.shape[1]
    if gram.shape != (inputs, inputs):
        raise ValueError(
            f"{title} must be (in, in) = ({inputs}, {inputs}), got {tuple(gram.shape)}"
        )
    if gram.device != weight.device:
        raise ValueError(f"{title} is on {gram.device}, the weight on {weight.device}")
    _check_matrix(gram, title)
    if inputs == 0:
        return
    largest = gram.abs().amax()
    skew = (gram - gram.mT).abs().amax()
    if skew > _GRAM_TOLERANCE * largest:
        raise ValueError(
            f"{title} is not symmetric: entries mirrored on the diagonal differ by up to "
            f"{skew:.3g}, where the largest is {largest:.3g}"
        )
    if gram.diagonal().amin() < -_GRAM_TOLERANCE * largest:
        raise ValueError(
            f"{title} is not positive semidefinite: its diagonal holds {gram.diagonal().amin():.3g}"
        )
