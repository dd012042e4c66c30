"""What products of three in bfloat16 cost a randomized decomposition: its excess with and without.

    python benchmarks/halves.py --data DIR --output benchmarks/results/halves.json

The products are those of a GPU, computed on the processor. Besides spectra made up, the largest
layer of a trained model in ``DIR``.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from protocol import write_record
from transformers import AutoModelForCausalLM

from soco.linalg import randomized, randomized_svd

SIDE = 384
PLACES = torch.arange(1, SIDE + 1, dtype=torch.float64)
SPECTRA = {
    "i^-1/2": PLACES**-0.5,
    "i^-1": PLACES**-1,
    "three decades": 1e3 ** (-PLACES / SIDE),
    "six decades": 1e6 ** (-PLACES / SIDE),
    "outliers of 300": torch.where(PLACES < 6, 300.0, 1.0) * PLACES**-0.3,
    "outliers of 3000": torch.where(PLACES < 6, 3000.0, 1.0) * PLACES**-0.3,
    "step": torch.where(PLACES < 97, 1.0, 0.1),
}
MODEL = "books-llama-6m"


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    matrices = {"Gaussian": normal(0)} | {name: with_spectrum(s) for name, s in SPECTRA.items()}
    model = AutoModelForCausalLM.from_pretrained(arguments.data / "models" / MODEL)
    matrices[f"mlp.down_proj of {MODEL}"] = model.model.layers[0].mlp.down_proj.weight.float()
    rows = [measured(name, each, part) for name, each in matrices.items() for part in (8, 2)]
    write_record(arguments.output, arguments.data, rows)


def normal(seed: int) -> torch.Tensor:
    """A square matrix, float32."""
    return torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def with_spectrum(sigma: torch.Tensor) -> torch.Tensor:
    """A square matrix of these singular values, float32."""
    left, right = (torch.linalg.qr(normal(seed).double()).Q for seed in (1, 2))
    return (left * sigma @ right.mT).float()


@torch.no_grad()
def measured(name: str, weight: torch.Tensor, part: int) -> dict[str, Any]:
    """One matrix, at a ``part`` of its full rank."""
    rank = min(weight.shape) // part
    least = torch.linalg.svdvals(weight.double())[rank:].norm()
    found: dict[str, Any] = {"matrix": name, "shape": list(weight.shape), "rank": rank}
    for way, pays in (("float32", False), ("bfloat16, three", True)):
        randomized.pay = lambda matrices, pays=pays: pays
        (U, S, Vh), estimate = randomized_svd(weight, rank)
        error = (weight.double() - U.double() * S.double() @ Vh.double()).norm()
        told = float(estimate) if estimate.isfinite() else None  # None: unknown
        found[way] = {"excess": float(error / least - 1), "estimate": told}
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
