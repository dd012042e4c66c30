"""The methods that train, run on a model: scores learned, positions learned, ranks learned."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from soco.factorization import Result
from soco.linalg import Factors, Spectrum
from soco.methods import RankLearner, SoCo, TrainedMethod
from soco.preparation import steps_bar
from soco.spectral import SpectralLinear
from soco.steps import Step, checkpointed
from soco.surgery import bias_of, replaced, transformer_blocks, weight_of
from soco.training import train_scores
from soco.workbench import Workbench

Folded = dict[str, tuple[Tensor | Factors, Tensor | None]]  # layer to weight or factors, and bias


def learn_scores(
    model: nn.Module,
    method: TrainedMethod,
    targets: Mapping[str, nn.Module],
    spectra: dict[str, Spectrum],
    shared: Workbench,
    budget: int,
    *,
    pivoted: bool,
    progress: bool | None,
) -> tuple[Folded, dict[str, tuple[float, float]], list[Step]]:
    """Train the scores of all layers, and fold them.

    Args:
        model: with its dense layers, which are back in their places afterwards.
        method: what is trained, and how.
        targets: name to dense layer.
        spectra: name to full decomposition; emptied on the way, to save memory.
        shared: has the calibration and the objective.
        budget: parameters that may be kept.
        pivoted: whether factors will be pivoted, which hold less.
        progress: whether to show a bar.

    Returns:
        Layer to its weight (where it stays dense) or factors, and its bias; layer to the smallest
        and largest score of the components kept; the steps.
    """
    windows = cast(Tensor, shared.windows)
    settings = method.settings()
    if len(windows) < settings.batch_size:
        warnings.warn(
            f"the calibration has {len(windows)} sequences, fewer than one batch of "
            f"{settings.batch_size}: training goes on with batches of {len(windows)}",
            stacklevel=3,
        )
        micro = settings.micro_batch and min(settings.micro_batch, len(windows))
        settings = dataclasses.replace(settings, batch_size=len(windows), micro_batch=micro)
    objective = shared.objective
    layers = {}
    for name, module in targets.items():
        layers[name] = SpectralLinear(
            weight_of(module),
            bias_of(module),
            spectra.pop(name),
            largest_score=method.largest_score,
            deviation=method.deviation,
        )
    blocks = transformer_blocks(model) if settings.checkpointing else []
    with (
        replaced(model, layers),
        steps_bar(settings.steps, progress) as show,
        checkpointed(blocks),
    ):
        history = train_scores(
            model, layers, windows, budget, objective, settings, show, pivoted=pivoted
        )
    result, scores = {}, {}
    for name, layer in layers.items():
        result[name] = layer.fold()
        alive = layer.scores().detach()[layer.mask]
        scores[name] = float(alive.min()), float(alive.max())
    return result, scores, history


def learn_positions(
    model: nn.Module,
    method: RankLearner,
    targets: Mapping[str, nn.Module],
    shared: Workbench,
    budget: int,
    *,
    progress: bool | None,
) -> tuple[Result, list[Step]]:
    """Let a method find ranks and factors by its own training; see ``learn_scores``."""
    windows = cast(Tensor, shared.windows)
    steps = getattr(method, "steps", 0)
    with steps_bar(steps, progress) as show:
        return method.fit(model, targets, windows, budget, shared.objective, show)


def learn_ranks(
    shared: Workbench,
    spectra: Mapping[str, Spectrum],
    budget: int,
    *,
    pivoted: bool,
    progress: bool | None,
) -> dict[str, int]:
    """The ranks that SoCo's training finds for given components: the allocator "learned"."""
    method = SoCo(seed=shared.seed)
    model, targets = shared.model, shared.targets
    result, _, _ = learn_scores(
        model, method, targets, dict(spectra), shared, budget, pivoted=pivoted, progress=progress
    )
    return {
        name: found.up.shape[1] if isinstance(found, Factors) else min(shared.shapes[name])
        for name, (found, _) in result.items()
    }
