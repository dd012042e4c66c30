"""What a compression did: numbers per layer and in total, as JSON, as a table, as a picture."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import groupby
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from soco.steps import Step

PICTURES = (".png", ".svg", ".pdf")  # what can be drawn

MOST_ROWS = 24  # of the picture; with more kinds of layers the experts are drawn as one


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
            ValueError: a field is missing, unknown, or of the wrong kind, or there are no layers;
                the place in the data is named.
        """
        made = _read(cls, data, "report")
        if not made.layers:
            raise ValueError("report.layers is empty")
        for i, layer in enumerate(made.layers):
            if min(layer.shape) < 1:
                raise ValueError(f"report.layers[{i}].shape holds no weight: {layer.shape}")
        _check_history(made.history)
        return made

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
        title = "scores" if any(layer.score_min is not None for layer in self.layers) else ""
        head = f"{'layer':<{width}}  {'out x in':>13}  {'rank':>6}  {'kept':>7}  {title}"
        lines = [head.rstrip()]
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
            ValueError: the file's name does not end in .png, .svg or .pdf.
            ImportError: matplotlib is missing (``pip install "soco-llm[plots]"``).
        """
        if Path(path).suffix.lower() not in PICTURES:
            raise ValueError(f"pictures are {', '.join(PICTURES)} files, got {str(path)!r}")
        rows, blocks = _grid(self.layers)
        width, height = 3 + min(6.0, max(2.5, 0.45 * len(blocks))), 1.5 + 0.35 * len(rows)
        widths = [width, 6.5] if self.history else [width]
        height = max(height, 4.5 if self.history else 2.2)
        figure = new_figure(sum(widths), height, layout="constrained")
        axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        _draw_kept(axes[0], self.layers)
        axes[0].set_title(f"{self.method}: {self.removed:.1%} of the parameters removed")
        if self.history:
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
        if size < (1000 if unit == "B" else 999.995):  # that would be printed as 1000.00
            return f"{size:.0f} B" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_percent(fraction: float) -> str:
    """A fraction for people.

    >>> format_percent(0.2), format_percent(0.995)
    ('20%', '99.5%')
    """
    return f"{100 * fraction:.4g}%"


def _read(cls: type, data: Any, path: str) -> Any:
    """The dataclass ``cls`` from the JSON data at a path, every field of the kind it declares."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} is of the wrong kind: {data!r:.60}")
    kinds = get_type_hints(cls)
    for name in data:
        if name not in kinds:
            raise ValueError(f"{path} has an unknown field {name!r}")
    for each in fields(cls):
        if each.name not in data and each.default is each.default_factory is MISSING:
            raise ValueError(f"{path} lacks the field {each.name!r}")
    return cls(**{name: _value(kinds[name], data[name], f"{path}.{name}") for name in data})


