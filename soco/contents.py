"""Does a model folder hold the tensors that its model needs? Answered from the files' headers."""

import importlib.util
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor

from soco.headers import INDEX, WEIGHTS, Entry, read_headers, weight_files
from soco.surgery import low_rank_layers, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG = "config.json"
PICKLED = "pytorch_model.bin"

_DOWN, _UP, _PIVOTS = ".down.weight", ".up.weight", ".pivots"
_FLOATS = ("F64", "F32", "F16", "BF16")

# What the libraries raise about a folder that is broken in one of many ways.
BROKEN = (
    OSError,
    ValueError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)

# Whether transformers renames tensors on loading and saving, as version 5 does.
_CONVERTS = importlib.util.find_spec("transformers.core_model_loading") is not None

# How configs call the number of their layers; and as many more are made before files are asked.
_LAYERS = re.compile(r"(num_|n_)?((text|vision|hidden|encoder|decoder)_)*layers?")
_SPARE = 1000

Shapes = dict[str, tuple[int, ...]]


class _Names(NamedTuple):
    """One way in which the tensors of a model may be called in its files."""

    required: Shapes
    allowed: Shapes  # more than the required: tied weights, of which one is enough


def reason_of(error: BaseException) -> str:
    """What a library says, which may be many lines, in one: the first, or else its kind."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def architecture_of(folder: Path, config: dict) -> Any:
    """The class of transformers that config.json names.

    Raises:
        ValueError: it names none, several, or one that is no model of the installed transformers.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{folder / CONFIG} must name one class in architectures, got {names!r}")
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"{folder / CONFIG} names the architecture {names[0]}, "
            f"which is not in the installed transformers"
        )
    return cls


def check_counts(file: Path, config: dict, entries: Mapping[str, Entry]) -> None:
    """Refuse a config of more layers or experts than there are tensors to fill them.

    Before any module is made: a model of a billion layers would not be refused in a lifetime.

    Args:
        file: that the config was read from.
        config: what it holds.
        entries: what the files of the model hold.

    Raises:
        ValueError: a number is too large; it is named.
    """
    tensors = len(entries)
    largest = max((size for entry in entries.values() for size in entry.shape), default=0)

    def check(node: dict, path: str, depth: int) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and depth:
                check(value, f"{path}{key}.", depth - 1)
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            most = 2**53
            if _LAYERS.fullmatch(key):
                most = tensors + _SPARE
            elif "expert" in key:
                most = max(tensors, largest) + _SPARE
            if abs(value) > most:
                raise ValueError(
                    f"{file} has {path}{key} {value:.6g}, and the files hold {tensors} tensors of "
                    f"at most {largest} in each direction"
                )

    check({key: value for key, value in config.items() if key != "quantization_config"}, "", 4)


def is_own_class(model: "PreTrainedModel") -> bool:
    """Whether ``model`` is of the class that its folder was saved from."""
    return type(model).__name__ in (model.config.architectures or ())


def find_entries(
    model: "PreTrainedModel", checkpoint_files: list[str] | None
) -> dict[str, Entry] | None:
    """The tensors in the files that are about to be loaded; None if they cannot be seen.

    Transformers 5 says which files; for 4, the folder's are taken if the model has a local one.

    Raises:
        ValueError: a file is broken, or of another format than safetensors.
    """
    if checkpoint_files is None:
        folder = Path(model.config.name_or_path or "")
        known = [name for name in (WEIGHTS, INDEX, PICKLED) if (folder / name).is_file()]
        if not known:
            return None
        pickled = known == [PICKLED]
        files = [folder / PICKLED] if pickled else weight_files(folder)
        checkpoint_files = [str(file) for file in files]
    for file in checkpoint_files:
        if not str(file).endswith(".safetensors"):
            raise ValueError(f"{file} is not safetensors, and soco reads no other weights")
    return read_headers(Path(file) for file in checkpoint_files)


def check_contents(
    model: "PreTrainedModel",
    entries: Mapping[str, Entry],
    layers: Mapping[str, Collection[str]],
    experts: Iterable[str] = (),
) -> None:
    """Refuse files that do not hold what the compressed layers of ``model`` need.

    The other tensors are checked, too, where names can be trusted: in the class that was saved, and
    with the version of transformers that wrote the folder, since others may rename on loading.

    Wherever something is missing and something else is too much, the one may become the other, as
    in models that keep the names they were first published with; transformers knows, and reports.

    Args:
        model: with its compressed layers in place, weights not loaded yet.
        entries: what the files hold.
        layers: the compressed layers in config.json, which may be more than the model has, and
            what it says of each: one with a "basis" has no ``down`` of its own.
        experts: names of the modules in ``model`` whose experts are layers of their own; all of
            their tensors are checked like compressed layers.

    Raises:
        ValueError: a tensor is missing, unknown, or of the wrong shape or dtype.
    """
    state = model.state_dict()
    places = tuple(f"{name}." for name in low_rank_layers(model))
    factors = {key: tensor for key, tensor in state.items() if key.startswith(places)}
    names = _best(_variants(model, factors, prefixes=True), entries)
    held = {key.removesuffix(_UP) for key in entries if key.endswith(_UP)}
    held &= {key.removesuffix(".weight") for key, entry in entries.items() if entry.shape == (1,)}
    if names is None or (names.required.keys() - entries and _all_there(held, layers, entries)):
        return  # all layers are there, by other names
    _check_required(names.required, entries)
    for layer in sorted(held - layers.keys()):
        key = layer + (_DOWN if layer + _DOWN in entries else _UP)
        if key not in names.required:
            raise ValueError(
                f"{entries[key].file} holds {key}, but config.json names no layer {layer}"
            )
    places = tuple(key.removesuffix(_UP) + "." for key in names.required if key.endswith(_UP))
    _check_allowed({key for key in entries if key.startswith(places)}, names.allowed, entries)
    split = tuple(f"{name}." for name in experts)
    inside = {key: tensor for key, tensor in state.items() if split and key.startswith(split)}
    names = _best(_variants(model, inside, prefixes=True), entries)
    if names is not None:
        _check_required(names.required, entries)
    version = getattr(model.config, "transformers_version", None)
    if is_own_class(model) and version == transformers.__version__:
        names = _best(_variants(model, state, prefixes=False), entries)
        if names is not None:
            _check_dense(model, names, entries)


