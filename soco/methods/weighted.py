"""Methods that cut one singular value decomposition off: plain, weighted, or whitened."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from soco.fitting import refit_up
from soco.linalg import Factors
from soco.methods.bases import FisherWeighted, Plain, Scaled, TwoSided, Whitened
from soco.methods.protocol import ClosedForm
from soco.surgeon import SVDSurgeon


@dataclass(frozen=True)
class SVD(ClosedForm):
    """Plain truncated SVD: the best rank-r approximation in ``|W - W'|_F``.

    The error is the norm of the singular values dropped.

    Source: Eckart and Young, 1936.
    """

    name: ClassVar[str] = "svd"

    @property
    def components(self) -> Plain:
        """The weight's own components."""
        return Plain()


@dataclass(frozen=True)
class FWSVD(ClosedForm):
    """Fisher-weighted SVD: the best rank r in ``sum_ij f_j (W - W')_ij^2``.

    f is the mean Fisher information of an input channel's weights (or, with ``side="output"``, of
    an output's), so that the problem stays an SVD: of ``W diag(sqrt f)``. The error is the norm of
    the singular values dropped.

    Source: FWSVD, ICLR 2022, arXiv:2207.00112. There the Fisher information is of the task's
    labels; here it is of labels drawn from the model, which needs none.
    """

    name: ClassVar[str] = "fwsvd"

    side: Literal["input", "output"] = "input"  # whose weights f is the mean over, per channel

    @property
    def components(self) -> FisherWeighted:
        """Components of the weighted matrix."""
        return FisherWeighted(self.side)


@dataclass(frozen=True)
class ASVD(ClosedForm):
    """Activation-aware SVD: the best rank r in ``|(W - W') diag(s)|_F``, s the size of the inputs.

    Input channels count by ``s = mean |x|^alpha``, their correlations not at all. Its ranks are
    searched by sensitivity: of every layer alone at several ratios (``allocators.Sensitivity``).

    Source: ASVD, arXiv:2312.05821.
    """

    name: ClassVar[str] = "asvd"
    allocator: ClassVar[str] = "sensitivity"

    alpha: float = 0.5  # exponent of the mean absolute input

    @property
    def components(self) -> Scaled:
        """Components of the scaled matrix."""
        return Scaled(self.alpha)


@dataclass(frozen=True)
class SVDLLM(ClosedForm):
    """Truncation-aware whitening: the best rank-r approximation in ``|(W - W') X|_F``.

    With the Gram matrix ``G = X X^T`` of the inputs and any root ``G = S S^T``, W' is the truncated
    SVD of ``W S`` times ``S^-1``, and the error is the norm of the singular values dropped. It is
    computed as ``U_r U_r^T W``, which is the same matrix without the inverse.

    With ``update``, blocks are compressed one after the other, and each layer's ``up`` is fitted
    again by least squares to the dense layer's outputs, given what its ``down`` makes of the inputs
    that come out of the compressed blocks before it.

    Source: SVD-LLM, arXiv:2403.07378; the form without an inverse, arXiv:2604.01609.
    """

    name: ClassVar[str] = "svd-llm"

    route: Literal["output", "eigen", "qr"] = "output"  # to the components; see ``bases.Whitened``
    update: bool = False  # fit ``up`` again, block by block

    @property
    def components(self) -> Whitened:
        """Components of the outputs."""
        return Whitened(self.route)

    def is_sequential(self, ratio: float) -> bool:
        """With ``update``."""
        return self.update

    def refit(
        self, weight: Tensor, factors: Factors, gram: Tensor, cross: Tensor, *, name: str
    ) -> Factors:
        """``up`` by least squares, for the given ``down``."""
        up, down = factors
        return Factors(refit_up(weight, down, gram, cross, start=up), down.double())


@dataclass(frozen=True)
class SVDLLMV2(ClosedForm):
    """SVD-LLM's truncation with ranks by theoretical loss: ``allocators.LossByType``.

    The truncation is that of ``SVDLLM`` by way of the eigenvectors of the Gram matrix.

    Source: SVD-LLM V2, arXiv:2503.12340.
    """

    name: ClassVar[str] = "svd-llm-v2"
    allocator: ClassVar[str] = "v2"

    @property
    def components(self) -> Whitened:
        """Components of the outputs."""
        return Whitened("eigen")


@dataclass(frozen=True)
class KFACSVD(ClosedForm):
    """Whitening on both sides: the best rank r in ``tr((W - W')^T B (W - W') A)``.

    A is the Gram matrix of the inputs, B that of the gradients at the outputs: Kronecker factors of
    the loss's curvature. The error is the norm of the singular values dropped, and half its square
    estimates the divergence from the dense model, in nats per token. So the singular values of
    all layers are in one unit, and ranks follow from them (``allocators.Energy``).

    Source: KFAC-SVD of LEMS, ICML 2026 (there with shrinkages 0.1 and 0.3, without the first and
    last eighth of the tokens, and with gradients clipped); GFWSVD, arXiv:2505.17974.
    """

    name: ClassVar[str] = "kfac-svd"
    allocator: ClassVar[str] = "energy"

    input_shrinkage: float = 0.0  # share of the mean diagonal in A
    output_shrinkage: float = 0.0  # share of the mean diagonal in B

    @property
    def components(self) -> TwoSided:
        """Components of the loss."""
        return TwoSided(self.input_shrinkage, self.output_shrinkage)


@dataclass(frozen=True)
class SVDSurgeonMethod(ClosedForm):
    """SVD-LLM, then the scales of the components that stay are updated in closed form.

    With ``H_SS`` and ``H_SC`` the second moments of the gradients by the scales of the components
    kept and removed, the scales change by ``(H_SS + damping)^-1 H_SC 1``: the minimum of the
    second-order loss. ``soco.surgeon`` has it for factors of any method
    (``soco.compress(..., surgeon=True)``), and says what validation does.

    Source: SVD-Surgeon, arXiv:2606.23568.
    """

    name: ClassVar[str] = "svd-surgeon"

    surgeon: SVDSurgeon = field(default_factory=SVDSurgeon)  # the update

    @property
    def components(self) -> Whitened:
        """Components of the outputs."""
        return Whitened()
