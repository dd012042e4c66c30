"""The ops on random shapes, strides, dtypes and devices: right, or one TypeError or ValueError.

    python tests/fuzzing_ops.py --count 20000 --output fuzz-ops.json

``cmake/sanitize.sh`` runs it on a core that is built with AddressSanitizer and
UndefinedBehaviorSanitizer, which end the process at the first wrong access.
``tests/test_fuzzing.py`` runs a few hundred.
"""

import collections
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reference  # tests/reference.py
from fuzzing import command_line  # tests/fuzzing.py
from soco import core, ops

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHERS = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
SIZES = [0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200]
TOKENS = [0, 1, 1, 2, 3, 4, 5, 8, 15, 16, 17, 33, 70]
# Of the largest sum of absolute values: four roundings after each other.
TOLERANCE = {
    torch.float32: 4e-6, torch.float64: 1e-14, torch.bfloat16: 2**-6, torch.float16: 2**-9
}  # fmt: skip


Change = Callable[[Tensor], Tensor]  # nothing, or absolute values, for how large sums may be


class Case:
    """Random arguments, from one seed."""

    def __init__(self, seed: str) -> None:
        """Numbers of two kinds: of choices, and of tensors."""
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.chance.randrange(2**62))
        self.wrong = 0  # things that do not fit

    def size(self) -> int:
        return self.chance.choice(SIZES)

    def lead(self) -> tuple[int, ...]:
        """Sizes before the last one."""
        tokens = self.chance.choice(TOKENS)
        return self.chance.choice([(tokens,), (tokens,), (1, tokens), (tokens, 2), ()])

    def tensor(self, *shape: int, dtype: torch.dtype, fits: bool = False) -> Tensor:
        """Of any strides; sometimes of a wrong dtype, shape or device."""
        if not fits and self.chance.random() < 0.01:
            self.wrong += 1
            return self._wrong(shape, dtype)
        made = self._strided(shape)
        if dtype == torch.bool:
            return made > 0
        if dtype == torch.int8:
            return (made * 40).clamp(-127, 127).to(dtype)
        return made.to(dtype) if dtype != torch.int64 else made.abs().to(dtype)

    def _strided(self, shape: tuple[int, ...]) -> Tensor:
        how = self.chance.randrange(6)
        if how == 1 and len(shape) > 1:
            return self._normal(shape[::-1]).permute(*range(len(shape))[::-1])
        if how == 2 and shape:
            step = self.chance.choice([2, 3])
            return self._normal((*shape[:-1], shape[-1] * step))[..., ::step]
        if how == 3 and shape:
            more = self.chance.choice([1, 3, 16])
            return self._normal((*shape[:-1], shape[-1] + more))[..., more:]
        if how == 4 and shape:
            return self._normal((1,) * len(shape)).expand(shape)
        return self._normal(shape)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _wrong(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        what = self.chance.randrange(4)
        if what == 0:
            other = self.chance.choice([d for d in (*FLOATS, *OTHERS) if d != dtype])
            return torch.zeros(shape).to(other)
        if what == 1:
            return torch.empty(shape, dtype=dtype, device="meta")
        if what == 2 and shape:
            sizes = list(shape)
            sizes[self.chance.randrange(len(sizes))] += self.chance.choice([1, 2, 64])
            return torch.zeros(sizes).to(dtype)
        return torch.zeros((*shape, 2)).to(dtype)

    def dtype(self) -> torch.dtype:
        return self.chance.choice(FLOATS)

    def maybe(self, make: Callable[[], Tensor]) -> Tensor | None:
        return make() if self.chance.random() < 0.5 else None


def applied(change: Change, values: Any) -> Any:
    """Tensors changed, in lists, tuples and dictionaries, too; anything else as it is."""
    if isinstance(values, Tensor):
        return change(values)
    if isinstance(values, (list, tuple)):
        return type(values)(applied(change, value) for value in values)
    if isinstance(values, dict):
        return {key: applied(change, value) for key, value in values.items()}
    return values


def spectral_scale(case: Case) -> tuple[Any, Any]:
    lead, rank, dtype = case.lead(), case.size(), case.dtype()
    wide = case.chance.choice([dtype, torch.float32])
    x, scale = case.tensor(*lead, rank, dtype=dtype), case.tensor(rank, dtype=wide)
    mask = case.tensor(rank, dtype=torch.bool)
    args = x, scale, mask
    return ops.spectral_scale(*args), lambda of: reference.spectral_scale(*applied(of, args))


def spectral_scale_backward(case: Case) -> tuple[Any, Any]:
    lead, rank, dtype = case.lead(), case.size(), case.dtype()
    grad, x = (case.tensor(*lead, rank, dtype=dtype) for _ in range(2))
    scale, mask = case.tensor(rank, dtype=dtype), case.tensor(rank, dtype=torch.bool)
    args = grad, x, scale, mask
    return ops.spectral_scale_backward(*args), lambda of: reference.spectral_scale_backward(
        *applied(of, args)
    )


def spectral_linear(case: Case) -> tuple[Any, Any]:
    lead, rank, out, dtype = case.lead(), case.size(), case.size(), case.dtype()
    args = (
        case.tensor(*lead, rank, dtype=dtype), case.tensor(rank, dtype=dtype),
        case.tensor(rank, dtype=torch.bool), case.tensor(out, rank, dtype=dtype),
        case.maybe(lambda: case.tensor(out, dtype=dtype)),
    )  # fmt: skip
    return ops.spectral_linear(*args), lambda of: reference.spectral_linear(*applied(of, args))


def low_rank_linear(case: Case) -> tuple[Any, Any]:
    lead, size, rank, out, dtype = case.lead(), case.size(), case.size(), case.size(), case.dtype()
    args = (
        case.tensor(*lead, size, dtype=dtype), case.tensor(rank, size, dtype=dtype),
        case.tensor(out, rank, dtype=dtype), case.maybe(lambda: case.tensor(out, dtype=dtype)),
    )  # fmt: skip
    return ops.low_rank_linear(*args), lambda of: reference.low_rank_linear(*applied(of, args))


def low_rank_linear_backward(case: Case) -> tuple[Any, Any]:
    lead, size, rank, out, dtype = case.lead(), case.size(), case.size(), case.size(), case.dtype()
    grad, x = case.tensor(*lead, out, dtype=dtype), case.tensor(*lead, size, dtype=dtype)
    down, up = case.tensor(rank, size, dtype=dtype), case.tensor(out, rank, dtype=dtype)

    def expected(of: Change) -> tuple[Tensor, ...]:
        leaves = [of(each).double().requires_grad_() for each in (x, down, up)]
        product = leaves[0] @ leaves[1].mT @ leaves[2].mT
        grads = torch.autograd.grad(product, leaves, of(grad).double())
        return tuple(each.to(dtype) for each in grads)

    return ops.low_rank_linear_backward(grad, x, down, up)[:3], expected


def low_rank_group(case: Case) -> tuple[Any, Any]:
    lead, size, dtype = case.lead(), case.size(), case.dtype()
    gated = case.chance.random() < 0.2
    count = 2 if gated else case.chance.choice([1, 2, 3, 4])
    out = case.size()
    ranks = [case.size() for _ in range(count)]
    outs = [out if gated else case.size() for _ in range(count)]
    weights = dtype
    scales: dict[str, Any] = {}
    if dtype != torch.float64 and case.chance.random() < 0.3:
        weights = torch.int8
        scales = {
            "down_scale": case.tensor(sum(ranks), dtype=torch.float32).div(64),
            "up_scales": [case.tensor(o, dtype=torch.float32).div(64) for o in outs],
        }
    x = case.tensor(*lead, size, dtype=dtype)
    down = case.tensor(sum(ranks), size, dtype=weights)
    ups = [case.tensor(o, r, dtype=weights) for o, r in zip(outs, ranks, strict=True)]
    bias = case.maybe(lambda: case.tensor(sum(outs), dtype=dtype))
    options = {"bias": bias, "gated": gated, **scales}
    return (
        ops.low_rank_group(x, down, ups, **options),
        lambda of: reference.low_rank_group(*applied(of, (x, down, ups)), **applied(of, options)),
    )


def gaussian_sketch(case: Case) -> tuple[Any, Any]:
    rows, size, columns, dtype = case.size(), case.size(), case.size(), case.dtype()
    weight, seed = case.tensor(rows, size, dtype=dtype), case.chance.randrange(2**63)

    def expected(of: Change) -> Tensor:
        omega = torch.from_numpy(reference.gaussian(size, columns, seed)).reshape(size, columns)
        return (of(weight).double() @ of(omega)).to(dtype)

    found = ops.gaussian_sketch(weight, columns, seed)
    if dtype == torch.float64:  # Omega is of float32 numbers, rounded in another way there
        return found.float(), lambda of: expected(of).float()
    return found, expected


def batched_svd(case: Case) -> tuple[Any, Any]:
    dtype = case.chance.choice(FLOATS[:2])
    lead = case.chance.choice([(), (1,), (3,), (2, 2), (0,)])
    matrices = case.tensor(*lead, case.size(), case.size(), dtype=dtype)
    U, S, Vh = ops.batched_svd(matrices)

    def expected(of: Change) -> Tensor:
        return matrices if of is same else matrices.flatten(-2).norm(dim=-1)

    return (U * S[..., None, :]) @ Vh, expected


OPS = [
    spectral_scale, spectral_scale_backward, spectral_linear, low_rank_linear,
    low_rank_linear_backward, low_rank_group, gaussian_sketch, batched_svd,
]  # fmt: skip


def same(x: Tensor) -> Tensor:
    """What is computed."""
    return x


def absolute(x: Tensor) -> Tensor:
    """What tells how large the terms of its sums are."""
    return x if x.dtype == torch.bool else x.double().abs()


def close(found: Any, expected: Any, bound: Any) -> bool:
    """Whether tensors, or tuples of them, agree but for the rounding of sums as large as bound."""
    if isinstance(found, tuple):
        return all(map(close, found, expected, bound))
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    wanted, finite = expected.double(), expected.isfinite()
    gap = (found.double() - wanted)[finite & found.isfinite()].abs()
    largest = bound.double()[bound.isfinite()].abs()
    size = max(1.0, float(largest.max()) if largest.numel() else 0.0)
    both = bool((found.isfinite() == finite).all()) or expected.dtype == torch.float16
    return both and (not gap.numel() or float(gap.max()) <= TOLERANCE[expected.dtype] * size)


def run(count: int, seed: int, *, verbose: bool = False) -> dict[str, Any]:
    """So many cases, each at a random SIMD level and number of threads.

    Returns:
        How many were right and refused by op, and what failed, with its seed.
    """
    tally: dict[str, collections.Counter[str]] = {}
    failures = []
    begin = time.perf_counter()
    threads, best = torch.get_num_threads(), core.simd_levels()[-1]
    for number in range(count):
        case = Case(f"{seed}.{number}")
        op = case.chance.choice(OPS)
        core.use_simd_level(case.chance.choice(core.simd_levels()))
        torch.set_num_threads(case.chance.choice([1, 2, 3]))
        try:
            found, expected = op(case)
            right = case.wrong > 0 or close(found, expected(same), expected(absolute))
            outcome = "right" if right else "wrong numbers"
            if case.wrong and right:
                outcome = "not refused"  # a wrong shape may fit: (0,) and the like
        except (TypeError, ValueError) as error:
            outcome = "refused" if case.wrong else f"refused what is right: {error}"
        except Exception as error:
            outcome = f"raised {type(error).__name__}: {error}"
            if case.wrong and isinstance(error, NotImplementedError):
                outcome = "refused"  # by torch: tensors on devices that do not go together
        tally.setdefault(op.__name__, collections.Counter())[outcome.split(":")[0]] += 1
        if outcome not in ("right", "refused", "not refused"):
            failures.append({"case": f"{seed}.{number}", "op": op.__name__, "outcome": outcome})
            if verbose:
                print(failures[-1], flush=True)
    torch.set_num_threads(threads)
    core.use_simd_level(best)
    return {
        "count": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "outcomes": {name: dict(counter) for name, counter in sorted(tally.items())},
        "failures": failures,
    }


if __name__ == "__main__":
    command_line(__doc__ or "", lambda count, seed: run(count, seed, verbose=True))
