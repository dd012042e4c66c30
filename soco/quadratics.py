"""How a layer's error on its inputs depends on the scales of its components: a quadratic."""

from dataclasses import dataclass

import torch
from torch import Tensor

from soco import ops


@dataclass(frozen=True)
class SpectralQuadratic:
    """``|Y - (Z diag(s)) up^T|_F^2`` as ``s^T H s - 2 b^T s + c``, without the tokens.

    Z are the components' activations ``X down^T`` and Y the outputs that are wanted. With
    ``H = (up^T up) * (Z^T Z)``, an elementwise product, ``b_j = z_j^T Y u_j`` and ``c = |Y|_F^2``
    a step of a fit costs rank^2 operations instead of a pass over all tokens; and the fit of the
    components that are kept is a linear system. Several of these add up.

    Source: the same identity as in SVD-Surgeon's update, arXiv:2606.23568, for outputs in the
    place of losses.
    """

    curvature: Tensor  # H (rank, rank), float64, positive semidefinite
    pull: Tensor  # b (rank,), float64
    energy: Tensor  # c (), float64

    @classmethod
    @torch.no_grad()
    def of_tokens(cls, z: Tensor, up: Tensor, target: Tensor) -> "SpectralQuadratic":
        """From activations (..., rank), ``up`` (out, rank) and wanted outputs (..., out)."""
        return cls(*ops.spectral_quadratic(z, up, target))

    @classmethod
    @torch.no_grad()
    def of_gram(cls, up: Tensor, down: Tensor, weight: Tensor, gram: Tensor) -> "SpectralQuadratic":
        """For ``Y = X weight^T``, from the Gram matrix of the inputs ``X^T X`` alone.

        Args:
            up: (out, rank).
            down: (rank, in).
            weight: (out, in), whose outputs are wanted.
            gram: (in, in), symmetric positive semidefinite.
        """
        up, down, weight, gram = (part.double() for part in (up, down, weight, gram))
        seen = down @ gram  # (rank, in)
        wanted = up.mT @ weight  # (rank, in)
        return cls(
            (up.mT @ up) * (seen @ down.mT),
            (wanted * seen).sum(1),
            ((weight @ gram) * weight).sum(),
        )

    def __add__(self, other: "SpectralQuadratic") -> "SpectralQuadratic":
        """That of the tokens of both."""
        return SpectralQuadratic(
            self.curvature + other.curvature, self.pull + other.pull, self.energy + other.energy
        )

    def loss(self, scale: Tensor) -> Tensor:
        """The squared error () at the scales (rank,), float64; differentiable."""
        scale = scale.double()
        return scale @ (self.curvature @ scale) - 2 * self.pull @ scale + self.energy

    @torch.no_grad()
    def fit(self, kept: Tensor | None = None, damping: float = 1e-8) -> Tensor:
        """The best scales where only some components are kept.

        Args:
            kept: (rank,), bool: the components that stay; None: all.
            damping: added to the curvature's diagonal, as a fraction of its mean over those kept,
                so that components that do nothing keep the scale 1 instead of an arbitrary one.

        Returns:
            (rank,), float64; 0 where a component goes.

        Raises:
            ValueError: ``kept`` does not fit, or ``damping`` is not above 0.
        """
        rank = len(self.pull)
        if kept is None:
            kept = torch.ones(rank, dtype=torch.bool, device=self.pull.device)
        if kept.shape != (rank,) or kept.dtype != torch.bool:
            raise ValueError(f"kept must be bool ({rank},), got {kept.dtype} {tuple(kept.shape)}")
        if not damping > 0:
            raise ValueError(f"damping must be above 0, got {damping}")
        scale = torch.zeros_like(self.pull)
        if not kept.any():
            return scale
        part = self.curvature[kept][:, kept]
        mean = part.diagonal().mean()
        ridge = torch.where(mean > 0, damping * mean, 1.0)  # if nothing does anything, all stay
        part = part + ridge * torch.eye(len(part), dtype=part.dtype, device=part.device)
        pull = self.pull[kept] + ridge  # the ridge holds scales at 1
        scale[kept] = torch.linalg.solve(part, pull)
        return scale
