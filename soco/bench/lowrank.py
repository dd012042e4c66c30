"""``soco-bench lowrank``: the low-rank layers of a block, beside what else computes them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from soco import ops
from soco.bench.shapes import SHAPES, rank_for
from soco.bench.timing import Memory, Run, copies_for, side_by_side
from soco.packing import EIGHT_BIT, round_rows

ALIGN = 16  # ranks are rounded up to multiples of this, for all ways alike
READ = "read"  # memory, in turn with the ways
BASELINE = "pairs"  # two linear layers for every one: what everybody runs


class Weights:
    """The factors of the layers that get one input, several times, and the dense weights."""

    def __init__(
        self, layers: Sequence[tuple[int, int]], kept: float, dtype: torch.dtype,
        device: torch.device, dense: bool,
    ) -> None:  # fmt: skip
        generator = torch.Generator(device).manual_seed(0)

        def random(rows: int, columns: int) -> Tensor:
            values = torch.empty(rows, columns, device=device, dtype=torch.float32)
            return (values.normal_(generator=generator) / columns**0.5).to(dtype)

        self.layers, self.inner = list(layers), layers[0][1]
        self.ranks = [-(-rank_for(*layer, kept) // ALIGN) * ALIGN for layer in layers]
        params = sum(rank * sum(layer) for rank, layer in zip(self.ranks, self.layers, strict=True))
        self.nbytes = params * dtype.itemsize
        self.copies = copies_for(params, device)  # enough for weights in 8 bits, too
        self.downs = [random(sum(self.ranks), self.inner) for _ in range(self.copies)]
        self.ups = [
            [random(out, rank) for (out, _), rank in zip(self.layers, self.ranks, strict=True)]
            for _ in range(self.copies)
        ]
        self.dense = (
            [[random(*layer) for layer in layers] for _ in range(self.copies)] if dense else []
        )
        saved = sum(rank**2 for rank in self.ranks)
        self.pivoted_bytes = (params - saved) * dtype.itemsize
        self.dense_bytes = sum(out * inner for out, inner in layers) * dtype.itemsize

    def split_downs(self) -> list[list[Tensor]]:
        """The first factors one by one."""
        return [list(down.split(self.ranks)) for down in self.downs]


def ways(weights: Weights, x: Tensor, names: Sequence[str]) -> dict[str, Run]:
    """Name to how it is done; what a way does not exist for is left out."""
    device, dtype = x.device, x.dtype
    apart = weights.split_downs()
    ours = [
        ops.PreparedGroup(down, up, dtype)
        for down, up in zip(weights.downs, weights.ups, strict=True)
    ]
    made: dict[str, Run] = {
        BASELINE: lambda i: _pairs(x, apart[i], weights.ups[i]),
        "grouped": lambda i: _grouped(x, weights.downs[i], weights.ups[i], weights.ranks),
        "soco": lambda i: ours[i](x),
    }
    if "dependent" in names and has_dependent_launches(device):
        early = [
            ops.PreparedGroup(down, up, dtype, dependent=True)
            for down, up in zip(weights.downs, weights.ups, strict=True)
        ]
        made["dependent"] = lambda i: early[i](x)
    if weights.dense:
        made["dense"] = lambda i: [linear(x, weight) for weight in weights.dense[i]]
    if "pivoted" in names:
        turned = [_pivoted(weights, i, dtype) for i in range(weights.copies)]
        made["pivoted"] = lambda i: turned[i](x)
    if "compiled" in names:
        torch.compiler.reset()  # else, from the ninth shape on, it is not compiled any longer
        compiled = torch.compile(_pairs, mode="max-autotune-no-cudagraphs", dynamic=False)
        made["compiled"] = lambda i: compiled(x, apart[i], weights.ups[i])
    for name in EIGHT_BIT:
        if name in names and dtype != torch.float64:
            groups = [_rounded(weights, i, name, dtype) for i in range(weights.copies)]
            made[name] = lambda i, groups=groups: groups[i](x)
    even = all(rank % 32 == 0 for rank in weights.ranks)  # others end torch 2.13 by a crash
    if "torch int8" in names and device.type == "cpu" and dtype == torch.bfloat16 and even:
        made["torch int8"] = _torch_int8(weights, x)
    return {name: made[name] for name in names if name in made}


def has_dependent_launches(device: torch.device) -> bool:
    """Whether a kernel may begin before the one before it has ended: from sm_90 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _pairs(x: Tensor, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> list[Tensor]:
    return [linear(linear(x, down), up) for down, up in zip(downs, ups, strict=True)]


def _grouped(x: Tensor, down: Tensor, ups: Sequence[Tensor], ranks: list[int]) -> list[Tensor]:
    zs = linear(x, down).split(ranks, -1)
    return [linear(z, up) for z, up in zip(zs, ups, strict=True)]


def _pivoted(weights: Weights, number: int, dtype: torch.dtype) -> ops.PreparedGroup:
    """Layers of the same ranks as some of their own rows: fewer parameters, the same products."""
    ups, sources = [], []
    for (out, _), rank, up in zip(weights.layers, weights.ranks, weights.ups[number], strict=True):
        pivots = torch.arange(out, device=up.device) * rank // out  # the pivots so far, evenly
        is_pivot = torch.ones(out, dtype=torch.bool, device=up.device)
        is_pivot[1:] = pivots[1:] > pivots[:-1]
        order = torch.where(is_pivot, is_pivot.cumsum(0) - 1, rank + (~is_pivot).cumsum(0) - 1)
        sources.append(order)
        ups.append(up[: out - rank])
    return ops.PreparedGroup(weights.downs[number], ups, dtype, sources=sources)


def _rounded(weights: Weights, number: int, kind: str, dtype: torch.dtype) -> ops.PreparedGroup:
    """The factors in 8 bits."""
    down, down_scale = round_rows(weights.downs[number], kind)
    ups, scales = zip(*(round_rows(up, kind) for up in weights.ups[number]), strict=True)
    return ops.PreparedGroup(down, ups, dtype, down_scale=down_scale, up_scales=scales)


def _torch_int8(weights: Weights, x: Tensor) -> Run:
    """Torch's own weight-only int8 product, twice for every layer."""
    product: Callable[..., Tensor] = torch._weight_int8pack_mm  # pyright: ignore

    def scaled(weight: Tensor) -> tuple[Tensor, Tensor]:
        values, scale = round_rows(weight, "int8")
        return values, scale.to(x.dtype)

    downs = [[scaled(down) for down in copy] for copy in weights.split_downs()]
    ups = [[scaled(up) for up in copy] for copy in weights.ups]
    return lambda i: [
        product(product(x, *down), *up) for down, up in zip(downs[i], ups[i], strict=True)
    ]


@torch.inference_mode()
def measure(
    shapes: Sequence[str],
    kept: Sequence[float],
    tokens: Sequence[int],
    dtypes: Sequence[torch.dtype],
    names: Sequence[str],
    device: torch.device,
    roofline: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row per shape, group of layers, fraction kept, dtype and number of tokens.

    On the CPU ``roofline`` is measured anew for every row, in turn with what is timed.
    """
    for shape in shapes:
        for group, layers in SHAPES[shape].groups.items():
            for fraction in kept:
                for dtype in dtypes:
                    weights = Weights(layers, fraction, dtype, device, "dense" in names)
                    memory = Memory(weights.nbytes) if device.type == "cpu" else None
                    for count in tokens:
                        x = torch.randn(count, weights.inner, device=device).to(dtype)
                        runs = ways(weights, x, names)
                        if memory is not None:
                            runs[READ] = memory.read
                        times = side_by_side(runs, weights.copies, device, repeats)
                        if memory is not None:
                            roofline = memory.nbytes / times.pop(READ)["median_us"] / 1e3
                        yield {
                            "shape": shape,
                            "group": group,
                            "layers": [list(layer) for layer in layers],
                            "kept": fraction,
                            "ranks": weights.ranks,
                            "dtype": str(dtype).removeprefix("torch."),
                            "tokens": count,
                            "read_gb_s": round(roofline, 2),
                            "ways": {
                                name: _with_rates(name, found, times, weights, roofline, dtype)
                                for name, found in times.items()
                            },
                        }


def _with_rates(
    name: str, found: dict[str, float], times: dict[str, dict[str, float]], weights: Weights,
    roofline: float, dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """Percentiles, the bytes of the weights, GB/s, and how many times faster than each other."""
    size = {"dense": weights.dense_bytes, "pivoted": weights.pivoted_bytes}.get(
        name, weights.nbytes
    )
    if "8" in name:
        size //= dtype.itemsize
    rate = size / found["median_us"] / 1e3
    return {
        **found,
        "bytes": size,
        "gb_s": round(rate, 2),
        "of_roofline": round(rate / roofline, 3),
        "times_faster_than": {
            other: round(there["median_us"] / found["median_us"], 3)
            for other, there in times.items()
            if other != name
        },
    }
