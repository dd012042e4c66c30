"""soco.linalg.cusolver: against a library with cuSOLVER's functions, on a processor.

The library (tests/emulated/cusolver.cpp) checks what NVIDIA's reference says of the arguments.
Where there is a GPU, the real one is compared with torch as well.
"""

import subprocess
import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from emulation import ROOT, compiler
from soco.linalg import cusolver, exact, parallel, truncated_svd

DTYPES = [torch.float32, torch.float64]
MOODS = ["well", "no handle", "no stream", "refuses size", "refuses call", "not converged",
         "wrong", "NaN", "unordered", "negative", "says no"]  # fmt: skip
STREAM = 0xABC0


def normal(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def symmetric(*shape, dtype=torch.float64):
    matrix = normal(*shape, dtype=dtype)
    return matrix + matrix.mT


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    if not compiler():
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("cusolver") / "libcusolver.so"
    source = ROOT / "tests/emulated/cusolver.cpp"
    command = [compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", source, "-o", target]
    subprocess.run(command, check=True)
    found = cusolver.opened(str(target))
    assert found is not None
    return found


@pytest.fixture
def library(built, monkeypatch):
    """The library in place of NVIDIA's, and the processor in place of a GPU."""

    @contextmanager
    def current(device):
        assert device.type == "cpu"
        yield STREAM

    monkeypatch.setattr(cusolver, "library", lambda: built)
    monkeypatch.setattr(cusolver, "_current", current)
    monkeypatch.setattr(cusolver, "_handles", type(cusolver._handles)(list))
    built.set_mood(0)
    built.last_stream.restype = cusolver.c_void_p
    yield built
    built.set_mood(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 33, 33), (5, 12, 12)], ids=str)
def test_eigenvalues_and_vectors_are_torchs(library, shape, dtype):
    matrices = symmetric(*shape, dtype=dtype)
    before = matrices.clone()
    found = cusolver.eigh(matrices)
    assert found is not None
    values, vectors = found
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices), rtol=1e-5, atol=1e-5)
    again = vectors * values[..., None, :] @ vectors.mT
    torch.testing.assert_close(again, matrices, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrices, before)
    assert library.last_stream() == STREAM


def test_matrices_of_any_strides_have_eigenvectors(library):
    one = symmetric(9, 9)
    matrices = one.expand(3, 9, 9)
    found = cusolver.eigh(matrices)
    assert found is not None
    torch.testing.assert_close(found[0], torch.linalg.eigvalsh(matrices))
    every_other = symmetric(4, 9, 9)[::2]
    assert not every_other.is_contiguous()
    found = cusolver.eigh(every_other)
    assert found is not None
    torch.testing.assert_close(found[0], torch.linalg.eigvalsh(every_other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (5, 9), (7, 7), (1, 4), (4, 1)], ids=str)
def test_singular_triplets_are_torchs(library, shape, dtype):
    matrix = normal(*shape, dtype=dtype)
    before = matrix.clone()
    found = cusolver.svd(matrix)
    assert found is not None
    assert found.U.shape == (shape[0], min(shape))
    assert found.Vh.shape == (min(shape), shape[1])
    torch.testing.assert_close(found.S, torch.linalg.svdvals(matrix), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.U * found.S @ found.Vh, matrix, rtol=1e-5, atol=1e-5)
    assert torch.equal(matrix, before)
    assert library.last_stream() == STREAM


def test_a_matrix_of_any_strides_has_singular_triplets(library):
    for matrix in (normal(9, 5).mT, normal(5, 9).mT, normal(10, 12)[::2, ::3]):
        found = cusolver.svd(matrix)
        assert found is not None
        torch.testing.assert_close(found.U * found.S @ found.Vh, matrix)


