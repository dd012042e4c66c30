"""What ``soco compare`` does once its options are read: check, load, run all rows, tell."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from soco.choices import choose
from soco.cli import demo
from soco.cli.messages import console, quiet_libraries, say, shows_bars
from soco.cli.sources import (
    DEMO,
    check_output,
    check_writable,
    find_device,
    find_model,
    find_text,
    open_dense,
    open_tokenizer,
)
from soco.comparison import DEFAULT_METHODS, Entry
from soco.comparison import compare as compare_methods
from soco.record import RECORD, Comparison, Row
from soco.rendering import columns, render
from soco.reporting import format_bytes, format_percent

# Of the report's columns, those that a terminal has room for.
_SHOWN = ("perplexity", "KL", "top-1", "distance", "kept parameters", "seconds")


@dataclass(frozen=True)
class Wanted:
    """What ``soco compare`` was asked for; None stands for an option that was not given."""

    model: str
    output: Path
    methods: str | None
    ratios: str
    calibration: str | None
    texts: list[str]
    samples: int | None
    length: int | None
    windows: int | None
    seed: int
    include: list[str] | None
    exclude: list[str] | None
    stats: Path | None
    batch_size: int
    dtype: str
    device: str | None
    as_json: bool
    quiet: bool


def compare(wanted: Wanted) -> None:
    """``soco compare``: several methods and sizes side by side, and a folder with the report."""
    entries, ratios = _entries(wanted.methods), _ratios(wanted.ratios)
    find_model(wanted.model)
    calibration = _calibration(wanted, entries)
    texts = _texts(wanted)
    _check_folder(wanted.output)
    if wanted.stats is not None:
        check_writable(wanted.stats)
    device = find_device(wanted.device)
    shows = shows_bars(wanted.quiet)
    total = len(entries) * len(ratios)
    usual = {k: demo.OPTIONS[k] for k in ("samples", "length")} if wanted.model == DEMO else {}
    given = {name: getattr(wanted, name) for name in ("samples", "length", "windows", "stats")}
    with (
        quiet_libraries(bars=shows),
        tqdm(total=total, unit="row", disable=not shows, leave=False) as bar,
    ):
        tell = _teller(wanted.quiet, bar if shows else None)
        tell(f"loading {wanted.model}")
        model = open_dense(wanted.model, wanted.dtype, device)
        tokenizer = open_tokenizer(wanted.model)

        def on_row(row: Row) -> None:
            bar.update()

        try:
            done = compare_methods(
                model,
                map(str, entries),
                ratios,
                calibration=calibration,
                text=texts,
                output=wanted.output,
                tokenizer=tokenizer,
                seed=wanted.seed,
                batch_size=wanted.batch_size,
                include=wanted.include,
                exclude=wanted.exclude,
                name=_named(wanted.model),
                command=command_of(wanted),
                on_row=on_row,
                tell=tell,
                progress=None if shows else False,
                **{**usual, **{name: value for name, value in given.items() if value is not None}},
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory of {device} is full: try a smaller --batch-size or --length, --dtype "
                f"bfloat16 or --device cpu; the rows that are done are in {wanted.output}"
            ) from error
        except KeyboardInterrupt:
            if (wanted.output / RECORD).is_file():
                say(f"rows that are done are in {wanted.output}; the same command does the rest")
            raise
    files = render(done, wanted.output)
    if wanted.as_json:
        print(json.dumps(done.to_dict(), indent=1))
        return
    show(done)
    rows = {(row["method"], row["ratio"]): row for row in done.rows}
    if all("error" in rows[str(entry), ratio] for entry in entries for ratio in ratios):
        raise ValueError("none of the methods could do what was asked for: see above")
    out = console()
    out.print(f"\nFiles in {wanted.output}", style="bold", markup=False)
    for path in [*files, wanted.output / RECORD]:
        out.print(f"  {path.name} ({format_bytes(path.stat().st_size)})", markup=False)


def show(comparison: Comparison) -> None:
    """Print a table for each ratio, the best row first, on the main text."""
    out = console()
    setup = comparison.setup
    title, text = next(iter(setup["texts"].items()))
    out.print(
        f"{setup['model']} on {text['tokens']:,} tokens of {title}", style="bold", markup=False
    )
    chosen = [(name, cell) for name, cell in columns(comparison) if name in _SHOWN]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("removed", justify="right")
    table.add_column("method")
    for name, _ in chosen:
        table.add_column(name, justify="right")
    table.add_row("", "dense", *(cell(comparison.dense) for _, cell in chosen))
    for ratio in comparison.ratios:
        best = comparison.best(ratio)
        for row in comparison.at(ratio):
            failed = "error" in row
            cells = ["failed"] if failed else [cell(row) for _, cell in chosen]
            style = "bold" if row is best else None
            table.add_row(format_percent(ratio), row["method"], *cells, style=style)
        table.add_section()
    out.print(table)
    for row in comparison.rows:
        if "error" in row:
            text = f"{row['method']} at {row['ratio']:g} failed: {row['error']}"
            out.print(text, markup=False)


def command_of(wanted: Wanted) -> str:
    """The command, with the names of files and folders alone: where they are is nobody's business.

    Options that were not given are left out.
    """
    words = ["soco", "compare", _named(wanted.model)]
    options: list[tuple[str, Any]] = [
        ("methods", wanted.methods),
        ("ratios", wanted.ratios),
        ("calibration", wanted.calibration and Path(wanted.calibration).name),
        *(("text", Path(text).name) for text in wanted.texts),
        ("samples", wanted.samples),
        ("length", wanted.length),
        ("windows", wanted.windows),
        ("seed", wanted.seed or None),
        *(("include", pattern) for pattern in wanted.include or ()),
        *(("exclude", pattern) for pattern in wanted.exclude or ()),
        ("batch-size", None if wanted.batch_size == 8 else wanted.batch_size),
        ("dtype", None if wanted.dtype == "auto" else wanted.dtype),
        ("device", wanted.device),
        ("output", wanted.output.name),
    ]
    for name, value in options:
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def _entries(names: str | None) -> list[Entry]:
    """The entries, each of which ``compress`` takes."""
    given = DEFAULT_METHODS if names is None else [name for name in names.split(",") if name]
    entries = [Entry.parse(name) for name in given]
    if not entries:
        raise ValueError("--methods names no method")
    for entry in entries:
        choose(**entry.arguments())
    return list({str(entry): entry for entry in entries}.values())


def _ratios(numbers: str) -> list[float]:
    ratios = []
    for word in numbers.split(","):
        try:
            ratio = float(word)
        except ValueError:
            ratio = -1.0
        if not 0 < ratio < 1:
            raise ValueError(
                f"--ratios takes fractions of parameters to remove, above 0 and below 1, with "
                f"commas between them, got {word!r}"
            )
        ratios.append(ratio)
    return list(dict.fromkeys(ratios))


def _calibration(wanted: Wanted, entries: list[Entry]) -> str | Path | None:
    """The text to learn from, if there is one."""
    text = wanted.calibration or (demo.OPTIONS["calibration"] if wanted.model == DEMO else None)
    readers = [entry for entry in entries if choose(**entry.arguments()).reads_text]
    if text is None and readers:
        raise ValueError(
            f"method {readers[0]} learns from text: give --calibration FILE, or --calibration self "
            f"for text that the model writes itself"
        )
    return text if text in (None, "self") else find_text(text)


def _texts(wanted: Wanted) -> dict[str, Path]:
    """Title to file of the texts to measure on."""
    given = wanted.texts or ([DEMO] if wanted.model == DEMO else [])
    if not given:
        raise ValueError("there is no text to measure on: give --text FILE")
    return titled(list(dict.fromkeys(find_text(text) for text in given)))


def titled(files: list[Path]) -> dict[str, Path]:
    """Files under their names, with folders in front where two share one, as few as will do."""
    titles = [file.name for file in files]
    for depth in range(2, 1 + max(len(file.parts) for file in files)):
        titles = [
            title if titles.count(title) == 1 else "/".join(file.parts[-depth:])
            for title, file in zip(titles, files, strict=True)
        ]
    return dict(zip(titles, files, strict=True))


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a comparison."""
    if (folder / RECORD).is_file():
        Comparison.read(folder / RECORD)
        check_writable(folder)
    else:
        check_output(folder, replace=False)


def _named(model: str) -> str:
    """A model as reports call it: a folder by its name."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _teller(quiet: bool, bar: Any) -> Callable[[str], None]:
    """What says what comes next: on the bar where there is one, else a line each."""
    if quiet:
        return lambda text: None
    return say if bar is None else lambda text: bar.set_description(text)
