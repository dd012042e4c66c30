"""A dense model that stays in its folder: its modules, and its weights when they are wanted."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn

from soco.contents import (
    BROKEN,
    CONFIG,
    architecture_of,
    check_counts,
    may_lack,
    reason_of,
    saved_as,
    saved_name,
)
from soco.experts import split_experts
from soco.headers import Entry, check_index, opened_tensors, read_headers, read_json, weight_files
from soco.memory import bound_caches
from soco.ops import check_finite
from soco.surgery import layout_of

# The floating dtypes of torch by the names that safetensors has for them.
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class _Parts(NamedTuple):
    """What a tensor is made of: parts one below the other, of which some are turned."""

    keys: tuple[tuple[str, int | None], ...]  # in the files; of which entry, None: of all
    transposed: bool
    shape: tuple[int, ...]


def _rows_in(part: Tensor, *, weights: bool) -> range:
    """Which rows a part of numbered rows has, if they are whole and in their order; else none."""
    columns = (part[..., 0], part[..., -1]) if weights else (part,)
    first = int(columns[0].flatten()[0]) if part.numel() else 0
    found = range(first, first + columns[0].numel())
    ordered = torch.tensor(found, dtype=torch.long)
    return found if all(torch.equal(each.flatten(), ordered) for each in columns) else range(0)


class StoredModel:
    """A transformers model whose parameters lie in safetensors files and are read one by one.

    Attributes:
        folder: where it lies.
        model: the model in evaluation mode, its parameters on the meta device. Buffers that are
            computed (rotary frequencies, masks) or stored are there.
        dtype: of its parameters, as config.json has it, or else as the files do.
        entries: every tensor in the files.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        """Read config and headers, no tensor.

        Raises:
            ValueError: there is no such folder, something in it is broken or missing, it describes
                no model of transformers, or one that is quantized or compressed.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder} is not a folder")
        self.files = weight_files(self.folder)
        self.entries: Mapping[str, Entry] = read_headers(self.files)
        check_index(self.folder, self.entries)
        self.model, self.dtype = self._empty()
        self._state = self.model.state_dict()
        self._prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        self._parts: dict[str, _Parts] = {}  # tensors that are no one tensor of the files
        self._read_buffers()

    def key(self, name: str) -> str | None:
        """What a tensor of the model is called in the files; None if they do not hold it.

        Its own name, with the base model's prefix or without, or the one that transformers saves it
        by. What has to be made of several tensors, or of a part of one, goes by its own name.
        """
        if name in self._parts:
            return name
        found = self._variant(name)
        if found is None and name in self._state:
            found = saved_name(self.model, name, self._state[name])
        return found if found in self.entries else None

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of what ``key`` gave."""
        return self._parts[key].shape if key in self._parts else self.entries[key].shape

    def split_experts(self) -> dict[str, nn.Module]:
        """Put layers in the place of fused experts, whose weights are read one by one.

        From the first time on this process keeps few of oneDNN's kernels (``memory.bound_caches``).

        Returns:
            Name to the fused module that stood there, for ``experts.join_experts``.

        Raises:
            ValueError: the files hold the experts in a way that is not known.
        """
        state = self._state
        found = split_experts(self.model)
        if found:
            bound_caches()
        self._state = self.model.state_dict()
        for name, fused in found.items():
            transposed = bool(getattr(fused, "is_transposed", False))
            for leaf in fused._parameters:
                whole = state.get(f"{name}.{leaf}")
                if whole is not None:
                    self._parts |= self._of_experts(name, leaf, whole, transposed)
        return found

    def sources(self, prefix: str) -> list[str]:
        """The keys in the files of all that is made of parts and whose name begins like that."""
        parts = [parts for name, parts in self._parts.items() if name.startswith(prefix)]
        return sorted({key for each in parts for key, _ in each.keys})

    def check_complete(self) -> None:
        """Refuse files that lack a tensor of the model.

        Raises:
            ValueError: they do, and it is neither tied to another one nor made anew on loading.
        """
        missing = may_lack(self.model, self._state)
        for name, tensor in self._state.items():
            if name not in missing:
                self.require(name, tuple(tensor.shape))

    def require(self, name: str, shape: tuple[int, ...]) -> str:
        """The same of a tensor that has to be there.

        Raises:
            ValueError: it is not, or in another shape.
        """
        key = self.key(name)
        if key is None or self.shape(key) != shape:
            raise ValueError(
                f"{self.folder} holds no {name} of shape {shape}, which its model has: load the "
                f"model, and give that instead of the folder"
            )
        return key

    def read(self, key: str, *, floating: bool = True) -> Tensor:
        """A tensor of the files as it is stored, mapped into memory.

        Args:
            key: its name there.
            floating: whether it has to be of a floating-point dtype.

        Raises:
            ValueError: it is of another dtype.
        """
        if key in self._parts:
            return self._assembled(self._parts[key])
        entry = self.entries[key]
        if floating and entry.dtype not in _FLOATS:
            raise ValueError(f"{entry.file} holds {key} in {entry.dtype}, which is no float")
        with opened_tensors(entry.file) as file:
            return file.get_tensor(key)

    def weight(self, name: str) -> Tensor:
        """The weight (out, in) of a linear layer as it is stored, mapped into memory.

        Raises:
            ValueError: the files do not hold it, or not as a float.
        """
        module = self.model.get_submodule(name)
        weight = self.read(self.require_weight(name))
        return weight.mT if layout_of(module) == "conv1d" else weight

    def require_weight(self, name: str) -> str:
        """``require`` for the weight of a layer."""
        weight = cast(Tensor, self.model.get_submodule(name).weight)
        return self.require(f"{name}.weight", tuple(weight.shape))

    def fingerprint(self) -> dict[str, str]:
        """What shows that a model was changed: config, headers, and sizes and times of files."""
        config = hashlib.sha256((self.folder / CONFIG).read_bytes()).hexdigest()
        found = {CONFIG: config[:16]}
        for file in self.files:
            told = file.stat()
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = hashlib.sha256(stream.read(length)).hexdigest()
            found[file.name] = f"{told.st_size} bytes, {header[:16]}, written at {told.st_mtime_ns}"
        return found

    @contextmanager
    def in_memory(
        self, names: Iterable[str], dtype: torch.dtype, device: torch.device
    ) -> Iterator[None]:
        """Inside, some parameters have their values; afterwards they are empty again.

        Args:
            names: of parameters of the model.
            dtype: of the values.
            device: to put them on.

        Raises:
            ValueError: a parameter is not in the files, or holds NaN or Inf; it is named.
        """
        empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}  # several where it is tied
        for module in self.model.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((module, leaf))
        try:
            for name in names:
                parameter = self.model.get_parameter(name)
                value = self.read(self.require(name, tuple(parameter.shape)))
                check_finite(name, value)
                filled = nn.Parameter(value.to(device, dtype), requires_grad=False)
                for module, leaf in places[parameter]:
                    empty.append((module, leaf, parameter))
                    module._parameters[leaf] = filled
            yield
        finally:
            for module, leaf, parameter in empty:
                module._parameters[leaf] = parameter

    # Experts --------------------------------------------------------------------------------------

    def _variant(self, name: str) -> str | None:
        """A name as it is in the files, with the base model's prefix or without."""
        variants = (name, f"{self._prefix}{name}", name.removeprefix(self._prefix))
        return next((key for key in variants if key in self.entries), None)

    def _of_experts(
        self, name: str, leaf: str, whole: Tensor, transposed: bool
    ) -> dict[str, "_Parts"]:
        """What the layers of all experts are made of, for one of their fused parameters.

        Transformers says what it saves the parameter as. It is given one in which every row has a
        number, so that what comes out tells which rows of which expert it has.
        """
        experts, rows = whole.shape[:2]
        numbers = torch.arange(experts * rows).view(experts, rows, *(1,) * (whole.dim() - 2))
        found: list[list[tuple[int, str, int | None]]] = [[] for _ in range(experts)]
        for saved, part in saved_as(
            self.model, f"{name}.{leaf}", numbers.expand(whole.shape)
        ).items():
            key = self._variant(saved)
            if key is None or self.entries[key].shape != tuple(part.shape):
                raise self._unknown(name, saved, tuple(part.shape))
            held = _rows_in(part, weights=whole.dim() == 3)
            expert, first = divmod(held.start, rows)
            if len(held) == experts * rows and part.dim() == whole.dim():
                for expert in range(experts):
                    found[expert].append((0, key, expert))
            elif held and first + len(held) <= rows:
                found[expert].append((first, key, None))
            else:
                raise self._unknown(name, saved, tuple(part.shape))
        for parts in found:
            held = [self.entries[key].shape[0] for _, key, index in parts if index is None]
            if sum(held) != rows and (held or not parts):
                raise self._unknown(name, leaf, tuple(whole.shape))
        kind = "bias" if leaf.endswith("_bias") else "weight"
        turned = transposed and kind == "weight"
        shape = tuple(whole.shape[1:])[:: -1 if turned else 1]
        return {
            f"{name}.{expert}.{leaf.removesuffix('_bias')}.{kind}": _Parts(
                tuple((key, index) for _, key, index in sorted(found[expert])), turned, shape
            )
            for expert in range(experts)
        }

    def _unknown(self, name: str, key: str, shape: tuple[int, ...]) -> ValueError:
        return ValueError(
            f"{self.folder} holds no {key} of shape {shape}, of which the experts {name} would be "
            f"made: load the model, and give that instead of the folder"
        )

    def _assembled(self, parts: "_Parts") -> Tensor:
        """A tensor made of its parts."""
        found = []
        for key, index in parts.keys:
            with opened_tensors(self.entries[key].file) as file:
                if index is None:
                    found.append(file.get_tensor(key))
                else:
                    found.append(file.get_slice(key)[index])
        whole = found[0] if len(found) == 1 else torch.cat(found)
        return whole.mT if parts.transposed else whole

    def _read_buffers(self) -> None:
        """Buffers that are saved with the model; those that are not were computed."""
        for name, buffer in self.model.named_buffers():
            key = self.key(name) if name in self._state else None
            if key is not None:
                buffer.copy_(self.read(self.require(name, tuple(buffer.shape)), floating=False))

    def _empty(self) -> tuple[Any, torch.dtype]:
        return empty_model(self.folder, self.entries, self._dtype_of_files)

    def _dtype_of_files(self) -> torch.dtype:
        kinds = (_FLOATS.get(entry.dtype) for entry in self.entries.values())
        return next((kind for kind in kinds if kind is not None), torch.float32)


