"""The transformers plug-in: makes ``from_pretrained`` build, check and load a compressed model."""

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from soco.contents import check_contents, find_entries, is_own_class
from soco.experts import Experts, find_experts, fuse_experts, is_fused, split_experts
from soco.headers import Entry, opened_tensors
from soco.modules import CompressedLinear, LowRankLinear, PivotedLinear, share_basis
from soco.surgery import (
    bias_of,
    is_linear,
    low_rank_layers,
    output_head,
    replace_module,
    replace_modules,
    shape_of,
)

if TYPE_CHECKING:  # importing it here for good would be a cycle: the plug-in registers before it
    from transformers import PreTrainedModel

FORMAT_VERSION = 2  # the newest; a folder says the oldest that has all it uses
QUANT_METHOD = "soco"

_FIELDS = ("quant_method", "format_version", "layers", "report", "experts")
_LAYER_FIELDS = ("rank", "bias", "pivoted", "basis")
_SINCE_2 = ("pivoted", "basis")


class SocoConfig(QuantizationConfigMixin):
    """What ``quantization_config`` in config.json says of a compressed model.

    Args:
        layers: name of a compressed layer to ``{"rank": rank}``, and ``"bias": true`` where it has
            a bias that the stock layer has not, ``"pivoted": true`` where it is a
            ``PivotedLinear``, ``"basis": name`` where it uses the ``down`` of the layer of that
            name; the other layers are dense.
        report: how the model was compressed (``soco.Report`` as plain JSON), or None.
        format_version: of the folder; None: the oldest that has all that is used.
        quant_method: "soco".
        experts: names of the modules whose experts are stored as layers of their own.

    Raises:
        ValueError: a field is unknown or holds what it cannot mean.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        report: Mapping[str, Any] | None = None,
        format_version: int | None = None,
        quant_method: str = QUANT_METHOD,
        experts: Iterable[str] = (),
        **unknown: object,
    ) -> None:
        """Check every field; the class keeps plain dicts."""
        self.quant_method = cast(QuantizationMethod, quant_method)
        self.layers = {} if layers is None else layers
        self.experts = experts
        needed = _needed(self.layers, experts)
        self.format_version = needed if format_version is None else format_version
        self.report = report
        _check_fields({**self.__dict__, **unknown})
        self.layers = {name: dict(layer) for name, layer in self.layers.items()}
        self.report = None if report is None else dict(report)
        self.experts = list(experts)

    @classmethod
    def from_dict(cls, config_dict, return_unused_kwargs=False, **kwargs):
        """Read the object in config.json, which has to have every field but the report."""
        _check_fields(config_dict)
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: experts only where there are any."""
        described = super().to_dict()
        return described if self.experts else {k: v for k, v in described.items() if k != "experts"}


