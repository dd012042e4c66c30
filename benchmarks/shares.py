"""How unevenly the blocks of a GPU read a pivoted layer, shared out by number and by rows.

    python benchmarks/shares.py --output benchmarks/results/shares.json

Computed, not timed: the rows of the fullest block over those of the mean one, on as many blocks as
an H200 has multiprocessors. Pivots are drawn at random, with five seeds.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from protocol import write_record

from soco.ops.layers import Weights
from soco.ops.shares import shares

BLOCKS, SEEDS = 132, 5
LAYERS = [(4096, 1024), (4096, 1493), (4096, 1638), (11008, 1493)]  # outputs, rank


def measure(out: int, rank: int, seed: int) -> dict[str, Any]:
    """One layer."""
    is_pivot = torch.zeros(out, dtype=torch.bool)
    is_pivot[torch.randperm(out, generator=torch.Generator().manual_seed(seed))[:rank]] = True
    places = torch.where(is_pivot, is_pivot.cumsum(0) - 1, rank + (~is_pivot).cumsum(0) - 1)
    weights = Weights(torch.empty(rank, 1), [torch.empty(out - rank, rank)], [places])
    before = [0, *(~is_pivot).cumsum(0).tolist()]

    def fullest(firsts: list[int]) -> float:
        rows = torch.tensor([before[b] - before[a] for a, b in itertools.pairwise(firsts)])
        return round(float(rows.max() / rows.double().mean()), 4)

    by_number = [out * block // BLOCKS for block in range(BLOCKS + 1)]
    return {
        "outputs": out, "rank": rank, "blocks": BLOCKS, "seed": seed,
        "fullest by number": fullest(by_number),
        "fullest by rows": fullest(shares(weights, BLOCKS)),
    }  # fmt: skip


def main() -> None:
    """Measure all layers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    rows = [measure(*layer, seed) for layer in LAYERS for seed in range(SEEDS)]
    for row in rows:
        print(row)
    write_record(output, Path("DIR"), rows)


if __name__ == "__main__":
    main()
