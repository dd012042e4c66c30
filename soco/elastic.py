"""One learned spectrum for many sizes: a layer's components, and what was learned of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from soco.folders import SPECTRUM
from soco.headers import opened_tensors, read_headers
from soco.linalg import Factors
from soco.ops import all_finite
from soco.ranks import allocate, check_ratio, parameter_budget
from soco.spectral import BESIDES, Snapshot, SpectralLinear, fold
from soco.surgery import layout_of

FORMAT, VERSION = "soco spectrum", 1

# Tensors of a layer in the file: name to shape, in terms of out, in, rank and stations.
_SHAPES = {
    "up": ("out", "rank"),
    "down": ("rank", "in"),
    "gain": ("rank",),
    "scores": ("stations", "rank"),
    "values": ("stations", "rank"),
    "alive": ("stations", "rank"),
    "bias": ("out",),
    "left": ("stations", "out"),
    "right": ("stations", "in"),
    "deviation": ("stations", "out"),
    "mean": ("in",),
    "mean_output": ("out",),
}
_OPTIONAL = frozenset({"bias", *BESIDES, "mean", "mean_output"})


@dataclass(frozen=True)
class Components:
    """A layer's components, and what each of them was like at every station of the training."""

    layout: str  # of the dense layer (``surgery.layout_of``)
    up: Tensor  # (out, rank), columns of unit norm, in the weight's dtype
    down: Tensor  # (rank, in), rows of unit norm, in the weight's dtype
    gain: Tensor  # (rank,), float32: the component's size
    scores: Tensor  # (stations, rank), float32, positive
    values: Tensor  # (stations, rank), float32: what it is worth in the loss
    alive: Tensor  # (stations, rank), bool: whether it was there
    bias: Tensor | None = None  # (out,), the dense layer's
    left: Tensor | None = None  # (stations, out), float32, of the outputs' trained scales
    right: Tensor | None = None  # (stations, in), float32, of the inputs'
    deviation: Tensor | None = None  # (stations, out), float32, trained
    mean: Tensor | None = None  # (in,), float32, of the inputs, where outputs keep theirs
    mean_output: Tensor | None = None  # (out,), float32: the dense layer's outputs for the mean

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.up), self.down.shape[1]

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias when it is compressed."""
        return any(each is not None for each in (self.bias, self.deviation, self.mean))

    def tensors(self) -> dict[str, Tensor]:
        """What there is, by name."""
        return {name: value for name in _SHAPES if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class ElasticSpectrum:
    """What ``soco.resize`` makes every size of, between two ratios that were trained for.

    At a station of the training it is what was trained. Between two of them, the logarithms of
    scores and values are interpolated in the number of parameters that are kept, and the components
    are chosen anew.

    Source: one order over all components for every size is ACIP's idea, arXiv:2502.01717; there it
    is the order in which they were pruned, and nothing is rescaled.
    """

    ratios: tuple[float, ...]  # that were trained for, ascending: the stations
    budgets: tuple[int, ...]  # parameters of the layers at each, descending
    pivoted: bool  # whether the layers are stored as pivoted factors
    layers: dict[str, Components]  # by the layer's name in the model

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name to (out, in)."""
        return {name: layer.shape for name, layer in self.layers.items()}

    @property
    def total(self) -> int:
        """Parameters of all layers when they are dense."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def budget(self, ratio: float) -> int:
        """The parameters that are kept at ``ratio``.

        Raises:
            ValueError: it is no ratio, or not between those that were trained for.
        """
        check_ratio(ratio)
        low, high = self.ratios[0], self.ratios[-1]
        if not low - 1e-9 <= ratio <= high + 1e-9:
            raise ValueError(
                f"this spectrum was learned for ratios from {low} to {high}, and {ratio} is "
                f"outside: compress the dense model again, with other ratios"
            )
        return parameter_budget(self.shapes, ratio)

    def at(self, budget: int) -> dict[str, tuple[Tensor | Factors, Tensor | None]]:
        """The layers with ``budget`` parameters: name to weight or factors, and bias.

        Raises:
            ValueError: it is outside the budgets that were trained for.
        """
        if not self.budgets[-1] <= budget <= self.budgets[0]:
            raise ValueError(
                f"this spectrum was learned for {self.budgets[-1]:,} to {self.budgets[0]:,} "
                f"parameters in the compressed layers, and {budget:,} is outside"
            )
        before = max(i for i, each in enumerate(self.budgets) if each >= budget)
        after = min(before + 1, len(self.budgets) - 1)
        gap = self.budgets[before] - self.budgets[after]
        share = (self.budgets[before] - budget) / gap if gap else 0.0

        def between(rows: Tensor) -> Tensor:
            logs = rows[[before, after]].double().clamp_min(torch.finfo(torch.float32).tiny).log()
            return torch.lerp(logs[0], logs[1], share).exp().float()

        found = {}
        for name, alive in self._alive(budget, before, between).items():
            layer = self.layers[name]
            up, down, scale = layer.up, layer.down, layer.gain * between(layer.scores)
            if bool(alive.all()) and len(alive) < min(layer.shape):  # and yet no dense weight
                up, down, scale, alive = _with_a_dead_one(layer, scale)
            besides = {
                part: torch.lerp(rows[before], rows[after], share)
                for part in BESIDES
                if (rows := getattr(layer, part)) is not None
            }
            found[name] = fold(
                up, down, scale, alive, layer.bias,
                **besides, mean=layer.mean, mean_output=layer.mean_output,
            )  # fmt: skip
        return found

    def _alive(
        self, budget: int, before: int, between: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """Which components there are at a budget: name to (rank,), bool."""
        if budget == self.budgets[before]:
            return {name: layer.alive[before] for name, layer in self.layers.items()}
        values = {name: between(layer.values) for name, layer in self.layers.items()}
        padded = {
            name: torch.cat([value, value.new_zeros(min(self.shapes[name]) - len(value))])
            for name, value in values.items()
        }
        found = {}
        for name, rank in allocate(padded, self.shapes, budget, pivoted=self.pivoted).items():
            chosen = values[name].argsort(descending=True, stable=True)[:rank]
            found[name] = torch.zeros(len(values[name]), dtype=torch.bool)
            found[name][chosen] = True
        return found

    def save(self, file: Path, dtype: torch.dtype | None = None) -> None:
        """Write everything into one safetensors file; components and biases in ``dtype``."""
        tensors = {}
        for name, layer in self.layers.items():
            for part, value in layer.tensors().items():
                wide = dtype is None or part not in ("up", "down", "bias")
                value = value if wide else value.to(dtype)
                tensors[f"{name}.{part}"] = value.detach().cpu().contiguous()
        described = {
            "format": FORMAT,
            "version": VERSION,
            "ratios": self.ratios,
            "budgets": self.budgets,
            "pivoted": self.pivoted,
            "layouts": {name: layer.layout for name, layer in self.layers.items()},
        }
        save_file(tensors, str(file), {"soco": json.dumps(described)})

    @classmethod
    def load(cls, file: Path) -> "ElasticSpectrum":
        """Read what ``save`` wrote.

        Raises:
            ValueError: the file is missing, broken, of another format or version, or does not hold
                what it describes; one sentence names the file and the place.
        """
        if not file.is_file():
            raise ValueError(
                f"{file.parent} holds no {SPECTRUM}: only a model that was compressed for several "
                f"ratios can be resized (soco compress --ratios)"
            )
        entries = read_headers([file])
        with opened_tensors(file) as held:
            described = _described(file, (held.metadata() or {}).get("soco"))
            layers = {}
            for name, layout in described["layouts"].items():
                parts = {
                    part: held.get_tensor(key)
                    for part in _SHAPES
                    if (key := f"{name}.{part}") in entries
                }
                layers[name] = _checked(file, name, layout, parts, len(described["ratios"]))
        known = {f"{n}.{part}" for n, layer in layers.items() for part in layer.tensors()}
        for key in entries.keys() - known:
            raise ValueError(f"{file} holds {key}, which belongs to no layer that it describes")
        return cls(
            tuple(described["ratios"]), tuple(described["budgets"]), described["pivoted"], layers
        )


def elastic_spectrum(
    ratios: tuple[float, ...],
    budgets: tuple[int, ...],
    targets: Mapping[str, nn.Module],
    layers: Mapping[str, SpectralLinear],
    snapshots: list[dict[str, Snapshot]],
    *,
    pivoted: bool,
) -> ElasticSpectrum:
    """What a training for several budgets has learned, as far as sizes between them need it.

    Args:
        ratios: that were trained for, ascending.
        budgets: of them, descending.
        targets: name to dense layer.
        layers: name to trained layer.
        snapshots: of every budget.
        pivoted: whether the layers are stored as pivoted factors.

    Returns:
        The spectrum, on the CPU: of each layer the components that were alive at any budget.
    """
    found = {}
    for name, layer in layers.items():
        order = layer.order
        alive = torch.stack([each[name].mask for each in snapshots]).any(0)[order]
        chosen = order[alive]
        parts = {
            "up": layer.up[:, alive],
            "down": layer.down[alive],
            "gain": layer.gain[chosen],
            "scores": torch.stack([each[name].scores[chosen] for each in snapshots]).clamp_min(
                torch.finfo(torch.float32).tiny  # a sigmoid may come to 0
            ),
            "values": torch.stack([each[name].values[chosen] for each in snapshots]),
            "alive": torch.stack([each[name].mask[chosen] for each in snapshots]),
            "bias": layer.bias,
            **{
                part: torch.stack([getattr(each[name], part) for each in snapshots])
                for part in BESIDES
                if getattr(snapshots[0][name], part) is not None
            },
            "mean": layer.mean,
            "mean_output": layer.mean_output,
        }
        kept: dict[str, Any] = {
            part: None if value is None else value.detach().to("cpu", copy=True)
            for part, value in parts.items()
        }
        found[name] = Components(layout_of(targets[name]), **kept)
    return ElasticSpectrum(ratios, budgets, pivoted, found)


def _with_a_dead_one(layer: Components, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The components and one of zeros that is not alive, so that ``fold`` makes factors."""
    up = torch.cat([layer.up, torch.zeros_like(layer.up[:, :1])], dim=1)
    down = torch.cat([layer.down, torch.zeros_like(layer.down[:1])])
    alive = torch.arange(len(down), device=scale.device) < len(layer.down)
    return up, down, torch.cat([scale, scale.new_zeros(1)]), alive


