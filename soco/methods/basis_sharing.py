"""Basis Sharing: neighbouring layers of one kind share a basis, with coefficients of their own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from torch import Tensor

from soco.data import positive
from soco.fitting import refit_up
from soco.linalg import Factors
from soco.methods.bases import Whitened
from soco.methods.protocol import ClosedForm

# Layers that write into the residual stream, by the names that models give them.
WRITERS = (
    "*o_proj", "*out_proj", "*down_proj", "*c_proj", "*fc2", "*.dense", "*_4h_to_h", "*.w2", "*.wo",
)  # fmt: skip


@dataclass(frozen=True)
class BasisSharing(ClosedForm):
    """One ``down`` (the basis) for a group of layers, one ``up`` (the coefficients) for each.

    The weights of a group are stacked, ``W = [W_1; ...; W_g]``, and W' is the best rank r in
    ``sum_i |(W - W') X_i|_F`` over the inputs of all layers of the group: the whitened truncated
    SVD for the sum of their Gram matrices. A group of one is SVD-LLM.

    From ``refit_from`` removed on, blocks are compressed one after the other, and each layer's
    coefficients are fitted again to ``W_i X`` with the inputs that come out of the compressed
    blocks before it.

    Source: Basis Sharing, ICLR 2025, arXiv:2410.03765.
    """

    name: ClassVar[str] = "basis-sharing"

    size: int = 2  # neighbouring blocks in a group
    private: tuple[str, ...] = WRITERS  # glob patterns of layers that do not share
    refit_from: float = 0.4  # removed fraction from which coefficients are fitted again

    def __post_init__(self) -> None:
        """Refuse what is no size."""
        positive("size", self.size)

    @property
    def components(self) -> Whitened:
        """Components of the outputs of a whole group."""
        return Whitened()

    def groups(
        self, shapes: Mapping[str, tuple[int, int]], kinds: Mapping[str, str]
    ) -> Sequence[tuple[str, ...]]:
        """Runs of ``size`` layers of one kind and shape; private ones alone."""
        together: dict[tuple, list[str]] = defaultdict(list)
        for name, shape in shapes.items():
            alone = any(fnmatchcase(name, pattern) for pattern in self.private)
            together[(kinds[name], shape, name if alone else "")].append(name)
        groups = [
            tuple(names[i : i + self.size])
            for names in together.values()
            for i in range(0, len(names), self.size)
        ]
        places = {name: place for place, name in enumerate(shapes)}
        return sorted(groups, key=lambda group: places[group[0]])

    def is_sequential(self, ratio: float) -> bool:
        """From ``refit_from`` on."""
        return ratio >= self.refit_from

    def refit(
        self, weight: Tensor, factors: Factors, gram: Tensor, cross: Tensor, *, name: str
    ) -> Factors:
        """The coefficients by least squares, for the basis as it is."""
        if not gram.any():
            return factors
        up = refit_up(weight, factors.down, gram, start=factors.up)
        return Factors(up.to(factors.down.dtype), factors.down)  # the very tensor that is shared
