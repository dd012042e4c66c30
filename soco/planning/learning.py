"""What the phases of a compression that train hold in memory, and what they compute."""

import math
from typing import Any

import torch
from torch import nn

from soco.linalg import Spectrum
from soco.methods import TrainedMethod
from soco.modules import LowRankLinear, PivotedLinear
from soco.planning.setting import Demand, Passes, Setting, ids_of, spectrum_bytes
from soco.planning.tracing import KEPT, Work, training_pass, without_values
from soco.ranks import Shape, uniform_ranks
from soco.refinement import Refinement
from soco.spectral import SpectralLinear
from soco.stages import TrainingSettings
from soco.steps import TEACHER_ROOM, all_dense, checkpointed
from soco.surgery import bias_of, replaced, text_config, transformer_blocks, weight_of

WRITTEN_AT_ONCE = 64  # sequences that a model writes at a time


def training(setting: Setting, method: TrainedMethod, passes: Passes) -> list[Demand]:
    """The text that the model writes, and the training of scores."""
    wanted = method.settings()
    spectra = sum(spectrum_bytes(shape, setting.dtype) for shape in setting.shapes.values())
    generates = getattr(setting.model, "can_generate", lambda: False)()
    written = round(wanted.written * setting.samples) if generates else 0
    found = []
    if written:
        found.append(_writing_text(setting, written, passes, spectra))
    settings = wanted.within_passes(setting.samples + written)
    size = min(settings.batch_size, setting.samples + written)
    held = setting.weights + spectra * setting.dtype.itemsize // 4
    steps = settings.steps_in_all(1)
    windows = min(setting.samples + written, (steps + settings.fisher_warmup) * size)
    held += min(TEACHER_ROOM, setting.hidden(windows))
    if passes.objective is None:
        return [*found, Demand("training", held, Work())]
    warm, first, last = _training_passes(setting, method, settings, passes, size)
    work = warm.times(settings.fisher_warmup).then(first).then(last.times(max(0, steps - 1)))
    found.append(Demand("training", held + work.peak + work.kept, work))
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
    with without_values(model):
        layers = {
            name: SpectralLinear(
                weight_of(layer), bias_of(layer), _no_spectrum(shapes[name]),
                largest_score=method.largest_score, channels=method.channels,
                deviation=method.deviation == "vector",
            )
            for name, layer in setting.targets.items()
        }  # fmt: skip
        blocks = transformer_blocks(model) if settings.checkpointing else []
        found = []
        with replaced(model, layers), checkpointed(blocks):
            for ranks, train in ((None, False), (begin, True), (setting.ranks, True)):
                for name, layer in layers.items():
                    full = min(shapes[name])
                    alive = full if ranks is None else ranks[name]
                    layer.computed = min(full, math.ceil((1 + settings.spare) * alive))
                found.append(
                    training_pass(
                        model, list(layers.values()), passes.objective, ids_of(setting, micro),
                        record=settings.criterion == "fisher", train=train,
                        dense=lambda: all_dense(layers.values()), again=ranks is setting.ranks,
                    )
                )  # fmt: skip
    return found[0].times(parts), found[1].times(parts), found[2].times(parts)


def _no_spectrum(shape: Shape) -> Spectrum:
    """One without values."""
    rank = min(shape)
    return Spectrum(torch.empty(shape[0], rank), torch.empty(rank), torch.empty(rank, shape[1]))


def _writing_text(setting: Setting, written: int, passes: Passes, spectra: int) -> Demand:
    """Keys and values of the sequences that are written at once, and their next tokens."""
    config: Any = text_config(setting.model)
    at_once = min(WRITTEN_AT_ONCE, written)
    heads = config.num_attention_heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * (
        getattr(config, "head_dim", None) or config.hidden_size // heads
    )
    cache = 2 * config.num_hidden_layers * width * setting.dtype.itemsize * setting.length * at_once
    tokens = 6 * at_once * config.vocab_size * 4  # logits, in float32, sorted out, and chances
    share = written / (setting.batches * setting.batch_size)
    head = 2.0 * written * setting.length * config.hidden_size * config.vocab_size
    work = passes.forward.times(setting.batches * share).then(
        Work(products={setting.dtype: head}, kept=KEPT)
    )
    held = setting.weights + spectra + cache + tokens
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
    return Demand("refinement", held + work.peak + work.kept, work)


def _refined(setting: Setting, settings: Refinement, passes: Passes, size: int) -> Work:
    """One step, all factors in their places."""
    model, pivoted = setting.model, setting.choices.pivoted
    kind = PivotedLinear if pivoted else LowRankLinear
    micro = settings.micro_batch or size
    with without_values(model):
        layers: dict[str, nn.Module] = {}
        for name in setting.factored:
            (rows, columns), bias = setting.shapes[name], bias_of(setting.targets[name])
            rank = setting.ranks[name]
            layers[name] = kind(columns, rows, rank, bias is not None, dtype=setting.dtype)
        blocks = transformer_blocks(model) if settings.checkpointing else []
        dense = {name: setting.targets[name] for name in layers}
        with replaced(model, layers), checkpointed(blocks):
            step = training_pass(
                model, [], passes.objective, ids_of(setting, micro), record=False, train=True,
                dense=lambda: replaced(model, dense),
            )  # fmt: skip
    return step.times(math.ceil(size / micro))
