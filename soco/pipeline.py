"""The way from a dense model to a compressed one: ``soco.compress``."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from soco.allocators import Allocator
from soco.checkpoint import mark_compressed
from soco.choices import Choices, choose
from soco.diagnosis import versions
from soco.elastic import ElasticSpectrum, elastic_spectrum
from soco.experts import experts_split, join_experts
from soco.factorization import choose_ranks, groups_of, make_factors
from soco.guard import Clock, unchanged_on_error
from soco.installation import (
    Placed,
    bytes_beside,
    install,
    layer_reports,
    new_biases,
    size_of,
)
from soco.learning import learn_positions, learn_ranks, learn_scores
from soco.linalg import Factors
from soco.memory import give_back_memory
from soco.methods import (
    Method,
    RankLearner,
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
from soco.processes import check_same
from soco.ranks import check_ratio, parameter_budget
from soco.refinement import Refinement
from soco.refinement import refine as refine_factors
from soco.reporting import Report, history_columns
from soco.resuming import drafts, going_on, keeper, own_text, patterns, resumable
from soco.sizes import params_for_bytes, parse_bytes
from soco.stages import TrainingSettings
from soco.steps import Step
from soco.surgeon import SVDSurgeon, rescale
from soco.surgery import bias_of, fused_experts, is_linear, shape_of, weight_of
from soco.workbench import Groups, Workbench
from soco.workfolder import WorkFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ModelType = TypeVar("ModelType", bound=nn.Module)


def compress(
    model: ModelType,
    ratio: float | Sequence[float] = 0.5,
    *,
    size: int | str | None = None,
    stored_as: torch.dtype | None = None,
    method: str | Method = "soco",
    effort: str | None = None,
    preset: str | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    allocator: str | Allocator | None = None,
    pivoted: bool | None = None,
    surgeon: bool | SVDSurgeon | None = None,
    refine: bool | Refinement | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 8,
    stats: str | PathLike[str] | None = None,
    shared: Workbench | None = None,
    work: str | PathLike[str] | None = None,
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
            within one rank of one layer, and never missed by removing less. Several of them (for
            method "soco"): one training for all sizes from the smallest ratio to the largest
            (``TrainingSettings.spacing`` says how close the ratios in between are that it is
            trained for as well); the model has the smallest, and ``soco.resize`` makes the others.
        size: instead of a ratio, the bytes that all parameters of the model may take: a number, or
            text such as "4GiB" or "500MB".
        stored_as: the dtype that ``size`` counts, where the model will be stored in another one
            than it has now.
        method: a name in ``soco.methods.METHODS``, or an instance such as ``SoCo(steps=400)``.
        effort: of method "soco": "fast", "balanced" (as without it) or "best", which trains all
            factors (``soco.methods.SoCo.preset``).
        preset: of method "soco": "paper", as near to the published method as is known.
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
            layer in ``rank^2`` fewer parameters, so that more rank fits into the budget; None: as
            the method has it ("soco" does).
        surgeon: after the truncation, scale the components that stay so that they make up for those
            that went (``soco.surgeon``): True, or an ``SVDSurgeon``; None: as the method has it.
        refine: at the end, train all factors together to give what the dense model gives, stopped
            early by held-out text (``soco.refinement``): True, or a ``Refinement``; None: as the
            method has it ("soco" with effort "best" does).
        include: glob patterns of the layers to compress, anywhere in the model.
        exclude: glob patterns of layers to leave alone.
        batch_size: sequences at a time in the calibration pass.
        stats: a folder in which calibration statistics are stored, and looked for: by model, data
            and seed.
        shared: a workbench made by ``prepare`` for this model or one with the same weights, whose
            statistics and decompositions are used; calibration, samples, length, include, exclude,
            batch_size and stats are then its own.
        work: a folder in which statistics, decompositions and every minute the state of a training
            are kept: after a crash, a kill or Ctrl-C the same call goes on from there, and ends
            with the same weights. It stays: delete it once the model is saved. None: nowhere.
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
    choices = choose(
        method, allocator, effort=effort, preset=preset, pivoted=pivoted, surgeon=surgeon,
        refine=refine, seed=seed,
    )  # fmt: skip
    chosen = choices.method
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    ratios = _ratios(ratio, size, choices)
    check_model(model)
    reads = choices.reads_text
    if reads and (calibration is None if shared is None else shared.windows is None):
        raise ValueError(
            f"method {chosen.name} learns from text: give calibration=, a path or token ids, or "
            f'"self" for text that the model writes itself'
        )
    if shared is not None:
        if work is not None:
            raise ValueError("give either shared or work: a workbench lives in memory")
        _check_whole(shared)
    plan = {
        "method": chosen.name,
        "settings": choices.settings(),
        "ratios": list(ratios),
        "size": size,
        "stored_as": str(stored_as),
        "layers": {"include": patterns(include), "exclude": patterns(exclude)},
        "calibration": {"samples": samples, "length": length, "seed": seed, "batch": batch_size},
    }
    clock = Clock(next(model.parameters()).device)
    before = size_of(model)
    alone = shared is None
    notes: list[str] = []
    with resumable(work, model, plan) as kept, experts_split(model) as fused:
        if fused and len(ratios) > 1:
            raise ValueError(
                f"{type(model).__name__} has fused experts, which soco.resize cannot change yet: "
                f"compress it for one ratio"
            )
        if shared is None:
            with clock("calibration text"), noted(notes):
                found = own_text(kept)
                shared = prepare(
                    model,
                    tokenizer=tokenizer,
                    calibration=calibration if reads and found is None else None,
                    samples=samples,
                    length=length,
                    seed=seed,
                    include=include,
                    exclude=exclude,
                    batch_size=batch_size,
                    stats=stats,
                    progress=progress,
                    keep=choices.keeps,
                    drafts=drafts(kept),
                )
                own = isinstance(calibration, str) and calibration == "self"
                going_on(shared, kept, found, writes=own)
        targets = _counterparts(model, shared)
        stored_as = stored_as or next(model.parameters()).dtype
        ratios, budgets = _budgets(model, targets, shared, ratios, size, stored_as, choices)
        with unchanged_on_error(shared.model, shared.targets), unchanged_on_error(model, targets):
            run = _Run(model, targets, shared, ratios, budgets, clock, notes, progress, kept)
            placed, groups, scores, history, spectrum = _factor(run, choices)
            written = _written(run, choices.refinement)  # the model is still the dense one
            made, redone = install(model, targets, placed, groups, pivoted=choices.pivoted)
            del placed
            give_back_memory()
            if choices.refinement is not None and made:
                if alone:
                    shared.forget()
                with clock("refinement"), noted(notes):
                    history += _refine(run, made, redone, choices.refinement, written)
            join_experts(model, fused)
            layers = layer_reports(targets, made, groups, scores)
            after, peak = size_of(model), clock.peak()
            outcome = Report(
                method=chosen.name,
                ratio=run.ratio,
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
                history=history_columns(history),
                versions=versions(),
                date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            ranks = {name: layer.rank for name, layer in made.items()}
            check_same(ranks, "the ranks of the layers")
            biases = new_biases(targets, made)
            mark_compressed(cast("PreTrainedModel", model), ranks, outcome.to_dict(), biases)
            if spectrum is not None:
                model.soco_spectrum = spectrum  # type: ignore[assignment]
    return model


@dataclasses.dataclass
class _Run:
    """One compression under way."""

    model: nn.Module
    targets: Mapping[str, nn.Module]
    shared: Workbench
    ratios: tuple[float, ...]  # one, or several in one training, ascending
    budgets: tuple[int, ...]  # parameters that may be kept at each
    clock: Clock
    notes: list[str]
    progress: bool | None
    kept: WorkFolder | None  # where it is kept what was done

    @property
    def ratio(self) -> float:
        """Of the size that the model gets."""
        return self.ratios[0]

    @property
    def budget(self) -> int:
        """Of the size that the model gets."""
        return self.budgets[0]

    @property
    def windows(self) -> Tensor:
        """The calibration, where there is one."""
        return cast(Tensor, self.shared.windows)


def _factor(
    run: _Run, choices: Choices
) -> tuple[Placed, Groups, dict[str, tuple[float, float]], list[Step], ElasticSpectrum | None]:
    """What becomes of every layer, those that share a basis, scores, steps, other sizes."""
    method, rule, shared, clock = choices.method, choices.rule, run.shared, run.clock
    pivoted, progress = choices.pivoted, run.progress
    groups = groups_of(method, shared.shapes)
    if needs := choices.needs:
        with clock("statistics"), noted(run.notes):
            collected = shared.statistics(needs)
            warn_of_rare({name: (each.tokens, len(each.gram)) for name, each in collected.items()})
    if isinstance(method, RankLearner):
        with clock("training"), noted(run.notes):
            found, history = learn_positions(
                run.model, method, run.targets, shared, run.budget, progress=progress,
                keep=lambda name: keeper(run.kept, name),
            )  # fmt: skip
        return _with_biases(run, _rescaled(run, choices, found)), groups, {}, history, None
    with clock("decomposition"):
        spectra = shared.spectra(method.components, groups)
    if isinstance(method, TrainedMethod):
        later = choices.refinement
        written = _written(run, method.settings())
        with clock("training"), noted(run.notes):
            learned = learn_scores(
                run.model, method, run.targets, spectra, shared, run.budgets,
                pivoted=pivoted, progress=progress, written=written,
                held_out=later.held_out_of(len(run.windows)) if later else 0,
                keeper=keeper(run.kept, "training"),
            )  # fmt: skip
        spectrum = None
        if len(run.budgets) > 1:
            spectrum = elastic_spectrum(
                run.ratios, run.budgets, run.targets, learned.layers, learned.snapshots,
                pivoted=pivoted,
            )  # fmt: skip
            learned.go_back(0)
        folded = learned.folded()
        found = {n: each if isinstance(each, Factors) else None for n, (each, _) in folded.items()}
        rescaled = _rescaled(run, choices, found)
        placed = {n: (rescaled[n] or each, bias) for n, (each, bias) in folded.items()}
        return placed, groups, learned.ranges(), learned.history, spectrum
    with clock("ranks"), noted(run.notes):
        ranks = choose_ranks(
            shared, method, rule, groups, spectra, run.budget, pivoted,
            lambda: learn_ranks(
                shared, spectra, run.budget, pivoted=pivoted, progress=progress,
                keeper=keeper(run.kept, "ranks"),
            ),
        )  # fmt: skip
    with clock("factors"), noted(run.notes):
        found = make_factors(
            shared, method, groups, spectra, ranks, ratio=run.ratio, pivoted=pivoted
        )
    return _with_biases(run, _rescaled(run, choices, found)), groups, {}, [], None


def _ratios(
    ratio: float | Sequence[float], size: int | str | None, choices: Choices
) -> tuple[float, ...]:
    """The ratios that are trained for, ascending; none where a size in bytes was asked for."""
    several = isinstance(ratio, Sequence) and not isinstance(ratio, str)
    if size is not None:
        parse_bytes(size)
        if ratio != 0.5:
            raise ValueError("give either ratio or size, and not both")
        return ()
    ratios = tuple(cast(Sequence[float], ratio)) if several else (ratio,)
    for each in ratios:
        check_ratio(cast(float, each))
    if not ratios or len(set(ratios)) < len(ratios):
        raise ValueError(f"ratios must be one or more different numbers, got {list(ratios)}")
    if len(ratios) > 1 and not isinstance(choices.method, TrainedMethod):
        raise ValueError(
            f"several ratios in one run are for method soco: call {choices.method.name} once for "
            f"each"
        )
    if len(ratios) > 1 and (choices.refinement is not None or choices.surgeon is not None):
        name = "refine" if choices.refinement is not None else "surgeon"
        raise ValueError(
            f"{name} changes the factors of one size, which the others do not share: leave it out, "
            f"or compress for one ratio"
        )
    ordered = sorted(float(cast(float, each)) for each in ratios)
    if isinstance(choices.method, TrainedMethod):
        return choices.method.settings().stations(ordered)
    return tuple(ordered)


def _budgets(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    shared: Workbench,
    ratios: tuple[float, ...],
    size: int | str | None,
    stored_as: torch.dtype,
    choices: Choices,
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Ratios, and the parameters that may be kept at each."""
    if size is None:
        return ratios, tuple(parameter_budget(shared.shapes, ratio) for ratio in ratios)
    total = sum(rows * columns for rows, columns in shared.shapes.values())
    width = stored_as.itemsize
    adds = getattr(choices.method, "deviation", "none") != "none"
    biased = {name: adds or bias_of(layer) is not None for name, layer in targets.items()}
    budget = params_for_bytes(
        size,
        fixed=bytes_beside(model, targets, biased, width),
        shapes=shared.shapes,
        width=width,
        pivoted=choices.pivoted,
    )
    return (1 - budget / total,), (budget,)


