"""soco.core: the core's parts against known answers, its build record, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import reference
from soco import _C, core

# From the known-answer file of Random123, the authors' own implementation.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX_ANSWERS)
def test_philox_known_answers(counter, key, answer):
    assert tuple(_C.philox(counter, *key)) == answer
    assert tuple(reference.philox(np.array([counter]), np.array([key]))[0]) == answer


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bit_floats_widen_exactly(name):
    dtype, kind = getattr(torch, name), getattr(_C.Dtype, name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    theirs = every.view(dtype).float()
    ours = torch.tensor([_C.widen_bits(bits & 0xFFFF, kind) for bits in every.tolist()])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit(), theirs.signbit() & ~ours.isnan() | ours.signbit())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_floats_narrow_to_nearest_even(name):
    dtype, kind = getattr(torch, name), getattr(_C.Dtype, name)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values
    halfway = (finite[1:].double() + finite[:-1].double()).div(2).float()  # ties, all of them
    above = torch.nextafter(halfway, torch.tensor(torch.inf))
    values = torch.cat([bits.view(torch.float32), finite, halfway[::7], above[::11]])
    ours = torch.tensor([_C.narrow_bits(value, kind) for value in values.tolist()])
    theirs = values.to(dtype)
    ours = ours.to(torch.int32).to(torch.int16).view(dtype)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.signbit() | ours.isnan(), theirs.signbit() | ours.isnan())


def test_build_record_says_how_it_was_built():
    record = core.build_record()
    assert record["compiler"]
    assert record["simd_level"] in core.simd_levels()
    assert bool(record["cuda"]) != bool(record["cuda_absent"])  # the version, or why there is none
    assert bool(record["cuda"]) == bool(record["cuda_architectures"])
    assert bool(record["cuda"]) == hasattr(_C, "gaussian_cuda")


def test_unknown_simd_level_is_refused():
    with pytest.raises(ValueError, match="portable, avx2 and avx512; got sse9"):
        core.use_simd_level("sse9")


@pytest.mark.parametrize(
    ("nvcc", "torch_cuda"), [("", "13.0"), ("13.0.88", None), ("13.0.88", "13.2"), ("12.8", "12.6")]
)
def test_matching_cuda_is_silent(nvcc, torch_cuda):
    assert core.cuda_mismatch(nvcc, torch_cuda) is None


def test_other_cuda_is_named():
    message = core.cuda_mismatch("13.0.88", "12.6")
    assert message is not None
    assert "nvcc 13.0.88" in message
    assert "CUDA 12.6" in message
    assert "CUDA 12 toolkit" in message


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_other_cuda_is_warned_of_at_import():
    done = run(
        "import torch, warnings, soco._C as _C\n"
        "_C.build_record = {**_C.build_record, 'cuda': '13.0.88'}\n"
        "torch.version.cuda = '12.6'\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    import soco.ops\n"
        "print([str(w.message) for w in seen])\n"
    )
    assert "compiled by nvcc 13.0.88, but torch was built for CUDA 12.6" in done.stdout, done.stderr


def test_missing_core_is_one_precise_error():
    done = run("import sys; sys.modules['soco._C'] = None; import soco.ops")
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: soco's compiled core soco._C cannot be imported")
    assert "pip install ." in last


@pytest.mark.skipif(bool(_C.build_record["cuda"]), reason="this build has CUDA kernels")
def test_cuda_tensor_without_cuda_kernels_is_one_clear_error():
    refuse = "soco has no CUDA kernels in this build .*: reinstall it from source with nvcc"
    with pytest.raises(RuntimeError, match=refuse):
        call_cuda_kernel("spectral_scale", torch.ones(1), torch.ones(1), torch.ones(1).bool())


def call_cuda_kernel(name: str, *args: torch.Tensor) -> None:
    """What the dispatcher does with CUDA tensors, without the tensors."""
    op = getattr(torch.ops.soco, name).default
    op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args)
