"""soco.ops.barriers: who waits at which counter."""

import itertools

import torch

from soco.ops import barriers
from soco.ops.barriers import Counters, barrier_for


def test_a_stream_keeps_its_counter():
    counters = Counters(torch.device("cpu"))
    first, second = counters.address(11, False), counters.address(12, False)
    assert first != second
    assert counters.address(11, False) == first
    assert counters.address(12, False) == second


def test_every_recorded_call_has_its_own():
    counters = Counters(torch.device("cpu"))
    of_stream = counters.address(11, False)
    recorded = {counters.address(11, True) for _ in range(50)}
    assert len(recorded) == 50
    assert of_stream not in recorded
    assert 0 not in recorded


def test_counters_are_zero_and_far_apart():
    counters = Counters(torch.device("cpu"))
    found = sorted({counters.address(1, False), *(counters.address(1, True) for _ in range(9))})
    assert all(b - a >= 128 for a, b in itertools.pairwise(found))
    (memory,) = counters._kept
    assert not memory.any()
    assert memory.data_ptr() <= found[0]
    assert found[-1] < memory.data_ptr() + memory.nbytes


def test_none_while_recording_before_there_are_any():
    counters = Counters(torch.device("cpu"))
    assert counters.address(11, True) == 0
    assert not counters._kept  # memory is not made ready while recording


def test_more_are_made_outside_of_recordings(monkeypatch):
    monkeypatch.setattr(barriers, "CHUNK", 4)
    counters = Counters(torch.device("cpu"))
    of_stream = counters.address(11, False)
    recorded = [counters.address(11, True) for _ in range(4)]
    assert recorded[3] == 0
    assert len(counters) == 0
    assert counters.address(11, False) == of_stream
    assert len(counters) == 4
    assert counters.address(11, True) not in {0, of_stream, *recorded}


def test_the_cpu_needs_none():
    assert barrier_for(torch.ones(2, dtype=torch.bfloat16)) == 0
