"""From a config to a plan."""

import dataclasses
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soco.allocators import Allocator
from soco.choices import Choices, check_streamed, choose
from soco.contents import CONFIG
from soco.data import positive
from soco.experts import split_experts
from soco.installation import size_of
from soco.memory import give_back_memory, resident_memory
from soco.methods import Method
from soco.planning.demands import demands
from soco.planning.rates import ASSUMED_GPU, Rates, measured_rates
from soco.planning.setting import Demand, Setting
from soco.ranks import check_ratio, layer_params, parameter_budget, uniform_ranks
from soco.refinement import Refinement
from soco.reporting import format_bytes, format_percent
from soco.stored import empty_model
from soco.surgeon import SVDSurgeon
from soco.surgery import find_linears, sequence_length, shape_of


@dataclass(frozen=True)
class Phase:
    """A part of a compression."""

    name: str
    peak_bytes: int  # resident memory of the process at its highest
    cpu_seconds: float  # on this CPU, by rates that were measured
    gpu_seconds: float  # on one GPU, by rates that are assumed and were never measured
    gpus_seconds: float  # on several, by what their processes share


@dataclass(frozen=True)
class Plan:
    """What a compression is going to take; every number is an estimate."""

    method: str
    ratio: float
    stream: bool
    dtype: str  # that is computed in
    params: int  # of the whole model
    target_params: int  # of the layers that are compressed
    params_after: int  # of the whole model
    dense_bytes: int  # of the weights on disk
    compressed_bytes: int
    work_bytes: int  # of the work folder at its largest; 0: there is none
    base_bytes: int  # resident memory of this process: Python and its libraries
    threads: int  # that the CPU's times are for
    gpus: int  # that the last of the times are for
    phases: tuple[Phase, ...]
    notes: tuple[str, ...]  # what the numbers leave out

    @property
    def peak_bytes(self) -> int:
        """Resident memory at its highest."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def cpu_seconds(self) -> float:
        """All phases together."""
        return sum(phase.cpu_seconds for phase in self.phases)

    @property
    def gpu_seconds(self) -> float:
        """All phases together."""
        return sum(phase.gpu_seconds for phase in self.phases)

    @property
    def gpus_seconds(self) -> float:
        """All phases together."""
        return sum(phase.gpus_seconds for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        totals = ("peak_bytes", "cpu_seconds", "gpu_seconds", "gpus_seconds")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in totals}

    def summary(self) -> str:
        """A few lines for people; the phases are not among them."""
        after = self.target_params - (self.params - self.params_after)
        lines = [
            ("parameters", f"{self.params:,}, after it {self.params_after:,}"),
            (
                "layers",
                f"{self.target_params:,} of them, after it {after:,} "
                f"({format_percent(1 - after / self.target_params)} removed)",
            ),
            (
                "on disk",
                f"{format_bytes(self.dense_bytes)}, after it {format_bytes(self.compressed_bytes)}"
                + (f"; work folder {format_bytes(self.work_bytes)}" if self.work_bytes else ""),
            ),
            (
                "memory",
                f"{format_bytes(self.peak_bytes)} at its peak, of which "
                f"{format_bytes(self.base_bytes)} are Python and its libraries",
            ),
        ]
        return "\n".join(f"{title:<11} {value}" for title, value in lines)


def plan(
    model: str | PathLike[str] | Any,
    ratio: float = 0.5,
    *,
    method: str | Method = "soco",
    stream: bool = False,
    effort: str | None = None,
    preset: str | None = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    allocator: str | Allocator | None = None,
    pivoted: bool | None = None,
    surgeon: bool | SVDSurgeon | None = None,
    refine: bool | Refinement | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    gpus: int = 1,
) -> Plan:
    """Say what a compression takes before it begins, from the model's config alone.

    No weight is read or made. What the model's passes take is told by running it on tensors without
    values, and what a decomposition takes by small ones of the same proportions; what this CPU does
    in a second is measured, which takes about a second. Memory is that of the CPU.

    Args:
        model: a folder with config.json, or a config of transformers.
        ratio: as in ``soco.compress``, and so are the next ones.
        method: a name, or an instance.
        stream: whether it is ``soco.compress_folder``.
        effort: of method "soco".
        preset: of method "soco".
        samples: calibration sequences.
        length: tokens of each; None: what the model allows, at most 2048.
        seed: as there.
        allocator: as there; the ranks of all others than "uniform" depend on the weights, and are
            counted as uniform ones of the same budget.
        pivoted: as there.
        surgeon: as there; it is not planned.
        refine: as there.
        include: glob patterns of the layers to compress.
        exclude: glob patterns of layers to leave alone.
        batch_size: sequences at a time.
        dtype: to compute in; None: as the model is stored.
        gpus: that share the work, a process on each, in the last of the times.

    Returns:
        The plan.

    Raises:
        ValueError: an argument makes no sense, or the config describes no model.

    Source: ours; docs/reliability.md says how near it is.
    """
    choices = choose(
        method, allocator, effort=effort, preset=preset, pivoted=pivoted, surgeon=surgeon,
        refine=refine, seed=seed,
    )  # fmt: skip
    check_ratio(ratio)
    if stream:
        check_streamed(choices)
    samples, batch_size = positive("samples", samples), positive("batch_size", batch_size)
    gpus = positive("gpus", gpus)
    empty, stored = _empty(model)
    split_experts(empty)
    length = sequence_length(empty, length)
    computed = dtype or stored
    targets = find_linears(empty, include, exclude)
    shapes = {name: shape_of(module) for name, module in targets.items()}
    budget = parameter_budget(shapes, ratio)
    ranks = uniform_ranks(shapes, budget, pivoted=choices.pivoted)
    rates = measured_rates(computed)
    give_back_memory()
    base = resident_memory()
    setting = Setting(
        model=empty.to(computed), targets=targets, shapes=shapes, ranks=ranks, budget=budget,
        ratio=ratio, choices=choices, samples=samples, length=length, batch_size=batch_size,
        dtype=computed, stored=stored, threads=torch.get_num_threads(),
    )  # fmt: skip
    found, notes = demands(setting, stream=stream)
    params = size_of(empty)[0]
    target = sum(rows * columns for rows, columns in shapes.values())
    after = (
        params
        - target
        + sum(layer_params(shapes[name], rank, choices.pivoted) for name, rank in ranks.items())
    )
    pivots = 8 * sum(r for n, r in ranks.items() if r < min(shapes[n])) if choices.pivoted else 0
    return Plan(
        method=choices.method.name,
        ratio=ratio,
        stream=stream,
        dtype=str(computed).removeprefix("torch."),
        params=params,
        target_params=target,
        params_after=after,
        dense_bytes=params * stored.itemsize,
        compressed_bytes=after * stored.itemsize + pivots,
        work_bytes=setting.work_bytes() if stream else 0,
        base_bytes=base,
        threads=setting.threads,
        gpus=gpus,
        phases=tuple(_phase(each, base, rates, gpus) for each in found),
        notes=(*notes, *_unplanned(choices)),
    )


def _phase(demand: Demand, base: int, rates: Rates, gpus: int) -> Phase:
    products, cubes = demand.work.products, demand.work.cubes
    on_one = ASSUMED_GPU.seconds(products, cubes)
    return Phase(
        demand.name,
        base + demand.bytes,
        rates.seconds(products, cubes),
        on_one,
        on_one * demand.share(gpus),
    )


def _empty(model: Any) -> tuple[nn.Module, torch.dtype]:
    """A model without values, and the dtype that it is stored in."""
    if isinstance(model, str | PathLike):
        folder = Path(model)
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is no model: it has no {CONFIG}")
        return empty_model(folder, {}, lambda: torch.float32)
    if not hasattr(model, "save_pretrained") or isinstance(model, nn.Module):
        raise ValueError(
            f"a plan is made from a folder with {CONFIG} or a config of transformers, got a "
            f"{type(model).__name__}"
        )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return empty_model(Path(folder), {}, lambda: torch.float32)


def _unplanned(choices: Choices) -> list[str]:
    """What is part of the compression and not of the plan."""
    found = []
    if choices.surgeon is not None:
        found.append("the surgeon's passes are not planned")
    if choices.rule.name in ("sensitivity", "lems"):
        found.append(f"the probes of the allocator {choices.rule.name} are not planned")
    return found


def duration(seconds: float) -> str:
    """Seconds for people, no more exact than an estimate is.

    >>> duration(0.2), duration(42.4), duration(200), duration(9000), duration(400_000)
    ('under 1 s', '42 s', '3 min', '2.5 h', '4.6 d')
    """
    if seconds < 1:
        return "under 1 s"
    for size, unit, digits in ((100, "s", 0), (6000, "min", 0), (172_800, "h", 1)):
        if seconds < size:
            return f"{seconds / {'s': 1, 'min': 60, 'h': 3600}[unit]:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} d"
