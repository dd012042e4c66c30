"""How long sums of Gram matrices take, and the question whether all of a tensor is finite.

    python benchmarks/grams.py --output benchmarks/results/grams.json

Plainly is ``total += (x.float().mT @ x.float()).double()``, and ``x.isfinite().all()``; both sides
in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from protocol import write_record

from soco.linalg import add_gram
from soco.ops import all_finite

SUMS = ((2048, 512), (2048, 2048), (2048, 5632), (512, 5632))  # tokens, inputs
LOOKED_AT = (2048, 5632)


def milliseconds(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median of each side."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats + 2):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(each[2:]) for name, each in taken.items()}


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for tokens, inputs in SUMS:
        x = torch.randn(tokens, inputs)
        total, other = (torch.zeros(inputs, inputs, dtype=torch.float64) for _ in range(2))
        sides: dict[str, Callable[[], Any]] = {
            "plain_ms": lambda x=x, total=total: total.add_((x.mT @ x).double()),
            "soco_ms": lambda x=x, other=other: add_gram(other, x),
        }
        found = milliseconds(sides, arguments.repeats)
        rows.append({"what": f"sum: {tokens:,} tokens, {inputs:,} inputs", **found})
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(LOOKED_AT).to(dtype)
        sides = {
            "plain_ms": lambda x=x: bool(x.isfinite().all()),
            "soco_ms": lambda x=x: all_finite(x),
        }
        name = str(dtype).removeprefix("torch.")
        size = " x ".join(f"{side:,}" for side in LOOKED_AT)
        what = f"NaN or Inf among {size} numbers in {name}"
        rows.append({"what": what, **milliseconds(sides, arguments.repeats)})
    write_record(arguments.output, Path("no data"), rows, kind="grams")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
