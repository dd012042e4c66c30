"""Singular value decompositions of many small matrices at once."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # pyright: ignore[reportAttributeAccessIssue]

from soco.core import DTYPES, MOST_SWEEPS, Run, SvdBatch, implement, library, svd_scratch
from soco.ops.checks import autograd, check_finite

MOST_COLUMNS = 512  # of the smaller side; larger matrices go to torch.linalg.svd

library.define("batched_svd(Tensor matrices) -> (Tensor, Tensor, Tensor)")


def batched_svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose many small matrices, ``A = U diag(S) Vh``, by one-sided Jacobi.

    One matrix per thread of the CPU or block of the GPU, where ``torch.linalg.svd`` takes one after
    the other. Two QR decompositions, the first with column pivoting, come before the rotations.
    Where rows or columns of a matrix differ in size alone (``A = D B`` or ``B D`` with a
    well-conditioned B and any diagonal D), also the smallest singular values keep their digits,
    down to 1e-18 (float64: 1e-144) of the largest; what is below that is 0. Equal matrices give
    equal results, bit for bit, whatever the others of the batch and however many threads; the
    largest entry of every column of U is positive (the first of equals).

    Its derivative is that of ``torch.linalg.svd``, and is infinite or NaN as that is where singular
    values are equal or 0. Matrices whose smaller side is above 512 are given to
    ``torch.linalg.svd``, without the promise for small singular values.

    Args:
        matrices: (..., m, n), float32 or float64, of any strides.

    Returns:
        U (..., m, k), S (..., k) in descending order and Vh (..., k, n), with k = min(m, n).

    Raises:
        TypeError: another dtype.
        ValueError: fewer than two dimensions, or NaN or Inf in a matrix; a GPU is waited for.
        torch.linalg.LinAlgError: no convergence.

    Source: Drmac and Veselic, "New fast and accurate Jacobi SVD algorithm", LAPACK Working Notes
    169 and 170.

    >>> U, S, Vh = batched_svd(torch.tensor([[0.0, 4.0], [9.0, 0.0]]))
    >>> S, U.round()
    (tensor([9., 4.]), tensor([[0., 1.],
            [1., 0.]]))
    """
    return torch.ops.soco.batched_svd.default(matrices)


def _check(matrices: Tensor) -> None:
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"matrices must be float32 or float64, got {matrices.dtype}")
    if matrices.dim() < 2:
        raise ValueError(f"matrices must be (..., m, n), got {tuple(matrices.shape)}")


def _outputs(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the singular vectors of the longer side, the values, and the other vectors."""
    batch, (m, n) = matrices.shape[:-2], matrices.shape[-2:]
    longer, shorter = max(m, n), min(m, n)
    return (
        matrices.new_empty((*batch, shorter, longer)),
        matrices.new_empty((*batch, shorter)),
        matrices.new_empty((*batch, shorter, shorter)),
    )


def _arranged(matrices: Tensor, long: Tensor, S: Tensor, short: Tensor) -> tuple[Tensor, ...]:
    tall = matrices.shape[-2] >= matrices.shape[-1]
    return (long.mT, S, short) if tall else (short.mT, S, long)


@implement("batched_svd", "batched_svd")
def _batched_svd(run: Run, matrices: Tensor) -> tuple[Tensor, ...]:
    _check(matrices)
    m, n = matrices.shape[-2:]
    long, S, short = _outputs(matrices)
    if matrices.numel() == 0:
        return _arranged(matrices, long, S, short)
    if min(m, n) > MOST_COLUMNS:
        check_finite("the batch", matrices)
        _by_torch(matrices, long, S, short)
        return _arranged(matrices, long, S, short)
    packed, tall, batch = matrices.contiguous(), m >= n, math.prod(matrices.shape[:-2])
    sweeps = matrices.new_empty(batch, dtype=torch.int32)
    plan = SvdBatch(
        packed.data_ptr(), long.data_ptr(), S.data_ptr(), short.data_ptr(), sweeps.data_ptr(),
        batch, max(m, n), min(m, n), n if tall else 1, 1 if tall else n,
        DTYPES[matrices.dtype], not tall,
    )  # fmt: skip
    on_cpu = matrices.device.type == "cpu"  # there every thread has scratch of its own
    size = 0 if on_cpu else svd_scratch(batch, max(m, n), min(m, n))
    scratch = matrices.new_empty(size)
    run(packed, plan, scratch.data_ptr())
    least, most = sweeps.aminmax()
    if least < 0:
        check_finite("the batch", matrices)
    if most >= MOST_SWEEPS:
        raise LinAlgError(
            f"{int((sweeps >= MOST_SWEEPS).sum())} of {batch} matrices {(m, n)} did not converge "
            f"in {MOST_SWEEPS} sweeps"
        )
    return _arranged(matrices, long, S, short)


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the largest entry of every column of U positive, the first of equals."""
    largest = U.gather(-2, U.abs().argmax(-2, keepdim=True))  # (..., 1, k)
    sign = torch.where(largest < 0, -1.0, 1.0).to(U.dtype)
    return U * sign, Vh * sign.mT


def _by_torch(matrices: Tensor, long: Tensor, S: Tensor, short: Tensor) -> None:
    """``torch.linalg.svd`` with the signs as here, into the tensors given."""
    U, values, Vh = torch.linalg.svd(matrices, full_matrices=False)
    U, Vh = fix_signs(U, Vh)
    tall = matrices.shape[-2] >= matrices.shape[-1]
    long.copy_(U.mT if tall else Vh)
    short.copy_(Vh if tall else U.mT)
    S.copy_(values)


@torch.library.register_fake("soco::batched_svd", lib=library)
def _batched_svd_fake(matrices: Tensor) -> tuple[Tensor, ...]:
    _check(matrices)
    return _arranged(matrices, *_outputs(matrices))


def _save_outputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*output)


def _batched_svd_autograd(ctx: Any, grad_U: Tensor, grad_S: Tensor, grad_Vh: Tensor) -> Tensor:
    # With E_ij = s_j^2 - s_i^2 off the diagonal and 1 on it, as in torch's own (Giles, 2008):
    #   U ((skew(U^T gU) / E) S + S (skew(V^T gV) / E) + diag(gS)) Vh
    #   + (I - U U^T) gU S^-1 Vh + U S^-1 gVh (I - V V^T)
    U, S, Vh = ctx.saved_tensors
    with torch.autocast(U.device.type, enabled=False):
        squares = S * S
        E = squares[..., None, :] - squares[..., :, None]
        E = E + torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        left, right = U.mT @ grad_U, Vh @ grad_Vh.mT
        inner = (left - left.mT) / E * S[..., None, :] + S[..., :, None] * ((right - right.mT) / E)
        total = U @ (inner + torch.diag_embed(grad_S)) @ Vh
        if U.shape[-2] > U.shape[-1]:
            total = total + ((grad_U - U @ left) / S[..., None, :]) @ Vh
        if Vh.shape[-1] > Vh.shape[-2]:
            total = total + U @ ((grad_Vh - right.mT @ Vh) / S[..., :, None])
    return total


autograd("batched_svd", _batched_svd_autograd, _save_outputs)
