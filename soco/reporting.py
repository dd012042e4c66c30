"""What a compression did: numbers per layer and in total, as JSON, as a table, as a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """One target layer."""

    name: str
    shape: tuple[int, int]  # (out, in) of the weight
    rank: int | None  # of its factors; None: kept dense
    params: int  # kept, of the weight or the factors; biases not counted
    score_min: float | None = None  # smallest learned score of the components kept
    score_max: float | None = None  # and the largest

    @property
    def kept(self) -> float:
        """Kept parameters as a fraction of the dense ones."""
        return self.params / (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class Report:
    """One compression. Sizes count parameters unless the name says bytes; times are seconds."""

    method: str
    ratio: float  # fraction of the targets' parameters asked to be removed
    layers: tuple[LayerReport, ...]
    model_params_before: int  # the whole model, every parameter once
    model_params_after: int
    model_bytes_before: int  # of the parameters, as stored
    model_bytes_after: int
    seconds: dict[str, float] = field(default_factory=dict)  # phase to time
    peak_bytes: int = 0  # highest memory use seen
    peak_of: str = ""  # of what: "process" (resident memory since its start) or a CUDA device
    calibration: dict[str, Any] = field(default_factory=dict)  # source, sequences, length, seed
    settings: dict[str, Any] = field(default_factory=dict)  # every field of the method
    left_dense: tuple[str, ...] = ()  # expert weights that no method here factors yet
    warnings: tuple[str, ...] = ()
    history: dict[str, list] = field(default_factory=dict)  # of the training, one entry per step
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""  # UTC, ISO 8601

    @property
    def params_before(self) -> int:
        """Parameters of the target weights before."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers)

    @property
    def params_after(self) -> int:
        """Parameters of the target weights now: what ``ratio`` speaks of."""
        return sum(layer.params for layer in self.layers)

    @property
    def removed(self) -> float:
        """The fraction of the targets' parameters that was removed."""
        return 1 - self.params_after / self.params_before

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return json.loads(json.dumps(asdict(self)))

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Read what ``to_dict`` gave.

        Raises:
            ValueError: a field is missing, unknown, or of the wrong kind; it is named.
        """
        known = {f.name for f in fields(cls)}
        for name in data:
            if name not in known:
                raise ValueError(f"the report has an unknown field {name!r}")
        try:
            layers = tuple(
                LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in data["layers"]
            )
            tuples = {n: tuple(data[n]) for n in ("left_dense", "warnings") if n in data}
            return cls(**{**data, **tuples, "layers": layers})
        except (TypeError, KeyError) as error:
            raise ValueError(f"the report is damaged: {error}") from error

    def summary(self) -> str:
        """A few lines: sizes before and after, ranks, time and memory."""
        factored = [layer for layer in self.layers if layer.rank is not None]
        dense = len(self.layers) - len(factored)
        rows = [
            f"method             {self.method}",
            f"target layers      {len(self.layers)} ({len(factored)} factored, {dense} kept dense)",
            f"their parameters   {self.params_before:,} -> {self.params_after:,} "
            f"({self.removed:.2%} removed, {self.ratio:.2%} asked for)",
            f"whole model        {self.model_params_before:,} -> {self.model_params_after:,} "
            f"parameters, {format_bytes(self.model_bytes_before)} -> "
            f"{format_bytes(self.model_bytes_after)}",
            "time               "
            + ", ".join(f"{phase} {value:.1f} s" for phase, value in self.seconds.items()),
            f"peak memory        {format_bytes(self.peak_bytes)} ({self.peak_of})",
        ]
        if self.left_dense:
            rows.append(f"left dense         {len(self.left_dense)} fused expert weights")
        return "\n".join(rows + [f"warning            {text}" for text in self.warnings])

    def table(self) -> str:
        """One line per layer."""
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  {'out x in':>13}  {'rank':>6}  {'kept':>7}  scores"]
        for layer in self.layers:
            rank = "dense" if layer.rank is None else str(layer.rank)
            scores = ""
            if layer.score_min is not None and layer.score_max is not None:
                scores = f"{layer.score_min:.2f} .. {layer.score_max:.2f}"
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            line = f"{layer.name:<{width}}  {shape:>13}  {rank:>6}  {layer.kept:>7.1%}  {scores}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def __str__(self) -> str:
        """Summary and table."""
        return f"{self.summary()}\n\n{self.table()}"

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw kept parameters per layer, and how the training went, into an image file.

        Raises:
            ImportError: matplotlib is missing (``pip install "soco-llm[plots]"``).
        """
        trained = bool(self.history)
        figure = new_figure(12 if trained else 7, 4.5, layout="constrained")
        axes = figure.subplots(1, 2 if trained else 1, squeeze=False)[0]
        _draw_kept(axes[0], self.layers)
        axes[0].set_title(f"{self.method}: {self.removed:.1%} of the parameters removed")
        if trained:
            _draw_history(axes[1], self.history)
        figure.savefig(path, dpi=130)


