"""The compression that is planned, and one batch of its model run without values."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from soco.calibration import OF_GRADIENTS
from soco.choices import Choices
from soco.linalg import work_of
from soco.methods import TrainedMethod
from soco.objectives import HiddenStates, Objective, objective_for, run_model
from soco.planning.tracing import Work, curvature_pass, inputs_of, without_values
from soco.processes import owners
from soco.ranks import Shape, is_dense, largest_rank, layer_params
from soco.surgery import text_config, transformer_blocks


@dataclass(frozen=True)
class Demand:
    """What a phase takes."""

    name: str
    bytes: int  # of memory beside Python and its libraries
    work: Work
    # What processes share, as costs of jobs; in lists that follow on each other. None: each process
    # does all of it, or the first one does.
    jobs: Sequence[Sequence[float]] = ()

    def share(self, processes: int) -> float:
        """The fraction of the time that so many processes take."""
        whole = sum(map(sum, self.jobs))
        if not whole:
            return 1.0
        busiest = 0.0
        for costs in self.jobs:
            busy = [0.0] * processes
            for cost, owner in zip(costs, owners(costs, processes), strict=True):
                busy[owner] += cost
            busiest += max(busy)
        return busiest / whole


@dataclass(frozen=True)
class Block:
    """A transformer block."""

    bytes: int  # of its parameters, in the dtype that is computed in
    names: tuple[str, ...]  # of the layers in it that are compressed


@dataclass(frozen=True)
class Setting:
    """The compression that is planned."""

    model: Any  # without values, its parameters in ``dtype``
    targets: Mapping[str, nn.Module]
    shapes: Mapping[str, Shape]
    ranks: Mapping[str, int]
    budget: int
    ratio: float
    choices: Choices
    samples: int
    length: int
    batch_size: int
    dtype: torch.dtype  # that is computed in
    stored: torch.dtype
    threads: int

    @property
    def weights(self) -> int:
        """Bytes of the model."""
        return sum(p.numel() for p in self.model.parameters()) * self.dtype.itemsize

    @cached_property
    def blocks(self) -> list[Block]:
        """In their order."""
        found = []
        for block in transformer_blocks(self.model):
            inside = set(block.modules())
            size = sum(p.numel() for p in block.parameters()) * self.dtype.itemsize
            names = tuple(n for n, m in self.targets.items() if m in inside)
            found.append(Block(size, names))
        return found

    @property
    def beside(self) -> int:
        """Bytes of what lies outside of all blocks."""
        return self.weights - sum(block.bytes for block in self.blocks)

    def lent(self, *, spectral: bool) -> int:
        """Bytes in memory while blocks are brought in one by one (``lending.Lender``).

        Args:
            spectral: whether with all components of their layers, and not with their weights.
        """
        width, most = self.dtype.itemsize, 0
        for block in self.blocks:
            size, shapes = block.bytes, [self.shapes[name] for name in block.names]
            if spectral:
                size += width * sum(min(o, i) * (o + i) - o * i for o, i in shapes)
            # What is read of a layer lies beside where it goes.
            sides = [min(o, i) * max(o, i) if spectral else 0 for o, i in shapes]
            most = max(most, size + width * max(sides, default=0))
        return self.beside + most

    @property
    def batches(self) -> int:
        """Of the calibration."""
        return math.ceil(self.samples / self.batch_size)

    def shared(self, names: Iterable[str]) -> list[float]:
        """Layers to take apart, as jobs of several processes."""
        whitened = bool(self.choices.method.components.needs)
        return [work_of(*self.shapes[name], whitened) for name in names]

    @property
    def factored(self) -> list[str]:
        """Layers that do not stay dense."""
        pivoted = self.choices.pivoted
        return [n for n, r in self.ranks.items() if not is_dense(self.shapes[n], r, pivoted)]

    def factors(self, width: int, *, pivoted: bool = False) -> int:
        """Bytes of all factors, of so many bytes each number."""
        return width * sum(
            layer_params(self.shapes[n], self.ranks[n], pivoted) for n in self.factored
        )

    def hidden(self, sequences: int) -> int:
        """Bytes of hidden states."""
        config: Any = text_config(self.model)
        return sequences * self.length * config.hidden_size * self.dtype.itemsize

    def work_bytes(self) -> int:
        """Bytes of the work folder of a streamed run at its largest."""
        states = 2 * self.hidden(self.samples) if self.choices.needs else 0
        if isinstance(self.choices.method, TrainedMethod):
            shapes = self.shapes.values()
            parts = sum(self.dtype.itemsize * min(s) * sum(s) + 8 * min(s) for s in shapes)
            method = self.choices.method.settings()
            windows = self.samples + round(method.written * self.samples)
            last = self.hidden(windows) + self.factors(self.dtype.itemsize)
        else:
            known = self.choices.rule.name == "uniform"
            each = [
                self.ranks[n] if known else largest_rank((o, i), self.choices.pivoted)
                for n, (o, i) in self.shapes.items()
            ]
            wide = max(4, self.dtype.itemsize)
            sizes = zip(self.shapes.items(), each, strict=True)
            parts = wide * sum(
                r * (o + i) + min(o, i)
                for (n, (o, i)), r in sizes
                if not known or n in self.factored
            )
            last = 0
        if self.choices.needs & OF_GRADIENTS:
            # Those of all blocks are kept for the way back, and go as parts come.
            every = states // 2 * (len(self.blocks) + 2)
            return max(every, parts + max(states, last))
        return parts + max(states, last)


@dataclass
class Passes:
    """What passes of the model take."""

    groups: list[list[str]]  # layers with the same inputs
    forward: Work
    curvature: Work  # with gradients
    single: Work  # the same of a model of one block
    inner: Work  # and of that without its head and the loss
    objective: Any


def passes_of(setting: Setting, notes: list[str]) -> Passes:
    """Run the model on one batch without values."""
    model, targets = setting.model, setting.targets
    alone = Passes([[name] for name in targets], Work(), Work(), Work(), Work(), None)
    choices, size = setting.choices, setting.batch_size
    if not choices.reads_text:
        return alone
    try:
        with without_values(model):
            ids = ids_of(setting, size)
            base = getattr(model, "base_model", model)
            within = set(base.modules())
            body = base if all(t in within for t in targets.values()) else model
            groups, forward = inputs_of(model, body, targets, ids, run_model)
            objective = objective_for(model, ids[:1])
        curvature = single = inner = Work()
        if choices.needs & OF_GRADIENTS:

            def run(of: Objective = objective) -> Work:
                return curvature_pass(model, targets, of, ids_of(setting, size))

            curvature, single = of_all_blocks(model, run), of_one_block(model, run)
            inner = of_one_block(model, lambda: run(HiddenStates()))
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        notes.append(f"what passes of {type(model).__name__} take is not counted: {reason}")
        return alone
    return Passes(groups, forward, curvature, single, inner, objective)


def ids_of(setting: Setting, sequences: int) -> Tensor:
    """Token ids of so many sequences."""
    return torch.zeros(sequences, setting.length, dtype=torch.long)


def spectrum_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a whole spectrum."""
    rank = min(shape)
    return max(4, 8 if dtype == torch.float64 else 4) * (rank * sum(shape) + rank)