def _described(file: Path, text: str | None) -> dict[str, Any]:
    """The description in a file's header, checked."""
    try:
        data = json.loads(text or "")
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{file} is not a spectrum written by soco") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"{file} is not a spectrum written by soco")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{file} has version {data.get('version')!r}, this soco reads version {VERSION}"
        )
    ratios, budgets = data.get("ratios"), data.get("budgets")
    layouts, pivoted = data.get("layouts"), data.get("pivoted")
    if not (isinstance(ratios, list) and isinstance(budgets, list)):
        raise ValueError(f"{file} must list ratios and budgets, got {ratios!r}, {budgets!r}")
    if not ratios or len(ratios) != len(budgets):
        raise ValueError(f"{file} must give a budget for every ratio, got {ratios!r}, {budgets!r}")
    if not all(isinstance(r, float) and 0 < r < 1 for r in ratios) or ratios != sorted(ratios):
        raise ValueError(f"{file}: ratios must be between 0 and 1 and ascend, got {ratios!r}")
    if not all(type(b) is int and b > 0 for b in budgets) or budgets != sorted(budgets)[::-1]:
        raise ValueError(f"{file}: budgets must be positive and descend, got {budgets!r}")
    known = isinstance(layouts, dict) and all(
        each in ("linear", "conv1d") for each in layouts.values()
    )
    if not known or not layouts:
        raise ValueError(
            f"{file}: layouts must name layers as linear or conv1d, got {layouts!r:.80}"
        )
    if not isinstance(pivoted, bool):
        raise ValueError(f"{file}: pivoted must be true or false, got {pivoted!r}")
    return data


