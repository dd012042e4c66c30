"""One training loop for spectral scores: who stays, and how much each counts, for every size."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from soco.choosing import (
    choose_components,
    component_values,
    kept_params,
    polarization,
    soft_ratio,
)
from soco.masters import probed_rate
from soco.objectives import HiddenStates, Objective, TokenDistribution
from soco.spectral import SpectralLinear
from soco.stages import Stage, TrainingSettings
from soco.steps import Step, Teacher, all_dense, endless_batches, give_back_memory

_STEP_COST = 0.04  # of the loss, by a step with random signs, at the rate that is measured

# Parameters of the layers from which on memory goes back to the system after passes that record:
# those leave large holes, and passes of smaller models are too short for it.
_LARGE = 2**23

# What a layer may train besides its scores.
BESIDES = ("left", "right", "deviation")


@dataclass(frozen=True)
class Snapshot:
    """What a layer's scores were, and what its components were worth, when a budget was met."""

    scores: Tensor  # (rank,), float32
    logit: Tensor  # (rank,), float32, of which the scores are made
    values: Tensor  # (rank,), float32: what a component is worth in the loss
    mask: Tensor  # (rank,), bool: the components that are alive
    left: Tensor | None = None  # (out,), of the outputs' scales; none were trained
    right: Tensor | None = None  # (in,), of the inputs' scales
    deviation: Tensor | None = None  # (out,), a trained one


@dataclass
class _Run:
    model: nn.Module
    layers: Mapping[str, SpectralLinear]
    objective: Objective
    settings: TrainingSettings
    generator: torch.Generator
    teacher: Teacher
    pivoted: bool = False
    expected: Mapping[str, Tensor] = field(default_factory=dict)  # Fisher information, (rank,)
    rate: float = 0.0  # learning rate of the logits
    squares: dict[str, Tensor] = field(default_factory=dict)  # decayed sums, (rank,)
    weights: dict[str, Tensor] = field(default_factory=dict)  # of what they sum, (rank,)
    alive: dict[str, int] = field(default_factory=dict)  # living components
    watched: dict[str, int] = field(default_factory=dict)  # and those that may come back
    kept: float = 1.0  # living parameters, as a fraction of the targets'


def train_scores(
    model: nn.Module,
    layers: Mapping[str, SpectralLinear],
    windows: Tensor,
    budgets: Sequence[int],
    objective: Objective,
    settings: TrainingSettings,
    on_step: Callable[[Step], None] = lambda step: None,
    *,
    pivoted: bool = False,
    expected: Mapping[str, Tensor] | None = None,
) -> tuple[list[Step], list[dict[str, Snapshot]]]:
    """Learn the scores of all layers together, and who of the components stays.

    With the criterion "fisher" a component is worth the second-order change of the loss when it
    goes: ``score^2 F / 2`` with the Fisher information ``F = E[(d nll / d score)^2]`` over labels
    drawn from the dense model, a running average over the training. For a masked one the score it
    had and the Fisher information it would have now are used, so that it can come back. With
    "score" it is worth its score. Each choice is one ``ranks.allocate`` over all layers, with dense
    fallback.

    Of several budgets the first is trained for from all components, and each of the others from
    what lived before it, with the scores that were learned until then.

    Args:
        model: holds ``layers``; all other parameters are left as they are.
        layers: name to layer, on their devices. At the end their masks meet the last budget,
            whatever the stages did.
        windows: token ids (sequences, length), on the CPU.
        budgets: parameters the layers may keep together (``ranks.parameter_budget``), one or
            several, descending.
        objective: what the compressed model should keep.
        settings: everything else.
        on_step: called after each optimizer step, with the one before it: nothing waits for a
            number that is still being computed.
        pivoted: whether the factors will be pivoted, which hold less (``ranks.layer_params``).
        expected: name to the Fisher information (rank,) that the scores should have by what made
            the components: counts like ``settings.fisher_prior`` batches.

    Returns:
        All steps, in order; and for each budget the snapshots of all layers.

    Raises:
        ValueError: fewer windows than one batch, budgets that do not descend, or a loss that is not
            finite.

    Source: three stages of SoCo, arXiv:2502.15092; the Fisher criterion and the hard mask that
    follows it are ours (docs/methods.md says why).
    """
    if len(windows) < settings.batch_size:
        raise ValueError(
            f"a batch takes {settings.batch_size} sequences, the calibration has {len(windows)}"
        )
    if not budgets or any(a <= b for a, b in pairwise(budgets)):
        raise ValueError(f"budgets must be one or more and descend, got {list(budgets)}")
    generator = torch.Generator().manual_seed(settings.seed)
    if settings.softening != 1 and isinstance(objective, TokenDistribution):
        objective = replace(objective, temperature=settings.softening)
    teacher = Teacher(model, lambda: all_dense(layers.values()), objective, windows)
    run = _Run(
        model, layers, objective, settings, generator, teacher, pivoted, expected or {}
    )  # fmt: skip
    batches = endless_batches(len(windows), settings.batch_size, generator)
    _offer(run)
    if settings.criterion == "fisher":
        for _ in range(settings.fisher_warmup):
            _pass(run, next(batches), None, record=True)
    begin = sum(layer.weight.numel() for layer in layers.values())
    losses = _Losses(settings.steps_in_all(len(budgets)), on_step)
    snapshots = []
    for position, budget in enumerate(budgets):
        run.rate = settings.learning_rate or _measured_rate(run, budget)
        optimizer = _optimizer(run)
        for stage, steps in settings.stages_for(position):
            _run_stage(run, stage, steps, batches, begin, budget, optimizer, losses)
        if kept_params(layers, pivoted) > budget:
            _choose(run, budget)
        begin = budget
        values = component_values(layers, _fisher(run))
        snapshots.append(
            {
                name: Snapshot(
                    layer.scores().detach(),
                    layer.logit.detach().clone(),
                    values[name],
                    layer.mask.clone(),
                    **{
                        part: value.detach().clone()
                        for part in BESIDES
                        if (value := getattr(layer, part)) is not None
                    },
                )
                for name, layer in layers.items()
            }
        )
    losses.wait()
    return losses.history, snapshots


