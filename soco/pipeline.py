"""The way from a dense model to a compressed one: ``soco.compress``."""

import dataclasses
import inspect
import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from soco.allocators import ALLOCATORS, Allocator, Learned
from soco.checkpoint import mark_compressed
from soco.experts import experts_split, join_experts
from soco.factorization import choose_ranks, groups_of, make_factors
from soco.guard import Clock, unchanged_on_error
from soco.installation import Placed, install, layer_reports, new_biases, size_of
from soco.learning import learn_positions, learn_ranks, learn_scores
from soco.linalg import Factors
from soco.methods import (
    METHODS,
    FittedMethod,
    Method,
    RankLearner,
    SequentialMethod,
    SharingMethod,
    TrainedMethod,
)
from soco.preparation import (
    check_model,
    noted,
    prepare,
    progress_bar,
    steps_bar,
    warn_of_rare,
)
from soco.ranks import check_ratio, parameter_budget
from soco.refinement import Refinement
from soco.refinement import refine as refine_factors
from soco.reporting import Report
from soco.steps import Step
from soco.surgeon import SVDSurgeon, rescale
from soco.surgery import bias_of, fused_experts, is_linear, shape_of, weight_of
from soco.workbench import Groups, Workbench

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBING = ("sensitivity", "lems")  # allocators that try layers out at several ranks

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
    surgeon: bool | SVDSurgeon | None = None,
    refine: bool | Refinement = False,
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
        surgeon: after the truncation, scale the components that stay so that they make up for those
            that went (``soco.surgeon``): True, or an ``SVDSurgeon``; None: as the method has it.
        refine: at the end, train all factors together to give what the dense model gives, stopped
            early by held-out text (``soco.refinement``): True, or a ``Refinement``.
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
    chosen = find_method(method, seed)
    choices = _Choices(
        chosen,
        _allocator(allocator, chosen),
        pivoted,
        _surgeon(surgeon, chosen, seed),
        _refinement(refine, seed),
        progress,
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    check_ratio(ratio)
    check_model(model)
    reads = reads_text(chosen, choices.rule, choices.surgeon, choices.refinement)
    if reads and (calibration is None if shared is None else shared.windows is None):
        raise ValueError(
            f"method {chosen.name} learns from text: give calibration=, a path or token ids, or "
            f'"self" for text that the model writes itself'
        )
    if shared is not None:
        _check_whole(shared)
    clock = Clock(next(model.parameters()).device)
    before = size_of(model)
    own = shared is None
    notes: list[str] = []
    with experts_split(model) as fused:
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
                    keep=_keeps(choices),
                )
        targets = _counterparts(model, shared)
        budget = parameter_budget(shared.shapes, ratio)
        with unchanged_on_error(shared.model, shared.targets), unchanged_on_error(model, targets):
            run = _Run(model, targets, shared, ratio, budget, clock, notes)
            placed, groups, scores, history = _factor(run, choices)
            made, redone = install(model, targets, placed, groups, pivoted=pivoted)
            if choices.refinement is not None and made:
                if own:
                    shared.forget()
                with clock("refinement"), noted(notes):
                    history += _refine(run, made, redone, choices.refinement, progress)
            join_experts(model, fused)
            layers = layer_reports(targets, made, groups, scores)
            after, peak = size_of(model), clock.peak()
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
                settings=choices.settings(),
                left_dense=tuple(fused_experts(model)),
                warnings=tuple(notes),
                history=_columns(history),
                versions={name: version(name) for name in ("soco-llm", "torch", "transformers")},
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            ranks = {name: layer.rank for name, layer in made.items()}
            biases = new_biases(targets, made)
            mark_compressed(cast("PreTrainedModel", model), ranks, outcome.to_dict(), biases)
    return model


