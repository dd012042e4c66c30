"""What cuSOLVER has and torch does not call: found in the library that torch has loaded already.

Nothing here is trusted. A result is handed on only if it is a decomposition: orthonormal vectors
that give the matrix back. Where the library is missing, refuses, or gives anything else, the answer
is None, and torch.linalg has to do.

Source: NVIDIA, cuSOLVER API reference, ``cusolverDnXsyevBatched`` and ``cusolverDnXgesvdp``.
"""

import ctypes
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_double, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from soco.linalg.factors import SVD

# torch gives batches of up to 32 rows to cuSOLVER's batched eigensolver itself, and loops over
# larger matrices one by one (pytorch/pytorch#175585, #174674: 500 matrices of 100 rows take it 109
# times as long as CuPy, which does not). From 512 rows on a matrix alone has work for a GPU.
FEWEST_ROWS, MOST_ROWS = 33, 512
# How far the vectors may be from orthonormal, and their product from the matrix, in units of the
# dtype's eps times the number of rows: wrong results are far above, right ones below 1.
TOLERANCE = 8.0

_VECTORS, _UPPER, _ECONOMY = 1, 1, 1
_REAL = {torch.float32: 0, torch.float64: 1}  # cudaDataType
_NAMES = (
    "cusolverDnCreate", "cusolverDnCreateParams", "cusolverDnSetStream",
    "cusolverDnXsyevBatched_bufferSize", "cusolverDnXsyevBatched", "cusolverDnXgesvdp_bufferSize",
    "cusolverDnXgesvdp",
)  # fmt: skip
Handle = tuple[c_void_p, c_void_p]  # of cuSOLVER, and of a set of options
_handles: defaultdict[int, list[Handle]] = defaultdict(list)  # free ones, by device
_lock = threading.Lock()


def takes_batch(symmetric: Tensor) -> bool:
    """Whether :func:`eigh` is the way for these matrices (batch, n, n), by shape and device."""
    many = symmetric.dim() == 3 and len(symmetric) > 1
    return symmetric.is_cuda and many and FEWEST_ROWS <= symmetric.shape[-1] <= MOST_ROWS


