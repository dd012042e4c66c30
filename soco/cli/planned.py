"""``soco plan``: what a compression takes, before it begins."""

import json
from pathlib import Path

import torch
from rich.table import Table

from soco.cli import demo
from soco.cli.messages import console, quiet_libraries, say
from soco.cli.sources import DEMO, computes_wide, find_model
from soco.cli.wanted import Wanted
from soco.planning import Plan, duration, plan
from soco.reporting import format_bytes
from soco.stored import empty_model


def show(wanted: Wanted, *, gpus: int, as_json: bool) -> None:
    """Plan, and print it."""
    place = find_model(wanted.model)
    if not Path(place).is_dir():
        raise ValueError(f"a plan is made from a folder with config.json: {place} is none")
    method = wanted.chosen_method()
    names = (
        "ratio", "samples", "length", "include", "exclude", "allocator", "pivoted", "refine",
        "surgeon",
    )  # fmt: skip
    options = wanted.given(*names)
    if wanted.model == DEMO:
        sizes = {name: demo.OPTIONS[name] for name in ("samples", "length")}
        options = {**sizes, **options}
    say("planning: this CPU is measured, and the model runs without values")
    with quiet_libraries(bars=False):
        dtype = None if wanted.dtype == "auto" else getattr(torch, wanted.dtype)
        if dtype is None:
            _, stored = empty_model(Path(place), {}, lambda: torch.float32)
            if computes_wide(stored, torch.device("cpu"), say):
                dtype = torch.float32
        found = plan(
            place, method=method, stream=wanted.stream, batch_size=wanted.batch_size, dtype=dtype,
            gpus=gpus, **options,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"model": wanted.model, **found.to_dict()}, indent=1))
        return
    _print(wanted.model, found)


def _print(model: str, found: Plan) -> None:
    out = console()
    how = "block by block, " if found.stream else ""
    title = f"{model} by {found.method}, {how}in {found.dtype}: a plan, nothing was computed"
    out.print(title, style="bold", markup=False)
    out.print(found.summary(), markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    many = [f"{found.gpus} GPUs"] if found.gpus > 1 else []
    for column in ("memory", "this CPU", "one GPU", *many):
        table.add_column(column, justify="right")
    for each in (*found.phases, found):
        times = [each.cpu_seconds, each.gpu_seconds, each.gpus_seconds][: 2 + len(many)]
        told = [duration(time) if time else "-" for time in times]
        name, style = ("together", "bold") if isinstance(each, Plan) else (each.name, None)
        table.add_row(name, format_bytes(each.peak_bytes), *told, style=style)
    out.print()
    out.print(table)
    threads = f"{found.threads} thread{'s' if found.threads != 1 else ''}"
    waiting = (
        "that they wait for each other is not planned" if many else "--gpus N plans for N GPUs"
    )
    lines = (
        f"memory: resident memory of a process on the CPU; times: of {threads}, by what this CPU "
        f"multiplied and decomposed in a second just now",
        "the GPU's times were never measured: they assume about half of what the maker of an H100 "
        "states, and a guess at eigendecompositions",
        "several processes (torchrun) share calibration, decompositions and training; each takes "
        f"this memory; {waiting}",
        "times leave out reading, writing and small operations, and other work on the machine "
        "slowed down what was measured just now; runs of small models took 0.6 to 10 times as long "
        "(docs/reliability.md)",
        *found.notes,
    )
    for line in lines:
        out.print(f"  {line}", markup=False)
