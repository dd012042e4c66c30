"""All linear layers of a model taken apart, a few at a time, from memory or from a folder."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from soco.folders import replaced
from soco.headers import is_file, read_headers, read_json
from soco.linalg import SVD, truncated_svd
from soco.ops import check_finite
from soco.stored import StoredModel
from soco.surgery import Patterns, find_linears, shape_of, weight_of

CONTENTS = "decomposition.json"  # beside the files of tensors
SHARD_BYTES = 2**28

Read = Callable[[], Tensor]  # a layer's weight (out, in), when it is wanted


@dataclass(frozen=True)
class Layer:
    """What was written of one layer."""

    file: str
    shape: tuple[int, int]  # (out, in)
    rank: int
    energy: float  # the fraction of |W|_F^2 that the triplets hold


def _is_layer(described: object) -> bool:
    """Whether this is what ``Layer`` is made of, read from a file."""
    if not isinstance(described, dict) or described.keys() != {f.name for f in fields(Layer)}:
        return False
    shape, numbers = described["shape"], (described["rank"], described["energy"])
    return (
        isinstance(described["file"], str)
        and isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(number, (int, float)) for number in (*shape, *numbers))
    )


class Decomposition(Mapping[str, SVD]):
    """A folder that :func:`decompose` wrote: layer to its SVD, read when it is asked for."""

    def __init__(self, folder: str | PathLike[str]) -> None:
        """Open a folder.

        Raises:
            ValueError: it is not one of these, or a file of it is missing or broken.
        """
        self.folder = Path(folder)
        described = read_json(self.folder / CONTENTS)
        layers = described.get("layers")
        if not isinstance(layers, dict) or not all(map(_is_layer, layers.values())):
            raise ValueError(f"{self.folder / CONTENTS} does not describe layers")
        self.layers = {n: Layer(**{**v, "shape": tuple(v["shape"])}) for n, v in layers.items()}
        names = {layer.file for layer in self.layers.values()}
        for name in names:
            if Path(name).name != name or not is_file(self.folder / name):
                raise ValueError(f"{self.folder} lacks the file {name!r}, which {CONTENTS} names")
        entries = read_headers(self.folder / name for name in sorted(names))
        for name, layer in self.layers.items():
            rows, inputs = layer.shape
            sizes = ((rows, layer.rank), (layer.rank,), (layer.rank, inputs))
            for part, size in zip(SVD._fields, sizes, strict=True):
                found = entries.get(f"{name}.{part}")
                if found is None or found.shape != size or found.file.name != layer.file:
                    raise ValueError(f"{layer.file} should hold {name}.{part} of shape {size}")

    def __getitem__(self, name: str) -> SVD:
        """The triplets of a layer, in the dtype they were written in."""
        with safe_open(self.folder / self.layers[name].file, "pt") as file:
            return SVD(*(file.get_tensor(f"{name}.{part}") for part in SVD._fields))

    def __iter__(self) -> Iterator[str]:
        """The layers, in the model's order."""
        return iter(self.layers)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.layers)


