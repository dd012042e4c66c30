"""What the choices inside soco.linalg rest on: its bound, its estimate, and two ways to save time.

python benchmarks/decomposition_choices.py --data DIR --threads 2 \
        --output benchmarks/results/decomposition-choices.json
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from protocol import write_record
from torch import Tensor
from transformers import AutoModelForCausalLM

from soco.bench.timing import side_by_side
from soco.linalg import SVD, exact, parallel, randomized, randomized_svd, truncated_svd
from soco.surgery import find_linears, weight_of

CPU = torch.device("cpu")
MODELS = ("babyllama105", "books-llama-6m")


def spectra(side: int) -> Iterator[tuple[str, Tensor]]:
    """Singular values of every kind."""
    place = torch.arange(1, side + 1, dtype=torch.float64)
    for power in (0.25, 0.5, 1.0, 1.5, 2.0):
        yield f"i^-{power}", place**-power
    for decades in (1, 2, 3, 4, 6):
        yield f"{decades} decades", 10 ** (-decades * (place - 1) / (side - 1))
    for size in (30, 300):
        yield f"3 outliers, {size}", torch.where(place <= 3, size, 1.0) * place**-0.3
    yield "a step", torch.where(place < side // 5, 1.0, 0.1 * place**-0.2)


def matrices(rows: int, columns: int) -> Iterator[tuple[str, Tensor]]:
    """A float32 matrix of every kind, and a Gaussian one."""
    torch.manual_seed(0)
    side = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(size, side, dtype=torch.float64)).Q for size in (rows, columns)
    )
    for name, sigma in spectra(side):
        yield name, (left * sigma @ right.mT).float()
    yield "Gaussian", torch.randn(rows, columns)


def excess(weight: Tensor, svd: SVD) -> float:
    """By how much the error of a truncation is above the least one."""
    wide, (U, S, Vh) = weight.double(), (part.double() for part in svd)
    least = torch.linalg.svdvals(wide)[len(S) :].norm()
    return float((wide - U * S @ Vh).norm() / least - 1)


def bounds() -> Iterator[dict]:
    """What a Gram matrix in float32 costs, beside what its eigenvalues say."""
    for rows, columns in ((512, 512), (1024, 1024), (512, 2048)):
        for name, weight in matrices(rows, columns):
            A = weight if rows <= columns else weight.mT
            values, vectors = exact.eigh_descending(A @ A.mT)
            for rank in (min(rows, columns) // 4, min(rows, columns) // 2):
                U = torch.linalg.qr(vectors[:, :rank].double()).Q
                down = U.mT @ A.double()
                yield {
                    "what": "bound", "rows": rows, "columns": columns, "spectrum": name,
                    "rank": rank, "excess": excess(A, SVD(U, torch.ones(rank), down)),
                    "bound": float(exact.single_excess(values, rank)),
                    "taken": bool(exact._is_safe(values, rank)),
                }  # fmt: skip


def estimates() -> Iterator[dict]:
    """The excess of randomized decompositions, beside its estimate."""
    for name, weight in matrices(512, 512):
        for rank in (32, 128):
            for power_iterations in (4, 8):
                svd, estimate = randomized_svd(weight, rank, power_iterations=power_iterations)
                yield {
                    "what": "estimate", "spectrum": name, "rank": rank,
                    "power_iterations": power_iterations, "excess": excess(weight, svd),
                    "estimate": float(estimate),
                }  # fmt: skip


def layers(data: Path) -> Iterator[dict]:
    """The excess of randomized decompositions of trained weights at a third of the full rank."""
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(data / "models" / name, dtype=torch.float32)
        weights = [weight_of(module).detach() for module in find_linears(model).values()]
        for power_iterations in (2, 4, 8):
            found = [
                excess(w, truncated_svd(w, min(w.shape) // 3, "randomized",
                                        power_iterations=power_iterations))
                for w in weights
            ]  # fmt: skip
            yield {
                "what": "layers", "model": name, "power_iterations": power_iterations,
                "mean": sum(found) / len(found), "largest": max(found),
            }  # fmt: skip


def times(repeats: int) -> Iterator[dict]:
    """Several matrices at once, and columns made orthonormal in float32 between products."""
    for side in (256, 512, 1024, 2048):
        batch = torch.randn(4, side, side)

        def alone(i: int, batch: Tensor = batch, side: int = side) -> SVD:
            with mock.patch.object(parallel, "WORTH_A_THREAD", 10**9):
                return truncated_svd(batch, side // 4)

        ways = {"side by side": lambda i, b=batch, s=side: truncated_svd(b, s // 4), "alone": alone}
        yield {"what": "side by side", "side": side, "ways": side_by_side(ways, 1, CPU, repeats)}
    original = randomized.cholesky_qr

    def in_float64(Y: Tensor, last: bool = False) -> tuple[Tensor, Tensor]:
        return original(Y, True)

    for side in (1024, 2048):
        weight = torch.randn(side, side) * torch.arange(1, side + 1).rsqrt()

        def wide(i: int, weight: Tensor = weight, side: int = side) -> SVD:
            with mock.patch.object(randomized, "cholesky_qr", in_float64):
                return truncated_svd(weight, side // 4, "randomized")

        ways = {
            "float32": lambda i, w=weight, s=side: truncated_svd(w, s // 4, "randomized"),
            "float64": wide,
        }
        yield {"what": "range finder", "side": side, "ways": side_by_side(ways, 1, CPU, repeats)}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of models and texts")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [*times(arguments.repeats), *bounds(), *estimates(), *layers(arguments.data)]
    write_record(arguments.output, arguments.data, rows)


if __name__ == "__main__":
    main()
