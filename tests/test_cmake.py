"""The native build, as far as its configuration goes."""

import shutil
import subprocess

import pytest

from test_floors import ROOT


@pytest.mark.parametrize("chosen", [None, "90"])
def test_architectures_stay_when_it_is_configured_again(tmp_path, chosen):
    """CMake's own default, which it writes down, is no choice of the user."""
    for program in ("cmake", "nvcc"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program}")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DSOCO_PYTHON=OFF"]
    command += [] if chosen is None else [f"-DCMAKE_CUDA_ARCHITECTURES={chosen}"]
    found = []
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True)
        flags = (tmp_path / "CMakeFiles/soco_cuda.dir/flags.make").read_text()
        found.append([arch for arch in (75, 80, 89, 90, 100) if f"compute_{arch}" in flags])
    assert found[0] == found[1] == ([90] if chosen else [80, 89, 90, 100])
