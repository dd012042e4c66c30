"""What the commands do once their options are read: check, load, work, write, tell."""

import copy
import json
import math
import shlex
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from soco.checkpoint import CONFIG, export_dense, is_compressed, save
from soco.choices import choose
from soco.cli import demo
from soco.cli.messages import console, quiet_libraries, say, shows_bars
from soco.cli.sources import (
    DEMO,
    check_output,
    check_writable,
    computes_wide,
    find_device,
    find_model,
    find_text,
    open_dense,
    open_model,
    open_tokenizer,
)
from soco.cli.wanted import Compression
from soco.diagnosis import diagnose
from soco.evaluation import Evaluation, small
from soco.evaluation import evaluate as evaluate_model
from soco.folders import SPECTRUM, carry_over
from soco.headers import read_json
from soco.installation import size_of
from soco.methods import Method, SoCo
from soco.pipeline import compress as compress_model
from soco.processes import alone, number
from soco.reporting import Report, format_bytes
from soco.reporting import report as report_of
from soco.resizing import resize as resize_model
from soco.running import blockwise, stored_model
from soco.sizes import parse_bytes
from soco.tasks import check_tasks, evaluate_tasks
from soco.verification import Verification
from soco.verification import verify as verify_model
from soco.workfolder import PLAN, discard


def compress(wanted: Compression) -> None:
    """``soco compress``: from a dense model to a folder with the compressed one.

    With a work folder the same command goes on after it was stopped.
    """
    begin = time.perf_counter()
    find_model(wanted.model)
    folders = wanted.folders()
    for folder in folders.values() or [wanted.output]:
        check_output(folder, replace=True)
    for folder in (wanted.stats, wanted.work):
        if folder is not None:
            check_writable(folder)
    if wanted.size is not None:
        parse_bytes(wanted.size)
    method, work = wanted.chosen_method(wanted.seed), wanted.work
    options = _compress_options(wanted, method)
    device = find_device(wanted.device)
    tell = _say_nothing if wanted.quiet else say
    with quiet_libraries(bars=shows_bars(wanted.quiet)):
        tell(f"loading {wanted.model}")
        model = open_dense(wanted.model, wanted.dtype, device)
        stored, bytes_before = model.dtype, size_of(model)[1]
        if wide := wanted.dtype == "auto" and computes_wide(stored, device, tell):
            nn.Module.float(model)
        needs_tokenizer = options.get("calibration", "self") != "self"
        tokenizer = _tokenizer(wanted.model, needed=needs_tokenizer)
        compared = wanted.model == DEMO and isinstance(method, SoCo) and not folders
        dense = copy.deepcopy(model) if compared else None
        tell(f"compressing by {method.name} on {device}")
        if work is not None and (work / PLAN).is_file():
            tell(f"an earlier run was stopped: going on with what is in {work}")
        try:
            compress_model(
                model, method=method, tokenizer=tokenizer, stored_as=stored, work=work, **options
            )  # fmt: skip
        except KeyboardInterrupt:
            if work is not None:
                tell("stopped: the same command goes on from here")
            raise
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory of {device} is full: try a smaller --batch-size or --length, "
                f"--micro-batch 1, --checkpointing, --dtype bfloat16, --stream or --device cpu"
            ) from error
        if number() > 0:
            return  # the first of several processes writes
        if wide:
            nn.Module.to(model, stored)  # transformers' own refuses what it calls quantized
            held = model.config.quantization_config.report
            held |= {"model_bytes_before": bytes_before, "model_bytes_after": size_of(model)[1]}
        if folders:
            _save_all(model, folders, tokenizer)
        else:
            save(model, wanted.output, tokenizer)
        checks = [
            check_written(folder, wanted.model, options.get("calibration"), tokenizer)
            for folder in folders.values() or [wanted.output]
        ]
        if work is not None:
            discard(work)
        seconds = time.perf_counter() - begin
        out = console()
        out.print(f"{wanted.model}, compressed and written in {seconds:.0f} s", style="bold")
        if not folders:
            out.print(report_of(model).summary(), markup=False)
        for ratio, folder in folders.items():
            out.print(
                f"  {folder}: {_size_in(folder)}, {ratio:g} of the layers removed", markup=False
            )
        tell_checks(checks[0], out)
        if dense is not None:
            if wide:
                nn.Module.float(model)
            with alone():
                rows = demo.compare(dense, model, tokenizer, options, tell)
            demo.show(rows, options["length"], out)
    tell_files(wanted, next(iter(folders.values()), wanted.output), options, out)


