"""What ``soco plan`` says of memory, beside what compressions of random Llamas take.

    python benchmarks/planning.py --output benchmarks/results/planning.json
    python benchmarks/planning.py --only soco-streamed \
        --output benchmarks/results/planning-soco.json
    python benchmarks/planning.py --experts --output benchmarks/results/planning-experts.json

Every compression is a process of its own. Its peak of resident memory is written down phase by
phase (VmHWM, mapped files among it, counted anew at the beginning of each), and is compared with
what was planned from the model's config.json alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from protocol import write_record
from streaming import VOCABULARY, make

from soco.memory import peak_memory, reset_peak


class Phases:
    """The peak of resident memory in each phase."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Inside, the peak is counted anew, and is that of a phase."""
        self.peaks["other"] = max(self.peaks.get("other", 0), peak_memory())
        reset_peak()
        try:
            yield
        finally:
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak_memory())
            reset_peak()

    def watch(self, owner: Any, name: str, phase: str) -> None:
        """Count whenever a function is called."""
        function: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            with self(phase):
                return function(*args, **options)

        setattr(owner, name, watched)


def once(folder: Path, output: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What this process needs for a compression."""
    import soco
    from soco import chain, dismantling, guard, scoring, streaming
    from soco.cli.sources import open_dense

    torch.set_num_threads(case["threads"])
    _ = soco.compress, soco.save, soco.compress_folder, soco.verify  # imports them
    phases = Phases()
    before = peak_memory()
    ids = torch.randint(
        0, VOCABULARY, (case["samples"], case["length"]),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    options: dict[str, Any] = {
        "calibration": ids, "samples": len(ids), "batch_size": case["batch_size"],
        "progress": False,
    }  # fmt: skip
    begin = time.perf_counter()
    if case["stream"]:
        for name in ("statistics", "pass_on", "turn", "back"):
            phases.watch(chain.Chain, name, "statistics")
        phases.watch(dismantling.Dismantling, "_take_apart", "decomposition")
        phases.watch(streaming._Run, "write", "writing")
        phases.watch(streaming.Workbench, "written", "written text")
        phases.watch(scoring, "learn_scores", "training")
        soco.compress_folder(folder, output, 0.5, method=_method(case), **options)
    else:
        of_clock = guard.Clock.__call__

        @contextmanager
        def clocked(self: guard.Clock, phase: str) -> Iterator[None]:
            with phases(phase), of_clock(self, phase):
                yield

        guard.Clock.__call__ = clocked  # type: ignore[method-assign]
        with phases("loading"):
            model = open_dense(str(folder), "auto", torch.device("cpu"))
        soco.compress(model, 0.5, method=_method(case), **options)
        with phases("writing"):
            soco.save(model, output)
        with phases("checking"):
            soco.verify(output, samples=1)
    seconds = time.perf_counter() - begin
    phases.peaks["other"] = max(phases.peaks["other"], peak_memory())
    return {
        "seconds": round(seconds, 1),
        "base": before,
        "peaks": phases.peaks,
        "peak": max(before, *phases.peaks.values()),
    }


def planned(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What is planned of it, from a folder with nothing but a config."""
    import soco

    torch.set_num_threads(case["threads"])
    _ = soco.compress, soco.save, soco.compress_folder, soco.verify  # imports them
    begin = time.perf_counter()
    found = soco.plan(
        folder, 0.5, method=_method(case), stream=case["stream"], samples=case["samples"],
        length=case["length"], batch_size=case["batch_size"],
    )  # fmt: skip
    return {
        "seconds": round(found.cpu_seconds, 1),
        "base": found.base_bytes,
        "peaks": {phase.name: phase.peak_bytes for phase in found.phases},
        "peak": found.peak_bytes,
        "seconds_of_the_plan": round(time.perf_counter() - begin, 1),
    }


def _method(case: dict[str, Any]) -> Any:
    from soco.methods import SoCo

    return SoCo(steps=case["steps"]) if case["method"] == "soco" else case["method"]


def cases(threads: int) -> Iterator[dict[str, Any]]:
    """All that is compared: each model, then each method."""
    some, every = ("svd", "svd-llm"), ("svd", "svd-llm", "kfac-svd", "soco")
    for layers, hidden, dtype, methods in (
        (4, 512, "bfloat16", every), (8, 512, "float32", every), (8, 1024, "bfloat16", some),
        (4, 1024, "float32", every),
    ):  # fmt: skip
        model = {"layers": layers, "hidden": hidden, "inner": hidden * 11 // 4, "dtype": dtype}
        common = {"batch_size": 8, "threads": threads, "steps": 3}
        for method in methods:
            yield {
                **model, "method": method, "stream": False, "samples": 24, "length": 128, **common,
            }  # fmt: skip
        trained = ("soco",) if methods is every else ()
        for method in (*some, "kfac-svd", *trained) if dtype == "bfloat16" else trained:
            yield {
                **model, "method": method, "stream": True, "samples": 24, "length": 256, **common,
            }  # fmt: skip


def mixtures(threads: int) -> Iterator[dict[str, Any]]:
    """The same for a mixture of experts."""
    model = {"layers": 4, "hidden": 512, "inner": 704, "experts": 8, "dtype": "bfloat16"}
    common = {"batch_size": 8, "threads": threads, "steps": 3, "samples": 24}
    for method in ("svd-llm", "kfac-svd", "soco"):
        yield {**model, "method": method, "stream": False, "length": 128, **common}
        yield {**model, "method": method, "stream": True, "length": 256, **common}


def compare(
    scratch: Path | None, threads: int, only: str | None, *, experts: bool
) -> list[dict[str, Any]]:
    """A plan and a run for every case, or for those of a method."""
    rows = []
    for case in (mixtures if experts else cases)(threads):
        if only not in (None, f"{case['method']}{'-streamed' if case['stream'] else ''}"):
            continue
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            folder, alone = Path(place) / "dense", Path(place) / "alone"
            dtype = getattr(torch, case["dtype"])
            size = make(
                folder, case["layers"], case["hidden"], case["inner"], dtype, case.get("experts", 0)
            )
            alone.mkdir()
            (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
            told = [json.loads(_run("plan", alone, case))]
            told.append(json.loads(_run("once", folder, case, Path(place) / "compressed")))
        off = {
            name: round(told[0]["peaks"][name] / peak - 1, 4)
            for name, peak in told[1]["peaks"].items()
            if name in told[0]["peaks"]
        }
        off["together"] = round(told[0]["peak"] / told[1]["peak"] - 1, 4)
        rows.append({**case, "bytes": size, "planned": told[0], "measured": told[1], "off": off})
        print({**case, "off": off}, flush=True)
    return rows


def _run(what: str, folder: Path, case: dict[str, Any], *output: Path) -> str:
    """The last line that a process of its own prints."""
    command = [sys.executable, __file__, what, str(folder), json.dumps(case), *map(str, output)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    return done.stdout.decode().splitlines()[-1]


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="a method, -streamed behind it where it is that")
    parser.add_argument("--experts", action="store_true", help="a mixture instead")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--scratch", type=Path, help="where the models are made")
    arguments = parser.parse_args()
    if arguments.one:
        what, folder, case, *output = arguments.one
        case = json.loads(case)
        place = Path(folder)
        found = planned(place, case) if what == "plan" else once(place, Path(output[0]), case)
        print(json.dumps(found))
        return
    rows = compare(arguments.scratch, arguments.threads, arguments.only, experts=arguments.experts)
    write_record(arguments.output, arguments.scratch or Path(tempfile.gettempdir()), rows)


if __name__ == "__main__":
    main()
