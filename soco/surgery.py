"""Find the linear layers in the module tree of a transformers model, and replace them."""

import copy
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from soco.data import positive
from soco.modules import CompressedLinear

Patterns = str | Iterable[str] | None

USUAL_LENGTH = 2048  # tokens of a sequence, where the model allows as much


def find_linears(
    model: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> dict[str, nn.Module]:
    """The linear layers that can be factored: ``nn.Linear`` and ``Conv1D``, in the tree's order.

    Exactly these two types: a subclass may use its weight in another way; and not the factors of a
    layer that is compressed already. Blocks are the entries of
    the outermost ``nn.ModuleList`` whose entries have modules inside them. A layer that stands in
    several places is one layer, under its first name. Left out unless a pattern names them: layers
    outside of the blocks (the output head), and those so narrow that no rank makes them smaller.

    Args:
        model: a transformers model, or any module built like one.
        include: glob patterns (``fnmatch``) on full names, one or several; they choose among all
            linear layers of the model. None: the ones in the blocks.
        exclude: glob patterns of names to leave out.

    Returns:
        name to module, at least one.

    Raises:
        ValueError: a pattern matches no linear layer; nothing is left; a layer that was asked for
            shares its weight with a module that would not be replaced with it.
    """
    compressed = low_rank_layers(model)
    factors = {id(part) for layer in compressed.values() for part in layer.modules()}
    every = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and id(module) not in factors
    }
    first = {}  # of every group of twins, the layer that stands for them
    tied = {}  # name to the name of a module that holds the same weight and cannot follow
    for name, twins, others in _sharing(model, every):
        first.setdefault(id(twins[0]), name)
        if others:
            tied[name] = others[0]
    every = {name: module for name, module in every.items() if name in first.values()}
    if include is None:
        prefixes = tuple(f"{name}." for name in _block_lists(model))
        chosen = {
            name: module
            for name, module in every.items()
            if name.startswith(prefixes) and name not in tied and _can_shrink(module)
        }
    else:
        chosen = {name: every[name] for name in _matching(include, every, "include")}
    if exclude is not None:
        for name in _matching(exclude, every, "exclude"):
            chosen.pop(name, None)
    if not chosen:
        raise ValueError(
            f"no linear layer to compress in {type(model).__name__}: "
            + ("exclude leaves none" if exclude is not None else "none in blocks (see include)")
            + (f", and {len(compressed)} are compressed already" if compressed else "")
        )
    head = output_head(model)
    for name in chosen:
        if name in tied and name != head:
            raise ValueError(
                f"{name} shares its weight with {tied[name]} and cannot be compressed alone"
            )
    return chosen