def report(model: nn.Module) -> Report:
    """The report of a model that soco compressed, in this program or before it was saved.

    Raises:
        ValueError: the model is not compressed, or was marked without a report.
    """
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    data = getattr(config, "report", None)
    if data is None:
        raise ValueError(f"this {type(model).__name__} has no report: soco did not compress it")
    return Report.from_dict(data)


def format_bytes(count: int) -> str:
    """Bytes for people, in powers of 1000.

    >>> format_bytes(999), format_bytes(2_005_296)
    ('999 B', '2.01 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_percent(fraction: float) -> str:
    """A fraction for people.

    >>> format_percent(0.2), format_percent(0.995)
    ('20%', '99.5%')
    """
    return f"{100 * fraction:.4g}%"


def new_figure(width: float, height: float, **options: Any) -> Any:
    """An empty figure of matplotlib, in inches; it belongs to no window.

    Raises:
        ImportError: matplotlib is missing (``pip install "soco-llm[plots]"``).
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError('plots need matplotlib: pip install "soco-llm[plots]"') from error
    return Figure(figsize=(width, height), **options)


def kept_grid(layers: Sequence[LayerReport]) -> tuple[list[str], list[str], list[list[float]]]:
    """Kept fractions by place.

    Returns:
        Kinds of layers; blocks; and a row for each kind of the kept fractions in each block, NaN
        where there is no such layer.
    """
    kinds: dict[str, dict[str, float]] = {}
    blocks: dict[str, None] = {}
    for layer in layers:
        parts = layer.name.split(".")
        place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = "-" if place is None else ".".join(parts[: place + 1])
        kind = layer.name if place is None else ".".join(parts[place + 1 :])
        kinds.setdefault(kind, {})[block] = layer.kept
        blocks[block] = None
    grid = [[row.get(block, float("nan")) for block in blocks] for row in kinds.values()]
    return list(kinds), list(blocks), grid


def draw_grid(
    axes: Any, kinds: Sequence[str], blocks: Sequence[str], grid: Sequence[Sequence[float]]
) -> Any:
    """Draw what ``kept_grid`` gave as a heat map, and return its image, for a colour bar."""
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    labels = [block.rpartition(".")[2] for block in blocks]
    axes.set_xticks(range(len(labels)), labels)
    if len(labels) > 20:
        axes.set_xticks(range(0, len(labels), 4), labels[::4])
    axes.set_xlabel("block")
    return image


def _draw_kept(axes: Any, layers: Sequence[LayerReport]) -> None:
    """Heat map of the kept fraction: a column per block, a row per kind of layer."""
    kinds, blocks, grid = kept_grid(layers)
    image = draw_grid(axes, kinds, blocks, grid)
    if len(blocks) <= 12:
        for y, row in enumerate(grid):
            for x, kept in enumerate(row):
                if kept == kept:
                    text = "dense" if kept == 1 else f"{kept:.0%}"
                    axes.text(
                        x, y, text, ha="center", va="center", fontsize=8,
                        color="black" if kept > 0.55 else "white",
                    )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, label="kept parameters")


def _draw_history(axes: Any, history: Mapping[str, list]) -> None:
    """The divergence of each step on a log axis, the kept fraction beside it, stages shaded."""
    steps = list(range(1, len(history["divergence"]) + 1))
    axes.semilogy(steps, history["divergence"], color="#0072B2", label="divergence")
    axes.set_xlabel("step")
    axes.set_ylabel("divergence from the dense model", color="#0072B2")
    right = axes.twinx()
    right.plot(steps, history["kept"], color="#D55E00", label="kept parameters")
    right.set_ylabel("kept parameters", color="#D55E00")
    right.set_ylim(0, 1.02)
    begin = 0
    for number, stage in enumerate(dict.fromkeys(history["stage"])):
        count = history["stage"].count(stage)
        if number % 2:
            axes.axvspan(begin + 0.5, begin + count + 0.5, color="0.93", zorder=0)
        axes.text(
            begin + count / 2 + 0.5, 1.02, stage, ha="center", transform=axes.get_xaxis_transform()
        )
        begin += count
