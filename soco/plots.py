"""Pictures of a comparison: what is lost at what size, the ranks of all layers, the spectra."""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import isotonic_regression

from soco.methods import METHODS
from soco.record import Comparison, Row
from soco.reporting import draw_grid, format_percent, kept_grid, new_figure

QUALITY, SPECTRA = "quality.png", "spectra.png"

# Paul Tol's muted colours, which everybody can tell apart. With a marker each, methods repeat none
# of the pairs: 9 and 10 have no divisor in common.
_MUTED = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255",
    "#AA4499",
)  # fmt: skip
_MARKERS = ("o", "s", "^", "v", "D", "P", "X", "<", ">", "p")
_LINES = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
_LEARNED, _BEST, _DENSE = "#D55E00", "#000000", "#555555"
_DPI = 130

_TITLES = {  # measurement to the title of its panel
    "perplexity": "perplexity",
    "kl": "KL to the dense model (nats per token)",
    "distance": "distance from the dense model (of the variance of its states)",
}
_HIGHEST = 1e4  # times the best value of the hardest size: what is above is drawn at the edge


class Look(NamedTuple):
    """How an entry looks in every picture of a comparison."""

    color: str
    marker: str
    line: Any  # style, as matplotlib has it
    strong: bool  # whether it stands out


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw all pictures there are something to draw for, and return their paths.

    Raises:
        ImportError: matplotlib is missing (``pip install "soco-llm[plots]"``).
    """
    made = [row for row in comparison.rows if "error" not in row]
    if not made:
        return []
    draw_quality(comparison, folder / QUALITY)
    paths = [folder / QUALITY]
    for ratio in sorted({row["ratio"] for row in made}):
        paths.append(folder / f"ranks-{ratio:g}.png")
        draw_ranks(comparison, ratio, paths[-1])
    if comparison.spectra:
        draw_spectra(comparison, folder / SPECTRA)
        paths.append(folder / SPECTRA)
    return paths


def looks(comparison: Comparison) -> dict[str, Look]:
    """Entry to its look: the same for a method wherever it is, variants by their lines.

    Only where two methods of one colour meet the later one takes another that is free. soco and
    the entry that is the best at most ratios stand out.
    """
    entries = list(dict.fromkeys(row["method"] for row in comparison.rows))
    best = Counter(row["method"] for ratio in comparison.ratios if (row := comparison.best(ratio)))
    winner = best.most_common(1)[0][0] if best else None
    known = list(METHODS)
    colors = _colors({_method(entry) for entry in entries})
    variants: Counter[str] = Counter()
    found = {}
    for entry in entries:
        method = _method(entry)
        if method not in known:
            known.append(method)
        place = known.index(method)
        turn = 0 if method == "soco" else place // len(_MUTED)
        line = _LINES[(turn + variants[method]) % len(_LINES)]
        marker = _MARKERS[(place + variants[method]) % len(_MARKERS)]
        variants[method] += 1
        color = colors.get(method, _MUTED[place % len(_MUTED)])
        if method == "soco":
            color = _LEARNED
        elif entry == winner:
            color = _BEST
        found[entry] = Look(color, marker, line, method == "soco" or entry == winner)
    return found


def _method(entry: str) -> str:
    """The method that an entry such as "soco:best" or "svd-llm@energy+refine" names."""
    return re.split("[:@+]", entry, maxsplit=1)[0]


def _colors(methods: Collection[str]) -> dict[str, str]:
    """Method to colour: its own, or the first that is free, or a shade, where it is taken."""
    found: dict[str, str] = {}
    for place, method in enumerate(METHODS):
        if method in methods and method != "soco":
            own = _MUTED[place % len(_MUTED)]
            shades = (own, *_MUTED, _shade(own), *map(_shade, _MUTED))
            found[method] = next((c for c in shades if c not in found.values()), own)
    return found


def _shade(color: str) -> str:
    """A dark colour made lighter, a light one darker."""
    parts, light = _light(color)
    return _hex([p + (255 - p) * 0.5 if light < 110 else p * 0.55 for p in parts])


def spread(places: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Move places as little as possible, so that they are ``gap`` apart and within bounds.

    Theorem: among all such moves that keep the order, this has the least sum of squares. Where
    there is no room for the gap, they are as far apart as they can be.

    >>> spread([0.5, 0.5], 0.25)
    [0.375, 0.625]
    """
    if not places:
        return []
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    steps = gap * np.arange(len(places))
    flat = isotonic_regression(np.array([places[i] for i in order]) - steps).x
    moved = np.clip(flat, low, high - steps[-1]) + steps
    found = [0.0] * len(places)
    for i, value in zip(order, moved.tolist(), strict=True):
        found[i] = value
    return found


