"""From spectra to factors: ranks by an allocator, and what a method does at a given rank."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from soco.allocators import Allocator, Learned, Problem
from soco.linalg import Factors, Spectrum
from soco.methods import Basis, FittedMethod, Method, SequentialMethod, SharingMethod
from soco.modules import LowRankLinear
from soco.processes import number, told
from soco.ranks import Shape, is_dense, layer_params, uniform_ranks
from soco.sequential import Walk, stages
from soco.surgery import bias_of, replace_module, weight_of
from soco.workbench import Groups, Workbench
from soco.workfolder import WorkFolder

Result = dict[str, Factors | None]  # layer to its factors; None: it stays dense


def groups_of(method: Method, shapes: Mapping[str, Shape]) -> Groups:
    """The units that a method takes apart as one: layers, or groups that share a basis."""
    if isinstance(method, SharingMethod):
        return method.groups(shapes, {name: kind_of(name) for name in shapes})
    return [(name,) for name in shapes]


def kind_of(name: str) -> str:
    """A layer's name without numbers: layers of one kind in different blocks have the same.

    >>> kind_of("model.layers.3.mlp.experts.0.up_proj")
    'model.layers.*.mlp.experts.*.up_proj'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def stacked_shapes(shapes: Mapping[str, Shape], groups: Groups) -> dict[str, Shape]:
    """Unit to (out, in), the outputs of all its layers together."""
    return {
        group[0]: (sum(shapes[name][0] for name in group), shapes[group[0]][1]) for group in groups
    }


def choose_ranks(
    bench: Workbench,
    method: Method,
    allocator: Allocator,
    groups: Groups,
    spectra: Mapping[str, Spectrum],
    budget: int,
    pivoted: bool,
    learn: Callable[[], Mapping[str, int]],
) -> dict[str, int]:
    """Unit to rank.

    Units that no calibration token reached have singular values in other units of measure than the
    rest, and say nothing of what they are worth: they get the ranks of a uniform allocation, and
    the allocator shares out what remains.

    Raises:
        ValueError: the allocator gave ranks that do not meet the budget, which is a mistake of it.
    """
    components = method.components
    places = {
        name: i for i, (_, names) in enumerate(stages(bench.model, bench.targets)) for name in names
    }
    shapes = stacked_shapes(bench.shapes, groups)
    unseen = _unseen_ranks(bench, components, allocator, groups, shapes, budget, pivoted)
    budget -= sum(layer_params(shapes[unit], rank, pivoted) for unit, rank in unseen.items())
    groups = [group for group in groups if group[0] not in unseen]
    by_unit = {group[0]: group for group in groups}
    problem = Problem(
        shapes={unit: shapes[unit] for unit in by_unit},
        sigma={unit: spectra[unit].sigma for unit in by_unit},
        budget=budget,
        in_loss=components.in_loss,
        pivoted=pivoted,
        kinds={unit: kind_of(unit) for unit in by_unit},
        blocks={unit: places[unit] for unit in by_unit},
        tokens=max(1, bench.tokens),
        similarity=lambda: bench.similarity(groups),
        probe=lambda unit, rank: bench.probe(components, by_unit[unit], rank),
        learn=learn,
    )
    ranks = allocator.ranks(problem)
    spent = sum(problem.cost(unit, rank) for unit, rank in ranks.items())
    if ranks.keys() != by_unit.keys() or spent > budget or min(ranks.values()) < 1:
        raise ValueError(
            f"allocator {allocator.name} gave {spent:,} parameters to {len(ranks)} units, and must "
            f"give at most {budget:,} to {len(by_unit)}"
        )
    return {unit: {**ranks, **unseen}[unit] for unit in shapes}


def _unseen_ranks(
    bench: Workbench,
    components: Basis,
    allocator: Allocator,
    groups: Groups,
    shapes: Mapping[str, tuple[int, int]],
    budget: int,
    pivoted: bool,
) -> dict[str, int]:
    """The ranks of the units that no token reached; none if that is true of all units.

    A training looks at all units for itself.
    """
    unseen = {group[0] for group in groups if components.needs and bench.saw_nothing(group)}
    if isinstance(allocator, Learned) or not unseen or len(unseen) == len(groups):
        return {}
    uniform = uniform_ranks(shapes, budget, pivoted=pivoted)
    return {unit: rank for unit, rank in uniform.items() if unit in unseen}


def make_factors(
    bench: Workbench,
    method: Method,
    groups: Groups,
    spectra: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    *,
    ratio: float,
    pivoted: bool,
) -> Result:
    """The factors of every layer, each at the rank of its unit.

    Args:
        bench: with the dense model.
        method: a closed form.
        groups: its units.
        spectra: of the units.
        ranks: unit to rank.
        ratio: removed fraction, of which it depends whether a method goes block by block.
        pivoted: of which it depends from what rank on a unit is dense.

    Returns:
        Layer to factors, in the layer's order in the model; in float32 or float64.
    """
    shapes = stacked_shapes(bench.shapes, groups)
    result: Result = dict.fromkeys(bench.targets)
    for group in groups:
        unit = group[0]
        if is_dense(shapes[unit], ranks[unit], pivoted):
            continue
        if isinstance(method, FittedMethod):
            factors = _fitted(bench, method, group, spectra[unit], ranks[unit])
        else:
            factors = spectra[unit].truncate(ranks[unit])
        result.update(bench.split(group, factors))
    if isinstance(method, SequentialMethod) and method.is_sequential(ratio):
        _fit_behind(bench, method, result)
    return result


