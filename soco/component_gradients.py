"""What the loss of each sequence changes by with the scale of each component of each layer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from soco.linalg import Factors
from soco.objectives import by_sequence


@dataclass
class Sums:
    """Of one layer, per fold: sums over the samples of ``g g^T`` and ``g r``, in float32.

    g (rank,) and r are what ``Recorder`` notes of a sample.
    """

    curvature: list[Tensor] = field(default_factory=list)  # (rank, rank)
    pull: list[Tensor] = field(default_factory=list)  # (rank,)
    samples: list[int] = field(default_factory=list)

    def add(self, g: Tensor, r: Tensor, first: int, folds: int) -> None:
        """Add samples g (samples, rank) and r (samples,), the first being number ``first``."""
        rank = g.shape[1]
        for fold in range(folds):
            if len(self.samples) == fold:
                self.curvature.append(g.new_zeros(rank, rank))
                self.pull.append(g.new_zeros(rank))
                self.samples.append(0)
            mine = slice((fold - first) % folds, None, folds)
            self.curvature[fold].addmm_(g[mine].T, g[mine])
            self.pull[fold].addmv_(g[mine].T, r[mine])
            self.samples[fold] += len(r[mine])


class Recorder:
    """Notes, in backward, what the layers' inputs and output gradients come to in each sequence."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()  # (sequences, length) of the ids that run
        self._rows: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(
        self, name: str, factors: Factors, weight: Tensor | None, probe: Tensor
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """The forward hook of the layer ``name``: its output, with an ear in its backward.

        With x_t the inputs and e_t the gradients of the outputs, ``G = sum_t e_t x_t^T``, so
        ``g_i = sum_t (u_i . e_t) (d_i . x_t)`` and ``r = sum_t e_t^T W x_t - sum_i g_i`` (0 without
        a weight). No gradient of the size of a weight is made.
        """

        def note(x: Tensor, grad: Tensor) -> None:
            x, grad = (by_sequence(rows.detach().float(), self.shape) for rows in (x, grad))
            g = ((x @ factors.down.float().T) * (grad @ factors.up.float())).sum(1)
            r = g.new_zeros(len(g))
            if weight is not None:
                r = ((grad @ weight.float()) * x).sum((1, 2)) - g.sum(1)
            self._rows.setdefault(name, []).append((g, r))

        def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return _Listen.apply(output, inputs[0].detach(), probe, note)

        return observe

    def take(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name to samples (samples, rank) and (samples,), and forget them.

        Several calls of one layer add up: sequence by sequence, or all in one where a call knew no
        sequences.
        """
        taken = {}
        for name, calls in self._rows.items():
            if len({len(r) for _, r in calls}) > 1:
                calls = [(g.sum(0, keepdim=True), r.sum(0, keepdim=True)) for g, r in calls]
            taken[name] = (sum(g for g, _ in calls), sum(r for _, r in calls))
        self._rows.clear()
        return taken


class _Listen(torch.autograd.Function):
    """The identity; its backward tells what the layer's input and output gradient were."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, probe: Tensor, note: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        return y.clone()  # not a view: models may write into it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        (x,) = ctx.saved_tensors
        ctx.note(x, grad)
        return grad, None, None, None
