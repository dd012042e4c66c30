"""The memory of this process: what it holds, held at the most, and gives back."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

_KERNELS = "32"  # of oneDNN's


def give_back_memory() -> None:
    """Return to the system what was freed and is kept for later (by glibc; others do nothing).

    After large matrices that can be hundreds of megabytes, which count as resident.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def bound_caches() -> None:
    """Let oneDNN keep few of the kernels that it makes, unless the environment says how many.

    It makes one for every number of rows that a product in half precision has, and keeps 1024 of
    them, half a megabyte each, in each of two caches. The experts of a mixture are sent another
    number of tokens every time, so that these are never used again, and memory grows from block to
    block. (Of other models kernels are used again: to make one takes some milliseconds.) Where half
    precision has been multiplied in this process before, it is too late.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, _KERNELS)


def resident_memory() -> int:
    """Bytes that are in memory now, mapped files among them; the most so far if none can tell."""
    return _status("VmRSS")


def peak_memory() -> int:
    """The most so far, or since ``reset_peak``."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Count the peak anew from now on; whether that can be done (on Linux, if it is allowed)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")]
    if found:
        return found[0]
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
