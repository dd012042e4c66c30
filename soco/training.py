"""One training loop for spectral scores: who stays, and how much each counts, for every size."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from soco.choosing import (
    FisherAverages,
    choose_components,
    component_values,
    kept_params,
    press,
)
from soco.keeping import Filed, Keeper, moved
from soco.masters import probed_rate
from soco.memory import give_back_memory
from soco.objectives import HiddenStates, Objective, TokenDistribution, draw_seeds
from soco.processes import add_up, count, part_of
from soco.spectral import Snapshot, SpectralLinear
from soco.stages import Stage, TrainingSettings
from soco.steps import EndlessBatches, Losses, Step, Teacher, all_dense

_STEP_COST = 0.04  # of the loss, by a step with random signs, at the rate that is measured

_LARGE = 2**23  # parameters of layers whose recorded passes leave holes in memory worth returning

# Told what comes next (budget, stage, step), and the optimizer; None at the end.
Keep = Callable[[tuple[int, int, int], torch.optim.Optimizer | None], None]


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
    averages: FisherAverages = field(init=False)
    alive: dict[str, int] = field(default_factory=dict)  # living components
    watched: dict[str, int] = field(default_factory=dict)  # and those that may come back
    kept: float = 1.0  # living parameters, as a fraction of the targets'
    place: tuple[int, int, int] = (0, 0, 0)  # budget, stage and step that come next

    def __post_init__(self) -> None:
        self.averages = FisherAverages(self.settings.fisher_decay)

    def fisher(self) -> dict[str, Tensor]:
        """What is known of the Fisher information; empty where nothing is recorded."""
        return self.averages.found(self.settings.fisher_prior, self.expected)


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
    keeper: Keeper | None = None,
    states: Filed | None = None,
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
        keeper: where the state is kept from which the same call goes on; None: nowhere.
        states: where the dense model's last states are kept; None: in memory.

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
    teacher = Teacher(
        model, lambda: all_dense(layers.values()), objective, windows, files=states
    )  # fmt: skip
    run = _Run(model, layers, objective, settings, generator, teacher, pivoted, expected or {})
    batches = EndlessBatches(len(windows), settings.batch_size, generator)
    losses = Losses(settings.steps_in_all(len(budgets)), on_step)
    snapshots: list[dict[str, Snapshot]] = []
    held = None if keeper is None else keeper.load()
    if held is None:
        _offer(run)
        if settings.criterion == "fisher":
            for _ in range(settings.fisher_warmup):
                _pass(run, next(batches), None, record=True)
    else:
        _go_back(run, batches, losses, snapshots, *held)

    def keep(place: tuple[int, int, int], optimizer: torch.optim.Optimizer | None) -> None:
        if keeper is not None and place != run.place and (optimizer is None or keeper.due()):
            run.place = place
            keeper.save(_state(run, batches, losses, snapshots, optimizer), teacher.fresh())

    begin = sum(layer.weight.numel() for layer in layers.values())
    for position, budget in enumerate(budgets):
        if position >= run.place[0]:
            optimizer = None
            if held is not None and position == run.place[0]:
                optimizer = _optimizer(run)
                optimizer.load_state_dict(held[0]["optimizer"])
            _meet(run, position, begin, budget, batches, optimizer, losses, keep)
            values = component_values(layers, run.fisher())
            snapshots.append({n: layer.snapshot(values[n]) for n, layer in layers.items()})
        begin = budget
    losses.wait()
    if run.place[0] < len(budgets):
        keep((len(budgets), 0, 0), None)
    return losses.history, snapshots


def _meet(
    run: _Run,
    position: int,
    begin: int,
    budget: int,
    batches: EndlessBatches,
    optimizer: torch.optim.Optimizer | None,
    losses: Losses,
    keep: Keep,
) -> None:
    """Train for one budget, from its start or (with an optimizer) from the run's place in it."""
    _, stage_now, step_now = run.place if optimizer is not None else (position, 0, 0)
    going_on = optimizer is not None
    if optimizer is None:
        run.rate = run.settings.learning_rate or _measured_rate(run, budget)
        optimizer = _optimizer(run)
    for number, (stage, steps) in enumerate(run.settings.stages_for(position)):
        if number < stage_now:
            continue
        if not going_on:
            losses.begin_stage()
        first = step_now if going_on else 0
        going_on = False
        for step in range(first, steps):
            keep((position, number, step), optimizer)
            if _is_over(run, stage, step, steps, batches, begin, budget, optimizer, losses):
                break
    if kept_params(run.layers, run.pivoted) > budget:
        _choose(run, budget)


