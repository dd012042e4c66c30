"""The one door to the compiled core: build facts, and how its kernels become those of an op."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

try:
    from soco import _C
except ImportError as error:
    raise ImportError(
        f"soco's compiled core soco._C cannot be imported ({error}): install the package with "
        "`pip install .` in a clone of the project, and start Python elsewhere than in the clone's "
        "root, whose folder soco/ holds no compiled core"
    ) from error

DTYPES = {
    torch.float32: _C.Dtype.float32,
    torch.float64: _C.Dtype.float64,
    torch.bfloat16: _C.Dtype.bfloat16,
    torch.float16: _C.Dtype.float16,
}
WEIGHT_DTYPES = {  # what weights of a low-rank layer may be in
    **DTYPES,
    torch.int8: _C.Dtype.int8,
    torch.float8_e4m3fn: _C.Dtype.float8,
}
MOST_MEMBERS = _C.most_members  # low-rank layers in one call
MOST_SWEEPS = _C.most_sweeps  # of an SVD that did not converge
LowRankPlan = _C.LowRankPlan
SvdBatch = _C.SvdBatch
spectral_partials = _C.spectral_partials
svd_scratch = _C.svd_scratch
simd_levels = _C.simd_levels
use_simd_level = _C.use_simd_level

library = torch.library.Library("soco", "DEF")
Run: TypeAlias = Callable[..., None]  # see implement
Body = TypeVar("Body", bound=Callable[..., Any])
kernels: dict[str, tuple[str, ...]] = {}  # op to the kinds of device that have a kernel for it


def build_record() -> dict[str, str]:
    """How the compiled core was built, and the SIMD level and threads it runs at here."""
    return {**_C.build_record, "simd_level": _C.simd_level(), "threads": _C.threads()}


def cuda_mismatch(nvcc: str, torch_cuda: str | None) -> str | None:
    """Say what is wrong when nvcc's and torch's CUDA differ in their major version, else None."""
    if not nvcc or torch_cuda is None or nvcc.split(".")[0] == torch_cuda.split(".")[0]:
        return None
    return (
        f"soco's CUDA kernels were compiled by nvcc {nvcc}, but torch was built for CUDA "
        f"{torch_cuda}: this machine's driver may be unable to run them; reinstall soco with the "
        f"nvcc of a CUDA {torch_cuda.split('.')[0]} toolkit on the PATH"
    )


if message := cuda_mismatch(_C.build_record["cuda"], torch.version.cuda):
    warnings.warn(message, stacklevel=2)


@cache
def runner(kernel: str, device: str) -> Run | None:
    """``run(x, *args)`` that calls the core's ``kernel`` for a kind of device; None if it has none.

    The threads of the CPU, or the stream of the GPU that ``x`` is on, come behind ``args``.
    """
    call: Run | None = getattr(_C, f"{kernel}_{device}", None)
    if call is None:
        return None

    def run_cpu(x: Tensor, *args: object) -> None:
        call(*args, torch.get_num_threads())

    def run_cuda(x: Tensor, *args: object) -> None:
        with torch.cuda.device(x.device):
            call(*args, torch.cuda.current_stream().cuda_stream)

    return run_cpu if device == "cpu" else run_cuda


def implement(op: str, kernel: str) -> Callable[[Body], Body]:
    """Register the decorated function as an op's implementation on the CPU and on CUDA.

    It gets a first argument ``run``, the :func:`runner` of ``kernel`` for the device.
    """

    def refuse(*_: object) -> None:
        raise RuntimeError(
            f"soco has no CUDA kernels in this build ({_C.build_record['cuda_absent']}): reinstall "
            "it from source with nvcc on the PATH, or move the tensors to the CPU"
        )

    def register(body: Body) -> Body:
        on_cuda = runner(kernel, "cuda")
        kernels[op] = ("cpu", "cuda") if on_cuda else ("cpu",)
        library.impl(op, partial(body, runner(kernel, "cpu")), "CPU")
        library.impl(op, partial(body, on_cuda) if on_cuda else refuse, "CUDA")
        return body

    return register


def without_autocast(op: Any, *, cast: bool, keep: tuple[int, ...] = ()) -> None:
    """Under autocast, run an op with autocast off, so that its own products keep their dtype.

    With ``cast`` its inputs are cast to autocast's dtype first, those that autocast casts: all
    floating-point tensors but float64, and but for the arguments at the places in ``keep``.
    """

    def kernel(device: str, *args: Any) -> Any:
        def prepared(arg: Any) -> Any:
            if isinstance(arg, list):
                return [prepared(item) for item in arg]
            eligible = isinstance(arg, Tensor) and arg.dtype in DTYPES.keys() - {torch.float64}
            return arg.to(torch.get_autocast_dtype(device)) if cast and eligible else arg

        args = tuple(arg if i in keep else prepared(arg) for i, arg in enumerate(args))
        with torch.autocast(device, enabled=False):
            return op(*args)

    name = op.name().removeprefix("soco::").removesuffix(".default")
    library.impl(name, partial(kernel, "cpu"), "AutocastCPU")
    library.impl(name, partial(kernel, "cuda"), "AutocastCUDA")