class _Losses:
    """The history; it is one step behind, so that no step waits for its own loss."""

    def __init__(self, total: int, on_step: Callable[[Step], None]) -> None:
        self.total, self.on_step = total, on_step
        self.history: list[Step] = []
        self.pending: tuple[Stage, Tensor, float] | None = None
        self.smooth, self.best, self.since = math.nan, math.inf, 0

    def begin_stage(self) -> None:
        """What came before counts no more for the patience."""
        self.wait()
        self.smooth, self.best, self.since = math.nan, math.inf, 0

    def add(self, stage: Stage, losses: Tensor, kept: float) -> None:
        """Note the loss and the divergence in it, (2,), and read those of the step before."""
        self.wait()
        self.pending = stage, losses, kept

    def wait(self) -> None:
        """Read what is pending.

        Raises:
            ValueError: a loss is not finite.
        """
        if self.pending is None:
            return
        stage, losses, kept = self.pending
        self.pending = None
        loss, divergence = losses.tolist()
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss became {loss} in stage {stage.name}: the model's outputs are not finite "
                f"(float16 overflows; try bfloat16 or float32) or learning_rate is too high"
            )
        step = Step(stage.name, len(self.history) + 1, self.total, loss, divergence, kept)
        self.history.append(step)
        self.on_step(step)
        self.smooth = loss if math.isnan(self.smooth) else 0.9 * self.smooth + 0.1 * loss
        lower = self.smooth < self.best
        self.best, self.since = (self.smooth, 0) if lower else (self.best, self.since + 1)


def _trained(run: _Run) -> list[tuple[list[nn.Parameter], float]]:
    """What is trained, scores and what is beside them, each kind with its share of the rate."""
    settings = run.settings
    rates = {
        "logit": 1.0, "left": settings.channel_rate, "right": settings.channel_rate,
        "deviation": settings.deviation_rate,
    }  # fmt: skip
    found = {part: [getattr(layer, part) for layer in run.layers.values()] for part in rates}
    return [(found[part], rate) for part, rate in rates.items() if found[part][0] is not None]