def _fitted(
    bench: Workbench, method: FittedMethod, group: tuple[str, ...], spectrum: Spectrum, rank: int
) -> Factors:
    """What a method makes of a unit at a rank, or made of it in an earlier run."""
    kept, file = bench.work, _file_of("unit", group)
    if kept is not None and kept.has(file):
        return Factors(*(each.to(spectrum.up.device) for each in kept.get_any(file)))
    factors = method.factor(bench.weight(group), spectrum, rank, bench.means(group[0]))
    if kept is not None and number() == 0:
        kept.put_any(file, [each.detach().cpu().clone() for each in factors])
    return factors


def _fit_behind(bench: Workbench, method: SequentialMethod, result: Result) -> None:
    """Fit the factors block by block to the inputs behind compressed blocks; the model is back.

    Blocks that an earlier run fitted are taken from the work folder.
    """
    model, windows = bench.model, bench.windows
    if windows is None:
        raise ValueError(f"method {method.name} takes calibration text, and there is none")
    unaligned: list[str] = []
    before = {name: model.get_submodule(name) for name in bench.targets}
    parts = stages(model, bench.targets)
    walk = Walk(model, bench.targets, windows, bench.batch_size)

    def weight(name: str) -> Tensor:
        return weight_of(bench.targets[name]).detach()

    def place(name: str, factors: Factors) -> None:
        result[name] = factors
        layer = LowRankLinear.from_factors(
            factors.to(weight(name).dtype), bias_of(bench.targets[name])
        )
        replace_module(model, name, layer)

    kept = bench.work
    known = told([kept is not None and kept.has(_file_of("block", names)) for _, names in parts])
    try:
        with bench._bar(len(parts), "block by block") as bar:
            for done, (block, names) in enumerate(parts, start=1):
                if kept is not None and known[done - 1]:
                    _go_on(kept, names, result, place, unaligned)
                else:
                    earlier = len(unaligned)
                    fits = fitted_block(walk, block, names, method, result.get, weight, unaligned)
                    for name, factors in fits:
                        place(name, factors)
                    if kept is not None and number() == 0:
                        _keep(kept, names, result, unaligned[earlier:])
                bar(done)
    finally:
        _put_back(model, before)
    warn_of_unaligned(unaligned)


def _keep(work: WorkFolder, names: Sequence[str], result: Result, unaligned: Sequence[str]) -> None:
    """Write the factors of a block's layers, and which of them see other tokens than before."""
    found = [
        factors and [*(each.detach().cpu().clone() for each in factors), name in unaligned]
        for name, factors in ((name, result[name]) for name in names)
    ]
    work.put_any(_file_of("block", names), found)


def _go_on(
    work: WorkFolder,
    names: Sequence[str],
    result: Result,
    place: Callable[[str, Factors], None],
    unaligned: list[str],
) -> None:
    """Put into the model what ``_keep`` wrote; what was shared is shared again."""
    for name, found in zip(names, work.get_any(_file_of("block", names)), strict=True):
        plain = result[name]
        if plain is not None:
            up, down = (each.to(plain.up.device) for each in found[:2])
            place(name, Factors(up, plain.down if torch.equal(down, plain.down) else down))
            unaligned += [name] * found[2]


def _file_of(what: str, names: Sequence[str]) -> str:
    """Where factors that were fitted to layers are kept."""
    told = hashlib.sha256(f"{what} {list(names)}".encode()).hexdigest()
    return f"fitted-{told[:24]}.pt"


def fitted_block(
    walk: Walk,
    block: nn.Module,
    names: list[str],
    method: SequentialMethod,
    factors_of: Callable[[str], Factors | None],
    weight: Callable[[str], Tensor],
    unaligned: list[str],
) -> Iterator[tuple[str, Factors]]:
    """The layers of one block with factors that are fitted to what they see.

    Args:
        walk: has gone through all blocks before this one, which have what they will have.
        block: whose layers are dense.
        names: of them.
        method: what fits.
        factors_of: name to factors that are not fitted; None: the layer stays dense.
        weight: name to dense weight (out, in).
        unaligned: layers that see other tokens than in the dense model are added.
    """
    behind = walk.collect(block, names)
    for name in names:
        factors, seen = factors_of(name), behind[name]
        if factors is None:
            continue
        if seen.tokens and not seen.aligned:
            unaligned.append(name)
        if seen.tokens:
            factors = method.refit(
                weight(name), factors, seen.gram, seen.cross, name=f"{name}.weight"
            )
        yield name, factors


def warn_of_unaligned(names: list[str]) -> None:
    """Say which layers see other tokens than in the dense model, if there are any."""
    if names:
        warnings.warn(
            f"{len(names)} layers see other tokens in the compressed model than in the dense one, "
            f"as experts do: they are fitted to their own inputs only ({names[0]} is the first)",
            stacklevel=5,
        )


def _put_back(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if model.get_submodule(name) is not module:
            replace_module(model, name, module)
