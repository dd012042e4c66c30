"""Calibration statistics on disk, under a key of what they were made of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from soco.calibration import KINDS, Statistics
from soco.folders import replaced
from soco.headers import Entry, opened_tensors, read_headers, read_json

RECORD, TENSORS = "statistics.json", "statistics.safetensors"
FORMAT = 2  # 1: labels for gradients were drawn batch by batch


@dataclass(frozen=True)
class Key:
    """What statistics depend on."""

    model: str  # hash of all parameters and buffers, and their names
    config: str  # hash of the class and the configuration
    data: str  # hash of the token ids, and of how they are cut into windows and batches
    seed: int  # of drawn labels

    @property
    def folder(self) -> str:
        """The name of its folder."""
        what = f"{self.model[:16]}-{self.config[:8]}-{self.data[:16]}-{self.seed}"
        return f"{what}-{FORMAT}"


def key_of(model: nn.Module, windows: Tensor, batch_size: int, seed: int) -> Key:
    """The key of the statistics that ``calibration.collect`` makes of these."""
    data = hash_of_data(windows, batch_size)
    return Key(hash_of_model(model), hash_of_config(model), data, seed)


def hash_of_config(model: nn.Module) -> str:
    """The hash of the class and the configuration, as far as it is computed with."""
    return hashlib.sha256(_configuration(model).encode()).hexdigest()


def hash_of_model(model: nn.Module) -> str:
    """The hash of all parameters and buffers, and their names."""
    of_model = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        of_model.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        of_model.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return of_model.hexdigest()


def fingerprint(model: nn.Module) -> dict[str, str]:
    """What shows that a model in memory is another one, short; as ``StoredModel.fingerprint``."""
    return {"weights": hash_of_model(model)[:16], "config": hash_of_config(model)[:16]}


def hash_of_data(windows: Tensor, batch_size: int) -> str:
    """The hash of token ids (sequences, length), and of how they are cut into batches."""
    told = hashlib.sha256(f"{tuple(windows.shape)} {batch_size};".encode())
    told.update(windows.contiguous().numpy().data)
    return told.hexdigest()


# Entries of a configuration on which nothing depends that a model computes.
_INCIDENTAL = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}


def _configuration(model: nn.Module) -> str:
    """The class and the settings of a model, of which two may have the same weights."""
    told = getattr(getattr(model, "config", None), "to_dict", dict)
    settings: dict[str, Any] = told()
    kept = {key: value for key, value in settings.items() if key not in _INCIDENTAL}
    return f"{type(model).__name__} {json.dumps(kept, sort_keys=True, default=str)}"


def store(directory: str | PathLike[str], key: Key, statistics: Mapping[str, Statistics]) -> None:
    """Write statistics into the key's folder in ``directory``, as a whole or not at all.

    Layers that share a sum share it on disk. What the folder has of other layers stays.

    Raises:
        ValueError: what the folder has is damaged.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # address of a tensor to its name in the file
    layers = {}
    for layer, each in statistics.items():
        parts = {}
        for kind, tensor in each.parts().items():
            name = names.setdefault(tensor.data_ptr(), f"{layer}.{kind}")
            tensors[name] = tensor.detach().cpu().contiguous()
            parts[kind] = name
        layers[layer] = {"tokens": each.tokens, "sequences": each.sequences, "parts": parts}
    for layer, (described, others) in _others(Path(directory) / key.folder, layers).items():
        layers[layer] = described
        for kind, tensor in others.items():
            name = names.setdefault(tensor.data_ptr(), f"{layer}.{kind}")
            tensors[name] = tensor
            described["parts"][kind] = name
    record = {"format": FORMAT, **vars(key), "layers": layers}
    with replaced(Path(directory) / key.folder) as folder:
        save_file(tensors, folder / TENSORS)
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _others(
    folder: Path, own: Mapping[str, object]
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Layers in the folder that are not among ``own``: how they are described, and their sums."""
    if not folder.is_dir():
        return {}
    layers = read_json(folder / RECORD).get("layers", {})
    parts = {n: _parts(folder, n, each) for n, each in layers.items() if n not in own}
    if not parts:
        return {}
    entries = _entries(folder)
    read: dict[str, Tensor] = {}
    with opened_tensors(folder / TENSORS) as file:
        for name in {name for each in parts.values() for name in each.values()}:
            if name not in entries:
                raise ValueError(f"{folder / TENSORS} does not hold {name}")
            read[name] = file.get_tensor(name)
    return {
        layer: (dict(layers[layer], parts={}), {kind: read[name] for kind, name in each.items()})
        for layer, each in parts.items()
    }


def _entries(folder: Path) -> dict[str, Entry]:
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder / TENSORS} is missing")
    return read_headers([folder / TENSORS])


def fetch(
    directory: str | PathLike[str], key: Key, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Statistics] | None:
    """Read the statistics of a key: of those of the layers that it has, None if it has nothing.

    Args:
        directory: that ``store`` wrote to.
        key: of the model and data at hand.
        shapes: name to (out, in) of the layers; statistics of more layers are no harm.

    Raises:
        ValueError: what is in the folder is damaged, or of another model, data or seed than its
            name says.
    """
    folder = Path(directory) / key.folder
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"{folder} should be a folder of statistics, and is a file: remove it")
    record = read_json(folder / RECORD)
    if record.get("format") != FORMAT:
        raise ValueError(f"{folder / RECORD} is of format {record.get('format')!r}, not {FORMAT}")
    for field, value in vars(key).items():
        if record.get(field) != value:
            raise ValueError(
                f"{folder / RECORD} is of another {field} than its folder's name says: remove it"
            )
    layers = record.get("layers")
    if not isinstance(layers, dict):
        raise ValueError(f"{folder / RECORD} names no layers")
    shapes = {layer: shape for layer, shape in shapes.items() if layer in layers}
    if not shapes:
        return None
    entries = _entries(folder)
    read: dict[str, Tensor] = {}
    found = {}
    with opened_tensors(folder / TENSORS) as file:
        for layer, shape in shapes.items():
            described = layers[layer]
            parts = {}
            for kind, name in _parts(folder, layer, described).items():
                entry = entries.get(name)
                if entry is None or entry[1:] != ("F64", _sizes(shape)[kind]):
                    raise ValueError(
                        f"{folder / TENSORS} does not hold {kind} of {layer} as float64 with "
                        f"shape {list(_sizes(shape)[kind])}"
                    )
                if name not in read:
                    read[name] = file.get_tensor(name)
                parts[kind] = read[name]
            if "gram" not in parts:
                raise ValueError(f"{folder / RECORD} names no Gram matrix of {layer}")
            found[layer] = Statistics(
                tokens=described["tokens"], sequences=described["sequences"], **parts
            )
    return found


def _parts(folder: Path, layer: str, described: object) -> dict[str, str]:
    """Kind to tensor name of a layer in the record, checked."""
    if isinstance(described, dict) and described.keys() == {"tokens", "sequences", "parts"}:
        parts = described["parts"]
        counts = (described["tokens"], described["sequences"])
        whole = all(type(count) is int and count >= 0 for count in counts)
        if whole and isinstance(parts, dict) and parts.keys() <= KINDS:
            return {kind: str(name) for kind, name in parts.items()}
    raise ValueError(f"{folder / RECORD} describes {layer} as {described!r:.80}")


def _sizes(shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    outputs, inputs = shape
    return {
        "gram": (inputs, inputs),
        "mean": (inputs,),
        "abs_mean": (inputs,),
        "stacked_gram": (inputs, inputs),
        "root": (inputs, inputs),
        "fisher": (outputs, inputs),
        "grad_gram": (outputs, outputs),
        "sampled_grad_gram": (outputs, outputs),
    }
