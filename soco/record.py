"""What a comparison of methods measured, and its file."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soco.headers import read_json
from soco.reporting import LayerReport

RECORD = "compare.json"  # the file's name in the folder of a comparison
FORMAT = 1

Row = dict[str, Any]  # one method at one ratio; its keys are described at ``soco.compare``


@dataclass(frozen=True)
class Comparison:
    """What ``soco.compare`` measured."""

    setup: dict[str, Any]  # what the rows depend on
    dense: Row  # the dense model, measured like the rows
    rows: tuple[Row, ...]  # in the order in which they were made
    shapes: dict[str, list[int]] = field(default_factory=dict)  # target layer to [out, in]
    spectra: dict[str, dict[str, list]] = field(default_factory=dict)  # see below
    machine: dict[str, Any] = field(default_factory=dict)  # rows of another one name it
    date: str = ""  # of the last row, UTC, ISO 8601
    command: str = ""  # that was given
    warnings: tuple[str, ...] = ()  # of reading the texts

    # ``spectra`` has a layer of every kind. Under "plain" and "whitened" are singular values of its
    # weight, and of its weight as its inputs see it; under "at" the number of each, from 1 on.

    def at(self, ratio: float) -> list[Row]:
        """The rows of a ratio, the best first; those that failed come last."""
        rows = [row for row in self.rows if row["ratio"] == ratio]
        return sorted(rows, key=lambda row: _last_if_none(self.loss(row)))

    @property
    def ratios(self) -> list[float]:
        """Of the rows, the smallest first."""
        return sorted({row["ratio"] for row in self.rows})

    @property
    def middle(self) -> float | None:
        """The ratio in the middle, of those at which something was made."""
        made = sorted({row["ratio"] for row in self.rows if "error" not in row})
        return made[(len(made) - 1) // 2] if made else None

    @property
    def yardstick(self) -> str:
        """What tells good from bad: "kl", or "distance" where a model predicts no tokens."""
        rows = [row for row in self.rows if "error" not in row]
        return "kl" if any(row.get("kl") is not None for row in rows) or not rows else "distance"

    def best(self, ratio: float) -> Row | None:
        """The row with the smallest loss of those that keep no more than was allowed."""
        first = next((row for row in self.at(ratio) if not exceeds(row)), None)
        return None if first is None or self.loss(first) is None else first

    def loss(self, row: Mapping[str, Any]) -> float | None:
        """A row by the yardstick; None where it failed."""
        return row.get(self.yardstick)

    def layers(self, row: Mapping[str, Any]) -> list[LayerReport]:
        """What a row did to every layer."""
        return [
            LayerReport(name, (shape[0], shape[1]), row["ranks"][name], row["params"][name])
            for name, shape in self.shapes.items()
            if name in row["ranks"]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, as the file has it."""
        parts = {name: getattr(self, name) for name in _PARTS}
        lists = {name: list(parts[name]) for name, kind in _PARTS.items() if kind is list}
        return {"format": FORMAT, **parts, **lists}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the comparison") -> "Comparison":
        """Read what ``to_dict`` gave.

        Args:
            data: of the JSON.
            source: what to call it in errors.

        Raises:
            ValueError: it is of another format, or a part of it is missing or of the wrong kind.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"{source} is of format {data.get('format')!r}, not {FORMAT}")
        for name, kind in _PARTS.items():
            if not isinstance(data.get(name), kind):
                raise ValueError(f"{source} has no {name}, or not as a {kind.__name__}")
        for row in data["rows"]:
            if not isinstance(row, dict) or not {"method", "ratio"} <= row.keys():
                raise ValueError(f"{source} has a row without method or ratio")
            if not isinstance(row["method"], str) or not _is(row["ratio"], _NUMBER):
                raise ValueError(
                    f"{source} has a row of method {row['method']!r:.40} at ratio "
                    f"{row['ratio']!r:.40}"
                )
            if "error" not in row:
                where = f"its row of {row['method']} at {row['ratio']}"
                _check(row, _OF_A_ROW, source, where)
                _check_layers(row, source, where)
        if data["dense"]:
            _check(data["dense"], _OF_DENSE, source, "its row of the dense model")
        for name, shape in data["shapes"].items():
            if not isinstance(shape, list) or [type(each) for each in shape] != [int, int]:
                raise ValueError(f"{source} gives {name} the shape {shape!r:.40}")
        for name, lines in data["spectra"].items():
            if not _is_spectrum(lines):
                raise ValueError(f"{source} has no spectrum of {name} that can be drawn")
        lists = {name: tuple(data[name]) for name, kind in _PARTS.items() if kind is list}
        return cls(**{**{name: data[name] for name in _PARTS}, **lists})

    @classmethod
    def read(cls, path: Path) -> "Comparison":
        """Read a file that ``write`` wrote.

        Raises:
            ValueError: it is none, or of another format.
        """
        return cls.from_dict(read_json(path), str(path))

    def write(self, path: Path) -> None:
        """Write it as a whole or not at all, a row a line; the folder is made if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        lines = [f"{_json(key)}: {_lines(key, value)}" for key, value in self.to_dict().items()]
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        os.replace(partial, path)


