"""soco.memory: what the system says of this process."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch

import soco
from soco import memory
from soco.memory import give_back_memory, peak_memory, reset_peak, resident_memory
from tiny_models import NEEDS_5, tiny_model


def written(size):
    """Pages of their own: what malloc gives may have been resident before, and stay so after."""
    pages = mmap.mmap(-1, size)
    for place in range(0, size, mmap.PAGESIZE):
        pages[place] = 1
    return pages


def test_resident_memory_counts_what_was_written():
    before = resident_memory()
    with written(2**26):
        assert abs(resident_memory() - before - 2**26) < 2**24


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts anew")
def test_the_peak_is_counted_anew():
    if not reset_peak():
        pytest.skip("this container forbids it")
    before = peak_memory()
    with written(2**26):
        pass
    assert peak_memory() - before > 2**26 - 2**24
    assert reset_peak()
    assert peak_memory() - before < 2**25


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_was_freed_goes_back():
    """Chunks below the size that glibc maps, with one in use behind them."""
    held = [torch.ones(2**16, dtype=torch.uint8) for _ in range(1000)]
    held = held[-1:]
    before = resident_memory()
    give_back_memory()
    assert before - resident_memory() > 2**25
    assert held


def test_elsewhere_nothing_happens(monkeypatch):
    def missing(name):
        raise OSError

    monkeypatch.setattr(memory.ctypes, "CDLL", missing)
    give_back_memory()


def test_without_proc_the_most_so_far_is_told(monkeypatch):
    monkeypatch.setattr(memory.Path, "exists", lambda self: False)
    assert resident_memory() == peak_memory() > 2**24


KERNELS = """
import sys, torch
from soco.memory import bound_caches, give_back_memory, resident_memory
if sys.argv[1] == "bound":
    bound_caches()
weight = torch.randn(256, 256, dtype=torch.bfloat16)
torch.nn.functional.linear(torch.randn(7, 256, dtype=torch.bfloat16), weight)
give_back_memory()
before = resident_memory()
for rows in range(33, 433):
    torch.nn.functional.linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
give_back_memory()
print(resident_memory() - before)
"""


def test_kernels_for_many_numbers_of_rows_are_not_kept(monkeypatch, tmp_path):
    """As the experts of a mixture ask for them."""
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)

    def grown(how):
        command = [sys.executable, "-c", KERNELS, how]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return int(ran.stdout.splitlines()[-1])

    free = grown("free")
    if free < 2**26:
        pytest.skip(f"this machine keeps {free:,} bytes")
    assert grown("bound") < free / 2


CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@NEEDS_5
def test_of_mixtures_alone(monkeypatch, tmp_path):
    """Of other models kernels are used again, and are not made for nothing."""
    called = []
    for place in ("stored", "experts"):
        monkeypatch.setattr(f"soco.{place}.bound_caches", lambda place=place: called.append(place))
    for name in ("llama", "mixtral"):
        model = tiny_model(name)
        model.save_pretrained(tmp_path / name)
        soco.compress(model, 0.4, method="svd", progress=False)
        soco.compress_folder(tmp_path / name, tmp_path / "out", 0.4, method="svd", progress=False)
        with soco.blockwise(tmp_path / name):
            pass
        assert called == ([] if name == "llama" else ["experts", "stored", "stored"])


def test_what_the_environment_says_of_caches_counts(monkeypatch):
    monkeypatch.setenv(CACHES[0], "7")
    monkeypatch.setenv(CACHES[1], "")  # to be put back afterwards
    monkeypatch.delenv(CACHES[1])
    memory.bound_caches()
    assert [os.environ[name] for name in CACHES] == ["7", "32"]
