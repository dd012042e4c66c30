"""Layers of a stored model taken apart, block after block, into files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soco.allocators import AdaCR
from soco.calibration import Statistics
from soco.choices import Choices
from soco.lending import Lender
from soco.linalg import work_of
from soco.memory import give_back_memory
from soco.methods import FittedMethod, TrainedMethod
from soco.ops import check_finite
from soco.processes import number, owners
from soco.ranks import Shape, is_dense, largest_rank
from soco.refitting import means_file
from soco.spectral import Components
from soco.stored import StoredModel
from soco.workbench import COMMON, Groups, common_means, mean_output, similarity
from soco.workfolder import WorkFolder


@dataclass
class Dismantling:
    """Spectra of units, each written when the last of its layers has been seen.

    A unit is a layer, or several that share a basis, which may lie in several blocks: then the Gram
    matrices of those that come first wait in files.
    """

    stored: StoredModel
    work: WorkFolder
    lender: Lender  # which keeps the components of layers whose scores will be trained
    files: Mapping[str, str]  # layer to its file; that of its first layer is a unit's
    groups: Groups
    units: Mapping[str, Shape]  # by its first layer, a unit's (out, in), all outputs together
    known: Mapping[str, int] | None  # unit to rank, where that can be told before
    choices: Choices
    tokens: int  # of the calibration
    dtype: torch.dtype  # to compute in
    device: torch.device

    def block(self, names: Sequence[str], statistics: dict[str, Statistics]) -> None:
        """The layers of one block, each unit by one of the processes; the statistics are used up.

        Args:
            names: of the layers, in the model's order.
            statistics: of them, the same in all processes; none where the method reads none.
        """
        unit_of = {name: group for group in self.groups for name in group}
        whole = [unit_of[name] for name in names if name == unit_of[name][-1]]
        for name in names:
            if unit_of[name] not in whole and number() == 0:
                self._put_off(name, unit_of[name][0], statistics.pop(name, None))
        whitened = bool(self.choices.method.components.needs)
        owner = owners([work_of(*self.units[group[0]], whitened) for group in whole])
        for group, who in zip(whole, owner, strict=True):
            seen = {name: statistics.pop(name) for name in group if name in statistics}
            if who == number() and self._is_wanted(group[0]):
                give_back_memory()
                self._take_apart(group, seen)
            del seen
        give_back_memory()

    def mean(self, name: str) -> tuple[Tensor, Tensor]:
        """What ``Workbench.mean`` gives, where the training wants to know it."""
        held = self.work.get_tensors(means_file(self.files[name]))
        return held["inputs"], held["outputs"]

    def _is_wanted(self, unit: str) -> bool:
        """Whether a unit has to be taken apart: it is not yet, and may get a low rank."""
        known = None if self.known is None else self.known[unit]
        dense = known is not None and is_dense(self.units[unit], known, self.choices.pivoted)
        return not dense and not self.work.has(self.files[unit])

    def _put_off(self, name: str, unit: str, seen: Statistics | None) -> None:
        """Keep what is known of a layer until the others of its unit have been seen."""
        file = means_file(self.files[name])
        if seen is not None and self._is_wanted(unit) and not self.work.has(file):
            means = seen.means(self.tokens)
            self.work.put_tensors(file, {kind: means[kind] for kind in COMMON & means.keys()})

    def _means(self, group: tuple[str, ...], seen: dict[str, Statistics]) -> dict[str, Tensor]:
        """What is known of a unit's inputs; ``seen`` is used up: means are as large as sums."""
        if not self.choices.needs:
            return {}
        parts = [
            seen.pop(name).means(self.tokens)
            if name in seen
            else {
                kind: each.to(self.device)
                for kind, each in self.work.get_tensors(means_file(self.files[name])).items()
            }
            for name in group
        ]
        return common_means(parts)

    def _take_apart(self, group: tuple[str, ...], seen: dict[str, Statistics]) -> None:
        """Write the spectrum of a unit, of as many components as it may come to."""
        unit, method = group[0], self.choices.method
        weights = []
        for name in group:
            weights.append(self.stored.weight(name).to(self.device, self.dtype))
            check_finite(f"{name}.weight", weights[-1])
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        means = self._means(group, seen)
        spectrum = method.components.spectrum(weight, means, name=f"{unit}.weight")
        kept = means_file(self.files[unit])
        if isinstance(method, TrainedMethod):
            components = Components.of(spectrum, self.dtype)
            del spectrum
            if getattr(method, "deviation", None) == "mean":
                inputs = means["mean"].float()
                self.work.put_tensors(
                    kept, {"inputs": inputs, "outputs": mean_output(weight, inputs)}
                )
            self.lender.keep(unit, components)
            return
        most = largest_rank(self.units[unit], self.choices.pivoted)
        if self.known is not None:
            most = self.known[unit]
        tensors = {
            "up": spectrum.up[:, :most], "sigma": spectrum.sigma, "down": spectrum.down[:most]
        }  # fmt: skip
        if isinstance(method, FittedMethod) and not self.work.has(kept):
            self.work.put_tensors(kept, means)
        if isinstance(self.choices.rule, AdaCR):
            alike = similarity(weight, means["gram"])
            tensors["similarity"] = torch.tensor(alike, dtype=torch.float64)
        self.work.put_tensors(self.files[unit], tensors)
        for name in group if len(group) > 1 else ():
            self.work.drop(means_file(self.files[name]))