_PARTS = {
    "date": str, "command": str, "machine": dict, "setup": dict, "warnings": list, "dense": dict,
    "rows": list, "shapes": dict, "spectra": dict,
}  # fmt: skip
_NUMBER = (int, float)
_OR_NONE = (int, float, type(None))
_MEASURED = {
    **dict.fromkeys(("perplexity", "kl", "top1", "distance"), _OR_NONE),
    **dict.fromkeys(("kept_params", "target_params", "bytes"), (int,)),
    "texts": (dict,),
}
_OF_A_ROW = {
    **_MEASURED,
    **dict.fromkeys(("removed", "seconds"), _NUMBER),
    "peak_bytes": (int,),
    "ranks": (dict,),
    "params": (dict,),
    "warnings": (list,),
}
_OF_DENSE = {**_MEASURED, "params": (int,)}


def _check(row: Mapping[str, Any], fields: Mapping[str, tuple], source: str, where: str) -> None:
    """Refuse a row in which a field is missing, or of the wrong kind."""
    missing = fields.keys() - row.keys()
    if missing:
        raise ValueError(f"{source} has no {min(missing)} in {where}")
    for name, kinds in fields.items():
        if not _is(row[name], kinds):
            raise ValueError(f"{source} has {name} {row[name]!r:.40} in {where}")


def _check_layers(row: Mapping[str, Any], source: str, where: str) -> None:
    """Refuse ranks and parameters that are not those of layers."""
    for name, kinds in (("ranks", (int, type(None))), ("params", (int,))):
        for layer, value in row[name].items():
            if not _is(value, kinds):
                raise ValueError(f"{source} has {name} {value!r:.40} of {layer} in {where}")
    if row["ranks"].keys() != row["params"].keys():
        raise ValueError(f"{source} has ranks and params of different layers in {where}")


def _is(value: object, kinds: tuple) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_spectrum(lines: object) -> bool:
    if not isinstance(lines, dict) or "at" not in lines:
        return False
    count = len(lines["at"]) if isinstance(lines["at"], list) else -1
    return all(
        isinstance(line, list) and len(line) == count and all(_is(value, _NUMBER) for value in line)
        for line in lines.values()
    )


def exceeds(row: Mapping[str, Any]) -> bool:
    """Whether a row keeps more parameters than its ratio allows."""
    if "error" in row:
        return False
    return row["kept_params"] > row["target_params"] * (1 - row["ratio"]) + 1e-6


def _last_if_none(value: float | None) -> float:
    return math.inf if value is None else value


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _lines(key: str, value: Any) -> str:
    """The value as JSON: rows, and layers with many numbers, on a line each."""
    if key == "rows" and value:
        return "[\n " + ",\n ".join(_json(row) for row in value) + "\n]"
    if key == "spectra" and value:
        return "{\n " + ",\n ".join(f"{_json(k)}: {_json(v)}" for k, v in value.items()) + "\n}"
    return _json(value)
