"""``soco compress --stream``: from folder to folder, without the model in memory."""

import time
from pathlib import Path

import torch

from soco.choices import choose
from soco.cli.commands import check_written, tell_checks, tell_files
from soco.cli.messages import console, quiet_libraries, say
from soco.cli.sources import (
    check_output,
    check_writable,
    computes_wide,
    find_device,
    find_model,
    find_text,
    open_tokenizer,
)
from soco.cli.wanted import Compression
from soco.processes import number
from soco.stored import StoredModel
from soco.streaming import compress_folder
from soco.workfolder import PLAN, work_folder

# Options of `soco compress` that need what streaming has not.
_WHOLE = ("ratios", "size", "refine", "surgeon", "stats")


def compress(wanted: Compression) -> None:
    """Compress block by block; the same command goes on after it was stopped."""
    begin = time.perf_counter()
    for name in _WHOLE:
        if getattr(wanted, name):
            raise ValueError(f"--{name} needs the whole model in memory: leave out --stream")
    method = wanted.chosen_method(wanted.seed)
    place = find_model(wanted.model)
    if not Path(place).is_dir():
        raise ValueError(f"--stream reads a folder, and {wanted.model} is none: download it first")
    check_output(wanted.output, replace=True)
    kept = work_folder(wanted.output, wanted.work)
    check_writable(kept)
    device = find_device(wanted.device)
    tell = (lambda text: None) if wanted.quiet else say
    names = ("ratio", "samples", "length", "include", "exclude", "allocator", "pivoted")
    options = wanted.given(*names)
    with quiet_libraries(bars=False):
        dtype = StoredModel(place).dtype
        if wanted.dtype != "auto":
            dtype = getattr(torch, wanted.dtype)
        elif computes_wide(dtype, device, tell):
            dtype = torch.float32
        tokenizer, text = None, wanted.calibration
        if text is not None and text != "self":
            text, tokenizer = find_text(text), open_tokenizer(wanted.model)
        elif text is None and choose(method, **options).reads_text:
            raise ValueError(f"method {method.name} learns from text: give --calibration FILE")
        options["calibration"] = text
        tell(f"compressing block by block by {method.name} on {device}")
        if (kept / PLAN).is_file():
            tell(f"an earlier run was stopped: going on with what is in {kept}")
        try:
            report = compress_folder(
                place, wanted.output, method=method, tokenizer=tokenizer, seed=wanted.seed,
                batch_size=wanted.batch_size, dtype=dtype, device=device, work=wanted.work,
                progress=False if wanted.quiet else None, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            tell("stopped: the same command goes on from here")
            raise
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the memory of {device} is full: try a smaller --batch-size or --length, "
                f"--micro-batch 1 with method soco, --dtype bfloat16 or --device cpu"
            ) from error
        if number() > 0:
            return
        tell("looking at what was written")
        checked = check_written(wanted.output, place, text, tokenizer, stream=True)
    out = console()
    seconds = time.perf_counter() - begin
    out.print(f"{wanted.model}, compressed and written in {seconds:.0f} s", style="bold")
    out.print(report.summary(), markup=False)
    tell_checks(checked, out)
    tell_files(wanted, wanted.output, options, out)
