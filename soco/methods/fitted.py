"""Methods that go on from a truncated spectrum: alternating fits, and fits block by block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from soco.fitting import alternate, anchored_svd, best_share, weighted_low_rank
from soco.linalg import Factors, Spectrum
from soco.methods.bases import FisherWeighted, Whitened
from soco.methods.protocol import ClosedForm


@dataclass(frozen=True)
class TFWSVD(ClosedForm):
    """Element-wise Fisher weights: a low ``sum_ij F_ij (W - W')_ij^2``.

    No closed form is known. It starts from FWSVD and solves for the rows of ``up`` and the columns
    of ``down`` in turn, each exactly, so that the error falls with every iteration. Where all rows
    of F are equal it is FWSVD, and nothing moves.

    Source: "Numerical Optimizations for Weighted Low-rank Estimation on Language Models", EMNLP
    2022, arXiv:2211.09718 (there by gradient descent; the exact updates are our choice).
    """

    name: ClassVar[str] = "tfwsvd"

    side: Literal["input", "output"] = "input"  # of the FWSVD it starts from
    iterations: int = 10  # of both updates

    @property
    def components(self) -> FisherWeighted:
        """Components of FWSVD."""
        return FisherWeighted(self.side)

    def factor(
        self, weight: Tensor, spectrum: Spectrum, rank: int, stats: Mapping[str, Tensor]
    ) -> Factors:
        """Alternating weighted least squares from the truncated spectrum."""
        start = spectrum.truncate(rank)
        return weighted_low_rank(weight, stats["fisher"], start, self.iterations)


@dataclass(frozen=True)
class AdaSVD(ClosedForm):
    """Alternating updates after the truncation (adaComp), ranks by importance (adaCR).

    ``|up down X - W X|_F`` is lowered by solving for up and down in turn, with pseudo-inverses.
    From the whitened optimum nothing moves. As published, X are means over stacks of calibration
    sequences, so that more of them fit into memory (``stack``); the optimum of those is another
    one. Here the Gram matrix of all tokens costs no more memory, and without ``stack`` the result
    is SVD-LLM's.

    Source: AdaSVD, arXiv:2502.01403.
    """

    name: ClassVar[str] = "adasvd"
    allocator: ClassVar[str] = "adacr"

    iterations: int = 6  # of both updates
    stack: bool = True  # fit to means over each batch of calibration sequences

    @property
    def components(self) -> Whitened:
        """Components of the outputs."""
        return Whitened()

    @property
    def needs(self) -> frozenset[str]:
        """The Gram matrix of the inputs, and of their means."""
        return frozenset({"gram", "stacked_gram"} if self.stack else {"gram"})

    def factor(
        self, weight: Tensor, spectrum: Spectrum, rank: int, stats: Mapping[str, Tensor]
    ) -> Factors:
        """Alternating least squares from the truncated spectrum."""
        gram = stats["stacked_gram" if self.stack else "gram"]
        if not gram.any():
            return spectrum.truncate(rank)
        return alternate(weight, spectrum.truncate(rank), gram, self.iterations)


@dataclass(frozen=True)
class AASVD(ClosedForm):
    """Aim at the dense layer's outputs from the compressed model's inputs.

    Block by block, W' is the best rank r in ``|W X0 - W' X|_F``: X are the inputs behind the
    compressed blocks, X0 those of the dense model. With ``G = X X^T`` and ``C = X0 X^T`` the best
    weight of any rank is ``T = W C G^-1``, and the best rank r is T's whitened truncated SVD. Where
    nothing was compressed before, C is G and W' is SVD-LLM's.

    Source: AA-SVD, arXiv:2604.02119, objective 4, without its refinement of blocks.
    """

    name: ClassVar[str] = "aa-svd"

    damping: float = 1e-3  # keeps T at W where X says nothing; a fraction of G's mean diagonal

    @property
    def components(self) -> Whitened:
        """Components of the outputs; ranks are chosen by these."""
        return Whitened()

    def is_sequential(self, ratio: float) -> bool:
        """Always."""
        return True

    def share(self, weight: Tensor, gram: Tensor, cross: Tensor, rank: int) -> float:
        """How much of the aim is the dense layer's outputs; the rest is ``W X``."""
        return 1.0

    def refit(
        self, weight: Tensor, factors: Factors, gram: Tensor, cross: Tensor, *, name: str
    ) -> Factors:
        """The truncated whitened SVD of T."""
        rank = factors.up.shape[1]
        if not gram.any():
            return factors
        share = self.share(weight, gram, cross, rank)
        spectrum = anchored_svd(weight, gram, cross, share, self.damping, name=name)
        return spectrum.truncate(rank)


@dataclass(frozen=True)
class SAESSVD(AASVD):
    """AA-SVD with an aim between the dense layer's outputs and ``W X``, chosen for every layer.

    The share of the first is the one at which most of the target's energy fits into rank r
    (``fitting.best_share``).

    Source: SAES-SVD, arXiv:2602.03051 (its alpha is ``share / (1 - share)``; both are bounded).
    """

    name: ClassVar[str] = "saes"

    lowest: float = 0.2  # share; the paper's alpha of 0.25
    highest: float = 0.75 / 1.75  # share; the paper's alpha of 0.75

    def share(self, weight: Tensor, gram: Tensor, cross: Tensor, rank: int) -> float:
        """The adaptive coefficient."""
        return best_share(weight, gram, cross, rank, self.lowest, self.highest)
