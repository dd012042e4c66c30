"""A weight's components by what they matter to its outputs on given inputs."""

import torch
from torch import Tensor

from soco.linalg.checks import (
    GRAM_TOLERANCE,
    check_gram,
    check_matrix,
    check_rank,
    largest_of,
    times_power_of_two,
    to_unit_range,
)
from soco.linalg.exact import eigh_descending
from soco.linalg.factors import Spectrum
from soco.linalg.truncated import truncated_svd
from soco.ops import fix_signs


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
    check_matrix(weight, name)
    if weight.dim() != 2:
        raise ValueError(f"{name} must be (out, in), got {tuple(weight.shape)}")
    rank = check_rank(min(weight.shape) if rank is None else rank, min(weight.shape), name)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if gram is not None:
        check_gram(gram, weight, name)
    if gram is None or rank == 0 or not (gram.any() and weight.any()):
        spectrum = Spectrum(*truncated_svd(weight.double(), rank, name=name))
    else:
        spectrum = _whitened(weight.double(), gram.double(), rank, name)
    return Spectrum(*(part.to(dtype) for part in spectrum))


def _whitened(weight: Tensor, gram: Tensor, rank: int, name: str) -> Spectrum:
    """``whitened_svd`` in float64, of a weight and a Gram matrix that are not zero."""
    weight, weight_exponent = to_unit_range(weight)
    gram_exponent = torch.frexp(largest_of(gram)).exponent
    # weight = basis @ core with orthonormal columns in basis; core is (side, in), side <= in.
    basis, core = (None, weight) if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight)
    # Of the Gram matrix divided by a power of two: the core is, which is smaller.
    energy = times_power_of_two(core, -gram_exponent) @ gram @ core.mT  # (side, side)
    values, vectors = eigh_descending((energy + energy.mT) / 2)
    # Below this an eigenvalue is rounding: the solver's, or that of the products before it.
    diagonal = times_power_of_two(gram.diagonal().amax(), -gram_exponent)
    side, eps = len(values), torch.finfo(torch.float64).eps
    noise = eps * torch.maximum(side * values[0], core.square().sum() * diagonal)
    if values[-1] < -torch.maximum(GRAM_TOLERANCE * values[0], noise):
        raise ValueError(
            f"the Gram matrix of {name} is not positive semidefinite: one direction of the outputs "
            f"has an energy of {values[-1]:.3g}, next to {values[0]:.3g} in the largest"
        )
    sigma = values.clamp(min=noise).sqrt()
    seen = int((values > noise).sum())
    spectrum = order_components(core, vectors, sigma, seen, rank, basis, name=name)
    root = torch.exp2(gram_exponent.double() / 2)
    sigma = times_power_of_two(spectrum.sigma, weight_exponent) * root
    return Spectrum(spectrum.up, sigma, spectrum.down / root)


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
    up, down = fix_signs(up if basis is None else basis @ up, up.mT @ core / sigma[:, None])
    return Spectrum(up, sigma, down)
