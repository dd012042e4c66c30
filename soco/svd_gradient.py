"""A singular value decomposition whose gradient stays finite where singular values meet."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soco.linalg import SVD, truncated_svd


def stable_svd(
    matrix: Tensor,
    rank: int | None = None,
    *,
    terms: int = 10,
    close: float = 1e-4,
    method: Literal["exact", "randomized"] = "exact",
    power_iterations: int = 2,
    seed: int = 0,
) -> SVD:
    """Differentiable SVD; close pairs of singular values have a bounded gradient.

    The gradient of a singular vector has the factor ``1 / (s_i^2 - s_j^2)`` for every other one,
    infinite where two values are the same. With ``q = s_j / s_i <= 1`` it is
    ``(1 + q^2 + q^4 + ...) / s_i^2``, and for close pairs the series is cut after ``terms`` powers
    beyond the first, so that it is at most ``(terms + 1) / s_i^2``. Where no pair is close and no
    singular value is zero, the gradient is exact for every loss that does not depend on the signs
    of the vectors. Pairs of zeros, and the parts that a zero would divide, count as 0.

    The first ``rank`` triplets of more are differentiated as if what was left out were zero: that
    is exact for the singular values, and near for vectors well above what was left out. "exact"
    without a rank leaves nothing out.

    Args:
        matrix: (..., rows, columns), float32 or float64, finite.
        rank: triplets to compute, 1 to min(rows, columns); None: all.
        terms: K, the highest power of ``q^2`` that a close pair keeps, at least 0.
        close: pairs with ``1 - q`` up to this are close. It is relative, where the published code
            compares the difference itself with 1e-10, which float32 activations never reach: at a
            gap of g the plain factor has an error of eps / g, 0.1 % here. The series drops what two
            close *kept* components share of the gradient, so this should be no larger than it has
            to be.
        method: "exact" or "randomized" (range finder, for a ``rank`` far below the full one).
        power_iterations: of the randomized one.
        seed: of its sketch.

    Returns:
        U (..., rows, rank), S (..., rank) descending, Vh (..., rank, columns). Differentiable once.

    Raises:
        ValueError: an argument out of range, or NaN or Inf in the matrix.

    Source: Dobi-SVD, arXiv:2502.02723 (the series); Townsend 2016, "Differentiating the singular
    value decomposition" (the formula without it).
    """
    if matrix.dim() < 2 or matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"stable_svd takes a float32 or float64 matrix, got {tuple(matrix.shape)} of "
            f"{matrix.dtype}"
        )
    side = min(matrix.shape[-2:])
    rank = side if rank is None else rank
    if not 1 <= rank <= side:
        raise ValueError(f"rank must be from 1 to {side}, got {rank}")
    if terms < 0 or not 0 <= close < 1:
        raise ValueError(f"terms must be 0 or more and close in [0, 1), got {terms} and {close}")
    if method not in ("exact", "randomized"):
        raise ValueError(f'method must be "exact" or "randomized", got {method!r}')
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"the matrix {tuple(matrix.shape)} to decompose holds NaN or Inf")
    options = (rank, terms, close, method, power_iterations, seed)
    return SVD(*_StableSVD.apply(matrix, options))


class _StableSVD(torch.autograd.Function):
    """Forward by LAPACK or by the range finder; backward by formula."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, options: tuple) -> tuple[Tensor, Tensor, Tensor]:
        rank, ctx.terms, ctx.close, method, power_iterations, seed = options
        if method == "exact":
            U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
            U, S, Vh = U[..., :rank], S[..., :rank], Vh[..., :rank, :]
        else:
            U, S, Vh = truncated_svd(
                matrix,
                rank,
                "randomized",
                oversampling=0.0,
                power_iterations=power_iterations,
                seed=seed,
                name="matrix",
            )
        ctx.save_for_backward(U, S, Vh)
        ctx.set_materialize_grads(False)
        return U, S, Vh

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] # of the decorator
        ctx: Any, *grads: Tensor | None
    ) -> tuple[Tensor | None, None]:
        U, S, Vh = ctx.saved_tensors
        grad_U, grad_S, grad_Vh = grads
        if grad_U is None and grad_S is None and grad_Vh is None:
            return None, None
        rows, columns = U.shape[-2], Vh.shape[-1]
        # In units of the largest singular value, so that no square leaves the range of floats.
        unit = S[..., :1]  # (..., 1)
        unit = torch.where(unit > 0, unit, torch.ones_like(unit))
        s = S / unit
        floor = torch.finfo(S.dtype).eps * max(rows, columns)
        alive = s > floor
        inverse = torch.where(alive, 1 / torch.where(alive, s, 1), 0)
        factor = _pair_factors(s, alive, ctx.terms, ctx.close)
        core = torch.zeros_like(factor)  # (..., rank, rank), times unit
        outside = None
        if grad_U is not None:
            turn = U.mT @ grad_U
            core = core + factor * (turn - turn.mT) * s[..., None, :]
            if rows > S.shape[-1]:
                outside = ((grad_U - U @ turn) * inverse[..., None, :]) @ Vh
        if grad_Vh is not None:
            turn = Vh @ grad_Vh.mT
            core = core + s[..., :, None] * factor * (turn - turn.mT)
            if columns > S.shape[-1]:
                part = U @ (inverse[..., :, None] * (grad_Vh - turn.mT @ Vh))
                outside = part if outside is None else outside + part
        core = core / unit[..., None]
        if grad_S is not None:
            core = core + grad_S.diag_embed()
        grad = U @ core @ Vh
        return grad if outside is None else grad + outside / unit[..., None], None


def _pair_factors(s: Tensor, alive: Tensor, terms: int, close: float) -> Tensor:
    """``1 / (s_j^2 - s_i^2)`` in row i and column j, by the cut series for close pairs.

    Args:
        s: (..., rank), descending.
        alive: (..., rank), which are not zero.
        terms: the highest power of the series.
        close: the relative gap up to which it is used.

    Returns:
        (..., rank, rank), antisymmetric, finite.
    """
    larger = torch.maximum(s[..., :, None], s[..., None, :])
    smaller = torch.minimum(s[..., :, None], s[..., None, :])
    known = alive[..., :, None] | alive[..., None, :]
    larger = torch.where(known, larger, 1)
    q = smaller / larger
    near = 1 - q <= close
    series = torch.ones_like(q)
    for _ in range(terms):
        series = series * q.square() + 1
    plain = 1 / torch.where(near, 1, (1 - q) * (1 + q))
    size = torch.where(near, series, plain) / larger.square()
    size = torch.where(known, size, 0)
    upper = torch.triu(size, 1)  # i < j: s_j is the smaller one
    return upper.mT - upper