def _all_there(
    held: Collection[str], layers: Mapping[str, Collection[str]], entries: Mapping[str, Entry]
) -> bool:
    """Whether the files hold as many layers of each kind as there should be, by any names."""
    with_down = sum(layer + _DOWN in entries for layer in held)
    with_pivots = sum(layer + _PIVOTS in entries for layer in held)
    return (
        len(held) == len(layers)
        and with_down == sum("basis" not in layer for layer in layers.values())
        and with_pivots == sum("pivoted" in layer for layer in layers.values())
    )


def _check_dense(model: "PreTrainedModel", names: _Names, entries: Mapping[str, Entry]) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    unknown = {
        key
        for key in entries.keys() - names.allowed
        if not any(re.search(pattern, key) for pattern in ignored)
    }
    missing = names.required.keys() - entries
    if not (missing and unknown):
        _check_required(names.required, entries)
        _check_allowed(unknown, names.allowed, entries)


def _check_required(required: Shapes, entries: Mapping[str, Entry]) -> None:
    for key, shape in required.items():
        if key not in entries:
            raise ValueError(
                f"{_where(entries)} lacks {key}, which the model needs with shape {list(shape)}"
            )
        file, dtype, held = entries[key]
        if held != shape:
            raise ValueError(
                f"{file} holds {key} with shape {list(held)}, but the model and config.json "
                f"need {list(shape)}"
            )
        if dtype not in _FLOATS and key.endswith((_DOWN, _UP)):
            raise ValueError(f"{file} holds {key} as {dtype}, which is no floating-point number")
        if dtype != "I64" and key.endswith(_PIVOTS):
            raise ValueError(f"{file} holds {key} as {dtype}, where I64 is needed")


def _check_allowed(keys: Iterable[str], allowed: Shapes, entries: Mapping[str, Entry]) -> None:
    for key in sorted(set(keys) - allowed.keys()):
        raise ValueError(f"{entries[key].file} holds {key}, which the model has no place for")


def _where(entries: Mapping[str, Entry]) -> str:
    """The file in which all tensors should be, or the index that names the files."""
    files = sorted({entry.file for entry in entries.values()})
    if len(files) == 1:
        return str(files[0])
    return str(files[0].parent / INDEX) if files else "the file of weights"


def _best(variants: list[_Names], entries: Mapping[str, Entry]) -> _Names | None:
    """The way of naming with the fewest tensors missing; the first of equals."""
    return min(variants, key=lambda names: len(names.required.keys() - entries), default=None)


def _variants(
    model: "PreTrainedModel", state: Mapping[str, Tensor], *, prefixes: bool
) -> list[_Names]:
    """The names that the tensors of ``state`` may have in files.

    Their own ones; with ``prefixes`` also with and without the prefix of the base model; and those
    that transformers 5 gives them on saving, where some architectures keep the names of the models
    they were first published as. Transformers 4 does that for a few, and then there is no telling.
    """
    optional = may_lack(model, state)
    required = {key: tensor for key, tensor in state.items() if key not in optional}
    own = _Names(_shapes(required), _shapes(state))
    if not _CONVERTS:
        if getattr(model, "_checkpoint_conversion_mapping", None):
            return []
        reverted = own
    else:
        reverted = _Names(_shapes(_as_saved(model, required)), _shapes(_as_saved(model, state)))
    variants = [own, reverted]
    if prefixes and model.base_model_prefix:
        prefix = f"{model.base_model_prefix}."
        variants += [
            _Names(*({prefix + key: shape for key, shape in part.items()} for part in own)),
            _Names(*({key.removeprefix(prefix): s for key, s in part.items()} for part in own)),
        ]
    return variants


def saved_as(model: "PreTrainedModel", name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a tensor of a model comes to when it is saved: by its own name, or in several parts."""
    return _as_saved(model, {name: tensor}) if _CONVERTS else {name: tensor}


def _as_saved(model: "PreTrainedModel", state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that transformers 5 saves them by."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def saved_name(model: "PreTrainedModel", name: str, tensor: Tensor) -> str:
    """What a tensor of a model may be called in files, if it has another name there.

    Its own name where it has none, or where it is saved as several tensors.
    """
    found = list(saved_as(model, name, tensor).items())
    same = len(found) == 1 and found[0][1].shape == tensor.shape
    return found[0][0] if same else name


def _shapes(state: Mapping[str, Tensor]) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def may_lack(model: "PreTrainedModel", state: Mapping[str, Tensor]) -> set[str]:
    """Names that a file may lack: tied to others, never saved, or made anew on loading."""
    ties = getattr(model, "all_tied_weights_keys", None)
    patterns = list(model._keys_to_ignore_on_load_missing or ())
    needed = None
    if ties is None:  # transformers 4 knows patterns only, whether anything is tied or not
        for module in model.modules():
            patterns += getattr(module, "_tied_weights_keys", None) or ()
        if not model.config.get_text_config(decoder=True).tie_word_embeddings:
            needed = f"{output_head(model)}.weight"
    optional = {key for key in state if any(re.search(pattern, key) for pattern in patterns)}
    optional |= set(ties or ()) | set(model._keys_to_ignore_on_save or ())
    return optional - {needed}
