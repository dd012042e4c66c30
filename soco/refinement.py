"""Joint fine-tuning of all factors of a compressed model against the dense one."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from soco.keeping import Keeper
from soco.masters import Best, Masters, probed_rate, sizes_of
from soco.objectives import Objective
from soco.processes import add_up, own, part_of
from soco.steps import (
    TEACHER_ROOM,
    EndlessBatches,
    Step,
    Teacher,
    check_batches,
    checkpointed,
    frozen,
)
from soco.surgery import transformer_blocks

_STEP_COST = 0.005  # of the loss, by a step with random signs, at the rate that is measured

Swap = tuple[nn.Module, str, nn.Module, nn.Module]  # parent, name in it, dense, compressed


@dataclass(frozen=True)
class Refinement:
    """Everything that the fine-tuning can be told."""

    steps: int = 200  # optimizer steps, at most
    batch_size: int = 8  # sequences per step
    micro_batch: int | None = None  # sequences at a time in memory; None: the whole batch
    learning_rate: float | None = None  # of Adam, as a fraction of a balanced factor's root mean
    # square; None: measured before the first step (``masters.probed_rate``)
    warmup: int = 10  # steps in which the learning rate rises to that
    rate_end: float = (
        0.0  # the learning rate at the end, as a fraction of that; a cosine in between
    )
    betas: tuple[float, float] = (0.9, 0.99)  # of Adam
    weight_decay: float = 0.0  # pull to zero per step, as a multiple of the learning rate
    clip: float | None = 0.1  # largest norm of a step's gradient by relative changes; None: none
    divergence: float = 1.0  # weight of the distance to the dense model
    cross_entropy: float = 0.0  # weight of the loss on the text itself
    biases: bool = True  # whether the biases of compressed layers are trained, too
    held_out: float = 0.1  # fraction of the sequences, the last ones, that is only evaluated on
    written: float = (
        0.0  # sequences that the dense model writes itself, to be trained on beside the
    )
    # calibration's, as a multiple of those; models that do not generate text have none
    evaluate_every: int = 20  # steps between two evaluations
    backoff: float = 0.5  # what the learning rate is multiplied by, for good, when an evaluation
    # is no new best; the factors then go back to the best ones. 1: it never is, nor do they
    patience: int | None = 4  # evaluations without a new best after which it stops; None: never
    checkpointing: bool = False  # recompute activations in backward: less memory, a third slower
    seed: int = 0  # of the order of the sequences

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        check_batches(self, "steps", "evaluate_every")
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup must be a whole number of steps, got {self.warmup!r}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, or None, got {self.patience}")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive, or None, got {self.clip}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas}")
        for name in ("rate_end", "weight_decay", "divergence", "cross_entropy", "written"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not self.divergence and not self.cross_entropy:
            raise ValueError(
                "divergence and cross_entropy are both 0: there is nothing to train on"
            )
        if not 0 < self.backoff <= 1:
            raise ValueError(f"backoff must be above 0 and at most 1, got {self.backoff}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be above 0 and below 1, got {self.held_out}")

    def held_out_of(self, sequences: int) -> int:
        """How many of so many sequences are only evaluated on, if no others are given."""
        return min(sequences - 1, max(1, round(self.held_out * sequences)))

    def rate(self, step: int) -> float:
        """The multiple of the learning rate at ``step`` (from 0): a ramp, then half a cosine."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate_end + (1 - self.rate_end) * (1 + math.cos(math.pi * done)) / 2


