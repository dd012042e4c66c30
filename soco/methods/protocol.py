"""What every method is: a small frozen dataclass that takes one weight apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from soco.keeping import Keeper
from soco.linalg import Factors, Spectrum
from soco.objectives import Objective
from soco.stages import TrainingSettings
from soco.steps import Step


@runtime_checkable
class Basis(Protocol):
    """In which components a weight is seen, and what each of them is worth: hashable."""

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that ``spectrum`` reads, of ``calibration.KINDS``."""
        ...

    @property
    def in_loss(self) -> bool:
        """Whether squared singular values estimate the loss, so that layers can be compared."""
        ...

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """Take ``weight`` (out, in) apart, most valuable component first.

        Args:
            weight: (out, in), floating point.
            stats: the statistics the basis ``needs``, by name (``calibration.Statistics.means``).
            name: of the weight, for errors.
        """
        ...


@runtime_checkable
class Method(Protocol):
    """A way to compress: a basis, and whatever is done beyond cutting its spectrum off."""

    name: ClassVar[str]  # as users write it
    allocator: ClassVar[str]  # what shares the budget among the layers where nobody says otherwise

    @property
    def components(self) -> Basis:
        """Whose components are kept or dropped."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that the method reads, such as "gram"."""
        ...


class ClosedForm:
    """What methods have in common that are a basis and a rule."""

    name: ClassVar[str]
    allocator: ClassVar[str] = "uniform"

    @property
    def components(self) -> Basis:
        """Whose components are kept or dropped; every method has its own."""
        raise ValueError(f"{type(self).__name__} has no basis")

    @property
    def needs(self) -> frozenset[str]:
        """The statistics of its basis."""
        return self.components.needs

    def spectrum(self, weight: Tensor, stats: Mapping[str, Tensor], *, name: str) -> Spectrum:
        """Take ``weight`` (out, in) apart in the method's basis, most valuable component first."""
        return self.components.spectrum(weight, stats, name=name)


@runtime_checkable
class FittedMethod(Method, Protocol):
    """A method whose factors depend on the rank beyond cutting a spectrum off."""

    def factor(
        self, weight: Tensor, spectrum: Spectrum, rank: int, stats: Mapping[str, Tensor]
    ) -> Factors:
        """The factors of ``weight`` (out, in) at ``rank``.

        Args:
            weight: (out, in).
            spectrum: of the weight, in the method's basis.
            rank: of the factors.
            stats: the statistics the method ``needs``.
        """
        ...


@runtime_checkable
class SequentialMethod(Method, Protocol):
    """A method that fits every block to the inputs it gets behind the compressed ones."""

    def is_sequential(self, ratio: float) -> bool:
        """Whether it does so when ``ratio`` of the parameters is removed."""
        ...

    def refit(
        self, weight: Tensor, factors: Factors, gram: Tensor, cross: Tensor, *, name: str
    ) -> Factors:
        """The factors, fitted to what the layer sees now.

        Args:
            weight: (out, in).
            factors: as they were without that.
            gram: (in, in), float64: ``X X^T``, per token, of the inputs behind compressed blocks.
            cross: (in, in), float64: ``X0 X^T``, with X0 the same tokens in the dense model.
            name: of the weight, for errors.
        """
        ...


@runtime_checkable
class SharingMethod(Method, Protocol):
    """A method in which several layers share one ``down``."""

    def groups(
        self, shapes: Mapping[str, tuple[int, int]], kinds: Mapping[str, str]
    ) -> Sequence[tuple[str, ...]]:
        """The layers that share, in groups of one or more; every layer is in one group.

        Args:
            shapes: name to (out, in), in the order of the model.
            kinds: name to the layer's name without the number of its block.
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
    def channels(self) -> bool:
        """Whether every input and output of a layer has a trained scale."""
        ...

    @property
    def deviation(self) -> Literal["none", "mean", "vector"]:
        """What is added to the outputs of compressed layers: see ``SoCo``."""
        ...

    def settings(self) -> TrainingSettings:
        """How the scores are trained."""
        ...


@runtime_checkable
class RankLearner(Method, Protocol):
    """A method that finds ranks and factors by training, without scores."""

    def fit(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Module],
        windows: Tensor,
        budget: int,
        objective: Objective,
        on_step: Callable[[Step], None],
        keep: Callable[[str], Keeper | None],
    ) -> tuple[dict[str, Factors | None], list[Step]]:
        """Train, and return the factors by layer (None: it stays dense) and the steps.

        Args:
            model: with its dense layers in place, as it is afterwards.
            targets: name to layer.
            windows: token ids (sequences, length).
            budget: parameters that may be kept.
            objective: what the compressed model should keep.
            on_step: called after each step.
            keep: makes what keeps the state of a loop of that name; None: nothing does.
        """
        ...
