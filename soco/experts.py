"""The experts of a mixture as ordinary linear layers, and back in the fused parameters."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.memory import bound_caches
from soco.surgery import low_rank_layers, transformer_blocks

_BIAS = "_bias"  # what the name of a fused bias has after that of its weight


class Expert(nn.Module):
    """One expert: ``gate_up_proj`` (or ``up_proj``), what comes in between, ``down_proj``.

    Args:
        first: name and layer that the tokens are given to.
        second: name and layer that gives the result.
        shell: the fused module without its parameters; it knows what comes in between.
    """

    def __init__(
        self, first: tuple[str, nn.Module], second: tuple[str, nn.Module], shell: nn.Module
    ) -> None:
        """Take the layers as children."""
        super().__init__()
        self.names = first[0], second[0]
        self.add_module(*first)
        self.add_module(*second)
        self._shell = (shell,)  # in a tuple: it is no child

    def forward(self, x: Tensor) -> Tensor:
        """Map the tokens (tokens, hidden) that were sent to this expert to (tokens, hidden)."""
        first, second = (getattr(self, name) for name in self.names)
        shell = cast(Any, self._shell[0])
        gated = first(x)
        gated = shell.act_fn(gated) if self.names[0] == "up_proj" else shell._apply_gate(gated)
        return second(gated)


class Experts(nn.Module):
    """The experts of a mixture, one child each: ``experts.3.down_proj`` is an ``nn.Linear``.

    It stands where transformers 5 has a module that keeps all experts in parameters of three
    dimensions, and computes what that computes with ``experts_implementation="eager"``. The weights
    are views on the fused ones until they are replaced: nothing is copied.

    Args:
        fused: a module for which ``is_fused`` holds; left as it is.

    Raises:
        ValueError: it is not such a module.
    """

    def __init__(self, fused: nn.Module) -> None:
        """Make the layers."""
        if not is_fused(fused):
            raise ValueError(f"a {type(fused).__name__} does not hold fused experts")
        super().__init__()
        # All of the module but its parameters: what it does between the layers, and the form that
        # ``fuse`` fills. It has nothing to save, to train or to move, and is no child.
        shell = copy.copy(fused)
        shell._parameters = dict.fromkeys(fused._parameters)
        self._shell = (shell,)
        self.num_experts = len(cast(Tensor, fused.down_proj))
        for index in range(self.num_experts):
            first, second = ((name, _layer(fused, name, index)) for name in _weights(fused))
            self.add_module(str(index), Expert(first, second, shell))
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Send every token to its experts, and add up what they return.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k), numbers of experts; ``num_experts`` and above mean none.
            top_k_weights: (tokens, k), by which the results of the experts are multiplied.

        Returns:
            (tokens, hidden), of the dtype of ``hidden_states``.
        """
        total = torch.zeros_like(hidden_states)
        chosen = top_k_index.T.reshape(-1)  # in the order in which the fused module takes them
        order = chosen.argsort(stable=True)
        counts = self.counts(chosen)
        parts = order[: sum(counts)].split(counts)
        for expert, slots in zip(self.children(), parts, strict=True):
            if len(slots) > 0:
                rows, places = slots % len(hidden_states), slots // len(hidden_states)
                y = expert(hidden_states[rows]) * top_k_weights[rows, places, None]
                total.index_add_(0, rows, y.to(total.dtype))
        return total

    def counts(self, chosen: Tensor) -> list[int]:
        """How many tokens go to each expert, of the numbers of experts that were chosen."""
        return chosen.bincount(minlength=self.num_experts)[: self.num_experts].tolist()

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The fused module with the weights that the layers have now; they are copied.

        Raises:
            ValueError: a layer is no ``nn.Linear``, or has a bias that has no place.
        """
        self.check_biases()
        fused = copy.copy(self._shell[0])
        fused._parameters = {}
        for name in self._shell[0]._parameters:
            layers = self._layers(name.removesuffix(_BIAS))
            if name.endswith(_BIAS):
                parts = [cast(Tensor, layer.bias) for layer in layers]
            else:
                parts = [
                    layer.weight.T if fused.is_transposed else layer.weight for layer in layers
                ]
            flag = parts[0].requires_grad
            fused.register_parameter(name, nn.Parameter(torch.stack(parts), flag))
        return fused.train(self.training)

    def check_biases(self) -> None:
        """Refuse a bias for which the fused module has no place.

        Raises:
            ValueError: there is one.
        """
        for index, expert in self.named_children():
            for name, layer in expert.named_children():
                if layer.bias is not None and not self._shell[0].has_bias:
                    raise ValueError(f"{index}.{name} has a bias, for which there is no place")

    def _layers(self, name: str) -> list[nn.Linear]:
        """The layers ``name`` of all experts, which have to be ``nn.Linear``."""
        layers = []
        for index, expert in self.named_children():
            layer = expert.get_submodule(name)
            if type(layer) is not nn.Linear:
                raise ValueError(f"{index}.{name} is a {type(layer).__name__} and no nn.Linear")
            layers.append(layer)
        return layers


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds fused experts in the way that transformers 5 has for all of them.

    That is what its decorator ``use_experts_implementation`` asks of a class: the parameters
    ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, with or without biases, transposed or not,
    and ``_apply_gate`` (or ``act_fn``) in between. A module that does more is none of these: one
    with other parameters, with a norm at the end, or with a forward of its own.
    """
    names = _weights(module)
    biases = [name + _BIAS for name in names] if getattr(module, "has_bias", None) else []
    between = "act_fn" if names[0] == "up_proj" else "_apply_gate"
    return (
        isinstance(getattr(module, "is_transposed", None), bool)
        and {name for name, _ in module.named_parameters()} == {*names, *biases}
        and next(module.buffers(), None) is None
        and all(module.get_parameter(name).dim() == 3 for name in names)
        and callable(getattr(module, between, None))
        and not getattr(module, "has_post_expert_norm", False)
        and hasattr(type(module).forward, "__wrapped__")
        and "forward" not in vars(module)
    )


