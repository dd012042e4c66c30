"""From how many tokens on torch's matrix library is quicker than our kernel, on this processor.

    python benchmarks/crossover.py --output benchmarks/results/crossover-CPU.json --threads 2

Both ways through ``soco.ops.low_rank_group``, in turn, on weights that no cache holds.
"""

import argparse
import json
from datetime import datetime, timezone
from pathlib import Path

import torch
from protocol import commit

from soco import ops
from soco.bench.timing import copies_for, side_by_side
from soco.diagnosis import describe_machine
from soco.ops import layers

CPU = torch.device("cpu")
GROUPS = {  # inputs, and (rank, outputs) of each layer: of Llama-2-7B at half of the parameters
    "q,k,v": (4096, [(1024, 4096)] * 3),
    "down": (11008, [(1492, 4096)]),
}
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def weights_of(inner: int, sizes: list[tuple[int, int]], weights: torch.dtype) -> dict:
    """Random factors of a group."""

    def random(rows: int, columns: int) -> torch.Tensor:
        if weights == torch.int8:
            return torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return torch.randn(rows, columns).to(weights)

    ranks = sum(rank for rank, _ in sizes)
    made: dict = {"down": random(ranks, inner), "ups": [random(out, k) for k, out in sizes]}
    if weights == torch.int8:
        made["down_scale"] = torch.rand(ranks) / 1000
        made["up_scales"] = [torch.rand(out) / 1000 for _, out in sizes]
    return made


def measure(group: str, dtype: torch.dtype, weights: torch.dtype, repeats: int) -> list[dict]:
    """A row for every number of tokens."""
    inner, sizes = GROUPS[group]
    numbers = sum(rank for rank, _ in sizes) * inner + sum(k * out for k, out in sizes)
    made = [weights_of(inner, sizes, weights) for _ in range(copies_for(numbers, CPU))]
    rows, known = [], layers.most_tokens
    for tokens in TOKENS:
        x = torch.randn(tokens, inner).to(dtype)

        def way(most: int, x: torch.Tensor = x):
            def run(i: int) -> torch.Tensor:
                layers.most_tokens = lambda *_: most
                return ops.low_rank_group(x, **made[i])

            return run

        try:
            with torch.inference_mode():
                times = side_by_side(
                    {"kernel": way(10**9), "library": way(-1)}, len(made), CPU, repeats
                )
        finally:
            layers.most_tokens = known
        rows.append(
            {
                "group": group, "dtype": str(dtype)[6:], "weights": str(weights)[6:],
                "tokens": tokens, "ways": times,
            }
        )  # fmt: skip
        kernel, library = (times[name]["median_us"] for name in ("kernel", "library"))
        print(group, rows[-1]["dtype"], rows[-1]["weights"], tokens, round(kernel), round(library))
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for dtype, weights in (
        (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.int8),
        (torch.float32, torch.float32), (torch.float32, torch.int8),
        (torch.float16, torch.float16),
    ):  # fmt: skip
        for group in GROUPS:
            rows += measure(group, dtype, weights, arguments.repeats)
    record = {
        "kind": "crossover", "machine": describe_machine("cpu"),
        "instructions": sorted(layers.instructions()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(),
        "command": f"python benchmarks/crossover.py --output benchmarks/results/"
        f"{arguments.output.name} --threads {arguments.threads} --repeats {arguments.repeats}",
        "rows": rows,
    }  # fmt: skip
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
