"""``soco-bench spectral`` and ``soco-bench svd``: what compressing a model spends its time on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from soco import ops
from soco.bench.timing import CPU, Run, copies_for, side_by_side
from soco.linalg import Factors, cusolver, subspace, truncated_svd


def measure_spectral(
    rank: int,
    outputs: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    compiled: bool,
) -> dict[str, Any]:
    """Training the scales of components: forward and backward pass, ours beside plain torch.

    ``scaling`` is the op alone, the scales of (tokens, rank) numbers; ``layer`` is it with the
    product by ``up`` (outputs, rank), which both have in common.
    """
    copies = min(copies_for(3 * tokens * rank * dtype.itemsize, device), 4)
    zs = [torch.randn(tokens, rank, device=device).to(dtype) for _ in range(copies)]
    scaled_grads = [torch.randn_like(z) for z in zs]
    grads = [torch.randn(tokens, outputs, device=device).to(dtype) for _ in range(copies)]
    up = torch.randn(outputs, rank, device=device).to(dtype) / rank**0.5
    scale = torch.rand(rank, device=device).requires_grad_()
    mask = torch.arange(rank, device=device) % 3 != 1
    for z in zs:
        z.requires_grad_()

    def layer(z: Tensor, scale: Tensor) -> Tensor:
        return torch.nn.functional.linear(_scaled(z, scale, mask), up)

    def both(way: Callable[[Tensor, Tensor], Tensor], gradients: list[Tensor]) -> Run:
        return lambda i: torch.autograd.grad(way(zs[i], scale), (zs[i], scale), gradients[i])

    ways: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]] = {
        "scaling": (lambda z, s: ops.spectral_scale(z, s, mask), scaled_grads),
        "scaling, torch": (lambda z, s: _scaled(z, s, mask), scaled_grads),
        "layer": (lambda z, s: ops.spectral_linear(z, s, mask, up), grads),
        "layer, torch": (layer, grads),
    }
    if compiled:
        ways["scaling, compiled"] = (torch.compile(ways["scaling, torch"][0]), scaled_grads)
        ways["layer, compiled"] = (torch.compile(layer), grads)
    runs = {name: both(*way) for name, way in ways.items()}
    times = side_by_side(runs, copies, device, repeats)
    return {
        "rank": rank,
        "outputs": outputs,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "ways": times,
        "times_faster": {
            name: round(times[name]["median_us"] / times[name.split(",")[0]]["median_us"], 3)
            for name in runs
            if "," in name
        },
    }


def _scaled(z: Tensor, scale: Tensor, mask: Tensor) -> Tensor:
    return z * (scale * mask).to(z.dtype)


def measure_svd(
    rows: int, columns: int, kept: float, spectrum: str, device: torch.device, repeats: int
) -> dict[str, Any]:
    """The first components of a matrix, and what they leave over.

    ``excess`` is by how much the error of the truncation is above that of the exact one in float64.
    The spectrum is like a weight's, falling as ``1 / sqrt(i)``, or like that of a weight times a
    root of its inputs' Gram matrix: the same, over six decades.
    """
    rank = max(1, int(kept * min(rows, columns)))
    weight = _weight(rows, columns, spectrum, device)
    values = torch.linalg.svdvals(weight.double())
    least = float(values[rank:].square().sum().sqrt())
    ways: dict[str, Callable[[], tuple[Tensor, Tensor, Tensor]]] = {
        "soco exact": lambda: truncated_svd(weight, rank),
        "soco randomized": lambda: truncated_svd(weight, rank, "randomized"),
        "soco subspace": lambda: _factors(subspace(weight, rank).factors),
        "torch.linalg.svd": lambda: _first(torch.linalg.svd(weight, full_matrices=False), rank),
        "torch.linalg.eigh": lambda: _by_eigh(weight, rank),
        "torch.svd_lowrank": lambda: _transposed(torch.svd_lowrank(weight, rank, niter=2)),
        "torch.svd_lowrank, 4": lambda: _transposed(torch.svd_lowrank(weight, rank, niter=4)),
    }
    if device.type == "cuda":
        for driver in ("gesvd", "gesvda"):
            ways[f"torch.linalg.svd, {driver}"] = lambda driver=driver: _first(
                torch.linalg.svd(weight, full_matrices=False, driver=driver), rank
            )
        if cusolver.svd(weight) is not None:
            ways["cuSOLVER gesvdp"] = lambda: _first(cusolver.svd(weight), rank)
    errors = {}
    for name, way in ways.items():
        U, S, Vh = way()
        error = (weight.double() - U.double() * S.double() @ Vh.double()).norm()
        errors[name] = float(f"{float(error) / least - 1:.3e}")
    times = _from_outside(ways, device, repeats)
    return {
        "rows": rows,
        "columns": columns,
        "rank": rank,
        "spectrum": spectrum,
        "ways": {name: {**times[name], "excess": errors[name]} for name in ways},
        "times_faster_than_torch": {
            name: round(times["torch.linalg.svd"]["median_us"] / times[name]["median_us"], 3)
            for name in ways
            if name.startswith("soco")
        },
    }


def measure_batched_svd(
    side: int, batch: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Many small square matrices, fully taken apart, and how well.

    ``error`` is the largest entry of ``A - U S Vh`` over the largest singular value,
    ``orthogonality`` the largest one of ``U^T U - I`` and ``V^T V - I``.
    """
    generator = torch.Generator(device).manual_seed(0)
    matrices = torch.empty(batch, side, side, device=device, dtype=dtype)
    matrices.normal_(generator=generator)
    ways = {
        "soco": lambda: ops.batched_svd(matrices),
        "torch.linalg.svd": lambda: torch.linalg.svd(matrices, full_matrices=False),
    }
    found = {}
    for name, way in ways.items():
        U, S, Vh = (part.double() for part in way())
        identity = torch.eye(side, device=device, dtype=torch.float64)
        away = max(((U.mT @ U) - identity).abs().max(), ((Vh @ Vh.mT) - identity).abs().max())
        error = ((U * S[:, None]) @ Vh - matrices).abs().amax((1, 2)) / S[:, 0]
        found[name] = {"error": float(f"{error.max():.3e}"), "orthogonality": float(f"{away:.3e}")}
    times = _from_outside(ways, device, repeats)
    return {
        "side": side,
        "batch": batch,
        "dtype": str(dtype).removeprefix("torch."),
        "ways": {name: {**times[name], **found[name]} for name in ways},
        "times_faster_than_torch": round(
            times["torch.linalg.svd"]["median_us"] / times["soco"]["median_us"], 3
        ),
    }


