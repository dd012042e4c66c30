"""``soco decompose``: its options, and the triplets of all layers, a few at a time."""

import time
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from soco.cli.options import (
    DeviceOption,
    ExcludeOption,
    IncludeOption,
    ModelArgument,
    NewFolderOption,
    QuietOption,
    WorkOption,
)


def decompose(
    model: ModelArgument,
    output: NewFolderOption,
    kept: Annotated[
        float, typer.Option(metavar="X", help="Fraction of the components of each layer to write.")
    ] = 1.0,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="exact, randomized, or auto: the quicker of them.")
    ] = "exact",
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    work: WorkOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write the singular triplets of a model's layers; from a folder it is never loaded whole."""
    from soco.cli.messages import quiet_libraries, say, shows_bars
    from soco.cli.shared import one_voice
    from soco.cli.sources import check_writable, find_device, find_model, open_dense
    from soco.decomposition import decompose as take_apart
    from soco.processes import number
    from soco.reporting import format_bytes
    from soco.workfolder import PLAN, work_folder

    place, where = find_model(model), find_device(device)
    check_writable(output)
    beside = work_folder(output, work)
    check_writable(beside)
    with one_voice(), quiet_libraries(bars=False):
        # An id on the hub: the model has to be fetched, and is loaded as it is stored.
        source = place if Path(place).is_dir() else open_dense(model, "auto", where)
        if (beside / PLAN).is_file() and not quiet:
            say(f"an earlier run was stopped: going on with what is in {beside}")
        begin = time.perf_counter()
        try:
            found = take_apart(
                source, output, kept=kept, method=cast(Any, method), include=include,
                exclude=exclude, device=where, progress=shows_bars(quiet), work=work,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not quiet:
                say("stopped: the same command goes on from here")
            raise
        seconds = time.perf_counter() - begin
        if number() > 0:
            return
        held = [layer.energy for layer in found.layers.values()]
        written = sum(path.stat().st_size for path in output.glob("*.safetensors"))
        print(
            f"{output} holds {len(found)} layers ({format_bytes(written)}), with {min(held):.1%} "
            f"to {max(held):.1%} of their energy; it took {seconds:.1f} s"
        )