@torch.no_grad()
def _measured_rate(run: _Run, budget: int) -> float:
    """The rate that suits the model as it will be at the budget, before it is trained."""
    chosen = torch.arange(run.settings.batch_size)
    ids = run.teacher.windows[chosen].to(next(run.model.parameters()).device)
    dense = run.teacher.outputs(chosen)
    before = {name: (layer.mask.clone(), layer.computed) for name, layer in run.layers.items()}

    def loss() -> float:
        parts = zip(ids.split(size), dense.split(size), strict=True)
        losses = [
            run.objective.divergence(wanted, run.objective.outputs(run.model, each)) * len(each)
            for each, wanted in parts
        ]
        return float(sum(losses)) / len(ids)

    size = run.settings.micro_batch or len(ids)
    choose_components(run.layers, _fisher(run), budget, run.pivoted)
    for layer in run.layers.values():
        layer.computed = len(layer.mask)
    try:
        groups = _trained(run)
        return probed_rate(
            [p for parameters, _ in groups for p in parameters],
            [multiple for parameters, multiple in groups for _ in parameters],
            loss, loss(), run.settings.seed, _STEP_COST,
        )  # fmt: skip
    finally:
        for name, layer in run.layers.items():
            layer.mask.copy_(before[name][0])
            layer.computed = before[name][1]


def _optimizer(run: _Run) -> torch.optim.Adam:
    """Adam, with a group for each kind of parameter."""
    settings = run.settings
    return torch.optim.Adam(
        [{"params": parameters, "multiple": multiple} for parameters, multiple in _trained(run)],
        lr=run.rate,
        betas=settings.betas,
    )


def _run_stage(
    run: _Run,
    stage: Stage,
    steps: int,
    batches: Iterator[Tensor],
    begin: int,
    budget: int,
    optimizer: torch.optim.Optimizer,
    losses: _Losses,
) -> None:
    """Train through one stage, from ``begin`` parameters to ``budget``."""
    settings = run.settings
    total = sum(layer.weight.numel() for layer in run.layers.values())
    losses.begin_stage()
    for step in range(steps):
        choosing = step == 0 or step < stage.choose_until * steps
        if stage.hard and choosing and step % stage.period in (0, stage.recover):
            excess = int((begin - budget) * stage.excess(step, steps))
            changed = _choose(run, budget + excess)
            settled = stage.settled is not None and changed <= stage.settled
            if settled and step and not excess:
                return
        for group in optimizer.param_groups:
            group["lr"] = run.rate * group["multiple"] * stage.rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        record = settings.criterion == "fisher" and choosing and step % settings.fisher_every == 0
        found = _pass(run, next(batches), stage, record)
        pressed = _press(run, stage.ratio_weight(step), stage.sparsity, budget / total)
        if pressed is not None:
            found = found + torch.stack([pressed, torch.zeros_like(pressed)]).to(found)
        optimizer.step()
        losses.add(stage, found, run.kept)
        if stage.patience is not None and losses.since >= stage.patience:
            return


def _choose(run: _Run, budget: int) -> float:
    """Choose within ``budget``, and compute no more than is needed from now on.

    Returns:
        How many components changed sides, as a fraction of the living ones.
    """
    before = {name: layer.mask.clone() for name, layer in run.layers.items()}
    orders = choose_components(run.layers, _fisher(run), budget, run.pivoted)
    changed = 0
    for name, layer in run.layers.items():
        alive = run.alive[name] = int(layer.mask.sum())
        full = len(layer.mask)
        watched = alive + math.ceil(run.settings.spare * alive)
        run.watched[name] = min(full, watched) if run.settings.criterion == "fisher" else alive
        changed += int((layer.mask != before[name]).sum())
        layer.arrange(orders[name], alive)
    total = sum(layer.weight.numel() for layer in run.layers.values())
    run.kept = kept_params(run.layers, run.pivoted) / total
    return changed / max(1, sum(run.alive.values()))


def _offer(run: _Run) -> None:
    """Let the components live that a layer begins with: all, or its first ones."""
    offered = run.settings.offered
    for name, layer in run.layers.items():
        rank = len(layer.mask)
        if offered is not None:
            even = layer.weight.numel() / (layer.in_features + layer.out_features)
            rank = max(1, min(rank, round(offered * even)))
        layer.mask.copy_(torch.arange(len(layer.mask), device=layer.mask.device) < rank)
        layer.arrange(torch.arange(len(layer.mask), device=layer.mask.device), rank)
        run.alive[name] = run.watched[name] = rank


