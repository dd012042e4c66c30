"""What a compression on the command line is asked to be."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from soco.choices import find_method
from soco.methods import Method


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What ``soco plan`` reads of it; None stands for an option that was not given."""

    model: str
    ratio: float | None
    method: str
    effort: str | None
    preset: str | None
    samples: int | None
    length: int | None
    include: list[str] | None
    exclude: list[str] | None
    allocator: str | None
    pivoted: bool | None
    refine: bool | None
    surgeon: bool | None
    batch_size: int
    stream: bool
    dtype: str
    training: Mapping[str, Any] = field(default_factory=dict)  # fields of SoCo that were given

    def given(self, *names: str) -> dict[str, Any]:
        """Those of some options that were given, by their names."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def chosen_method(self, seed: int = 0) -> Method:
        """The method as the options make it."""
        method = find_method(self.method, seed, effort=self.effort, preset=self.preset)
        return replace(cast(Any, method), **self.training)


@dataclass(frozen=True, kw_only=True)
class Compression(Wanted):
    """What ``soco compress`` reads beside it."""

    output: Path
    ratios: tuple[float, ...] | None  # ascending
    size: str | None
    calibration: str | None
    seed: int
    stats: Path | None
    work: Path | None
    device: str | None
    quiet: bool

    def folders(self) -> dict[float, Path]:
        """Ratio to its folder, where several were asked for, ascending."""
        return {ratio: self.output / f"ratio-{ratio:g}" for ratio in self.ratios or ()}
