"""What a decomposition gives: an SVD, a pair of factors, a spectrum."""

from typing import NamedTuple

import torch
from torch import Tensor

from soco.linalg.checks import check_rank


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

    def contiguous(self) -> "Factors":
        """Both factors laid out row by row, as they are when they come from a file."""
        return Factors(self.up.contiguous(), self.down.contiguous())

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

        >>> spectrum = Spectrum(torch.eye(2).flip(1), torch.tensor([9.0, 4.0]), torch.eye(2))
        >>> spectrum.truncate(1)
        Factors(up=tensor([[0.],
                [3.]]), down=tensor([[3., 0.]]))
        """
        rank = check_rank(rank, len(self.sigma), "the spectrum")
        root = self.sigma[:rank].sqrt()
        return Factors(self.up[:, :rank] * root, root[:, None] * self.down[:rank])
