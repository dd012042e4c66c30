"""The compiled core, csrc/bindings.cpp: pointers as integers, sizes, dtypes, threads or stream."""

from collections.abc import Sequence

class Dtype:
    float32: Dtype
    float64: Dtype
    bfloat16: Dtype
    float16: Dtype
    int8: Dtype
    float8: Dtype
    value: int

class LowRankPlan:
    def __init__(
        self,
        down: int,
        down_scale: int,
        members: Sequence[tuple[int, int, int, int, int, int, int]],
        bias: int,
        in_features: int,
        dtype: Dtype,
        weight_dtype: Dtype,
        gated: bool,
        dependent: bool,
        shares: Sequence[int],
        /,
    ) -> None:
        """Each of members is up, stride, up_scale, sources, rank, rows and out."""

class SvdBatch:
    def __init__(
        self,
        matrices: int,
        left: int,
        values: int,
        right: int,
        sweeps: int,
        batch: int,
        rows: int,
        columns: int,
        row_stride: int,
        column_stride: int,
        dtype: Dtype,
        sign_by_right: bool,
        /,
    ) -> None: ...

build_record: dict[str, str]
most_members: int
most_sweeps: int

def spectral_partials(tokens: int, segments: int, /) -> int: ...
def spectral_scale_cpu(
    x: int,
    scale: int,
    mask: int,
    y: int,
    tokens: int,
    rank: int,
    dtype: Dtype,
    scale_dtype: Dtype,
    threads: int,
    /,
) -> None: ...
def spectral_scale_backward_cpu(
    grad: int,
    x: int,
    scale: int,
    mask: int,
    grad_x: int,
    sums: int,
    partials: int,
    tokens: int,
    rank: int,
    segments: int,
    dtype: Dtype,
    scale_dtype: Dtype,
    threads: int,
    /,
) -> None: ...
def low_rank_group_cpu(
    plan: LowRankPlan,
    x: int,
    residual: int,
    z: int,
    y: int,
    tokens: int,
    barrier: int,
    threads: int,
    /,
) -> None: ...
def gaussian_cpu(omega: int, rows: int, columns: int, seed: int, threads: int, /) -> None: ...
def svd_scratch(batch: int, rows: int, columns: int, /) -> int: ...
def batched_svd_cpu(batch: SvdBatch, scratch: int, threads: int, /) -> None: ...

# Only in a build with CUDA:
def spectral_scale_cuda(
    x: int,
    scale: int,
    mask: int,
    y: int,
    tokens: int,
    rank: int,
    dtype: Dtype,
    scale_dtype: Dtype,
    stream: int,
    /,
) -> None: ...
def spectral_scale_backward_cuda(
    grad: int,
    x: int,
    scale: int,
    mask: int,
    grad_x: int,
    sums: int,
    partials: int,
    tokens: int,
    rank: int,
    segments: int,
    dtype: Dtype,
    scale_dtype: Dtype,
    stream: int,
    /,
) -> None: ...
def low_rank_group_cuda(
    plan: LowRankPlan,
    x: int,
    residual: int,
    z: int,
    y: int,
    tokens: int,
    barrier: int,
    stream: int,
    /,
) -> None: ...
def gaussian_cuda(omega: int, rows: int, columns: int, seed: int, stream: int, /) -> None: ...
def batched_svd_cuda(batch: SvdBatch, scratch: int, stream: int, /) -> None: ...

# Single functions of the kernels, for tests:
def philox(counter: Sequence[int], key0: int, key1: int, /) -> list[int]: ...
def widen_bits(bits: int, dtype: Dtype, /) -> float: ...
def narrow_bits(value: float, dtype: Dtype, /) -> int: ...
def threads() -> str: ...
def simd_level() -> str: ...
def simd_levels() -> list[str]: ...
def use_simd_level(name: str, /) -> None: ...