@pytest.mark.parametrize("mood", MOODS)
def test_what_goes_wrong_is_no_result(library, mood):
    library.set_mood(MOODS.index(mood))
    matrices = symmetric(3, 8, 8)
    good = mood == "well"
    assert (cusolver.eigh(matrices) is not None) is (good or mood == "negative")  # as they may be
    assert (cusolver.svd(matrices[0]) is not None) is good
    library.set_mood(0)  # and afterwards all is well again
    assert cusolver.eigh(matrices) is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_for_hundreds_of_rows_are_well_within_the_tolerance(library, dtype, monkeypatch):
    monkeypatch.setattr(cusolver, "TOLERANCE", cusolver.TOLERANCE / 8)
    assert cusolver.eigh(symmetric(2, 120, 120, dtype=dtype)) is not None
    assert cusolver.svd(normal(120, 150, dtype=dtype)) is not None


def test_one_unit_in_a_thousand_is_beyond_the_tolerance(library):
    values, vectors = torch.linalg.eigh(symmetric(2, 512, 512, dtype=torch.float32))
    matrices = vectors * values[:, None] @ vectors.mT
    assert cusolver._is_decomposition(matrices, vectors, values, vectors)
    assert not cusolver._is_decomposition(matrices, vectors, values * 1.001, vectors)
    assert not cusolver._is_decomposition(matrices, vectors * 1.001, values / 1.001, vectors)
    assert not cusolver._is_decomposition(matrices, vectors, values / 1.001, vectors * 1.001)


def test_a_device_without_room_for_the_workspace_is_no_result(library, monkeypatch):
    def empty(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "empty", empty)
    assert cusolver.eigh(symmetric(2, 8, 8)) is None


def test_handles_are_used_again_and_never_by_two_at_once(library, monkeypatch):
    made = library.handles_made()
    for _ in range(3):
        cusolver.eigh(symmetric(2, 8, 8))
    assert library.handles_made() == made + 1
    together = threading.Barrier(2, timeout=60)
    buffers = cusolver._buffers

    def both_there(*args):
        together.wait()
        return buffers(*args)

    monkeypatch.setattr(cusolver, "_buffers", both_there)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(cusolver.eigh(symmetric(2, 8, 8))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found
    assert library.handles_made() == made + 2


def test_a_matrix_without_full_rank_is_left_to_torch(library, monkeypatch):
    """The library's U is not orthonormal then: seen, and torch's taken."""
    matrices = normal(3, 12, 9)
    matrices[1, :, 4] = 0
    assert cusolver.svd(matrices[1]) is None
    by_torch, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **o: by_torch.append(a) or svd(*a, **o))
    found = exact._by_polar(matrices, "weight")
    assert len(by_torch) == 1
    torch.testing.assert_close(found.U * found.S[:, None] @ found.Vh, matrices)
    identity = torch.eye(9, dtype=torch.float64).expand(3, 9, 9)
    torch.testing.assert_close(found.U.mT @ found.U, identity)
    library.set_mood(MOODS.index("refuses call"))
    again = exact._by_polar(matrices, "weight")
    torch.testing.assert_close(again.S, found.S)


def test_the_exact_way_takes_what_the_library_gives_or_does_without(library, monkeypatch):
    monkeypatch.setattr(exact, "SMALL", 0)
    weights = normal(3, 40, 70, dtype=torch.float32)
    expected = truncated_svd(weights, 10)
    asked = []
    monkeypatch.setattr(cusolver, "takes_batch", lambda gram: asked.append(gram.shape) or True)
    by_torch, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: by_torch.append(gram) or eigh(gram))
    for mood, times in (("well", 0), ("wrong", 1)):
        library.set_mood(MOODS.index(mood))
        for found, part in zip(truncated_svd(weights, 10), expected, strict=True):
            torch.testing.assert_close(found, part, rtol=1e-4, atol=1e-4)
        assert len(by_torch) == times
    assert asked == [(3, 40, 40)] * 2


def test_which_matrices_go_to_the_batched_solver():
    with torch._subclasses.FakeTensorMode():

        def taken(*shape, device="cuda"):
            return cusolver.takes_batch(torch.empty(*shape, device=device))

        assert taken(4, 33, 33)
        assert taken(2, cusolver.MOST_ROWS, cusolver.MOST_ROWS)
        assert not taken(4, 32, 32)
        assert not taken(4, 513, 513)
        assert not taken(1, 33, 33)  # one alone
        assert not taken(33, 33)
        assert not taken(4, 64, 64, device="cpu")


