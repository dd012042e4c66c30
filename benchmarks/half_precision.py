"""How much slower a CPU multiplies matrices in half precision than in float32.

    python benchmarks/half_precision.py --output benchmarks/results/half-precision-DATE.json

The shapes are those of the demo model's training; each ratio is of medians, both sides in turn.
"""

import argparse
import json
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from protocol import commit

from soco.diagnosis import describe_machine

SHAPES = ((2048, 128, 352), (2048, 352, 128), (128, 2048, 352))  # rows, inner, columns


def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of one product."""
    begin = time.perf_counter()
    a @ b
    return time.perf_counter() - begin


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    rows = []
    for shape in SHAPES:
        rows_, inner, columns = shape
        sides = {
            dtype: (torch.randn(rows_, inner).to(dtype), torch.randn(inner, columns).to(dtype))
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        }
        taken: dict[torch.dtype, list[float]] = {dtype: [] for dtype in sides}
        for _ in range(arguments.repeats + 2):
            for dtype, (a, b) in sides.items():
                taken[dtype].append(seconds(a, b))
        medians = {dtype: statistics.median(each[2:]) for dtype, each in taken.items()}
        for dtype in (torch.bfloat16, torch.float16):
            rows.append(
                {
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "milliseconds": round(1e3 * medians[dtype], 3),
                    "milliseconds_float32": round(1e3 * medians[torch.float32], 3),
                    "times_slower": round(medians[dtype] / medians[torch.float32], 2),
                }
            )
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", "benchmarks/half_precision.py", *sys.argv[1:]]),
        "machine": describe_machine("cpu"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