class SocoQuantizer(HfQuantizer):
    """Builds the compressed layers of a model before its weights are loaded."""

    requires_calibration = True  # nothing is compressed while loading

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """The factors are ordinary parameters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """So that Trainer takes the model without an adapter."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Nothing in a compressed layer breaks a graph, but sending tokens to experts does."""
        return not cast(SocoConfig, self.quantization_config).experts

    def is_serializable(  # type: ignore[override]
        self, *args: object, **kwargs: object
    ) -> bool:
        """The state dict is what belongs into the files."""
        return True

    def _process_model_before_weight_loading(  # type: ignore[override]
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: object
    ) -> "PreTrainedModel":
        config = cast(SocoConfig, self.quantization_config)
        entries = find_entries(model, checkpoint_files)
        named = list(config.layers)
        layers, skeletons = {}, {}
        self._twins: dict[str, str] = {}
        check_ties(model, named)
        config.experts = _split(model, config, entries)
        places = _places(model, config.layers)
        sharing = _sharing(config.layers)
        for name, layer in config.layers.items():
            place = places[name]
            if place is not None:
                new = _skeleton(model, place, name, layer, shared=name in sharing)
                if isinstance(new, PivotedLinear):
                    new.pivots = _stored_pivots(entries or {}, f"{name}.pivots", new.rank)
                skeletons[place] = new
                layers[place] = dict(layer)
            elif (fused := _fused_around(model, name)) is not None:
                raise ValueError(
                    f"config.json names a compressed layer {name}, "
                    f"but not {fused} among the experts that are stored as layers"
                )
            elif is_own_class(model) or entries is None or f"{name}.up.weight" not in entries:
                raise ValueError(
                    f"config.json names a compressed layer {name}, "
                    f"which {type(model).__name__} does not have"
                )  # otherwise a part that this class leaves out, such as the head under AutoModel
        replace_modules(model, skeletons)
        _share_bases(model, layers, places)
        for place in skeletons:
            self._twins.update(_replace_twins(model, place))
        if entries is not None:
            check_contents(model, entries, config.layers, config.experts)
        config.layers = layers  # by their names in this class, for when it is saved
        return model

    def update_weight_conversions(self, weight_conversions: list, model: "PreTrainedModel") -> list:
        """Keep transformers 5 from merging the split experts as it does those of stock folders."""
        conversions = super().update_weight_conversions(weight_conversions, model)
        places = [name.removeprefix(f"{model.base_model_prefix}.") for name in find_experts(model)]
        return [_elsewhere(conversion, places) for conversion in conversions]

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **kwargs: object
    ) -> "PreTrainedModel":
        for conversion in getattr(model, "_weight_conversions", None) or ():
            _everywhere(conversion)
        for name, place in self._twins.items():
            replace_module(model, name, model.get_submodule(place))  # as when it was compressed
        for name, layer in low_rank_layers(model).items():
            if isinstance(layer, PivotedLinear):
                try:
                    layer.check_pivots()
                except ValueError as error:
                    raise ValueError(f"the files of {name} are broken: {error}") from error
        model.config.quantization_config = self.quantization_config  # transformers 4 has copied it
        return model

    def dequantize(
        self, model: "PreTrainedModel", dtype: torch.dtype | None = None
    ) -> "PreTrainedModel":
        """Put dense layers in the place of the compressed ones: ``model.dequantize()``."""
        self._dequantize(model)
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(getattr(module, "config", None), "_is_quantized"):
                module.config._is_quantized = False  # type: ignore[union-attr]
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]

    def _dequantize(
        self, model: "PreTrainedModel", dtype: torch.dtype | None = None
    ) -> "PreTrainedModel":
        config = copy.deepcopy(model.config)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            stock = type(model)(config)  # to see which of the layers are Conv1D
        split_experts(stock)
        for name, experts in find_experts(model).items():
            try:
                experts.check_biases()
            except ValueError as error:
                raise ValueError(f"{name} cannot become dense: {error}") from error
        linears = {}
        for name, layer in low_rank_layers(model).items():
            try:
                dense = layer.to_linear()
            except ValueError as error:
                raise ValueError(f"{name} cannot become dense: {error}") from error
            is_conv1d = isinstance(stock.get_submodule(name), Conv1D)
            linears[name] = _to_conv1d(dense) if is_conv1d else dense
        replace_modules(model, linears)
        fuse_experts(model)
        return model


