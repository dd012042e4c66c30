"""Methods side by side: the same text, the same sizes, one evaluation, one table."""

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soco.allocators import ALLOCATORS
from soco.archive import key_of
from soco.diagnosis import describe_machine
from soco.evaluation import Evaluation, evaluate
from soco.headers import read_json
from soco.methods import METHODS
from soco.pipeline import compress, needs_of
from soco.preparation import prepare
from soco.reporting import report
from soco.workbench import Workbench

RECORD = "compare.json"
FORMAT = 1

# What is compared where nobody says otherwise, most of it in the order of the papers.
DEFAULT_METHODS = (
    "svd", "fwsvd", "tfwsvd", "asvd", "svd-llm", "svd-llm-v2", "adasvd", "basis-sharing",
    "dobi-svd", "aa-svd", "saes", "svd-surgeon", "svd-llm@energy", "kfac-svd", "soco",
)  # fmt: skip
DEFAULT_RATIOS = (0.2, 0.4, 0.6)

OPTIONS = ("pivoted", "surgeon", "refine")


@dataclass(frozen=True)
class Entry:
    """One way to compress: ``method@allocator+option+option``."""

    method: str
    allocator: str | None = None  # None: the method's own
    options: tuple[str, ...] = ()  # of ``OPTIONS``

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read ``method`` or ``method@allocator``, with ``+pivoted`` and the like behind it.

        Raises:
            ValueError: a method, allocator or option is not known.

        >>> Entry.parse("svd-llm@energy+pivoted")
        Entry(method='svd-llm', allocator='energy', options=('pivoted',))
        """
        named, *options = text.strip().split("+")
        method, _, allocator = named.partition("@")
        for what, given, known in (
            ("method", [method], METHODS),
            ("allocator", [allocator] if allocator else [], ALLOCATORS),
            ("option", options, OPTIONS),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(
                        f"{text!r} names no {what} {name!r}: choose from {', '.join(sorted(known))}"
                    )
        chosen = tuple(option for option in OPTIONS if option in options)
        return cls(method, allocator or None, chosen)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        rule = f"@{self.allocator}" if self.allocator else ""
        return f"{self.method}{rule}" + "".join(f"+{option}" for option in self.options)

    def arguments(self) -> dict[str, Any]:
        """Of ``soco.compress``."""
        given: dict[str, Any] = {"method": self.method, **dict.fromkeys(self.options, True)}
        return given if self.allocator is None else {**given, "allocator": self.allocator}


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` measured."""

    setup: dict[str, Any]  # what the rows depend on
    dense: dict[str, Any]  # the dense model, measured like the rows
    rows: tuple[dict[str, Any], ...]
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""  # UTC, ISO 8601

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as compare.json has it."""
        return {
            "format": FORMAT,
            "date": self.date,
            "machine": self.machine,
            "setup": self.setup,
            "dense": self.dense,
            "rows": list(self.rows),
        }

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read a compare.json.

        Raises:
            ValueError: it is none, or of another format.
        """
        data = read_json(path)
        if data.get("format") != FORMAT:
            raise ValueError(f"{path} is of format {data.get('format')!r}, not {FORMAT}")
        kinds = {"setup": dict, "dense": dict, "rows": list, "machine": dict, "date": str}
        for name, kind in kinds.items():
            if not isinstance(data.get(name), kind):
                raise ValueError(f"{path} has no {name}, or not as a {kind.__name__}")
        for row in data["rows"]:
            if not isinstance(row, dict) or not {"method", "ratio"} <= row.keys():
                raise ValueError(f"{path} has a row without method or ratio")
        values = {name: data[name] for name in kinds if name != "rows"}
        return cls(rows=tuple(data["rows"]), **values)


