"""Scores of a stored model: trained with a block of it in memory, and folded into its layers."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from soco.assembling import Outcome, Piece
from soco.guard import Clock
from soco.keeping import Filed, Keeper
from soco.learning import Learned, learn_scores
from soco.lending import Lender
from soco.linalg import Factors
from soco.methods import TrainedMethod
from soco.preparation import noted
from soco.processes import check_same, count, number, wait
from soco.spectral import SpectralLinear
from soco.stored import StoredModel
from soco.surgery import bias_of
from soco.workbench import Workbench
from soco.workfolder import WorkFolder


@dataclass
class Training:
    """A training of scores, from components in files to factors in files."""

    stored: StoredModel
    work: WorkFolder
    lender: Lender  # has the components of all layers
    targets: Mapping[str, nn.Module]
    files: Mapping[str, str]  # layer to the file of its components
    budget: int  # parameters that may be kept
    pivoted: bool
    bench: Workbench  # has the text
    clock: Clock
    notes: list[str]
    progress: bool | None

    def outcome(self, method: TrainedMethod) -> Outcome:
        """Train, from where an earlier run stopped, and fold a layer at a time."""
        with self.lender.lent():
            learned = self._learned(method)
            alive = {name: int(layer.mask.sum()) for name, layer in learned.layers.items()}
            check_same(alive, "the ranks of the layers")
            for place, (name, layer) in enumerate(learned.layers.items()):
                if place % count() == number() and not self.work.has(self._folded(name)):
                    self._fold(name, layer)
        wait()
        ranks, biased = {}, set()
        for name, module in self.targets.items():
            weight, bias = self._piece(name)
            if isinstance(weight, Factors):
                ranks[name] = weight.down.shape[0]
                if bias is not None and bias_of(module) is None:
                    biased.add(name)
        return Outcome(ranks, self._piece, frozenset(biased), learned.ranges(), learned.history)

    def _learned(self, method: TrainedMethod) -> Learned:
        settings, written = method.settings(), None
        if settings.written and self.bench.writes:
            with self.clock("written text"):
                written = self.bench.written(settings.written, settings.seed)
        with self.clock("training"), noted(self.notes):
            return learn_scores(
                self.stored.model, method, self.targets, self.lender, self.bench, [self.budget],
                pivoted=self.pivoted, progress=self.progress, written=written,
                keeper=Keeper(self.work, "training"), states=Filed(self.work, "state"),
                by_blocks=True,
            )  # fmt: skip

    def _folded(self, name: str) -> str:
        """The file of what a layer has become."""
        return f"folded-{self.files[name]}"

    def _fold(self, name: str, layer: SpectralLinear) -> None:
        """Write it."""
        with self.lender.whole(name, layer):
            weight, bias = layer.fold()
        tensors = {"weight": weight} if isinstance(weight, Tensor) else weight._asdict()
        tensors |= {} if bias is None else {"bias": bias}
        self.work.put_tensors(self._folded(name), tensors)

    def _piece(self, name: str) -> Piece:
        """The same, mapped into memory."""
        held = self.work.get_tensors(self._folded(name))
        bias = held.pop("bias", None)
        return Piece(held["weight"] if "weight" in held else Factors(**held), bias)