def register() -> None:
    """Make transformers know ``quant_method: "soco"``. Idempotent."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, SocoConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, SocoQuantizer)


def check_ties(model: "PreTrainedModel", layers: Iterable[str]) -> None:
    """Refuse a head among the compressed ``layers`` that the config wants tied to the embeddings.

    Raises:
        ValueError: loading would tie the sentinel of the head to the embeddings.
    """
    head = output_head(model)
    configs = (model.config, model.config.get_text_config(decoder=True))
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if tied and head in set(layers):
        raise ValueError(
            f"config.json ties the compressed layer {head} to the embeddings: "
            f"tie_word_embeddings must be false"
        )


def _check_fields(data: Mapping[str, object]) -> None:
    """Refuse a ``quantization_config`` that does not mean anything, in one sentence."""
    where = "quantization_config in config.json"
    for field in _FIELDS[:3]:
        if field not in data:
            raise ValueError(f"{where} has no {field}")
    if data["quant_method"] != QUANT_METHOD:
        raise ValueError(f"{where} is of {data['quant_method']!r}, not of {QUANT_METHOD!r}")
    version = data["format_version"]
    if type(version) is not int or version < 1:
        raise ValueError(f"{where} has a format_version that is none: {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{where} has format_version {version}, and this soco reads up to {FORMAT_VERSION}: "
            f"upgrade soco"
        )
    for field in data:
        if field not in _FIELDS:
            raise ValueError(f"{where} has an unknown field {field!r}")
    if not isinstance(data.get("report"), Mapping | None):
        raise ValueError(f"{where} has a report that is no object: {data['report']!r}")
    layers = data["layers"]
    if not isinstance(layers, Mapping):
        raise ValueError(f"{where} must have an object of layers, got {layers!r}")
    for name, layer in layers.items():
        if not isinstance(layer, Mapping) or "rank" not in layer:
            raise ValueError(f'{where} must say {{"rank": ...}} of layer {name}, got {layer!r}')
        for field in layer:
            if field not in _LAYER_FIELDS:
                raise ValueError(f"{where} has an unknown field {field!r} of layer {name}")
        if type(layer["rank"]) is not int or layer["rank"] < 1:
            raise ValueError(
                f"{where} must have a whole number, at least 1, for the rank of layer {name}, "
                f"got {layer['rank']!r}"
            )
        if layer.get("bias", True) is not True:
            raise ValueError(f"{where} can only have true for the bias of layer {name}")
        if layer.get("pivoted", True) is not True:
            raise ValueError(f"{where} can only have true for pivoted of layer {name}")
    experts = data.get("experts", [])
    if not isinstance(experts, list | tuple) or not all(isinstance(name, str) for name in experts):
        raise ValueError(f"{where} must have a list of names for its experts, got {experts!r}")
    if len(set(experts)) < len(experts):
        raise ValueError(f"{where} names the same experts twice: {experts!r}")
    for name, layer in layers.items():
        if "basis" in layer:
            _check_basis(layers, name, where)
    if version < _needed(layers, data.get("experts", ())):
        raise ValueError(
            f"{where} has format_version {version}, which knows no pivoted layers, no shared "
            f"basis and no split experts: it must be {_needed(layers, data.get('experts', ()))}"
        )


def _needed(layers: object, experts: object) -> int:
    """The oldest format that has all that these layers and experts use."""
    if experts:
        return 2
    described = layers.values() if isinstance(layers, Mapping) else ()
    used = {field for layer in described if isinstance(layer, Mapping) for field in layer}
    return 1 if used.isdisjoint(_SINCE_2) else 2


def _check_basis(layers: Mapping[str, Mapping[str, Any]], name: str, where: str) -> None:
    """Refuse the basis of layer ``name`` if there is no such, in one sentence."""
    rank, basis = layers[name]["rank"], layers[name]["basis"]
    what = f"{where} gives layer {name} the basis of"
    if not isinstance(basis, str) or basis not in layers:
        raise ValueError(f"{what} {basis!r}, which is no compressed layer")
    if "basis" in layers[basis]:
        raise ValueError(f"{what} {basis}, which has one of another layer itself")
    if "pivoted" in layers[name] or "pivoted" in layers[basis]:
        raise ValueError(f"{what} {basis}, but a pivoted layer shares none")
    if layers[basis]["rank"] != rank:
        raise ValueError(f"{what} {basis}, but their ranks are {rank} and {layers[basis]['rank']}")


def _places(model: "PreTrainedModel", names: Iterable[str]) -> dict[str, str | None]:
    """Where the modules of the class that was saved stand in this one, None: nowhere.

    A base model (AutoModel) has the names without the prefix that a model with a head has.
    """
    prefix = f"{model.base_model_prefix}."
    known = {path for path, _ in model.named_modules(remove_duplicate=False)}
    found = {}
    for name in names:
        candidates = (name, name.removeprefix(prefix), prefix + name)
        found[name] = next((candidate for candidate in candidates if candidate in known), None)
    return found


def _split(
    model: "PreTrainedModel", config: SocoConfig, entries: Mapping[str, object] | None
) -> list[str]:
    """Split the experts that config.json names, and give their names in this class."""
    experts = {}
    for name, place in _places(model, config.experts).items():
        if place is not None:
            fused = model.get_submodule(place)
            if not is_fused(fused):
                raise ValueError(
                    f"config.json names experts {name}, "
                    f"which are a {type(fused).__name__} in {type(model).__name__} and not fused"
                )
            experts[place] = Experts(fused)
        elif is_own_class(model) or not any(key.startswith(f"{name}.") for key in entries or ()):
            raise ValueError(
                f"config.json names experts {name}, which {type(model).__name__} does not have"
            )  # otherwise a part that this class leaves out, as for layers
    replace_modules(model, experts)
    return list(experts)


def _fused_around(model: "PreTrainedModel", name: str) -> str | None:
    """The fused experts that would have to be split for a layer of this name, if any."""
    steps = name.split(".")
    around = [".".join(steps[:count]) for count in range(len(steps) - 1, 0, -1)]
    places = _places(model, around).items()
    known = ((path, place) for path, place in places if place is not None)
    path, place = next(known, (name, ""))
    return path if is_fused(model.get_submodule(place)) else None


def _elsewhere(conversion: Any, places: list[str]) -> Any:
    """Let a conversion of transformers 5 merge tensors everywhere but inside of ``places``."""
    if not places or not hasattr(conversion, "operations"):  # which a renaming has not
        return conversion

    class Elsewhere(type(conversion)):
        __slots__ = ()

        def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
            if any(f".{place}." in f".{source_key}" for place in places):
                return source_key, None
            return super().rename_source_key(source_key)

    conversion.__class__ = Elsewhere
    return conversion


def _everywhere(conversion: Any) -> None:
    """Make a conversion what it was before ``_elsewhere``: pickle cannot write a local class."""
    if type(conversion).__qualname__.endswith("_elsewhere.<locals>.Elsewhere"):
        conversion.__class__ = type(conversion).__base__


def _sharing(layers: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The layers that use the basis of another one, and those others."""
    users = {name: layer["basis"] for name, layer in layers.items() if "basis" in layer}
    return {*users, *users.values()}


