"""Approximate truncated decompositions from a random sketch: subspace iteration and its error."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from soco import ops
from soco.linalg.checks import times_power_of_two, to_unit_range
from soco.linalg.exact import exact
from soco.linalg.factors import SVD
from soco.linalg.halves import Halves, pay

# Columns (batch, n, columns), and whether this is the last pass -> orthonormal ones, and whether
# that failed (batch,), bool.
Orthonormalizer = Callable[..., tuple[Tensor, Tensor]]
EXACT = 2  # of the last iterations are all in the matrices' own dtype
SAFETY = 3.0  # what the gain to come is multiplied by
ENOUGH = 3  # power iterations from which on an error can be estimated


class Range(NamedTuple):
    """Orthonormal columns that span nearly the leading left singular vectors of matrices."""

    Q: Tensor  # (batch, out, columns)
    failed: Tensor  # (batch,), bool: whether orthonormalizing failed
    captured: list[Tensor]  # (batch,), float64: the energy kept two iterations and one before the
    # end, where there are ENOUGH


def randomized(
    weight: Tensor,
    rank: int,
    columns: int,
    power_iterations: int,
    seed: int,
    name: str,
    *,
    estimate: bool,
) -> tuple[SVD, Tensor]:
    """Randomized truncated SVD of matrices (batch, out, in), float32 or float64, of rank above 0.

    With ``estimate``, the Ritz values of two iterations are computed, for the error.

    Returns:
        The decomposition, and the estimated excess error (batch,), float64; Inf if it is unknown.
    """
    matrices, exponent = to_unit_range(weight)
    with torch.autocast(weight.device.type, enabled=False):
        kept = rank if estimate else None
        found = find_range(matrices, columns, power_iterations, seed, kept)
        # Rayleigh and Ritz: (columns, in)
        inner = exact((found.Q.mT @ matrices).double(), rank, name)
        U, Vh = ops.fix_signs(found.Q.double() @ inner.U, inner.Vh)
    excess = inner.S.new_full((len(inner.S),), math.inf)
    if columns == min(matrices.shape[-2:]):  # the range is the whole space
        excess = torch.zeros_like(excess)
    elif estimate:
        energy = matrices.double().square().sum((-2, -1))
        captured = [*found.captured, inner.S.square().sum(-1)]
        excess = estimated_excess(captured, energy, torch.finfo(matrices.dtype).eps)
    return SVD(U, times_power_of_two(inner.S, exponent[..., None]), Vh), excess


def find_range(
    matrices: Tensor, columns: int, power_iterations: int, seed: int, kept: int | None = None
) -> Range:
    """Subspace iteration from a Gaussian sketch: Q, then those of ``A A^T Q`` again and again.

    Orthonormal by a Cholesky decomposition after every product; matrices for which that fails go
    through Householder's QR. On a GPU nothing waits for it before that, and in float32 products are
    made of three in bfloat16, but for those of the last two iterations: these mend what was lost,
    and it is from them that the error is told.

    Args:
        matrices: (batch, out, in), with entries up to 1.
        columns: of Q.
        power_iterations: products with the matrices and their transposes after the sketch.
        seed: of the sketch.
        kept: how many Ritz values ``captured`` is the energy of; None computes none.
    """
    found = _iterate(matrices, columns, power_iterations, seed, kept, cholesky_qr)
    if not found.failed.any():
        return found
    bad = found.failed
    again = _iterate(matrices[bad], columns, power_iterations, seed, kept, householder_qr)
    captured = [
        old.index_put((bad,), new) for old, new in zip(found.captured, again.captured, strict=True)
    ]
    return Range(found.Q.index_put((bad,), again.Q), again.failed, captured)


def _iterate(
    matrices: Tensor,
    columns: int,
    power_iterations: int,
    seed: int,
    kept: int | None,
    orthonormal: Orthonormalizer,
) -> Range:
    """``find_range`` by one way to make columns orthonormal."""
    Q, failed = orthonormal(ops.gaussian_sketch(matrices, columns, seed))
    captured: list[Tensor] = []
    halves = Halves.of(matrices) if power_iterations > EXACT and pay(matrices) else None
    for iteration in range(power_iterations):
        rough = halves if iteration < power_iterations - EXACT else None
        Z = _times(matrices.mT, rough and rough.mT, Q)  # (batch, in, columns)
        if kept is not None and iteration >= max(power_iterations, ENOUGH) - 2:
            wide = Z.double()
            gram = (wide.mT @ wide).nan_to_num(0.0, 0.0, 0.0)  # where it failed
            captured.append(torch.linalg.eigvalsh(gram)[..., -kept:].clamp(min=0).sum(-1))
        Z, bad = orthonormal(Z)
        failed = failed | bad
        Q, bad = orthonormal(_times(matrices, rough, Z))
        failed = failed | bad
    Q, bad = orthonormal(Q, True)
    # Columns that depend on each other up to rounding may pass, and become zero.
    gram = Q.double().mT @ Q.double()
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    orthonormal_enough = gram.abs().amax((-2, -1)) < 1e3 * torch.finfo(Q.dtype).eps
    return Range(Q, failed | bad | ~orthonormal_enough, captured)


def _times(matrices: Tensor, halves: Halves | None, columns: Tensor) -> Tensor:
    """The product, by the halves of the matrices if there are any."""
    return matrices @ columns if halves is None else halves @ Halves.of(columns)


def estimated_excess(captured: list[Tensor], energy: Tensor, eps: float) -> Tensor:
    """What the error of a truncation is above the least one, from how the energy kept has grown.

    The gain of an iteration is a sum of terms that shrink geometrically; what all further ones
    would bring is taken from the last two gains as if it were one such term, times ``SAFETY``,
    since slower terms come to the fore later. No gain is seen that is smaller than the rounding of
    the energy itself: that much may always be to come.

    Args:
        captured: (batch,) each, the energy kept two iterations and one before the end, and then.
            With fewer nothing is known.
        energy: (batch,), that of the matrices.
        eps: of the products that the energies come from.

    Returns:
        (batch,), relative to the error: 0.01 is one percent above the least. Inf where it is
        unknown.
    """
    if len(captured) < ENOUGH:
        return torch.full_like(energy, math.inf)
    noise = eps * captured[2]
    before, gain = captured[1] - captured[0], captured[2] - captured[1]
    tiny = torch.finfo(energy.dtype).tiny
    ratio = ((gain - noise) / before.clamp_min(tiny)).clamp(0, 0.99)
    coming = SAFETY * (gain.clamp(min=0) * ratio / (1 - ratio) + noise)
    left = (energy - captured[2]).clamp(min=0)
    found = (left / (left - coming).clamp_min(tiny)).sqrt() - 1
    return torch.where(coming < left, found, math.inf)


def cholesky_qr(Y: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
    """Q of Y = Q L^T, L L^T = Y^T Y: orthonormal to eps times Y's condition squared.

    In float64; but before the last pass, on a CPU, in float32 where that is good to 1e-3, which is
    enough to go on with.
    """
    wide = Y.mT  # (batch, columns, n)
    if not last and Y.dtype == torch.float32 and Y.device.type == "cpu":
        L, info = torch.linalg.cholesky_ex(wide @ wide.mT)
        sizes = L.diagonal(dim1=-2, dim2=-1)
        if not info.any() and (sizes.amin(-1) > 0.01 * sizes.amax(-1)).all():
            return torch.linalg.solve_triangular(L, wide, upper=False).mT, info != 0
    wide = wide.double()
    L, info = torch.linalg.cholesky_ex(wide @ wide.mT)
    return torch.linalg.solve_triangular(L, wide, upper=False).mT.to(Y.dtype), info != 0


def householder_qr(Y: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
    """Q of the Householder QR, which no input breaks."""
    del last
    return torch.linalg.qr(Y).Q, Y.new_zeros(len(Y), dtype=torch.bool)
