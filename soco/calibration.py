"""What methods want to know of a model's layers on real inputs, collected in one pass."""

import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from soco.linalg import add_gram
from soco.objectives import Objective, by_sequence, objective_for, run_model
from soco.steps import frozen, give_back_memory
from soco.surgery import twins_of

# What can be collected. All but the last three are of the inputs; those take a backward pass.
KINDS = frozenset(
    {"gram", "mean", "abs_mean", "stacked_gram", "root", "fisher", "grad_gram", "sampled_grad_gram"}
)
OF_GRADIENTS = frozenset({"fisher", "grad_gram", "sampled_grad_gram"})

Run = Callable[[int, Tensor], object]

# One batch of so many goes into the sampled statistics: a backward pass takes twice a forward pass.
SAMPLED = 8

# Rows of a chunk: of a sum in float32 that is added up in float64, and of one step of the QR.
_CHUNK = 2048


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
        run: what runs a batch instead of the model (its number, and its token ids on the model's
            device); for statistics that need no gradient.

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
    if wanted & OF_GRADIENTS and objective is None:
        with frozen(model):
            objective = objective_for(model, windows[:1].to(device))
    twins = twins_of(model, layers)
    alone: set[str] = set()
    while True:
        collector = _Collector(alone, wanted)
        hooks = [
            twin.register_forward_pre_hook(collector.hook(name))
            for name in layers
            for twin in twins[name]
        ]
        gradients = _Gradients(wanted) if wanted & OF_GRADIENTS else None
        batches = windows.split(batch_size)
        sample = -(-len(batches) // SAMPLED)
        if gradients is not None:
            hooks += [t.register_forward_hook(gradients.hook(n)) for n in layers for t in twins[n]]
        generator = torch.Generator().manual_seed(seed)
        try:
            with frozen(model), torch.autocast(device.type, enabled=False):
                for done, batch in enumerate(batches, start=1):
                    ids = batch.to(device)
                    collector.shape = tuple(ids.shape)
                    if gradients is None or not gradients.wants(done <= sample):
                        # Not inference_mode: what the model caches has to serve in training later.
                        with torch.no_grad():
                            if run is None:
                                run_model(_body(model, layers), ids)
                            else:
                                run(done - 1, ids)
                    else:
                        gradients.run(model, cast(Objective, objective), ids, generator)
                    collector.end_forward()
                    if gradients is not None:
                        give_back_memory()
                    if collector.parted:
                        break
                    on_batch(min(done * batch_size, len(windows)))
        finally:
            for hook in hooks:
                hook.remove()
        if not collector.parted:
            break
        alone |= collector.parted
    return {name: collector.result(name, module, gradients) for name, module in layers.items()}


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


class _Collector:
    """Sums over inputs; layers with the same input tensors point to the same sums.

    A layer follows another from its first call on, if both were given the same tensor for the first
    time, and has to be given the same ones ever after.

    Args:
        alone: layers that follow no other.
        kinds: of statistics.
    """

    def __init__(self, alone: set[str], kinds: Collection[str]) -> None:
        self.alone = alone
        self.kinds = kinds
        self.parted: set[str] = set()  # layers that went another way than the one they followed
        self.sums: dict[str, dict[str, Tensor]] = {}  # by leader, then by kind
        self.tokens: dict[str, int] = {}
        self.leader: dict[str, str] = {}  # layer to the layer that sums for it
        self.fresh: list[str] = []  # leaders whose first forward this is
        self.seen: dict[str, list[weakref.ref[Tensor]]] = {}  # inputs of this forward, by leader
        self.calls: dict[str, int] = {}  # of a layer, in this forward
        self.shape: tuple[int, ...] = ()  # (sequences, length) of the ids that run

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """The forward pre-hook of the layer ``name``."""

        def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            self.calls[name] = self.calls.get(name, 0) + 1
            if name not in self.leader:
                self.leader[name] = self._find_leader(name, x)
            leader = self.leader[name]
            if leader == name:
                self.seen.setdefault(name, []).append(weakref.ref(x))
                self._add(name, x.detach())
                return
            before = self.seen.get(leader, [])
            call = self.calls[name]
            if call > len(before) or before[call - 1]() is not x:
                self.parted.add(name)

        return observe

    def _find_leader(self, name: str, x: Tensor) -> str:
        if name not in self.alone:
            for other in self.fresh:
                if self.seen[other][0]() is x:
                    return other
        self.fresh.append(name)
        return name

    def end_forward(self) -> None:
        """Call after each forward."""
        for name, leader in self.leader.items():
            if self.calls.get(name, 0) != self.calls.get(leader, 0):
                self.parted.add(name)
        self.seen.clear()
        self.calls.clear()
        self.fresh.clear()

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        sums = self.sums.get(name)
        if sums is None:
            sums = self.sums[name] = _zeros(self.kinds, x.shape[-1], x.device)
        add_gram(sums["gram"], rows)
        for chunk in rows.split(_CHUNK):
            wide = chunk.float()
            if "mean" in sums:
                sums["mean"].add_(wide.sum(0).double())
            if "abs_mean" in sums:
                sums["abs_mean"].add_(wide.abs().sum(0).double())
            if "root" in sums:
                stack = torch.cat([sums["root"], chunk.double()])
                sums["root"] = torch.linalg.qr(stack, mode="r").R[: x.shape[-1]]
        if "stacked_gram" in sums:
            mean = by_sequence(x, self.shape).float().mean(0)  # (length, in)
            add_gram(sums["stacked_gram"], mean)
        self.tokens[name] = self.tokens.get(name, 0) + len(rows)

    def result(self, name: str, module: nn.Module, gradients: "_Gradients | None") -> Statistics:
        """The sums of the layer ``name``."""
        leader = self.leader.get(name)
        outputs, inputs = _shape(module)
        device = next(module.parameters()).device
        if leader is None or leader not in self.sums:
            sums, tokens = _zeros(self.kinds, inputs, device), 0
        else:
            sums, tokens = self.sums[leader], self.tokens[leader]
            if not bool(torch.isfinite(sums["gram"]).all()):
                raise ValueError(
                    f"the inputs of {name} hold NaN or Inf on the calibration text: the model "
                    f"overflows in its dtype, or its weights are broken"
                )
        if gradients is None:
            return Statistics(tokens=tokens, **cast(dict[str, Any], sums))
        own = gradients.result(name, outputs, inputs, tokens, device)
        parts = cast(dict[str, Any], {**sums, **own})
        return Statistics(tokens=tokens, sequences=gradients.sequences, **parts)


def _zeros(kinds: Collection[str], inputs: int, device: torch.device) -> dict[str, Tensor]:
    """The statistics of inputs that nobody has seen."""
    sizes = {
        "gram": (inputs, inputs),
        "mean": (inputs,),
        "abs_mean": (inputs,),
        "stacked_gram": (inputs, inputs),
        "root": (inputs, inputs),
    }
    return {
        kind: torch.zeros(size, dtype=torch.float64, device=device)
        for kind, size in sizes.items()
        if kind in kinds
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an ``nn.Linear`` or ``Conv1D``."""
    inputs = getattr(module, "in_features", None) or getattr(module, "nx")  # noqa: B009
    outputs = getattr(module, "out_features", None) or getattr(module, "nf")  # noqa: B009
    return cast(int, outputs), cast(int, inputs)


class _Gradients:
    """Sums over the gradients of outputs, by layer.

    Nothing in the model requires a gradient; a zero that does is added to every layer's outputs.

    Args:
        kinds: of statistics.
    """

    def __init__(self, kinds: Collection[str]) -> None:
        self.kinds = frozenset(kinds) & OF_GRADIENTS
        self.sequences = 0
        self.sampling = False  # whether this batch goes into what is sampled
        self.sampled: dict[str, int] = {}  # tokens that did
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.calls: dict[str, int] = {}  # of a layer, in this forward
        self.pending: dict[str, Tensor] = {}  # gradients (sequences, out, in) of several calls
        self.shape: tuple[int, ...] = ()  # (sequences, length) of the ids that run

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        """The forward hook of the layer ``name``."""

        def observe(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            x = inputs[0].detach()
            self.calls[name] = self.calls.get(name, 0) + 1
            zero = torch.zeros(1, dtype=output.dtype, device=output.device, requires_grad=True)
            output = output + zero
            output.register_hook(lambda gradient: self._add(name, x, gradient))
            return output

        return observe

    def wants(self, sampling: bool) -> bool:
        """Whether a batch has to be run with gradients, if it is in the sample or not."""
        self.sampling = sampling and "sampled_grad_gram" in self.kinds
        return self.sampling or bool(self.kinds - {"sampled_grad_gram"})

    def run(
        self, model: nn.Module, objective: Objective, ids: Tensor, generator: torch.Generator
    ) -> None:
        """One batch (sequences, length), forward and backward."""
        self.calls.clear()
        self.shape = tuple(ids.shape)
        with torch.enable_grad():
            outputs = objective.outputs(model, ids)
            objective.surprise(outputs.detach(), outputs, generator).backward()
        for name, weight in self.pending.items():
            self.sums[name]["fisher"].add_(weight.double().square().sum(0))
        self.pending.clear()
        self.sequences += len(ids)

    @torch.no_grad()
    def _add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        x, g = (by_sequence(rows, self.shape).float() for rows in (x, gradient))
        sums = self.sums.setdefault(name, {})
        into = ["grad_gram"] if "grad_gram" in self.kinds else []
        if self.sampling:
            into.append("sampled_grad_gram")
            self.sampled[name] = self.sampled.get(name, 0) + g.shape[0] * g.shape[1]
        if into:
            size = (g.shape[-1], g.shape[-1])
            for kind in into:
                sums.setdefault(kind, torch.zeros(size, dtype=torch.float64, device=g.device))
                add_gram(sums[kind], g.flatten(0, 1))
        if "fisher" in self.kinds:
            shape = (g.shape[-1], x.shape[-1])
            sums.setdefault("fisher", torch.zeros(shape, dtype=torch.float64, device=g.device))
            if self.calls[name] > 1:  # the gradient of a sequence is the sum over all calls
                self.pending[name] = self.pending.get(name, 0) + g.mT @ x
                return
            for one, other in zip(g, x, strict=True):
                sums["fisher"].add_((one.T @ other).double().square())

    def result(
        self, name: str, outputs: int, inputs: int, tokens: int, device: Any
    ) -> dict[str, Tensor]:
        """The sums of the layer ``name``, which saw so many tokens in all."""
        sizes = {kind: (outputs, outputs) for kind in ("grad_gram", "sampled_grad_gram")}
        sizes["fisher"] = (outputs, inputs)
        found = dict(self.sums.get(name, {}))
        if "sampled_grad_gram" in found:  # as if all tokens had been like those
            found["sampled_grad_gram"] *= tokens / max(1, self.sampled[name])
        for kind, total in found.items():
            if not bool(torch.isfinite(total).all()):
                raise ValueError(
                    f"the gradients at {name} hold NaN or Inf on the calibration text: the model "
                    f"overflows in its dtype, or its weights are broken ({kind})"
                )
        return {
            kind: found.get(kind, torch.zeros(sizes[kind], dtype=torch.float64, device=device))
            for kind in self.kinds
        }
