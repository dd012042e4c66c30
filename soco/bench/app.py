"""The commands of ``soco-bench`` and their options."""

import contextlib
import enum
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer

from soco.cli.program import Commands, run_program

app = typer.Typer(
    cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Times of low-rank layers, decompositions and whole models, beside what else there is.",
)  # fmt: skip

Shapes = Annotated[str, typer.Option("--shapes", help="Models whose shapes are taken, by commas.")]
Kept = Annotated[str, typer.Option("--kept", help="Fractions of the parameters kept, by commas.")]
Tokens = Annotated[str, typer.Option("--tokens", help="Numbers of tokens, by commas.")]
Dtypes = Annotated[str, typer.Option("--dtypes", help="Dtypes, by commas.")]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; cuda where there is one.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of the CPU.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds of which medians are.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write.")]

WIDTH = 200  # characters of a table that goes into a file
WAYS = "dense,pairs,grouped,soco"


@app.command()
def lowrank(
    shapes: Shapes = "llama-2-7b",
    kept: Kept = "0.5,0.8",
    tokens: Tokens = "1,8,16",
    dtypes: Dtypes = "bfloat16",
    ways: Annotated[
        str,
        typer.Option(
            "--ways",
            help="What is timed, by commas: dense, pairs (two linear layers each), grouped (one "
            "first product for all), compiled (pairs under torch.compile), soco, pivoted (the same "
            "ranks in fewer parameters), int8, float8, 'torch int8', dependent (soco by dependent "
            "launches, on GPUs from sm_90 on).",
        ),
    ] = WAYS,
    device: Device = None,
    threads: Threads = None,
    repeats: Repeats = 31,
    output: Output = None,
) -> None:
    """The low-rank layers of a block, for few tokens."""
    with _record("lowrank", device, threads, output) as bench:
        from soco.bench.lowrank import BASELINE, measure
        from soco.bench.shapes import SHAPES

        names = _chosen(
            ways, "ways",
            (
                "dense", BASELINE, "grouped", "compiled", "soco", "pivoted", "int8", "float8",
                "torch int8", "dependent",
            ),
        )  # fmt: skip
        rows = measure(
            _chosen(shapes, "shapes", SHAPES), _fractions(kept), _counts(tokens, "tokens"),
            _dtypes(dtypes), names, bench.device, bench.roofline(), repeats,
        )  # fmt: skip
        head = ["group", "kept", "dtype", "tokens", *names, "soco over pairs", "of roofline"]
        bench.table(rows, head, lambda row: _lowrank_line(row, names))


def _lowrank_line(row: dict[str, Any], names: list[str]) -> list[str]:
    ways = row["ways"]
    times = [f"{ways[n]['median_us']:.1f}" if n in ways else "-" for n in names]
    ours = ways.get("soco", {})
    ratio = ours.get("times_faster_than", {}).get("pairs")
    return [
        f"{row['shape']} {row['group']}", f"{row['kept']:g}", row["dtype"], str(row["tokens"]),
        *times, "-" if ratio is None else f"{ratio:.2f}x",
        f"{ours['of_roofline']:.0%}" if ours else "-",
    ]  # fmt: skip


@app.command()
def model(
    shapes: Shapes = "llama-3.2-1b",
    kept: Kept = "0.5,0.8",
    ways: Annotated[
        str,
        typer.Option("--ways", help="dense, pairs (two linear layers each), soco, int8, float8."),
    ] = "dense,pairs,soco",
    modes: Annotated[
        str, typer.Option("--modes", help="eager, compiled, graphed (CUDA graphs), by commas.")
    ] = "eager",
    dtypes: Dtypes = "bfloat16",
    blocks: Annotated[
        int | None, typer.Option("--blocks", min=1, help="Of the model; all, if not given.")
    ] = None,
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens.")] = 128,
    generated: Annotated[int, typer.Option("--generated", min=2, help="Tokens.")] = 32,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences.")] = 1,
    device: Device = None,
    threads: Threads = None,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """A whole random model: time to the first token, tokens per second, memory."""
    with _record("model", device, threads, output) as bench:
        from soco.bench.model import measure
        from soco.bench.shapes import SHAPES

        names = _chosen(ways, "ways", ("dense", "pairs", "soco", "int8", "float8"))
        chosen = _chosen(modes, "modes", ("eager", "compiled", "graphed"))
        if "graphed" in chosen and bench.device.type != "cuda":
            raise ValueError("graphed is for CUDA graphs: use eager or compiled on the CPU")
        rows = (
            row
            for shape in _chosen(shapes, "shapes", SHAPES)
            for dtype in _dtypes(dtypes)
            for row in measure(
                shape, min(blocks or SHAPES[shape].blocks, SHAPES[shape].blocks),
                _fractions(kept), names, chosen, dtype, bench.device, prompt, generated, batch,
                repeats,
            )
        )  # fmt: skip
        head = [
            "model", "kept", "mode", "dtype", "first token ms", "prefill tok/s", "ms per token",
            "decode tok/s", "weights MB", "peak MB",
        ]  # fmt: skip
        bench.table(rows, head, _model_line)


def _model_line(row: dict[str, Any]) -> list[str]:
    kept = "-" if row["kept"] is None else f"{row['kept']:g}"
    return [
        f"{row['shape']} {row['model']}", kept, row["mode"], row["dtype"],
        f"{row['time_to_first_token']['median_us'] / 1e3:.1f}",
        f"{row['prefill_tokens_per_s']:.0f}", f"{row['decode_step']['median_us'] / 1e3:.2f}",
        f"{row['decode_tokens_per_s']:.1f}", f"{row['parameter_bytes'] / 1e6:.0f}",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}",
    ]  # fmt: skip