def _value(kind: Any, value: Any, path: str) -> Any:
    """JSON data as one of the kinds that the fields of a report declare."""
    inner = get_args(kind)
    if kind is LayerReport:
        return _read(LayerReport, value, path)
    if isinstance(kind, UnionType):  # something or None
        return None if value is None else _value(inner[0], value, path)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            values = zip(kinds, value, strict=True)
            return tuple(_value(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(values))
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        return {name: _value(inner[1], v, f"{path}.{name}") for name, v in value.items()}
    elif kind is float and type(value) is int:
        return float(value)
    elif kind is Any or type(value) is kind:
        return value
    raise ValueError(f"{path} is of the wrong kind: {value!r:.60}")


_HISTORY = {"stage": str, "loss": float, "divergence": float, "kept": float, "held_out": float}
_MAY_LACK = ("loss", "divergence", "held_out")  # None: not finite, or not measured in that step


def _check_history(history: Mapping[str, list]) -> None:
    """Refuse columns of a training that cannot be drawn; a closed form has none."""
    for name in ("stage", "divergence", "kept"):
        if history and name not in history:
            raise ValueError(f"report.history lacks the column {name!r}")
    for name, kind in _HISTORY.items():
        for i, value in enumerate(history.get(name, ())):
            if value is not None or name not in _MAY_LACK:
                _value(kind, value, f"report.history.{name}[{i}]")
    lengths = {name: len(column) for name, column in history.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"report.history has columns of different lengths: {lengths}")


Row = dict[str | None, float]  # block to kept fraction; None: one layer outside of the blocks


def _grid(layers: Sequence[LayerReport]) -> tuple[dict[str, Row], list[str]]:
    """Kept fractions by kind of layer and block, and the blocks in order."""
    places = []  # of each layer: its kind, its block
    for layer in layers:
        parts = layer.name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        block = None if at is None else ".".join(parts[: at + 1])
        places.append((layer.name if at is None else ".".join(parts[at + 1 :]), block))
    if len({kind for kind, _ in places}) > MOST_ROWS:
        places = [(re.sub(r"\b\d+\b", "*", kind), block) for kind, block in places]
    together: dict[str, dict[str | None, list[LayerReport]]] = {}
    for layer, (kind, block) in zip(layers, places, strict=True):
        together.setdefault(kind, {}).setdefault(block, []).append(layer)
    rows = {
        kind: {block: _kept(some) for block, some in row.items()} for kind, row in together.items()
    }
    return rows, [block for block in dict.fromkeys(block for _, block in places) if block]


def _kept(layers: Sequence[LayerReport]) -> float:
    """Kept parameters of some layers as a fraction of the dense ones."""
    dense = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return sum(layer.params for layer in layers) / dense


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
        where there is no such layer. A layer outside of the blocks has its fraction in all of them.
    """
    rows, blocks = _grid(layers)
    columns = max(1, len(blocks))
    grid = [
        [row[None]] * columns if None in row else [row.get(block, math.nan) for block in blocks]
        for row in rows.values()
    ]
    return list(rows), blocks, grid


def draw_grid(
    axes: Any, kinds: Sequence[str], blocks: Sequence[str], grid: Sequence[Sequence[float]]
) -> Any:
    """Draw what ``kept_grid`` gave as a heat map, and return its image, for a colour bar."""
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(kinds)), list(kinds))
    _name_blocks(axes, blocks)
    return image


def _draw_kept(axes: Any, layers: Sequence[LayerReport]) -> None:
    """Heat map of the kept fraction: a column per block, a row per kind of layer."""
    rows, blocks = _grid(layers)
    columns = max(1, len(blocks))
    image = draw_grid(axes, *kept_grid(layers))
    axes.figure.colorbar(image, ax=axes, label="kept parameters", format=lambda x, _: f"{x:.0%}")
    for y, row in enumerate(rows.values()):
        for block, kept in row.items():
            if block is not None and columns > 12:
                continue  # no room for a number
            axes.text(
                (columns - 1) / 2 if block is None else blocks.index(block),
                y,
                "dense" if kept == 1 else f"{kept:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if kept > 0.5 else "white",
            )


def _name_blocks(axes: Any, blocks: Sequence[str]) -> None:
    """Number the columns; where there are several lists of blocks, name and part them."""
    groups: dict[str, list[int]] = {}
    for column, block in enumerate(blocks):
        groups.setdefault(block.rpartition(".")[0], []).append(column)
    every = math.ceil(len(blocks) / 16)  # more numbers would run into each other
    labels = {c: blocks[c].rpartition(".")[2] for g in groups.values() for c in g[::every]}
    for group, columns in groups.items():
        if len(groups) > 1:
            middle = columns[(len(columns) - 1) // 2]
            labels[middle] = f"{labels.get(middle, '')}\n{group}"
            if columns[0] > 0:
                axes.axvline(columns[0] - 0.5, color="white", linewidth=4)
    axes.set_xticks(list(labels), list(labels.values()))
    if blocks:
        axes.set_xlabel("block")


def _held_out_divergences(history: Mapping[str, list]) -> dict[int, float]:
    """Step to the divergence on held-out text, where it was measured and is all of the loss."""
    names = ("held_out", "loss", "divergence")
    rows = zip(*(history.get(name, ()) for name in names), strict=False)
    return {
        step: held_out
        for step, (held_out, loss, divergence) in enumerate(rows, 1)
        if held_out is not None and loss == divergence
    }


def _draw_history(axes: Any, history: Mapping[str, list]) -> None:
    """Divergence (on a log axis if it varies much) and kept fraction by step, stages shaded."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    divergences = [math.nan if each is None else each for each in history["divergence"]]
    count = len(divergences)
    steps = list(range(1, count + 1))
    marker = "." if count < 50 else ""
    held_out = _held_out_divergences(history)
    positive = [each for each in [*divergences, *held_out.values()] if 0 < each < math.inf]
    decades = math.log10(max(positive) / min(positive)) if positive else 0.0
    if decades > 1:
        # A model that nothing was taken from yet has no divergence, or one of rounding below zero.
        divergences = [each if each > 0 else math.nan for each in divergences]
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 4 else (1,)))
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.plot(steps, divergences, color="#0072B2", marker=marker)
    if held_out:
        look = {"color": "black", "marker": "o", "markersize": 4, "linewidth": 1}
        axes.plot(list(held_out), list(held_out.values()), label="on held-out text", **look)
        axes.legend(loc="best")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, count + 0.5)
    axes.set_xlabel("step")
    axes.set_ylabel("divergence from the dense model", color="#0072B2")
    right = axes.twinx()
    right.plot(steps, history["kept"], color="#D55E00", linestyle="--", marker=marker)
    right.set_ylabel("kept parameters (dashed)", color="#D55E00")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    begin = 0
    # A stage that comes again, for the next size, is another stretch of steps.
    for number, (stage, run) in enumerate(groupby(history["stage"])):
        share = len(list(run))
        if number % 2:
            axes.axvspan(begin + 0.5, begin + share + 0.5, color="0.93", zorder=0)
        if share > 0.07 * count:  # else there is no room for its name
            axes.annotate(
                stage,
                (begin + share / 2 + 0.5, 1.02),
                xycoords=axes.get_xaxis_transform(),
                ha="center",
            )
        begin += share


def history_columns(history: list[Step]) -> dict[str, list]:
    """The history as plain JSON: what is not finite, or was not measured, is None."""
    if not history:
        return {}
    columns = {
        "stage": [step.stage for step in history],
        "loss": [_rounded(step.loss) for step in history],
        "divergence": [_rounded(step.divergence) for step in history],
        "kept": [round(step.kept, 4) for step in history],
    }
    if any(step.held_out is not None for step in history):
        columns["held_out"] = [_rounded(step.held_out) for step in history]
    return columns


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
