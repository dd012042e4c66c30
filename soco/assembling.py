"""A streamed result put together: what became of the layers, and what stays of the dense model."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from soco.checkpoint import write_shards
from soco.contents import check_contents
from soco.experts import join_experts
from soco.folders import carry_over, write_checksums
from soco.headers import read_headers, weight_files
from soco.installation import share_bases
from soco.linalg import Factors
from soco.modules import CompressedLinear, LowRankLinear, PivotedLinear
from soco.ops import all_finite
from soco.pivots import pivot_factors
from soco.preparation import progress_bar
from soco.steps import Step
from soco.stored import StoredModel
from soco.surgery import bias_of, block_paths, layout_of, replace_modules, shape_of
from soco.workbench import Groups

SHARD_BYTES = 2**29  # of tensors outside of the blocks


class Piece(NamedTuple):
    """What became of a layer."""

    weight: Factors | Tensor | None = None  # None: it is as it was
    bias: Tensor | None = None  # None: as it was


@dataclass(frozen=True)
class Outcome:
    """What became of all of them."""

    ranks: Mapping[str, int]  # of the layers that have factors
    piece: Callable[[str], Piece]  # reads that of a layer
    biased: frozenset[str] = frozenset()  # layers that have a bias now, and had none
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    history: Sequence[Step] = ()


@dataclass
class Assembly:
    """A compressed model of a stored one, written file by file."""

    stored: StoredModel
    targets: Mapping[str, nn.Module]
    fused: Mapping[str, nn.Module]  # experts of which the model has layers instead
    groups: Groups  # that share a basis: one layer, or several
    outcome: Outcome
    pivoted: bool
    dtype: torch.dtype  # that was computed in: what is rounded is rounded to this first

    def __post_init__(self) -> None:
        """What follows from that."""
        model = self.stored.model
        self._names = list(model.state_dict())  # of the dense model's tensors
        self._blocks = [f"{path}." for path in block_paths(model)]
        self._layouts = {name: layout_of(module) for name, module in self.targets.items()}
        self._follows = {name for group in self.groups for name in group[1:]}
        changed = [n for n in self.targets if n in self.outcome.ranks or self._is_changed(n)]
        self._whole = {  # experts that stay as they are
            name: module
            for name, module in self.fused.items()
            if not any(layer.startswith(f"{name}.") for layer in changed)
        }
        self._biased = {n for n, module in self.targets.items() if bias_of(module) is not None}

    def install(self) -> dict[str, CompressedLinear]:
        """Put compressed layers into the model, without values, and experts back that have none."""
        kind = PivotedLinear if self.pivoted else LowRankLinear
        made: dict[str, CompressedLinear] = {}
        for name, rank in self.outcome.ranks.items():
            rows, columns = shape_of(self.targets[name])
            biased = name in self._biased or name in self.outcome.biased
            made[name] = kind(
                columns, rows, rank, biased, device="meta", dtype=self.stored.dtype
            )  # fmt: skip
        share_bases(made, self.groups)
        replace_modules(self.stored.model, made)
        join_experts(self.stored.model, self._whole)
        return made

    def _is_changed(self, name: str) -> bool:
        """Whether an expert's layer that stays dense has other numbers than it had."""
        expert = any(name.startswith(f"{each}.") for each in self.fused)
        return expert and any(part is not None for part in self.outcome.piece(name))

    def write(self, folder: Path, progress: bool | None) -> None:
        """Write the model, of which config and modules are those of the result already."""
        model = self.stored.model
        model.config.save_pretrained(str(folder))
        parts = self._parts()
        with progress_bar(len(parts), "writing", progress) as bar:
            write_shards(folder, parts, self._tensors, bar)
        config = model.config.quantization_config
        entries = read_headers(weight_files(folder))
        check_contents(model, entries, config.layers, config.experts)
        write_checksums(folder)
        carry_over(self.stored.folder, folder)

    def _parts(self) -> list[list[str]]:
        """One file for every block, and as many as it takes for what is outside."""
        whole = tuple(f"{name}." for name in self._whole)
        names = [n for n in self._names if not n.startswith(whole)] + list(self._whole)
        parts = [[n for n in names if n.startswith(path)] for path in self._blocks]
        held = SHARD_BYTES
        for name in self._names:
            key = self.stored.key(name)
            if key is None or name.startswith(tuple(self._blocks)):
                continue
            size = math.prod(self.stored.shape(key)) * self.stored.dtype.itemsize
            if held + size > SHARD_BYTES:
                parts.append([])
                held = 0
            parts[-1].append(name)
            held += size
        return parts

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """What is written of a tensor of the dense model, by its names in the files."""
        if name in self._whole:
            return {key: self._as_it_was(key) for key in self.stored.sources(f"{name}.")}
        key = self.stored.key(name)
        if key is None:  # tied to another one
            return {}
        layer, _, leaf = name.rpartition(".")
        if layer in self.targets and leaf in ("weight", "bias"):
            weight, bias = self.outcome.piece(layer)
            if leaf == "bias" and bias is not None:
                return {key: self._rounded(key, bias)}
            if leaf == "weight" and weight is not None:
                stem = key.removesuffix("weight")
                added = {} if bias is None or layer in self._biased else {f"{stem}bias": bias}
                found = {**self._of_weight(layer, key, weight), **added}
                return {name: self._rounded(name, each) for name, each in found.items()}
        return {key: self._as_it_was(key)}

    def _as_it_was(self, key: str) -> Tensor:
        """A tensor of the files."""
        value = self.stored.read(key, floating=False)
        dtype = self.stored.dtype if value.is_floating_point() else value.dtype
        return value.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def _of_weight(self, layer: str, key: str, weight: Factors | Tensor) -> dict[str, Tensor]:
        """The tensors of a weight, before they are rounded."""
        if isinstance(weight, Tensor):
            return {key: weight.mT if self._layouts[layer] == "conv1d" else weight}
        stem = key.removesuffix("weight")
        found = {key: torch.zeros(1, dtype=self.stored.dtype)}
        if self.pivoted:
            rest, rows, places = pivot_factors(weight, name=layer)
            found |= {f"{stem}up.weight": rest, f"{stem}down.weight": rows, f"{stem}pivots": places}
        else:
            found[f"{stem}up.weight"] = weight.up
            if layer not in self._follows:  # whose basis is written with the first of its group
                found[f"{stem}down.weight"] = weight.down
        return found

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        """As it is stored; whole numbers as they are.

        Raises:
            ValueError: it is too large for that.
        """
        if not value.is_floating_point():
            return value
        rounded = value.to(self.dtype).to(self.stored.dtype).contiguous()
        if not all_finite(rounded):
            raise ValueError(f"{name} holds numbers that are too large for {self.stored.dtype}")
        return rounded
