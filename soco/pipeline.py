"""The way from a dense model to a compressed one: ``soco.compress``."""

import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from soco.calibration import Statistics, collect, sample_from_model, uncalled
from soco.checkpoint import mark_compressed
from soco.data import token_windows
from soco.experts import experts_split, join_experts
from soco.guard import Clock, unchanged_on_error
from soco.linalg import Factors, Spectrum
from soco.methods import METHODS, Method, TrainedMethod
from soco.modules import LowRankLinear
from soco.objectives import objective_for
from soco.ranks import (
    allocate,
    is_dense,
    layer_params,
    parameter_budget,
    relative_energy,
    uniform_ranks,
)
from soco.reporting import LayerReport, Report
from soco.spectral import SpectralLinear
from soco.surgery import (
    bias_of,
    context_length,
    find_linears,
    fused_experts,
    output_head,
    replace_modules,
    set_weight,
    shape_of,
    transformer_blocks,
    untie_head,
    weight_of,
)
from soco.training import Step, checkpointed, train_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelType = TypeVar("ModelType", bound=nn.Module)

DEFAULT_LENGTH = 2048  # of a calibration sequence, where the model allows as much


def compress(
    model: ModelType,
    ratio: float = 0.5,
    *,
    method: str | Method = "soco",
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    ranks: Literal["uniform", "energy"] = "uniform",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> ModelType:
    """Replace the linear layers of a transformers model by low-rank ones, in place.

    The targets are the linear layers inside the transformer blocks, or what ``include`` and
    ``exclude`` make of them. A layer whose rank would reach ``out in / (out + in)`` stays dense,
    because two factors would not be smaller. On any error, and on Ctrl-C, the model is left as it
    was.

    Args:
        model: a transformers model on any device, float32, bfloat16 or float16; not quantized.
        ratio: fraction of the targets' parameters to *remove*, above 0 and below 1. It is met to
            within one rank of one layer, and never missed by removing less.
        method: "soco", "svd-llm" or "svd", or an instance such as ``SoCo(steps=400)``.
        tokenizer: needed where the calibration is text.
        calibration: a path to text or JSON lines (also ``.gz``), a list of strings, token ids (a
            tensor or an iterable of lists), a ``datasets`` dataset, or "self": sequences that the
            model writes itself. Not needed by "svd".
        samples: calibration sequences.
        length: tokens of each; None: what the model allows, at most 2048.
        seed: of the choice of sequences, of "self", and of the training; the same seed gives the
            same result on the same machine.
        ranks: how closed-form methods share the budget: "uniform", the same kept fraction in every
            layer, or "energy", greedily by relative energy. Methods that train find their own.
        include: glob patterns of the layers to compress, anywhere in the model.
        exclude: glob patterns of layers to leave alone.
        batch_size: sequences at a time in the calibration pass.
        progress: whether to show progress bars, on stderr; None: if that is a terminal.

    Returns:
        The same object. ``model.save_pretrained`` writes it compactly, ``soco.report(model)`` says
        what was done.

    Raises:
        ValueError: an argument that makes no sense, a text that is too short, weights or
            activations with NaN; each in one sentence.
        TypeError: ``model`` is not a module.

    Warns:
        UserWarning: the calibration has less than was asked for.

    Source: SoCo, arXiv:2502.15092; for the other methods see their classes.
    """
    chosen = _method(method, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    _check_model(model)
    if ranks not in ("uniform", "energy"):
        raise ValueError(f'ranks must be "uniform" or "energy", got {ranks!r}')
    notes: list[str] = []
    with experts_split(model) as fused:
        with _noted(notes):
            targets = _targets(model, include, exclude)
        shapes = {name: shape_of(module) for name, module in targets.items()}
        budget = parameter_budget(shapes, ratio)
        trained = isinstance(chosen, TrainedMethod)
        if calibration is None and (chosen.needs or trained):
            raise ValueError(
                f"method {chosen.name} learns from text: give calibration=, a path or token ids, "
                f'or "self" for text that the model writes itself'
            )
        clock = Clock(next(model.parameters()).device)
        before = _size(model)
        windows, stats = None, {}
        with unchanged_on_error(model, targets):
            if chosen.needs or trained:
                with clock("calibration text"), _noted(notes):
                    windows = _windows(
                        model, calibration, tokenizer, samples, length, seed, progress
                    )
            if windows is not None and chosen.needs:
                with clock("statistics"), _bar(len(windows), "statistics", progress) as bar:
                    stats = collect(model, targets, windows, batch_size, bar)
                with _noted(notes):
                    _warn_of_rare(stats)
            with clock("decomposition"), _bar(len(targets), "decomposition", progress) as bar:
                spectra = _spectra(chosen, targets, stats, bar)
            if trained:
                with clock("training"), _noted(notes):
                    result, scores, history = _train(
                        model,
                        cast(TrainedMethod, chosen),
                        targets,
                        spectra,
                        windows,
                        budget,
                        progress,
                    )
            else:
                with clock("factors"):
                    result = _truncate(targets, spectra, shapes, budget, ranks)
                scores, history = {}, []
            _install(model, targets, result)
            join_experts(model, fused)
            layers = tuple(
                _layer_report(name, shapes[name], result[name][0], scores.get(name))
                for name in targets
            )
            after, peak = _size(model), clock.peak()
            outcome = Report(
                method=chosen.name,
                ratio=float(ratio),
                layers=layers,
                model_params_before=before[0],
                model_params_after=after[0],
                model_bytes_before=before[1],
                model_bytes_after=after[1],
                seconds=clock.seconds,
                peak_bytes=peak[0],
                peak_of=peak[1],
                calibration=_describe(calibration, windows, seed),
                settings=_settings(chosen, ranks),
                left_dense=tuple(fused_experts(model)),
                warnings=tuple(notes),
                history=_columns(history),
                versions={name: version(name) for name in ("soco-llm", "torch", "transformers")},
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            factored = {layer.name: layer.rank for layer in layers if layer.rank is not None}
            biases = [
                n for n in factored if result[n][1] is not None and bias_of(targets[n]) is None
            ]
            mark_compressed(cast("PreTrainedModel", model), factored, outcome.to_dict(), biases)
    return model


Result = dict[str, tuple[Tensor | Factors, Tensor | None]]  # name to weight or factors, and bias
_UNCHANGED = torch.empty(0)  # in a result: the layer stays dense, with the weight it has


def _method(method: str | Method, seed: int) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"there is no method {method!r}: choose one of {known}")
        chosen = METHODS[method]
        return chosen(seed=seed) if method == "soco" else chosen()  # type: ignore[call-arg]
    if not isinstance(method, Method):
        raise ValueError(f"method must be a name or an instance of a method, got {method!r}")
    return method


def _check_model(model: nn.Module) -> None:
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"this {type(model).__name__} is quantized or compressed already "
            f"({getattr(model, 'quantization_method', 'unknown')}): start from the dense model"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{name} is not in memory (device meta): load the model without offload"
            )


def _targets(
    model: nn.Module, include: str | Iterable[str] | None, exclude: str | Iterable[str] | None
) -> dict[str, nn.Module]:
    """The layers to compress, without those that cannot be replaced."""
    targets = find_linears(model, include, exclude)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return targets
    few = torch.zeros(1, min(8, context_length(model) or 8), dtype=torch.long)
    left = uncalled(model, targets, few)
    if left:
        warnings.warn(
            f"{len(left)} layers are never called, because {type(model).__name__} reads their "
            f"weights itself: they stay dense and do not count ({left[0]} is the first)",
            stacklevel=2,
        )
    targets = {name: module for name, module in targets.items() if name not in left}
    if not targets:
        raise ValueError(f"{type(model).__name__} calls none of the layers that were chosen")
    return targets


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    """Pass warnings on when the block is done, and note what they said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        notes.append(str(warning.message))
        warnings.warn(str(warning.message), warning.category, stacklevel=4)


def _windows(
    model: nn.Module,
    calibration: Any,
    tokenizer: Any,
    samples: int,
    length: int | None,
    seed: int,
    progress: bool | None,
) -> Tensor:
    """Calibration token ids (samples, length)."""
    context = context_length(model) or sys.maxsize
    own = isinstance(calibration, str) and calibration == "self"
    if length is None:
        length = min(context - own, DEFAULT_LENGTH)
        if isinstance(calibration, Tensor) and calibration.dim() == 2:
            length = calibration.shape[1]
    if isinstance(length, int) and length > context - own:
        extra = ", one of them for the token it starts with" if own else ""
        raise ValueError(f"length {length} is too much for the model's {context} positions{extra}")
    if not own:
        vocabulary = getattr(model.config, "vocab_size", None)
        return token_windows(
            calibration,
            tokenizer,
            samples=samples,
            length=length,
            seed=seed,
            vocab_size=vocabulary if isinstance(vocabulary, int) else None,
        )
    for name, value in (("samples", samples), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        start = getattr(model.config, "bos_token_id", None)
    with _bar(samples, "sampling from the model", progress) as bar:
        return sample_from_model(model, samples, length, start=start, seed=seed, on_batch=bar)


def _warn_of_rare(stats: Mapping[str, Statistics]) -> None:
    """Say which layers saw too few tokens for their Gram matrix to have full rank."""
    unseen = [name for name, each in stats.items() if each.tokens == 0]
    few = {n: s.tokens for n, s in stats.items() if 0 < s.tokens < len(s.gram)}
    if unseen:
        warnings.warn(
            f"{len(unseen)} layers saw no calibration token, the first {unseen[0]}: they are "
            f"decomposed without whitening",
            stacklevel=3,
        )
    if few:
        name = min(few, key=lambda name: few[name] / len(stats[name].gram))
        warnings.warn(
            f"{len(few)} layers saw fewer calibration tokens than they have inputs, {name} "
            f"{few[name]} of {len(stats[name].gram)}: give more or longer samples",
            stacklevel=3,
        )


def _spectra(
    method: Method,
    targets: Mapping[str, nn.Module],
    stats: dict[str, Statistics],
    on_layer: Callable[[int], None],
) -> dict[str, Spectrum]:
    """Take all weights apart; a layer's statistics are dropped as soon as it is done."""
    spectra = {}
    for done, (name, module) in enumerate(targets.items(), start=1):
        weight = weight_of(module).detach()
        seen = stats.pop(name, None)
        known = {} if seen is None else {"gram": seen.gram.to(weight.device)}
        spectra[name] = method.spectrum(weight, known, name=f"{name}.weight")
        on_layer(done)
    return spectra


def _truncate(
    targets: Mapping[str, nn.Module],
    spectra: Mapping[str, Spectrum],
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    ranks: str,
) -> Result:
    """Closed forms: choose ranks and cut."""
    if ranks == "uniform":
        chosen = uniform_ranks(shapes, budget)
    else:
        energy = relative_energy({name: spectrum.sigma for name, spectrum in spectra.items()})
        chosen = allocate(energy, shapes, budget)
    result: Result = {}
    for name, module in targets.items():
        weight = weight_of(module).detach()
        if is_dense(shapes[name], chosen[name]):
            result[name] = _UNCHANGED, bias_of(module)
        else:
            factors = spectra[name].truncate(chosen[name]).to(weight.dtype)
            result[name] = factors, bias_of(module)
    return result


def _train(
    model: nn.Module,
    method: TrainedMethod,
    targets: Mapping[str, nn.Module],
    spectra: dict[str, Spectrum],
    windows: Tensor | None,
    budget: int,
    progress: bool | None,
) -> tuple[Result, dict[str, tuple[float, float]], list[Step]]:
    """Put the trainable layers in, train their scores, and fold them."""
    windows = cast(Tensor, windows)
    settings = method.settings()
    if len(windows) < settings.batch_size:
        warnings.warn(
            f"the calibration has {len(windows)} sequences, fewer than one batch of "
            f"{settings.batch_size}: training goes on with batches of {len(windows)}",
            stacklevel=3,
        )
        micro = settings.micro_batch and min(settings.micro_batch, len(windows))
        settings = dataclasses.replace(settings, batch_size=len(windows), micro_batch=micro)
    layers = {}
    for name, module in targets.items():
        layers[name] = SpectralLinear(
            weight_of(module),
            bias_of(module),
            spectra.pop(name),
            largest_score=method.largest_score,
            deviation=method.deviation,
        )
    replace_modules(model, layers)
    objective = objective_for(model, windows[:1].to(next(model.parameters()).device))
    blocks = transformer_blocks(model) if settings.checkpointing else []
    with tqdm(total=settings.steps, unit="step", disable=_hidden(progress), leave=False) as bar:

        def show(step: Step) -> None:
            bar.set_description(step.stage, refresh=False)
            bar.set_postfix(loss=f"{step.loss:.4f}", kept=f"{step.kept:.1%}", refresh=False)
            bar.update()

        with checkpointed(blocks):
            history = train_scores(model, layers, windows, budget, objective, settings, show)
    result, scores = {}, {}
    for name, layer in layers.items():
        result[name] = layer.fold()
        alive = layer.scores().detach()[layer.mask]
        scores[name] = float(alive.min()), float(alive.max())
    return result, scores, history


def _install(model: nn.Module, targets: Mapping[str, nn.Module], result: Result) -> None:
    """Put the final layers in: low-rank ones, and the original modules where they stay dense."""
    head = output_head(model)
    if head in result and result[head][0] is not _UNCHANGED:
        untie_head(model)
    final = {}
    for name, module in targets.items():
        weight, bias = result[name]
        final[name] = module
        if isinstance(weight, Factors):
            final[name] = LowRankLinear.from_factors(weight, bias)
        elif weight is not _UNCHANGED:
            set_weight(module, weight)
    replace_modules(model, final)


def _layer_report(
    name: str,
    shape: tuple[int, int],
    weight: Tensor | Factors,
    scores: tuple[float, float] | None,
) -> LayerReport:
    rank = weight.up.shape[1] if isinstance(weight, Factors) else None
    params = layer_params(shape, min(shape) if rank is None else rank)
    low, high = scores or (None, None)
    return LayerReport(name, shape, rank, params, low, high)


def _size(model: nn.Module) -> tuple[int, int]:
    """Parameters and their bytes, each tensor once; the one-element sentinels are not counted."""
    parameters = list(model.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def _settings(method: Method, ranks: str) -> dict[str, Any]:
    own = dataclasses.asdict(cast(Any, method)) if dataclasses.is_dataclass(method) else {}
    return own if isinstance(method, TrainedMethod) else {**own, "ranks": ranks}


def _describe(calibration: Any, windows: Tensor | None, seed: int) -> dict[str, Any]:
    if windows is None:
        return {}
    source = type(calibration).__name__
    if isinstance(calibration, str | PathLike):
        source = "self" if calibration == "self" else Path(calibration).name
    sequences, length = windows.shape
    return {"source": source, "sequences": sequences, "length": length, "seed": seed}


def _columns(history: list[Step]) -> dict[str, list]:
    if not history:
        return {}
    return {
        "stage": [step.stage for step in history],
        "loss": [round(step.loss, 6) for step in history],
        "divergence": [round(step.divergence, 6) for step in history],
        "kept": [round(step.kept, 4) for step in history],
    }


def _hidden(progress: bool | None) -> bool | None:
    """What tqdm calls it: True never shows, None shows on a terminal."""
    return None if progress is None else not progress


@contextmanager
def _bar(total: int, title: str, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows after two seconds; call it with how many are done."""
    with tqdm(total=total, desc=title, disable=_hidden(progress), delay=2, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show