@app.command()
def spectral(
    ranks: Annotated[str, typer.Option("--ranks", help="By commas.")] = "512,2048",
    outputs: Annotated[
        int | None,
        typer.Option("--outputs", min=1, help="Of the layer; as the rank, unless given."),
    ] = None,
    tokens: Tokens = "256,2048",
    dtypes: Dtypes = "float32,bfloat16",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Beside torch.compile, too, which takes a while.")
    ] = False,
    device: Device = None,
    threads: Threads = None,
    repeats: Repeats = 31,
    output: Output = None,
) -> None:
    """Training the scales of components, forward and backward: alone, and in a layer."""
    with _record("spectral", device, threads, output) as bench:
        from soco.bench.training import measure_spectral

        rows = (
            measure_spectral(rank, outputs or rank, count, dtype, bench.device, repeats, compiled)
            for rank in _counts(ranks, "ranks")
            for dtype in _dtypes(dtypes)
            for count in _counts(tokens, "tokens")
        )
        names = [
            f"{what}{how}" for what in ("scaling", "layer")
            for how in ("", ", torch", *([", compiled"] if compiled else []))
        ]  # fmt: skip
        bench.table(
            rows, ["rank", "outputs", "tokens", "dtype", *(f"{name} us" for name in names)],
            lambda row: [
                str(row["rank"]), str(row["outputs"]), str(row["tokens"]), row["dtype"],
                *(f"{row['ways'][name]['median_us']:.1f}" for name in names),
            ],
        )  # fmt: skip


class Spectrum(str, enum.Enum):
    """What the singular values of a matrix to be measured are like."""

    weights = "weights"
    whitened = "whitened"


