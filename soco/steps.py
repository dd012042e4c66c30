"""What every loop that trains or probes a model is made of: frozen models, batches, steps."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soco.data import positive
from soco.keeping import Filed
from soco.objectives import Objective

TEACHER_ROOM = 4 * 2**30  # bytes of the dense model's last states that a training keeps


class Switchable(Protocol):
    """A layer that can compute what the dense one does."""

    dense: bool  # True: forward is the dense layer's


@dataclass(frozen=True)
class Step:
    """What is known after one optimizer step."""

    stage: str
    step: int  # from 1; 0: before the first
    steps: int
    loss: float  # the whole loss
    divergence: float  # of it, the distance to the dense model
    kept: float  # living parameters, as a fraction of the targets' (counted as they are stored)
    held_out: float | None = None  # the loss on text that is not trained on, where it was measured


class EndlessBatches(Iterator[Tensor]):
    """Batches without end, every window once before any comes again; the odd rest is left out.

    Each is which windows, (size,), int64.

    Args:
        count: windows.
        size: windows per batch, at most ``count``.
        generator: of the order, which is new in every round.
    """

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        """The first order is drawn with the first batch."""
        self._count, self._size, self._generator = count, size, generator
        self._left: list[Tensor] = []

    def __next__(self) -> Tensor:
        """The next one."""
        if not self._left:
            order = torch.randperm(self._count, generator=self._generator)
            self._left = list(order[: self._count // self._size * self._size].split(self._size))
        return self._left.pop(0)

    def state(self) -> dict[str, Any]:
        """What is left of this round, and the generator's state."""
        return {"left": list(self._left), "generator": self._generator.get_state()}

    def go_back(self, state: Mapping[str, Any]) -> None:
        """To where ``state`` was asked for."""
        self._left = list(state["left"])
        self._generator.set_state(state["generator"])


class Losses:
    """The history; it is one step behind, so that no step waits for its own loss."""

    def __init__(self, total: int, on_step: Callable[[Step], None]) -> None:
        self.total, self.on_step = total, on_step
        self.history: list[Step] = []
        self.pending: tuple[str, Tensor, float] | None = None
        self.smooth, self.best, self.since = math.nan, math.inf, 0

    def begin_stage(self) -> None:
        """What came before counts no more for the patience."""
        self.wait()
        self.smooth, self.best, self.since = math.nan, math.inf, 0

    def add(self, stage: str, losses: Tensor, kept: float) -> None:
        """Note the loss and the divergence in it, (2,), and read those of the step before."""
        self.wait()
        self.pending = stage, losses, kept

    def wait(self) -> None:
        """Read what is pending.

        Raises:
            ValueError: a loss is not finite.
        """
        if self.pending is None:
            return
        stage, losses, kept = self.pending
        self.pending = None
        loss, divergence = losses.tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} in stage {stage}: the model's outputs are not finite "
                f"(float16 overflows; try bfloat16 or float32) or learning_rate is too high"
            )
        step = Step(stage, len(self.history) + 1, self.total, loss, divergence, kept)
        self.history.append(step)
        self.on_step(step)
        self.smooth = loss if math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * loss
        lower = self.smooth < self.best
        self.best, self.since = (self.smooth, 0) if lower else (self.best, self.since + 1)

    def state(self) -> dict[str, Any]:
        """All that was noted."""
        self.wait()
        return {
            "history": [asdict(step) for step in self.history],
            "patience": [self.smooth, self.best, self.since],
        }

    def go_back(self, state: Mapping[str, Any]) -> None:
        """To what was noted then; the steps are told again."""
        self.history = [Step(**step) for step in state["history"]]
        self.smooth, self.best, self.since = state["patience"]
        for step in self.history[-1:]:
            self.on_step(step)


