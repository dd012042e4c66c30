"""Singular value decompositions under weights on either side of a matrix, whatever their form."""

import torch
from torch import Tensor

from soco.linalg import Spectrum, order_components, truncated_svd, whitened_svd
from soco.ops import all_finite

# The smallest weight of an output, as a fraction of the largest: below it an output counts no less.
OUTPUT_FLOOR = 1e-6


@torch.no_grad()
def rooted_svd(weight: Tensor, root: Tensor, *, name: str = "weight") -> Spectrum:
    """Order a weight's components by ``|(W - W') S|_F`` for a given matrix S.

    S may be any root of the inputs' Gram matrix, ``S S^T = G``: its eigenvectors times the roots of
    its eigenvalues (SVD-LLM V2), the transposed R of a QR decomposition of the inputs (COALA), or a
    diagonal matrix, given as a vector (FWSVD, ASVD). All give the components of
    ``linalg.whitened_svd`` for that G. The singular values come out of an SVD of ``W S`` itself, so
    that small ones are as exact as S is: nothing is squared, and nothing inverted.

    Args:
        weight: (out, in), floating point.
        root: (in, columns), or (in,) for a diagonal matrix; on the weight's device.
        name: what to call the weight in an error.

    Returns:
        The full spectrum, in float64 for a float64 weight and float32 for any other.

    Raises:
        ValueError: the root does not fit the weight, or one of them holds NaN or Inf.

    Source: SVD-LLM V2, arXiv:2503.12340, section 3; COALA, arXiv:2507.07580.

    >>> rooted_svd(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, 10.0])).sigma
    tensor([10.,  3.])
    """
    if weight.dim() != 2 or root.dim() not in (1, 2) or len(root) != weight.shape[1]:
        raise ValueError(
            f"a root for {name} {tuple(weight.shape)} must be (in,) or (in, columns), got "
            f"{tuple(root.shape)}"
        )
    _check_finite(weight, name)
    _check_finite(root, f"the weights of the inputs of {name}")
    rank = min(weight.shape)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide, root = weight.double(), root.double()
    if rank == 0 or not (root.any() and weight.any()):
        return _rounded(Spectrum(*truncated_svd(wide, rank, name=name)), dtype)
    scale = root.abs().amax()  # so that squares inside solvers stay finite
    basis, core = (None, wide) if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(wide)
    seen_core = core * (root / scale) if root.dim() == 1 else core @ (root / scale)
    side, columns = seen_core.shape
    if columns > side:  # U and S are those of a square matrix, without a wide V
        U, S, _ = torch.linalg.svd(torch.linalg.qr(seen_core.mT, mode="r").R.mT)
    else:
        U, S, _ = torch.linalg.svd(seen_core, full_matrices=True)
    sigma = torch.zeros(U.shape[1], dtype=S.dtype, device=S.device)
    sigma[: len(S)] = S[: len(sigma)]
    noise = torch.finfo(torch.float64).eps * max(seen_core.shape) * S[0]
    seen = int((sigma > noise).sum())
    spectrum = order_components(core, U, sigma.clamp(min=noise), seen, rank, basis, name=name)
    spectrum = Spectrum(spectrum.up, spectrum.sigma * scale, spectrum.down / scale)
    return _rounded(spectrum, dtype)


def eigen_root(gram: Tensor) -> Tensor:
    """``U sqrt(E)`` (in, in) of a positive semidefinite ``gram = U E U^T``: a root, in float64."""
    values, vectors = torch.linalg.eigh(gram.double())
    return vectors * values.clamp(min=0).sqrt()


@torch.no_grad()
def two_sided_svd(
    weight: Tensor,
    gram: Tensor | None,
    grad_gram: Tensor,
    *,
    name: str = "weight",
) -> Spectrum:
    """Order a weight's components by ``tr((W - W')^T B (W - W') A)``.

    With A the Gram matrix of the inputs and B that of the gradients of the outputs (both per
    token), half of it is the second-order change of the loss when the two are independent (the
    Kronecker-factored Fisher information). For a root ``B = L L^T`` the best rank r is
    ``L^-T trunc_r(L^T W S) S^-1``; the inputs' root is not inverted (``whitened_svd``), the
    outputs' is, in its eigenbasis, with eigenvalues below ``OUTPUT_FLOOR^2`` of the largest raised
    to that: an output that the loss does not feel still has to stay finite.

    Args:
        weight: (out, in), floating point.
        gram: (in, in), symmetric positive semidefinite; None is the identity.
        grad_gram: (out, out), likewise, or (out,) for a diagonal matrix.
        name: what to call the weight in an error.

    Returns:
        The full spectrum, its ``up`` not orthonormal, in float64 for a float64 weight and float32
        for any other; ``sigma^2`` sums up to the trace above. An all-zero ``grad_gram`` counts as
        the identity.

    Raises:
        ValueError: a Gram matrix does not fit the weight, holds NaN or Inf, or is not positive
            semidefinite.

    Source: LEMS, ICML 2026 (KFAC-SVD); GFWSVD, arXiv:2505.17974; the factors of the Fisher
    information: Martens and Grosse, arXiv:1503.05671.
    """
    outputs = weight.shape[0]
    if grad_gram.shape not in ((outputs, outputs), (outputs,)):
        raise ValueError(
            f"the Gram matrix of the gradients of {name} must be (out, out) or (out,) with out = "
            f"{outputs}, got {tuple(grad_gram.shape)}"
        )
    _check_finite(grad_gram, f"the Gram matrix of the gradients of {name}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if not grad_gram.any():
        return whitened_svd(weight, gram, name=name)
    if grad_gram.dim() == 1:
        values, vectors = grad_gram.double(), None
    else:
        values, vectors = torch.linalg.eigh((grad_gram + grad_gram.mT).double() / 2)
    if values.min() < -1e-4 * values.abs().max():
        raise ValueError(
            f"the Gram matrix of the gradients of {name} is not positive semidefinite: its "
            f"smallest eigenvalue is {values.min():.3g}, its largest {values.max():.3g}"
        )
    root = values.clamp(min=float(values.max()) * OUTPUT_FLOOR**2).sqrt()  # (out,)
    turned = weight.double() if vectors is None else vectors.mT @ weight.double()
    spectrum = whitened_svd(root[:, None] * turned, gram, name=name)
    up = spectrum.up / root[:, None]
    up = up if vectors is None else vectors @ up
    return _rounded(Spectrum(up, spectrum.sigma, spectrum.down), dtype)


def shrunk(gram: Tensor, share: float) -> Tensor:
    """``(1 - share) gram + share * mean(diag gram) I``: what few tokens say, made safer."""
    mean = gram.diagonal().mean()
    return (1 - share) * gram + share * mean * torch.eye(
        len(gram), dtype=gram.dtype, device=gram.device
    )


def _rounded(spectrum: Spectrum, dtype: torch.dtype) -> Spectrum:
    return Spectrum(*(part.to(dtype) for part in spectrum))


def _check_finite(matrix: Tensor, title: str) -> None:
    if not all_finite(matrix):
        raise ValueError(f"{title} {tuple(matrix.shape)} holds NaN or Inf")