def test_libraries_that_are_none(tmp_path):
    assert cusolver.opened(str(tmp_path / "nowhere.so")) is None
    (tmp_path / "broken.so").write_text("no library")
    assert cusolver.opened(str(tmp_path / "broken.so")) is None
    assert cusolver.opened(torch._C.__file__) is None  # has none of the functions
    if not torch.cuda.is_available():
        assert cusolver.library() is None


# ---- streams ------------------------------------------------------------------------------------


class Stream:
    """A stream that writes down who waited for whom; work on it is done at once."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append((self.name, "waits for", other.name))


class Item:
    """A tensor that writes down who may use its memory."""

    def __init__(self, value, log):
        self.value, self.log = value, log

    def record_stream(self, stream):
        self.log.append((self.value, "is used on", stream.name))


@pytest.fixture
def streams(monkeypatch):
    """Streams that are not there; the log of what happened to them."""
    log, local = [], threading.local()
    here = Stream("here", log)
    others = tuple(Stream(f"stream {i}", log) for i in range(parallel.STREAMS))

    @contextmanager
    def on(stream):
        local.current = stream
        yield
        local.current = None

    monkeypatch.setattr(parallel, "_streams_of", lambda device: others)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(torch.cuda, "stream", on)
    return log, local


def test_on_streams_all_wait_for_each_other(streams):
    log, local = streams

    def work(item) -> Any:
        assert not torch.is_grad_enabled()
        log.append((local.current.name, "works on", item.value))
        return (Item(item.value * 10, log),)

    items: Any = [Item(i, log) for i in range(9)]
    found: Any = parallel.on_streams(work, items, torch.device("cuda", 0), 3)
    assert [each.value for (each,) in found] == [10 * i for i in range(9)]
    for i in range(9):
        at = next(j for j, entry in enumerate(log) if entry[1:] == ("works on", i))
        stream = log[at][0]
        assert (stream, "waits for", "here") in log[:at]
        waited = log.index(("here", "waits for", stream), at)
        assert log.index((10 * i, "is used on", "here")) > waited > at
    assert {entry[0] for entry in log if entry[1] == "works on"} <= {
        "stream 0", "stream 1", "stream 2",
    }  # fmt: skip


def test_on_streams_an_error_comes_out(streams):
    def work(item) -> Any:
        raise ValueError(f"item {item.value}")

    items: Any = [Item(0, [])]
    with pytest.raises(ValueError, match="item 0"):
        list(parallel.on_streams(work, items, torch.device("cuda", 0), 2))


# ---- with a GPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_real_library_agrees_with_torch(device, dtype):
    assert cusolver.library() is not None
    matrices = symmetric(5, 100, 100, dtype=dtype).to(device)
    found = cusolver.eigh(matrices)
    assert found is not None
    torch.testing.assert_close(
        found[0], torch.linalg.eigvalsh(matrices.double()).to(dtype), rtol=1e-4, atol=1e-3
    )
    for shape in ((200, 130), (130, 200)):
        matrix = normal(*shape, dtype=dtype).to(device)
        svd = cusolver.svd(matrix)
        assert svd is not None
        torch.testing.assert_close(svd.S, torch.linalg.svdvals(matrix), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("shape", [(6, 200, 300), (5, 600, 700)], ids=str)
def test_a_batch_on_a_gpu_equals_its_matrices_one_by_one(device, shape):
    weights = normal(*shape, dtype=torch.float32).to(device)
    together = truncated_svd(weights, 50)
    for i, weight in enumerate(weights):
        alone = truncated_svd(weight, 50)
        torch.testing.assert_close(together.S[i], alone.S, rtol=1e-5, atol=1e-5)
        kept = together.U[i] * together.S[i] @ together.Vh[i]
        torch.testing.assert_close(kept, alone.U * alone.S @ alone.Vh, rtol=1e-3, atol=1e-2)