def draw_quality(comparison: Comparison, path: Path) -> None:
    """Perplexity and KL against kept parameters, a line for every entry, labelled at its end.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = [row for row in comparison.rows if "error" not in row]
    panels = [key for key in _TITLES if any(row[key] is not None for row in rows)]
    entries = list(dict.fromkeys(row["method"] for row in rows))
    longest = max(map(len, entries))
    wide = 4.2 if len({row["ratio"] for row in rows}) > 1 else 2.2  # inches, as all of these
    labels, left, bottom, top = 0.35 + 0.075 * longest, 0.75, 0.75, 0.75
    high = max(3.6, 0.165 * (len(entries) + 1))
    width = len(panels) * (left + wide + labels) + 0.1
    height = bottom + high + top
    figure = new_figure(width, height)
    styles = looks(comparison)
    for i, key in enumerate(panels):
        x = left + i * (left + wide + labels)
        axes = figure.add_axes((x / width, bottom / height, wide / width, high / height))
        _draw_lines(axes, comparison, key, rows, styles, gap=0.155 / high)
        axes.set_title(_TITLES[key], fontsize=10, loc="left")
    first, about = next(iter(comparison.setup["texts"].items()))
    tokens = about["tokens"]
    figure.text(
        left / width,
        1 - 0.25 / height,
        f"{comparison.setup['model']} on {first} ({tokens:,} tokens); lower is better",
        fontsize=11,
        fontweight="bold",
        va="center",
    )
    figure.savefig(path, dpi=_DPI)


def _draw_lines(
    axes: Any,
    comparison: Comparison,
    key: str,
    rows: Sequence[Row],
    styles: dict[str, Look],
    gap: float,
) -> None:
    """One panel: a log axis, lines, and their labels at the right."""
    values = [row[key] for row in rows if row[key] is not None and row[key] > 0]
    dense = comparison.dense.get(key)
    if dense:
        values.append(dense)
    lowest = min(values, default=1.0)
    best = [
        min((r[key] for r in rows if r["ratio"] == ratio and r[key]), default=lowest)
        for ratio in {row["ratio"] for row in rows}
    ]
    highest = min(max(values, default=1.0), max(best, default=lowest) * _HIGHEST)
    margin = (highest / lowest) ** 0.06 if highest > lowest else 1.5
    low, high = lowest / margin, highest * margin
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    least = min(row["kept_params"] / row["target_params"] for row in rows)
    ends, early = [], []  # name, x and y of the last point, style
    apart = gap * math.log(high / low)
    for entry, look in styles.items():
        mine = [row for row in rows if row["method"] == entry and row[key] is not None]
        if not mine:
            continue
        mine.sort(key=lambda row: -row["kept_params"])
        xs = [row["kept_params"] / row["target_params"] for row in mine]
        ys = [min(max(row[key], low), highest) for row in mine]
        axes.plot(
            xs, ys, color=look.color, marker=look.marker, linestyle=look.line,
            linewidth=2.4 if look.strong else 1.2, markersize=6 if look.strong else 4.5,
            zorder=4 if look.strong else 3,
        )  # fmt: skip
        over = mine[-1][key] > highest
        name = f"{entry} ↑{mine[-1][key]:.0e}" if over else entry
        (early if xs[-1] > least + 0.02 else ends).append((name, xs[-1], ys[-1], look))
    for name, x, y, look in early:
        near = [e for e in early if abs(e[1] - x) < 0.1 and abs(math.log(e[2] / y)) < apart]
        if len(near) > 1:  # their names would cover each other
            ends.append((name, x, y, look))
            continue
        # A line from here to a name at the edge would look like data.
        axes.annotate(
            name, xy=(x, y), xytext=(0, 4), textcoords="offset points",
            color=_ink(look.color), fontsize=8, ha="center", va="bottom",
        )  # fmt: skip
    _kept_axis(axes, comparison, rows)
    if dense:
        axes.axhline(dense, color=_DENSE, linewidth=1.2, linestyle=(0, (2, 2)), zorder=2)
        end = axes.get_xlim()[1]
        ends.append((f"dense {_number(dense)}", end, dense, Look(_DENSE, "", "-", False)))
    fractions = [math.log(y / low) / math.log(high / low) for _, _, y, _ in ends]
    for (name, x, y, look), place in zip(ends, spread(fractions, gap), strict=True):
        axes.annotate(
            name, xy=(x, y), xycoords="data", xytext=(1.045, place), textcoords="axes fraction",
            color=_ink(look.color), fontsize=8, fontweight="bold" if look.strong else "normal",
            va="center", annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": look.color, "linewidth": 0.6, "alpha": 0.6,
                "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5),
            },
        )  # fmt: skip
    _log_ticks(axes, high / low)
    axes.grid(True, which="major", color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _kept_axis(axes: Any, comparison: Comparison, rows: Sequence[Row]) -> None:
    """Kept parameters from many to few, with a tick at what each ratio allows."""
    total = rows[0]["target_params"]
    ratios = sorted({row["ratio"] for row in rows})
    kept = [row["kept_params"] / row["target_params"] for row in rows]
    most, least = max([*kept, 1 - ratios[0]]), min([*kept, 1 - ratios[-1]])
    margin = max(0.02, 0.05 * (most - least))
    axes.set_xlim(most + margin, least - margin)
    places, nearest = [], 0.07 * (most - least + 2 * margin)
    for ratio in ratios:
        if not places or places[-1] - (1 - ratio) >= nearest:
            places.append(1 - ratio)
    axes.set_xticks(
        places, [f"{format_percent(p)}\n{_count(p * total)}" for p in places], fontsize=8
    )
    axes.set_xlabel("parameters kept in the compressed layers", fontsize=9)


def draw_ranks(comparison: Comparison, ratio: float, path: Path) -> None:
    """What every entry keeps of every layer, at one ratio: a heat map each, the best first.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = [row for row in comparison.at(ratio) if "error" not in row]
    grids = [kept_grid(comparison.layers(row)) for row in rows]
    kinds, blocks, _ = grids[0]
    wide = min(4.0, max(2.1, 0.08 * len(blocks)))  # inches of a panel
    high = max(0.9, 0.15 * len(kinds))
    names = 0.2 + 0.075 * max(map(len, kinds))
    columns = max(1, min(len(rows), int((13 - names) / (wide + 0.1))))
    columns = math.ceil(len(rows) / math.ceil(len(rows) / columns))
    lines = math.ceil(len(rows) / columns)
    width = max(6.5, names + columns * (wide + 0.1) + 0.9)  # its title needs room, too
    figure = new_figure(width, lines * (high + 0.3) + 1.05, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image = None
    from matplotlib.ticker import FuncFormatter

    for axes, row, (_, _, grid) in zip(panels.flat, rows, grids, strict=False):
        image = draw_grid(axes, kinds, blocks, grid)
        dense = [(x, y) for y, line in enumerate(grid) for x, kept in enumerate(line) if kept == 1]
        size = min(12.0, (25 * wide / len(blocks)) ** 2)  # a third of a cell, in square points
        if dense:
            axes.scatter(*zip(*dense, strict=True), s=size, color="black", linewidths=0)
        axes.set_title(_with_loss(comparison, row), fontsize=8.5, loc="left")
        axes.tick_params(labelsize=7, length=2)
        axes.set_xlabel("")
    for axes in list(panels.flat)[len(rows) :]:
        axes.set_visible(False)
    for column in range(columns):  # the lowest panel there is in each column
        lowest = panels[(len(rows) - 1 - column) // columns][column]
        lowest.set_xlabel("block", fontsize=8)
        lowest.tick_params(labelbottom=True)
    bar = figure.colorbar(image, ax=panels.ravel().tolist(), aspect=30, pad=0.015)
    bar.set_label("kept parameters", fontsize=8)
    bar.formatter = FuncFormatter(lambda value, _: format_percent(value))
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(
        f"{comparison.setup['model']}, {format_percent(ratio)} of the parameters removed "
        f"(dot: kept dense)",
        fontsize=11, fontweight="bold", ha="left", x=0.01,
    )  # fmt: skip
    figure.savefig(path, dpi=_DPI)


def draw_spectra(comparison: Comparison, path: Path) -> None:
    """Singular values of a layer of every kind, and below the rank that each entry keeps of it.

    Raises:
        ImportError: matplotlib is missing.
    """
    rows = [row for row in comparison.at(comparison.middle or 0) if "error" not in row]
    styles = looks(comparison)
    names = list(comparison.spectra)
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    strip = 0.15 * len(rows) + 0.1
    figure = new_figure(
        max(8.5, 0.4 + 0.075 * max(len(row["method"]) for row in rows) + 2.8 * columns),
        0.9 + lines * (1.5 + strip + 0.55),
        layout="constrained",
    )
    grid = figure.subplots(
        2 * lines, columns, squeeze=False, gridspec_kw={"height_ratios": [1.5, strip] * lines}
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for i, name in enumerate(names):
        line, column = divmod(i, columns)
        upper, lower = grid[2 * line][column], grid[2 * line + 1][column]
        _draw_spectrum(upper, comparison, name)
        _draw_marks(lower, comparison, name, rows, styles)
        if column:
            lower.set_yticklabels([])
        else:
            upper.set_ylabel("σ / largest σ", fontsize=8)
            lower.set_xlabel("rank", fontsize=8)
    handles, titles = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    ratio = comparison.middle or 0
    joint = " " if columns > 3 else "\n"
    figure.suptitle(
        f"{comparison.setup['model']}: singular values, and the rank that is kept where{joint}"
        f"{format_percent(ratio)} of the parameters are removed (hollow: kept dense)",
        fontsize=11, fontweight="bold", ha="left", x=0.01,
    )  # fmt: skip
    figure.savefig(path, dpi=_DPI)


def _draw_spectrum(axes: Any, comparison: Comparison, name: str) -> None:
    """The singular values of one layer, relative to the largest."""
    axes.set_visible(True)
    found = comparison.spectra[name]
    rows, columns = comparison.shapes[name]
    lowest = 1.0
    for title, color, style, label in (
        ("whitened", "#0072B2", "-", "whitened: of the weight as its inputs see it"),
        ("plain", "#E69F00", "--", "plain: of the weight alone"),
    ):
        sigma = found.get(title)
        if sigma and sigma[0] > 0:
            relative = [value / sigma[0] for value in sigma]
            lowest = min([lowest, *(value for value in relative if value > 1e-5)])
            axes.semilogy(found["at"], relative, color=color, linestyle=style, label=label)
    axes.axvline(
        rows * columns / (rows + columns), color="0.6", linewidth=1, linestyle=":",
        label="from here on factors are larger than the weight",
    )  # fmt: skip
    axes.set_ylim(lowest / 1.5, 1.6)
    axes.set_xlim(0, 1.04 * min(rows, columns))
    axes.tick_params(labelsize=7, labelbottom=False)
    axes.grid(True, which="major", color="0.92")
    axes.set_title(f"{_short(name)}, {rows} × {columns}", fontsize=8.5, loc="left")


def _draw_marks(
    axes: Any, comparison: Comparison, name: str, rows: Sequence[Row], styles: dict[str, Look]
) -> None:
    """A line for each entry, with its rank marked."""
    axes.set_visible(True)
    least = min(comparison.shapes[name])
    for place, row in enumerate(rows):
        look, rank = styles[row["method"]], row["ranks"][name]
        axes.plot(
            [least if rank is None else rank], [place], marker=look.marker, color=look.color,
            markersize=6 if look.strong else 5, fillstyle="none" if rank is None else "full",
        )  # fmt: skip
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.04 * least)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7.5)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        look = styles[row["method"]]
        label.set_color(_ink(look.color))
        label.set_fontweight("bold" if look.strong else "normal")
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, color="0.92")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _log_ticks(axes: Any, span: float) -> None:
    """Ticks that say plain numbers: some of each decade, one where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    subs = (1.0,)
    if span < 3e3:
        subs = (1.0, 2.0, 5.0) if span > 20 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)


def _with_loss(comparison: Comparison, row: Row) -> str:
    loss = comparison.loss(row)
    what = "KL" if comparison.yardstick == "kl" else "distance"
    return row["method"] if loss is None else f"{row['method']} ({what} {loss:.3g})"


def _short(name: str) -> str:
    """The layer's kind and block.

    >>> _short("model.layers.3.self_attn.q_proj")
    'self_attn.q_proj of block 3'
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if place is None else f"{'.'.join(parts[place + 1 :])} of block {parts[place]}"


def _ink(color: str) -> str:
    """The color, or a darker one where text in it would be hard to read on white."""
    parts, light = _light(color)
    part = min(1.0, 125 / light) if light else 1.0
    return _hex([p * part for p in parts])


def _light(color: str) -> tuple[list[int], float]:
    """Red, green and blue of a colour, and how light it is, each from 0 to 255."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return parts, sum(w * p for w, p in zip((0.3, 0.59, 0.11), parts, strict=True))


def _hex(parts: Sequence[float]) -> str:
    return "#" + "".join(f"{int(p):02X}" for p in parts)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _count(params: float) -> str:
    """Parameters for people.

    >>> _count(512), _count(182_000), _count(6.5e9)
    ('512', '182k', '6.5B')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if params >= size:
            return f"{params / size:.3g}{unit}"
    return f"{params:.0f}"
