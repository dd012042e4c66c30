"""Several processes against one, each with one thread: how much faster, and how far apart.

    python benchmarks/processes.py folder --layers 8 --hidden 1024 --inner 2816 \
        --output benchmarks/results/processes-folder.json
    python benchmarks/processes.py model DIR --model books-llama-1m --method soco \
        --output benchmarks/results/processes-model.json

``folder`` streams a random Llama by svd-llm; ``model`` compresses a trained one in memory and
measures it on text. Every run is started by torchrun, also that of one process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from protocol import LENGTH, TEXTS, write_record
from streaming import VOCABULARY, hashes, make


def once(arguments: argparse.Namespace) -> None:
    """One of the processes of a run; the first one writes what it found."""
    import soco
    from soco import processes

    torch.set_num_threads(1)
    place: Path = arguments.folder
    with soco.together():
        if arguments.what == "folder":
            ids = torch.randint(
                0, VOCABULARY, (32, 512), generator=torch.Generator().manual_seed(1)
            )
            report = soco.compress_folder(
                place / "dense", place / f"out-{processes.count()}", 0.5, calibration=ids,
                samples=len(ids), batch_size=2,
            )  # fmt: skip
            found: dict[str, Any] = {}
        else:
            found, report = _compressed(arguments)
        if processes.number() == 0:
            found |= {"phases": report.seconds, "peak_process_bytes": report.peak_bytes}
            (place / f"{processes.count()}.json").write_text(json.dumps(found), encoding="utf-8")


def _compressed(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """A trained model compressed by all processes, and measured by each for itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import soco

    data: Path = arguments.data
    folder = data / "models" / arguments.model
    calibration, evaluation = (data / text for text in TEXTS[arguments.model])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    soco.compress(
        model, arguments.ratio, method=arguments.method, tokenizer=tokenizer,
        calibration=calibration, length=LENGTH, samples=arguments.samples,
    )  # fmt: skip
    measured = soco.evaluate(
        model, evaluation, tokenizer=tokenizer, length=LENGTH, windows=30, dense=dense,
        progress=False,
    )  # fmt: skip
    report = soco.report(model)
    ranks = {layer.name: layer.rank for layer in report.layers}
    return {"kl": measured.kl, "perplexity": measured.perplexity, "ranks": ranks}, report


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["folder", "model"])
    parser.add_argument("data", nargs="?", type=Path, default=Path("."))
    parser.add_argument("--processes", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--model", default="books-llama-1m")
    parser.add_argument("--method", default="soco")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--folder", type=Path, help="of a run under way")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        once(arguments)
        return
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        told: dict[str, Any] = {}
        if arguments.what == "folder":
            told = {name: getattr(arguments, name) for name in ("layers", "hidden", "inner")}
            told["bytes"] = make(
                place / "dense", arguments.layers, arguments.hidden, arguments.inner
            )
        else:
            told = {name: getattr(arguments, name) for name in ("model", "method", "ratio")}
        for count in arguments.processes or [1, 2]:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(count), __file__, *sys.argv[1:]]
            command += ["--folder", scratch]
            subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
            found = json.loads((place / f"{count}.json").read_text(encoding="utf-8"))
            rows.append({**told, "processes": count, **found})
            if arguments.what == "folder":
                rows[-1]["identical"] = hashes(place / "out-1") == hashes(place / f"out-{count}")
            print({k: v for k, v in rows[-1].items() if k != "ranks"}, flush=True)
    for row in rows:
        if "ranks" in row:
            row["same_ranks"] = sum(
                row["ranks"][name] == rank for name, rank in rows[0]["ranks"].items()
            )
            row["layers"] = len(rows[0]["ranks"])
    for row in rows:
        row.pop("ranks", None)
    write_record(arguments.output, arguments.data, rows)


if __name__ == "__main__":
    main()
