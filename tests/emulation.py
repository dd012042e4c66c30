"""The CUDA kernels on a processor: compiled as C++ with tests/emulated, called through ctypes."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from ctypes import byref, c_bool, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soco.core import WEIGHT_DTYPES
from soco.ops.checks import sum_dtype
from soco.ops.layers import Weights

ROOT = Path(__file__).parents[1]
H200 = {"multiprocessors": 3, "shared": 227 * 1024, "major": 9, "refuses": False}


class Member(ctypes.Structure):
    """A layer as ``kernels.cpp`` takes it."""

    _fields_ = [
        ("up", c_void_p), ("stride", c_int64), ("up_scale", c_void_p), ("sources", c_void_p),
        ("rank", c_int64), ("rows", c_int64), ("out", c_int64),
    ]  # fmt: skip


def compiler() -> str:
    """A C++ compiler; an empty string if there is none."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++"))), "")


def build(folder: Path, csrc: Path = ROOT / "csrc") -> "Emulation":
    """Compile the kernels in ``csrc`` and load them."""
    flags = ["-std=c++17", "-O1", "-fPIC", "-pthread", "-w", f"-I{ROOT}/tests/emulated"]
    sources = [ROOT / "tests/emulated/kernels.cpp", *sorted((csrc / "cuda").glob("*.cu"))]
    running = []
    for source in sources:
        target = folder / f"{source.stem}.o"
        command = [compiler(), *flags, f"-I{csrc}", "-xc++", "-c", source, "-o", target]
        running.append((target, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
    for _, process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    library = folder / "kernels.so"
    objects = [target for target, _ in running]
    subprocess.run([compiler(), "-shared", "-pthread", *objects, "-o", library], check=True)
    return Emulation(ctypes.CDLL(str(library)))


class Guarded:
    """Copies of tensors between pages that must not be touched: behind each, or before it."""

    def __init__(self, library: ctypes.CDLL, at_the_beginning: bool) -> None:
        self._library, self._held = library, []
        self._at_the_beginning = c_bool(at_the_beginning)

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: object) -> None:
        for guarded in self._held:
            self._library.release(c_void_p(guarded))

    def space(self, size: int) -> int:
        """The address of ``size`` bytes, all ones: NaN in any floating-point type."""
        if size == 0:
            return 0
        guarded = self._library.guarded(c_size_t(size), self._at_the_beginning)
        self._held.append(guarded)
        return self._library.memory_of(c_void_p(guarded))

    def copy(self, tensor: Tensor | None, step: int | None = None, shift: int = 0) -> int:
        """The address of a copy.

        Its rows are ``step`` elements apart, if that is given; it begins ``shift`` bytes behind a
        multiple of 16.
        """
        if tensor is None or tensor.numel() == 0:
            return 0
        flat = tensor.contiguous()
        size = flat.element_size()
        if step is None or step == flat.shape[1]:
            address = self.space(flat.numel() * size + shift) + shift
            ctypes.memmove(address, flat.data_ptr(), flat.numel() * size)
            return address
        address = self.space(((len(flat) - 1) * step + flat.shape[1]) * size)
        for i, row in enumerate(flat):
            ctypes.memmove(address + i * step * size, row.data_ptr(), row.numel() * size)
        return address


class Emulation:
    """The emulated kernels, and the GPU that they run on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.guarded.restype = library.memory_of.restype = c_void_p
        library.read_ahead.restype = library.copied.restype = c_int64
        self.at_the_beginning = False  # where arrays have a page that must not be touched
        self.counter = c_uint32(0)
        self.machine()

    def machine(self, seed: int = 0, **changed: int) -> None:
        """The GPU: multiprocessors, bytes of shared memory, major capability, refusing grids."""
        gpu = {**H200, **changed}
        self.library.set_machine(
            c_int(gpu["multiprocessors"]), c_int(gpu["shared"]), c_int(gpu["major"]),
            c_bool(gpu["refuses"]), c_uint64(seed),
        )  # fmt: skip

    def runner(self, kernel: str) -> Callable[..., None]:
        """What ``soco.core.runner`` gives for a kernel of pointers, sizes and dtypes."""
        call = getattr(self.library, kernel)
        call.argtypes = {
            "spectral_scale": [c_void_p] * 4 + [c_int64] * 2 + [c_int] * 2,
            "spectral_scale_backward": [c_void_p] * 7 + [c_int64] * 3 + [c_int] * 2,
            "gaussian": [c_void_p, c_int64, c_int64, c_uint64],
        }[kernel]
        return lambda x, *args: call(*(getattr(arg, "value", arg) for arg in args))

    def launches(self) -> int:
        """How many kernels were launched since the machine was set."""
        return self.library.launches()

    def batched_svd(self, matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``soco.ops.batched_svd``, and how many sweeps each matrix took."""
        count, m, n = matrices.shape
        rows, columns, tall = max(m, n), min(m, n), m >= n
        made = [
            matrices.new_empty(count, columns, rows), matrices.new_empty(count, columns),
            matrices.new_empty(count, columns, columns),
            matrices.new_empty(count, dtype=torch.int32),
        ]  # fmt: skip
        self.library.svd_scratch.restype = c_int64
        scratch = self.library.svd_scratch(c_int64(count), c_int64(rows), c_int64(columns))
        with Guarded(self.library, self.at_the_beginning) as memory:
            sizes = [tensor.numel() * tensor.element_size() for tensor in made]
            places = [memory.space(size) for size in sizes]
            given, room = memory.copy(matrices), memory.space(scratch * matrices.element_size())
            self.library.batched_svd(
                c_void_p(given), *(c_void_p(place) for place in places), c_void_p(room),
                c_int64(count), c_int64(rows), c_int64(columns), c_int64(n if tall else 1),
                c_int64(1 if tall else n), _code(matrices), c_bool(not tall),
            )  # fmt: skip
            for tensor, place, size in zip(made, places, sizes, strict=True):
                ctypes.memmove(tensor.data_ptr(), place, size)
        long, S, short, sweeps = made
        return (long.mT, S, short, sweeps) if tall else (short.mT, S, long, sweeps)

    def low_rank_group(
        self,
        x: Tensor,
        down: Tensor,
        ups: Sequence[Tensor],
        *,
        residual: Tensor | None = None,
        barrier: bool = True,
        dependent: bool = False,
        shares: Sequence[int] = (),
        shift: int = 0,
        steps: Sequence[int] | None = None,
        **options: Any,
    ) -> Tensor:
        """``soco.ops.low_rank_group``, with and without a counter.

        ``shift``: bytes that x begins behind a multiple of 16; ``steps``: elements between rows of
        each of ``ups``; ``dependent``: what the stream ran before has yet to write x and residual;
        ``shares``: the first output of each block, and their number.
        """
        weights = Weights(down, ups, **options)
        count, tokens = len(ups), len(x)
        y = x.new_empty(tokens, weights.width)
        with Guarded(self.library, self.at_the_beginning) as memory:
            sources = weights.sources or [None] * count
            scales = weights.up_scales or [None] * count
            members = (Member * count)()
            for m, (up, source, scale, out) in enumerate(
                zip(ups, sources, scales, weights.outs, strict=True)
            ):
                step = up.shape[1] if steps is None else steps[m]
                members[m] = Member(
                    memory.copy(up, step), step, memory.copy(scale), memory.copy(source),
                    up.shape[1], len(up), out,
                )  # fmt: skip
            ranks = len(down)
            given_x, given_down = memory.copy(x, shift=shift), memory.copy(down)
            given_residual = memory.copy(residual)
            z = memory.space(tokens * ranks * sum_dtype(x).itemsize)
            size = y.numel() * y.element_size()
            result = memory.space(size)
            if dependent:
                for place, tensor in ((given_x, x), (given_residual, residual)):
                    if place and tensor is not None:
                        late = c_size_t(tensor.numel() * tensor.element_size())
                        self.library.written_late(c_void_p(place), late)
            self.library.low_rank_group(
                c_void_p(given_x), c_void_p(given_down),
                c_void_p(memory.copy(weights.down_scale)), members, c_int(count),
                c_void_p(memory.copy(weights.bias)), c_void_p(given_residual), c_void_p(z),
                c_void_p(result), byref(self.counter) if barrier else None, c_int64(tokens),
                c_int64(x.shape[1]), _code(x), _code(down), c_bool(weights.gated),
                c_bool(dependent), (c_int64 * len(shares))(*shares), c_int64(len(shares)),
            )  # fmt: skip
            ctypes.memmove(y.data_ptr(), result, size)
        assert self.library.forgotten() == 0, "threads ended with copies on their way"
        assert self.library.hasty() == 0, "threads read what the stream had yet to write"
        return y


def _code(tensor: Tensor) -> c_int:
    return c_int(WEIGHT_DTYPES[tensor.dtype].value)
