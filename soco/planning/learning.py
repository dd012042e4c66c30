"""What the phases of a compression that train hold in memory, and what they compute."""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from soco.linalg import Spectrum
from soco.methods import TrainedMethod
from soco.modules import LowRankLinear, PivotedLinear
from soco.planning.setting import (
    Demand,
    Passes,
    Setting,
    ids_of,
    of_all_blocks,
    spectrum_bytes,
)
from soco.planning.tracing import KEPT, Work, training_pass
from soco.ranks import Shape, uniform_ranks
from soco.refinement import Refinement
from soco.sampling import cache_bytes, sequences_at_once
from soco.spectral import SpectralLinear
from soco.stages import TrainingSettings
from soco.steps import TEACHER_ROOM, all_dense, checkpointed
from soco.surgery import bias_of, replaced, transformer_blocks, weight_of


def training(
    setting: Setting, method: TrainedMethod, passes: Passes, *, stream: bool
) -> list[Demand]:
    """The text that the model writes, and the training of scores."""
    wanted = method.settings()
    spectra = sum(spectrum_bytes(shape, setting.dtype) for shape in setting.shapes.values())
    generates = getattr(setting.model, "can_generate", lambda: False)()
    written = round(wanted.written * setting.samples) if generates else 0
    found = []
    if written:
        there = setting.lent(spectral=False) if stream else setting.weights + spectra
        found.append(_writing_text(setting, written, passes, there))
    settings = wanted.within_passes(setting.samples + written)
    size = min(settings.batch_size, setting.samples + written)
    steps = settings.steps_in_all(1)
    if stream:
        settings = replace(settings, checkpointing=True)
        held = setting.lent(spectral=True)
    else:
        windows = min(setting.samples + written, (steps + settings.fisher_warmup) * size)
        held = setting.weights + spectra * setting.dtype.itemsize // 4
        held += min(TEACHER_ROOM, setting.hidden(windows))
    if passes.objective is None:
        return [*found, Demand("training", held, Work())]
    warm, first, last = _training_passes(setting, method, settings, passes, size)
    work = warm.times(settings.fisher_warmup).then(first).then(last.times(max(0, steps - 1)))
    found.append(Demand("training", held + work.peak + work.kept, work, [size * [1.0]]))
    return found


def _training_passes(
    setting: Setting, method: TrainedMethod, settings: TrainingSettings, passes: Passes, size: int
) -> tuple[Work, Work, Work]:
    """A pass with all components, the first step, and one with those that stay."""
    model, shapes, pivoted = setting.model, setting.shapes, setting.choices.pivoted
    micro = settings.micro_batch or size
    parts = math.ceil(size / micro)
    stage, of_stage = next(settings.stages_for(0))
    total = sum(rows * columns for rows, columns in shapes.values())
    excess = stage.excess(0, of_stage) if stage.hard else 1.0
    begin = uniform_ranks(
        shapes, setting.budget + int((total - setting.budget) * excess), pivoted=pivoted
    )
    found = []
    for ranks, train in ((None, False), (begin, True), (setting.ranks, True)):

        def one(ranks: Mapping[str, int] | None = ranks, train: bool = train) -> Work:
            layers = _spectral(setting, method)
            for name, layer in layers.items():
                full = min(shapes[name])
                alive = full if ranks is None else ranks[name]
                layer.computed = min(full, math.ceil((1 + settings.spare) * alive))
            blocks = transformer_blocks(model) if settings.checkpointing else []
            with replaced(model, layers), checkpointed(blocks):
                return training_pass(
                    model, list(layers.values()), passes.objective, ids_of(setting, micro),
                    record=settings.criterion == "fisher", train=train,
                    dense=lambda: all_dense(layers.values()), again=ranks is setting.ranks,
                )  # fmt: skip

        found.append(of_all_blocks(model, one).times(parts))
    return found[0], found[1], found[2]


def _spectral(setting: Setting, method: TrainedMethod) -> dict[str, SpectralLinear]:
    """The layers that are trained, without values, in the place of those that are in the model."""
    there = dict(setting.model.named_modules())
    return {
        name: SpectralLinear(
            weight_of(layer), bias_of(layer), _no_spectrum(setting.shapes[name]),
            largest_score=method.largest_score, channels=method.channels,
            deviation=method.deviation == "vector",
        )
        for name, layer in setting.targets.items()
        if there.get(name) is layer
    }  # fmt: skip


def _no_spectrum(shape: Shape) -> Spectrum:
    """One without values."""
    rank = min(shape)
    return Spectrum(torch.empty(shape[0], rank), torch.empty(rank), torch.empty(rank, shape[1]))


def _writing_text(setting: Setting, written: int, passes: Passes, there: int) -> Demand:
    """Keys and values of the sequences that are written at once, and their next tokens."""
    vocabulary, width = setting.model.get_input_embeddings().weight.shape
    at_once = min(sequences_at_once(setting.model, setting.length), written)
    cache = at_once * cache_bytes(setting.model, setting.length)
    tokens = 6 * at_once * vocabulary * 4  # logits, in float32, sorted out, and chances
    share = written / (setting.batches * setting.batch_size)
    head = 2.0 * written * setting.length * width * vocabulary
    work = passes.forward.times(setting.batches * share).then(
        Work(products={setting.dtype: head}, kept=KEPT)
    )
    held = there + cache + tokens
    return Demand("written text", held + work.kept, work)


def refinement(setting: Setting, settings: Refinement, passes: Passes) -> Demand:
    """Factors, the best of them, their masters, moments and gradients; and one batch."""
    pivoted = setting.choices.pivoted
    held_out = settings.held_out_of(setting.samples)
    written = round(settings.written * setting.samples)
    size = min(settings.batch_size, setting.samples - held_out + written)
    count = setting.factors(1, pivoted=pivoted)
    half = setting.dtype.itemsize < 4
    wide = max(4, setting.dtype.itemsize)
    held = setting.weights + count * (2 * setting.dtype.itemsize + 2 * wide + half * 2 * wide)
    windows = min(setting.samples + written, settings.steps * size + held_out)
    held += min(TEACHER_ROOM, setting.hidden(windows))
    if passes.objective is None:
        return Demand("refinement", held, Work())
    work = _refined(setting, settings, passes, size)
    evaluated = held_out / size * (1 + settings.steps / settings.evaluate_every)
    work = work.times(settings.steps + evaluated / 3)
    return Demand("refinement", held + work.peak + work.kept, work, [size * [1.0]])


def _refined(setting: Setting, settings: Refinement, passes: Passes, size: int) -> Work:
    """One step, all factors in their places."""
    model, pivoted = setting.model, setting.choices.pivoted
    kind = PivotedLinear if pivoted else LowRankLinear
    micro = settings.micro_batch or size

    def one() -> Work:
        there = dict(model.named_modules())
        layers: dict[str, nn.Module] = {}
        for name in setting.factored:
            dense = setting.targets[name]
            if there.get(name) is dense:
                (rows, columns), bias = setting.shapes[name], bias_of(dense)
                rank = setting.ranks[name]
                layers[name] = kind(columns, rows, rank, bias is not None, dtype=setting.dtype)
        blocks = transformer_blocks(model) if settings.checkpointing else []
        before = {name: setting.targets[name] for name in layers}
        with replaced(model, layers), checkpointed(blocks):
            return training_pass(
                model, [], passes.objective, ids_of(setting, micro), record=False, train=True,
                dense=lambda: replaced(model, before),
            )  # fmt: skip

    return of_all_blocks(model, one).times(math.ceil(size / micro))
