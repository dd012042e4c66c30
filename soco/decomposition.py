"""All linear layers of a model taken apart, a few at a time, from memory or from a folder."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from soco.archive import fingerprint
from soco.diagnosis import versions
from soco.experts import experts_apart
from soco.headers import is_file, opened_tensors, read_headers, read_json
from soco.keeping import clear, result
from soco.linalg import SVD, truncated_svd, work_of
from soco.ops import check_finite
from soco.processes import count, number, owners, wait
from soco.stored import StoredModel
from soco.surgery import Patterns, find_linears, shape_of, weight_of
from soco.workfolder import WorkFolder, opened, work_folder

CONTENTS = "decomposition.json"  # beside the files of tensors
SHARD_BYTES = 2**28
FORMAT = 1  # of the work folder

Method = Literal["exact", "randomized", "auto"]
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
        with opened_tensors(self.folder / self.layers[name].file) as file:
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
    method: Method = "exact",
    include: Patterns = None,
    exclude: Patterns = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = True,
    work: str | PathLike[str] | None = None,
) -> Decomposition:
    """Take all linear layers of a model apart and write their singular triplets.

    Layers of one shape go together, so many at a time as torch has threads, at most 8. While they
    are worked on, the next ones are read and those before them are written; so memory holds the
    weights of two such groups, the results of one, and 0.5 GB on its way to files, however
    large the model is. From a folder of safetensors the model is never loaded.

    Every file of 0.25 GB is kept in the work folder once it is written, so that the same call goes
    on after a crash, a kill, Ctrl-C or a full disk. Several processes (``soco.together``) share the
    files out; the triplets are the same bit for bit.

    Args:
        source: a transformers model, or the folder of one; the experts of a mixture are layers of
            their own ("model.layers.0.mlp.experts.3.down_proj").
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
        work: folder for what is done, deleted at the end; None: beside the output, its name with
            ``.work`` at the end.

    Returns:
        The folder, opened: ``decomposition["model.layers.0.mlp.up_proj"]`` is an SVD.

    Raises:
        ValueError: an argument is out of range, a weight holds NaN or Inf (the layer is named),
            the folder is broken or does not hold a layer under the name that its model gives it,
            or the work folder is in use or of another run.
        OSError: a file cannot be written, the disk being full, say.
    """
    if not 0 < kept <= 1:
        raise ValueError(f"kept must be above 0 and at most 1, got {kept}")
    if method not in get_args(Method):
        raise ValueError(f"method must be exact, randomized or auto, got {method!r}")
    target = Path(output)
    if target.exists() and not (target / CONTENTS).is_file():
        raise ValueError(f"{target} exists and is no decomposition: choose another output")
    place = work_folder(target, work)
    weights, shapes, model = _open(source, include, exclude)
    where = torch.device(device) if device is not None else _device_of(source)
    most = min(8, torch.get_num_threads())
    ranks = {name: max(1, math.floor(kept * min(shape))) for name, shape in shapes.items()}
    sizes = {n: dtype.itemsize * ranks[n] * sum(shape) for n, shape in shapes.items()}
    shards = _shards(list(_groups(shapes, most)), sizes)
    plan = {
        "format": FORMAT, "model": model, "layers": list(shapes), "kept": kept, "method": method,
        "dtype": str(dtype), "device": where.type, "seed": seed, "threads": most,
        "processes": count(), "versions": versions(),
    }  # fmt: skip
    begin = time.perf_counter()
    with opened(place, plan) as kept_there:
        if number() == 0:
            clear(kept_there, target)
        run = _Run(kept_there, weights, shapes, ranks, method, dtype, where, seed)
        run.all_of(shards, progress)
        wait()
        if number() == 0:
            run.finish(target, shards, {
                "method": method, "kept": kept, "seconds": round(time.perf_counter() - begin, 3),
            })  # fmt: skip
        wait()  # before the work folder goes
    return Decomposition(target)


@dataclass
class _Run:
    """One decomposition, file by file."""

    work: WorkFolder
    weights: Mapping[str, Read]
    shapes: Mapping[str, tuple[int, int]]
    ranks: Mapping[str, int]
    method: Method
    dtype: torch.dtype
    device: torch.device
    seed: int

    def all_of(self, shards: Sequence[Sequence[list[str]]], progress: bool) -> None:
        """Take apart what is this process's and not there yet."""
        costs = [
            sum(work_of(*self.shapes[name], False) for group in shard for name in group)
            for shard in shards
        ]
        who = owners(costs)
        own = [place for place in range(len(shards)) if who[place] == number()]
        left = [place for place in own if not self.work.has(_file(place))]
        groups = [group for place in left for group in shards[place]]
        layers = sum(len(group) for place in own for group in shards[place])
        done = layers - sum(map(len, groups))
        quiet = not progress or number() > 0
        with (
            ThreadPoolExecutor(1) as reader,
            ThreadPoolExecutor(1) as writer,
            tqdm(
                total=layers, initial=done, unit="layer", disable=quiet, desc="decomposition"
            ) as bar,
        ):
            stacks = _ahead(reader, self._read, groups)
            writing: Future[None] | None = None
            for place in left:
                held: dict[str, Tensor] = {}
                energies: dict[str, float] = {}
                for group in shards[place]:
                    self._take_apart(group, next(stacks), held, energies)
                    bar.update(len(group))
                if writing is not None:
                    writing.result()  # only one at a time, and its error is not lost
                writing = writer.submit(self._write, place, held, energies)
            if writing is not None:
                writing.result()

    def _read(self, names: list[str]) -> Tensor:
        return torch.stack([self.weights[name]().to(self.device) for name in names])

    def _take_apart(
        self, names: list[str], stacked: Tensor, held: dict[str, Tensor], energies: dict[str, float]
    ) -> None:
        """Put the triplets of a group, and the part of the energy that they hold, with others."""
        for name, weight in zip(names, stacked, strict=True):
            check_finite(f"{name}.weight", weight)
        found = truncated_svd(
            stacked, self.ranks[names[0]], self.method, seed=self.seed, name=names[0]
        )
        energy = stacked.double().square().sum((1, 2))
        share = found.S.double().square().sum(1) / energy.clamp_min(1e-300)
        wide = torch.promote_types(self.dtype, torch.float32)
        for i, name in enumerate(names):
            energies[name] = min(1.0, float(share[i]))
            for part, tensor in zip(SVD._fields, found, strict=True):
                dtype = wide if part == "S" else self.dtype
                held[f"{name}.{part}"] = tensor[i].to("cpu", dtype).contiguous()

    def _write(self, place: int, held: dict[str, Tensor], energies: dict[str, float]) -> None:
        self.work.put_json(f"{_file(place)}.json", energies)
        self.work.put_tensors(_file(place), held)  # the last: it says that both are there

    def finish(
        self, target: Path, shards: Sequence[Sequence[list[str]]], described: dict[str, Any]
    ) -> None:
        """Make the result of all files."""
        layers: dict[str, Layer] = {}
        with result(self.work, target) as folder:
            for place in range(len(shards)):
                file = _file(place)
                for name, energy in self.work.get_json(f"{file}.json").items():
                    layers[name] = Layer(file, self.shapes[name], self.ranks[name], energy)
                _take(self.work.path / file, folder / file)
            described = {"layers": {n: asdict(layers[n]) for n in self.shapes}, **described}
            (folder / CONTENTS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def _ahead(
    reader: ThreadPoolExecutor, read: Callable[[list[str]], Tensor], groups: Sequence[list[str]]
) -> Iterator[Tensor]:
    """What is read of each group; the next one is read meanwhile."""
    following = [reader.submit(read, group) for group in groups[:1]]
    for place in range(len(groups)):
        stacked = following.pop().result()
        if place + 1 < len(groups):
            following.append(reader.submit(read, groups[place + 1]))
        yield stacked


def _shards(groups: Sequence[list[str]], sizes: Mapping[str, int]) -> list[list[list[str]]]:
    """The groups of each file: as many as make one, or few enough for all processes."""
    most = float(SHARD_BYTES)
    if count() > 1:
        most = min(most, sum(sizes.values()) / (4 * count()))
    found: list[list[list[str]]] = []
    held = math.inf
    for group in groups:
        if held >= most:
            found.append([])
            held = 0
        found[-1].append(group)
        held += sum(sizes[name] for name in group)
    return found


def _file(place: int) -> str:
    return f"decomposition-{place + 1:05}.safetensors"


def _take(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no such links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


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
) -> tuple[dict[str, Read], dict[str, tuple[int, int]], dict[str, str]]:
    """How to read each layer's weight, its shape (out, in), and what shows that it was changed."""
    if isinstance(source, nn.Module):
        with experts_apart(source):  # the layers of experts stay, on the memory of the fused ones
            layers = find_linears(source, include, exclude)
        reads = {n: (lambda module=m: weight_of(module).detach()) for n, m in layers.items()}
        shapes = {name: shape_of(module) for name, module in layers.items()}
        return reads, shapes, fingerprint(source)
    stored = StoredModel(source)
    stored.split_experts()
    layers = find_linears(stored.model, include, exclude)
    for name in layers:
        stored.require_weight(name)  # before anything is computed
    reads = {name: (lambda name=name: stored.weight(name)) for name in layers}
    shapes = {name: shape_of(module) for name, module in layers.items()}
    return reads, shapes, stored.fingerprint()