def _skeleton(
    model: "PreTrainedModel", place: str, name: str, layer: Mapping[str, Any], *, shared: bool
) -> CompressedLinear:
    """The layer to load the factors into, in the place of a dense one, without memory."""
    rank = layer["rank"]
    old = model.get_submodule(place)
    if not is_linear(old):
        raise ValueError(
            f"config.json names a compressed layer {name}, "
            f"which is a {type(old).__name__} in {type(model).__name__} and no linear layer"
        )
    out_features, in_features = shape_of(old)
    # The basis of several layers may have more components than one of them has outputs.
    if rank > (in_features if shared else min(out_features, in_features)):
        raise ValueError(
            f"config.json gives layer {name} the rank {rank}, "
            f"but it is a weight of shape {[out_features, in_features]}"
        )
    if "pivoted" in layer and rank >= out_features:
        raise ValueError(
            f"config.json gives the pivoted layer {name} the rank {rank}, "
            f"which is not below its {out_features} outputs"
        )
    dtype = cast(torch.Tensor, old.weight).dtype
    bias = layer.get("bias", bias_of(old) is not None)
    kind = PivotedLinear if "pivoted" in layer else LowRankLinear
    new = kind(in_features, out_features, rank, bias, device="meta", dtype=dtype)
    # transformers 4 loads no buffers of layers offloaded to disk, and fails if they are on meta.
    new.weight = torch.zeros(1, device="cpu", dtype=dtype)
    return new


def _stored_pivots(entries: Mapping[str, Entry], key: str, rank: int) -> torch.Tensor:
    """The pivots (rank,) in the files, since transformers 4 loads none of layers offloaded to disk.

    What cannot be so, or is there by another name, is -1 until it is loaded: no pivot of any layer.
    """
    entry = entries.get(key)
    if entry is None or entry.shape != (rank,) or entry.dtype != "I64":
        return torch.full((rank,), -1)
    with opened_tensors(entry.file) as file:
        return file.get_tensor(key).clone()  # the file may be written anew


def _share_bases(
    model: "PreTrainedModel",
    layers: dict[str, dict[str, Any]],
    places: Mapping[str, str | None],
) -> None:
    """Let layers that are in place use the ``down`` of others, and call these by their places."""
    for place, layer in layers.items():
        if "basis" not in layer:
            continue
        basis = places.get(layer["basis"])
        if basis not in layers:
            raise ValueError(
                f"config.json gives layer {place} the basis of {layer['basis']}, "
                f"which {type(model).__name__} does not have"
            )
        first, second = (cast(LowRankLinear, model.get_submodule(n)) for n in (basis, place))
        if first.in_features != second.in_features:
            raise ValueError(
                f"config.json gives layer {place} the basis of {layer['basis']}, "
                f"but they have {second.in_features} and {first.in_features} inputs"
            )
        share_basis([first, second])
        layer["basis"] = basis


def _replace_twins(model: "PreTrainedModel", place: str) -> dict[str, str]:
    """Let the layers that transformers 5 is going to tie to the one at ``place`` follow it.

    While loading, each of them is a module of its own, tied by its parameters: transformers counts
    the parameters by name, and a module in two places would seem to lack half of them.

    Returns:
        name of such a layer to ``place``.
    """
    layer = cast(CompressedLinear, model.get_submodule(place))
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    twins = [target for target, source in ties.items() if source == f"{place}.weight"]
    names = [target.removesuffix(".weight") for target in twins]
    for name, target in zip(names, twins, strict=True):
        twin = copy.deepcopy(layer)
        for key, buffer in layer.named_buffers(recurse=False):
            twin.register_buffer(key, buffer.clone(), persistent=False)  # not in the files
        replace_module(model, name, twin)
        del ties[target]
        ties.update({f"{name}.{key}": f"{place}.{key}" for key, _ in layer.named_parameters()})
    return dict.fromkeys(names, place)


def _to_conv1d(linear: nn.Linear) -> Conv1D:
    """The same layer as GPT-2 writes it: the weight transposed."""
    conv = Conv1D(*linear.weight.shape)
    conv.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    conv.bias = nn.Parameter(linear.bias.detach())
    return conv.train(linear.training)


register()
