"""What each phase of a compression holds in memory, and what it computes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from soco.assembling import SHARD_BYTES
from soco.calibration import SAMPLED, Statistics
from soco.linalg import workers_for
from soco.methods import (
    FittedMethod,
    RankLearner,
    SequentialMethod,
    SharingMethod,
    TrainedMethod,
)
from soco.planning.learning import refinement, training
from soco.planning.setting import Demand, Passes, Setting, passes_of, spectrum_bytes
from soco.planning.tracing import KEPT, Trace, Work
from soco.ranks import Shape, layer_params
from soco.surgery import transformer_blocks

_SMALL = 160  # columns of the matrices that stand for larger ones of the same proportions


def demands(setting: Setting, *, stream: bool) -> tuple[list[Demand], list[str]]:
    """The phases in their order, and what they leave out."""
    notes: list[str] = []
    passes = passes_of(setting, notes)
    units = _units(setting)
    if isinstance(setting.choices.method, SharingMethod):
        name = setting.choices.method.name
        notes.append(f"layers that share a basis in {name} are counted one by one")
    if stream:
        _note_fits(setting, notes)
        return _streamed(setting, passes, units), notes
    found = [_loading(setting)]
    sums = _sums(setting, passes)
    if setting.choices.needs:
        found.append(_statistics(setting, passes, sums))
    if isinstance(setting.choices.method, RankLearner):
        notes.append(f"the training of {setting.choices.method.name} is not planned")
    else:
        found.append(_decomposition(setting, units, sums))
    method = setting.choices.method
    if isinstance(method, TrainedMethod):
        found += training(setting, method, passes, stream=False)
    _note_fits(setting, notes)
    found.append(_factors(setting, sums))
    if setting.choices.refinement is not None:
        found.append(refinement(setting, setting.choices.refinement, passes))
    return [*found, *_written(setting)], notes


def _note_fits(setting: Setting, notes: list[str]) -> None:
    method = setting.choices.method
    if isinstance(method, SequentialMethod) and method.is_sequential(setting.ratio):
        notes.append(f"the fits of {method.name} behind compressed blocks are not planned")
    if isinstance(method, FittedMethod):
        notes.append(f"the fits of {method.name} at a layer's rank are not planned")


def _loading(setting: Setting) -> Demand:
    """The weights, as they are and in the dtype that is computed in."""
    converted = setting.weights * setting.stored.itemsize // setting.dtype.itemsize
    held = setting.weights + (converted if setting.dtype != setting.stored else 0)
    return Demand("loading", held, Work())


def _sums(setting: Setting, passes: Passes) -> dict[str, tuple[int, int]]:
    """Layer to the bytes of its statistics: those it has with others, and its own.

    A sum that several layers have together is counted with the last of them: it goes when that is
    taken apart.
    """
    needs = setting.choices.needs
    if not needs:
        return {}
    squares = 1 + len(needs & {"root", "stacked_gram"})
    found = {}
    for group in passes.groups:
        for name in group:
            outputs, inputs = setting.shapes[name]
            shared = 8 * squares * inputs**2 if name == group[-1] else 0
            own = 8 * outputs**2 * len(needs & {"grad_gram", "sampled_grad_gram"})
            own += 8 * outputs * inputs * len(needs & {"fisher"})
            found[name] = shared, own
    return {name: found.get(name, (8 * setting.shapes[name][1] ** 2, 0)) for name in setting.shapes}


def _statistics(setting: Setting, passes: Passes, sums: Mapping[str, tuple[int, int]]) -> Demand:
    """All sums, and one batch."""
    needs = setting.choices.needs
    tokens = setting.samples * setting.length
    of_inputs = tokens * sum(shared // 8 for shared, _ in sums.values())
    work = passes.forward.times(setting.batches)
    if passes.curvature.peak:
        share = 1 / SAMPLED if "sampled_grad_gram" in needs else 1.0
        of_inputs += int(share * tokens * sum(own // 8 for _, own in sums.values()))
        work = replace(passes.forward, products={}, cubes=0.0).then(
            passes.curvature.times(setting.batches * share)
        )
        if share < 1:
            work = work.then(passes.forward.times(setting.batches * (1 - share)))
    work = work.then(Work(products={torch.float32: float(of_inputs)}))
    held = setting.weights + sum(map(sum, sums.values()))
    return Demand("statistics", held + work.peak + work.kept, work, [setting.batches * [1.0]])


# Decomposition ------------------------------------------------------------------------------------


def _units(setting: Setting) -> dict[Shape, Work]:
    """Shape to what it takes to take a weight apart; methods that train their own do not."""
    if isinstance(setting.choices.method, RankLearner):
        return {}
    return {shape: _taken_apart(setting, shape) for shape in dict.fromkeys(setting.shapes.values())}


def _taken_apart(setting: Setting, shape: Shape) -> Work:
    """A small matrix of the same proportions taken apart: memory goes with the squares of sides."""
    outputs, inputs = shape
    by = max(1.0, min(shape) / _SMALL)
    small = max(1, round(outputs / by)), max(1, round(inputs / by))
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tokens = max(1, round(min(setting.samples * setting.length, 4 * inputs) / by))
    weight = random(*small).to(setting.dtype)
    sums: dict[str, Tensor] = {}
    x, g = random(tokens, small[1]).double(), random(4 * small[0], small[0]).double()
    made: dict[str, Callable[[], Tensor]] = {
        "gram": lambda: x.mT @ x, "mean": lambda: x.sum(0), "abs_mean": lambda: x.abs().sum(0),
        "stacked_gram": lambda: x.mT @ x, "root": lambda: torch.linalg.cholesky(_safe(x)).mT,
        "fisher": lambda: random(*small).double().square(), "grad_gram": lambda: g.mT @ g,
        "sampled_grad_gram": lambda: g.mT @ g,
    }  # fmt: skip
    for kind in {"gram", *setting.choices.needs}:
        sums[kind] = made[kind]()
    statistics = Statistics(tokens=tokens, sequences=1, **sums)  # type: ignore[arg-type]
    with torch.no_grad(), Trace() as trace:
        means = statistics.means(tokens) if setting.choices.needs else {}
        setting.choices.method.components.spectrum(weight, means, name="weight")
        del means
    return trace.work.scaled(by)


def _safe(x: Tensor) -> Tensor:
    return x.mT @ x + torch.eye(x.shape[1], dtype=x.dtype)


def _decomposition(
    setting: Setting, units: Mapping[Shape, Work], sums: Mapping[str, tuple[int, int]]
) -> Demand:
    """Sums that are left, spectra that are there, and the weights that are being taken apart."""
    longest = max if setting.choices.method.components.needs else min
    sides = [longest(shape) for shape in setting.shapes.values()]
    workers = workers_for(max(sides), len(sides), setting.threads)
    left, there, peak = sum(map(sum, sums.values())), 0, 0
    names = list(setting.shapes)
    work = Work()
    for place, name in enumerate(names):
        running = [units[setting.shapes[n]] for n in names[place : place + workers]]
        peak = max(peak, left + there + sum(each.peak for each in running))
        work = work.then(replace(running[0], peak=0))
        there += spectrum_bytes(setting.shapes[name], setting.dtype)
        if not setting.choices.keeps:
            left -= sum(sums.get(name, (0, 0)))
    work = replace(work, peak=max(peak, left + there), cubes=work.cubes / workers)
    jobs = [setting.shared(setting.shapes)]
    return Demand("decomposition", setting.weights + work.peak + work.kept, work, jobs)


def _factors(setting: Setting, sums: Mapping[str, tuple[int, int]]) -> Demand:
    """Spectra and factors, or factors and layers."""
    spectra = sum(spectrum_bytes(shape, setting.dtype) for shape in setting.shapes.values())
    kept = sum(map(sum, sums.values())) + spectra if setting.choices.keeps else 0
    layers = setting.factors(setting.dtype.itemsize, pivoted=setting.choices.pivoted)
    if isinstance(setting.choices.method, TrainedMethod):
        made = setting.factors(setting.dtype.itemsize)
        spectra = spectra * setting.dtype.itemsize // 4
    else:
        made = setting.factors(4)
    most = max(max(spectra, kept) + made, kept + made + layers)
    small = Work(kept=min(KEPT, made))
    return Demand("factors", setting.weights + most + small.kept, small)


# The result ---------------------------------------------------------------------------------------


def _written(setting: Setting) -> list[Demand]:
    """The compressed model beside what is still mapped of the dense one, and loaded again."""
    layers = setting.factors(setting.dtype.itemsize, pivoted=setting.choices.pivoted)
    held = setting.weights + layers + KEPT
    targets = sum(rows * columns for rows, columns in setting.shapes.values())
    dense = targets - sum(math.prod(setting.shapes[n]) for n in setting.factored)
    outside = setting.weights // setting.dtype.itemsize - targets + dense
    again = outside * setting.dtype.itemsize + layers
    return [
        Demand("writing", held, Work()),
        Demand("checking", held + again, Work()),
    ]


# Block by block -----------------------------------------------------------------------------------


def _streamed(setting: Setting, passes: Passes, units: Mapping[Shape, Work]) -> list[Demand]:
    """The phases of ``soco.compress_folder``, each for the largest block."""
    width = setting.dtype.itemsize
    base = getattr(setting.model, "base_model", setting.model)
    blocks = setting.blocks
    inside = [block.bytes for block in blocks]
    outside = width * sum(p.numel() for p in base.parameters()) - sum(inside)
    sums = _sums(setting, passes)
    largest = max(
        (sum(map(sum, (sums.get(n, (0, 0)) for n in block.names))) for block in blocks), default=0
    )
    reads = bool(setting.choices.needs)
    found = []
    if reads:
        states = 4 * setting.hidden(setting.batch_size)
        work = passes.forward.times(setting.batches)
        tokens = setting.samples * setting.length
        grams = float(tokens * sum(shared // 8 for shared, _ in sums.values()))
        work = work.then(Work(products={torch.float32: grams}))
        held = outside + max(inside, default=0) + largest + states
        peak = held + work.peak
        if passes.single.peak:
            work = passes.curvature.times(setting.batches).then(work)
            head = setting.beside - outside
            to_the_loss = outside + head + states + passes.single.peak  # from the last block on
            peak = max(peak, held + passes.inner.peak, to_the_loss)
        found.append(Demand("statistics", peak + work.kept, work, [setting.batches * [1.0]]))
    work, peak = Work(), 0
    for shape in setting.shapes.values():
        work = work.then(units[shape])
        apart = units[shape].peak + width * math.prod(shape)
        peak = max(peak, apart, 2 * spectrum_bytes(shape, setting.dtype))
    held = (outside if reads else 0) + largest
    work = replace(work, peak=peak)
    jobs = [setting.shared(block.names) for block in blocks]
    found.append(Demand("decomposition", held + peak + work.kept, work, jobs))
    if isinstance(setting.choices.method, TrainedMethod):
        found += training(setting, setting.choices.method, passes, stream=True)
    found.append(Demand("writing", _largest_file(setting), Work()))
    return found


def _largest_file(setting: Setting) -> int:
    """What is in memory while the largest file of a streamed result is written."""
    width = setting.stored.itemsize
    blocks = {id(p) for b in transformer_blocks(setting.model) for p in b.parameters()}
    others = [p.numel() * width for p in setting.model.parameters() if id(p) not in blocks]
    files, held = [0], 0
    for size in others:
        if held + size > SHARD_BYTES and held:
            files.append(0)
            held = 0
        held += size
        files[-1] += size
    wide = max(4, setting.dtype.itemsize)
    largest = max(files) + max(others, default=0)
    factored = set(setting.factored)
    for block in setting.blocks:
        made = [n for n in block.names if n in factored]
        kept = block.bytes // setting.dtype.itemsize - sum(
            math.prod(setting.shapes[n]) for n in made
        )
        pivoted = setting.choices.pivoted
        each = [layer_params(setting.shapes[n], setting.ranks[n], pivoted) for n in made]
        size = width * (kept + sum(each)) + (wide + width) * max(each, default=0)
        largest = max(largest, size)
    return largest + KEPT