def _state(
    run: _Run,
    batches: EndlessBatches,
    losses: Losses,
    snapshots: list[dict[str, Snapshot]],
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, Any]:
    """All that the steps to come depend on, but for what the teacher keeps."""
    return {
        "place": run.place,
        "rate": run.rate,
        "kept": run.kept,
        "components": [run.alive, run.watched],
        "fisher": run.averages.state(),
        "layers": {name: layer.state() for name, layer in run.layers.items()},
        "batches": batches.state(),
        "losses": losses.state(),
        "snapshots": [{name: vars(each) for name, each in those.items()} for those in snapshots],
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }


def _go_back(
    run: _Run,
    batches: EndlessBatches,
    losses: Losses,
    snapshots: list[dict[str, Snapshot]],
    state: Mapping[str, Any],
    kept: list[Mapping[int, Tensor]],
) -> None:
    """To where ``_state`` was asked for."""
    run.place, run.rate, run.kept = state["place"], state["rate"], state["kept"]
    run.alive, run.watched = state["components"]
    run.averages.go_back(state["fisher"], next(iter(run.layers.values())).gain.device)
    for name, layer in run.layers.items():
        layer.go_back(state["layers"][name])
    batches.go_back(state["batches"])
    losses.go_back(state["losses"])
    snapshots += [
        {
            name: Snapshot(**moved(each, run.layers[name].gain.device))
            for name, each in those.items()
        }
        for those in state["snapshots"]
    ]
    for part in kept:
        run.teacher.take(part)


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
    device, count = next(run.model.parameters()).device, run.settings.batch_size
    parts = torch.arange(count).split(run.settings.micro_batch or count)
    dense = run.teacher.outputs(parts[0])  # mostly the only one
    before = {name: (layer.mask.clone(), layer.computed) for name, layer in run.layers.items()}

    def loss() -> float:
        total = 0.0
        for part in parts:
            wanted = dense if part is parts[0] else run.teacher.outputs(part)
            student = run.objective.outputs(run.model, run.teacher.windows[part].to(device))
            total += float(run.objective.divergence(wanted, student) * len(part))
        return total / count

    choose_components(run.layers, run.fisher(), budget, run.pivoted)
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


def _is_over(
    run: _Run,
    stage: Stage,
    step: int,
    steps: int,
    batches: EndlessBatches,
    begin: int,
    budget: int,
    optimizer: torch.optim.Optimizer,
    losses: Losses,
) -> bool:
    """One step of a stage from ``begin`` parameters to ``budget``; whether it was the last one."""
    settings = run.settings
    total = sum(layer.weight.numel() for layer in run.layers.values())
    choosing = step == 0 or step < stage.choose_until * steps
    if stage.hard and choosing and step % stage.period in (0, stage.recover):
        excess = int((begin - budget) * stage.excess(step, steps))
        changed = _choose(run, budget + excess)
        settled = stage.settled is not None and changed <= stage.settled
        if settled and step and not excess:
            return True
    for group in optimizer.param_groups:
        group["lr"] = run.rate * group["multiple"] * stage.rate(step, steps)
    optimizer.zero_grad(set_to_none=True)
    record = settings.criterion == "fisher" and choosing and step % settings.fisher_every == 0
    found = _pass(run, next(batches), stage, record)
    pressed = press(
        run.layers, settings.threshold, settings.temperature, kept=budget / total,
        ratio_weight=stage.ratio_weight(step), sparsity_weight=stage.sparsity,
    )  # fmt: skip
    if pressed is not None:
        found = found + torch.stack([pressed, torch.zeros_like(pressed)]).to(found)
    optimizer.step()
    losses.add(stage.name, found, run.kept)
    return stage.patience is not None and losses.since >= stage.patience