def _rescaled(
    run: _Run, choices: Choices, found: Mapping[str, Factors | None]
) -> Mapping[str, Factors | None]:
    """The factors with their scales updated, if that was asked for."""
    # In the layout that they have in a file: products with another one have other last bits.
    factors = {name: each.contiguous() for name, each in found.items() if each is not None}
    if choices.surgeon is None or not factors:
        return found
    shared = run.shared
    with (
        run.clock("surgeon"),
        noted(run.notes),
        progress_bar(len(run.windows), "surgeon", run.progress) as bar,
    ):
        targets = {name: shared.targets[name] for name in factors}
        scaled = rescale(
            shared.model, factors, targets, run.windows, shared.objective, choices.surgeon, bar,
            keeper(run.kept, "surgeon"),
        )  # fmt: skip
    return {**found, **scaled}


def _with_biases(run: _Run, found: Mapping[str, Factors | None]) -> Placed:
    return {name: (found[name], bias_of(module)) for name, module in run.targets.items()}


def _written(run: _Run, settings: TrainingSettings | Refinement | None) -> Tensor | None:
    """Sequences of the dense model's own to be trained on, where they are wanted; while it is."""
    if settings is None or not settings.written or not run.shared.writes:
        return None
    with run.clock("written text"):
        return run.shared.written(settings.written, settings.seed)


def _refine(
    run: _Run,
    made: Mapping[str, nn.Module],
    redone: Mapping[str, nn.Module],
    settings: Refinement,
    written: Tensor | None,
) -> list[Step]:
    """Train the factors that are in the model now; ``redone`` are its dense layers with others."""
    pairs, others = (
        {name: (run.targets[name], layer) for name, layer in layers.items()}
        for layers in (made, redone)
    )
    objective = run.shared.objective
    with steps_bar(settings.steps, run.progress) as show:
        return refine_factors(
            run.model, pairs, run.windows, objective, settings, show, others=others,
            written=written, keeper=keeper(run.kept, "refinement"),
        )  # fmt: skip


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
