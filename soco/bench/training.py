"""``soco-bench spectral`` and ``soco-bench svd``: what compressing a model spends its time on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soco import ops
from soco.bench.timing import Run, copies_for, side_by_side
from soco.linalg import truncated_svd


def measure_spectral(
    rank: int, tokens: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Masked spectral scaling, forward and backward: the op, and the same in plain torch."""
    copies = min(copies_for(3 * tokens * rank * dtype.itemsize, device), 16)
    xs = [torch.randn(tokens, rank, device=device).to(dtype) for _ in range(copies)]
    grads = [torch.randn_like(x) for x in xs]
    scale = torch.rand(rank, device=device)
    mask = torch.arange(rank, device=device) % 3 != 1
    runs: dict[str, Run] = {
        "forward": lambda i: ops.spectral_scale(xs[i], scale, mask),
        "forward, torch": lambda i: _scaled(xs[i], scale, mask),
        "backward": lambda i: ops.spectral_scale_backward(grads[i], xs[i], scale, mask),
        "backward, torch": lambda i: _gradients(grads[i], xs[i], scale, mask),
    }
    with torch.inference_mode():
        times = side_by_side(runs, copies, device, repeats)
    return {
        "rank": rank,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "ways": times,
        "times_faster_than_torch": {
            name: round(times[f"{name}, torch"]["median_us"] / times[name]["median_us"], 3)
            for name in ("forward", "backward")
        },
    }


def _scaled(x: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    return x * (scale * mask).to(x.dtype)


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    factor = (scale * mask).to(x.dtype)
    return grad * factor, (grad * x).sum(0, dtype=torch.float32) * mask


def measure_svd(
    rows: int, columns: int, kept: float, device: torch.device, repeats: int
) -> dict[str, Any]:
    """The first components of a matrix with a spectrum like a weight's, and what they leave over.

    ``excess`` is by how much the error of the truncation is above that of the exact one in float64.
    """
    rank = max(1, int(kept * min(rows, columns)))
    weight = _weight(rows, columns, device)
    values = torch.linalg.svdvals(weight.double())
    least = float(values[rank:].square().sum().sqrt())
    ways: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
        "soco exact": lambda: truncated_svd(weight, rank),
        "soco randomized": lambda: truncated_svd(weight, rank, "randomized"),
        "torch.linalg.svd": lambda: _first(torch.linalg.svd(weight, full_matrices=False), rank),
        "torch.svd_lowrank": lambda: _transposed(torch.svd_lowrank(weight, rank, niter=2)),
    }
    errors = {}
    for name, way in ways.items():
        U, S, Vh = way()
        error = (weight.double() - U.double() * S.double() @ Vh.double()).norm()
        errors[name] = round(float(error) / least - 1, 9)
    runs: dict[str, Run] = {
        name: (lambda i, way=way: (way(), _wait(device))) for name, way in ways.items()
    }
    # Nothing of this can be in a CUDA graph: timed from outside.
    times = side_by_side(runs, 1, torch.device("cpu"), repeats)
    return {
        "rows": rows,
        "columns": columns,
        "rank": rank,
        "ways": {name: {**times[name], "excess": errors[name]} for name in runs},
        "times_faster_than_torch": {
            name: round(times["torch.linalg.svd"]["median_us"] / times[name]["median_us"], 3)
            for name in ("soco exact", "soco randomized")
        },
    }


def _weight(rows: int, columns: int, device: torch.device) -> Tensor:
    """Random, with singular values that fall like 1 / sqrt(i)."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(rows, columns, device=device).normal_(generator=generator)
    sizes = torch.arange(1, columns + 1, device=device, dtype=torch.float32).rsqrt()
    return weight * sizes


def _first(found: Any, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = found
    return U[:, :rank], S[:rank], Vh[:rank]


def _transposed(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = found
    return U, S, V.mT


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
