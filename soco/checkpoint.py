"""Read and write the folder of a compressed model: an ordinary Hugging Face folder."""

import copy
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from soco.contents import BROKEN, architecture_of, check_counts, reason_of
from soco.contents import CONFIG as CONFIG
from soco.experts import find_experts
from soco.folders import SPECTRUM, carry_over, replaced, write_checksums
from soco.headers import INDEX, check_index, read_headers, read_json, weight_files
from soco.modules import LowRankLinear, PivotedLinear
from soco.optimization import optimize as make_fast
from soco.packing import check_whole
from soco.plugin import QUANT_METHOD, SocoConfig, SocoQuantizer, check_ties
from soco.plugin import register as register
from soco.surgery import low_rank_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Tokenizer(Protocol):
    """Whatever can write itself into a folder."""

    def save_pretrained(self, save_directory: str, /) -> object:
        """Write the files."""
        ...


def mark_compressed(
    model: "PreTrainedModel",
    layers: Mapping[str, int],
    report: Mapping[str, Any] | None = None,
    new_biases: Collection[str] = (),
) -> None:
    """Tell transformers that ``model`` is compressed, so that it saves, trains and adapts as such.

    After this ``model.save_pretrained`` writes a folder that loads again, ``Trainer`` and peft work
    on the factors, and ``model.dequantize()`` makes the model dense.

    Args:
        model: with its compressed layers in place. Which of them are pivoted, and which use the
            basis of another one, is seen there.
        layers: name to rank of every one of them.
        report: how it was compressed, as plain JSON data; goes into config.json as it is.
        new_biases: names of the layers that have a bias though the stock layer has none.

    Raises:
        ValueError: ``layers`` are not the compressed layers of the model, a layer uses the basis of
            one that is not in the model, the report is not JSON, or a compressed head is still tied
            to the embeddings.
    """
    found = _describe(model)
    ranks = {name: layer["rank"] for name, layer in found.items()}
    for name in found.keys() | layers.keys():
        if ranks.get(name) != layers.get(name):
            raise ValueError(
                f"layer {name} has rank {layers.get(name, 'none')} in layers, "
                f"but {ranks.get(name, 'is not compressed')} in the model"
            )
    try:
        report = None if report is None else json.loads(json.dumps(report, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the report is not plain JSON: {error}") from error
    described = {
        name: {**layer, "bias": True} if name in new_biases else layer
        for name, layer in found.items()
    }
    config = SocoConfig(described, report, experts=list(find_experts(model)))
    check_ties(model, found)
    register()
    model.config.quantization_config = config
    model.hf_quantizer = SocoQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._is_quantized = True  # type: ignore[union-attr]


def save(
    model: "PreTrainedModel",
    directory: str | PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_size: int | str | None = None,
    spectrum: bool = True,
) -> None:
    """Write a compressed model as ``model.save_pretrained`` does, as a whole or not at all.

    The files are written into a folder beside ``directory``, which then takes its place. A crash
    on the way leaves what was there. A model that was compressed for several ratios is written with
    the spectrum that ``soco.resize`` makes the others of (``model.soco_spectrum``).

    Args:
        model: compressed.
        directory: new, empty, or the folder of a model compressed by soco, which is replaced; of
            its files the ones that are not written anew (a tokenizer's, say) are kept.
        tokenizer: written into the same folder.
        max_shard_size: bytes, or text such as "5GB"; larger models are split into several files.
        spectrum: whether what ``soco.resize`` needs is written, too, where the model has it.

    Raises:
        ValueError: the model is not compressed, an adapter sits in a layer, or ``directory`` holds
            something else.
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, SocoConfig):
        raise ValueError(
            "the model is not compressed by soco: model.save_pretrained(directory) writes it"
        )
    _check_layers(model, config)
    target = Path(directory)
    check_replaceable(target)
    options: dict[str, Any] = {}
    if max_shard_size is not None:
        options["max_shard_size"] = max_shard_size
    with replaced(target) as folder:
        model.save_pretrained(str(folder), **options)
        held = getattr(model, "soco_spectrum", None)
        if spectrum and held is not None:
            held.save(folder / SPECTRUM, model.dtype)
        write_checksums(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))


def check_replaceable(target: Path) -> None:
    """Refuse to write a model where something else is.

    Raises:
        ValueError: ``target`` is neither new, nor empty, nor the folder of a model compressed by
            soco.
    """
    if _is_occupied(target):
        described = _description(target)
        if described is None or described.get("quant_method") != QUANT_METHOD:
            raise ValueError(
                f"{target} exists and is not the folder of a model compressed by soco: "
                f"choose another folder"
            )


def is_compressed(folder: Path) -> bool:
    """Whether a folder says of itself that soco compressed what is in it.

    Raises:
        ValueError: its config.json cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return False
    described = read_json(folder / CONFIG).get("quantization_config")
    return isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD


def load(
    directory: str | PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict | torch.device | int | None = None,
    optimize: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """Load a compressed model as the class that was saved, and refuse a folder with any defect.

    Plain ``from_pretrained`` of transformers loads the same folder. This needs no knowledge of the
    class, and checks what transformers lets pass with a warning.

    Args:
        directory: a folder written by soco or by ``save_pretrained`` of a compressed model.
        dtype: of the weights; "auto" is as stored.
        device_map: where the weights go, as in ``from_pretrained``.
        optimize: whether to make it ready to run, with ``soco.optimize``.
        options: passed on to ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the folder is not one of soco's, or something is missing, unknown, truncated or
            of the wrong shape; the message names the file and the tensor.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    config = read_json(folder / CONFIG)
    described = config.get("quantization_config")
    if not isinstance(described, dict) or described.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{folder / CONFIG} does not describe a model compressed by soco: it has no "
            f'quantization_config of quant_method "{QUANT_METHOD}"'
        )
    SocoConfig.from_dict(described)
    entries = read_headers(weight_files(folder))
    check_index(folder, entries)
    check_counts(folder / CONFIG, config, entries)
    cls = architecture_of(folder, config)
    register()
    try:
        model, info = cls.from_pretrained(
            str(folder), dtype=dtype, device_map=device_map, output_loading_info=True, **options
        )
    except (ValueError, torch.OutOfMemoryError):
        raise
    except BROKEN as error:
        raise ValueError(f"{folder} cannot be loaded: {reason_of(error)}") from error
    for key, problem in (("missing_keys", "lacks"), ("unexpected_keys", "holds unknown")):
        if info[key]:
            raise ValueError(f"{folder} {problem} {', '.join(sorted(info[key])[:3])}")
    return make_fast(model) if optimize else model


def export_dense(
    model: "PreTrainedModel | str | PathLike[str]",
    directory: str | PathLike[str],
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write a compressed model as the stock dense one, which loads without soco.

    The layers become the products of their factors, rounded to their dtype: the size of the
    original, with the accuracy of the compressed model.

    Args:
        model: compressed, in memory (not changed; a copy of it and the dense weights are held
            meanwhile), or its folder, of which the tokenizer's and other files are copied.
        directory: new or empty.
        tokenizer: written into the same folder.

    Raises:
        ValueError: the model is not compressed, a layer has a bias that the stock layer has not,
            weights are offloaded, or ``directory`` holds something.
    """
    target = Path(directory)
    if _is_occupied(target):
        raise ValueError(f"{target} exists and is not empty: choose another folder")
    source = None
    if isinstance(model, str | PathLike):
        source = Path(model)
        dense = load(source)
    else:
        if not isinstance(getattr(model.config, "quantization_config", None), SocoConfig):
            raise ValueError("the model is not compressed by soco")
        check_whole(model)
        for name, tensor in model.state_dict().items():
            if tensor.is_meta:
                raise ValueError(f"{name} is offloaded: export from the model's folder instead")
        dense = copy.deepcopy(model)
    described = cast(SocoConfig, dense.config.quantization_config)
    for name, layer in described.layers.items():
        if layer.get("bias"):
            raise ValueError(f"{name} has a bias, for which the stock model has no place")
    dense = SocoQuantizer(SocoConfig()).dequantize(dense)
    with replaced(target) as folder:
        dense.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        if source is not None:
            carry_over(source, folder)


def _describe(model: "PreTrainedModel") -> dict[str, dict[str, Any]]:
    """What config.json says of each compressed layer, but for biases."""
    layers = low_rank_layers(model)
    names = {layer: name for name, layer in layers.items()}
    described: dict[str, dict[str, Any]] = {name: {"rank": m.rank} for name, m in layers.items()}
    for name, layer in layers.items():
        if isinstance(layer, PivotedLinear):
            described[name]["pivoted"] = True
        if isinstance(layer, LowRankLinear) and layer.basis is not None:
            if layer.basis not in names:
                raise ValueError(f"layer {name} uses the basis of a layer that is not in the model")
            described[name]["basis"] = names[layer.basis]
    return described


def _check_layers(model: "PreTrainedModel", config: SocoConfig) -> None:
    """Refuse to write a model whose layers are not what its config says."""
    for name in {*config.experts} ^ find_experts(model).keys():
        where = "config" if name in config.experts else "model"
        raise ValueError(f"the experts {name} are split in the {where} only: mark_compressed")
    check_whole(model)
    found = _describe(model)
    for name, layer in config.layers.items():
        if name not in found or found[name]["rank"] != layer["rank"]:
            raise ValueError(f"layer {name} of rank {layer['rank']} is in the config only")
        for field, what in (("pivoted", "pivoted"), ("basis", "a layer that shares a basis")):
            if found[name].get(field) != layer.get(field):
                raise ValueError(
                    f"layer {name} is {what} in the model or in the config only: mark_compressed"
                )
    for name, layer in low_rank_layers(model).items():
        if name not in config.layers:
            raise ValueError(f"the compressed layer {name} is not in the config: mark_compressed")
        for child, factor in layer.named_children():
            if type(factor) is not nn.Linear:
                kind = f"{type(factor).__module__}.{type(factor).__qualname__}"
                raise ValueError(f"{name}.{child} is a {kind}: merge or remove it before saving")


def _is_occupied(path: Path) -> bool:
    """Whether something is there already that writing would touch."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _description(folder: Path) -> dict[str, Any] | None:
    """``quantization_config`` of a folder's config.json, None if there is no such thing."""
    try:
        described = read_json(folder / CONFIG).get("quantization_config")
    except (ValueError, NotADirectoryError):
        return None
    return described if isinstance(described, dict) else None


def write_shards(
    folder: Path,
    parts: Sequence[Sequence[str]],
    tensors_of: Callable[[str], Mapping[str, Tensor]],
    on_file: Callable[[int], None] = lambda done: None,
) -> None:
    """Write tensors file by file, and the index of them; one file is in memory at a time.

    Args:
        folder: to write into.
        parts: what each file holds, by any names.
        tensors_of: such a name to the tensors that are written, by theirs.
        on_file: called with the number of files done.
    """
    places, total = {}, 0
    for done, part in enumerate(parts, 1):
        file = f"model-{done:05}-of-{len(parts):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in part:
            tensors |= tensors_of(name)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        on_file(done)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
