"""The directions in which outputs vary most, gathered batch by batch (incremental PCA)."""

import torch
from torch import Tensor

from soco.linalg import Factors, truncated_svd
from soco.ops import all_finite


class PrincipalDirections:
    """Leading right singular vectors of a tall matrix that is seen a few rows at a time.

    Each batch is stacked below ``diag(S) Vh`` of what was seen before, and the leading ``rank``
    singular values and vectors of that are kept. So a batch counts by its singular values, as it
    does in the whole matrix. (The published code gives the plain vectors of each batch to the PCA,
    and takes their mean off.) What a merge drops is forgotten: with one batch, or with all the
    columns kept, the result is the exact SVD; otherwise the energy outside of the directions is
    never below the optimum, and above it by no more than was dropped underway.

    Memory is O(columns (rank + rows of a batch)).

    Args:
        rank: directions to keep, at least 1.

    Source: Ross, Lim, Lin and Yang, "Incremental learning for robust visual tracking", 2008,
    without the mean; used for the weights by Dobi-SVD, arXiv:2502.02723.
    """

    def __init__(self, rank: int) -> None:
        """Nothing is seen yet."""
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.rank = rank
        # All that is known: diag(S) Vh, (up to rank, columns), float64.
        self.sketch: Tensor | None = None

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in a batch (rows, columns), any floating dtype; computed in float64.

        Raises:
            ValueError: NaN or Inf in the batch.
        """
        if not all_finite(rows):
            raise ValueError(f"the batch {tuple(rows.shape)} holds NaN or Inf")
        stack = rows.double()
        if self.sketch is not None:
            stack = torch.cat([self.sketch, stack])
        if len(stack) > stack.shape[1]:
            stack = torch.linalg.qr(stack, mode="r").R  # the same right singular vectors
        _, S, Vh = torch.linalg.svd(stack, full_matrices=False)
        self.sketch = S[: self.rank, None] * Vh[: self.rank]

    @property
    def energy(self) -> Tensor | None:
        """The squared singular values kept (up to rank,), float64, descending; None if unseen."""
        return None if self.sketch is None else self.sketch.square().sum(1)

    @torch.no_grad()
    def directions(self, weight: Tensor) -> Tensor:
        """An orthonormal basis (columns, rank) in which to keep the outputs of a weight.

        Where the rows seen have fewer directions than ``rank`` (few tokens, or none), the rest are
        those of the plain SVD of what the others leave of the weight.

        Args:
            weight: (columns, in), whose outputs the rows were.

        Returns:
            float64, on the weight's device.
        """
        wide = weight.double()
        seen = wide.new_zeros(len(wide), 0)
        if self.sketch is not None:
            values = self.sketch.norm(dim=1)
            floor = values[0] * torch.finfo(torch.float64).eps * max(self.sketch.shape)
            alive = values > floor
            seen = (self.sketch[alive] / values[alive, None]).mT
        missing = self.rank - seen.shape[1]
        if missing <= 0:
            return seen
        left = wide - seen @ (seen.mT @ wide)
        rest = truncated_svd(left, missing, name="what the outputs leave of the weight").U
        basis, R = torch.linalg.qr(torch.cat([seen, rest], dim=1))  # orthogonal to rounding
        return basis * torch.where(R.diagonal() < 0, -1.0, 1.0)


def project(weight: Tensor, directions: Tensor) -> Factors:
    """The weight restricted to outputs in the span of ``directions``: ``V V^T W``.

    With the leading right singular vectors of all outputs ``Y = X W^T`` as V it is the matrix of
    that rank with the smallest ``|X (W - W')^T|_F``, and the error is the norm of the singular
    values of Y that were dropped.

    Args:
        weight: (out, in).
        directions: V (out, rank), orthonormal columns, float64.

    Returns:
        ``up`` = V and ``down`` = V^T W, computed in float64, in float64 for a float64 weight and
        float32 for any other.

    Source: Dobi-SVD, arXiv:2502.02723 (weight update, by Eckart, Young and Mirsky).
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Factors(directions, directions.mT @ weight.detach().double()).to(dtype)
