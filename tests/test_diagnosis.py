"""soco.diagnosis: what is said of an installation, and of what is wrong with it."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace

import pytest
import torch

from soco import core, diagnosis, ops

BUILD = {
    "version": "1.0",
    "cuda": "13.0.88",
    "cuda_absent": "",
    "cuda_architectures": "80-real;90",
    "simd_level": "avx2",
}
CPU = diagnosis.Device("cpu", "x86_64, 2 cores", None, "kernels: avx2")
GPU = diagnosis.Device("cuda:0", "Some GPU, compute capability 9.0", 2**37, "kernels: sm_90")


def problems(
    monkeypatch, build=BUILD, devices=(CPU,), installed=None, torch_cuda="13.0", driver=False
):
    """What is said of an imagined installation."""
    versions = {"soco-llm": "1.0"} | (installed or {})
    monkeypatch.setattr(diagnosis, "_version", versions.get)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true" if driver else None)
    return diagnosis._problems(build, devices)


def test_this_installation():
    found = diagnosis.diagnose()
    assert found.versions["torch"].startswith(torch.__version__)
    assert found.versions["soco-llm"] == found.build["version"]
    assert found.threads == torch.get_num_threads()
    assert found.devices[0].name == "cpu"
    assert len(found.devices) == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert set(found.ops) == set(ops.__all__)
    assert all("cpu" in kinds for kinds in found.ops.values())
    assert all(("cuda" in kinds) == bool(found.build["cuda"]) for kinds in found.ops.values())


def test_it_is_plain_data():
    found = diagnosis.diagnose()
    assert json.loads(json.dumps(asdict(found)))["build"] == core.build_record()


def test_the_page_says_everything():
    found = replace(
        diagnosis.diagnose(),
        devices=(CPU, GPU),
        optional={"matplotlib": None, "peft": "0.1"},
        problems=("the roof leaks: mend it",),
    )
    page = found.render()
    for piece in (
        *found.versions.values(),
        found.build["compiler"],
        found.build["simd_level"],
        "cuda:0        Some GPU, compute capability 9.0, 128 GiB; kernels: sm_90",
        "not installed; for plots: `pip install matplotlib`",
        "low_rank_linear_backward   cpu",
        "  - the roof leaks: mend it",
    ):
        assert piece in page
    assert "Problems: none" in replace(found, problems=()).render()


def test_nothing_wrong(monkeypatch):
    assert problems(monkeypatch) == []
    assert problems(monkeypatch, devices=(CPU, GPU), driver=True) == []


NO_CUDA = BUILD | {"cuda": "", "cuda_absent": "no nvcc was found at build time"}


@pytest.mark.parametrize(
    ("imagined", "said"),
    [
        ({"installed": {"soco": "0.30"}}, "home-audio library soco 0.30"),
        ({"installed": {"soco-llm": "1.1"}}, "core is of version 1.0, but soco-llm 1.1"),
        ({"build": NO_CUDA, "devices": (CPU, GPU)}, r"no CUDA kernels \(no nvcc was found"),
        (
            {"devices": (CPU, replace(GPU, kernels="kernels: none"))},
            r"cuda:0 .* cannot run the kernels, built for 80-real;90",
        ),
        ({"driver": True, "torch_cuda": None}, "install a CUDA build of torch"),
        ({"driver": True}, "look at what `nvidia-smi`"),
        ({"torch_cuda": "12.8"}, "nvcc 13.0.88, but torch was built for CUDA 12.8"),
    ],
)
def test_what_is_wrong_is_said(monkeypatch, imagined, said):
    (found,) = problems(monkeypatch, **imagined)
    assert re.search(said, found), found


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), "80-real;90", "sm_80"),
        ((8, 6), "80-real;89-real;90", "sm_80"),
        ((8, 9), "80-real;89-real;90", "sm_89"),
        ((9, 0), "80-real;90", "sm_90"),
        ((10, 3), "90-real;100", "sm_100"),
        ((12, 0), "90-real;100", "PTX of sm_100"),
        ((12, 0), "100-real", None),
        ((7, 5), "80-real;90", None),
        ((9, 0), "90a", "sm_90"),
        ((10, 0), "90a", None),
        ((9, 0), "80-virtual", "PTX of sm_80"),
        ((9, 0), "native", None),
    ],
)
def test_which_kernels_a_gpu_runs(capability, architectures, runs):
    assert diagnosis.kernels_for(capability, architectures) == runs


def test_the_commit_is_that_of_a_clone(tmp_path):
    assert diagnosis.commit_of(tmp_path) is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True)
    assert diagnosis.commit_of(tmp_path) is None  # nothing is committed yet
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    found = diagnosis.commit_of(tmp_path)
    assert found is not None
    assert len(found) == 12
    (tmp_path / "file").write_text("2")
    assert diagnosis.commit_of(tmp_path) == f"{found}-dirty"
