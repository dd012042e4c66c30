"""soco.memory: what the system says of this process."""

import ctypes
import mmap
import sys

import pytest
import torch

from soco import memory
from soco.memory import give_back_memory, peak_memory, reset_peak, resident_memory


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
