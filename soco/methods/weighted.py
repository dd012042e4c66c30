"""Methods that are one truncated SVD: of the weight, or of the weight times a whitener."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from soco.linalg import Spectrum, whitened_svd


@dataclass(frozen=True)
class SVD:
    """Plain truncated SVD: the best rank-r approximation in ``|W - W'|_F``.

    The error is the norm of the singular values dropped.

    Source: Eckart and Young, 1936.
    """

    name: ClassVar[str] = "svd"

    @property
    def needs(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The singular value decomposition of ``weight`` (out, in)."""
        return whitened_svd(weight, None, name=name)


@dataclass(frozen=True)
class SVDLLM:
    """Truncation-aware whitening: the best rank-r approximation in ``|(W - W') X|_F``.

    With the Gram matrix ``G = X X^T`` of the inputs and any root ``G = S S^T``, W' is the truncated
    SVD of ``W S`` times ``S^-1``, and the error is the norm of the singular values dropped. It is
    computed as ``U_r U_r^T W``, which is the same matrix without the inverse.

    Source: SVD-LLM, arXiv:2403.07378; the form without an inverse, arXiv:2604.01609.
    """

    name: ClassVar[str] = "svd-llm"

    @property
    def needs(self) -> frozenset[str]:
        """The inputs' Gram matrix."""
        return frozenset({"gram"})

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """The decomposition of ``weight`` (out, in) by its whitened singular values."""
        return whitened_svd(weight, stats["gram"], name=name)