def _choose(run: _Run, budget: int) -> float:
    """Choose within ``budget``, and compute no more than is needed from now on.

    Returns:
        How many components changed sides, as a fraction of the living ones.
    """
    before = {name: layer.mask.clone() for name, layer in run.layers.items()}
    orders = choose_components(run.layers, run.fisher(), budget, run.pivoted)
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
    settings = run.settings
    device = next(run.model.parameters()).device
    squares: dict[str, Tensor] = {}
    sums = torch.zeros(2, device=device)
    for name, layer in run.layers.items():
        layer.computed = (run.watched if record else run.alive)[name]
    seeds = draw_seeds(len(batch), run.generator) if record else torch.zeros_like(batch)
    size = settings.micro_batch or settings.batch_size
    for chosen, of_labels in zip(
        part_of(batch).split(size), part_of(seeds).split(size), strict=True
    ):
        found = _part(run, chosen, of_labels, stage, record, squares, len(chosen) / len(batch))
        sums += 0 if found is None else found
    if count() > 1:
        _add_up(run, sums, squares, record, stage is not None)
    if record:
        if sum(layer.weight.numel() for layer in run.layers.values()) >= _LARGE:
            give_back_memory()
        run.averages.add(run.layers, squares, batch.numel() * run.teacher.windows.shape[1])
    return sums


def _part(
    run: _Run,
    chosen: Tensor,
    seeds: Tensor,
    stage: Stage | None,
    record: bool,
    squares: dict[str, Tensor],
    share: float,
) -> Tensor | None:
    """``_pass`` over a part of the batch, of which nothing is left when the next one begins.

    Returns:
        (2,), its losses times its ``share`` in the batch; None without a stage.
    """
    objective = run.objective
    ids = run.teacher.windows[chosen].to(next(run.model.parameters()).device)
    dense = run.teacher.outputs(chosen)
    with _recording(run.layers, record):
        states = None
        if stage is not None and stage.states:
            student, states = objective.outputs_and_states(run.model, ids)
        else:
            student = objective.outputs(run.model, ids)
        if record:
            _record(run, dense, student, seeds, squares, again=stage is not None)
        if stage is None:
            return None
        divergence = objective.divergence(dense, student)
        loss = stage.divergence * divergence
        if stage.states and states is not None:
            wanted = run.teacher.states(chosen)
            loss = loss + stage.states * HiddenStates().divergence(wanted, states)
        if stage.cross_entropy:
            loss = loss + stage.cross_entropy * objective.cross_entropy(student, ids)
        (loss * share).backward()
    return torch.stack([loss.detach(), divergence.detach()]) * share


def _add_up(
    run: _Run, sums: Tensor, squares: dict[str, Tensor], record: bool, trains: bool
) -> None:
    """Losses, gradients and squares of all processes, each of which had a part of the batch."""
    together = [sums]
    if trains:
        for parameter in (p for parameters, _ in _trained(run) for p in parameters):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            together.append(parameter.grad)
    if record:
        for name, layer in run.layers.items():
            together.append(squares.setdefault(name, torch.zeros_like(layer.gain)))
    with torch.no_grad():
        add_up(*together)


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
    run: _Run,
    dense: Tensor,
    student: Tensor,
    seeds: Tensor,
    squares: dict[str, Tensor],
    *,
    again: bool,
) -> None:
    """Add the squared score gradients of each sequence, (rank,) per layer, to ``squares``.

    Args:
        run: the run.
        dense: outputs of the dense model.
        student: outputs of this one.
        seeds: of the labels, one per sequence.
        squares: is written to.
        again: whether another gradient of the same outputs follows.
    """
    surprise = run.objective.surprise(dense, student, seeds)
    logits = [layer.logit for layer in run.layers.values()]
    torch.autograd.grad(surprise, logits, allow_unused=True, retain_graph=again)
    for name, layer in run.layers.items():
        layer.listening = False
        recorded = layer.take_recorded()
        if recorded is not None:
            squares[name] = squares.get(name, 0) + recorded.square().sum(0)