def low_rank_layers(model: nn.Module) -> dict[str, CompressedLinear]:
    """The compressed layers of a model, by their first names, in the tree's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}


def fused_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The experts that a mixture keeps as one parameter (experts, ..., ...), in the blocks.

    They are no linear layers, and stay dense unless ``soco.experts`` splits them. A parameter of
    three dimensions is taken for experts when its first size is a count of experts that its module
    or the model's config speaks of.

    Returns:
        parameter name to shape, in the tree's order.
    """
    prefixes = tuple(f"{name}." for name in _block_lists(model))
    counts = _expert_counts(getattr(text_config(model), "__dict__", {}))
    found = {}
    for path, module in model.named_modules():
        if not path.startswith(prefixes):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            known = counts | _expert_counts(vars(module))
            if parameter.dim() == 3 and parameter.shape[0] in known:
                found[f"{path}.{name}"] = tuple(parameter.shape)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a layer that can be factored: exactly ``nn.Linear`` or ``Conv1D``."""
    return type(module) in (nn.Linear, Conv1D)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer of any kind."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return cast(int, module.out_features), cast(int, module.in_features)


def weight_of(module: nn.Module) -> Tensor:
    """The weight (out, in) of an ``nn.Linear`` or ``Conv1D``, a view on it."""
    if isinstance(module, Conv1D):
        return module.weight.T
    if isinstance(module, nn.Linear):
        return module.weight
    raise ValueError(f"expected nn.Linear or Conv1D, got {type(module).__name__}")


def with_weight(module: nn.Module, weight: Tensor) -> nn.Module:
    """The same ``nn.Linear`` or ``Conv1D`` with another weight (out, in): a new parameter.

    The bias is the very one of ``module``, which stays as it is.
    """
    new = copy.copy(module)  # its dictionaries are those of the old one
    new._parameters = dict(module._parameters)
    stored = weight.T if isinstance(module, Conv1D) else weight
    required = next(module.parameters()).requires_grad
    new.weight = nn.Parameter(stored.detach().clone(), required)
    return new


def layout_of(module: nn.Module) -> str:
    """How a dense layer stores its weight: "linear" (out, in), or "conv1d" (in, out)."""
    return "conv1d" if isinstance(module, Conv1D) else "linear"


def without_weight(
    layout: str, shape: tuple[int, int], bias: Tensor | None, dtype: torch.dtype
) -> nn.Module:
    """A dense layer (out, in) of a layout, whose weight is on the meta device (``with_weight``).

    Args:
        layout: as ``layout_of`` gives it.
        shape: (out, in).
        bias: (out,), copied, or None. A Conv1D without one gets a missing bias, too.
        dtype: of weight and bias.
    """
    outputs, inputs = shape
    with torch.device("meta"):
        layer: Any = Conv1D(outputs, inputs) if layout == "conv1d" else nn.Linear(inputs, outputs)
    layer.to(dtype)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype, copy=True))
    return layer


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias (out,) of a linear layer of any kind, or None."""
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def twins_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Name to all linear layers of the model that are one with it: the same weight and bias.

    A layer is among its twins; one object in several places is one.
    """
    return {name: twins for name, twins, _ in _sharing(model, modules)}


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks in the tree's order: the entries of the outermost module lists."""
    return [block for name in _block_lists(model) for block in model.get_submodule(name).children()]


def block_paths(model: nn.Module) -> list[str]:
    """Their names in the model."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in transformer_blocks(model)]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` stands, and wherever else the same layer stands.

    The same layer is the same object, or another linear layer that shares both weight and bias with
    it. The newcomer takes over the training flag.

    Raises:
        ValueError: the model has no module of that name.
    """
    replace_modules(model, {name: module})


def replace_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """What ``replace_module`` does, for many at once: the model is gone through only once.

    Args:
        model: any module.
        modules: name to what is put there.

    Raises:
        ValueError: the model has no module of such a name; then it is left as it was.
    """
    old = {name: _module(model, name) for name in modules}
    places = {id(old[name]): module for name, module in modules.items()}
    if any(is_linear(module) for module in old.values()):
        every = {path: other for path, other in model.named_modules() if is_linear(other)}
        for _, twins, _ in _sharing(model, every):
            new = next((places[id(twin)] for twin in twins if id(twin) in places), None)
            if new is not None:
                places.update({id(twin): new for twin in twins if id(twin) not in places})
    for name, module in modules.items():
        module.train(old[name].training)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and id(child) in places:
                setattr(parent, child_name, places[id(child)])


@contextmanager
def replaced(model: nn.Module, newcomers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, ``newcomers`` stand in the places of those names; afterwards all is as it was.

    Whatever happens inside. Layers that stand for several (``replace_module``) give way to each of
    them again.

    Raises:
        ValueError: the model has no module of some name.
    """
    tree = [(module, dict(module._modules)) for module in model.modules()]
    try:
        replace_modules(model, newcomers)
        yield
    finally:
        for module, children in tree:
            module._modules.update(children)


def output_head(model: nn.Module) -> str | None:
    """The name of the layer that turns hidden states into logits over the vocabulary, if any."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return next((name for name, module in model.named_modules() if module is head), None)


def untie_head(model: nn.Module) -> None:
    """Give the output head a weight of its own, so that it can be compressed; no-op if it has one.

    Config and model forget the tie (``tie_word_embeddings = False``), so that a saved model loads
    as two weights.

    Raises:
        ValueError: the model has no output head, or it is an encoder and decoder, whose tie also
            scales the hidden states, so that untying would change the model.
    """
    name = output_head(model)
    if name is None:
        raise ValueError(f"{type(model).__name__} has no output head")
    head = _module(model, name)
    if not _is_tied(model, head):
        return
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"the head {name} of {type(model).__name__} is tied to its embeddings for good "
            f"(an encoder and decoder): leave it out"
        )
    for key, parameter in list(head.named_parameters(recurse=False)):
        own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        setattr(head, key, own)
    for each in (model.config, text_config(model)):
        setattr(each, "tie_word_embeddings", False)  # noqa: B010 - of whatever class it is
    ties = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if ties is not None:
        own = f"{name}."
        kept = {t: s for t, s in ties.items() if not t.startswith(own) and not s.startswith(own)}
        model.all_tied_weights_keys = kept  # type: ignore[assignment]