def _pass(run: _Run, batch: Tensor, stage: Stage | None, record: bool) -> Tensor:
    """Forward and backward over ``batch``, a choice of windows, in micro-batches.

    Args:
        run: the run.
        batch: which windows, (sequences,).
        stage: its losses leave their gradients in the scores; None: no gradients, only recording.
        record: whether the Fisher information sees this batch.

    Returns:
        (2,), the loss of the stage and the divergence in it, means over the batch.
    """
    settings, objective = run.settings, run.objective
    device = next(run.model.parameters()).device
    squares: dict[str, Tensor] = {}
    sums = torch.zeros(2, device=device)
    for name, layer in run.layers.items():
        layer.computed = (run.watched if record else run.alive)[name]
    for chosen in batch.split(settings.micro_batch or settings.batch_size):
        part = len(chosen) / len(batch)
        ids = run.teacher.windows[chosen].to(device)
        dense = run.teacher.outputs(chosen)
        with _recording(run.layers, record):
            states = None
            if stage is not None and stage.states:
                student, states = objective.outputs_and_states(run.model, ids)
            else:
                student = objective.outputs(run.model, ids)
            if record:
                _record(run, dense, student, squares, again=stage is not None)
            if stage is None:
                continue
            divergence = objective.divergence(dense, student)
            loss = stage.divergence * divergence
            if stage.states and states is not None:
                wanted = run.teacher.states(chosen)
                loss = loss + stage.states * HiddenStates().divergence(wanted, states)
            if stage.cross_entropy:
                loss = loss + stage.cross_entropy * objective.cross_entropy(student, ids)
            (loss * part).backward()
        sums += torch.stack([loss.detach(), divergence.detach()]) * part
    if record:
        if sum(layer.weight.numel() for layer in run.layers.values()) >= _LARGE:
            give_back_memory()
        _average(run, squares, batch.numel() * run.teacher.windows.shape[1])
    return sums


@contextmanager
def _recording(layers: Mapping[str, SpectralLinear], record: bool) -> Iterator[None]:
    """Inside, the first gradient of outputs is recorded (``_record``), if ``record``."""
    for layer in layers.values():
        layer.recording, layer.listening = record, True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.recording, layer.listening = False, True


def _record(
    run: _Run, dense: Tensor, student: Tensor, squares: dict[str, Tensor], *, again: bool
) -> None:
    """Add the squared score gradients of each sequence, (rank,) per layer, to ``squares``.

    Args:
        run: the run.
        dense: outputs of the dense model.
        student: outputs of this one.
        squares: is written to.
        again: whether another gradient of the same outputs follows.
    """
    surprise = run.objective.surprise(dense, student, run.generator)
    logits = [layer.logit for layer in run.layers.values()]
    torch.autograd.grad(surprise, logits, allow_unused=True, retain_graph=again)
    for name, layer in run.layers.items():
        layer.listening = False
        recorded = layer.take_recorded()
        if recorded is not None:
            squares[name] = squares.get(name, 0) + recorded.square().sum(0)


def _average(run: _Run, squares: Mapping[str, Tensor], tokens: int) -> None:
    """Take the squares of one batch into the running averages of the components it computed."""
    decay = run.settings.fisher_decay
    for name, layer in run.layers.items():
        old = run.squares.setdefault(name, torch.zeros_like(layer.gain))
        weight = run.weights.setdefault(name, torch.zeros_like(layer.gain))
        seen = layer.order[: layer.computed]
        fresh = squares.get(name, torch.zeros_like(old)) / tokens
        old[seen] = decay * old[seen] + (1 - decay) * fresh[seen]
        weight[seen] = decay * weight[seen] + (1 - decay)


def _press(run: _Run, ratio_weight: float, sparsity_weight: float, kept: float) -> Tensor | None:
    """Add the gradients of the losses that press on the scores alone; what they come to."""
    if not ratio_weight and not sparsity_weight:
        return None
    threshold, temperature = run.settings.threshold, run.settings.temperature
    over = (soft_ratio(run.layers, threshold, temperature) - kept).clamp_min(0)
    loss = ratio_weight * over.square()
    loss = loss + sparsity_weight * polarization(run.layers, threshold, temperature)
    loss.backward()
    return loss.detach()


def _fisher(run: _Run) -> dict[str, Tensor]:
    """The running averages, free of their start at zero; empty where nothing is recorded."""
    prior = run.settings.fisher_prior * (1 - run.settings.fisher_decay)
    found = {}
    for name, square in run.squares.items():
        weight = run.weights[name]
        if prior and name in run.expected:
            square, weight = square + prior * run.expected[name], weight + prior
        found[name] = square / weight.clamp_min(1e-30)
    return found
