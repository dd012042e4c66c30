"""Learning at which rank the outputs of every layer may be cut, by a truncation with a gradient."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from soco.keeping import Keeper
from soco.linalg import Factors
from soco.objectives import HiddenStates, Objective, run_model
from soco.ops import all_finite
from soco.principal import PrincipalDirections, project
from soco.ranks import Shape, allocate, is_dense
from soco.steps import EndlessBatches, Step, Teacher, all_dense, check_batches, half_cosine
from soco.svd_gradient import stable_svd

# How much more valuable a component counts that is earlier by the whole of its layer's rank, as a
# power of e: so sharp that positions decide, and float64 still tells all values apart.
_SHARPNESS = 32.0


@dataclass(frozen=True)
class PositionSettings:
    """Everything the training of truncation positions can be told."""

    steps: int = 100  # optimizer steps
    loss: Literal["divergence", "cross-entropy", "perplexity"] = "divergence"  # what the positions
    # minimize: the distance to the dense model, the loss on the text, or its exponential (paper)
    batch_size: int = 4  # sequences per step
    micro_batch: int | None = None  # sequences at a time in memory, and in one truncation; None:
    # the whole batch
    learning_rate: float = 0.03  # of Adam, at the start; in fractions of a layer's full rank
    rate_end: float = 0.1  # at the end, as a multiple of that; half a cosine in between
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam
    steepness: float = 2.0  # of the truncation's tanh, per rank (the paper's is 10)
    ratio_weight: float = 2.0  # of |kept fraction - target|; 1 is what a removed fraction costs in
    # the mean at the start: the loss above the dense model's, over the fraction removed
    range_weight: float = 1.0  # of the squared ranks by which a position is out of range
    terms: int = 10  # highest power in the series of close pairs' gradients
    close: float = 1e-4  # relative gap up to which two singular values are a close pair
    solver: Literal["exact", "randomized"] = "exact"  # of the SVD of the outputs in training
    spare: int = 5  # components beyond the position that the randomized solver computes
    power_iterations: int = 2  # of the randomized solver
    update_inputs: Literal["dense", "truncated"] = "dense"  # whose inputs the weight update sees:
    # the dense model's, or those behind truncated layers
    checkpointing: bool = False  # recompute activations in backward: less memory, a third slower
    seed: int = 0  # of the order of the sequences

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_batches(self, "steps")
        for name in ("learning_rate", "steepness"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("rate_end", "ratio_weight", "range_weight", "terms", "spare"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name, known in (
            ("loss", ("divergence", "cross-entropy", "perplexity")),
            ("solver", ("exact", "randomized")),
            ("update_inputs", ("dense", "truncated")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )


def soft_mask(kept: Tensor, count: int, steepness: float) -> Tensor:
    """What each of ``count`` components is multiplied with when about ``kept`` of them stay.

    ``0.5 tanh(steepness (gamma - i)) + 0.5`` with i counted from 1, as in the paper's code, and
    ``gamma = kept + 1/2``: a whole ``kept`` is then so many components, none of them half there.
    (The paper counts gamma itself, half a component more.)

    Args:
        kept: scalar, differentiable.
        count: components.
        steepness: beta; 10 turns a component on within 0.3 ranks, 2 within 1.5.

    Source: Dobi-SVD, arXiv:2502.02723, section 3.1.

    >>> soft_mask(torch.tensor(2.0), 3, 10.0)
    tensor([1.0000e+00, 9.9995e-01, 4.5389e-05])
    """
    index = torch.arange(1, count + 1, device=kept.device, dtype=kept.dtype)
    return 0.5 * torch.tanh(steepness * (kept + 0.5 - index)) + 0.5


class TruncatedLinear(nn.Module):
    """A linear layer whose outputs are cut to a trainable rank.

    ``y = U (S * mask) V^T + bias`` with the SVD ``x W^T = U S V^T`` of the outputs of *all tokens
    of the call* together. The paper cuts each sequence by itself (2048 tokens of it); but then a
    sequence of 256 tokens never has more than 256 components, and each may have a subspace of its
    own, which the compressed layer cannot give it. In the whole batch (4 x 256) one subspace serves
    all, as it will in the end. So ``micro_batch`` also says how many tokens are cut together.

    The bias is added after the cut: it costs no rank. A weight with more outputs than inputs is
    taken as ``Q core`` with orthonormal columns in Q, and ``x core^T`` is cut: the same result from
    a smaller SVD.

    Args:
        weight: (out, in), the dense weight; kept by reference.
        bias: (out,) or None; kept by reference.
        kept: components at the start, a real number, from 1 to min(out, in).
        settings: how the outputs are taken apart.

    Source: Dobi-SVD, arXiv:2502.02723.
    """

    core: Tensor  # (side, in), float32 or float64; side = min(out, in)
    basis: Tensor | None  # (out, side), orthonormal columns; None where core is the weight itself

    def __init__(
        self, weight: Tensor, bias: Tensor | None, kept: float, settings: PositionSettings
    ) -> None:
        """Set the position; nothing is trained yet."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if not 1 <= kept <= self.full_rank:
            raise ValueError(f"kept must be from 1 to {self.full_rank}, got {kept}")
        self.settings = settings
        self.dense = False  # True: forward is the dense layer's
        self.observer: Callable[[Tensor], None] | None = None  # gets x core^T (tokens, side)
        self.weight, self.bias = weight, bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        core, basis = weight.detach().to(wide), None
        if self.out_features > self.in_features:
            basis, core = (part.to(wide) for part in torch.linalg.qr(weight.detach().double()))
        self.register_buffer("core", core, persistent=False)
        self.register_buffer("basis", basis, persistent=False)
        # The position as a fraction of the full rank, so that one learning rate fits all layers.
        self.position = nn.Parameter(
            torch.tensor(kept / self.full_rank, dtype=wide, device=weight.device)
        )

    @property
    def full_rank(self) -> int:
        """min(out, in)."""
        return min(self.out_features, self.in_features)

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.out_features, self.in_features

    def kept(self) -> Tensor:
        """Components that stay, a real number, differentiable; training may take it out of range.

        The paper's gamma is this plus 1/2.
        """
        return self.position * self.full_rank

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in) to (..., out)."""
        if x.numel() == 0 or (self.dense and self.observer is None):
            return F.linear(x, self.weight, self.bias)
        z = F.linear(x.to(self.core.dtype), self.core)  # (..., side)
        rows = z.reshape(-1, z.shape[-1])
        if self.observer is not None:
            self.observer(rows.detach())
        if self.dense:
            return F.linear(x, self.weight, self.bias)
        cut = self._cut(rows).reshape(z.shape)
        y = (cut if self.basis is None else F.linear(cut, self.basis)).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _cut(self, rows: Tensor) -> Tensor:
        """The rows (tokens, side) with their components beyond the position faded out."""
        settings = self.settings
        kept = self.kept().clamp(1, self.full_rank)
        rank = min(rows.shape)
        if settings.solver == "randomized":
            rank = min(rank, math.ceil(float(kept.detach())) + settings.spare)
        U, S, Vh = stable_svd(
            rows,
            rank,
            terms=settings.terms,
            close=settings.close,
            method=settings.solver,
            power_iterations=settings.power_iterations,
        )
        return (U * (S * soft_mask(kept, rank, settings.steepness))) @ Vh

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"kept={float(self.kept().detach()):.2f} of {self.full_rank}"
        )


def parameter_ratio(layers: Mapping[str, TruncatedLinear]) -> Tensor:
    """Kept parameters over the dense ones, differentiable in the positions.

    A layer counts ``min(kept (out + in), out in)``. The gradient is that of the first argument
    everywhere: with that of the minimum, a layer that once passed break-even would feel no pressure
    any more and never come back.
    """
    total = sum(layer.weight.numel() for layer in layers.values())
    spent = torch.zeros(())
    for layer in layers.values():
        cost = (layer.kept() * sum(layer.shape)).cpu()
        dense = float(layer.weight.numel())
        spent = spent + cost + (cost.clamp(max=dense) - cost).detach()
    return spent / total


def out_of_range(layers: Mapping[str, TruncatedLinear]) -> Tensor:
    """Squared ranks by which positions are below 1 or above the full rank, summed over layers."""
    penalty = torch.zeros(())
    for layer in layers.values():
        kept = layer.kept()
        low, high = F.relu(1 - kept), F.relu(kept - layer.full_rank)
        penalty = penalty + (low.square() + high.square()).cpu()
    return penalty


@torch.no_grad()
def choose_ranks(layers: Mapping[str, TruncatedLinear], budget: int) -> dict[str, int]:
    """Whole ranks that meet ``budget`` and are nearest to the positions.

    All positions are moved by the same fraction of their layers' full ranks until the budget is
    met: a component is worth ``exp(32 (kept - i) / full)``, and ``ranks.allocate`` chooses. Layers
    at break-even, or nearer to it than 1/32 of their full rank, may become dense.

    Args:
        layers: name to layer.
        budget: parameters that all layers may hold together (``ranks.parameter_budget``).

    Returns:
        name to rank, at least 1; ``min(out, in)`` means dense. What ``ranks.allocate`` says of the
        budget holds.
    """
    values = {}
    for name, layer in layers.items():
        full = layer.full_rank
        ahead = layer.kept().double().cpu() + 0.5 - torch.arange(1, full + 1)
        values[name] = torch.exp(_SHARPNESS * ahead / full)
    return allocate(values, {name: layer.shape for name, layer in layers.items()}, budget)


def train_positions(
    model: nn.Module,
    layers: Mapping[str, TruncatedLinear],
    windows: Tensor,
    budget: int,
    objective: Objective,
    settings: PositionSettings,
    on_step: Callable[[Step], None] = lambda step: None,
    keeper: Keeper | None = None,
) -> list[Step]:
    """Learn how many components every layer keeps, all layers together.

    Minimizes ``loss + weight |kept fraction - target| + range_weight out_of_range`` over one number
    per layer; the weight is ``ratio_weight`` times the price of a parameter: how far the loss of
    the first batch is above the dense model's, over the fraction removed. With a weight below the
    price at the target (1 in these units, if it were the same everywhere) the ratio does not come
    down; far above it, the steps follow the ratio alone and the losses of the layers hardly tell.
    ``choose_ranks`` makes whole ranks of the positions.

    Args:
        model: holds ``layers``; all parameters but the positions are left as they are, and get no
            gradient.
        layers: name to layer, on their devices.
        windows: token ids (sequences, length), on the CPU.
        budget: parameters the layers may keep together (``ranks.parameter_budget``).
        objective: what the compressed model should keep.
        settings: everything else.
        on_step: called after each optimizer step.
        keeper: where the state is kept from which the same call goes on; None: nowhere.

    Returns:
        All steps, in order; ``kept`` is ``parameter_ratio``.

    Raises:
        ValueError: fewer windows than one batch, outputs or a loss that are not finite, or a loss
            on the text for a model that predicts none.

    Source: Dobi-SVD, arXiv:2502.02723: the terms of the loss, Adam, the cosine. Our choice: the
    unit of the weight (theirs is 200 to 400, for a loss of perplexities), the rates (theirs fall
    from 5 to 4, of 2048 positions, over 20 to 50 epochs), and a tanh that is less steep: with
    theirs a position halfway between two steps of the tanh has no gradient, and stays.
    """
    if len(windows) < settings.batch_size:
        raise ValueError(
            f"a batch takes {settings.batch_size} sequences, the calibration has {len(windows)}"
        )
    if settings.loss != "divergence" and isinstance(objective, HiddenStates):
        raise ValueError(
            f'loss "{settings.loss}" is of predicted tokens, which this model has not: '
            f'take "divergence"'
        )
    generator = torch.Generator().manual_seed(settings.seed)
    stream = EndlessBatches(len(windows), settings.batch_size, generator)
    teacher = Teacher(model, lambda: all_dense(layers.values()), objective, windows)
    target = budget / sum(layer.weight.numel() for layer in layers.values())
    positions = [layer.position for layer in layers.values()]
    optimizer = torch.optim.Adam(positions, lr=settings.learning_rate, betas=settings.betas)
    history: list[Step] = []
    weight = 0.0  # of the distance from the target, known after the first batch
    held = None if keeper is None else keeper.load()
    if held is not None:
        state, parts = held
        weight = state["weight"]
        history += [Step(**step) for step in state["history"]]
        stream.go_back(state["batches"])
        optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for position, value in zip(positions, state["positions"], strict=True):
                position.copy_(value)
        for part in parts:
            teacher.take(part)

    def keep() -> None:
        if keeper is not None:
            keeper.save(
                {
                    "weight": weight,
                    "history": [asdict(step) for step in history],
                    "batches": stream.state(),
                    "optimizer": optimizer.state_dict(),
                    "positions": [position.detach() for position in positions],
                },
                teacher.fresh(),
            )

    begin = len(history)
    for step in range(begin, settings.steps):
        if keeper is not None and step > begin and keeper.due():
            keep()
        rate = half_cosine(step, settings.steps, 1.0, settings.rate_end)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        optimizer.zero_grad(set_to_none=True)
        loss, divergence, excess = _pass(teacher, layers, next(stream), settings)
        if step == 0:
            weight = settings.ratio_weight * max(excess, 0.0) / (1 - target)
        kept = parameter_ratio(layers)
        press = weight * (kept - target).abs()
        press = press + settings.range_weight * out_of_range(layers)
        press.backward(inputs=positions)
        optimizer.step()
        loss += press.item()
        with torch.no_grad():
            now = float(parameter_ratio(layers))
        history.append(Step("positions", step + 1, settings.steps, loss, divergence, now))
        on_step(history[-1])
    if begin < settings.steps:
        keep()
    return history


def _pass(
    teacher: Teacher,
    layers: Mapping[str, TruncatedLinear],
    batch: Tensor,
    settings: PositionSettings,
) -> tuple[float, float, float]:
    """Forward and backward over ``batch``, a choice of windows, in micro-batches.

    Returns:
        The loss; the divergence, whether it is the loss or not; and how far the loss is above the
        dense model's. Means over the batch.
    """
    model, objective = teacher.model, teacher.objective
    positions = [layer.position for layer in layers.values()]
    sums = torch.zeros(3, dtype=torch.float64)
    for chosen in batch.split(settings.micro_batch or settings.batch_size):
        part = len(chosen) / len(batch)
        ids = teacher.windows[chosen].to(next(model.parameters()).device)
        dense = teacher.outputs(chosen)
        if not all_finite(dense):
            raise ValueError(
                "the outputs of the dense model are not finite (float16 overflows; try bfloat16 "
                "or float32)"
            )
        student = objective.outputs(model, ids)
        divergence = objective.divergence(dense, student)
        loss, least = divergence, 0.0
        if settings.loss != "divergence":
            loss, least = (_text_loss(settings, objective, each, ids) for each in (student, dense))
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss became {loss.item()}: learning_rate ({settings.learning_rate}) is too "
                f"high, or the model's outputs are near overflow"
            )
        (loss * part).backward(inputs=positions)
        values = loss.item(), divergence.item(), loss.item() - float(least)
        sums += part * torch.tensor(values, dtype=torch.float64)
    loss, divergence, excess = sums.tolist()
    return loss, divergence, excess


def _text_loss(
    settings: PositionSettings, objective: Objective, outputs: Tensor, ids: Tensor
) -> Tensor:
    loss = objective.cross_entropy(outputs, ids)
    return loss.exp() if settings.loss == "perplexity" else loss


@torch.no_grad()
def update_weights(
    model: nn.Module,
    layers: Mapping[str, TruncatedLinear],
    ranks: Mapping[str, int],
    windows: Tensor,
    settings: PositionSettings,
    keeper: Keeper | None = None,
) -> tuple[dict[str, Factors], list[str]]:
    """The weights cut to ``ranks``: ``V V^T W`` with the principal directions V of the outputs.

    One pass over all windows; the directions of all layers are gathered at once, batch by batch.

    Args:
        model: holds ``layers``.
        layers: name to layer.
        ranks: name to rank (``choose_ranks``); layers that are dense at theirs are left out.
        windows: token ids (sequences, length), on the CPU.
        settings: the batch size, and whose inputs are seen.
        keeper: where the directions are kept now and then, from which the same call goes on.

    Returns:
        name to factors, in float32 or float64; and the names of layers that saw no token, which
        were cut by their plain SVD.
    """
    chosen = {n: layer for n, layer in layers.items() if not is_dense(layer.shape, ranks[n])}
    gathered = {name: PrincipalDirections(ranks[name]) for name in chosen}
    base = getattr(model, "base_model", model)
    inside = set(base.modules())
    body = base if all(layer in inside for layer in layers.values()) else model
    device = next(model.parameters()).device
    try:
        for name, layer in layers.items():
            layer.dense = settings.update_inputs == "dense" or name not in chosen
        for name, layer in chosen.items():
            layer.observer = gathered[name].update
        batches = windows.split(settings.micro_batch or settings.batch_size)
        held = None if keeper is None else keeper.load()
        begin = 0
        if held is not None:
            begin = held[0]["done"]
            for name, sketch in held[0]["sketches"].items():
                gathered[name].sketch = None if sketch is None else sketch.to(device)
        for done, batch in enumerate(batches[begin:], begin):
            run_model(body, batch.to(device))
            if keeper is not None and done + 1 < len(batches) and keeper.due():
                sketches = {name: each.sketch for name, each in gathered.items()}
                keeper.save({"done": done + 1, "sketches": sketches}, [])
    finally:
        for layer in layers.values():
            layer.dense, layer.observer = False, None
    factors = {}
    for name, layer in chosen.items():
        core = layer.weight if layer.basis is None else layer.core
        directions = gathered[name].directions(core.detach())
        if layer.basis is not None:
            directions = layer.basis.double() @ directions
        factors[name] = project(layer.weight, directions)
    return factors, [name for name in chosen if gathered[name].energy is None]