def context_length(model: nn.Module) -> int | None:
    """How many positions the model has embeddings for; None where nothing limits them.

    Tables with a padding row (RoBERTa's) lose the rows up to it, which no token uses.
    """
    config = text_config(model)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    length = next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)
    if length is None or length < 1:
        return None
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        if module.num_embeddings == length != getattr(config, "vocab_size", None):
            return length - module.padding_idx - 1
    return length


def sequence_length(
    model: nn.Module, length: int | None = None, *, with_start: bool = False
) -> int:
    """Tokens of a sequence to run the model on: as many as given, if it has positions for them.

    Args:
        model: a transformers model.
        length: of a sequence; None: as many as there are positions, at most ``USUAL_LENGTH``.
        with_start: whether a first token, which is not counted, takes a position as well.

    Raises:
        ValueError: the length is not a positive whole number, or above what there are.
    """
    positions = context_length(model)
    most = sys.maxsize if positions is None else positions - with_start
    if length is None:
        return min(most, USUAL_LENGTH)
    if positive("length", length) > most:
        start = ", one of them for the token it starts with" if with_start else ""
        raise ValueError(
            f"length {length} is too much for the model's {positions} positions{start}"
        )
    return length


def _can_shrink(module: nn.Module) -> bool:
    """Whether rank 1 has fewer parameters than the weight."""
    out_features, in_features = shape_of(module)
    return out_features + in_features < out_features * in_features


def _block_lists(model: nn.Module) -> Iterator[str]:
    """Names of the outermost ModuleLists with a module that has modules inside it."""

    def walk(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and any(list(m.children()) for m in child):
                yield prefix + name
            else:
                yield from walk(child, f"{prefix}{name}.")

    return walk(model, "")


def _sharing(
    model: nn.Module, linears: Mapping[str, nn.Module]
) -> Iterator[tuple[str, list[nn.Module], list[str]]]:
    """For every linear: its twins (itself among them), and the others that hold its weight.

    Twins have the same type, weight and bias, so that one layer can stand for all of them.
    """
    holders = defaultdict(dict)  # id of a weight -> {name: module}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders[id(weight)][name] = module
    for name, module in linears.items():
        sharing = holders[id(module.weight)]
        twins = [m for m in sharing.values() if type(m) is type(module) and m.bias is module.bias]
        others = [n for n, m in sharing.items() if not any(m is twin for twin in twins)]
        yield name, twins, others


def _matching(patterns: Patterns, linears: Mapping[str, nn.Module], argument: str) -> list[str]:
    """Names that some pattern matches, in the tree's order; every pattern has to match one."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            some = ", ".join(list(linears)[:4] + list(linears)[-1:]) or "there are none"
            raise ValueError(f"{argument}={pattern!r} matches no linear layer, such as {some}")
    return [name for name in linears if any(fnmatchcase(name, p) for p in patterns)]


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no module {name}") from error


def text_config(model: nn.Module) -> object:
    """The config of the language model in ``model``: of its decoder where it has several."""
    config = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    return config if getter is None else getter(decoder=True)


def _is_tied(model: nn.Module, head: nn.Module) -> bool:
    """Whether another module holds the weight of the head, too."""
    weight = head._parameters.get("weight")
    holders = (module._parameters.get("weight") for module in model.modules() if module is not head)
    return weight is not None and any(other is weight for other in holders)


def _expert_counts(attributes: Mapping[str, object]) -> set[int]:
    return {v for k, v in attributes.items() if "expert" in k and isinstance(v, int) and v > 1}
