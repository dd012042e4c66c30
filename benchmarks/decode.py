"""How fast a trained model generates: dense, compressed, and compressed and optimized.

    python benchmarks/decode.py --data DIR --output benchmarks/results/decode.json

The compressed model is that of plain SVD with equal ratios in all layers: its speed is that of any
method at the same ranks. All models are in memory together and generate in turn; how many times as
fast as the dense one a model is, is the median of the ratios within the turns, since what else runs
on a shared machine changes from turn to turn.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from protocol import write_record
from transformers import AutoModelForCausalLM

import soco
from soco.bench.timing import percentiles

PROMPT = 16  # tokens


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--models", nargs="*", default=["books-llama-6m"])
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        for dtype in arguments.dtypes:
            models = variants(arguments.data / "models" / name, arguments.ratio, dtype)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for row in measured(models, arguments.tokens, arguments.repeats):
                    about = {"model": name, "dtype": dtype, "threads": threads}
                    rows.append({**about, "ratio": arguments.ratio, **row})
                    print(rows[-1], flush=True)
    write_record(arguments.output, arguments.data, rows)


def variants(folder: Path, ratio: float, dtype: str) -> dict[str, Any]:
    """Name to model."""
    kind = getattr(torch, dtype)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models = {"dense": copy.deepcopy(dense).to(kind)}
    for name, pivoted in (("plain factors", False), ("pivoted", True)):
        model = copy.deepcopy(dense)
        options = {"method": "svd", "allocator": "uniform", "pivoted": pivoted}
        soco.compress(model, ratio, progress=False, **options)
        models[name] = model.to(kind)
        models[f"{name}, optimized"] = soco.optimize(copy.deepcopy(model))
        models[f"{name}, int8"] = soco.optimize(copy.deepcopy(model), weights="int8")
    return models


@torch.inference_mode()
def measured(models: dict[str, Any], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per generated token of each model."""
    count = next(iter(models.values())).config.vocab_size
    ids = torch.randint(count, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model.generate(
                ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
            if turn > 0:
                times[name].append((time.perf_counter() - begin) / tokens)
    dense = times["dense"]
    ratios = {name: [d / t for d, t in zip(dense, own, strict=True)] for name, own in times.items()}
    return [
        {"variant": name, **percentiles(times[name]),
         "times_faster_than_dense": round(statistics.median(ratios[name]), 3)}
        for name in models
    ]  # fmt: skip


if __name__ == "__main__":
    main()
