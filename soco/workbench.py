"""What compressions of one model share: statistics, decompositions, sensitivities, its own text."""

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from dataclasses import replace as changed
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from soco.archive import fetch, key_of, store
from soco.calibration import Statistics, collect
from soco.keeping import Filed, Keeper, Notes
from soco.linalg import Factors, Spectrum, side_by_side, work_of, workers_for
from soco.memory import give_back_memory
from soco.methods import Basis
from soco.modules import LowRankLinear
from soco.objectives import Objective, objective_for
from soco.processes import count, from_first, gathered, handed, number, owners
from soco.sampling import sample_from_model, writes_text
from soco.surgery import bias_of, replaced, shape_of, weight_of
from soco.workfolder import WorkFolder

Groups = Sequence[tuple[str, ...]]  # layers that share a basis, each under its first name
Progress = Callable[[int, str], AbstractContextManager[Callable[[int], None]]]

# Statistics that add up over the layers of a group.
COMMON = frozenset({"gram", "stacked_gram"})

# A probe measures on at most so many windows, and so many entries of logits (1 GB in float32).
PROBE_WINDOWS = 8
_PROBE_ENTRIES = 2**28


@dataclass
class Workbench:
    """Statistics, spectra and sensitivities of a dense model, each computed once.

    The model has to stay as it is while the workbench is used for it; compressions work on copies,
    or ask for everything they need before they begin.
    """

    model: nn.Module
    targets: Mapping[str, nn.Module]  # name to dense layer
    windows: Tensor | None  # calibration token ids (sequences, length), on the CPU
    batch_size: int = 8  # sequences at a time
    seed: int = 0  # of drawn labels
    directory: str | PathLike[str] | None = None  # where statistics are stored and looked for
    progress: Progress | None = None  # makes a progress bar of a total and a title
    keep: bool = True  # False: statistics go as soon as a decomposition has used them
    source: dict[str, Any] = field(default_factory=dict)  # of the calibration, for reports
    similarities: Mapping[str, float] = field(default_factory=dict)  # by unit, if known already
    mean_of: Callable[[str], tuple[Tensor, Tensor]] | None = None  # ``mean``, if that is elsewhere
    work: WorkFolder | None = None  # where spectra and the model's own text are kept to go on from
    seconds: dict[tuple, float] = field(
        default_factory=dict
    )  # (basis, groups) to its decomposition; (basis, group, rank) to its probe
    last_used: set[tuple] = field(default_factory=set)  # of these, since it was last emptied
    _statistics: dict[str, Statistics] = field(default_factory=dict)
    _spectra: dict[tuple, Spectrum] = field(default_factory=dict)
    _probed: dict[tuple, float] = field(default_factory=dict)
    _written: dict[tuple[int, int], Tensor] = field(default_factory=dict)  # (count, seed)
    _dense: list[Tensor] = field(default_factory=list)  # outputs for the probe's windows
    _notes: Notes | None = None  # what probes came to, in the work folder, and their seconds
    _unseen: set[str] = field(default_factory=set)  # layers that no calibration token went through
    _objective: Objective | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name to (out, in) of every target."""
        return {name: shape_of(module) for name, module in self.targets.items()}

    @property
    def tokens(self) -> int:
        """Of the calibration."""
        return 0 if self.windows is None else self.windows.numel()

    @property
    def objective(self) -> Objective:
        """What a compressed model should keep of this one."""
        if self._objective is None:
            self._objective = objective_for(self.model, self._ids()[:1])
        return self._objective

    def statistics(self, kinds: Collection[str]) -> Mapping[str, Statistics]:
        """Statistics of all targets; what is missing is collected in one pass, or read."""
        if self.windows is None:
            raise ValueError("statistics take calibration text, and there is none")
        wanted = frozenset(kinds) | {"gram"}
        if self._has(wanted):
            return self._statistics
        key = None
        if self.directory is not None:
            key = key_of(self.model, self.windows, self.batch_size, self.seed)
            stored = fetch(self.directory, key, self.shapes)
            if all(gathered(stored is not None)) and stored is not None:
                self._merge(_moved(stored, self._device()))
            if self._has(wanted):
                return self._statistics
        missing = {kind for kind in wanted if not self._has({kind})}
        keeper = None
        if self.work is not None:
            keeper = Keeper(self.work, f"statistics-{'-'.join(sorted(missing))}")
        with self._bar(len(self.windows), "statistics") as bar:
            found = collect(
                self.model,
                self.targets,
                self.windows,
                self.batch_size,
                bar,
                kinds=missing,
                objective=self._objective,
                seed=self.seed,
                keeper=keeper,
            )
        self._merge(found)
        if self.directory is not None and key is not None and number() == 0:
            store(self.directory, key, self._statistics)
        if keeper is not None:
            keeper.forget()
        return self._statistics

    @property
    def writes(self) -> bool:
        """Whether the model writes text of the kind that it reads."""
        return writes_text(self.model)

    def written(self, share: float, seed: int) -> Tensor | None:
        """Sequences that the model writes itself, to train on beside the calibration.

        Args:
            share: how many, as a multiple of the calibration's.
            seed: of what is drawn.

        Returns:
            Token ids (sequences, length), on the CPU; None where there are none to be: the model
            does not write text of the kind that it reads, or the share is 0.
        """
        wanted = 0 if self.windows is None else round(share * len(self.windows))
        if not wanted or self.windows is None or not self.writes:
            return None
        length = self.windows.shape[1]
        key = wanted, seed
        if key not in self._written:
            # Calibration that the model wrote with the same seed would come again.
            again = self.source.get("source") == "self"
            with self._bar(wanted, "sampling from the model") as bar:
                self._written[key] = from_first(
                    lambda: self._kept(
                        f"text-{wanted}-{seed + again}.safetensors",
                        lambda drafts: sample_from_model(
                            self.model, wanted, length, keep_start=True, seed=seed + again,
                            on_batch=bar, drafts=drafts,
                        ),
                    )
                )  # fmt: skip
        return self._written[key]

    def _kept(self, file: str, make: Callable[[Filed | None], Tensor]) -> Tensor:
        """What is in a file of the work folder, or what is made, batch by batch, and put there."""
        if self.work is None:
            return make(None)
        if not self.work.has(file):
            drafts = Filed(self.work, file.removesuffix(".safetensors")).know_all()
            self.work.put_tensors(file, {"tensor": make(drafts)})
            drafts.clear()
        return self.work.get_tensors(file)["tensor"]

    def forget(self) -> None:
        """Drop all that was collected and computed; what is asked for again is made again."""
        for held in (self._statistics, self._spectra, self._probed, self._dense):
            held.clear()

    def means(self, name: str) -> dict[str, Tensor]:
        """The statistics of a layer that were collected, as methods read them."""
        if name not in self._statistics:
            return {}
        return self._statistics[name].means(self.tokens)

    def mean(self, name: str) -> tuple[Tensor, Tensor]:
        """The mean input of a layer, (in,), and what its weight makes of that, (out,); float32."""
        if self.mean_of is not None:
            return self.mean_of(name)
        inputs = self.means(name)["mean"].float()
        return inputs, mean_output(weight_of(self.targets[name]).detach(), inputs)

    def spectra(self, components: Basis, groups: Groups) -> dict[str, Spectrum]:
        """Take every unit apart: name of its first layer to the spectrum of its stacked weights.

        Args:
            components: a basis.
            groups: units. In one of several layers the Gram matrix is the sum of theirs.
        """
        if components.needs:
            self.statistics(components.needs)
        missing = [group for group in groups if (components, group) not in self._spectra]
        found = {}
        begin = time.perf_counter()
        with self._bar(len(missing), "decomposition") as bar:
            for done, (group, spectrum) in enumerate(self._taken_apart(components, missing), 1):
                found[group] = spectrum
                if self.keep:
                    self._spectra[components, group] = spectrum
                else:
                    for name in group:
                        self._statistics.pop(name, None)
                give_back_memory()
                bar(done)
        key = (components, tuple(groups))
        if missing:
            self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - begin
        self.last_used.add(key)
        return {
            group[0]: found[group] if group in found else self._spectra[components, group]
            for group in groups
        }

    def _taken_apart(
        self, components: Basis, groups: Groups
    ) -> Iterator[tuple[tuple[str, ...], Spectrum]]:
        """Every unit with its spectrum, each taken apart by one of the processes.

        On the CPU each process works on several at once, where that is worth it.
        """

        def take_apart(group: tuple[str, ...]) -> tuple[tuple[str, ...], Spectrum]:
            place = _file_of(components, group)
            if self.work is not None and self.work.has(place):
                held = self.work.get_tensors(place)
                parts = (held[part].to(self._device()) for part in Spectrum._fields)
                return group, Spectrum(*parts)
            means = self._group_means(group)
            name = f"{group[0]}.weight"
            found = components.spectrum(self.weight(group), means, name=name)
            if self.work is not None:
                self.work.put_tensors(place, found._asdict())
            return group, found

        known, whitened = self.shapes, bool(components.needs)
        shapes = [(sum(known[name][0] for name in group), known[group[0]][1]) for group in groups]
        # Statistics are as large as the longer side.
        side = max(((max if whitened else min)(shape) for shape in shapes), default=0)
        workers = workers_for(side, len(groups)) if self._device().type == "cpu" else 1
        if count() == 1:
            yield from side_by_side(take_apart, groups, workers)
            return
        owner = owners([work_of(*shape, whitened) for shape in shapes])
        own = [group for group, who in zip(groups, owner, strict=True) if who == number()]
        found = dict(side_by_side(take_apart, own, workers))
        for group, who in zip(groups, owner, strict=True):
            yield group, Spectrum(*handed(found.pop(group, None), who, self._device()))

    def weight(self, group: tuple[str, ...]) -> Tensor:
        """The weights (out, in) of a unit, one below the other."""
        weights = [weight_of(self.targets[name]).detach() for name in group]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def split(self, group: tuple[str, ...], factors: Factors) -> dict[str, Factors]:
        """The factors of a unit's layers, which have ``down`` in common."""
        sizes = [shape_of(self.targets[name])[0] for name in group]
        ups = factors.up.split(sizes)
        return {n: Factors(up, factors.down) for n, up in zip(group, ups, strict=True)}

    def similarity(self, groups: Groups) -> dict[str, float]:
        """How alike inputs and outputs of a unit are as kernels on tokens, from 0 to 1."""
        if self.similarities:
            return {group[0]: self.similarities[group[0]] for group in groups}
        self.statistics({"gram"})
        return {
            group[0]: similarity(self.weight(group), self._group_means(group)["gram"])
            for group in groups
        }

    @torch.no_grad()
    def probe(self, components: Basis, group: tuple[str, ...], rank: int) -> float:
        """The divergence from the dense model when one unit alone is cut to a rank.

        It is measured on the first ``PROBE_WINDOWS`` calibration windows, or fewer where the
        vocabulary is large.
        """
        key = (components, group, rank)
        self.last_used.add(key)
        if key not in self._probed:
            if self.work is not None and self._notes is None:
                self._notes = Notes(self.work, "probes.json")
            noted = f"{components!r} {group!r} {rank}"
            if self._notes is not None and noted in self._notes:
                self._probed[key], self.seconds[key] = self._notes[noted]
                return self._probed[key]
            begin = time.perf_counter()
            spectrum = self.spectra(components, [group])[group[0]]
            dtype = weight_of(self.targets[group[0]]).dtype
            factors = self.split(group, spectrum.truncate(rank).to(dtype))
            cut = {
                name: LowRankLinear.from_factors(each, bias_of(self.targets[name]))
                for name, each in factors.items()
            }
            ids = self._probe_ids()
            if not self._dense:
                batches = ids.split(self.batch_size)
                self._dense = [self.objective.outputs(self.model, batch) for batch in batches]
            total = 0.0
            with replaced(self.model, cut):
                for batch, dense in zip(ids.split(self.batch_size), self._dense, strict=True):
                    student = self.objective.outputs(self.model, batch)
                    total += self.objective.divergence(dense, student).item() * len(batch)
            self._probed[key] = total / len(ids)
            self.seconds[key] = time.perf_counter() - begin
            if self._notes is not None:
                self._notes[noted] = [self._probed[key], self.seconds[key]]
        return self._probed[key]

    def _probe_ids(self) -> Tensor:
        ids = self._ids()
        vocabulary = getattr(getattr(self.model, "config", None), "vocab_size", None) or 1
        most = max(1, _PROBE_ENTRIES // (ids.shape[1] * vocabulary))
        return ids[: min(PROBE_WINDOWS, most)]

    def _group_means(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        return common_means([self.means(name) for name in group])

    def _has(self, kinds: Collection[str]) -> bool:
        known = [self._statistics.get(name) for name in self.targets]
        return all(each is not None and frozenset(kinds) <= each.parts().keys() for each in known)

    def _merge(self, found: Mapping[str, Statistics]) -> None:
        for name, each in found.items():
            old = self._statistics.get(name)
            if old is not None:
                parts = {**old.parts(), **each.parts(), "gram": old.gram}
                each = changed(each, **parts, sequences=max(old.sequences, each.sequences))
            self._statistics[name] = each
            if not each.tokens:
                self._unseen.add(name)

    def saw_nothing(self, group: tuple[str, ...]) -> bool:
        """Whether statistics were collected, and none of a unit's layers saw a token."""
        return self._unseen.issuperset(group)

    def note_unseen(self, names: Iterable[str]) -> None:
        """What ``saw_nothing`` is to know of layers whose statistics were collected elsewhere."""
        self._unseen.update(names)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _ids(self) -> Tensor:
        if self.windows is None:
            raise ValueError("this takes calibration text, and there is none")
        return self.windows[:PROBE_WINDOWS].to(self._device())

    def _bar(self, total: int, title: str) -> AbstractContextManager[Callable[[int], None]]:
        return _silent() if self.progress is None else self.progress(total, title)


class _silent:
    def __enter__(self) -> Callable[[int], None]:
        return lambda done: None

    def __exit__(self, *_: object) -> None:
        pass


def mean_output(weight: Tensor, inputs: Tensor) -> Tensor:
    """What a weight (out, in) makes of one input (in,), float32.

    Not a matrix-vector product, whose last bits depend on where the weight lies in memory.
    """
    return (weight.float() * inputs).sum(1)


def common_means(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The statistics of several layers as those of one, of the inputs of all of them."""
    if len(parts) == 1:
        return parts[0]
    common = COMMON.intersection(*parts)
    return {kind: torch.stack([part[kind] for part in parts]).sum(0) for kind in common}


def similarity(weight: Tensor, gram: Tensor) -> float:
    """How alike inputs and outputs of a weight (out, in) are as kernels on tokens, from 0 to 1.

    Args:
        weight: (out, in).
        gram: (in, in), of the inputs.
    """
    crossed = weight.to(gram.dtype) @ gram
    norms = gram.norm() * (crossed @ weight.to(gram.dtype).mT).norm()
    return float(crossed.square().sum() / norms) if norms > 0 else 0.0


def _file_of(components: Basis, group: tuple[str, ...]) -> str:
    """Where the spectrum of a unit is kept."""
    told = hashlib.sha256(f"{components!r} {group!r}".encode()).hexdigest()
    return f"spectrum-{told[:24]}.safetensors"


def _moved(found: Mapping[str, Statistics], device: torch.device) -> dict[str, Statistics]:
    """The same on another device; layers that share a sum share it there, too."""
    there: dict[int, Tensor] = {}

    def moved(tensor: Tensor) -> Tensor:
        if id(tensor) not in there:
            there[id(tensor)] = tensor.to(device)
        return there[id(tensor)]

    return {
        name: changed(each, **{kind: moved(part) for kind, part in each.parts().items()})
        for name, each in found.items()
    }
