"""What every loop that trains or probes a model is made of: frozen models, batches, steps."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from soco.objectives import Objective


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


def endless_batches(windows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end, every window once before any comes again; the odd rest is left out.

    Args:
        windows: token ids (sequences, length).
        size: sequences per batch, at most ``len(windows)``.
        generator: of the order, which is new in every round.

    Yields:
        Token ids (size, length).
    """
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield windows[chosen]


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
def checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside, each block keeps its inputs only and is computed again in backward."""
    own = [block.__dict__.get("forward") for block in blocks]  # set by hooks of others

    def wrap(forward: Callable) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return run

    for block in blocks:
        block.forward = wrap(block.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward  # the class's shows again
            else:
                block.forward = forward


@torch.no_grad()
def dense_outputs(
    model: nn.Module, layers: Iterable[Switchable], objective: Objective, ids: Tensor
) -> Tensor:
    """The objective's outputs for token ids (sequences, length) with all layers dense."""
    layers = list(layers)
    for layer in layers:
        layer.dense = True
    try:
        return objective.outputs(model, ids)
    finally:
        for layer in layers:
            layer.dense = False


def half_cosine(step: int, steps: int, begin: float, end: float) -> float:
    """From ``begin`` at step 0 to ``end`` at ``steps``, flat at both ends.

    >>> half_cosine(0, 4, 5.0, 4.0), half_cosine(2, 4, 5.0, 4.0), half_cosine(4, 4, 5.0, 4.0)
    (5.0, 4.5, 4.0)
    """
    swing = (1 + math.cos(math.pi * step / steps)) / 2
    return end + (begin - end) * swing