def _weight(rows: int, columns: int, spectrum: str, device: torch.device) -> Tensor:
    """Random directions, with the singular values of a spectrum."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(rows, columns, device=device).normal_(generator=generator)
    places = torch.arange(1, columns + 1, device=device, dtype=torch.float32)
    if spectrum == "whitened":
        return weight * 1e6 ** (-(places - 1) / columns)
    return weight * places.rsqrt()


def _factors(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    return factors.up, factors.up.new_ones(factors.up.shape[1]), factors.down


def _by_eigh(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors of the Gram matrix as it is, in the weight's dtype."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.mT
    U = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -rank:]
    down = U.mT @ wide
    ones = weight.new_ones(rank)
    return (U, ones, down) if wide is weight else (down.mT, ones, U.mT)


def _first(found: Any, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = found
    return U[:, :rank], S[:rank], Vh[:rank]


def _transposed(found: Any) -> tuple[Tensor, Tensor, Tensor]:
    U, S, V = found
    return U, S, V.mT


def _from_outside(
    ways: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Times of decompositions, of which nothing can be in a CUDA graph."""

    def timed(way: Callable[[], Any]) -> Run:
        return lambda i: (way(), device.type == "cuda" and torch.cuda.synchronize(device))

    return side_by_side({name: timed(way) for name, way in ways.items()}, 1, CPU, repeats)