def check_batches(settings: Any, *counts: str) -> None:
    """Refuse settings of a loop whose counts, or parts of a batch, make no sense.

    Args:
        settings: has ``batch_size`` and ``micro_batch``, and the counts.
        counts: names of what else has to be a positive whole number.

    Raises:
        ValueError: one is not.
    """
    for name in ("batch_size", *counts):
        positive(name, getattr(settings, name))
    if settings.micro_batch is not None and not 1 <= settings.micro_batch <= settings.batch_size:
        raise ValueError(
            f"micro_batch must be from 1 to batch_size ({settings.batch_size}), got "
            f"{settings.micro_batch}"
        )


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Inside, the modules are in evaluation mode and no parameter of theirs wants a gradient.

    Afterwards both are as before, whatever was set inside.
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    wanted = {p: p.requires_grad for module in modules for p in module.parameters()}
    try:
        for module in modules:
            module.eval().requires_grad_(False)
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def with_forwards(
    blocks: Sequence[nn.Module], make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Inside, blocks run something else; afterwards what they ran before, hooks of others included.

    Args:
        blocks: in their order.
        make: the number of a block, and its forward, to what runs instead.
    """
    own = [block.__dict__.get("forward") for block in blocks]  # set by hooks of others
    try:
        for number, block in enumerate(blocks):
            block.forward = make(number, block.forward)  # type: ignore[method-assign]
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)  # the class's shows again
            else:
                block.forward = forward  # type: ignore[method-assign]


def checkpointed(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Inside, each block keeps its inputs only and is computed again in backward."""

    def wrap(number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    return with_forwards(blocks, wrap)


@contextmanager
def all_dense(layers: Iterable[Switchable]) -> Iterator[None]:
    """Inside, every layer computes what the dense one does."""
    layers = list(layers)
    for layer in layers:
        layer.dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.dense = False


class Teacher:
    """What the dense model gives for calibration windows; the model runs once for each of them.

    What is kept is not the outputs, which have the vocabulary's size, but what the output head
    makes them of (``Objective.outputs_and_states``), on the CPU, in the model's dtype. Windows for
    which there is no room run anew each time, and so do all where that is not possible.

    Args:
        model: the model.
        dense: makes a context in which it computes what the dense one does.
        objective: whose outputs these are.
        windows: token ids (sequences, length), on the CPU.
        room: bytes that may be kept.
        files: where they are kept instead of in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: Callable[[], AbstractContextManager[None]],
        objective: Objective,
        windows: Tensor,
        room: int = TEACHER_ROOM,
        files: Filed | None = None,
    ) -> None:
        """Nothing runs yet."""
        self.model, self.dense, self.objective, self.windows = model, dense, objective, windows
        self.room = room
        # Window to its states (length, hidden).
        self.kept: MutableMapping[int, Tensor] = {} if files is None else files
        self._fresh: list[int] = []  # of them, since ``fresh`` was called

    @torch.no_grad()
    def outputs(self, chosen: Tensor) -> Tensor:
        """The objective's outputs of the windows ``chosen`` (int64), on the model's device."""
        device = next(self.model.parameters()).device
        known = [self.kept.get(index) for index in chosen.tolist()]
        with self.dense():
            if not any(each is None for each in known):
                states = torch.stack(cast(list[Tensor], known)).to(device, non_blocking=True)
                return self.objective.from_states(self.model, states)
            ids = self.windows[chosen].to(device)
            if not self.room:
                return self.objective.outputs(self.model, ids)
            outputs, states = self.objective.outputs_and_states(self.model, ids)
            if states is None or not self._follow(outputs, states):
                self.room = 0
                return outputs
        for index, known_state, state in zip(chosen.tolist(), known, states, strict=True):
            size = state.numel() * state.element_size()
            if known_state is None and size <= self.room:
                self.kept[index] = state.to("cpu", copy=True)
                self._fresh.append(index)
                self.room -= size
        return outputs

    def states(self, chosen: Tensor) -> Tensor:
        """The states (sequences, length, hidden) of windows whose outputs were asked for.

        Raises:
            ValueError: they were not kept.
        """
        device = next(self.model.parameters()).device
        try:
            return torch.stack([self.kept[index] for index in chosen.tolist()]).to(device)
        except KeyError:
            raise ValueError(
                "the last hidden states of the dense model are not at hand: its outputs do not "
                "follow from them by the head alone, or there are too many to keep"
            ) from None

    def fresh(self) -> dict[int, Tensor | None]:
        """What was kept since this was last called; None for what is in a file."""
        filed = isinstance(self.kept, Filed)
        found = {index: None if filed else self.kept[index] for index in self._fresh}
        self._fresh.clear()
        return found

    def take(self, kept: Mapping[int, Tensor | None]) -> None:
        """Keep what ``fresh`` gave in an earlier run."""
        for index, state in kept.items():
            if state is not None:
                self.kept[index] = state
            elif isinstance(self.kept, Filed):
                self.kept.know(index)
            self.room -= self.kept[index].nbytes

    def _follow(self, outputs: Tensor, states: Tensor) -> bool:
        """Whether the outputs are what the head makes of the states."""
        again = self.objective.from_states(self.model, states)
        return again.shape == outputs.shape and torch.allclose(again, outputs, rtol=0, atol=1e-4)


def half_cosine(step: int, steps: int, begin: float, end: float) -> float:
    """From ``begin`` at step 0 to ``end`` at ``steps``, flat at both ends.

    >>> half_cosine(0, 4, 5.0, 4.0), half_cosine(2, 4, 5.0, 4.0), half_cosine(4, 4, 5.0, 4.0)
    (5.0, 4.5, 4.0)
    """
    swing = (1 + math.cos(math.pi * step / steps)) / 2
    return end + (begin - end) * swing
