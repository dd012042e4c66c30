"""The report of a comparison: Markdown with its tables, beside it the pictures."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from soco import plots
from soco.evaluation import small
from soco.record import Comparison, Row, exceeds
from soco.reporting import format_bytes, format_percent

REPORT = "report.md"
NONE = "-"  # in a table: not measured, or the model has no such thing


def render(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``report.md`` and the pictures from a record alone; nothing is run.

    Args:
        comparison: as ``soco.compare`` gave it, or ``Comparison.read``.
        folder: to write into; files of the same names are replaced.

    Returns:
        What was written, the report first.

    Warns:
        UserWarning: matplotlib is missing, so that there are no pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[Path] = []
    try:
        pictures = plots.draw(comparison, folder)
    except ImportError as error:
        warnings.warn(f"the report has no pictures: {error}", stacklevel=2)
    report = folder / REPORT
    report.write_text(markdown(comparison, [path.name for path in pictures]), encoding="utf-8")
    return [report, *pictures]


def markdown(comparison: Comparison, pictures: Sequence[str] = ()) -> str:
    """The report as Markdown.

    Args:
        comparison: what was measured.
        pictures: names of the files of ``plots.draw``, to be shown.
    """
    parts = [f"# {comparison.setup['model']}: methods of compression compared"]
    parts.append(about(comparison))
    parts += [_picture(name) for name in pictures if name == plots.QUALITY]
    for ratio in comparison.ratios:
        parts += [
            f"## {format_percent(ratio)} of the parameters removed",
            ratio_table(comparison, ratio),
        ]
        parts += [_picture(name) for name in pictures if name == f"ranks-{ratio:g}.png"]
    _, *others = comparison.setup["texts"]
    for title in others:
        parts += [f"## On another text: {title}", across(comparison, title)]
    if plots.SPECTRA in pictures:
        parts += ["## Spectra", _picture(plots.SPECTRA)]
    parts += ["## Notes", "\n".join(f"- {note}" for note in notes(comparison))]
    return "\n\n".join(parts) + "\n"


def about(comparison: Comparison) -> str:
    """What was compared, on what, and where: a list in Markdown."""
    setup, machine, dense = comparison.setup, comparison.machine, comparison.dense
    texts = [
        f"{title} ({_tokens(each['windows'], each['tokens'])})"
        for title, each in setup["texts"].items()
    ]
    rows = [
        f"model: {setup['model']}, {setup['class']} in {setup['dtype']}, {dense['params']:,} "
        f"parameters, of which {dense['target_params']:,} are in the {setup['layers']} layers that "
        f"are compressed",
        f"measured on: {texts[0]}" + (f"; also {', '.join(texts[1:])}" if texts[1:] else ""),
    ]
    found = setup["calibration"]
    if found:
        tokens = _tokens(found["sequences"], found["sequences"] * found["length"])
        rows.append(f"calibration: {found['source']} ({tokens}), seed {found['seed']}")
    statistics = setup.get("statistics")
    if statistics:
        rows.append(
            f"statistics: {', '.join(statistics['kinds'])}, in one pass for all methods, "
            f"{statistics['seconds']:.1f} s, which no row counts"
        )
    rows.append(f"machine: {_machine(machine)}")
    rows.append(f"date: {comparison.date}")
    if comparison.command:
        rows.append(f"command: `{comparison.command}`")
    return "\n".join(f"- {row}" for row in rows)


def columns(comparison: Comparison) -> list[tuple[str, Callable[[Row], str]]]:
    """Title and cell of each column of ``ratio_table`` that this comparison has something for."""
    every = (
        ("perplexity", "perplexity", number),
        ("KL", "kl", small),
        ("top-1", "top1", lambda value: f"{value:.1%}"),
        ("distance", "distance", lambda value: f"{value:.4g}"),
        ("kept parameters", "kept_params", lambda value: f"{value:,}"),
        ("removed", "removed", lambda value: f"{value:.2%}"),
        ("bytes", "bytes", format_bytes),
        ("seconds", "seconds", lambda value: f"{value:.1f}"),
        ("peak memory", "peak_bytes", format_bytes),
    )
    made = [comparison.dense, *(row for row in comparison.rows if "error" not in row)]

    def cell(key: str, form: Callable[[Any], str]) -> Callable[[Row], str]:
        return lambda row: NONE if row.get(key) is None else form(row[key])

    return [
        (title, cell(key, form))
        for title, key, form in every
        if any(row.get(key) is not None for row in made)
    ]


def ratio_table(comparison: Comparison, ratio: float) -> str:
    """All measurements at one ratio as a table in Markdown, the best first."""
    chosen = columns(comparison)
    best = comparison.best(ratio)
    lines = [
        "| method | " + " | ".join(title for title, _ in chosen) + " |",
        "|---" + "|--:" * len(chosen) + "|",
    ]
    dense = {**comparison.dense, "method": "dense"}
    for row in [dense, *comparison.at(ratio)]:
        cells = [row["method"], *(cell(row) for _, cell in chosen)]
        if "error" in row:
            cells = [row["method"], _escaped(f"failed: {row['error']}"), *[""] * (len(chosen) - 1)]
        elif row is best:
            cells = [f"**{cell}**" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def across(comparison: Comparison, title: str | None = None) -> str:
    """Perplexity / KL on one text at all ratios as a table in Markdown.

    Args:
        comparison: what was measured.
        title: of the text; None is the main one.
    """
    yardstick = comparison.yardstick
    ratios = comparison.ratios
    entries = list(dict.fromkeys(row["method"] for row in comparison.rows))
    cells: dict[tuple[str, float], Row] = {}
    for row in comparison.rows:
        if "error" not in row:
            measured = row if title is None else row["texts"][title]
            cells[row["method"], row["ratio"]] = {**measured, "over": exceeds(row)}
    dense = comparison.dense if title is None else comparison.dense["texts"][title]
    has_perplexity = dense.get("perplexity") is not None
    best = {}
    for ratio in ratios:
        allowed = [
            (cell[yardstick], entry)
            for (entry, at), cell in cells.items()
            if at == ratio and cell[yardstick] is not None and not cell["over"]
        ]
        best[ratio] = min(allowed)[1] if allowed else None
    middle = comparison.middle

    def order(entry: str) -> float:
        value = cells.get((entry, middle or 0), {}).get(yardstick)
        return math.inf if value is None else value

    def text(entry: str, ratio: float) -> str:
        cell = cells.get((entry, ratio))
        if cell is None or cell[yardstick] is None:
            return NONE
        loss = small(cell[yardstick])
        shown = f"{number(cell['perplexity'])} / {loss}" if has_perplexity else loss
        if cell["over"]:
            shown += " (too large)"
        return f"**{shown}**" if entry == best[ratio] else shown

    what = "KL" if yardstick == "kl" else "distance"
    head = [f"{format_percent(ratio)} removed" for ratio in ratios]
    first = f"perplexity / {what}" if has_perplexity else what
    lines = [f"| {first} | " + " | ".join(head) + " |", "|---" + "|--:" * len(head) + "|"]
    if has_perplexity:
        lines.append("| dense | " + " | ".join([number(dense["perplexity"])] * len(head)) + " |")
    for entry in sorted(entries, key=order):
        lines.append(f"| {entry} | " + " | ".join(text(entry, ratio) for ratio in ratios) + " |")
    return "\n".join(lines)


def notes(comparison: Comparison) -> list[str]:
    """What to know about the numbers: one sentence or two each."""
    made = [row for row in comparison.rows if "error" not in row]
    found = [
        "Perplexity is that of the text; KL is the mean divergence from the dense model in nats "
        "per token; top-1 is how often the likeliest token is that of the dense model."
        if comparison.yardstick == "kl"
        else "Distance is the squared distance of the last hidden states from those of the dense "
        "model, over their variance.",
        f"Rows are sorted by {'KL' if comparison.yardstick == 'kl' else 'distance'}; the best of a "
        f"size is in bold.",
        "Kept parameters and removed are of the compressed layers; bytes are of all parameters of "
        "the model.",
        "Seconds are those of one method alone, from statistics to the compressed model: what "
        "several rows share counts for each of them.",
    ]
    if any(row["peak_of"] == "process" for row in made):
        found.append(
            "Peak memory is that of the whole process while a row was made, with the dense model "
            "and all that rows share; since its start where the system does not tell more."
        )
    for row in made:
        if exceeds(row):
            found.append(
                f"{_name(row)} keeps {row['kept_params']:,} parameters, more than its ratio "
                f"allows ({row['removed']:.2%} removed): it is never marked as the best."
            )
    for row in comparison.rows:
        if "error" in row:
            found.append(f"{_name(row)} failed: {row['error']}.")
    others = {_machine(row["machine"]): None for row in comparison.rows if "machine" in row}
    for machine in others:
        named = [_name(r) for r in comparison.rows if _machine(r.get("machine", {})) == machine]
        found.append(f"Made on another machine ({machine}): {', '.join(named)}.")
    found += [f"Warning: {text}." for text in comparison.warnings]
    by_text: dict[str, list[Row]] = {}
    for row in made:
        for text in dict.fromkeys(row["warnings"]):
            by_text.setdefault(text, []).append(row)
    for text, rows in by_text.items():
        named = dict.fromkeys(row["method"] for row in rows)
        found.append(f"Warning of {', '.join(named)}: {text}.")
    return found


def number(value: float) -> str:
    """A perplexity for people.

    >>> number(2.10689), number(52.39), number(20061.3), number(3.2e9)
    ('2.107', '52.39', '20061', '3.2e+09')
    """
    if value >= 1e6:
        return f"{value:.2g}"
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def _name(row: Row) -> str:
    return f"{row['method']} at {format_percent(row['ratio'])}"


def _picture(name: str) -> str:
    what = name.removesuffix(".png").replace("-", " at ")
    return f"![{what}]({name})"


def _tokens(windows: int, tokens: int) -> str:
    return f"{windows:,} windows, {tokens:,} tokens"


def _machine(machine: dict[str, Any]) -> str:
    first = [str(machine[key]) for key in ("gpu", "cpu") if key in machine]
    rest = [f"{key} {value}" for key, value in machine.items() if key not in ("gpu", "cpu")]
    return ", ".join([*first, *rest])


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