def compare(
    model: nn.Module,
    methods: Iterable[str] = DEFAULT_METHODS,
    ratios: Iterable[float] = DEFAULT_RATIOS,
    *,
    calibration: Any,
    text: Any,
    output: str | PathLike[str],
    tokenizer: Any = None,
    samples: int = 256,
    length: int | None = None,
    windows: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    stats: str | PathLike[str] | None = None,
    name: str | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    tell: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
) -> Comparison:
    """Compress copies of a model by several methods and sizes, and measure each on the same tokens.

    All methods see the same calibration windows. Statistics are collected in one pass for all of
    them, and every weight is taken apart once for every basis. After each row the whole record is
    written to ``output/compare.json``; rows that are there already are not run again.

    Args:
        model: a dense transformers model; it stays as it is. Copies are made of it.
        methods: ``method`` or ``method@allocator``, with ``+pivoted``, ``+surgeon``, ``+refine``.
        ratios: fractions of the targets' parameters to remove.
        calibration: text to learn from, as in ``soco.compress``.
        text: text to measure on, as in ``soco.evaluate``; or a mapping of titles to several, the
            first of which is the main one.
        output: a folder for the record; made where it is not there.
        tokenizer: needed where a text is no token ids.
        samples: calibration sequences.
        length: tokens of a sequence, and of an evaluation window.
        windows: at most so many evaluation windows of each text.
        seed: of all that is random.
        batch_size: sequences at a time in the calibration pass.
        include: glob patterns of the layers to compress.
        exclude: glob patterns of layers to leave alone.
        stats: a folder for calibration statistics; see ``soco.compress``.
        name: of the model, for the record.
        on_row: called with every row, also with those that were there already.
        tell: called with a sentence on what comes next.
        progress: whether to show progress bars; None: where stderr is a terminal.

    Returns:
        The comparison. A row has ``method``, ``ratio``, ``perplexity``, ``kl`` (nats per token),
        ``top1`` (fraction), ``kept_params`` and ``target_params`` (of the layers compressed),
        ``bytes`` (of all parameters), ``seconds`` (from statistics to the compressed model, a
        decomposition that another row had already made included), ``peak_bytes``, ``ranks`` (layer
        to rank, None is dense), ``texts`` (measurements on the further texts) and ``warnings``.

    Raises:
        ValueError: an entry or ratio makes no sense; or the record in ``output`` is of another
            model, text or setting, which is named.
    """
    entries = [Entry.parse(each) for each in methods]
    if not entries:
        raise ValueError("there is no method to compare")
    sizes = list(dict.fromkeys(float(ratio) for ratio in ratios))
    for ratio in sizes:
        if not 0 < ratio < 1:
            raise ValueError(f"ratios must be above 0 and below 1, got {ratio}")
    texts = dict(text) if isinstance(text, Mapping) else {"text": text}
    folder = Path(output)
    tell("reading the calibration text")
    bench = prepare(
        model,
        tokenizer=tokenizer,
        calibration=calibration,
        samples=samples,
        length=length,
        seed=seed,
        include=include,
        exclude=exclude,
        batch_size=batch_size,
        stats=stats,
        progress=progress,
    )
    measure = _Measure(model, texts, tokenizer, length or bench.source.get("length"), windows)
    setup = _setup(name, bench, measure, seed)
    record = folder / RECORD
    done = Comparison.read(record) if record.is_file() else None
    if done is not None:
        _check_same(done.setup, setup, record)
    rows = {(row["method"], row["ratio"]): row for row in (done.rows if done else ())}
    result = Comparison(setup, done.dense if done else {}, tuple(rows.values()), describe_machine())
    wanted = [(entry, ratio) for ratio in sizes for entry in entries]
    missing = [each for each in wanted if (str(each[0]), each[1]) not in rows]
    if missing:
        kinds = frozenset().union(*(needs_of(**entry.arguments()) for entry, _ in missing))
        tell("collecting statistics for all methods in one pass")
        begin = time.perf_counter()
        bench.statistics(kinds)
        setup["statistics"] = {"kinds": sorted(kinds), "seconds": _seconds(begin)}
        if not result.dense:
            tell("measuring the dense model")
            dense = _row_of(measure.all(model, None))
            result = Comparison(setup, dense, result.rows, result.machine)
    for entry, ratio in wanted:
        key = (str(entry), ratio)
        if key not in rows:
            tell(f"{entry} at {ratio:g}")
            rows[key] = _run(entry, ratio, model, bench, measure, progress)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            result = Comparison(setup, result.dense, tuple(rows.values()), result.machine, now)
            _write(record, result)
        on_row(rows[key])
    return result