@dataclasses.dataclass(frozen=True)
class _Choices:
    """What was asked for, but for model and text."""

    method: Method
    rule: Allocator
    pivoted: bool
    surgeon: SVDSurgeon | None
    refinement: Refinement | None
    progress: bool | None

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.pivoted and isinstance(self.method, SharingMethod):
            raise ValueError(f"method {self.method.name} shares its bases, which cannot be pivoted")
        if self.pivoted and isinstance(self.method, RankLearner):
            raise ValueError(
                f"method {self.method.name} cannot count pivoted factors in its budget"
            )
        if isinstance(self.rule, Learned) and isinstance(self.method, SharingMethod):
            raise ValueError('the allocator "learned" takes a method without shared bases')
        if self.surgeon is not None and isinstance(self.method, TrainedMethod):
            raise ValueError(f"method {self.method.name} trains its scales, and takes no surgeon")
        try:
            json.dumps(self.settings(), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the settings are written into the model's config.json and have to be plain, "
                f"finite values: {error}"
            ) from error

    def settings(self) -> dict[str, Any]:
        """What the result depends on, as plain JSON data."""
        own = dataclasses.asdict(cast(Any, self.method))
        if not isinstance(self.method, TrainedMethod | RankLearner):
            fields = dataclasses.asdict(cast(Any, self.rule))
            own["allocator"] = self.rule.name
            own |= {f"{self.rule.name}.{name}": value for name, value in fields.items()}
        for name, part in (("surgeon", self.surgeon), ("refine", self.refinement)):
            if part is not None:
                own[name] = dataclasses.asdict(part)
        return {**own, **({"pivoted": True} if self.pivoted else {})}


@dataclasses.dataclass
class _Run:
    """One compression under way."""

    model: nn.Module
    targets: Mapping[str, nn.Module]
    shared: Workbench
    ratio: float
    budget: int
    clock: Clock
    notes: list[str]

    @property
    def windows(self) -> Tensor:
        """The calibration, where there is one."""
        return cast(Tensor, self.shared.windows)


def _factor(
    run: _Run, choices: _Choices
) -> tuple[Placed, Groups, dict[str, tuple[float, float]], list[Step]]:
    """What becomes of every layer, the layers that share a basis, scores, and steps."""
    method, rule, shared, clock = choices.method, choices.rule, run.shared, run.clock
    pivoted, progress = choices.pivoted, choices.progress
    groups = groups_of(method, shared)
    needs = method.needs | rule.needs
    if needs:
        with clock("statistics"), noted(run.notes):
            warn_of_rare(shared.statistics(needs))
    if isinstance(method, RankLearner):
        with clock("training"), noted(run.notes):
            found, history = learn_positions(
                run.model, method, run.targets, shared, run.budget, progress=progress
            )
        return _with_biases(run, _rescaled(run, choices, found)), groups, {}, history
    with clock("decomposition"):
        spectra = shared.spectra(method.components, groups)
    if isinstance(method, TrainedMethod):
        with clock("training"), noted(run.notes):
            folded, scores, history = learn_scores(
                run.model, method, run.targets, spectra, shared, run.budget,
                pivoted=pivoted, progress=progress,
            )  # fmt: skip
        return folded, groups, scores, history
    with clock("ranks"), noted(run.notes):
        ranks = choose_ranks(
            shared, method, rule, groups, spectra, run.budget, pivoted,
            lambda: learn_ranks(
                shared, spectra, run.budget, pivoted=pivoted, progress=progress
            ),
        )  # fmt: skip
    with clock("factors"), noted(run.notes):
        found = make_factors(
            shared, method, groups, spectra, ranks, ratio=run.ratio, pivoted=pivoted
        )
    return _with_biases(run, _rescaled(run, choices, found)), groups, {}, []


def _rescaled(
    run: _Run, choices: _Choices, found: Mapping[str, Factors | None]
) -> Mapping[str, Factors | None]:
    """The factors with their scales updated, if that was asked for."""
    factors = {name: each for name, each in found.items() if each is not None}
    if choices.surgeon is None or not factors:
        return found
    shared = run.shared
    with (
        run.clock("surgeon"),
        noted(run.notes),
        progress_bar(len(run.windows), "surgeon", choices.progress) as bar,
    ):
        targets = {name: shared.targets[name] for name in factors}
        scaled = rescale(
            shared.model, factors, targets, run.windows, shared.objective, choices.surgeon, bar
        )
    return {**found, **scaled}


def _with_biases(run: _Run, found: Mapping[str, Factors | None]) -> Placed:
    return {name: (found[name], bias_of(module)) for name, module in run.targets.items()}


