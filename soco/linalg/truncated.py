"""Truncated singular value decompositions: what users call."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from soco.linalg.checks import check_matrix, check_rank, times_power_of_two, to_unit_range
from soco.linalg.exact import exact
from soco.linalg.factors import SVD, Factors
from soco.linalg.randomized import find_range, randomized

METHODS = ("exact", "randomized", "auto")


class Approximation(NamedTuple):
    """A decomposition that is not exact, and how far from that it may be."""

    svd: SVD
    excess: Tensor  # (...,), float64: the estimated excess error, relative to the least error


class Subspace(NamedTuple):
    """A weight projected on nearly its leading left singular vectors, without their order."""

    factors: Factors  # up (out, rank) with orthonormal columns, down (rank, in)
    captured: float  # the fraction of the weight's energy, |up down|_F^2 / |W|_F^2


@torch.no_grad()
def truncated_svd(
    weight: Tensor,
    rank: int,
    method: Literal["exact", "randomized", "auto"] = "exact",
    *,
    oversampling: float = 0.25,
    power_iterations: int = 4,
    seed: int = 0,
    name: str = "weight",
) -> SVD:
    """The leading ``rank`` singular triplets of a weight, or of a batch of weights.

    ``exact`` goes the quickest way on which a matrix loses nothing:

    - Up to 64 rows or columns: :func:`soco.ops.batched_svd`, all matrices of a batch together.
    - The eigenvectors of the Gram matrix of the smaller side, in the weight's own dtype, and the
      weight projected on those that are kept. In float32 only where the eigenvalues show that
      this costs less than 5e-7 of the least error (``exact.single_excess``) and every kept
      singular value is above 0.002 of the largest; true of most weights as they are.
    - The same in float64, where every kept singular value is above 1e-6 of the largest.
    - ``torch.linalg.svd`` in float64, which squares nothing: for matrices without full rank, say.
      On CUDA cuSOLVER's polar decomposition, where it is as good.

    The matrices of a batch are taken apart side by side: on a thread each on the CPU; on CUDA by
    one call up to 512 rows or columns, on a stream each above.

    ``randomized`` is :func:`randomized_svd` without its estimate. ``auto`` takes that where it was
    quicker in measurements (docs/performance.md), and ``exact`` elsewhere: from 512 rows and
    columns on, for ranks up to an eighth of the smaller side, a sixteenth if the other is more than
    twice as long. On a GPU, where it has not been measured yet, up to a quarter.

    Whichever way, the largest entry of every column of U is positive. No gradient flows.

    Args:
        weight: (..., out, in), floating point, of any strides.
        rank: triplets to keep, 0 to min(out, in).
        method: "exact", "randomized" or "auto".
        oversampling: see :func:`randomized_svd`, as the next two; of no use to ``exact``.
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

    >>> U, S, Vh = truncated_svd(torch.tensor([[0.0, 4.0], [9.0, 0.0]]), 1)
    >>> U.T.round(), S, Vh.round()
    (tensor([[0., 1.]]), tensor([9.]), tensor([[1., 0.]]))
    """
    rank = _check(weight, rank, oversampling, power_iterations, name)
    if method not in METHODS:
        raise ValueError(f"method must be {', '.join(METHODS[:-1])} or auto, got {method!r}")
    flat = _flat(weight)
    if rank == 0 or flat.numel() == 0:
        return _nothing(weight, rank)
    if method == "randomized" or (method == "auto" and randomized_is_quicker(weight, rank)):
        columns = sketch_columns(rank, min(weight.shape[-2:]), oversampling)
        svd, _ = randomized(flat, rank, columns, power_iterations, seed, name, estimate=False)
    else:
        svd = exact(flat, rank, name)
    return _shaped(svd, weight)


@torch.no_grad()
def randomized_svd(
    weight: Tensor,
    rank: int,
    *,
    tolerance: float | None = None,
    oversampling: float = 0.25,
    power_iterations: int = 4,
    seed: int = 0,
    name: str = "weight",
) -> Approximation:
    """The leading triplets by subspace iteration from a Gaussian sketch, and how good they are.

    The error ``|W - U S Vh|_F`` is above the least one: by 0.1 to 0.2 % in the mean over the layers
    of two trained models at a third of the full rank, 0.5 % at worst; with 2 power iterations by
    1 %, with 8 by 0.02 %. The estimate of it was 1.6 to 3 times the true excess for spectra
    of most kinds, and more where the excess is so small, or the largest singular values are so far
    above the others, that float32 hides it (docs/performance.md). It needs 3 power iterations.

    Args:
        weight: (..., out, in), floating point, of any strides.
        rank: triplets to keep, 0 to min(out, in).
        tolerance: an excess that is accepted, 0.001 for 0.1 %. Where the estimate is above, more
            columns are taken, up to half of the smaller side; then the exact way.
        oversampling: extra columns of the sketch, as a fraction of ``rank``; if positive, at least
            8 columns.
        power_iterations: products with the weight and its transpose after the sketch.
        seed: of the sketch; the same seed gives the same result on every device, up to rounding.
        name: what to call the weight in an error.

    Raises:
        ValueError: as for :func:`truncated_svd`; or ``tolerance`` is not positive, or is given with
            fewer than 3 power iterations, from which no error can be told.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061 (randomized range finder); Yamamoto et al.,
    ETNA 44, 2015 (CholeskyQR2).
    """
    rank = _check(weight, rank, oversampling, power_iterations, name)
    if tolerance is not None and not (tolerance > 0 and power_iterations >= 3):
        raise ValueError(
            f"tolerance must be positive, with 3 power iterations or more, got {tolerance} with "
            f"{power_iterations}"
        )
    flat, side = _flat(weight), min(weight.shape[-2:])
    batch = weight.shape[:-2]
    if rank == 0 or flat.numel() == 0:
        none = torch.zeros(batch, dtype=torch.float64, device=weight.device)
        return Approximation(_nothing(weight, rank), none)
    columns = sketch_columns(rank, side, oversampling)
    arguments = power_iterations, seed, name
    svd, excess = randomized(flat, rank, columns, *arguments, estimate=True)
    while tolerance is not None and (missed := excess > tolerance).any():
        columns = math.ceil(1.5 * columns)
        if columns > side // 2:
            again, better = exact(flat[missed], rank, name), excess.new_zeros(int(missed.sum()))
        else:
            again, better = randomized(flat[missed], rank, columns, *arguments, estimate=True)
        for old, new in zip(svd, again, strict=True):
            old[missed] = new.to(old.dtype)
        excess[missed] = better
    return Approximation(_shaped(svd, weight), excess.reshape(batch))


@torch.no_grad()
def subspace(
    weight: Tensor, rank: int, *, power_iterations: int = 4, seed: int = 0, name: str = "weight"
) -> Subspace:
    """A weight (out, in) as ``Q (Q^T W)``, Q nearly its leading left singular vectors.

    For who needs factors, and neither singular values nor their order: no small decomposition
    follows the iterations. The error is that of :func:`randomized_svd` without oversampling, about
    1 % above the least with 4 power iterations; ``captured`` tells it exactly.

    Args:
        weight: (out, in), floating point.
        rank: columns of Q, 0 to min(out, in).
        power_iterations: products with the weight and its transpose after the sketch.
        seed: of the sketch.
        name: what to call the weight in an error.

    Raises:
        ValueError: as for :func:`truncated_svd`.
    """
    rank = _check(weight, rank, 0.0, power_iterations, name)
    if weight.dim() != 2:
        raise ValueError(f"{name} must be (out, in), got {tuple(weight.shape)}")
    wide = _flat(weight)
    if rank == 0 or wide.numel() == 0:
        return Subspace(
            Factors(wide.new_zeros(len(weight), rank), wide.new_zeros(rank, weight.shape[1])), 0.0
        )
    matrices, exponent = to_unit_range(wide)
    with torch.autocast(weight.device.type, enabled=False):
        Q = find_range(matrices, rank, power_iterations, seed).Q[0]
        down = Q.mT @ matrices[0]
    energy = matrices.double().square().sum()
    captured = float(down.double().square().sum() / energy) if energy > 0 else 1.0
    return Subspace(Factors(Q, times_power_of_two(down, exponent[0])), min(captured, 1.0))


def randomized_is_quicker(weight: Tensor, rank: int) -> bool:
    """The rule of ``method="auto"``, from the smaller side, the rank and the device."""
    side, other = sorted(weight.shape[-2:])
    part = 4 if weight.is_cuda else 8 if other <= 2 * side else 16
    return side >= 512 and rank <= side // part


def sketch_columns(rank: int, side: int, oversampling: float) -> int:
    """Columns of a sketch for ``rank`` triplets."""
    extra = max(8, math.ceil(oversampling * rank)) if oversampling else 0
    return min(rank + extra, side)


def _check(weight: Tensor, rank: int, oversampling: float, power_iterations: int, name: str) -> int:
    check_matrix(weight, name)
    rank = check_rank(rank, min(weight.shape[-2:]), name)
    if not (math.isfinite(oversampling) and oversampling >= 0):
        raise ValueError(f"oversampling must be a finite number, at least 0, got {oversampling}")
    if power_iterations < 0:
        raise ValueError(f"power_iterations must be at least 0, got {power_iterations}")
    return rank


def _flat(weight: Tensor) -> Tensor:
    """(batch, out, in) in the dtype that is computed in."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.reshape(math.prod(weight.shape[:-2]), *weight.shape[-2:]).to(dtype)


def _shaped(svd: SVD, weight: Tensor) -> SVD:
    """With the weight's leading dimensions, in the dtype that is promised."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return SVD(*(part.to(dtype).reshape(*weight.shape[:-2], *part.shape[1:]) for part in svd))


def _nothing(weight: Tensor, rank: int) -> SVD:
    batch, (rows, inputs) = weight.shape[:-2], weight.shape[-2:]
    sizes = (rows, rank), (rank,), (rank, inputs)
    like = _flat(weight)
    return SVD(*(like.new_zeros((*batch, *size)) for size in sizes))
