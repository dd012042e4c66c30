"""What methods want to know of a model's layers on real inputs, collected in one pass."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.keeping import Keeper, moved
from soco.memory import give_back_memory
from soco.objectives import Objective, draw_seeds, objective_for, run_model
from soco.observing import OF_GRADIENTS, GradientSums, InputSums
from soco.processes import count, gathered
from soco.processes import number as this
from soco.steps import frozen
from soco.surgery import twins_of

# What can be collected. All but the last three are of the inputs; those take a backward pass.
KINDS = frozenset(
    {"gram", "mean", "abs_mean", "stacked_gram", "root", "fisher", "grad_gram", "sampled_grad_gram"}
)

Run = Callable[[int, Tensor], object]

# One batch of so many goes into the sampled statistics: a backward pass takes twice a forward pass.
SAMPLED = 8


@dataclass(frozen=True)
class Statistics:
    """What one linear layer saw: sums over the calibration; None where nobody asked."""

    gram: Tensor  # (in, in), float64: sum of x^T x over all tokens
    tokens: int
    sequences: int = 0
    mean: Tensor | None = None  # (in,), float64: sum of x
    abs_mean: Tensor | None = None  # (in,), float64: sum of |x|
    stacked_gram: Tensor | None = None  # (in, in), float64: like gram, of means over each batch
    root: Tensor | None = None  # (in, in), float64: upper triangular R, R^T R = gram, by QR
    fisher: Tensor | None = None  # (out, in), float64: squared gradients of sequences, summed
    grad_gram: Tensor | None = None  # (out, out), float64: sum of g^T g, g the gradient of outputs
    sampled_grad_gram: Tensor | None = None  # the same, estimated from a part of the batches

    def means(self, tokens: int) -> dict[str, Tensor]:
        """The statistics as methods read them, by name, those that are there.

        Args:
            tokens: of the whole calibration. What the inputs are is counted per token of it, so
                that a layer that sees few of them (an expert) matters less; ``mean``, ``abs_mean``
                and ``grad_gram`` are per token that the layer saw, ``fisher`` per sequence.
                Where there is a mean, "centered_gram" is that of the inputs less their mean.
        """
        here, seen = max(1, tokens), max(1, self.tokens)
        sums = {
            "gram": (self.gram, here),
            "mean": (self.mean, seen),
            "abs_mean": (self.abs_mean, seen),
            "stacked_gram": (self.stacked_gram, here),
            "root": (self.root, here**0.5),
            "fisher": (self.fisher, max(1, self.sequences)),
            "grad_gram": (self.grad_gram, seen),
            "sampled_grad_gram": (self.sampled_grad_gram, seen),
        }
        found = {name: value / count for name, (value, count) in sums.items() if value is not None}
        if self.mean is not None:
            found["centered_gram"] = (self.gram - self.mean[:, None] * self.mean / seen) / here
        return found

    def parts(self) -> dict[str, Tensor]:
        """The sums that are there, by name."""
        return {kind: value for kind in sorted(KINDS) if (value := getattr(self, kind)) is not None}


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    windows: Tensor,
    batch_size: int = 8,
    on_batch: Callable[[int], None] = lambda sequences: None,
    *,
    kinds: Collection[str] = ("gram",),
    objective: Objective | None = None,
    seed: int = 0,
    run: Run | None = None,
    keeper: Keeper | None = None,
) -> dict[str, Statistics]:
    """Run ``model`` over the windows and collect statistics of ``layers``, all in one pass.

    Layers that are given the same tensor (query, key and value; gate and up) share one Gram matrix,
    and whatever else is of the inputs. Products are taken in float32, at most 2048 tokens at a
    time, and summed in float64; inputs are not kept: memory depends on the layers' sizes, not on
    the number of tokens.

    Gradients are those of the negative log likelihood of labels drawn from the model itself
    (``Objective.surprise``), so that their squares are the Fisher information: the curvature of the
    divergence from this model.

    Layers that shared their inputs at first, and then did not, make it start again from the first
    window, without that mistake.

    Args:
        model: left as it was; it runs in evaluation mode. Only its ``base_model`` runs where that
            holds all the layers and no gradient is asked for: logits of a large vocabulary cost
            more memory than anything else.
        layers: name to module in ``model``; called with x (..., in). What its twins see, layers
            with the same weight and bias, counts as well.
        windows: token ids (sequences, length), on the CPU.
        batch_size: sequences at a time.
        on_batch: called with the number of sequences done, after each batch.
        kinds: what to collect, of ``KINDS``; the Gram matrix always is. Of "sampled_grad_gram" a
            part of the batches (one in ``SAMPLED``) is used, and the others run forward only.
        objective: what gradients are of; None: by what the model returns.
        seed: of the drawn labels.
        run: what runs a batch instead of the model: its number, and its token ids on the model's
            device. Where gradients are wanted (``torch.is_grad_enabled()``) it runs the backward
            pass as well, and ``label_seeds`` has the seeds of the labels.
        keeper: where the sums are kept now and then, from which the same call goes on, to the same
            bits; None: nowhere.

    Returns:
        name to statistics. A layer that saw nothing (an expert no token was sent to) has zeros and
        0 tokens.

    Raises:
        ValueError: the inputs or gradients of a layer hold NaN or Inf; the layer is named. A kind
            is unknown.

    Source: Fisher information of drawn labels: Kunstner, Balles and Hennig, arXiv:1905.12558.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"there is no statistic {kind!r}: choose from {sorted(KINDS)}")
    wanted = frozenset(kinds) | {"gram"}
    device = next(model.parameters()).device
    if wanted & OF_GRADIENTS and objective is None and run is None:
        with frozen(model):
            objective = objective_for(model, windows[:1].to(device))
    twins = twins_of(model, layers)
    batches = windows.split(batch_size)
    seeds = label_seeds(len(windows), seed).split(batch_size)
    over = _Pass(model, _body(model, layers), batches, seeds, objective, run)
    turns = -(-len(batches) // count())  # in each of which every process has a batch, or none
    held = None if keeper is None else keeper.load()
    state = {"done": 0, "inputs": InputSums(set(), wanted).state(), "gradients": None}
    if held is not None:
        state = moved(held[0], device)
    while True:
        collector = InputSums.from_state(state["inputs"], wanted)
        gradients = None
        if wanted & OF_GRADIENTS:
            gradients = GradientSums.from_state(state["gradients"] or {}, wanted)
        hooks = [
            twin.register_forward_pre_hook(collector.hook(name))
            for name in layers
            for twin in twins[name]
        ]
        if gradients is not None:
            hooks += [t.register_forward_hook(gradients.hook(n)) for n in layers for t in twins[n]]
        try:
            with frozen(model), torch.autocast(device.type, enabled=False):
                for turn in range(state["done"], turns):
                    number = turn * count() + this()
                    if number < len(batches):
                        over.batch(number, collector, gradients)
                    stop = bool(collector.parted)
                    if keeper is not None:
                        stop = any(gathered(stop))
                    if stop:
                        break
                    on_batch(min((number + 1) * batch_size, len(windows)))
                    if keeper is not None and turn + 1 < turns and keeper.due():
                        state = {
                            "done": turn + 1,
                            "inputs": collector.state(),
                            "gradients": None if gradients is None else gradients.state(),
                        }
                        keeper.save(state, [])
        finally:
            for hook in hooks:
                hook.remove()
        parted = set[str]().union(*gathered(collector.parted))
        if not parted:
            break
        alone = InputSums(collector.alone | parted, wanted)
        state = {"done": 0, "inputs": alone.state(), "gradients": None}
    if count() > 1:
        collector.add_up(layers)
        if gradients is not None:
            gradients.add_up(layers)
    found = {}
    for name, module in layers.items():
        sums, tokens = collector.result(name, module)
        sequences = 0
        if gradients is not None:
            sums = {**sums, **gradients.result(name, module, tokens)}
            sequences = gradients.sequences
        found[name] = Statistics(tokens=tokens, sequences=sequences, **cast(dict[str, Any], sums))
    return found


@dataclass(frozen=True)
class _Pass:
    """How a batch runs."""

    model: nn.Module
    body: nn.Module  # what runs of it where no gradient is asked for
    batches: Sequence[Tensor]  # token ids
    seeds: Sequence[Tensor]  # of the labels
    objective: Objective | None
    run: Run | None  # instead of the model

    def batch(self, number: int, inputs: InputSums, gradients: GradientSums | None) -> None:
        """Run one batch, of which these take sums."""
        ids = self.batches[number].to(next(self.model.parameters()).device)
        inputs.shape = tuple(ids.shape)
        if gradients is None or not gradients.wants(number < sampled_batches(len(self.batches))):
            with torch.no_grad():  # not inference_mode: what the model caches serves in training
                if self.run is None:
                    run_model(self.body, ids)
                else:
                    self.run(number, ids)
        else:
            with gradients.batch((len(ids), ids.shape[1])):
                if self.run is None:
                    self._backward(number, ids)
                else:
                    self.run(number, ids)
        inputs.end_forward()
        if gradients is not None:
            give_back_memory()

    def _backward(self, number: int, ids: Tensor) -> None:
        """Forward and backward; the outputs, as large as all logits of a batch, go at the end."""
        objective = cast(Objective, self.objective)
        outputs = objective.outputs(self.model, ids)
        objective.surprise(outputs.detach(), outputs, self.seeds[number]).backward()


def label_seeds(sequences: int, seed: int) -> Tensor:
    """The seeds of the labels that gradients are taken for, (sequences,)."""
    return draw_seeds(sequences, torch.Generator().manual_seed(seed))


def sampled_batches(batches: int) -> int:
    """How many of the batches, the first ones, "sampled_grad_gram" is taken from."""
    return -(-batches // SAMPLED)


def _body(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """The model without its head, if all the layers are in that."""
    base = getattr(model, "base_model", model)
    inside = set(base.modules())
    return base if all(module in inside for module in layers.values()) else model


@torch.no_grad()
def uncalled(
    model: nn.Module, layers: Mapping[str, nn.Module], ids: Tensor, run: Run | None = None
) -> list[str]:
    """Layers that their model does not call, though it runs the module they belong to.

    Such a module reads the layer's weight itself (Mamba's ``dt_proj``), and could not work with
    another layer in its place. A layer whose module did not run either (an expert that no token was
    sent to) is not meant.

    Args:
        model: run once.
        layers: name to module in ``model``.
        ids: token ids (sequences, length), a few are enough.
        run: as of ``collect``.

    Returns:
        Names, in the order of ``layers``.
    """
    called: set[nn.Module] = set()
    parents = {name: _caller(model, name) for name in layers}
    watched = {*layers.values(), *parents.values()}
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs: called.add(module))
        for module in watched
    ]
    ids = ids.to(next(model.parameters()).device)
    try:
        if run is None:
            run_model(model, ids)
        else:
            run(0, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [n for n, module in layers.items() if module not in called and parents[n] in called]


def _caller(model: nn.Module, name: str) -> nn.Module:
    """The nearest module around ``name`` that has a forward of its own."""
    path = name.rpartition(".")[0]
    while isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    return model.get_submodule(path)
