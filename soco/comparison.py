"""Methods side by side: the same text, the same sizes, one evaluation, one record."""

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soco.allocators import ALLOCATORS
from soco.archive import key_of
from soco.choices import choose
from soco.data import cut_windows, token_ids
from soco.diagnosis import describe_machine
from soco.evaluation import Evaluation, evaluate
from soco.experts import experts_apart
from soco.factorization import kind_of
from soco.methods import METHODS
from soco.methods.bases import Plain, Whitened
from soco.methods.soco import EFFORTS
from soco.pipeline import compress
from soco.preparation import noted, prepare
from soco.record import RECORD, Comparison, Row
from soco.reporting import report
from soco.surgery import sequence_length
from soco.workbench import Workbench

# What is compared where nobody says otherwise, most of it in the order of the papers.
DEFAULT_METHODS = (
    "svd", "fwsvd", "tfwsvd", "asvd", "svd-llm", "svd-llm-v2", "adasvd", "basis-sharing",
    "dobi-svd", "aa-svd", "saes", "svd-surgeon", "svd-llm@energy", "kfac-svd", "kfac-svd+pivoted",
    "soco:fast", "soco",
)  # fmt: skip
DEFAULT_RATIOS = (0.2, 0.4, 0.6)

# Switches of ``compress`` that an entry may turn on.
OPTIONS = ("pivoted", "unpivoted", "surgeon", "refine")

_SPECTRUM_POINTS = 256  # of a layer's singular values in the record


