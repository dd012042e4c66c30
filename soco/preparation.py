"""What happens before any compression: a model's layers, its calibration text, a workbench."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from soco.calibration import uncalled
from soco.data import positive, token_windows
from soco.experts import experts_split
from soco.guard import unchanged_on_error
from soco.processes import from_first, number
from soco.sampling import sample_from_model
from soco.steps import Step, frozen
from soco.surgery import context_length, find_linears, sequence_length
from soco.workbench import Workbench


def prepare(
    model: nn.Module,
    *,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int = 256,
    length: int | None = None,
    seed: int = 0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    batch_size: int = 8,
    stats: str | PathLike[str] | None = None,
    progress: bool | None = None,
    keep: bool = True,
    drafts: MutableMapping[int, Any] | None = None,
) -> Workbench:
    """Find a model's layers and read the calibration text: what several compressions can share.

    The workbench collects statistics and takes weights apart when it is first asked to, once. Pass
    it to ``soco.compress(copy, ratio, method=..., shared=bench)`` with copies of the model.

    Args:
        model: a dense transformers model; it has to stay as it is. The experts of a mixture become
            layers of their own in it, which compute the same.
        tokenizer: needed where the calibration is text.
        calibration: as in ``soco.compress``; None: no text, which is enough for "svd".
        samples: calibration sequences.
        length: tokens of each; None: what the model allows, at most 2048.
        seed: of the choice of sequences, of "self", and of drawn labels.
        include: glob patterns of the layers to compress, anywhere in the model.
        exclude: glob patterns of layers to leave alone.
        batch_size: sequences at a time in the calibration pass.
        stats: a folder in which statistics are stored, and looked for.
        progress: whether to show progress bars, on stderr; None: if that is a terminal.
        keep: whether decompositions are kept for the next compression, and statistics after them.
        drafts: where text that the model writes is kept batch by batch; None: nowhere.

    Returns:
        The workbench.

    Raises:
        ValueError: the model is quantized, offloaded or has no layers to compress; the text cannot
            be read or is too short; a number is out of range. Then the model is as it was.

    Warns:
        UserWarning: the calibration has less than was asked for, or layers cannot be replaced.
    """
    check_model(model)
    positive("batch_size", batch_size)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a whole number, at least 0, got {seed!r}")
    with experts_split(model):
        with frozen(model):  # or dropout would draw from the caller's random numbers
            targets = _targets(model, include, exclude)
        windows = None
        if calibration is not None:
            with unchanged_on_error(model, targets):  # in evaluation mode, if it is to write text
                windows = calibration_windows(
                    model, calibration, tokenizer, samples, length, seed, progress, drafts
                )
    return Workbench(
        model,
        targets,
        windows,
        batch_size=batch_size,
        seed=seed,
        directory=stats,
        progress=lambda total, title: progress_bar(total, title, progress),
        keep=keep,
        source=calibration_source(calibration, windows, seed),
    )


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be compressed.

    Raises:
        ValueError: it is quantized, compressed, or not in memory.
    """
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
def noted(notes: list[str]) -> Iterator[None]:
    """Pass warnings on when the block is done, and note what they said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        notes.append(str(warning.message))
        warnings.warn(str(warning.message), warning.category, stacklevel=4)


def calibration_windows(
    model: nn.Module,
    calibration: Any,
    tokenizer: Any,
    samples: int,
    length: int | None,
    seed: int,
    progress: bool | None,
    drafts: MutableMapping[int, Any] | None = None,
) -> Tensor:
    """Calibration token ids (samples, length), chosen as ``prepare`` says.

    Raises:
        ValueError: the text cannot be read or is too short, or a number is out of range.
    """
    own = isinstance(calibration, str) and calibration == "self"
    if length is None and isinstance(calibration, Tensor) and calibration.dim() == 2:
        length = calibration.shape[1]
    length = sequence_length(model, length, with_start=own)
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
    positive("samples", samples)
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        start = getattr(model.config, "bos_token_id", None)
    with progress_bar(samples, "sampling from the model", progress) as bar:
        return from_first(
            lambda: sample_from_model(
                model, samples, length, start=start, seed=seed, on_batch=bar, drafts=drafts
            )
        )


def warn_of_rare(seen: Mapping[str, tuple[int, int]]) -> None:
    """Say which layers saw too few tokens for their Gram matrix to have full rank.

    Args:
        seen: layer to the calibration tokens that it saw, and to how many inputs it has.
    """
    unseen = [name for name, (tokens, _) in seen.items() if tokens == 0]
    few = {name: each for name, each in seen.items() if 0 < each[0] < each[1]}
    if unseen:
        warnings.warn(
            f"{len(unseen)} layers saw no calibration token, the first {unseen[0]}: they are "
            f"decomposed without whitening",
            stacklevel=3,
        )
    if few:
        name = min(few, key=lambda name: few[name][0] / few[name][1])
        warnings.warn(
            f"{len(few)} layers saw fewer calibration tokens than they have inputs, {name} "
            f"{few[name][0]} of {few[name][1]}: give more or longer samples",
            stacklevel=3,
        )


def calibration_source(calibration: Any, windows: Tensor | None, seed: int) -> dict[str, Any]:
    """What a report says of the calibration."""
    if windows is None:
        return {}
    source = type(calibration).__name__
    if isinstance(calibration, str | PathLike):
        source = "self" if calibration == "self" else Path(calibration).name
    sequences, length = windows.shape
    return {"source": source, "sequences": sequences, "length": length, "seed": seed}


def hidden(progress: bool | None) -> bool | None:
    """What tqdm calls it: True never shows, None shows on a terminal; one process of several."""
    if number() > 0:
        return True
    return None if progress is None else not progress


@contextmanager
def progress_bar(total: int, title: str, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows after two seconds; call it with how many are done."""
    with tqdm(total=total, desc=title, disable=hidden(progress), delay=2, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        yield show


@contextmanager
def steps_bar(steps: int, progress: bool | None) -> Iterator[Callable[[Step], None]]:
    """A progress bar of a training; call it with every step."""
    with tqdm(total=steps, unit="step", disable=hidden(progress), leave=False) as bar:

        def show(step: Step) -> None:
            bar.set_description(step.stage, refresh=False)
            bar.set_postfix(loss=f"{step.loss:.4f}", kept=f"{step.kept:.1%}", refresh=False)
            bar.update(step.step - bar.n)  # a refinement tells of its start, too

        yield show