def split_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Put an ``Experts`` in the place of all fused experts in the transformer blocks.

    Returns:
        name to the fused module that stood there, in the tree's order; none where the experts are
        layers of their own already (transformers 4).
    """
    found = _fused(model)
    replacements = {name: Experts(fused) for name, fused in found.items()}
    for name, fused in found.items():
        _put(model, fused, replacements[name])
    return found


def join_experts(model: nn.Module, fused: Mapping[str, nn.Module]) -> None:
    """Put the fused experts back where no layer was compressed.

    Where some were, the dense layers beside them get memory of their own, so that the fused
    parameters can be freed.

    Args:
        model: after ``split_experts`` and the replacement of layers.
        fused: what ``split_experts`` returned.
    """
    for name, old in fused.items():
        experts = cast(Experts, model.get_submodule(name))
        if low_rank_layers(experts):
            for layer in experts.modules():
                if type(layer) is nn.Linear:
                    for parameter in layer.parameters():
                        parameter.data = parameter.detach().clone(
                            memory_format=torch.contiguous_format
                        )
        elif _is_untouched(experts, old):
            _put(model, experts, old)
        else:  # layers that training kept dense, with other weights
            new = experts.fuse().train(old.training)
            for key, parameter in old.named_parameters():
                new.get_parameter(key).requires_grad_(parameter.requires_grad)
            _put(model, experts, new)


def fuse_experts(model: nn.Module) -> None:
    """Put fused experts in the place of every ``Experts``, whose layers have to be dense.

    Raises:
        ValueError: a layer is no ``nn.Linear``, or has a bias that has no place.
    """
    for name, experts in find_experts(model).items():
        try:
            _put(model, experts, experts.fuse())
        except ValueError as error:
            raise ValueError(f"{name} cannot be fused: {error}") from error


@contextmanager
def experts_split(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Inside, the experts are split; on any error, Ctrl-C among them, they are fused as before.

    From the first time on this process keeps few of oneDNN's kernels (``memory.bound_caches``).

    Yields:
        What ``split_experts`` returned, for ``join_experts``, which is left to the caller.
    """
    found = _fused(model)
    if found:
        bound_caches()
    try:
        yield split_experts(model)
    except BaseException:
        for name, fused in found.items():
            _put(model, model.get_submodule(name), fused)
        raise


@contextmanager
def experts_apart(model: nn.Module) -> Iterator[None]:
    """Inside, the experts are split; afterwards they are fused as before, unless compressed."""
    with experts_split(model) as fused:
        yield
    join_experts(model, fused)


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """All ``Experts`` of a model, by their first names, in the tree's order."""
    return {n: module for n, module in model.named_modules() if isinstance(module, Experts)}


def _fused(model: nn.Module) -> dict[str, nn.Module]:
    inside = {part for block in transformer_blocks(model) for part in block.modules()}
    return {n: m for n, m in model.named_modules() if m in inside and is_fused(m)}


def _weights(fused: nn.Module) -> tuple[str, str]:
    """The names of the two weights, in the order of their use."""
    return "gate_up_proj" if "gate_up_proj" in fused._parameters else "up_proj", "down_proj"


def _layer(fused: nn.Module, name: str, index: int) -> nn.Linear:
    """The layer ``name`` of one expert, on the memory of the fused parameters."""
    whole = fused.get_parameter(name)
    weight = whole.detach()[index].T if fused.is_transposed else whole.detach()[index]
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=bool(fused.has_bias), device="meta")
    layer.weight = nn.Parameter(weight, whole.requires_grad)
    if fused.has_bias:
        whole = fused.get_parameter(name + _BIAS)
        layer.bias = nn.Parameter(whole.detach()[index], whole.requires_grad)
    return layer


def _is_untouched(experts: Experts, fused: nn.Module) -> bool:
    """Whether all layers still are views on the fused parameters."""
    new, old = Experts(fused).state_dict(), experts.state_dict()
    return new.keys() == old.keys() and all(
        new[key].data_ptr() == tensor.data_ptr() and new[key].shape == tensor.shape
        for key, tensor in old.items()
    )


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in all places of ``old``."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