@dataclass(frozen=True)
class Entry:
    """One way to compress: ``method:effort@allocator+option+option``."""

    method: str
    allocator: str | None = None  # None: the method's own
    options: tuple[str, ...] = ()  # of ``OPTIONS``
    effort: str | None = None  # of method soco; None: the usual one

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read ``method``, ``method:effort`` or ``method@allocator``, and ``+pivoted`` or such.

        Raises:
            ValueError: a method, effort, allocator or option is not known.

        >>> Entry.parse("svd-llm@energy+pivoted")
        Entry(method='svd-llm', allocator='energy', options=('pivoted',), effort=None)
        >>> Entry.parse("soco:fast")
        Entry(method='soco', allocator=None, options=(), effort='fast')
        """
        named, *options = text.strip().split("+")
        method, at, allocator = named.partition("@")
        method, colon, effort = method.partition(":")
        for what, given, known in (
            ("method", [method], METHODS),
            ("effort", [effort] if colon else [], EFFORTS),
            ("allocator", [allocator] if at else [], ALLOCATORS),
            ("option", options, OPTIONS),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(
                        f"{text!r} names no {what} {name!r}: choose from {', '.join(sorted(known))}"
                    )
        if {"pivoted", "unpivoted"} <= {*options}:
            raise ValueError(f"{text!r} is pivoted and unpivoted: take one")
        chosen = tuple(option for option in OPTIONS if option in options)
        return cls(method, allocator or None, chosen, effort or None)

    def __str__(self) -> str:
        """As ``parse`` reads it."""
        rule = f"@{self.allocator}" if self.allocator else ""
        named = f"{self.method}:{self.effort}" if self.effort else self.method
        return f"{named}{rule}" + "".join(f"+{option}" for option in self.options)

    def arguments(self) -> dict[str, Any]:
        """Of ``soco.compress``."""
        given: dict[str, Any] = {"method": self.method, **dict.fromkeys(self.options, True)}
        if given.pop("unpivoted", False):
            given["pivoted"] = False
        for name in ("allocator", "effort"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        return given


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
    command: str = "",
    on_row: Callable[[Row], None] = lambda row: None,
    tell: Callable[[str], None] = lambda text: None,
    progress: bool | None = None,
) -> Comparison:
    """Compress copies of a model by several methods and sizes, and measure each on the same tokens.

    All methods see the same calibration windows. Statistics are collected in one pass for all of
    them, and every weight is taken apart once for every basis. After each row the whole record is
    written to ``output/compare.json``; rows that are there already are not made again. A method
    that cannot do what is asked of it (``ValueError``) gives a row that says why.

    Args:
        model: a dense transformers model; it stays as it is. Copies are made of it.
        methods: ``method``, ``method:effort`` or ``method@allocator``, with ``+pivoted``,
            ``+unpivoted``, ``+surgeon``, ``+refine``.
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
        name: of the model, for the record; None: as its config calls it.
        command: that was given, for the record.
        on_row: called with every row, also with those that were there already.
        tell: called with a sentence on what comes next.
        progress: whether to show progress bars; None: where stderr is a terminal.

    Returns:
        The comparison, with all rows of the record. A row has

        - ``method`` (the entry) and ``ratio``;
        - ``perplexity``, ``kl`` (nats per token), ``top1`` (fraction), ``distance`` and ``tokens``,
          measured on the main text, each None where the model has no such thing; under ``texts``
          the same for the further ones;
        - ``kept_params``, ``target_params``, ``removed``: of the layers compressed; ``bytes``: of
          all parameters of the model;
        - ``ranks`` (layer to rank, None is dense) and ``params`` (layer to what it keeps);
        - ``seconds``: from statistics to the compressed model, decompositions and probes that
          another row had already made included, statistics not; ``phases``: of this run;
        - ``peak_bytes``: highest memory use meanwhile, with the model and all that rows share;
          ``peak_of``: of what;
        - ``settings``, ``warnings``, ``versions``;
        - or, instead of all that, ``error``: why there is nothing.

    Raises:
        ValueError: an entry or ratio makes no sense, a text cannot be read; or the record in
            ``output`` is of another model, text or setting, which is named.

    Warns:
        UserWarning: a text has less than was asked for; or what methods warn of, each once.
    """
    entries = list({str(each): each for each in map(Entry.parse, methods)}.values())
    sizes = list(dict.fromkeys(map(_checked_ratio, ratios)))
    if not entries or not sizes:
        raise ValueError(f"there is no {'ratio' if entries else 'method'} to compare at")
    chosen = {str(entry): choose(**entry.arguments()) for entry in entries}
    readers = [name for name, each in chosen.items() if each.reads_text]
    if calibration is None and readers:
        raise ValueError(f"method {readers[0]} learns from text: give calibration=")
    texts = dict(text) if isinstance(text, Mapping) else {_title(text): text}
    with experts_apart(model):
        notes: list[str] = []
        with noted(notes):
            tell("reading the texts")
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
            tokens = int(length or bench.source.get("length") or sequence_length(model))
            measure = _Measure(texts, tokenizer, tokens, windows)
        setup = _setup(name, bench, measure, windows, seed)
        path = Path(output) / RECORD
        result = _resumed(path, setup) if path.is_file() else Comparison(setup, {}, ())
        rows = {(row["method"], row["ratio"]): row for row in result.rows}
        wanted = [(entry, ratio) for ratio in sizes for entry in entries]
        missing = [(entry, ratio) for entry, ratio in wanted if (str(entry), ratio) not in rows]
        if missing:
            machine = describe_machine(next(model.parameters()).device.type)
            result = replace(
                _moved(result, machine),
                command=command or result.command,
                warnings=tuple(dict.fromkeys([*result.warnings, *notes])),
                shapes={layer: list(shape) for layer, shape in bench.shapes.items()},
            )
            rows = {(row["method"], row["ratio"]): row for row in result.rows}
            kinds = frozenset().union(*(chosen[str(entry)].needs for entry, _ in missing))
            if kinds:
                tell("collecting statistics for all methods in one pass")
                begin = time.perf_counter()
                bench.statistics(kinds)
                taken = {"kinds": sorted(kinds), "seconds": _seconds(begin)}
                result = replace(result, setup={**result.setup, "statistics": taken})
            if not result.dense:
                tell("measuring the dense model")
                result = replace(result, dense=_dense_row(model, bench, measure))
        told: set[str] = set()
        for entry, ratio in wanted:
            key = (str(entry), ratio)
            if key not in rows:
                tell(f"{entry} at {ratio:g}")
                rows[key] = _run(entry, ratio, model, bench, measure, seed, progress, told)
                now = datetime.now(timezone.utc).isoformat(timespec="seconds")
                result = replace(result, rows=tuple(rows.values()), date=now)
                result.write(path)
            on_row(rows[key])
        if not result.spectra:  # last, so that no row profits from it
            result = replace(result, spectra=_spectra(bench))
            result.write(path)
    return result


def _checked_ratio(ratio: float) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise ValueError(
            f"ratios are fractions of parameters to remove, above 0 and below 1, got {ratio!r}"
        )
    return float(ratio)


def _resumed(path: Path, setup: Mapping[str, Any]) -> Comparison:
    """The record that is there, if rows of this setup may be added to it."""
    done = Comparison.read(path)
    for key, value in setup.items():
        old = done.setup.get(key)
        if key == "config_hash" and old is None:  # of an older soco
            continue
        where = ""
        differs = old != value
        if isinstance(old, dict) and isinstance(value, dict):
            differs = differs or (key == "texts" and list(old) != list(value))
            part = next((k for k in value if k in old and old[k] != value[k]), None)
            if part is not None:
                where, old, value = f": {part}", old[part], value[part]
        if differs:
            values = f" ({old!r}, now {value!r})" if len(f"{old!r}{value!r}") < 80 else ""
            called = _CALLED.get(key, key.replace("_", " "))
            raise ValueError(
                f"{path} was made with another {called}{where}{values}: choose another output "
                f"folder"
            )
    return done


_CALLED = {  # fields of the setup whose names do not say it
    "model_hash": "model: its weights differ",
    "config_hash": "model: its configuration differs",
    "calibration_hash": "calibration text: its tokens differ",
    "layers_hash": "choice of layers",
    "texts": "text to measure on, or in another order",
}


def _moved(done: Comparison, machine: dict[str, Any]) -> Comparison:
    """The same on this machine: rows that were made on another one say so."""
    rows = []
    for row in done.rows:
        made_on = row.get("machine", done.machine)
        rest = {key: value for key, value in row.items() if key != "machine"}
        rows.append(rest if made_on == machine else {**rest, "machine": made_on})
    return replace(done, rows=tuple(rows), machine=machine)


def _run(
    entry: Entry,
    ratio: float,
    model: nn.Module,
    bench: Workbench,
    measure: "_Measure",
    seed: int,
    progress: bool | None,
    told: set[str],
) -> Row:
    """A row, or one that says why there is none; warnings that were told already are not again."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            row = _make(entry, ratio, model, bench, measure, seed, progress)
        except ValueError as error:
            row = {"method": str(entry), "ratio": ratio, "error": str(error)}
    for warning in caught:
        if str(warning.message) not in told:
            told.add(str(warning.message))
            warnings.warn(str(warning.message), warning.category, stacklevel=3)
    return row


