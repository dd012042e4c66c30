"""One training loop for spectral scores; a stage of it is data."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from soco.objectives import Objective
from soco.ranks import allocate, layer_params
from soco.spectral import SpectralLinear
from soco.steps import Step, dense_outputs, endless_batches, half_cosine


@dataclass(frozen=True)
class Stage:
    """A stretch of the training: what is minimized, and how many components may live.

    The excess says how far from the target the budget of living parameters is: 1 is all of them, 0
    is the target. It runs from ``excess_begin`` to ``excess_end`` over the stage.
    """

    name: str
    share: float  # of all steps, in (0, 1]
    excess_begin: float = 0.0
    excess_end: float = 0.0
    exponent: float = 1.0  # of the way the excess takes: 1 linear, 3 fast at first, gentle at last
    period: int = 4  # steps between two choices of who lives
    recover: int | None = None  # of a period, this many steps recover: they have the excess, and
    # the ratio loss is off; the rest compress: no excess, ratio loss on. None: both at all times.
    choose_until: float = 1.0  # fraction of the stage after which the living ones stay the same
    hard: bool = True  # False: nothing is masked, only the losses press
    rate_begin: float = 1.0  # learning rate as a multiple of the run's, at the beginning
    rate_end: float = 1.0  # and at the end; in between it follows half a cosine
    divergence: float = 1.0  # weight of the distance to the dense model
    cross_entropy: float = 0.0  # weight of the loss on the text itself
    ratio: float = 0.0  # weight of the squared parameter ratio above the target (differentiable)
    sparsity: float = 0.0  # weight of the regularizer that drives scores apart, to 0 or up
    patience: int | None = None  # stop after so many steps without a lower smoothed loss

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if not 0 < self.share <= 1:
            raise ValueError(f"stage {self.name}: share must be in (0, 1], got {self.share}")
        if not 0 <= self.excess_begin <= 1 or not 0 <= self.excess_end <= 1:
            raise ValueError(
                f"stage {self.name}: excess must be from 0 to 1, got {self.excess_begin} and "
                f"{self.excess_end}"
            )
        if self.period < 1 or not 0 <= (self.recover or 0) <= self.period:
            raise ValueError(
                f"stage {self.name}: recover must be 0 to period, got {self.recover} of "
                f"{self.period}"
            )

    def excess(self, step: int, steps: int) -> float:
        """How much of the way from the target to everything may live at ``step`` of ``steps``."""
        done = min(1.0, (step + self.period) / steps)  # what is chosen now lasts for a period
        curve = (
            self.excess_end + (self.excess_begin - self.excess_end) * (1 - done) ** self.exponent
        )
        return curve if self.recover is None or step % self.period < self.recover else 0.0

    def ratio_weight(self, step: int) -> float:
        """The weight of the ratio loss at ``step``."""
        pressing = self.recover is None or step % self.period >= self.recover
        return self.ratio if pressing else 0.0

    def rate(self, step: int, steps: int) -> float:
        """The multiple of the run's learning rate at ``step`` of ``steps``."""
        return half_cosine(step, steps, self.rate_begin, self.rate_end)


STAGES = (
    Stage("coarse", share=0.4, excess_begin=1.0, exponent=3.0),
    Stage("refine", share=0.35, excess_begin=0.15, excess_end=0.02, period=8, recover=5),
    Stage("sparsify", share=0.25, period=6, choose_until=0.6, rate_end=0.0),
)

# The published order of losses, without a mask until the end; all numbers are our choice.
SOFT_STAGES = (
    Stage("coarse", share=0.3, hard=False, ratio=100.0),
    Stage("refine", share=0.3, hard=False, ratio=100.0, period=16, recover=8),
    Stage("sparsify", share=0.4, hard=False, ratio=100.0, sparsity=1.0, rate_end=0.0),
)


