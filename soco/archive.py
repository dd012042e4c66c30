"""Calibration statistics on disk, under a key of what they were made of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from soco.calibration import KINDS, Statistics
from soco.folders import replaced
from soco.headers import read_headers, read_json

RECORD, TENSORS = "statistics.json", "statistics.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Key:
    """What statistics depend on."""

    model: str  # hash of all parameters and buffers, and their names
    data: str  # hash of the token ids, and of how they are cut into windows and batches
    seed: int  # of drawn labels

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return f"{self.model[:16]}-{self.data[:16]}-{self.seed}"


def key_of(model: nn.Module, windows: Tensor, batch_size: int, seed: int) -> Key:
    """The key of the statistics that ``calibration.collect`` makes of these."""
    of_model = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        of_model.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        of_model.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    of_data = hashlib.sha256(f"{tuple(windows.shape)} {batch_size};".encode())
    of_data.update(windows.contiguous().numpy().data)
    return Key(of_model.hexdigest(), of_data.hexdigest(), seed)


def store(directory: str | PathLike[str], key: Key, statistics: Mapping[str, Statistics]) -> None:
    """Write statistics into the key's folder in ``directory``, as a whole or not at all.

    Layers that share a sum share it on disk.
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
    record = {"format": FORMAT, **vars(key), "layers": layers}
    with replaced(Path(directory) / key.folder) as folder:
        save_file(tensors, folder / TENSORS)
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def fetch(
    directory: str | PathLike[str], key: Key, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, Statistics] | None:
    """Read the statistics of a key, or None where there are none for these layers.

    Args:
        directory: that ``store`` wrote to.
        key: of the model and data at hand.
        shapes: name to (out, in) of the layers; statistics of more layers are no harm.

    Raises:
        ValueError: what is in the folder is damaged, or of another model, data or seed than its
            name says.
    """
    folder = Path(directory) / key.folder
    if not folder.is_dir():
        return None
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
    if not shapes.keys() <= layers.keys():
        return None
    entries = read_headers([folder / TENSORS])
    read: dict[str, Tensor] = {}
    found = {}
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            for layer, shape in shapes.items():
                described = layers[layer]
                parts = {}
                for kind, name in _parts(folder, layer, described).items():
                    if name not in entries or entries[name].shape != _sizes(shape)[kind]:
                        raise ValueError(
                            f"{folder / TENSORS} does not hold {kind} of {layer} with shape "
                            f"{list(_sizes(shape)[kind])}"
                        )
                    if name not in read:
                        read[name] = file.get_tensor(name)
                    parts[kind] = read[name]
                if "gram" not in parts:
                    raise ValueError(f"{folder / RECORD} names no Gram matrix of {layer}")
                found[layer] = Statistics(
                    tokens=described["tokens"], sequences=described["sequences"], **parts
                )
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is broken: {error}") from error
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
        "abs_mean": (inputs,),
        "stacked_gram": (inputs, inputs),
        "root": (inputs, inputs),
        "fisher": (outputs, inputs),
        "grad_gram": (outputs, outputs),
    }