def _make(
    entry: Entry,
    ratio: float,
    model: nn.Module,
    bench: Workbench,
    measure: "_Measure",
    seed: int,
    progress: bool | None,
) -> Row:
    """Compress a copy and measure it."""
    compressed = copy.deepcopy(model)
    before = dict(bench.seconds)
    bench.last_used.clear()
    begin = time.perf_counter()
    compress(compressed, ratio, shared=bench, seed=seed, progress=progress, **entry.arguments())
    seconds = time.perf_counter() - begin
    found = measure.all(compressed, model)
    made = report(compressed)
    # What an earlier row has computed counts as if this one had.
    seconds += sum(before[key] for key in bench.last_used & before.keys())
    return {
        "method": str(entry),
        "ratio": ratio,
        **_measurements(found),
        "kept_params": made.params_after,
        "target_params": made.params_before,
        "removed": made.removed,
        "bytes": made.model_bytes_after,
        "seconds": round(seconds, 3),
        "peak_bytes": made.peak_bytes,
        "peak_of": made.peak_of,
        "ranks": {layer.name: layer.rank for layer in made.layers},
        "params": {layer.name: layer.params for layer in made.layers},
        "settings": made.settings,
        "phases": made.seconds,
        "warnings": list(made.warnings),
        "versions": made.versions,
    }