def check_written(
    folder: Path, model: str, text: Any, tokenizer: Any, *, stream: bool = False
) -> Verification:
    """Load what was written once more, and run it: the disk may fail, and half precision overflow.

    Args:
        folder: of the compressed model.
        model: the dense one, of which layers are compared where it lies in a folder.
        text: that was learned from, of which the beginning is run; random tokens without.
        tokenizer: of that text.
        stream: whether one block of it has to be in memory at a time.

    Raises:
        ValueError: files or numbers are broken.
    """
    dense = find_model(model)
    options: dict[str, Any] = {"samples": 1, "stream": stream}
    if text is not None and text != "self":
        options |= {"text": text, "tokenizer": tokenizer}
    try:
        found = verify_model(folder, dense if Path(dense).is_dir() else None, **options)
    except ValueError:  # the dense model may be stored in a way that only transformers knows
        found = verify_model(folder, **options)
    if found.broken:
        raise ValueError(f"{folder} was written, and is broken: {found.broken[0]}")
    return found


def tell_checks(found: Verification, out: Console) -> None:
    """One line on what the check of a written model found."""
    told = "files as written, outputs finite"
    errors = [each.output_error for each in found.layers if each.output_error is not None]
    if errors:
        told += f"; of {len(errors)} layers {min(errors):.0%} to {max(errors):.0%} off"
    if found.far:
        told += f", {len(found.far)} of them by as much as without the layer"
    out.print(f"{'checked':<18} {told}", markup=False)


def _size_in(folder: Path) -> str:
    """Parameters and bytes of the compressed model in a folder, for people."""
    held = read_json(folder / CONFIG)["quantization_config"]["report"]
    return f"{held['model_params_after']:,} parameters, {format_bytes(held['model_bytes_after'])}"


def _save_all(model: PreTrainedModel, folders: Mapping[float, Path], tokenizer: Any) -> None:
    """Write every size; the spectrum that others can be made of goes beside the first alone."""
    for place, (ratio, folder) in enumerate(folders.items()):
        save(resize_model(model, ratio), folder, tokenizer, spectrum=not place)


def resize(folder: Path, output: Path, ratio: float | None, size: str | None) -> None:
    """``soco resize``: another size of a model that was compressed for several."""
    _check_compressed(folder)
    check_output(output, replace=True)
    if output.resolve() == folder.resolve():
        raise ValueError(f"{output} is what is read: choose another folder for the output")
    with quiet_libraries(bars=False):
        model = resize_model(folder, ratio, size=size)
        save(model, output, spectrum=False)  # it stays where it is
        carry_over(folder, output)
    print(report_of(model).summary())


def _compress_options(wanted: Compression, method: Method) -> dict[str, Any]:
    """The arguments for ``soco.compress``: those that were given, and what the demo has instead."""
    names = (
        "calibration", "samples", "length", "include", "exclude", "stats", "ratio", "size",
        "allocator", "pivoted", "surgeon", "refine",
    )  # fmt: skip
    options = wanted.given(*names)
    if wanted.ratios is not None:
        options["ratio"] = wanted.ratios
    if wanted.model == DEMO:
        options = {**demo.OPTIONS, **options}
    choices = choose(method, **options)
    text = options.get("calibration")
    if text is None and choices.reads_text:
        raise ValueError(
            f"method {method.name} learns from text: give --calibration FILE, or --calibration "
            f"self for text that the model writes itself"
        )
    if text not in (None, "self"):
        options["calibration"] = find_text(text)
    progress = False if wanted.quiet else None  # None: where stderr is a terminal
    return {
        **options,
        "seed": wanted.seed,
        "batch_size": wanted.batch_size,
        "progress": progress,
    }


