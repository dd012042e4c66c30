"""The bases in which a weight is taken apart: what an error in the weight is measured by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soco.linalg import Spectrum, whitened_svd
from soco.weighting import eigen_root, rooted_svd, shrunk, two_sided_svd


@dataclass(frozen=True)
class Plain:
    """``|W - W'|_F``: the weight alone."""

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    @property
    def in_loss(self) -> bool:
        """No."""
        return False

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The singular value decomposition of ``weight`` (out, in)."""
        return whitened_svd(weight, None, name=name)


@dataclass(frozen=True)
class Whitened:
    """``|(W - W') X|_F``: the outputs on the calibration inputs.

    Three routes lead to the same components: the eigenvectors of ``W G W^T`` (no root is taken,
    nothing inverted, the quickest); the SVD of W times a root of G from its eigenvectors; the SVD
    of ``W R^T`` with R from a QR decomposition of the inputs themselves, which never squares
    their condition number.
    """

    route: Literal["output", "eigen", "qr"] = "output"
    centered: bool = False  # measure on the inputs less their mean: for layers that keep the mean
    # of their outputs by a bias; not by the route "qr"

    def __post_init__(self) -> None:
        """Refuse what is no route."""
        if self.route not in ("output", "eigen", "qr"):
            raise ValueError(f'route must be "output", "eigen" or "qr", got {self.route!r}')
        if self.centered and self.route == "qr":
            raise ValueError('the route "qr" reads no means: centered takes "output" or "eigen"')

    @property
    def needs(self) -> frozenset[str]:
        """The inputs' Gram matrix, or the R of their QR decomposition."""
        if self.route == "qr":
            return frozenset({"root"})
        return frozenset({"gram", *(["mean"] if self.centered else [])})

    @property
    def in_loss(self) -> bool:
        """No: the same error in the outputs of two layers may matter more in one."""
        return False

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The decomposition of ``weight`` (out, in) by its whitened singular values."""
        if self.route == "output":
            return whitened_svd(weight, _inputs_gram(stats, self.centered), name=name)
        if self.route == "eigen":
            root = eigen_root(_inputs_gram(stats, self.centered))
        else:
            root = stats["root"].mT
        return rooted_svd(weight, root, name=name)


@dataclass(frozen=True)
class Scaled:
    """``|(W - W') diag(s)|_F`` with ``s_j = mean |x_j|^alpha``: input channels by their size."""

    alpha: float = 0.5  # exponent; 0 is the plain SVD

    def __post_init__(self) -> None:
        """Refuse a negative exponent."""
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")

    @property
    def needs(self) -> frozenset[str]:
        """Mean absolute inputs."""
        return frozenset({"abs_mean"})

    @property
    def in_loss(self) -> bool:
        """No."""
        return False

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The decomposition of ``weight`` (out, in) by its scaled singular values."""
        scale = stats["abs_mean"].pow(self.alpha) + 1e-6
        return rooted_svd(weight, scale, name=name)


@dataclass(frozen=True)
class FisherWeighted:
    """``sum_ij f_j (W - W')_ij^2`` with the Fisher information f of the columns, or of the rows."""

    side: Literal["input", "output"] = "input"

    def __post_init__(self) -> None:
        """Refuse what is no side."""
        if self.side not in ("input", "output"):
            raise ValueError(f'side must be "input" or "output", got {self.side!r}')

    @property
    def needs(self) -> frozenset[str]:
        """The Fisher information of every weight."""
        return frozenset({"fisher"})

    @property
    def in_loss(self) -> bool:
        """No: it stands for the loss, but leaves out that weights act together."""
        return False

    def weights(self, fisher: Tensor) -> Tensor:
        """f: means over the other axis of ``fisher`` (out, in), none below 1e-6 of the largest.

        Returns:
            (in,) or (out,).
        """
        mean = fisher.mean(0 if self.side == "input" else 1)
        return mean.clamp(min=1e-6 * float(mean.max()))

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The decomposition of ``weight`` (out, in) by its weighted singular values."""
        found = self.weights(stats["fisher"])
        if self.side == "input":
            return rooted_svd(weight, found.sqrt(), name=name)
        return two_sided_svd(weight, None, found, name=name)


@dataclass(frozen=True)
class TwoSided:
    """``tr((W - W')^T B (W - W') A) / 2``: the loss, as Kronecker factors of its curvature see it.

    A is the Gram matrix of the inputs, B that of the gradients of the outputs, both per token, each
    drawn towards its mean diagonal by a share.
    """

    input_shrinkage: float = 0.0  # share of the mean diagonal in A
    output_shrinkage: float = 0.0  # share of the mean diagonal in B
    centered: bool = False  # take A of the inputs less their mean: for layers that keep the mean
    # of their outputs by a bias
    sampled: bool = False  # take B from an eighth of the calibration

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        for name in ("input_shrinkage", "output_shrinkage"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")

    @property
    def needs(self) -> frozenset[str]:
        """Gram matrices of the inputs and of the gradients of the outputs."""
        return frozenset({"gram", self._gradients, *(["mean"] if self.centered else [])})

    @property
    def _gradients(self) -> str:
        return "sampled_grad_gram" if self.sampled else "grad_gram"

    @property
    def in_loss(self) -> bool:
        """Yes: half the squared singular value is a divergence per token."""
        return True

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The decomposition of ``weight`` (out, in) by what its components are worth."""
        gram, grad_gram = _inputs_gram(stats, self.centered), stats[self._gradients]
        if self.input_shrinkage and bool(torch.any(gram)):
            gram = shrunk(gram, self.input_shrinkage)
        if self.output_shrinkage:
            grad_gram = shrunk(grad_gram, self.output_shrinkage)
        return two_sided_svd(weight, gram, grad_gram, name=name)


def _inputs_gram(stats: Mapping[str, Tensor], centered: bool) -> Tensor:
    return stats["centered_gram" if centered else "gram"]
