"""What users call a model, a text or a folder to write -> the thing itself, or why not."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from soco.checkpoint import CONFIG, is_compressed, load
from soco.cli.messages import sentence
from soco.contents import BROKEN, check_counts
from soco.headers import INDEX, WEIGHTS, is_file, read_headers, read_json, weight_files
from soco.ops import all_finite

DEMO = "demo"  # the name under which the shipped model and its text are known
DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
DEMO_TEXT = DEMO_MODEL / "a-scandal-in-bohemia.txt"


def find_model(name: str) -> str:
    """A folder, as its path, or the id of a model on the hub, which may exist or not.

    Raises:
        ValueError: it is a path, and no folder of a model is there.
    """
    if name == DEMO:
        return str(DEMO_MODEL)
    path = Path(name).expanduser()
    if name and path.is_dir():
        if not (path / CONFIG).is_file():
            raise ValueError(f"{name} is no model: it has no {CONFIG}")
        return str(path)
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder of a model, or its id on the hub")
    looks_like_path = name.startswith((".", "~", os.sep)) or name.count("/") > 1 or "\\" in name
    if looks_like_path or not name:
        raise ValueError(f"there is no folder {name!r}")
    return name


def find_text(name: str) -> Path:
    """The file of a text; "demo" is the one that is shipped.

    Raises:
        ValueError: there is no such file.
    """
    path = DEMO_TEXT if name == DEMO else Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {name!r}")
    if not path.stat().st_size:
        raise ValueError(f"the file {name!r} is empty")
    return path


def find_device(name: str | None) -> torch.device:
    """A device of torch; None is CUDA where there is such a device, else the CPU.

    Raises:
        ValueError: torch does not know it, or cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {sentence(error)}") from error
    return device


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU computes in this half precision many times slower than in float32.

    Without AVX-512 an x86 CPU multiplies such matrices some 30 times slower
    (benchmarks/half_precision.py). Few have arithmetic for float16 at all.
    """
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    capability = torch.backends.cpu.get_cpu_capability()
    return dtype == torch.float16 or (
        dtype == torch.bfloat16 and not capability.startswith("AVX512")
    )


def computes_wide(stored: torch.dtype, device: torch.device, tell: Callable[[str], None]) -> bool:
    """Whether a model is better computed in float32 here than as it is stored, which is told."""
    if not is_slow(stored, device):
        return False
    name = str(stored).removeprefix("torch.")
    tell(f"computing in float32: this CPU is slow in {name}, which the model is stored in")
    return True


def check_output(path: Path, *, replace: bool) -> None:
    """Find out before any work whether a folder can be written.

    Args:
        path: of the folder.
        replace: whether a model compressed by soco may be there, which is then replaced.

    Raises:
        ValueError: something is there, or nothing can be put there.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: choose another folder for the output")
    if path.is_dir() and any(path.iterdir()) and not (replace and is_compressed(path)):
        what = "is not the folder of a model compressed by soco" if replace else "is not empty"
        raise ValueError(f"{path} exists and {what}: choose another folder for the output")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Refuse a folder, there already or not, in which nothing can be written.

    Raises:
        ValueError: it is a file, or cannot be written in.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and should be a folder")
    if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: there is no permission")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {parent} is not a folder to write in")


def open_model(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load any model, dense or compressed by soco, as the class that it was saved as.

    Args:
        name: a folder, an id on the hub, or "demo".
        dtype: of the weights as torch calls it; "auto" is as stored.
        device: where to put it.

    Raises:
        ValueError: it cannot be loaded, or not all of it; in one sentence with the reason.
    """
    place = find_model(name)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    if Path(place).is_dir() and is_compressed(Path(place)):
        model = load(place, dtype=wanted)
    else:
        model = _load_dense(name, place, wanted)
    return model.to(device)  # type: ignore[arg-type]


def open_dense(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load a model that is to be compressed.

    Raises:
        ValueError: as ``open_model``, or it is quantized or compressed already.
    """
    place = find_model(name)
    described = getattr(_config(name, place), "quantization_config", None)
    if described is not None:
        method = described.get("quant_method") if isinstance(described, dict) else "another method"
        raise ValueError(f"{name} is quantized or compressed already ({method}): start from dense")
    return open_model(name, dtype, device)


def open_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        ValueError: there is none, or it cannot be loaded.
    """
    place = find_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except BROKEN as error:
        raise ValueError(f"{name} has no tokenizer that loads: {_reason(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError(f"{name} has no tokenizer")  # made from the model's type, and empty
    return tokenizer


def _config(name: str, place: str) -> Any:
    try:
        return AutoConfig.from_pretrained(place)
    except BROKEN as error:
        there = "" if Path(place).is_dir() else " is no folder here, and from the hub it"
        raise ValueError(f"{name}{there} cannot be loaded: {_reason(error)}") from error


def _load_dense(name: str, place: str, dtype: Any) -> PreTrainedModel:
    names = getattr(_config(name, place), "architectures", None)
    cls = None
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        cls = getattr(transformers, names[0], None)
    if not hasattr(cls, "from_pretrained"):
        cls = AutoModelForCausalLM
    try:
        if Path(place).is_dir():
            _check_counts(Path(place))
        model, info = cls.from_pretrained(  # type: ignore[union-attr]
            place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except BROKEN as error:
        raise ValueError(f"{name} cannot be loaded: {_reason(error)}") from error
    for key, problem in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        keys = sorted(entry if isinstance(entry, str) else entry[0] for entry in info[key])
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise ValueError(f"{name} {problem} {keys[0]}{more}, which its config asks for")
    _check_finite(name, model)
    return model


def _check_counts(folder: Path) -> None:
    """Refuse a config of more layers than the files can fill, if they can be seen."""
    has_safetensors = is_file(folder / WEIGHTS) or is_file(folder / INDEX)
    entries = read_headers(weight_files(folder)) if has_safetensors else {}
    check_counts(folder / CONFIG, read_json(folder / CONFIG), entries)


def _check_finite(name: str, model: nn.Module) -> None:
    for key, tensor in model.named_parameters():
        if tensor.is_floating_point() and not all_finite(tensor):
            raise ValueError(f"{name} is broken: {key} {tuple(tensor.shape)} holds NaN or Inf")


def _reason(error: BaseException) -> str:
    """What a library says, as the end of a sentence."""
    return sentence(error).rstrip(".")
