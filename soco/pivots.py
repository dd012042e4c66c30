"""A low-rank weight as some of its own rows and what the other rows are made of."""

import math
from typing import NamedTuple

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from soco.linalg import Factors
from soco.ops import all_finite

# No row that is combined takes more than this much of any pivot row. Errors of the pivot rows are
# passed on at most that much; 1 is the best there is, and costs more exchanges of rows.
LARGEST_COEFFICIENT = 1.1


class Pivoted(NamedTuple):
    """A weight (out, in) of rank r: r of its rows, and the others as combinations of them.

    ``W[pivots] = rows`` and ``W[others] = rest @ rows``, where the others are the rows that are no
    pivots, in ascending order.
    """

    rest: Tensor  # (out - rank, rank), the coefficients
    rows: Tensor  # (rank, in), the pivot rows
    pivots: Tensor  # (rank,), int64, ascending: which rows those are

    def to(self, dtype: torch.dtype) -> "Pivoted":
        """Round to ``dtype`` what is no index."""
        return Pivoted(self.rest.to(dtype), self.rows.to(dtype), self.pivots)

    def product(self) -> Tensor:
        """The weight (out, in).

        >>> rest, rows = torch.tensor([[0.5]]), torch.tensor([[4.0, 8.0]])
        >>> Pivoted(rest, rows, torch.tensor([1])).product()
        tensor([[2., 4.],
                [4., 8.]])
        """
        weight = self.rows.new_empty(sum(self.rest.shape), self.rows.shape[1])
        is_pivot = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        is_pivot[self.pivots] = True
        weight[self.pivots] = self.rows
        weight[~is_pivot] = self.rest @ self.rows
        return weight


@torch.no_grad()
def pivot_factors(factors: Factors, *, name: str) -> Pivoted:
    """Write the weight ``up @ down`` as r of its rows, and the others as combinations of them.

    Of the rows of a matrix of rank r, some r span all others. Nothing is lost, and of the
    ``r (out + in)`` numbers r^2 are saved. They are never more than the ``out in`` of the dense
    weight: the difference is ``(out - r) (in - r)``.

    Which rows these are depends on the column space of ``up`` alone: on an orthonormal basis Q of
    it, QR with column pivoting of Q^T chooses r rows, and as long as some row takes more than
    ``LARGEST_COEFFICIENT`` of a pivot row, the two change places. Each time that makes the
    determinant of ``Q[pivots]`` larger by that factor, and it cannot pass 1; so it ends. Columns of
    ``up`` that depend on each other or are zero do no harm: Q is of full rank all the same.

    All is computed on the CPU in float64.

    Args:
        factors: ``up`` (out, r) and ``down`` (r, in), of any floating dtype, on any device.
        name: of the layer, for errors.

    Returns:
        Rows, coefficients and pivots, in the dtype and on the device of the factors. No coefficient
        is above ``LARGEST_COEFFICIENT``, up to rounding.

    Raises:
        ValueError: the rank is 0; it is that of a dense layer (out) or more than in, so that the
            dense weight has no more numbers; or a factor is not finite.

    Source:
        PIFA: Zhao et al., Pivoting Factorization, ICML 2025 (arXiv 2501.19090), which
        takes the pivots by QR of the weight itself. The exchanges are maxvol: Goreinov et al., How
        to Find a Good Submatrix, 2010.
    """
    up, down = (factor.detach().to("cpu", torch.float64) for factor in factors)
    (out_features, rank), in_features = up.shape, down.shape[1]
    if rank < 1:
        raise ValueError(f"{name} has rank 0: there is no row to keep")
    if rank >= out_features or rank > in_features:
        raise ValueError(
            f"{name} of shape {[out_features, in_features]} has rank {rank}: "
            f"pivot rows need a rank below {min(out_features, in_features + 1)}, keep it dense"
        )
    if not (all_finite(up) and all_finite(down)):
        raise ValueError(f"a factor of {name} holds a value that is not finite")
    basis = torch.linalg.qr(up).Q
    pivots = _exchange(basis, _first_pivots(basis)).sort().values
    others = torch.ones(out_features, dtype=torch.bool).index_fill_(0, pivots, False)
    rest, rows = _combinations(basis, pivots)[others], up[pivots] @ down
    like = factors.down
    return Pivoted(rest.to(like), rows.to(like), pivots.to(like.device))


def _first_pivots(basis: Tensor) -> Tensor:
    """Rows (r,) of ``basis`` (out, r) that span it, by QR with column pivoting of its transpose."""
    order = scipy.linalg.qr(basis.T.numpy(), mode="r", pivoting=True, check_finite=False)[-1]
    return torch.from_numpy(np.array(order[: basis.shape[1]], dtype=np.int64))


def _exchange(basis: Tensor, pivots: Tensor) -> Tensor:
    """Better rows: while a coefficient is too large, its row takes the place of its pivot."""
    coefficients = _combinations(basis, pivots)
    volume = float(torch.linalg.slogdet(basis[pivots]).logabsdet)  # at most 0
    pivots = pivots.clone()
    for _ in range(math.ceil(-volume / math.log(LARGEST_COEFFICIENT))):
        row, column = divmod(int(coefficients.abs().argmax()), len(pivots))
        pivot = float(coefficients[row, column])
        if abs(pivot) <= LARGEST_COEFFICIENT:
            break
        # In the new rows the old pivot is (e_row - what the row takes of the others) / pivot.
        change = coefficients[row].clone()
        change[column] -= 1
        coefficients.addr_(coefficients[:, column] / pivot, change, alpha=-1)
        pivots[column] = row
    return pivots


def _combinations(basis: Tensor, pivots: Tensor) -> Tensor:
    """Coefficients (out, r) with ``basis = coefficients @ basis[pivots]``."""
    return torch.linalg.solve(basis[pivots], basis, left=False)