def decompose(
    source: nn.Module | str | PathLike[str],
    output: str | PathLike[str],
    *,
    kept: float = 1.0,
    method: Literal["exact", "randomized", "auto"] = "exact",
    include: Patterns = None,
    exclude: Patterns = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Decomposition:
    """Take all linear layers of a model apart and write their singular triplets.

    Layers of one shape go together, so many at a time as torch has threads, at most 8. While they
    are worked on, the next ones are read and those before them are written; so memory holds the
    weights of two such groups, the results of one, and 0.5 GB on its way to files, however
    large the model is. From a folder of safetensors the model is never loaded.

    Args:
        source: a transformers model, or the folder of one.
        output: folder to write; one that is there is replaced, but only if it holds a
            decomposition.
        kept: the fraction of the components of each layer, above 0 and at most 1; at least one.
        method: of ``soco.linalg.truncated_svd``.
        include: glob patterns of the layers; None: the linears of the transformer blocks.
        exclude: glob patterns of layers to leave out.
        dtype: of the tensors that are written; S is float32 at least.
        device: that is computed on; None: where a model in memory is, the CPU for a folder.
        seed: of the sketch of randomized decompositions.
        progress: whether layers done, their rate and the time left are shown on stderr.

    Returns:
        The folder, opened: ``decomposition["model.layers.0.mlp.up_proj"]`` is an SVD.

    Raises:
        ValueError: an argument is out of range, a weight holds NaN or Inf (the layer is named), or
            the folder is broken or does not hold a layer under the name that its model gives it.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept must be above 0 and at most 1, got {kept}")
    target = Path(output)
    if target.exists() and not (target / CONTENTS).is_file():
        raise ValueError(f"{target} exists and is no decomposition: choose another output")
    weights, shapes = _open(source, include, exclude)
    where = torch.device(device) if device is not None else _device_of(source)
    groups = list(_groups(shapes, min(8, torch.get_num_threads())))

    def read(names: list[str]) -> Tensor:
        return torch.stack([weights[name]().to(where) for name in names])

    begin = time.perf_counter()
    with (
        replaced(target) as folder,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as writer,
        tqdm(total=len(shapes), unit="layer", disable=not progress, desc="decomposition") as bar,
    ):
        shards = _Shards(folder, writer)
        following = reader.submit(read, groups[0])
        for number, names in enumerate(groups):
            stacked = following.result()
            if number + 1 < len(groups):
                following = reader.submit(read, groups[number + 1])
            rank = max(1, math.floor(kept * min(stacked.shape[1:])))
            for name, weight in zip(names, stacked, strict=True):
                check_finite(f"{name}.weight", weight)
            found = truncated_svd(stacked, rank, method, seed=seed, name=names[0])
            energy = stacked.double().square().sum((1, 2))
            held = found.S.double().square().sum(1) / energy.clamp_min(1e-300)
            for i, name in enumerate(names):
                svd = SVD(*(part[i] for part in found))
                shards.add(name, shapes[name], svd, min(1.0, float(held[i])), dtype)
            bar.update(len(names))
        layers = shards.close()
        described = {
            "layers": {name: asdict(layers[name]) for name in shapes},
            "method": method,
            "kept": kept,
            "seconds": round(time.perf_counter() - begin, 3),
        }
        (folder / CONTENTS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return Decomposition(target)


class _Shards:
    """Files of tensors that are written behind the caller's back, one at a time."""

    def __init__(self, folder: Path, writer: ThreadPoolExecutor) -> None:
        self._folder, self._writer = folder, writer
        self._held: dict[str, Tensor] = {}
        self._bytes = self._count = 0
        self._layers: dict[str, Layer] = {}
        self._running: Future[None] | None = None

    def add(
        self, name: str, shape: tuple[int, int], svd: SVD, energy: float, dtype: torch.dtype
    ) -> None:
        """Takes the triplets of a layer; writes what is held when it is enough for a file."""
        wide = torch.promote_types(dtype, torch.float32)
        for part, tensor in zip(SVD._fields, svd, strict=True):
            tensor = tensor.to("cpu", wide if part == "S" else dtype).contiguous()
            self._held[f"{name}.{part}"] = tensor
            self._bytes += tensor.nbytes
        self._layers[name] = Layer(self._file(), shape, len(svd.S), energy)
        if self._bytes >= SHARD_BYTES:
            self._write()

    def close(self) -> dict[str, Layer]:
        """Writes the rest, and waits until all is there."""
        if self._held:
            self._write()
        if self._running is not None:
            self._running.result()
        return self._layers

    def _file(self) -> str:
        return f"decomposition-{self._count + 1:05}.safetensors"

    def _write(self) -> None:
        if self._running is not None:
            self._running.result()  # only one at a time, and its error is not lost
        held, path = self._held, self._folder / self._file()
        self._running = self._writer.submit(save_file, held, path)
        self._held, self._bytes, self._count = {}, 0, self._count + 1


def _groups(shapes: Mapping[str, tuple[int, int]], most: int) -> Iterator[list[str]]:
    """The layers of each shape, in the model's order, ``most`` at a time."""
    same: dict[tuple[int, int], list[str]] = {}
    for name, shape in shapes.items():
        same.setdefault(shape, []).append(name)
    for names in same.values():
        for begin in range(0, len(names), most):
            yield names[begin : begin + most]


def _device_of(source: object) -> torch.device:
    if isinstance(source, nn.Module):
        return next((p.device for p in source.parameters()), torch.device("cpu"))
    return torch.device("cpu")


def _open(
    source: nn.Module | str | PathLike[str], include: Patterns, exclude: Patterns
) -> tuple[dict[str, Read], dict[str, tuple[int, int]]]:
    """How to read each layer's weight, and its shape (out, in), in the model's order."""
    if isinstance(source, nn.Module):
        layers = find_linears(source, include, exclude)
        reads = {n: (lambda module=m: weight_of(module).detach()) for n, m in layers.items()}
        return reads, {name: shape_of(module) for name, module in layers.items()}
    stored = StoredModel(source)
    layers = find_linears(stored.model, include, exclude)
    for name in layers:
        stored.require_weight(name)  # before anything is computed
    reads = {name: (lambda name=name: stored.weight(name)) for name in layers}
    return reads, {name: shape_of(module) for name, module in layers.items()}