def empty_model(
    folder: Path,
    entries: Mapping[str, Entry],
    usual_dtype: Callable[[], torch.dtype],
    *,
    compressed: bool = False,
) -> tuple[Any, torch.dtype]:
    """The model that a folder's config.json describes, in evaluation mode and without values.

    Its parameters are on the meta device; buffers that are computed are there.

    Args:
        folder: holds config.json.
        entries: every tensor in its files; empty where there are none.
        usual_dtype: tells the dtype of the parameters where config.json does not.
        compressed: whether it may be that of a compressed model; its layers are dense here.

    Returns:
        The model, and the dtype of its parameters.

    Raises:
        ValueError: it describes no model of transformers, or one that is quantized or compressed.
    """
    described = read_json(folder / CONFIG)
    if described.get("quantization_config") is not None and not compressed:
        raise ValueError(f"{folder} is quantized or compressed already: start from dense")
    check_counts(folder / CONFIG, described, entries)
    kind = architecture_of(folder, described)
    usual = torch.get_default_dtype()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        dtype = getattr(config, "dtype", None) or usual_dtype()
        torch.set_default_dtype(dtype)
        with init_empty_weights(include_buffers=False):
            model = kind(config)
        model.tie_weights()
    except BROKEN as error:
        raise ValueError(f"{folder / CONFIG} describes no model: {reason_of(error)}") from error
    finally:
        torch.set_default_dtype(usual)
    return model.eval(), cast(torch.dtype, dtype)