def refine(
    model: nn.Module,
    pairs: Mapping[str, tuple[nn.Module, nn.Module]],
    windows: Tensor,
    objective: Objective,
    settings: Refinement,
    on_step: Callable[[Step], None] = lambda step: None,
    held_out: Tensor | None = None,
    others: Mapping[str, tuple[nn.Module, nn.Module]] | None = None,
    written: Tensor | None = None,
    keeper: Keeper | None = None,
) -> list[Step]:
    """Train the factors of all compressed layers together to give what the dense model gives.

    The dense model is the same model with the dense layers in their old places: it holds no second
    copy. The learning rate is relative to the size of the factors, because those of a layer may
    differ in scale by any number without being another layer. Parameters in half precision are
    trained as float32 copies and rounded after every step.

    The loss on held-out text is measured before the first step, every ``evaluate_every`` steps and
    at the end, and the factors that it was lowest for are the ones that stay. So on that text the
    model is never worse than before, whatever the settings are. That holds, too, when the loss or a
    gradient stops being finite (the training ends with a warning) and on any exception. Where a
    measurement is no new best, training goes on from the best factors with a lower learning rate
    (``backoff``): the rate that a badly damaged model takes is too high for one that is near to the
    dense model already.

    Args:
        model: holds the compressed layers, and possibly dense ones; frozen but for the factors, in
            evaluation mode meanwhile.
        pairs: name to the dense layer and the compressed one that stands in the model for it.
            Parameters that several compressed layers share are trained once; those that the dense
            model has as well (a bias that was not copied) are left alone.
        windows: token ids (sequences, length), on the CPU.
        objective: how the distance to the dense model is measured.
        settings: everything else.
        on_step: called with each entry of the history.
        held_out: token ids (sequences, length) to evaluate on; None: the last of ``windows``, which
            are then not trained on.
        others: like ``pairs``, of layers that differ from the dense model's and are not trained.
        written: token ids (sequences, length) that are trained on as well and held out never.
        keeper: where the state is kept from which the same call goes on; None: nowhere.

    Returns:
        The history. Its first entry is step 0, whose losses are those of the held-out text before
        training; the others are optimizer steps, ``held_out`` given where it was measured. ``kept``
        counts the layers in ``pairs`` only.

    Raises:
        ValueError: no layers; a compressed layer that is not in the model; no parameter to train;
            fewer than two windows.

    Warns:
        UserWarning: fewer windows than one batch; a loss or gradient that is not finite.

    Source: end-to-end tuning of factors is the third level of "Per-Matrix Optimality Is Not
    Enough", 2026 (there with the loss on the text); the divergence, and the rates, are ours.
    """
    swaps = _swaps(model, pairs) + (_swaps(model, others) if others else [])
    dense = [pair[0] for pair in pairs.values()]
    trained = _trainable(model, pairs, settings.biases)
    train, held_out = _split(windows, held_out, settings)
    train = train if written is None else torch.cat([train, written])
    size = min(settings.batch_size, len(train))
    if size < settings.batch_size:
        warnings.warn(
            f"{len(train)} sequences are left to refine on, fewer than one batch of "
            f"{settings.batch_size}: it goes on with batches of {size}",
            stacklevel=2,
        )
    matrices = {p for layer in dense for p in layer.parameters() if p.dim() > 1}
    kept = sum(p.numel() for p in trained if p.dim() > 1) / sum(p.numel() for p in matrices)
    run = _Run(model, objective, settings, sizes_of(pairs, trained), kept)
    blocks = transformer_blocks(model) if settings.checkpointing else []
    apart = [pair[0] for pair in (others or {}).values()]
    with frozen(model, *dense, *apart), checkpointed(blocks):
        for parameter in trained:
            parameter.requires_grad_(True)
        best = Best(trained)
        try:
            teachers = [
                Teacher(model, lambda: _dense_in_place(swaps), objective, each, room)
                for each, room in ((held_out, TEACHER_ROOM // 4), (train, TEACHER_ROOM))
            ]
            return _train(run, trained, best, teachers[1], teachers[0], size, on_step, keeper)
        finally:
            best.restore()


@dataclass
class _Run:
    model: nn.Module
    objective: Objective
    settings: Refinement
    sizes: list[float]  # of the trained parameters
    kept: float


def _train(
    run: _Run,
    trained: list[nn.Parameter],
    best: Best,
    train: Teacher,
    held_out: Teacher,
    size: int,
    on_step: Callable[[Step], None],
    keeper: Keeper | None,
) -> list[Step]:
    settings = run.settings
    history: list[Step] = []

    def note(step: int, loss: float, divergence: float, measured: float | None) -> None:
        history.append(Step("tuning", step, settings.steps, loss, divergence, run.kept, measured))
        on_step(history[-1])

    state = None if keeper is None else keeper.load()
    generator = torch.Generator().manual_seed(settings.seed)
    following = EndlessBatches(len(train.windows), size, generator)
    first, rate = 1, settings.learning_rate
    if state is None:
        start, divergence = _evaluate(run, held_out, size)
        best.offer(start)
        note(0, start, divergence, start)
        if not math.isfinite(start):
            _warn_stop(f"the loss on the held-out text is {start} before the first step")
            return history
        if rate is None:
            which = 1 if settings.divergence else 0
            rate = probed_rate(
                trained, run.sizes, lambda: _evaluate(run, held_out, size)[which],
                (start, divergence)[which], settings.seed, _STEP_COST,
            )  # fmt: skip
    else:
        rate = state[0]["rate"]
    masters = Masters(
        trained, run.sizes, learning_rate=rate, betas=settings.betas,
        weight_decay=settings.weight_decay, clip=settings.clip,
    )  # fmt: skip

    teachers = {"train": train, "held_out": held_out}

    def keep(following_step: int) -> None:
        if keeper is not None:
            keeper.save(
                {
                    "step": following_step,
                    "rate": rate,
                    "best": best.state(),
                    "masters": masters.state(),
                    "batches": following.state(),
                    "history": [asdict(step) for step in history],
                },
                {n: found for n, each in teachers.items() if (found := each.fresh())},
            )

    if state is not None:
        held, parts = state
        first = held["step"]
        best.go_back(held["best"])
        masters.go_back(held["masters"])
        following.go_back(held["batches"])
        history += [Step(**step) for step in held["history"]]
        for part in parts:
            for name, kept in part.items():
                teachers[name].take(kept)
    for step in range(first, settings.steps + 1):
        if keeper is not None and step > first and keeper.due():
            keep(step)
        loss, divergence, norm = _pass(run, masters, train, next(following))
        if not math.isfinite(loss):
            note(step, loss, divergence, None)
            _warn_stop(f"the loss became {loss} in step {step} of refine")
            break
        if math.isfinite(norm):
            masters.step(settings.rate(step - 1))
        elif masters.scale > 1:  # float16 overflowed in backward: the step is left out
            masters.scale /= 4
        else:
            note(step, loss, divergence, None)
            _warn_stop(f"a gradient became {norm} in step {step} of refine")
            break
        masters.forget()
        measured = None
        if step % settings.evaluate_every == 0 or step == settings.steps:
            measured, _ = _evaluate(run, held_out, size)
            best.offer(measured)
            if best.since and settings.backoff < 1:
                best.restore()
                masters.restart(settings.backoff)
        note(step, loss, divergence, measured)
        if settings.patience is not None and best.since >= settings.patience:
            break
    keep(settings.steps + 1)
    return history


def _pass(
    run: _Run, masters: Masters, teacher: Teacher, batch: Tensor
) -> tuple[float, float, float]:
    """Forward and backward over ``batch``, a choice of the teacher's windows, in micro-batches.

    The gradients are in the masters.

    Returns:
        The loss and the divergence in it, means over the batch, and the norm of the gradient.
    """
    sums = torch.zeros(2)
    for chosen in part_of(batch).split(run.settings.micro_batch or len(batch)):
        part = len(chosen) / len(batch)
        loss, divergence = _losses(run, teacher, chosen)
        (loss * (part * masters.scale)).backward()
        masters.collect()
        sums = sums.to(loss.device) + part * torch.stack([loss.detach(), divergence.detach()])
    masters.add_up()
    sums = sums.to(next(run.model.parameters()).device)
    add_up(sums)
    norm = masters.norm()
    loss, divergence, norm = torch.stack([*sums, norm.to(sums)]).tolist()  # the step's only wait
    return loss, divergence, norm


@torch.no_grad()
def _evaluate(run: _Run, teacher: Teacher, size: int) -> tuple[float, float]:
    """The loss and the divergence in it, means over all windows, taken in float64."""
    total = torch.zeros(2, dtype=torch.float64, device=next(run.model.parameters()).device)
    batches = torch.arange(len(teacher.windows)).split(run.settings.micro_batch or size)
    for number in own(len(batches)):
        chosen = batches[number]
        total += torch.stack(_losses(run, teacher, chosen)).double() * len(chosen)
    add_up(total)
    loss, divergence = (total / len(teacher.windows)).tolist()
    return loss, divergence


def _losses(run: _Run, teacher: Teacher, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the divergence in it for the windows ``chosen``."""
    settings, objective = run.settings, run.objective
    ids = teacher.windows[chosen].to(next(run.model.parameters()).device)
    dense = teacher.outputs(chosen) if settings.divergence else None
    student = objective.outputs(run.model, ids)
    loss = divergence = student.new_zeros(())
    if dense is not None:
        divergence = objective.divergence(dense, student)
        loss = settings.divergence * divergence
    if settings.cross_entropy:
        loss = loss + settings.cross_entropy * objective.cross_entropy(student, ids)
    return loss, divergence


def _swaps(model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> list[Swap]:
    """All places where the compressed layers stand, and the dense ones that belong there."""
    if not pairs:
        raise ValueError("no layer is compressed: there is nothing to refine")
    dense_of: dict[nn.Module, nn.Module] = {}
    for name, (dense, compressed) in pairs.items():
        if dense_of.setdefault(compressed, dense) is not dense:
            raise ValueError(f"the compressed layer {name} stands for two dense layers")
    swaps = [
        (parent, child_name, dense_of[child], child)
        for parent in model.modules()
        for child_name, child in parent._modules.items()
        if child is not None and child in dense_of
    ]
    missing = dense_of.keys() - {compressed for *_, compressed in swaps}
    for name, (_, compressed) in pairs.items():
        if compressed in missing:
            raise ValueError(f"the compressed layer {name} is not in the model")
    return swaps


@contextmanager
def _dense_in_place(swaps: list[Swap]) -> Iterator[None]:
    """Inside, the dense layers stand where the compressed ones do otherwise."""
    try:
        for parent, name, dense, _ in swaps:
            parent._modules[name] = dense
        yield
    finally:
        for parent, name, _, compressed in swaps:
            parent._modules[name] = compressed


def _trainable(
    model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]], biases: bool
) -> list[nn.Parameter]:
    """The floating-point parameters of the compressed layers that the dense model has not."""
    compressed = {part for _, layer in pairs.values() for part in layer.modules()}
    others = [module for module in model.modules() if module not in compressed]
    others += [part for dense, _ in pairs.values() for part in dense.modules()]
    foreign = {p for module in others for p in module.parameters(recurse=False)}
    found = {
        parameter: None  # a set that keeps the order
        for _, layer in pairs.values()
        for key, parameter in layer.named_parameters()
        if parameter.is_floating_point()
        and parameter not in foreign
        and (biases or key.rpartition(".")[2] != "bias")
    }
    if not found:
        raise ValueError("the compressed layers have no parameter of their own to train")
    return list(found)


def _split(windows: Tensor, held_out: Tensor | None, settings: Refinement) -> tuple[Tensor, Tensor]:
    """What is trained on and what is evaluated on."""
    if held_out is None:
        if len(windows) < 2:
            raise ValueError(
                f"refine takes two sequences at least, one of them held out, got {len(windows)}"
            )
        count = settings.held_out_of(len(windows))
        return windows[:-count], windows[-count:]
    if not len(windows) or not len(held_out):
        raise ValueError(
            f"refine takes one sequence to train on and one held out at least, got {len(windows)} "
            f"and {len(held_out)}"
        )
    return windows, held_out


def _warn_stop(why: str) -> None:
    warnings.warn(
        f"{why}: it ends, and the factors that were best on the held-out text stay (float16 "
        f"overflows; or learning_rate is too high)",
        stacklevel=4,
    )