def _run(
    entry: Entry,
    ratio: float,
    model: nn.Module,
    bench: Workbench,
    measure: "_Measure",
    progress: bool | None,
) -> dict[str, Any]:
    """Compress a copy and measure it."""
    compressed = copy.deepcopy(model)
    before = dict(bench.seconds)
    bench.last_used.clear()
    begin = time.perf_counter()
    compress(compressed, ratio, shared=bench, progress=progress, **entry.arguments())
    seconds = time.perf_counter() - begin
    made = report(compressed)
    # A decomposition that an earlier row has made counts as if this one had.
    seconds += sum(before[key] for key in bench.last_used & before.keys())
    found = measure.all(compressed, model)
    return {
        "method": str(entry),
        "ratio": ratio,
        **_row_of(found),
        "kept_params": made.params_after,
        "target_params": made.params_before,
        "removed": made.removed,
        "bytes": made.model_bytes_after,
        "bytes_before": made.model_bytes_before,
        "seconds": round(seconds, 3),
        "peak_bytes": made.peak_bytes,
        "peak_of": made.peak_of,
        "ranks": {layer.name: layer.rank for layer in made.layers},
        "shapes": {layer.name: list(layer.shape) for layer in made.layers},
        "settings": made.settings,
        "phases": made.seconds,
        "warnings": list(made.warnings),
        "versions": made.versions,
    }


class _Measure:
    """The evaluation that every row goes through."""

    def __init__(
        self,
        model: nn.Module,
        texts: Mapping[str, Any],
        tokenizer: Any,
        length: int | None,
        windows: int | None,
    ) -> None:
        self.texts = texts
        self.options = {"tokenizer": tokenizer, "length": length, "windows": windows}

    def all(self, model: nn.Module, dense: nn.Module | None) -> dict[str, Evaluation]:
        """Text to what was measured on it."""
        return {
            title: evaluate(model, text, dense=dense, progress=False, **self.options)
            for title, text in self.texts.items()
        }


def _row_of(found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The measurements on the main text, and under ``texts`` those on the others."""
    rows = {
        title: {
            "perplexity": _finite(each.perplexity),
            "kl": _finite(each.kl),
            "top1": each.top1,
            "distance": _finite(each.distance),
            "tokens": each.tokens,
        }
        for title, each in found.items()
    }
    first, *others = rows
    return {**rows[first], "texts": {title: rows[title] for title in others}}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a perplexity that overflowed is the largest number there is."""
    return None if value is None else min(value, 1e308) if not math.isnan(value) else None


def _setup(name: str | None, bench: Workbench, measure: _Measure, seed: int) -> dict[str, Any]:
    """What the rows depend on, as plain JSON data."""
    windows = bench.windows if bench.windows is not None else torch.zeros(0, 0)
    key = key_of(bench.model, windows, bench.batch_size, seed)
    layers = json.dumps({name: list(shape) for name, shape in bench.shapes.items()})
    return {
        "model": name or type(bench.model).__name__,
        "model_hash": key.model[:16],
        "calibration": bench.source,
        "calibration_hash": key.data[:16],
        "layers": len(bench.targets),
        "layers_hash": hashlib.sha256(layers.encode()).hexdigest()[:16],
        "texts": {title: _title(text) for title, text in measure.texts.items()},
        "length": measure.options["length"],
        "windows": measure.options["windows"],
        "seed": seed,
    }


def _title(text: Any) -> str:
    if isinstance(text, str | PathLike):
        return Path(text).name
    return type(text).__name__


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], record: Path) -> None:
    """Refuse to add rows to a record of something else."""
    for field_name, value in new.items():
        if old.get(field_name) != value:
            raise ValueError(
                f"{record} was made with another {field_name.replace('_', ' ')} "
                f"({old.get(field_name)!r:.60}, now {value!r:.60}): choose another output folder"
            )


def _write(record: Path, comparison: Comparison) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(".tmp")
    partial.write_text(json.dumps(comparison.to_dict(), indent=1) + "\n", encoding="utf-8")
    os.replace(partial, record)


def _seconds(begin: float) -> float:
    return round(time.perf_counter() - begin, 3)
