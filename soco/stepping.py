"""What every training loop needs: batches, the dense model's outputs, a rate, and what it tells."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from soco.objectives import Objective


class Switchable(Protocol):
    """A layer that can compute what the dense one does."""

    dense: bool  # True: forward is the dense layer's


@dataclass(frozen=True)
class Step:
    """What is known after one optimizer step."""

    stage: str
    step: int  # from 1
    steps: int
    loss: float  # the whole loss
    divergence: float  # of it, the distance to the dense model
    kept: float  # living parameters, as a fraction of the targets' (counted as they are stored)


def batches(windows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end, every window once before any comes again; the odd rest is left out.

    Args:
        windows: token ids (sequences, length).
        size: sequences per batch, at most as many as there are.
        generator: of the order.
    """
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order[: len(order) // size * size].split(size):
            yield windows[chosen]


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
