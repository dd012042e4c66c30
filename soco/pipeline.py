"""The way from a dense model to a compressed one: ``soco.compress``."""

import dataclasses
import inspect
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from soco.allocators import ALLOCATORS, Allocator
from soco.checkpoint import mark_compressed
from soco.factorization import choose_ranks, groups_of, make_factors
from soco.guard import Clock, unchanged_on_error
from soco.linalg import Factors, Spectrum
from soco.methods import (
    METHODS,
    FittedMethod,
    Method,
    RankLearner,
    SequentialMethod,
    SharingMethod,
    SoCo,
    TrainedMethod,
)
from soco.modules import LowRankLinear
from soco.preparation import check_model, noted, prepare, steps_bar, warn_of_rare
from soco.ranks import layer_params, parameter_budget
from soco.reporting import LayerReport, Report
from soco.spectral import SpectralLinear
from soco.surgery import (
    bias_of,
    fused_experts,
    is_linear,
    output_head,
    replace_module,
    set_weight,
    shape_of,
    transformer_blocks,
    untie_head,
    weight_of,
)
from soco.training import Step, checkpointed, train_scores
from soco.workbench import Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelType = TypeVar("ModelType", bound=nn.Module)


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
    allocator: str | Allocator | None = None,
    pivoted: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 8,
    stats: str | PathLike[str] | None = None,
    shared: Workbench | None = None,
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
        method: a name in ``soco.methods.METHODS``, or an instance such as ``SoCo(steps=400)``.
        tokenizer: needed where the calibration is text.
        calibration: a path to text or JSON lines (also ``.gz``), a list of strings, token ids (a
            tensor or an iterable of lists), a ``datasets`` dataset, or "self": sequences that the
            model writes itself. Not needed by "svd".
        samples: calibration sequences.
        length: tokens of each; None: what the model allows, at most 2048.
        seed: of the choice of sequences, of "self", of drawn labels, and of the training; the same
            seed gives the same result on the same machine.
        allocator: how the budget is shared among the layers: a name in
            ``soco.allocators.ALLOCATORS``, or an instance; None: the method's own. Methods that
            train find their own ranks.
        pivoted: store a layer as pivot rows and what combines them (``soco.pivots``): the same
            layer in ``rank^2`` fewer parameters, so that more rank fits into the budget.
        include: glob patterns of the layers to compress, anywhere in the model.
        exclude: glob patterns of layers to leave alone.
        batch_size: sequences at a time in the calibration pass.
        stats: a folder in which calibration statistics are stored, and looked for: by model, data
            and seed.
        shared: a workbench made by ``prepare`` for this model or one with the same weights, whose
            statistics and decompositions are used; calibration, samples, length, include, exclude,
            batch_size and stats are then its own.
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
    rule = _allocator(allocator, chosen)
    if pivoted and isinstance(chosen, SharingMethod):
        raise ValueError(f"method {chosen.name} shares its bases, which cannot be pivoted")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    check_model(model)
    needs = chosen.needs | rule.needs
    reads = reads_text(chosen, rule)
    if reads and (calibration is None if shared is None else shared.windows is None):
        raise ValueError(
            f"method {chosen.name} learns from text: give calibration=, a path or token ids, or "
            f'"self" for text that the model writes itself'
        )
    notes: list[str] = []
    clock = Clock(next(model.parameters()).device)
    before = _size(model)
    if shared is None:
        with clock("calibration text"), noted(notes):
            shared = prepare(
                model,
                tokenizer=tokenizer,
                calibration=calibration if reads else None,
                samples=samples,
                length=length,
                seed=seed,
                include=include,
                exclude=exclude,
                batch_size=batch_size,
                stats=stats,
                progress=progress,
                keep=_keeps(chosen, rule),
            )
    targets = _counterparts(model, shared)
    budget = parameter_budget(shared.shapes, ratio)
    with unchanged_on_error(shared.model, shared.targets), unchanged_on_error(model, targets):
        groups = groups_of(chosen, shared)
        if needs:
            with clock("statistics"), noted(notes):
                warn_of_rare(shared.statistics(needs))
        spectra: dict[str, Spectrum] = {}
        if not isinstance(chosen, RankLearner):
            with clock("decomposition"):
                spectra = shared.spectra(chosen.components, groups)
        history: list[Step] = []
        scores: dict[str, tuple[float, float]] = {}
        if isinstance(chosen, TrainedMethod):
            with clock("training"), noted(notes):
                result, scores, history = _train(
                    model, chosen, targets, spectra, shared, budget, pivoted, progress
                )
        else:
            with clock("ranks"), noted(notes):
                ranks = choose_ranks(
                    shared, chosen, rule, groups, spectra, budget, pivoted,
                    lambda: _learn(shared, spectra, budget, pivoted, progress),
                )  # fmt: skip
            with clock("factors"), noted(notes):
                factors = make_factors(
                    shared, chosen, groups, spectra, ranks, ratio=ratio, pivoted=pivoted
                )
            result = _result(targets, factors)
        _install(model, targets, result)
        layers = tuple(
            _layer_report(name, shared.shapes[name], result[name][0], scores.get(name))
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
            calibration=shared.source if reads else {},
            settings=_settings(chosen, rule, pivoted),
            left_dense=tuple(fused_experts(model)),
            warnings=tuple(notes),
            history=_columns(history),
            versions={name: version(name) for name in ("soco-llm", "torch", "transformers")},
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        factored = {layer.name: layer.rank for layer in layers if layer.rank is not None}
        biases = [n for n in factored if result[n][1] is not None and bias_of(targets[n]) is None]
        mark_compressed(cast("PreTrainedModel", model), factored, outcome.to_dict(), biases)
    return model


Result = dict[str, tuple[Tensor | Factors, Tensor | None]]  # name to weight or factors, and bias
_UNCHANGED = torch.empty(0)  # in a result: the layer stays dense, with the weight it has


def _method(method: str | Method, seed: int) -> Method:
    if isinstance(method, str):
        if method not in METHODS:
            known = ", ".join(sorted(METHODS))
            raise ValueError(f"there is no method {method!r}: choose one of {known}")
        seeds = "seed" in inspect.signature(METHODS[method]).parameters
        return METHODS[method](**({"seed": seed} if seeds else {}))
    if not isinstance(method, Method):
        raise ValueError(f"method must be a name or an instance of a method, got {method!r}")
    return method


def _allocator(allocator: str | Allocator | None, method: Method) -> Allocator:
    """The rule that was asked for, or the method's own."""
    if isinstance(method, TrainedMethod | RankLearner):
        if getattr(allocator, "name", allocator) not in (None, method.allocator):
            raise ValueError(
                f"method {method.name} finds its ranks by training and takes no allocator"
            )
        return ALLOCATORS[method.allocator]()
    name = method.allocator if allocator is None else allocator
    if isinstance(name, str):
        if name not in ALLOCATORS:
            known = ", ".join(sorted(ALLOCATORS))
            raise ValueError(f"there is no allocator {name!r}: choose one of {known}")
        return ALLOCATORS[name]()
    if not isinstance(name, Allocator):
        raise ValueError(
            f"allocator must be a name or an instance of an allocator, got {allocator!r}"
        )
    return name


def needs_of(
    method: str | Method, allocator: str | Allocator | None = None, **_: object
) -> frozenset[str]:
    """The calibration statistics that ``compress`` reads for these of its arguments."""
    chosen = _method(method, 0)
    return chosen.needs | _allocator(allocator, chosen).needs


def reads_text(method: str | Method, allocator: str | Allocator | None = None) -> bool:
    """Whether ``compress`` takes calibration text for these of its arguments."""
    chosen = _method(method, 0)
    rule = _allocator(allocator, chosen)
    trains = isinstance(chosen, TrainedMethod | RankLearner | SequentialMethod)
    probes = rule.name in ("learned", "sensitivity", "lems")
    return bool(chosen.needs | rule.needs) or trains or probes


def _keeps(method: Method, rule: Allocator) -> bool:
    """Whether statistics are read again after the decomposition."""
    return isinstance(method, FittedMethod) or bool(rule.needs)


def _counterparts(model: nn.Module, shared: Workbench) -> dict[str, nn.Module]:
    """The layers of ``model`` by the names that the workbench knows."""
    if model is shared.model:
        return dict(shared.targets)
    found = {}
    modules = dict(model.named_modules())
    for name, module in shared.targets.items():
        other = modules.get(name)
        if other is None or not is_linear(other) or shape_of(other) != shape_of(module):
            raise ValueError(
                f"the workbench was prepared for another model: this {type(model).__name__} has no "
                f"layer {name} of the same kind and shape"
            )
        found[name] = other
    return found


def _train(
    model: nn.Module,
    method: TrainedMethod,
    targets: Mapping[str, nn.Module],
    spectra: dict[str, Spectrum],
    shared: Workbench,
    budget: int,
    pivoted: bool,
    progress: bool | None,
) -> tuple[Result, dict[str, tuple[float, float]], list[Step]]:
    """Put the trainable layers in, train their scores, and fold them."""
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
        replace_module(model, name, layers[name])
    blocks = transformer_blocks(model) if settings.checkpointing else []
    with steps_bar(settings.steps, progress) as show, checkpointed(blocks):
        history = train_scores(
            model, layers, windows, budget, objective, settings, show, pivoted=pivoted
        )
    result, scores = {}, {}
    for name, layer in layers.items():
        result[name] = layer.fold()
        alive = layer.scores().detach()[layer.mask]
        scores[name] = float(alive.min()), float(alive.max())
    return result, scores, history


def _learn(
    shared: Workbench,
    spectra: Mapping[str, Spectrum],
    budget: int,
    pivoted: bool,
    progress: bool | None,
) -> dict[str, int]:
    """The ranks that SoCo's training finds for given components."""
    shapes = {name: (len(s.up), s.down.shape[1]) for name, s in spectra.items()}
    if shapes != shared.shapes:
        raise ValueError('the allocator "learned" takes a method without shared bases')
    method = SoCo(seed=shared.seed)
    model, targets = shared.model, shared.targets
    result, _, _ = _train(model, method, targets, dict(spectra), shared, budget, pivoted, progress)
    for name, module in targets.items():
        replace_module(model, name, module)
    return {
        name: found.up.shape[1] if isinstance(found, Factors) else min(shapes[name])
        for name, (found, _) in result.items()
    }


def _result(targets: Mapping[str, nn.Module], factors: Mapping[str, Factors | None]) -> Result:
    """Factors in the dtype of their layers, with the layers' biases."""
    result: Result = {}
    for name, module in targets.items():
        found = factors[name]
        weight = _UNCHANGED if found is None else found.to(weight_of(module).dtype)
        result[name] = weight, bias_of(module)
    return result


def _install(model: nn.Module, targets: Mapping[str, nn.Module], result: Result) -> None:
    """Put the final layers in: low-rank ones, and the original modules where they stay dense."""
    head = output_head(model)
    if head in result and result[head][0] is not _UNCHANGED:
        untie_head(model)
    for name, module in targets.items():
        weight, bias = result[name]
        if isinstance(weight, Factors):
            layer: nn.Module = LowRankLinear.from_factors(weight, bias)
            replace_module(model, name, layer)
        else:
            if weight is not _UNCHANGED:
                set_weight(module, weight)
            replace_module(model, name, module)


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


def _settings(method: Method, rule: Allocator, pivoted: bool) -> dict[str, Any]:
    """What the result depends on, as plain JSON data."""
    own = dataclasses.asdict(cast(Any, method)) if dataclasses.is_dataclass(method) else {}
    if not isinstance(method, TrainedMethod | RankLearner):
        fields = dataclasses.asdict(cast(Any, rule)) if dataclasses.is_dataclass(rule) else {}
        own = {**own, "allocator": rule.name, **{f"{rule.name}.{k}": v for k, v in fields.items()}}
    return {**own, **({"pivoted": True} if pivoted else {})}


def _columns(history: list[Step]) -> dict[str, list]:
    if not history:
        return {}
    return {
        "stage": [step.stage for step in history],
        "loss": [round(step.loss, 6) for step in history],
        "divergence": [round(step.divergence, 6) for step in history],
        "kept": [round(step.kept, 4) for step in history],
    }
