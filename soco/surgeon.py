"""The closed-form second-order update of the components that a truncation kept."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soco.component_gradients import Recorder, Sums
from soco.data import positive
from soco.keeping import Keeper, moved
from soco.linalg import Factors, Spectrum
from soco.objectives import Objective, draw_seeds
from soco.ops import all_finite
from soco.steps import checkpointed, frozen
from soco.surgery import bias_of, transformer_blocks, twins_of, weight_of

# The fractions of ``strength`` that validation chooses from.
FRACTIONS = (0.0, 0.1, 0.25, 0.5, 1.0)

# Eigenvalues of a curvature below this fraction of the largest are taken for none.
_ROUNDING = 1e-6

# What the whole update is multiplied by, where the divergence on held-out text decides.
MULTIPLES = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class SVDSurgeon:
    """Everything that the update, and the saliency, can be told."""

    damping: float = 0.1  # added to the curvature's diagonal, as a fraction of its mean
    saliency_damping: float = 10.0  # the same for ``saliency``, where the others' making up is less
    # to be relied on: a component is worth nearly what it is worth alone
    strength: float = 1.0  # the fraction of the update that is applied; an upper bound if validated
    validation: Literal["layer", "model", "none"] = "layer"  # where the fraction is chosen by
    # two-fold cross-validation over the sequences: in each layer, for all layers together, nowhere
    held_out: float = 0.1  # fraction of the sequences, the last ones, on which the divergence
    # decides how much of the update of all layers stays, and whether any does; 0: it is not asked
    clip: float | None = 0.5  # largest relative change of a component, below 1; None: no bound
    samples: int | None = None  # sequences used, from the start; None: all
    labels: int = 2  # draws from the dense model per sequence: each is a sample, and a backward
    rounds: int = 1  # repetitions, each with new draws
    batch_size: int = 8  # sequences at a time
    checkpointing: bool = False  # recompute activations in backward: less memory, a third slower
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("labels", "rounds", "batch_size"):
            positive(name, getattr(self, name))
        if self.samples is not None and (not isinstance(self.samples, int) or self.samples < 2):
            raise ValueError(f"samples must be at least 2, or None, got {self.samples!r}")
        for name in ("damping", "saliency_damping"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {self.strength}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be at least 0 and below 1, got {self.held_out}")
        if self.clip is not None and not 0 < self.clip < 1:
            raise ValueError(f"clip must be above 0 and below 1, or None, got {self.clip}")
        if self.validation not in ("layer", "model", "none"):
            raise ValueError(
                f'validation must be "layer", "model" or "none", got {self.validation!r}'
            )


def rescale(
    model: nn.Module,
    factors: Mapping[str, Factors],
    targets: Mapping[str, nn.Module],
    windows: Tensor,
    objective: Objective,
    settings: SVDSurgeon,
    on_batch: Callable[[int], None] = lambda sequences: None,
    keeper: Keeper | None = None,
) -> dict[str, Factors]:
    """Let the components that were kept make up, by their scales, for what was removed.

    Let ``W' = up @ down = sum_i u_i d_i^T`` replace W, and scale its components by
    ``1 + delta_i``. The weight then differs from W by ``sum_i delta_i u_i d_i^T - (W - W')``. With
    ``G^n`` the gradient of the loss of sample n by the weight, at W, the loss of the sample changes
    in first order by

        ``sum_i g_i^n delta_i - r^n``,  ``g_i^n = u_i^T G^n d_i``,  ``r^n = <G^n, W - W'>``.

    The labels are drawn from the dense model. So these changes have mean zero, and half their mean
    square is the second order of the expected loss: the Fisher information is its curvature. With
    ``H = mean(g g^T)`` and ``b = mean(g r)``, minimizing ``delta^T H delta / 2 - b^T delta``
    with ``damping`` times the mean of H's diagonal added to it gives

        ``delta = (H + damping mean(diag H) I)^-1 b``,  ``W'' = up diag(1 + strength delta) down``.

    For any strength in (0, 1] the quadratic falls (unless b = 0), and at damping 0 and strength 1
    it is at its least; delta is 0 where nothing was removed. It needs no SVD: the factors may come
    from any method. If they are the kept components S of one decomposition ``W = sum_i sigma_i
    u_i v_i^T`` and C is the rest, then ``g_i = sigma_i s_i``, ``r = sum_C sigma_j s_j``, and at
    damping 0 this is the published ``delta sigma_S = Hs_SS^-1 Hs_SC sigma_C`` with ``Hs = mean(s
    s^T)``. Damping differs: the published one holds all changes of sigma alike, this one all
    relative changes, so that the split of a product into factors makes no difference.

    With fewer samples than components the update fits the samples rather than the loss. So with
    ``validation``, the update from either half of the sequences is tried on the quadratic of the
    other, at each of ``FRACTIONS`` of the strength; what is lowest over both decides, and it may be
    none. Each layer is updated as if the others were dense, and the second order holds for small
    changes only. So with ``held_out`` the update of all layers is then tried, at each of
    ``MULTIPLES``, by the divergence of the compressed model on text that it was not made from; on
    that text the model is never worse than before.

    All targets get their gradients from the same passes. Memory: two matrices (rank, rank) in
    float32 per layer and half.

    Args:
        model: the dense model; left as it was.
        factors: name to the factors (out, rank), (rank, in) that will replace a layer.
        targets: name to the dense layer in the model; more names than in ``factors`` do no harm.
        windows: token ids (sequences, length), on the CPU.
        objective: of the model; draws the labels.
        settings: everything else.
        on_batch: called with the number of sequences done, after each batch, over all rounds.
        keeper: where the sums are kept now and then, from which the same call goes on, to the same
            bits; None: nowhere.

    Returns:
        name to factors in the dtypes they had; ``down`` is the tensor that was given. Layers that
        no sequence went through keep both.

    Raises:
        ValueError: a name without a target, shapes that do not fit, fewer than two sequences, or
            gradients with NaN or Inf (the layer is named).

    Source: SVD-Surgeon, arXiv:2606.23568 (there for the components of one SVD, without validation).
    """
    _check(factors, targets)
    generator = torch.Generator().manual_seed(settings.seed)
    windows = _samples(windows, settings)
    held_out = windows[:0]
    if settings.held_out:
        count = max(1, round(settings.held_out * len(windows)))
        windows, held_out = _samples(windows[:-count], settings, count), windows[-count:]
    result = dict(factors)
    held = None if keeper is None else keeper.load()
    begin, state = (0, None) if held is None else (held[0]["round"], held[0])
    if state is not None:
        result = {
            name: Factors(state["up"][name].to(up.device), down)
            for name, (up, down) in factors.items()
        }
    for this in range(begin, settings.rounds):
        before = this * len(windows)

        known = {"round": this, "up": {name: each.up for name, each in result.items()}}

        def keep(state: dict[str, Any], known: dict[str, Any] = known) -> None:
            if keeper is not None and keeper.due():
                keeper.save({**known, **state}, [])

        sums = _collect(
            model, result, targets, windows, objective, settings, generator,
            lambda done, before=before: on_batch(before + done), state=state, keep=keep,
        )  # fmt: skip
        state = None
        deltas = _deltas(sums, settings)
        multiple = 1.0
        if len(held_out):
            losses = [
                _divergence(
                    model, _scaled(result, deltas, each), targets, held_out, objective, settings
                )
                for each in MULTIPLES
            ]
            # The first of equals, and a loss that is not a number is never the least.
            multiple = min(zip(losses, MULTIPLES, strict=True), key=lambda pair: pair[0])[1]
        if multiple:
            result = _scaled(result, deltas, multiple)
    return result


def saliency(
    model: nn.Module,
    spectra: Mapping[str, Spectrum],
    targets: Mapping[str, nn.Module],
    windows: Tensor,
    objective: Objective,
    settings: SVDSurgeon,
    on_batch: Callable[[int], None] = lambda sequences: None,
) -> dict[str, Tensor]:
    """What the loss rises by when one component goes and the others make up for it.

    Removing component i is ``delta_i = -1``; with the best delta of the others, the quadratic of
    ``rescale`` rises to ``1 / (2 [H^-1]_ii)``. In units of sigma instead of relative ones it is
    the published ``sigma_i^2 / (2 [Hs^-1]_ii)``, the same number. The damping holds the others, and
    not the one that goes: with ``M = H + d mean(diag H) I``, ``d = saliency_damping``, the value is
    ``(1 / [M^-1]_ii - d mean(diag H)) / 2``. It is at most ``H_ii / 2``, the value without any
    making up, and reaches it as the damping grows. That is also the better one to allocate ranks by
    where there are fewer samples than components.

    The values are for ``ranks.allocate``; a layer of rank k then keeps the k components that are
    worth most, which need not be the first k of the spectrum.

    Args:
        model: the dense model; left as it was.
        spectra: name to a decomposition of the layer's weight, of any rank.
        targets: name to the dense layer in the model.
        windows: token ids (sequences, length), on the CPU.
        objective: of the model; draws the labels.
        settings: ``saliency_damping``, ``samples``, ``labels``, ``batch_size``, ``checkpointing``
            and ``seed`` are read.
        on_batch: called with the number of sequences done, after each batch.

    Returns:
        name to values (rank,), float32, not negative, in the spectrum's order: for token
        predictions the rise of the KL divergence in nats per token. Zeros where no sequence went
        through a layer.

    Raises:
        ValueError: as ``rescale``.

    Source: SVD-Surgeon, arXiv:2606.23568; Optimal Brain Surgeon, Hassibi and Stork, 1993.
    """
    layers = {name: Factors(spectrum.up, spectrum.down) for name, spectrum in spectra.items()}
    _check(layers, targets)
    generator = torch.Generator().manual_seed(settings.seed)
    windows = _samples(windows, settings)
    sums = _collect(
        model, layers, targets, windows, objective, settings, generator, on_batch, folds=1
    )
    tokens = windows.numel() * settings.labels
    values = {}
    for name, spectrum in spectra.items():
        sigma = spectrum.sigma.double()
        if name not in sums:
            values[name] = torch.zeros_like(sigma).float()
        else:
            curvature = sums[name].curvature[0] * (sigma[:, None] * sigma / tokens)
            values[name] = removal_cost(curvature, settings.saliency_damping).float()
    return values


def scale_update(curvature: Tensor, pull: Tensor, damping: float) -> Tensor:
    """The minimum of ``delta^T (H + damping mean(diag H) I) delta / 2 - b^T delta``.

    Args:
        curvature: H (rank, rank), symmetric positive semidefinite; may be singular.
        pull: b (rank,), in the range of H.
        damping: at least 0.

    Returns:
        delta (rank,), float64; the shortest minimum where there are several.
    """
    wide = pull.double()[:, None]
    if not damping:  # H was summed in float32: what is below that is rounding
        return (torch.linalg.pinv(curvature.double(), rtol=_ROUNDING, hermitian=True) @ wide)[:, 0]
    damped = _damped(curvature, damping)
    root, info = torch.linalg.cholesky_ex(damped)
    if not bool(info):
        return torch.cholesky_solve(wide, root)[:, 0]
    return (torch.linalg.pinv(damped, hermitian=True) @ wide)[:, 0]


def removal_cost(curvature: Tensor, damping: float) -> Tensor:
    """What ``delta^T H delta / 2`` comes to with ``delta_i = -1`` and the best others, for each i.

    Args:
        curvature: H (rank, rank), symmetric positive semidefinite.
        damping: the others pay ``damping mean(diag H) / 2`` times their squares as well; above 0
            where H is singular.

    Returns:
        (rank,), float64, from 0 to half the diagonal of H.
    """
    half = curvature.diagonal().double() / 2
    extra = damping * half.mean() * 2
    damped = _damped(curvature, damping)
    root, info = torch.linalg.cholesky_ex(damped)
    inverse = (
        torch.linalg.pinv(damped, hermitian=True) if bool(info) else torch.cholesky_inverse(root)
    )
    diagonal = inverse.diagonal()
    tiny = torch.finfo(diagonal.dtype).tiny
    cost = (1 / diagonal.clamp_min(tiny) - extra) / 2
    return torch.minimum(cost.clamp_min(0), half)


def quadratic(delta: Tensor, curvature: Tensor, pull: Tensor) -> Tensor:
    """``delta^T H delta / 2 - b^T delta``, (), for delta (rank,), H (rank, rank), b (rank,)."""
    return delta @ curvature.double() @ delta / 2 - pull.double() @ delta


def _deltas(sums: Mapping[str, Sums], settings: SVDSurgeon) -> dict[str, Tensor]:
    """The change of each layer's scales, (rank,), float64."""
    losses = {
        name: _validated(each, settings) if settings.validation != "none" else None
        for name, each in sums.items()
    }
    together = sum((each for each in losses.values() if each is not None), torch.zeros(()))
    deltas = {}
    for name, each in sums.items():
        fraction = 1.0
        if settings.validation != "none":
            seen = losses[name]
            if seen is None:  # one half of the sequences did not reach it
                continue
            chosen = seen if settings.validation == "layer" else together
            fraction = FRACTIONS[int(chosen.argmin())]
        delta = scale_update(sum(each.curvature), sum(each.pull), settings.damping)  # type: ignore[arg-type]
        deltas[name] = _applied(delta, fraction, settings)
    return deltas


def _validated(sums: Sums, settings: SVDSurgeon) -> Tensor | None:
    """The quadratic of either half at the other's update, (fractions,), on the CPU."""
    if 0 in sums.samples:
        return None
    total = torch.zeros(len(FRACTIONS), dtype=torch.float64)
    for own, other in ((0, 1), (1, 0)):
        delta = scale_update(sums.curvature[own], sums.pull[own], settings.damping)
        curvature, pull = sums.curvature[other], sums.pull[other]
        total += torch.stack(
            [quadratic(_applied(delta, f, settings), curvature, pull) for f in FRACTIONS]
        ).cpu()
    return total


def _applied(delta: Tensor, fraction: float, settings: SVDSurgeon) -> Tensor:
    delta = delta * (fraction * settings.strength)
    return delta if settings.clip is None else delta.clamp(-settings.clip, settings.clip)


def _scaled(
    factors: Mapping[str, Factors], deltas: Mapping[str, Tensor], multiple: float
) -> dict[str, Factors]:
    """The factors with their components scaled by ``1 + multiple delta``."""
    result = dict(factors)
    for name, delta in deltas.items():
        up, down = factors[name]
        scale = 1 + multiple * delta.to(up.device)
        result[name] = Factors((up.double() * scale).to(up.dtype), down)
    return result


@torch.no_grad()
def _divergence(
    model: nn.Module,
    factors: Mapping[str, Factors],
    targets: Mapping[str, nn.Module],
    windows: Tensor,
    objective: Objective,
    settings: SVDSurgeon,
) -> float:
    """The divergence of the model with these factors from the dense one, inf where it is NaN."""

    def replacing(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        up, down = (part.to(weight_of(targets[name]).dtype) for part in factors[name])
        bias = bias_of(targets[name])
        return lambda module, inputs, output: F.linear(F.linear(inputs[0], down), up, bias)

    twins = twins_of(model, {name: targets[name] for name in factors})
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    with frozen(model):
        for batch in windows.split(settings.batch_size):
            ids = batch.to(device)
            dense = objective.outputs(model, ids)
            hooks = [t.register_forward_hook(replacing(n)) for n in factors for t in twins[n]]
            try:
                student = objective.outputs(model, ids)
            finally:
                for hook in hooks:
                    hook.remove()
            total += objective.divergence(dense, student).double().cpu() * (len(ids) / len(windows))
    return math.inf if bool(total.isnan()) else float(total)


def _damped(curvature: Tensor, damping: float) -> Tensor:
    wide = curvature.double()
    return wide + torch.eye(len(wide)).to(wide) * (damping * wide.diagonal().mean())


def _collect(
    model: nn.Module,
    layers: Mapping[str, Factors],
    targets: Mapping[str, nn.Module],
    windows: Tensor,
    objective: Objective,
    settings: SVDSurgeon,
    generator: torch.Generator,
    on_batch: Callable[[int], None],
    folds: int = 2,
    state: Mapping[str, Any] | None = None,
    keep: Callable[[dict[str, Any]], None] = lambda state: None,
) -> dict[str, Sums]:
    """Run the dense model over the windows, forward and backward; the sums of the layers reached.

    Sequence k belongs to fold ``k mod folds``. A layer that sees its tokens without a batch
    dimension gives one sample per batch, whose fold is the batch's number ``mod folds``. With one
    fold, for saliency, nothing is removed and ``pull`` is 0.

    ``keep`` is told between two batches what has to be known to go on; with such a ``state`` it
    goes on from there.
    """
    recorder = Recorder()
    device = next(model.parameters()).device
    probe = torch.zeros((), device=device, requires_grad=True)  # the one leaf gradients flow to
    twins = twins_of(model, {name: targets[name] for name in layers})
    hooks = [
        twin.register_forward_hook(
            recorder.hook(name, factors, weight_of(targets[name]) if folds > 1 else None, probe)
        )
        for name, factors in layers.items()
        for twin in twins[name]
    ]
    sums: dict[str, Sums] = {}
    begin = 0
    if state is not None:
        begin = state["batch"]
        generator.set_state(state["generator"])
        sums = {name: Sums(**moved(each, device)) for name, each in state["sums"].items()}
    batches = windows.split(settings.batch_size)
    blocks = transformer_blocks(model) if settings.checkpointing else []
    try:
        with frozen(model), checkpointed(blocks):
            for number, batch in enumerate(batches[begin:], begin):
                if number > begin:
                    own = {name: vars(each) for name, each in sums.items()}
                    keep({"batch": number, "generator": generator.get_state(), "sums": own})
                ids = batch.to(device)
                recorder.shape = tuple(ids.shape)
                student = objective.outputs(model, ids)
                dense = student.detach()
                for draw in range(settings.labels):
                    seeds = draw_seeds(len(batch), generator)
                    surprise = objective.surprise(dense, student, seeds)
                    more = draw + 1 < settings.labels
                    torch.autograd.grad(surprise, [probe], retain_graph=more, allow_unused=True)
                    for name, (g, r) in recorder.take().items():
                        first = number * settings.batch_size if len(g) == len(ids) else number
                        sums.setdefault(name, Sums()).add(g, r, first, folds)
                on_batch(min((number + 1) * settings.batch_size, len(windows)))
    finally:
        for hook in hooks:
            hook.remove()
    for name, each in sums.items():
        if not all(all_finite(part) for part in (*each.curvature, *each.pull)):
            raise ValueError(
                f"the gradients of {name} hold NaN or Inf on the calibration text: the model "
                f"overflows in its dtype, or its weights are broken"
            )
    return sums


def _samples(windows: Tensor, settings: SVDSurgeon, held_out: int = 0) -> Tensor:
    windows = windows[: settings.samples]
    if len(windows) < 2:
        kept = f", and {held_out} held out" if held_out else ""
        raise ValueError(f"svd-surgeon takes two sequences at least, got {len(windows)}{kept}")
    return windows


def _check(layers: Mapping[str, Factors], targets: Mapping[str, nn.Module]) -> None:
    for name, (up, down) in layers.items():
        if name not in targets:
            raise ValueError(f"the factors of {name} have no target")
        shape = tuple(weight_of(targets[name]).shape)
        if (up.shape[0], down.shape[1]) != shape or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"the factors of {name} must make a weight {shape}, got {tuple(up.shape)} and "
                f"{tuple(down.shape)}"
            )