@dataclass(frozen=True)
class TrainingSettings:
    """Everything the loop can be told; what no field speaks of is not decided anywhere else."""

    stages: tuple[Stage, ...] = STAGES
    steps: int = 240  # optimizer steps over all stages
    criterion: Literal["fisher", "score"] = "fisher"  # what a component is kept for
    batch_size: int = 8  # sequences per step
    micro_batch: int | None = None  # sequences at a time in memory; None: the whole batch
    learning_rate: float = 0.02  # of Adam, on the logits of the scores
    deviation_rate: float = 0.05  # learning rate of the deviations, as a multiple of that one
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam
    fisher_decay: float = 0.98  # of the running average of the squared score gradients
    fisher_every: int = 2  # steps between two of its updates
    fisher_warmup: int = 4  # batches it sees of the untouched model before the first step
    threshold: float = 0.5  # score at which the soft count of living components is one half
    temperature: float = 0.1  # width of that count's sigmoid, in scores
    checkpointing: bool = False  # recompute activations in backward: less memory, a third slower
    seed: int = 0  # of the order of the sequences and of the drawn labels

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        for name in ("steps", "batch_size", "fisher_every", "fisher_warmup"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if self.micro_batch is not None and not 1 <= self.micro_batch <= self.batch_size:
            raise ValueError(
                f"micro_batch must be from 1 to batch_size ({self.batch_size}), got "
                f"{self.micro_batch}"
            )
        if self.criterion not in ("fisher", "score"):
            raise ValueError(f'criterion must be "fisher" or "score", got {self.criterion!r}')
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not self.stages or sum(stage.share for stage in self.stages) > 1 + 1e-6:
            raise ValueError("the shares of the stages must be above 0 and sum to at most 1")


@dataclass
class _Run:
    model: nn.Module
    layers: Mapping[str, SpectralLinear]
    objective: Objective
    settings: TrainingSettings
    generator: torch.Generator
    pivoted: bool = False
    fisher: dict[str, Tensor] = field(default_factory=dict)
    fisher_updates: int = 0


def train_scores(
    model: nn.Module,
    layers: Mapping[str, SpectralLinear],
    windows: Tensor,
    budget: int,
    objective: Objective,
    settings: TrainingSettings,
    on_step: Callable[[Step], None] = lambda step: None,
    *,
    pivoted: bool = False,
) -> list[Step]:
    """Learn the scores of all layers together, and who of the components stays.

    With the criterion "fisher" a component is worth the second-order change of the loss when it
    goes: ``score^2 F / 2`` with the Fisher information ``F = E[(d nll / d score)^2]`` over labels
    drawn from the dense model, a running average over the training. For a masked one the score it
    had and the Fisher information it would have now are used, so that it can come back. With
    "score" it is worth its score. Each choice is one ``ranks.allocate`` over all layers, with dense
    fallback.

    At the end every layer's ``mask`` meets ``budget``, whatever the stages did.

    Args:
        model: holds ``layers``; all other parameters are left as they are.
        layers: name to layer, on their devices.
        windows: token ids (sequences, length), on the CPU.
        budget: parameters the layers may keep together (``ranks.parameter_budget``).
        objective: what the compressed model should keep.
        settings: everything else.
        on_step: called after each optimizer step.
        pivoted: whether the factors will be pivoted, which hold less (``ranks.layer_params``).

    Returns:
        All steps, in order.

    Raises:
        ValueError: fewer windows than one batch, or a loss that is not finite.

    Source: three stages of SoCo, arXiv:2502.15092; the Fisher criterion and the hard mask that
    follows it are ours (docs/methods.md says why).
    """
    if len(windows) < settings.batch_size:
        raise ValueError(
            f"a batch takes {settings.batch_size} sequences, the calibration has {len(windows)}"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    run = _Run(model, layers, objective, settings, generator, pivoted)
    batches = endless_batches(windows, settings.batch_size, generator)
    total = sum(layer.weight.numel() for layer in layers.values())
    for layer in layers.values():
        layer.mask.fill_(True)
    if settings.criterion == "fisher":
        for _ in range(settings.fisher_warmup):
            _pass(run, next(batches), None, record=True)
    deviations = [d for layer in layers.values() if (d := layer.deviation) is not None]
    groups = [
        {"params": [layer.logit for layer in layers.values()], "multiple": 1.0},
        {"params": deviations, "multiple": settings.deviation_rate},
    ]
    optimizer = torch.optim.Adam(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
    )
    history: list[Step] = []
    for stage in settings.stages:
        for loss, divergence in _run_stage(run, stage, batches, budget, total, optimizer):
            kept = kept_params(layers, pivoted) / total
            done = len(history) + 1
            history.append(Step(stage.name, done, settings.steps, loss, divergence, kept))
            on_step(history[-1])
    if kept_params(layers, pivoted) > budget:
        choose_components(layers, _fisher(run), budget, pivoted)
    return history


def _run_stage(
    run: _Run,
    stage: Stage,
    batches: Iterator[Tensor],
    budget: int,
    total: int,
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[float, float]]:
    """Train through one stage; the loss, and the divergence in it, after each step."""
    settings = run.settings
    steps = max(1, round(stage.share * settings.steps))
    best, since, smooth = math.inf, 0, math.nan
    for step in range(steps):
        choosing = step == 0 or step < stage.choose_until * steps
        if stage.hard and choosing and step % stage.period in (0, stage.recover):
            excess = int((total - budget) * stage.excess(step, steps))
            choose_components(run.layers, _fisher(run), budget + excess, run.pivoted)
        for group in optimizer.param_groups:
            rate = settings.learning_rate * group["multiple"]
            group["lr"] = rate * stage.rate(step, steps)
        optimizer.zero_grad(set_to_none=True)
        record = settings.criterion == "fisher" and choosing and step % settings.fisher_every == 0
        loss, divergence = _pass(run, next(batches), stage, record)
        loss += _press(run, stage.ratio_weight(step), stage.sparsity, budget / total)
        optimizer.step()
        yield loss, divergence
        smooth = loss if math.isnan(smooth) else 0.9 * smooth + 0.1 * loss
        best, since = (smooth, 0) if smooth < best else (best, since + 1)
        if stage.patience is not None and since >= stage.patience:
            return


def kept_params(layers: Mapping[str, SpectralLinear], pivoted: bool = False) -> int:
    """Parameters of the layers as they would be stored now: factors, or dense where it is less."""
    return sum(
        layer_params((layer.out_features, layer.in_features), int(layer.mask.sum()), pivoted)
        for layer in layers.values()
    )


@torch.no_grad()
def choose_components(
    layers: Mapping[str, SpectralLinear],
    fisher: Mapping[str, Tensor],
    budget: int,
    pivoted: bool = False,
) -> None:
    """Mask all but the components worth most within ``budget`` parameters.

    Args:
        layers: name to layer; their masks are written.
        fisher: name to Fisher information of the scores, (rank,): a component is worth
            ``score^2 fisher / 2``. Empty: it is worth its score.
        budget: parameters that may live, counted as they are stored.
        pivoted: whether that is as pivoted factors.
    """
    values = {
        name: layer.scores().square() * fisher[name] / 2 if fisher else layer.scores()
        for name, layer in layers.items()
    }
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    for name, rank in allocate(values, shapes, budget, pivoted=pivoted).items():
        alive = values[name].argsort(descending=True, stable=True)[:rank]
        layers[name].mask.fill_(False).index_fill_(0, alive, True)


def soft_ratio(
    layers: Mapping[str, SpectralLinear], threshold: float, temperature: float
) -> Tensor:
    """Kept parameters over the dense ones, differentiable in the scores.

    A component counts as ``sigmoid((score - threshold) / temperature)`` of ``out + in`` parameters.
    It is not clipped at break-even, where its gradient would be zero; so it can pass 1.
    """
    alive = sum(
        torch.sigmoid((layer.scores() - threshold) / temperature).sum().cpu()
        * (layer.in_features + layer.out_features)
        for layer in layers.values()
    )
    return torch.as_tensor(alive) / sum(layer.weight.numel() for layer in layers.values())


def polarization(
    layers: Mapping[str, SpectralLinear], threshold: float, temperature: float
) -> Tensor:
    """How undecided the scores are: the mean of ``4 a (1 - a)``, ``a`` the soft count of each.

    It is 1 when all scores are at the threshold and falls to 0 as they move away to either side.
    """
    undecided = torch.cat(
        [
            torch.sigmoid((layer.scores() - threshold) / temperature).cpu()
            for layer in layers.values()
        ]
    )
    return (4 * undecided * (1 - undecided)).mean()


def _pass(run: _Run, batch: Tensor, stage: Stage | None, record: bool) -> tuple[float, float]:
    """Forward and backward over ``batch`` in micro-batches.

    Args:
        run: the run.
        batch: token ids (sequences, length).
        stage: its losses leave their gradients in the scores; None: no gradients, only recording.
        record: whether the Fisher information sees this batch.

    Returns:
        The loss of the stage, and the divergence in it; means over the batch.
    """
    settings = run.settings
    squares: dict[str, Tensor] = {}
    loss_sum = divergence_sum = 0.0
    for ids in batch.split(settings.micro_batch or settings.batch_size):
        part = len(ids) / len(batch)
        ids = ids.to(next(run.model.parameters()).device)
        dense = dense_outputs(run.model, run.layers.values(), run.objective, ids)
        if record:
            _record(run, ids, dense, squares)
        if stage is None:
            continue
        student = run.objective.outputs(run.model, ids)
        divergence = run.objective.divergence(dense, student)
        loss = stage.divergence * divergence
        if stage.cross_entropy:
            loss = loss + stage.cross_entropy * run.objective.cross_entropy(student, ids)
        if not math.isfinite(loss.item()):
            raise ValueError(
                f"the loss became {loss.item()} in stage {stage.name}: the model's outputs are not "
                f"finite (float16 overflows; try bfloat16 or float32) or learning_rate "
                f"({settings.learning_rate}) is too high"
            )
        (loss * part).backward()
        loss_sum += loss.item() * part
        divergence_sum += divergence.item() * part
    if record:
        decay = settings.fisher_decay
        for name, layer in run.layers.items():
            fresh = squares.get(name, torch.zeros_like(layer.gain)) / batch.numel()
            old = run.fisher.get(name, torch.zeros_like(fresh))
            run.fisher[name] = decay * old + (1 - decay) * fresh
        run.fisher_updates += 1
    return loss_sum, divergence_sum


def _record(run: _Run, ids: Tensor, dense: Tensor, squares: dict[str, Tensor]) -> None:
    """Add the squared score gradients of each sequence, (rank,) per layer, to ``squares``."""
    layers = run.layers.values()
    for layer in layers:
        layer.recording = True
    try:
        student = run.objective.outputs(run.model, ids)
        surprise = run.objective.surprise(dense, student, run.generator)
        torch.autograd.grad(surprise, [layer.logit for layer in layers], allow_unused=True)
    finally:
        for layer in layers:
            layer.recording = False
    for name, layer in run.layers.items():
        recorded = layer.take_recorded()
        if recorded is not None:
            squares[name] = squares.get(name, 0) + recorded.square().sum(0)


def _press(run: _Run, ratio_weight: float, sparsity_weight: float, kept: float) -> float:
    """Add the gradients of the losses that press on the scores alone; what they come to."""
    if not ratio_weight and not sparsity_weight:
        return 0.0
    threshold, temperature = run.settings.threshold, run.settings.temperature
    over = (soft_ratio(run.layers, threshold, temperature) - kept).clamp_min(0)
    loss = ratio_weight * over.square()
    loss = loss + sparsity_weight * polarization(run.layers, threshold, temperature)
    loss.backward()
    return loss.item()


def _fisher(run: _Run) -> dict[str, Tensor]:
    """The running average, free of its start at zero."""
    correction = 1 - run.settings.fisher_decay**run.fisher_updates
    return {name: value / correction for name, value in run.fisher.items()}