def _tokenizer(model: str, *, needed: bool) -> Any:
    """The tokenizer, or None where there is none and it can be done without."""
    try:
        return open_tokenizer(model)
    except ValueError as error:
        if needed:
            raise
        warnings.warn(f"no tokenizer is written beside the model: {error}", stacklevel=2)
        return None


def tell_files(
    wanted: Compression, written: Path, options: Mapping[str, Any], out: Console
) -> None:
    """Where the result is, and what to do with it."""
    files = sorted(path for path in written.iterdir() if path.is_file())
    weights = sum(
        path.stat().st_size
        for path in files
        if path.suffix == ".safetensors" and path.name != SPECTRUM
    )
    names = ", ".join(path.name for path in files)
    folder = shlex.quote(str(written))
    text = "demo" if wanted.model == DEMO else "FILE"
    length = f" --length {options['length']}" if "length" in options else ""
    dense = shlex.quote(wanted.model)
    loading = f"AutoModelForCausalLM.from_pretrained({str(written)!r})"
    out.print(f"\nFiles in {written} ({format_bytes(weights)} of weights)", style="bold")
    out.print(f"  {names}", markup=False)
    out.print("\nWhat to do next", style="bold")
    for line in (
        f"soco report {folder}",
        f"soco evaluate {folder} --text {text}{length} --dense {dense}",
        f"soco export {folder} --dense --output {shlex.quote(f'{written}-dense')}",
    ):
        out.print(f"  {line}", markup=False)
    out.print(f"and in Python, as any model of transformers:\n  model = {loading}", markup=False)


def evaluate(
    model: str,
    text: str | None,
    dense: str | None,
    *,
    tasks: str | None,
    task_options: Mapping[str, Any],
    length: int | None,
    windows: int | None,
    batch_size: int | None,
    dtype: str,
    device: str | None,
    as_json: bool,
    stream: bool,
    quiet: bool,
) -> None:
    """``soco evaluate``: perplexity on a text and the distance to the dense model, and tasks."""
    file = None if text is None else find_text(text)
    for name in (model, dense):
        if name is not None:
            find_model(name)
    place = find_device(device)
    running = {"batch_size": batch_size, "progress": not quiet}
    values: dict[str, Any] = {"model": model, "text": text, "dense": dense}
    told = []
    with quiet_libraries(bars=shows_bars(quiet)), ExitStack() as lent:

        def opened(name: str) -> PreTrainedModel:
            if stream:
                return lent.enter_context(_streamed(name, dtype, place))
            return _opened(name, dtype, place)

        if tasks is not None:
            check_tasks(tasks, data=task_options["data"], num_fewshot=task_options["num_fewshot"])
        small = opened(model)
        large = None if dense is None else opened(dense)
        tokenizer = open_tokenizer(model)
        if file is not None:
            found = evaluate_model(
                small,
                file,
                tokenizer=tokenizer,
                dense=large,
                length=length,
                windows=windows,
                **running,
            )
            values |= found.to_dict()
            told.append(_lines(found))
        if tasks is not None:
            for title, each in (("tasks", small), ("dense_tasks", large)):
                if each is not None:
                    scores = evaluate_tasks(
                        each, tasks, tokenizer=tokenizer, **task_options, **running
                    )
                    values[title] = scores.to_dict()
                    told.append(str(scores) if title == "tasks" else f"dense model\n{scores}")
    if as_json:
        print(json.dumps({k: None if v == math.inf else v for k, v in values.items()}, indent=1))
    else:
        console().print("\n\n".join(told), markup=False)