def _checked(
    file: Path, name: str, layout: str, parts: dict[str, Tensor], stations: int
) -> Components:
    """The components of one layer, all shapes and numbers as they must be."""
    for part in _SHAPES.keys() - _OPTIONAL:
        if part not in parts:
            raise ValueError(f"{file} lacks {name}.{part}")
    if ("mean" in parts) != ("mean_output" in parts):
        raise ValueError(f"{file}: {name} must have both of mean and mean_output, or none")
    if parts["up"].dim() != 2 or parts["down"].dim() != 2:
        raise ValueError(f"{file}: {name}.up and {name}.down must be matrices")
    sizes = {
        "out": len(parts["up"]), "rank": len(parts["down"]), "in": parts["down"].shape[1],
        "stations": stations,
    }  # fmt: skip
    if not 1 <= sizes["rank"] <= min(sizes["out"], sizes["in"]):
        raise ValueError(f"{file}: {name} has {sizes['rank']} components, which do not fit")
    for part, value in parts.items():
        wanted = tuple(sizes[size] for size in _SHAPES[part])
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"{file}: {name}.{part} must be {list(wanted)}, got {list(value.shape)}"
            )
        if part == "alive":
            if value.dtype != torch.bool or not bool(value.any(1).all()):
                raise ValueError(f"{file}: {name}.alive must say of each station what there is")
        elif not value.is_floating_point() or not all_finite(value):
            raise ValueError(f"{file}: {name}.{part} holds what is not a finite number")
    if bool((parts["scores"] <= 0).any()) or bool((parts["values"] < 0).any()):
        raise ValueError(f"{file}: {name} has scores that are not positive, or negative values")
    return Components(layout, **parts)