def _refine(
    run: _Run,
    made: Mapping[str, nn.Module],
    redone: Mapping[str, nn.Module],
    settings: Refinement,
    progress: bool | None,
) -> list[Step]:
    """Train the factors that are in the model now; ``redone`` are its dense layers with others."""
    pairs, others = (
        {name: (run.targets[name], layer) for name, layer in layers.items()}
        for layers in (made, redone)
    )
    objective = run.shared.objective
    with steps_bar(settings.steps, progress) as show:
        return refine_factors(
            run.model, pairs, run.windows, objective, settings, show, others=others
        )


def find_method(method: str | Method, seed: int) -> Method:
    """A method by its name, with a seed where it takes one; an instance is returned as it is.

    Raises:
        ValueError: there is no such method.
    """
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
    method: str | Method,
    allocator: str | Allocator | None = None,
    pivoted: bool = False,
    surgeon: bool | SVDSurgeon | None = None,
    refine: bool | Refinement = False,
    **_: object,
) -> frozenset[str]:
    """The calibration statistics that ``compress`` reads for these of its arguments.

    Raises:
        ValueError: there is no such method or allocator, or they do not go together.
    """
    chosen = find_method(method, 0)
    rule = _allocator(allocator, chosen)
    _Choices(chosen, rule, pivoted, _surgeon(surgeon, chosen, 0), _refinement(refine, 0), None)
    return chosen.needs | rule.needs


def reads_text(
    method: str | Method,
    allocator: str | Allocator | None = None,
    surgeon: bool | SVDSurgeon | None = None,
    refine: bool | Refinement | None = False,
    **_: object,
) -> bool:
    """Whether ``compress`` takes calibration text for these of its arguments."""
    chosen = find_method(method, 0)
    rule = _allocator(allocator, chosen)
    trains = isinstance(chosen, TrainedMethod | RankLearner | SequentialMethod)
    probes = rule.name in (*_PROBING, "learned")
    later = _surgeon(surgeon, chosen, 0) is not None or bool(refine)
    return bool(chosen.needs | rule.needs) or trains or probes or later


def _surgeon(surgeon: bool | SVDSurgeon | None, method: Method, seed: int) -> SVDSurgeon | None:
    if surgeon is None:
        own = getattr(method, "surgeon", None)
        return own if isinstance(own, SVDSurgeon) else None
    if isinstance(surgeon, bool):
        return SVDSurgeon(seed=seed) if surgeon else None
    if not isinstance(surgeon, SVDSurgeon):
        raise ValueError(f"surgeon must be True, False or an SVDSurgeon, got {surgeon!r}")
    return surgeon


def _refinement(refine: bool | Refinement, seed: int) -> Refinement | None:
    if isinstance(refine, bool):
        return Refinement(seed=seed) if refine else None
    if not isinstance(refine, Refinement):
        raise ValueError(f"refine must be True, False or a Refinement, got {refine!r}")
    return refine


def _keeps(choices: _Choices) -> bool:
    """Whether statistics or spectra are asked for again after the decomposition."""
    again = isinstance(choices.method, FittedMethod) or bool(choices.rule.needs)
    return again or choices.rule.name in _PROBING


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
        if not (
            _equal(weight_of(other), weight_of(module)) and _equal(bias_of(other), bias_of(module))
        ):
            raise ValueError(
                f"the workbench was prepared for another model: its {name} has other weights"
            )
        found[name] = other
    return found


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))


def _check_whole(shared: Workbench) -> None:
    """Refuse a workbench whose own model has been compressed."""
    modules = dict(shared.model.named_modules(remove_duplicate=False))
    for name, module in shared.targets.items():
        if modules.get(name) is not module:
            raise ValueError(
                f"the model that this workbench was prepared for has changed: {name} is another "
                f"layer now. Prepare a new one, and compress copies of the model"
            )


def _columns(history: list[Step]) -> dict[str, list]:
    """The history as plain JSON: what is not finite, or was not measured, is None."""
    if not history:
        return {}
    columns = {
        "stage": [step.stage for step in history],
        "loss": [_rounded(step.loss) for step in history],
        "divergence": [_rounded(step.divergence) for step in history],
        "kept": [round(step.kept, 4) for step in history],
    }
    if any(step.held_out is not None for step in history):
        columns["held_out"] = [_rounded(step.held_out) for step in history]
    return columns


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)
