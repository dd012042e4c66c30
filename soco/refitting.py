"""Closed forms that do more than cut spectra off, for a stored model: fits of layers in files."""

import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.factorization import fitted_block, warn_of_unaligned
from soco.keeping import Filed, moved
from soco.lending import Lender
from soco.linalg import Factors, Spectrum, work_of
from soco.memory import give_back_memory
from soco.methods import FittedMethod, SequentialMethod
from soco.modules import LowRankLinear
from soco.preparation import progress_bar
from soco.processes import number, owners, wait
from soco.sequential import Walk, stages
from soco.stored import StoredModel
from soco.surgery import bias_of, replace_module, shape_of
from soco.workbench import Groups
from soco.workfolder import WorkFolder


def fitted_file(file: str) -> str:
    """Where the fitted factors of a layer are, of whose spectrum this is the file."""
    return f"fitted-{file}"


def means_file(file: str) -> str:
    """Where the statistics of a layer are, of whose spectrum this is the file."""
    return f"means-{file}"


@dataclass
class Fits:
    """Fits of the layers of a stored model, from files to files."""

    stored: StoredModel
    work: WorkFolder
    targets: Mapping[str, nn.Module]
    files: Mapping[str, str]  # layer to the file of its spectrum
    groups: Groups  # that share a basis: one layer, or several
    ranks: Mapping[str, int]  # of the layers that have factors
    windows: Tensor | None  # token ids (sequences, length), on the CPU; of what reads them
    batch_size: int
    dtype: torch.dtype  # to compute in
    device: torch.device
    progress: bool | None

    def __post_init__(self) -> None:
        """What follows from that."""
        self._group_of = {name: group for group in self.groups for name in group}

    def one_by_one(self, method: FittedMethod) -> None:
        """Every layer for itself, by one of the processes: its factors at its rank."""
        names = list(self.ranks)
        owner = owners([work_of(*shape_of(self.targets[name]), True) for name in names])
        with progress_bar(len(names), "fits", self.progress) as bar:
            for done, (name, who) in enumerate(zip(names, owner, strict=True), 1):
                file = self.files[name]
                if who == number() and not self.work.has(fitted_file(file)):
                    means = moved(self.work.get_tensors(means_file(file)), self.device)
                    spectrum, rank = self._spectrum(name), self.ranks[name]
                    factors = method.factor(self._weight(name), spectrum, rank, means)
                    self.work.put_tensors(fitted_file(file), factors._asdict())
                    give_back_memory()
                bar(done)
        wait()

    def behind_each_other(self, method: SequentialMethod) -> None:
        """Block after block, to what the layers see behind compressed ones, by one process.

        The dense model runs with a block in memory, and so does the compressed one beside it; what
        they put out lies in files.
        """
        if number() == 0:
            lender = Lender(self.stored, self.work, {}, self.dtype, self.device)
            with lender.lent():
                self._walk(method)
        wait()

    def fitted(self, name: str) -> Factors:
        """What became of a layer."""
        return Factors(**self.work.get_tensors(fitted_file(self.files[name])))

    def cut(self, name: str) -> Factors | None:
        """A layer's part of its unit's spectrum cut off at its rank; None: it has no factors."""
        if name not in self.ranks:
            return None
        group = self._group_of[name]
        up, down = self._spectrum(group[0]).truncate(self.ranks[name])
        rows = [shape_of(self.targets[other])[0] for other in group]
        return Factors(up.split(rows)[group.index(name)], down)

    def _spectrum(self, unit: str) -> Spectrum:
        held = self.work.get_tensors(self.files[unit])
        return Spectrum(*(held[part].to(self.device) for part in Spectrum._fields))

    def _weight(self, name: str) -> Tensor:
        return self.stored.weight(name).to(self.device, self.dtype)

    def _walk(self, method: SequentialMethod) -> None:
        model = self.stored.model
        parts = stages(model, self.targets)
        begin = next(
            (i for i in range(len(parts)) if not self.work.has(_marker(i))), len(parts)
        )  # fmt: skip
        again = [True]  # whether what an earlier run wrote is to be read
        windows = cast(Tensor, self.windows)
        walk = Walk(
            model, self.targets, windows, self.batch_size,
            lambda stream, place: self._outputs(stream, place, windows if again[0] else None),
            sure=True,
        )  # fmt: skip
        unaligned: list[str] = []
        if 0 < begin < len(parts):
            self._place(parts[begin - 1][1])
            walk.go_on(parts[begin - 1][0])
        again[0] = False
        try:
            with progress_bar(len(parts), "block by block", self.progress) as bar:
                for done in range(begin, len(parts)):
                    self._block(walk, parts, done, method, unaligned)
                    bar(done + 1)
        finally:
            for name, layer in self.targets.items():
                replace_module(model, name, layer)
        warn_of_unaligned(unaligned)

    def _block(
        self,
        walk: Walk,
        parts: Sequence[tuple[nn.Module, list[str]]],
        place: int,
        method: SequentialMethod,
        unaligned: list[str],
    ) -> None:
        """Fit one block, and forget the one before it."""
        block, names = parts[place]

        left = [name for name in names if not self.work.has(fitted_file(self.files[name]))]
        fits = fitted_block(walk, block, left, method, self.cut, self._weight, unaligned)
        for name, factors in fits:
            self.work.put_tensors(fitted_file(self.files[name]), factors._asdict())
        self._place(names)
        self.work.put_json(_marker(place), names)
        if place:
            for name in parts[place - 1][1]:
                replace_module(self.stored.model, name, self.targets[name])
        index = walk.blocks.index(block)
        for before in range(index):
            self.work.drop(f"walk-0-{before}-*")
            if before < index - 1:
                self.work.drop(f"walk-1-{before}-*")
        give_back_memory()

    def _place(self, names: Sequence[str]) -> None:
        """Put layers that were fitted into the model."""
        for name in names:
            if name in self.ranks:
                factors = Factors(*(each.to(self.device) for each in self.fitted(name)))
                layer = LowRankLinear.from_factors(
                    factors.to(self.dtype), bias_of(self.targets[name])
                )
                replace_module(self.stored.model, name, layer)

    def _outputs(self, stream: int, place: int, known: Tensor | None) -> MutableMapping[int, Any]:
        """Where what a block puts out is kept, by batch; it is there for windows that are known."""
        found = Filed(self.work, f"walk-{stream}-{place}")
        if known is not None:
            for batch in range(1 + math.ceil((len(known) - 1) / self.batch_size)):
                found.know(batch)
        return found


def _marker(place: int) -> str:
    return f"fitted-{place}.json"