def _opened(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model to measure: in float32 where its own dtype is slow, and no other was asked for."""
    model = open_model(name, dtype, device)
    if dtype == "auto" and computes_wide(model.dtype, device, _say_nothing):
        nn.Module.float(model)
    return model


def _streamed(
    name: str, dtype: str, device: torch.device
) -> AbstractContextManager[PreTrainedModel]:
    """The same model with one block in memory."""
    folder = find_model(name)
    if not Path(folder).is_dir():
        raise ValueError(f"--stream reads folders, and {name} is none: download it first")
    wanted = stored_model(folder).dtype if dtype == "auto" else getattr(torch, dtype)
    if dtype == "auto" and computes_wide(wanted, device, _say_nothing):
        wanted = torch.float32
    return blockwise(folder, dtype=wanted, device=device)


def _lines(found: Evaluation) -> str:
    """What was measured, one thing a line."""
    windows = f"{found.windows:,} window{'s' if found.windows != 1 else ''}"
    rows = [
        ("perplexity", None if found.perplexity is None else f"{found.perplexity:.4f}"),
        ("KL to dense", None if found.kl is None else f"{small(found.kl)} nats per token"),
        ("same choice", None if found.top1 is None else f"{found.top1:.2%} of first choices"),
        ("distance", None if found.distance is None else f"{found.distance:.4g} of the variance"),
        ("measured on", f"{found.tokens:,} tokens, {windows} of {found.length:,}"),
        ("in", f"{found.dtype}, {found.seconds:.1f} s"),
    ]
    return "\n".join(f"{title:<12} {value}" for title, value in rows if value is not None)


def info(*, as_json: bool) -> None:
    """``soco info``: what is installed, and what is missing."""
    found = diagnose()
    print(json.dumps(asdict(found), indent=1) if as_json else found.render())


def report(folder: Path, plot: Path | None, *, as_json: bool) -> None:
    """``soco report``: what was done to a model, from its folder alone."""
    _check_compressed(folder)
    data = read_json(folder / CONFIG)["quantization_config"].get("report")
    if not isinstance(data, dict):
        raise ValueError(f"{folder} holds no report of how it was compressed")
    found = Report.from_dict(data)
    if plot is not None:
        found.plot(plot)
    print(found.to_json() if as_json else found)


def export(folder: Path, output: Path) -> None:
    """``soco export --dense``: the stock model again, of the original size."""
    _check_compressed(folder)
    check_output(output, replace=False)
    with quiet_libraries(bars=False):
        export_dense(folder, output)
    weights = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output} holds the compressed model in dense form ({format_bytes(weights)} of weights)")


def verify(
    folder: Path, against: str | None, text: str | None, *, as_json: bool, stream: bool
) -> None:
    """``soco verify``: what was found, and exit code 2 if there is a problem."""
    _check_compressed(folder)
    dense = None if against is None else find_model(against)
    if dense is not None and not Path(dense).is_dir():
        raise ValueError(f"--against takes a folder, and {against} is none: download it first")
    with quiet_libraries(bars=False):
        tokenizer = _tokenizer(str(folder), needed=text is not None)
        found = verify_model(
            folder, dense, tokenizer=tokenizer,
            text=None if tokenizer is None else find_text(text or DEMO), stream=stream,
        )  # fmt: skip
    print(json.dumps(found.to_dict(), indent=1) if as_json else found.summary())
    if found.problems:
        first, *others = found.problems
        raise ValueError(f"{folder}: {first}" + (f" and {len(others)} more" if others else ""))


def _check_compressed(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"there is no folder {str(folder)!r}")
    if not is_compressed(folder):
        raise ValueError(f"{folder} is not the folder of a model compressed by soco")


def _say_nothing(text: str) -> None:
    pass
