"""What several test files need: devices, the data beside the repository, the demo model."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import soco
from soco import core
from soco.ops import direct, layers

REQUIRE_CUDA = os.environ.get("SOCO_REQUIRE_CUDA") == "1"  # the GPU job sets it: no silent skip
# One thread: the tensors here are small, and on a busy machine threads that wait for each other
# make the tests several times slower. Tests of threads say how many they want.
torch.set_num_threads(1)
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Away from the root, whose folder soco/ would hide the installed package from subprocesses."""
    os.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Every test that asks for it runs on the CPU, and on CUDA where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available() and not REQUIRE_CUDA:
        pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of trained models and texts beside the repository (its README lists them)."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder ../shared/data is not there")
    return SHARED_DATA


@pytest.fixture(scope="session")
def model_dir(shared_data: Path) -> Callable[[str], Path]:
    """``model_dir(name)``: the folder of a trained model of the shared data."""

    def find(name: str) -> Path:
        folder = shared_data / "models" / name
        if not folder.is_dir():
            pytest.skip(f"the model {name} is not in ../shared/data/models")
        return folder

    return find


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The trained model that the package ships."""
    assert soco.__file__ is not None
    return Path(soco.__file__).parent / "demo_model"


@pytest.fixture
def simd_level():
    """``simd_level(name)`` sets the level of the CPU kernels; the best one is back afterwards."""
    yield core.use_simd_level
    core.use_simd_level(core.simd_levels()[-1])


@pytest.fixture
def threads():
    """``threads(n)`` sets torch's number of threads; what it was is back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def always_by(side, monkeypatch):
    """One side of most_tokens, for any number of tokens."""
    most = 10**9 if side == "kernel" else -1
    for module in (layers, direct):
        monkeypatch.setattr(module, "most_tokens", lambda *_: most)
    return side


@pytest.fixture(params=["kernel", "library"])
def side(request, monkeypatch):
    """Both sides of most_tokens."""
    return always_by(request.param, monkeypatch)


@pytest.fixture
def on_cpu_by_kernel(request, monkeypatch):
    """Kernels of the CPU also where this processor's library would take so many tokens."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("device", "cpu") == "cpu":
        always_by("kernel", monkeypatch)