@app.command()
def svd(
    sizes: Annotated[
        str, typer.Option("--sizes", help="Rows by columns, by commas: 1024x1024,2048x512.")
    ] = "512x512,1024x1024",
    kept: Annotated[
        str, typer.Option("--kept", help="Fractions of the components, by commas.")
    ] = "0.25",
    spectrum: Annotated[
        Spectrum,
        typer.Option(
            "--spectrum", help="Singular values as a weight has them, or over six decades."
        ),
    ] = Spectrum.weights,
    device: Device = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """Truncated singular value decomposition of one matrix."""
    with _record("svd", device, threads, output) as bench:
        from soco.bench.training import measure_svd

        rows = (
            measure_svd(*size, fraction, spectrum.value, bench.device, repeats)
            for size in _sizes(sizes)
            for fraction in _fractions(kept)
        )
        names = [
            "soco exact", "soco randomized", "torch.linalg.svd", "torch.linalg.eigh",
            "torch.svd_lowrank",
        ]  # fmt: skip
        bench.table(
            rows, ["rows", "columns", "rank", *(f"{name} ms (excess)" for name in names)],
            lambda row: [
                str(row["rows"]), str(row["columns"]), str(row["rank"]),
                *(_time_and_excess(row["ways"][name]) for name in names),
            ],
        )  # fmt: skip


@app.command()
def batched_svd(
    sizes: Annotated[str, typer.Option("--sizes", help="Rows and columns, by commas.")] = "16,64",
    batches: Annotated[str, typer.Option("--batches", help="Matrices, by commas.")] = "1,64",
    dtypes: Dtypes = "float32",
    device: Device = None,
    threads: Threads = None,
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """Singular value decompositions of many small matrices at once."""
    with _record("batched-svd", device, threads, output) as bench:
        from soco.bench.training import measure_batched_svd

        rows = (
            measure_batched_svd(side, batch, dtype, bench.device, repeats)
            for side in _counts(sizes, "sizes")
            for dtype in _dtypes(dtypes)
            for batch in _counts(batches, "batches")
        )
        names = ["soco", "torch.linalg.svd"]
        bench.table(
            rows, ["side", "batch", "dtype", *(f"{name} ms (error)" for name in names), "faster"],
            lambda row: [
                str(row["side"]), str(row["batch"]), row["dtype"],
                *(
                    f"{row['ways'][name]['median_us'] / 1e3:.2f} ({row['ways'][name]['error']:.0e})"
                    for name in names
                ),
                f"{row['times_faster_than_torch']:.2f}x",
            ],
        )  # fmt: skip


def _time_and_excess(way: dict[str, float]) -> str:
    return f"{way['median_us'] / 1e3:.1f} ({way['excess']:.1e})"


class _Bench:
    """One run: where it is measured, the rows it has, and what is written in the end."""

    def __init__(self, kind: str, device: str | None, threads: int | None) -> None:
        import torch

        from soco.cli.sources import find_device

        if threads is not None:
            torch.set_num_threads(threads)
        self.kind, self.device = kind, torch.device(find_device(device))
        self.rows: list[dict[str, Any]] = []
        self.rate: float | None = None

    def roofline(self) -> float:
        """GB/s at which this machine reads, measured now."""
        from soco.bench.timing import read_rate

        self.rate = round(read_rate(self.device), 2)
        return self.rate

    def table(self, rows: Iterable[dict[str, Any]], head: list[str], line: Any) -> None:
        """Measure the rows with the table growing on the way, and print it."""
        from rich.live import Live
        from rich.table import Table

        from soco.cli.messages import console

        table = Table(box=None, pad_edge=False)
        for index, name in enumerate(head):
            table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
        out = console()
        shows = out.is_terminal
        if not shows:
            out.width = WIDTH
        with (
            Live(table, console=out, auto_refresh=False)
            if shows
            else contextlib.nullcontext() as live
        ):
            for row in rows:
                self.rows.append(row)
                table.add_row(*line(row))
                if live is not None:
                    live.refresh()
        if not shows:
            out.print(table)
        if self.rate is not None:
            out.print(
                f"Times in microseconds, medians; memory is read at {self.rate:.1f} GB/s here."
            )

    def record(self) -> dict[str, Any]:
        """The run as plain JSON data."""
        from soco.diagnosis import commit_of, describe_machine

        return {
            "kind": self.kind,
            "machine": {**describe_machine(str(self.device)), **_clocks(self.device.type)},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit_of(Path(__file__).parents[2]),
            "command": shlex.join(["soco-bench", *_without_paths(sys.argv[1:])]),
            "read_gb_s": self.rate,
            "rows": self.rows,
        }


@contextlib.contextmanager
def _record(
    kind: str, device: str | None, threads: int | None, output: Path | None
) -> Iterator[_Bench]:
    """Inside, a run is measured; behind it, its record is written."""
    from soco.cli.messages import quiet_libraries

    with quiet_libraries(bars=False):
        if output is not None:
            _check_file(output)
        bench = _Bench(kind, device, threads)
        yield bench
        if output is not None:
            beside = output.with_name(f".{output.name}.{os.getpid()}")
            beside.write_text(json.dumps(bench.record(), indent=1) + "\n", encoding="utf-8")
            beside.replace(output)


def _check_file(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be written in the end."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and should be a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: {path.parent} is not a folder to write in")


def _chosen(text: str, option: str, known: Iterable[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(f"--{option} knows {', '.join(known)}, got {name!r}")
    if not names:
        raise ValueError(f"--{option} is empty: choose of {', '.join(known)}")
    return names


def _counts(text: str, option: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise ValueError(f"--{option} takes positive whole numbers by commas, got {text!r}")
    return found


def _fractions(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < value < 1 for value in found):
        raise ValueError(f"--kept takes numbers between 0 and 1 by commas, got {text!r}")
    return found


def _dtypes(text: str) -> list[Any]:
    import torch

    names = _chosen(text, "dtypes", ("float32", "float64", "bfloat16", "float16"))
    return [getattr(torch, name) for name in names]


def _sizes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        rows, _, columns = part.partition("x")
        if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
            raise ValueError(f"--sizes takes sizes like 1024x512 by commas, got {part!r}")
        found.append((int(rows), int(columns)))
    return found


def _without_paths(arguments: list[str]) -> list[str]:
    """The arguments with files by name: a record does not say where a machine keeps them."""
    return [Path(text).name if os.sep in text else text for text in arguments]


def _clocks(kind: str) -> dict[str, Any]:
    """The clocks seen at the end of the run."""
    if kind == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            found = subprocess.run(query, capture_output=True, text=True, check=True)
            return {"clocks": found.stdout.strip().splitlines()[:1]}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {"mhz": [float(x.split(":")[1]) for x in lines if x.startswith("cpu MHz")]}
    return {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``soco-bench``; see ``run_program``."""
    return run_program(app, "soco-bench", arguments)