def of_all_blocks(model: nn.Module, run: Callable[[], Work]) -> Work:
    """What a pass with gradients takes, told by the first two and the first three blocks.

    Every further block takes as much as the third. Of a model whose blocks differ or lie in several
    lists, all of them run.

    Args:
        model: on the meta device.
        run: a pass of the model with the blocks that it has then, all without values.
    """
    blocks, holders = transformer_blocks(model), _holders(model)
    sizes = {tuple(p.shape for p in block.parameters()) for block in blocks}
    if len(holders) != 1 or len(holders[0]) != len(blocks) or len(sizes) > 1 or len(blocks) < 4:
        with without_values(model):
            return run()
    held, found = dict(holders[0]._modules), []
    try:
        for count in (2, 3):
            holders[0]._modules = dict(list(held.items())[:count])
            with without_values(model):
                found.append(run())
    finally:
        holders[0]._modules = held
    return found[0].and_more(found[1], len(blocks) - 2)


def of_one_block(model: nn.Module, run: Callable[[], Work]) -> Work:
    """What a pass takes in the model with its first block alone; nothing if lists are several."""
    holders = _holders(model)
    if len(holders) != 1:
        return Work()
    held = dict(holders[0]._modules)
    try:
        holders[0]._modules = dict(list(held.items())[:1])
        with without_values(model):
            return run()
    finally:
        holders[0]._modules = held


def _holders(model: nn.Module) -> list[nn.ModuleList]:
    """The lists that the model's blocks lie in."""
    blocks = transformer_blocks(model)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [each for each in lists if blocks and blocks[0] in list(each)]
