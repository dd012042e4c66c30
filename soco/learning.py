"""The methods that train, run on a model: scores learned, positions learned, ranks learned."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from soco.factorization import Result
from soco.keeping import Filed, Keeper
from soco.linalg import Factors, Spectrum
from soco.methods import RankLearner, SoCo, TrainedMethod
from soco.preparation import steps_bar
from soco.spectral import BESIDES, Components, Snapshot, SpectralLinear
from soco.steps import Step, checkpointed
from soco.surgery import bias_of, replaced, transformer_blocks, weight_of
from soco.training import train_scores
from soco.workbench import Workbench


class Spectra(Protocol):
    """What gives the spectra of layers away."""

    def pop(self, name: str, /) -> Spectrum | Components:
        """That of a layer, once."""
        ...


@dataclass(frozen=True)
class Learned:
    """What a training of scores leaves behind."""

    layers: dict[str, SpectralLinear]  # their masks meet the last budget
    snapshots: list[dict[str, Snapshot]]  # for every budget
    history: list[Step]

    def folded(self) -> dict[str, tuple[Tensor | Factors, Tensor | None]]:
        """Layer to its weight (where it stays dense) or factors, and its bias."""
        return {name: layer.fold() for name, layer in self.layers.items()}

    @torch.no_grad()
    def go_back(self, station: int) -> None:
        """Give the layers the scores and masks that they had at a budget."""
        for name, layer in self.layers.items():
            then = self.snapshots[station][name]
            layer.logit.copy_(then.logit)
            layer.mask.copy_(then.mask)
            layer.computed = len(layer.mask)
            for part in BESIDES:
                if getattr(layer, part) is not None:
                    getattr(layer, part).copy_(getattr(then, part))

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Layer to the smallest and largest score of the components kept."""
        alive = {name: layer.scores().detach()[layer.mask] for name, layer in self.layers.items()}
        return {name: (float(scores.min()), float(scores.max())) for name, scores in alive.items()}


def learn_scores(
    model: nn.Module,
    method: TrainedMethod,
    targets: Mapping[str, nn.Module],
    spectra: Spectra,
    shared: Workbench,
    budgets: Sequence[int],
    *,
    pivoted: bool,
    progress: bool | None,
    written: Tensor | None = None,
    held_out: int = 0,
    keeper: Keeper | None = None,
    states: Filed | None = None,
    by_blocks: bool = False,
) -> Learned:
    """Train the scores of all layers.

    Args:
        model: with its dense layers, which are back in their places afterwards.
        method: what is trained, and how.
        targets: name to dense layer.
        spectra: full decompositions; a dictionary is emptied on the way, to save memory.
        shared: has the calibration and the objective.
        budgets: parameters that may be kept, one or several, descending.
        pivoted: whether factors will be pivoted, which hold less.
        progress: whether to show a bar.
        written: token ids (sequences, length) that are trained on beside the calibration.
        held_out: so many of the calibration's last sequences are not trained on: a refinement that
            follows measures itself by them.
        keeper: where the state of the training is kept; None: nowhere.
        states: where the dense model's last states are kept; None: in memory.
        by_blocks: whether each block is computed again on the way back, whatever the settings say:
            the numbers are the same.
    """
    windows = cast(Tensor, shared.windows)
    windows = windows[: len(windows) - held_out]
    windows = windows if written is None else torch.cat([windows, written])
    settings = method.settings()
    if len(windows) < settings.batch_size:
        warnings.warn(
            f"there are {len(windows)} sequences to train on, fewer than one batch of "
            f"{settings.batch_size}: training goes on with batches of {len(windows)}",
            stacklevel=3,
        )
        micro = settings.micro_batch and min(settings.micro_batch, len(windows))
        settings = dataclasses.replace(settings, batch_size=len(windows), micro_batch=micro)
    wanted, settings = settings, settings.within_passes(len(windows))
    asked, steps = (each.steps_in_all(len(budgets)) for each in (wanted, settings))
    if steps < asked:
        warnings.warn(
            f"there are {len(windows)} sequences to train on: {steps} steps are made instead of "
            f"{asked}, for more than {settings.passes:g} passes over them for one size would "
            f"over-fit (samples= and longer texts give more)",
            stacklevel=3,
        )
    objective = shared.objective
    layers, expected = {}, {}
    for name, module in targets.items():
        spectrum = spectra.pop(name)
        if method.components.in_loss and not shared.saw_nothing((name,)):
            expected[name] = spectrum.sigma.float().square()
        layers[name] = SpectralLinear(
            weight_of(module),
            bias_of(module),
            spectrum,
            largest_score=method.largest_score,
            channels=method.channels,
            deviation=method.deviation == "vector",
            mean=shared.mean(name) if method.deviation == "mean" else None,
        )
        del spectrum  # it is large, and this may be the last one
    blocks = transformer_blocks(model) if settings.checkpointing or by_blocks else []
    with (
        replaced(model, layers),
        steps_bar(steps, progress) as show,
        checkpointed(blocks),
    ):
        history, snapshots = train_scores(
            model, layers, windows, budgets, objective, settings, show, pivoted=pivoted,
            expected=expected, keeper=keeper, states=states,
        )  # fmt: skip
    return Learned(layers, snapshots, history)


def learn_positions(
    model: nn.Module,
    method: RankLearner,
    targets: Mapping[str, nn.Module],
    shared: Workbench,
    budget: int,
    *,
    progress: bool | None,
    keep: Callable[[str], Keeper | None] = lambda name: None,
) -> tuple[Result, list[Step]]:
    """Let a method find ranks and factors by its own training; see ``learn_scores``."""
    windows = cast(Tensor, shared.windows)
    steps = getattr(method, "steps", 0)
    with steps_bar(steps, progress) as show:
        return method.fit(model, targets, windows, budget, shared.objective, show, keep)


def learn_ranks(
    shared: Workbench,
    spectra: Mapping[str, Spectrum],
    budget: int,
    *,
    pivoted: bool,
    progress: bool | None,
    keeper: Keeper | None = None,
) -> dict[str, int]:
    """The ranks that SoCo's training finds for given components: the allocator "learned"."""
    method = SoCo(seed=shared.seed, fisher_prior=0.0)  # the components may be in any unit
    model, targets = shared.model, shared.targets
    learned = learn_scores(
        model, method, targets, dict(spectra), shared, [budget], pivoted=pivoted, progress=progress,
        written=shared.written(method.written, method.seed), keeper=keeper,
    )  # fmt: skip
    return {name: int(layer.mask.sum()) for name, layer in learned.layers.items()}
