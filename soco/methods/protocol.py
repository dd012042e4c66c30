"""What every method is: a small frozen dataclass that takes one weight apart."""

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from soco.linalg import Spectrum
from soco.training import TrainingSettings


@runtime_checkable
class Method(Protocol):
    """A closed form: the order of a weight's components, and what each is worth."""

    name: ClassVar[str]  # as users write it

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that ``spectrum`` reads, such as "gram"."""
        ...

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """Take ``weight`` (out, in) apart, most valuable component first.

        Args:
            weight: (out, in), floating point.
            stats: the statistics the method ``needs``, by name.
            name: of the weight, for errors.
        """
        ...


@runtime_checkable
class TrainedMethod(Method, Protocol):
    """A method whose components are chosen and scaled by training."""

    @property
    def largest_score(self) -> float:
        """Bound of the scores."""
        ...

    @property
    def deviation(self) -> bool:
        """Whether compressed layers learn a vector that is added to their outputs."""
        ...

    def settings(self) -> TrainingSettings:
        """How the scores are trained."""
        ...
