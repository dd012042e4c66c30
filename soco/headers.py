"""What the safetensors files of a model folder say they hold, read without reading the tensors."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Bits per element of the dtypes that safetensors names.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

_MOST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
_MOST_JSON = 1_000_000_000


class Entry(NamedTuple):
    """One tensor of a safetensors file."""

    file: Path
    dtype: str  # as safetensors writes it: "F32", "BF16"
    shape: tuple[int, ...]


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        ValueError: the file is missing, not JSON, or not an object.
    """
    try:
        if not is_file(file):
            told = "is no file" if file.exists() else "is missing"
            raise ValueError(f"{file} {told}")
        if file.stat().st_size > _MOST_JSON:
            raise ValueError(f"{file} has more than {_MOST_JSON:,} bytes: nobody wrote that")
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    try:
        data = json.loads(text)
    except ValueError as error:  # of the text, of the JSON, or a number of thousands of digits
        raise ValueError(f"{file} is not JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{file} is not JSON that anyone wrote: it is nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: one, or the ones that its index names.

    Raises:
        ValueError: there are none, a file that the index names is missing, or the index is broken.
    """
    if is_file(folder / WEIGHTS):
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise ValueError(f"{folder} holds neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} places {tensor} in {name!r}, which is not a file name")
        if not is_file(folder / name):
            raise ValueError(f"{folder / name} is missing, where {index.name} places {tensor}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def is_file(path: Path) -> bool:
    """Whether there is a regular file, or a link to one as the hub's cache has them.

    No device and no pipe, which might never end.
    """
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that cannot be one
        return False


def check_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Refuse an index that tells something else than the files it names.

    Raises:
        ValueError: the index names a tensor that its file does not hold, or leaves one out.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.exists():
        return
    weight_map = read_json(index)["weight_map"]
    for tensor, name in weight_map.items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise ValueError(f"{folder / name} lacks {tensor}, which {index.name} places there")
    for tensor, entry in entries.items():
        if tensor not in weight_map:
            raise ValueError(f"{entry.file} holds {tensor}, which {index.name} does not name")


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """The tensors of several safetensors files, by name.

    Raises:
        ValueError: a file is truncated or broken, or two files hold the same tensor.
    """
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in entries:
                raise ValueError(f"{file} holds {name}, which {entries[name].file} holds, too")
            entries[name] = entry
    return entries


def _read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file: 8 bytes of length, that much JSON, then the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is truncated in its header: {size} bytes in all")
        if length > _MOST_HEADER:
            raise ValueError(f"{file} has a header of {length:,} bytes: no library reads that")
        header = stream.read(length)
    try:
        tensors = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} is not a safetensors file: its header is no JSON object")
    told = tensors.pop("__metadata__", {})
    if not (isinstance(told, dict) and all(isinstance(value, str) for value in told.values())):
        raise ValueError(f"{file} is not a safetensors file: its metadata must be text by name")
    held = size - 8 - length  # bytes of tensors
    entries, end = {}, 0
    for name, entry in sorted(tensors.items(), key=_begin):
        dtype, shape, (begin, stop) = _parts(file, name, entry)
        if begin != end or stop - begin != (prod(shape) * _BITS.get(dtype, 0) + 7) // 8:
            raise ValueError(
                f"{file} is broken: {name}, {dtype} {list(shape)}, cannot lie at "
                f"bytes {begin} to {stop}"
            )
        if stop > held:
            raise ValueError(f"{file} is truncated: {name} ends at byte {stop} of {held}")
        entries[name], end = Entry(file, dtype, shape), stop
    if end != held:
        raise ValueError(f"{file} is broken: {held - end} bytes belong to no tensor")
    return entries


@contextmanager
def opened_tensors(file: Path) -> Iterator[Any]:
    """A safetensors file whose tensors are read one by one, as ``safetensors.safe_open`` gives it.

    Raises:
        ValueError: it is broken.
    """
    try:
        with safe_open(file, "pt") as held:
            yield held
    except SafetensorError as error:
        raise ValueError(f"{file} is broken: {error}") from error


def _begin(item: tuple[str, object]) -> tuple[int, int]:
    """Where a tensor begins and ends; broken entries first, where they are refused."""
    entry = item[1]
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return (offsets[0], offsets[1]) if _are_offsets(offsets) else (-1, -1)


def _parts(file: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and offsets of one entry of a header, checked for their types."""
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(dtype, str) and _are_sizes(shape) and _are_offsets(offsets):
            if dtype not in _BITS:
                raise ValueError(f"{file} holds {name} in a dtype unknown to soco: {dtype}")
            return dtype, tuple(shape), (offsets[0], offsets[1])
    raise ValueError(f"{file} is broken: its header describes {name} as {entry!r}")


def _are_offsets(values: object) -> TypeGuard[list[int]]:
    return _are_sizes(values) and len(values) == 2


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