@torch.no_grad()
def eigh(symmetric: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues, ascending, and vectors of all matrices (batch, n, n) by one call.

    Args:
        symmetric: float32 or float64; not changed.

    Returns:
        Values (batch, n) and vectors in columns (batch, n, n); None if there is no such library, or
        it failed.
    """
    solver = library()
    if solver is None:
        return None
    batch, n, _ = symmetric.shape
    kind = _REAL[symmetric.dtype]
    vectors = symmetric.clone(memory_format=torch.contiguous_format)  # overwritten
    values = vectors.new_empty(batch, n)
    info = torch.full((batch,), -1, dtype=torch.int32, device=vectors.device)
    matrices = (
        _VECTORS, _UPPER, c_int64(n), kind, c_void_p(vectors.data_ptr()), c_int64(n),
        kind, c_void_p(values.data_ptr()), kind,
    )  # fmt: skip
    many = (c_int64(batch),)
    done = _call(solver, "cusolverDnXsyevBatched", matrices, info, many, many)
    vectors = vectors.mT  # columns there are rows here
    ascending = done and bool((values[:, :-1] <= values[:, 1:]).all())
    if not ascending or not _is_decomposition(symmetric, vectors, values, vectors):
        return None
    return values, vectors


@torch.no_grad()
def svd(matrix: Tensor) -> SVD | None:
    """The SVD of a matrix (m, n) by its polar decomposition, which squares nothing.

    Args:
        matrix: float32 or float64; not changed.

    Returns:
        All min(m, n) triplets; None if there is no such library, or it failed. It adds a
        perturbation to matrices without full rank; None, too, where that shows in the result.
    """
    solver = library()
    if solver is None:
        return None
    if matrix.shape[0] > matrix.shape[1]:  # by columns a wide matrix is a tall one
        found = svd(matrix.mT)
        return None if found is None else SVD(found.Vh.mT, found.S, found.U.mT)
    rows, columns = matrix.shape
    kind = _REAL[matrix.dtype]
    taken = matrix.clone(memory_format=torch.contiguous_format)  # overwritten
    S, U, Vh = taken.new_empty(rows), taken.new_empty(rows, rows), torch.empty_like(taken)
    info = torch.full((1,), -1, dtype=torch.int32, device=taken.device)
    parts = (
        _VECTORS, _ECONOMY, c_int64(columns), c_int64(rows),
        kind, c_void_p(taken.data_ptr()), c_int64(columns), kind, c_void_p(S.data_ptr()),
        kind, c_void_p(Vh.data_ptr()), c_int64(columns),
        kind, c_void_p(U.data_ptr()), c_int64(rows), kind,
    )  # fmt: skip
    perturbation = c_double()  # not looked at: the result is
    done = _call(solver, "cusolverDnXgesvdp", parts, info, (), (byref(perturbation),))
    U = U.mT  # rows there are columns here
    ordered = done and bool((S[:-1] >= S[1:]).all() & (S >= 0).all())
    if not ordered or not _is_decomposition(matrix, U, S, Vh.mT):
        return None
    return SVD(U, S, Vh)


@cache
def library() -> ctypes.CDLL | None:
    """The cuSOLVER in this process, if it has everything that is called here.

    torch loads it with the first function of torch.linalg that runs on a GPU, so one is run.
    """
    maps = Path("/proc/self/maps")  # of Linux
    if not (torch.cuda.is_available() and maps.is_file()):
        return None
    torch.linalg.eigvalsh(torch.eye(2, device="cuda"))
    places = {line.split()[-1] for line in maps.read_text().splitlines()}
    found = sorted(place for place in places if Path(place).name.startswith("libcusolver.so"))
    return opened(found[0]) if found else None


def opened(path: str) -> ctypes.CDLL | None:
    """A shared library, if it has every function that is called here."""
    try:
        found = ctypes.CDLL(path)
    except OSError:
        return None
    return found if all(hasattr(found, name) for name in _NAMES) else None


def _call(
    solver: ctypes.CDLL,
    name: str,
    arguments: tuple[object, ...],
    info: Tensor,
    size_last: tuple[object, ...],
    last: tuple[object, ...],
) -> bool:
    """Ask a function for its workspace, and call it; whether all went well.

    Args:
        solver: the library.
        name: of the function; that of the one that tells sizes has ``_bufferSize`` behind it.
        arguments: what both take behind handle and options.
        info: int32, on the device, where the function says of each matrix whether it failed.
        size_last: what the one that tells sizes takes behind them.
        last: what the function takes behind ``info``.
    """
    with _handle(solver, info.device) as handle:
        if handle is None:
            return False
        sizes = c_size_t(), c_size_t()
        asked = getattr(solver, f"{name}_bufferSize")
        if asked(*handle, *arguments, *map(byref, sizes), *size_last) != 0:
            return False
        buffers = _buffers(*sizes, info.device)
        if buffers is None:
            return False
        place = c_void_p(info.data_ptr())
        status = getattr(solver, name)(*handle, *arguments, *buffers.arguments, place, *last)
        return status == 0 and not bool(info.any())  # waits, so the buffers may go


@contextmanager
def _handle(solver: ctypes.CDLL, device: torch.device) -> Iterator[Handle | None]:
    """A handle that nobody else uses meanwhile, on the device's current stream; None: refused."""
    with _current(device) as stream:
        with _lock:
            free = _handles[device.index or 0]
            handle = free.pop() if free else None
        if handle is None:
            handle = c_void_p(), c_void_p()
            created = solver.cusolverDnCreate(byref(handle[0])) == 0
            if not (created and solver.cusolverDnCreateParams(byref(handle[1])) == 0):
                yield None
                return
        try:
            refused = solver.cusolverDnSetStream(handle[0], c_void_p(stream)) != 0
            yield None if refused else handle
        finally:
            with _lock:
                free.append(handle)


@contextmanager
def _current(device: torch.device) -> Iterator[int]:
    """The device as CUDA's current one, and the address of its stream."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


class _Buffers(NamedTuple):
    """Memory of a call, which has to live as long as it."""

    device: Tensor
    host: ctypes.Array[ctypes.c_char]

    @property
    def arguments(self) -> tuple[object, ...]:
        """As the functions take it."""
        host = len(self.host)
        return (
            c_void_p(self.device.data_ptr()), c_size_t(len(self.device)),
            ctypes.cast(self.host, c_void_p) if host else None, c_size_t(host),
        )  # fmt: skip


def _buffers(device_bytes: c_size_t, host_bytes: c_size_t, device: torch.device) -> _Buffers | None:
    """As large as was asked for; None where the device has not so much."""
    try:
        held = torch.empty(device_bytes.value, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return None
    return _Buffers(held, (ctypes.c_char * host_bytes.value)())


def _is_decomposition(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> bool:
    """Whether ``left diag(values) right^T`` is the matrix, and both have orthonormal columns."""
    limit = TOLERANCE * torch.finfo(matrix.dtype).eps * max(matrix.shape[-2:])
    with torch.autocast(matrix.device.type, enabled=False):
        away = [_from_identity(left)]
        if right is not left:
            away.append(_from_identity(right))
        wrong = (left * values[..., None, :] @ right.mT - matrix).norm(dim=(-2, -1))
    size = matrix.norm(dim=(-2, -1))
    near = (wrong <= limit * size).all()
    return bool(near & torch.stack([each <= limit for each in away]).all())  # False for NaN


def _from_identity(columns: Tensor) -> Tensor:
    gram = columns.mT @ columns
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram.abs().amax()
