"""Any size of a model whose spectrum was learned for several: ``soco.resize``."""

import dataclasses
import time
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from soco.checkpoint import load, mark_compressed
from soco.elastic import ElasticSpectrum
from soco.folders import SPECTRUM
from soco.guard import unchanged_on_error
from soco.installation import bytes_beside, install, layer_reports, new_biases, size_of
from soco.linalg import Factors
from soco.reporting import Report, report
from soco.sizes import params_for_bytes
from soco.surgery import shape_of, without_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def resize(
    model: "PreTrainedModel | str | PathLike[str]",
    ratio: float | None = None,
    *,
    size: int | str | None = None,
    **options: Any,
) -> "PreTrainedModel":
    """Make a compressed model smaller, or larger again, without any data or training.

    The model must have been compressed for several ratios (``soco.compress(model, (0.2, 0.4,
    0.6))``). From these, every size in between is made by interpolating scores and choosing the
    components anew (docs/methods.md says how close that comes). What else was done to the layers
    since, training or adapters that were merged, is lost with them.

    Args:
        model: compressed, in memory, resized in place; or its folder, as ``soco.save`` wrote it.
        ratio: fraction of the layers' parameters to remove, of those of the *dense* model.
        size: instead of a ratio, the bytes that all parameters of the model may take: a number, or
            text such as "4GiB" or "500MB".
        options: for a folder, passed on to ``soco.load``.

    Returns:
        The model, resized: the same object, or the one that was loaded. It can be resized again.

    Raises:
        ValueError: neither or both of ratio and size; a ratio or size outside those that were
            trained for; no spectrum, or one of another model.
    """
    if (ratio is None) == (size is None):
        raise ValueError("give either ratio or size, and not both")
    if isinstance(model, str | PathLike):
        folder = Path(model)
        spectrum = ElasticSpectrum.load(folder / SPECTRUM)
        found = load(folder, **options)
    else:
        if options:
            raise ValueError(f"{next(iter(options))} is for a folder: the model is loaded already")
        found, spectrum = model, spectrum_of(model)
    begin = time.perf_counter()
    _check_same(found, spectrum)
    budget = _budget(found, spectrum, ratio, size)
    with unchanged_on_error(found, {}):
        _put(found, spectrum, budget, ratio, begin)
    return found


def spectrum_of(model: nn.Module) -> ElasticSpectrum:
    """The spectrum that a model in memory was given by ``soco.compress``.

    Raises:
        ValueError: it has none.
    """
    spectrum = getattr(model, "soco_spectrum", None)
    if not isinstance(spectrum, ElasticSpectrum):
        raise ValueError(
            "the model has no spectrum to resize it by: compress it for several ratios, as in "
            "soco.compress(model, (0.2, 0.4, 0.6)), or give the folder it was saved to"
        )
    return spectrum


def _check_same(model: nn.Module, spectrum: ElasticSpectrum) -> None:
    """Refuse a spectrum of another model."""
    modules = dict(model.named_modules())
    for name, layer in spectrum.layers.items():
        module = modules.get(name)
        shape = None if module is None or not hasattr(module, "bias") else shape_of(module)
        if shape != layer.shape:
            raise ValueError(
                f"the spectrum is of another model: its {name} is {layer.shape}, and the model's "
                f"is {shape or 'missing'}"
            )


def _budget(
    model: nn.Module, spectrum: ElasticSpectrum, ratio: float | None, size: int | str | None
) -> int:
    """The parameters that the layers may keep."""
    if ratio is not None:
        return spectrum.budget(ratio)
    layers = {name: model.get_submodule(name) for name in spectrum.layers}
    biased = {name: layer.has_bias for name, layer in spectrum.layers.items()}
    width = next(model.parameters()).element_size()
    return params_for_bytes(
        cast(int | str, size),
        fixed=bytes_beside(model, layers, biased, width),
        shapes=spectrum.shapes,
        width=width,
        pivoted=spectrum.pivoted,
        most=spectrum.budgets[0],
        least=spectrum.budgets[-1],
    )


def _put(
    model: "PreTrainedModel",
    spectrum: ElasticSpectrum,
    budget: int,
    ratio: float | None,
    begin: float,
) -> None:
    """Put the layers of that size into the model, and write down what it is now."""
    old = report(model)
    parameter = next(model.parameters())
    dtype, device = parameter.dtype, parameter.device
    targets, placed = {}, {}
    for name, (weight, bias) in spectrum.at(budget).items():
        layer = spectrum.layers[name]
        own = None if layer.bias is None else layer.bias.to(device)
        targets[name] = without_weight(layer.layout, layer.shape, own, dtype)
        moved: Factors | Tensor
        if isinstance(weight, Factors):
            moved = Factors(weight.up.to(device), weight.down.to(device))
        else:
            moved = weight.to(device, dtype)
        placed[name] = moved, None if bias is None else bias.to(device, dtype)
    groups = [(name,) for name in targets]
    made, _ = install(model, targets, placed, groups, pivoted=spectrum.pivoted)
    after = size_of(model)
    now: Report = dataclasses.replace(
        old,
        ratio=1 - budget / spectrum.total if ratio is None else float(ratio),
        layers=layer_reports(targets, made, groups, {}),
        model_params_after=after[0],
        model_bytes_after=after[1],
        seconds={**old.seconds, "resize": time.perf_counter() - begin},
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    ranks = {name: layer.rank for name, layer in made.items()}
    mark_compressed(model, ranks, now.to_dict(), new_biases(targets, made))
    model.soco_spectrum = spectrum  # type: ignore[assignment]