class _Measure:
    """The evaluation that every row goes through, of the same windows of tokens."""

    def __init__(
        self, texts: Mapping[str, Any], tokenizer: Any, length: int, windows: int | None
    ) -> None:
        self.length = length
        self.windows: dict[str, Tensor] = {}
        self.about: dict[str, dict[str, Any]] = {}  # text to what the record says of it
        wanted = None if windows is None else windows * length
        for title, text in texts.items():
            ids = token_ids(text, tokenizer, tokens=wanted, name="evaluation")
            cut = cut_windows(ids, length, name="evaluation")[:windows]
            if windows is not None and len(cut) < windows:
                warnings.warn(
                    f"the evaluation data {title} has {ids.numel()} tokens: {len(cut)} windows of "
                    f"{length}, fewer than the {windows} asked for",
                    stacklevel=3,
                )
            self.windows[title] = cut
            self.about[title] = {
                "source": _title(text),
                "windows": len(cut),
                "tokens": cut.numel(),
                "hash": hashlib.sha256(cut.contiguous().numpy().data).hexdigest()[:16],
            }

    def all(self, model: nn.Module, dense: nn.Module | None) -> dict[str, Evaluation]:
        """Text to what was measured on it."""
        return {
            title: evaluate(model, ids, dense=dense, length=self.length, progress=False)
            for title, ids in self.windows.items()
        }


def _measurements(found: Mapping[str, Evaluation]) -> Row:
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
    return None if value is None or math.isnan(value) else min(value, 1e308)


def _dense_row(model: nn.Module, bench: Workbench, measure: _Measure) -> Row:
    params = sum(rows * columns for rows, columns in bench.shapes.values())
    return {
        **_measurements(measure.all(model, None)),
        "kept_params": params,
        "target_params": params,
        "params": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def _spectra(bench: Workbench) -> dict[str, dict[str, list]]:
    """Singular values of one layer of every kind, from the middle of the model."""
    kinds: dict[str, list[str]] = {}
    for name in bench.targets:
        kinds.setdefault(kind_of(name), []).append(name)
    groups = [(names[len(names) // 2],) for names in kinds.values()]
    bases = {"plain": Plain(), **({} if bench.windows is None else {"whitened": Whitened()})}
    found: dict[str, dict[str, list]] = {}
    for title, basis in bases.items():
        for name, spectrum in bench.spectra(basis, groups).items():
            sigma = spectrum.sigma
            points = min(len(sigma), _SPECTRUM_POINTS)
            places = torch.linspace(0, len(sigma) - 1, points).round().long().tolist()
            values = sigma.double().tolist()
            found.setdefault(name, {"at": [place + 1 for place in places]})
            found[name][title] = [float(f"{values[place]:.5g}") for place in places]
    return found


def _setup(
    name: str | None,
    bench: Workbench,
    measure: _Measure,
    windows: int | None,
    seed: int,
) -> dict[str, Any]:
    """What the rows depend on, as plain JSON data."""
    model = bench.model
    ids = bench.windows if bench.windows is not None else torch.zeros(0, 0, dtype=torch.long)
    key = key_of(model, ids, bench.batch_size, seed)
    layers = json.dumps({name: list(shape) for name, shape in bench.shapes.items()})
    called = Path(str(getattr(getattr(model, "config", None), "name_or_path", ""))).name
    return {
        "model": name or called or type(model).__name__,
        "class": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "layers": len(bench.targets),
        "calibration": bench.source,
        "length": measure.length,
        "windows": windows,
        "seed": seed,
        "batch_size": bench.batch_size,
        "texts": measure.about,
        "model_hash": key.model[:16],
        "config_hash": key.config[:16],
        "calibration_hash": key.data[:16],
        "layers_hash": hashlib.sha256(layers.encode()).hexdigest()[:16],
    }


def _title(text: Any) -> str:
    if isinstance(text, str | PathLike):
        return Path(text).name
    return type(text).__name__


def _seconds(begin: float) -> float:
    return round(time.perf_counter() - begin, 3)
