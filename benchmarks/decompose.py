"""Time and memory of ``soco.decompose`` on folders of random Llamas of growing depth.

    python benchmarks/decompose.py --output benchmarks/results/decompose.json --threads 2

Every folder is taken apart in a process of its own, whose peak memory is written down.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from protocol import write_record
from transformers import LlamaConfig, LlamaForCausalLM

from soco.decomposition import decompose

KEPT = 0.25


def make(folder: Path, blocks: int) -> int:
    """A random model in bfloat16; returns the bytes of its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks, vocab_size=1000,
        num_attention_heads=16, num_key_value_heads=16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="200MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def take_apart(folder: Path, threads: int) -> dict:
    """What this process needs for it."""
    torch.set_num_threads(threads)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin = time.perf_counter()
    found = decompose(folder, folder.parent / "out", kept=KEPT, progress=False)
    return {
        "layers": len(found),
        "kept": KEPT,
        "seconds": round(time.perf_counter() - begin, 2),
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "of_them_before": before,
    }


def _run(*words: str) -> Any:
    command = [sys.executable, *sys.argv, *words]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--blocks", type=int, nargs="*", default=[6, 24, 48])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # in a process of its own,
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)  # or this many blocks into it
    arguments = parser.parse_args()
    if arguments.make is not None:
        print(json.dumps(make(arguments.folder, arguments.make)))
        return
    if arguments.folder is not None:
        print(json.dumps(take_apart(arguments.folder, arguments.threads)))
        return
    rows = []
    for blocks in arguments.blocks:
        with tempfile.TemporaryDirectory() as place:
            folder = str(Path(place) / "model")
            # Not here: a process begins with the peak of the one that started it.
            size = _run("--folder", folder, "--make", str(blocks))
            rows.append({"blocks": blocks, "model_bytes": size, **_run("--folder", folder)})
        print(rows[-1], flush=True)
    write_record(arguments.output, Path("DIR"), rows)


if __name__ == "__main__":
    main()
